"""The table of variants, printed on the terminal and written to the bundle's report."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from train.bundle.cost_model import held_out_errors
from train.bundle.manifest import Variant

if TYPE_CHECKING:
    from train.compress.pipeline import CompressionResult

# Wide enough to show every column in full; a narrow terminal wraps the lines.
WIDTH = 160


def write_variants_table(made: "CompressionResult", metric: str, path: Path) -> None:
    """Print the variants on stderr; write them to `path` as Markdown with the reasons."""
    columns = (
        "variant",
        "engine",
        "verdict",
        metric,
        "drop on valid [95 % CI]",
        "bytes",
        "ms, batch 1",
    )
    table = Table(box=None, pad_edge=False)
    for place, column in enumerate((*columns, "records/s, batch 32")):
        table.add_column(column, justify="left" if place < 3 else "right")
    for row in _rows(made, metric):
        table.add_row(*row)
    Console(stderr=True, highlight=False, width=WIDTH).print(table)
    table.box, table.pad_edge = box.MARKDOWN, True
    with path.open("w") as file:
        Console(file=file, width=WIDTH).print(table)
    with path.open("a") as file:
        file.write(
            f"\nDefault: {made.default}, best in {made.optimize_for}. Measured on one thread.\n"
        )
        for name, variant in made.variants.items():
            file.write(f"\n- {name}: {variant.verdict}; {variant.reason}")
            file.write(_fit_words(variant))
        for name, reason in made.skipped.items():
            file.write(f"\n- {name}: skipped; {reason}")
        file.write("\n")
    for name, variant in made.variants.items():
        if not variant.accepted:
            print(f"{name} is {variant.verdict}: {variant.reason}", file=sys.stderr)


def _fit_words(variant: Variant) -> str:
    """Return how well the time of a batch follows from its rows and length; "" without lengths."""
    timings = variant.measured(1)
    if timings[0].length is None:
        return ""
    errors = held_out_errors(timings)
    return (
        f"; time by rows and length fitted to {len(timings)} sizes, error at a size that was left "
        f"out: median {np.median(errors):.1%}, 95th percentile {np.quantile(errors, 0.95):.1%}"
    )


def _rows(made: "CompressionResult", metric: str) -> list[list[str]]:
    rows = []
    if eager := {timing.batch_size: timing.p50_ms for timing in made.eager}:
        reference = f"{made.variants['fp32'].metrics[metric]:.4f}"
        times = f"{eager[1]:.2f}", f"{32e3 / eager[32]:,.0f}"
        rows.append(["eager fp32", "torch", "", reference, "", "", *times])
    for name, variant in made.variants.items():
        drop, low, high = variant.drop
        rows.append(
            [
                f"{name} ←" if name == made.default else name,
                variant.engine,
                variant.verdict,
                f"{variant.metrics[metric]:.4f}",
                f"{drop:+.4f} [{low:+.4f}, {high:+.4f}]" if name != "fp32" else "",
                f"{variant.size_bytes:,}",
                f"{variant.p50_ms:.2f}",
                f"{variant.records_per_s:,.0f}",
            ]
        )
    return rows
