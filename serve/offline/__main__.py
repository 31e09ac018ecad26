"""Offline inference: predictions for all records of a source, computed in parallel by Ray Data.

`python -m serve.offline --model models:/NAME@production --input URL --output URL`

The input is divided into parts. The predictions of a part are written to one Parquet file, which
appears only when it is complete. Running the same command again writes the missing parts.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster import connect, storage
from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import UserError
from serve.config import Names, StoragePath, set_bundle_policy
from serve.config.sections import PublicKeys
from serve.errors import BadRequest
from serve.offline.output import INPUT, PLAN, SUMMARY, count_rows, part_exists, write_json
from serve.offline.predictor import OfflinePredictor
from serve.protocol.fields import UnknownFields, match_fields
from train.bundle import Bundle, CorruptBundle, Predictor, registry
from train.data.reading import sources
from train.data.reading.csv_files import CsvOptions
from train.data.reading.sources import RowBlock


class OfflineOptions(CommandOptions):
    """Write predictions for all records of a source. The same command continues after a stop."""

    model_config = SettingsConfigDict(cli_prog_name="python -m serve.offline")

    model: str = Field(
        description="Model: models:/NAME@ALIAS, models:/NAME/VERSION, or the path or URL of a "
        "bundle."
    )
    input: str = Field(
        description="Records to predict: path, folder, glob or URL of CSV, Parquet, JSON lines or "
        "Arrow files, or of image folders."
    )
    output: str = Field(description="Folder or URL for the predictions, as Parquet files.")
    variant: str | None = Field(
        None, description="Variant to use; default: the bundle's default variant."
    )
    keep: list[str] = Field(
        [], description="Input columns to copy to the predictions, such as an id."
    )
    storage: StoragePath = Field(
        "runs",
        validate_default=True,
        description="Directory or URL of the storage that contains the registry.",
    )
    plugins: Names = Field(
        (), description="Python modules from which models may import classes, such as my_package."
    )
    require_signature: PublicKeys = Field(
        (),
        description="Public keys, PEM files; only bundles signed by one of these keys are loaded. "
        "By default signatures are not checked.",
    )
    encoding: str = Field(
        "utf-8",
        description="Text encoding of CSV files, such as latin-1; a UTF-16 byte order mark takes "
        "precedence.",
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Character between the fields of CSV files; detected by default.",
    )
    quotes: bool | None = Field(
        None,
        description="Whether quotes enclose fields of CSV files. By default they do, and a quoted "
        "field that looks like several records ends the run; true accepts such fields, false reads "
        "quotes as text.",
    )
    unknown_fields: UnknownFields = Field(
        "ignore",
        description="What to do with input columns that the model does not use: ignore them, or "
        "refuse the input. Columns in --keep are always accepted.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Worker processes, one core each; default: one per core of this machine.",
    )


def parse(argv: Sequence[str]) -> OfflineOptions:
    """Return the options of a command line. Raises UserError, which names the invalid option."""
    return parse_options(OfflineOptions, argv)


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the command; return the summary that it prints and writes to the output.

    Raises UserError for invalid options, a model that cannot be loaded, or a wrong input.
    """
    options = parse(argv)
    started = time.perf_counter()
    try:
        set_bundle_policy(options.plugins, options.storage, options.require_signature)
        bundle, version = registry.load_bundle(options.model, options.storage)
        variant = Predictor.load(bundle, options.variant).variant
    except (CorruptBundle, ValueError) as error:
        raise UserError(str(error)) from error
    output = storage.resolve_path(options.output)
    source = sources.find_source(options.input)
    plan = _plan(options, source, bundle, variant, output)
    blocks = [RowBlock(**{**block, "names": tuple(block["names"])}) for block in plan["blocks"]]
    missing = [number for number in range(len(blocks)) if not part_exists(output, number)]
    if missing:
        connect.connect(num_cpus=options.workers)
        worker = {
            "location": bundle.location,
            "plugins": list(options.plugins),
            "storage": options.storage,
            "require_signature": list(options.require_signature),
            "variant": variant,
            "model": f"{bundle.manifest.name}/{version}",
            "output": output,
            "keep": options.keep,
        }
        _run(blocks, missing, worker, options.workers or os.cpu_count() or 1)
    counts = count_rows(output, len(blocks))
    seconds = time.perf_counter() - started
    done = sum(blocks[number].num_rows for number in missing)
    summary = {
        "model": f"{bundle.manifest.name}/{version}",
        "variant": variant,
        "output": output,
        **counts,
        "rows_this_time": done,
        "seconds": round(seconds, 3),
        "rows_per_s": round(done / seconds, 1),
    }
    write_json(storage.join_path(output, SUMMARY), summary)
    storage.remove(storage.join_path(output, plan["input"]))
    return summary


