"""Progress of a run on stderr, as plain lines."""

import sys
from collections.abc import Callable
from typing import Any

from train.config import Config


def show(config: Config) -> Callable[[dict[str, Any]], None]:
    """Return what shows an event."""

    def line(row: dict[str, Any]) -> None:
        if row["event"] == "start":
            many = "worker" if row["workers"] == 1 else "workers"
            at = f", from step {row['step']} of {row['total_steps']}" if row["step"] else ""
            print(f"training on {row['workers']} {many}{at}", file=sys.stderr)
            return
        rest = "  ".join(
            f"{name} {value:.4f}"
            for name, value in row.items()
            if name.startswith(("train", "valid"))
        )
        epochs = f"{row['epoch']}/{config.optim.epochs}"
        print(f"epoch {epochs}  {rest}  {row['samples_per_s']:.0f} samples/s", file=sys.stderr)

    return line
