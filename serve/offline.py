"""Offline inference: predictions for all records of a source, by Ray Data over the predictor.

`python -m serve.offline --model models:/NAME@production --input URL --output URL`

The input is divided into parts; a part's predictions are one Parquet file that appears when they
are whole. The same command, run again, makes those that are missing.
"""

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster import connect, storage
from cluster.errors import UserError, run_command
from serve import commandline
from serve.config import Names, allow
from train.bundle import Bundle, CorruptBundle, Predictor, registry
from train.data import sources
from train.data.sources import Block
from train.tasks import Arrays
from train.tasks.records import concatenate, encode_good, num_rows

# Readers of a folder of Parquet pass over names that begin with _.
PLAN, SUMMARY, BAD, INPUT = "_plan.json", "_summary.json", "_bad", "_input"
# Rows that an engine is given at once.
RUN_ROWS = 256
MAX_SHOWN = 1000


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle.")
    input: str = Field(
        description="Records: path, folder, glob or URL of CSV, Parquet, JSON lines, Arrow or "
        "image folders."
    )
    output: str = Field(description="Folder, a path or URL, for the predictions.")
    variant: str | None = Field(None, description="Variant; the bundle's default if not given.")
    keep: list[str] = Field([], description="Columns of the input to write beside predictions.")
    storage: str = Field("runs", description="Storage path whose registry has the model.")
    plugins: Names = Field((), description="Modules whose classes the model may name.")
    encoding: str = Field("utf-8", description="Of CSV files.")
    workers: int | None = Field(None, ge=1, le=4096, description="Processes; a core each.")


class _Command(BaseSettings, Options):
    """Predict all records of a source; run again, go on where it stopped."""

    # Apart: settings of this kind are also read from the environment, MODEL as --model.
    model_config = SettingsConfigDict(cli_prog_name="python -m serve.offline")


def parse(argv: Sequence[str]) -> Options:
    """Raises UserError with one line that names the option."""
    return commandline.parse(_Command, Options, argv)


def main(argv: Sequence[str]) -> dict[str, Any]:
    options = parse(argv)
    started = time.perf_counter()
    try:
        allow(options.plugins, options.storage)
        bundle, version = registry.load(options.model, storage.resolve(options.storage))
        variant = Predictor.load(bundle, options.variant).variant
    except (CorruptBundle, ValueError) as error:
        raise UserError(str(error)) from error
    output = storage.resolve(options.output)
    source = sources.find(options.input)
    plan = _plan(options, source, bundle, variant, output)
    blocks = [Block(**{**block, "names": tuple(block["names"])}) for block in plan["blocks"]]
    missing = [number for number in range(len(blocks)) if not _exists(output, number)]
    if missing:
        connect.connect(num_cpus=options.workers)
        worker = {
            "location": bundle.location,
            "plugins": list(options.plugins),
            "storage": options.storage,
            "variant": variant,
            "model": f"{bundle.manifest.name}/{version}",
            "output": output,
            "keep": options.keep,
        }
        _run(blocks, missing, worker, options.workers or os.cpu_count() or 1)
    counts = _counts(output, len(blocks))
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
    _write_json(storage.join(output, SUMMARY), summary)
    fs, path = storage.filesystem(storage.join(output, plan["input"]))
    if fs.exists(path):
        fs.rm(path, recursive=True)
    return summary


def _plan(
    options: Options, source: sources.Source, bundle: Bundle, variant: str, output: str
) -> dict[str, Any]:
    """Return how the input is divided: as it was when the output was begun, or anew.

    Raises UserError if the output is of another input, model or variant.
    """
    manifest = hashlib.sha256(bundle.manifest.model_dump_json().encode()).hexdigest()
    of = {
        "input": hashlib.sha256(source.fingerprint.encode()).hexdigest(),
        "model": manifest,
        "variant": variant,
        "keep": options.keep,
    }
    fs, path = storage.filesystem(storage.join(output, PLAN))
    if fs.exists(path):
        with fs.open(path, "r") as file:
            plan: dict[str, Any] = json.load(file)
        if changed := [key for key, value in of.items() if plan["of"][key] != value]:
            raise UserError(
                f"'{options.output}' was begun with another {', '.join(changed)}; give another "
                "--output, or the same options to go on."
            )
        return plan
    outputs = {spec.name for spec in bundle.task.target.outputs} | {"row", "model"}
    if taken := sorted(outputs & set(options.keep)):
        raise UserError(
            f"--keep has '{taken[0]}', as a column of the predictions is called; leave it out, or "
            "rename it in the input."
        )
    # A name of its own, as another run may have begun at the same time.
    place = f"{INPUT}-{secrets.token_hex(6)}"
    blocks = sources.open_source(source, storage.join(output, place), options.encoding)
    wanted = [*bundle.task.features.columns, *options.keep]
    sources.check_columns(options.input, wanted, sources.schema(blocks).names)
    plan = {"of": of, "input": place, "blocks": [asdict(block) for block in blocks]}
    # Last: what it names is there.
    _write_json(storage.join(output, PLAN), plan)
    return plan