def _plan(
    options: OfflineOptions, source: sources.Source, bundle: Bundle, variant: str, output: str
) -> dict[str, Any]:
    """Return how the input is divided into parts: the plan stored in the output, or a new one.

    Raises UserError if the stored plan is for another input, model or variant.
    """
    manifest = hashlib.sha256(bundle.manifest.model_dump_json().encode()).hexdigest()
    of = {
        "input": hashlib.sha256(source.fingerprint.encode()).hexdigest(),
        "model": manifest,
        "variant": variant,
        "keep": options.keep,
    }
    content = storage.read_file(storage.join_path(output, PLAN))
    if content is not None:
        plan: dict[str, Any] = json.loads(content)
        if changed := [key for key, value in of.items() if plan["of"][key] != value]:
            raise UserError(
                f"'{options.output}' was started with another {', '.join(changed)}; give another "
                "--output, or the same options to continue."
            )
        return plan
    outputs = {spec.name for spec in bundle.task.target.outputs} | {"row", "model"}
    if taken := sorted(outputs & set(options.keep)):
        raise UserError(
            f"--keep has '{taken[0]}', which is the name of a prediction column; remove it from "
            "--keep, or rename the column in the input."
        )
    features = bundle.task.features.columns
    # A unique name, because another run may start at the same time.
    place = f"{INPUT}-{secrets.token_hex(6)}"
    written = CsvOptions(options.encoding, options.delimiter, options.quotes)
    blocks = sources.open_source(source, storage.join_path(output, place), written)
    names = sources.source_schema(blocks).names
    sources.check_columns(options.input, options.keep, names)
    given = [name for name in names if name not in options.keep or name in features]
    try:
        match_fields(given, bundle.manifest, options.unknown_fields, f"'{options.input}'")
    except BadRequest as error:
        raise UserError(str(error)) from error
    plan = {"of": of, "input": place, "blocks": [asdict(block) for block in blocks]}
    # Written last, so that the files it names exist.
    write_json(storage.join_path(output, PLAN), plan)
    return plan


def _run(blocks: list[RowBlock], numbers: list[int], worker: dict[str, Any], workers: int) -> None:
    """Predict the parts with the given numbers, each in one of the worker processes."""
    from ray.exceptions import RayTaskError

    ray_data = connect.import_ray_data()
    parts = [{"number": number} for number in numbers]
    plan = ray_data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        OfflinePredictor,
        fn_constructor_kwargs={**worker, "blocks": blocks},
        batch_size=1,
        batch_format="numpy",
        compute=ray_data.ActorPoolStrategy(size=min(workers, len(parts))),
    )
    columns = (
        TextColumn("parts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} records/s"),
        TimeRemainingColumn(),
    )
    started, rows = time.perf_counter(), 0
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("", total=len(parts), rate=0.0)
            for done in plan.iter_rows():
                rows += int(done["rows"])
                rate = rows / (time.perf_counter() - started)
                progress.update(bar, advance=1, rate=rate)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise


if __name__ == "__main__":
    run_command(main)
