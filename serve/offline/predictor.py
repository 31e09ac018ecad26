"""The worker of offline inference, which predicts one part at a time."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from cluster import storage
from serve.config import set_bundle_policy
from serve.offline.output import BAD, part_path, write_parquet
from train.bundle import Bundle, Predictor
from train.data.reading import sources
from train.data.reading.sources import RowBlock
from train.values.records import encode_valid

# Characters of a value that are written to the file of rejected records.
MAX_SHOWN = 1000


class OfflinePredictor:
    """A Ray Data actor that predicts parts and writes their files."""

    def __init__(
        self,
        location: str,
        variant: str,
        model: str,
        output: str,
        keep: list[str],
        blocks: list[RowBlock],
        plugins: Sequence[str] = (),
        storage: str = storage.DEFAULT_PATH,
        require_signature: Sequence[str] = (),
    ) -> None:
        set_bundle_policy(plugins, storage, require_signature)
        self._predictor = Predictor.load(Bundle.load(location), variant)
        self._model, self._output, self._keep, self._blocks = model, output, keep, blocks

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [self._predict(int(number)) for number in batch["number"]]
        return {"number": batch["number"], "rows": np.array(rows)}

    def _predict(self, number: int) -> int:
        """Write a part's rejected records, then its predictions, which mark it as complete."""
        block = self._blocks[number]
        bad: list[dict[str, Any]] = []
        tables = list(self._tables(block, bad))
        if bad:
            write_parquet(pa.Table.from_pylist(bad), part_path(self._output, number, BAD))
        write_parquet(pa.concat_tables(tables), part_path(self._output, number))
        return block.num_rows

    def _tables(self, block: RowBlock, bad: list[dict[str, Any]]) -> Iterator[pa.Table]:
        features = self._predictor.task.features
        wanted = list(dict.fromkeys([*features.columns, *self._keep]))
        start = block.start
        for batch in block.read(wanted, features.row_bytes):
            columns = sources.batch_columns(batch)
            inputs, kept_N, wrong = encode_valid(
                self._predictor.encode,
                # A column that the input lacks is missing in every record.
                {name: columns.get(name, [None] * batch.num_rows) for name in features.columns},
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
            outputs = self._predictor.task.target.outputs
            answers = {spec.name: spec.empty() for spec in outputs}
            if inputs is not None:
                answers = self._predictor.run_many(inputs)
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


def _column(array: np.ndarray) -> pa.Array:
    if array.dtype == object:
        return pa.array(array.tolist(), pa.string())
    if array.ndim == 1:
        return pa.array(array)
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _shown(value: Any) -> str:
    return value[:MAX_SHOWN] if isinstance(value, str) else repr(value)[:MAX_SHOWN]