def _run(blocks: list[Block], numbers: list[int], worker: dict[str, Any], workers: int) -> None:
    """Predict the given parts, each by one of the processes."""
    from ray.exceptions import RayTaskError

    ray_data = connect.ray_data()
    parts = [{"number": number} for number in numbers]
    plan = ray_data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        Worker,
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


class Worker:
    """Predicts parts in a process of its own."""

    def __init__(
        self,
        location: str,
        variant: str,
        model: str,
        output: str,
        keep: list[str],
        blocks: list[Block],
        plugins: Sequence[str] = (),
        storage: str = storage.DEFAULT_PATH,
    ) -> None:
        allow(plugins, storage)
        self._predictor = Predictor.load(Bundle.load(location), variant)
        self._model, self._output, self._keep, self._blocks = model, output, keep, blocks

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [self._predict(int(number)) for number in batch["number"]]
        return {"number": batch["number"], "rows": np.array(rows)}

    def _predict(self, number: int) -> int:
        """Write a part's predictions, and before them what is bad in it."""
        block = self._blocks[number]
        bad: list[dict[str, Any]] = []
        tables = list(self._tables(block, bad))
        if bad:
            _write_parquet(pa.Table.from_pylist(bad), _path(self._output, number, BAD))
        _write_parquet(pa.concat_tables(tables), _path(self._output, number))
        return block.num_rows

    def _tables(self, block: Block, bad: list[dict[str, Any]]) -> Iterator[pa.Table]:
        features = self._predictor.task.features
        wanted = list(dict.fromkeys([*features.columns, *self._keep]))
        start = block.start
        for batch in block.read(wanted, features.row_bytes):
            columns = sources.columns(batch)
            inputs, kept_N, wrong = encode_good(
                self._predictor.encode,
                {name: columns[name] for name in features.columns},
                batch.num_rows,
            )
            for row, reason in wrong:
                record = {name: _shown(values[row]) for name, values in columns.items()}
                bad.append(
                    {
                        "row": start + row,
                        "place": block.place(start + row),
                        "reason": reason,
                        "record": json.dumps(record),
                    }
                )
            answers = self._run(inputs) if inputs is not None else self._nothing()
            kept = batch.take(pa.array(kept_N)).select(self._keep)
            yield pa.table(
                {
                    "row": start + kept_N,
                    **dict(zip(self._keep, kept.columns, strict=True)),
                    **{name: _column(array) for name, array in answers.items()},
                    "model": pa.array([self._model] * len(kept_N), pa.string()),
                }
            )
            start += batch.num_rows

    def _run(self, inputs: Arrays) -> Arrays:
        starts = range(0, num_rows(inputs), RUN_ROWS)
        parts = [slice(start, start + RUN_ROWS) for start in starts]
        return concatenate(
            [
                self._predictor.run({name: array[part] for name, array in inputs.items()})
                for part in parts
            ]
        )

    def _nothing(self) -> Arrays:
        """Predictions of no record."""
        outputs = self._predictor.task.target.outputs
        return {spec.name: np.empty((0, *spec.shape), spec.dtype) for spec in outputs}


def _column(array: np.ndarray) -> pa.Array:
    if array.dtype == object:
        return pa.array(array.tolist(), pa.string())
    if array.ndim == 1:
        return pa.array(array)
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _shown(value: Any) -> str:
    return value[:MAX_SHOWN] if isinstance(value, str) else repr(value)[:MAX_SHOWN]


def _path(output: str, number: int, *folder: str) -> str:
    return storage.join(output, *folder, f"part-{number:06}.parquet")


def _exists(output: str, number: int) -> bool:
    fs, path = storage.filesystem(_path(output, number))
    return bool(fs.exists(path))


def _counts(output: str, num_parts: int) -> dict[str, int]:
    """Rows predicted and rows left out, as the files say."""
    counts = {"rows": 0, "bad": 0}
    for number in range(num_parts):
        for name, folder in (("rows", ()), ("bad", (BAD,))):
            fs, path = storage.filesystem(_path(output, number, *folder))
            if fs.exists(path):
                with fs.open(path, "rb") as stream:
                    counts[name] += pa.parquet.ParquetFile(stream).metadata.num_rows
    return counts


def _write_parquet(table: pa.Table, target: str) -> None:
    fs, path = storage.filesystem(target)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/_{name}.{secrets.token_hex(6)}"
    with fs.open(aside, "wb") as stream:
        pa.parquet.write_table(table, stream)
    fs.mv(aside, path)


def _write_json(target: str, value: Any) -> None:
    fs, path = storage.filesystem(target)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    aside = f"{path}.{secrets.token_hex(6)}"
    with fs.open(aside, "w") as stream:
        json.dump(value, stream)
    fs.mv(aside, path)


if __name__ == "__main__":
    run_command(main)
