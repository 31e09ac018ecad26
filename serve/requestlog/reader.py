"""What the request log holds: one request, all of them, and those whose truth is known."""

from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from serve.requestlog.files import FEEDBACK, REQUESTS, log_folder, read_log_tables
from serve.requestlog.schema import TIME, concat_tables

KEY = ["id", "row"]
NO_ROWS = {
    REQUESTS: pa.schema(
        [
            ("id", pa.string()),
            ("row", pa.int32()),
            ("time", TIME),
            ("version", pa.string()),
            ("variant", pa.string()),
            ("latency_ms", pa.float64()),
            ("prediction", pa.string()),
            ("confidence", pa.float32()),
        ]
    ),
    FEEDBACK: pa.schema(
        [("id", pa.string()), ("row", pa.int32()), ("truth", pa.string()), ("time", TIME)]
    ),
}


@dataclass(frozen=True)
class LoggedRow:
    """A row of a request, without its record. confidence: None for values."""

    id: str
    row: int
    time: datetime
    version: str
    variant: str
    latency_ms: float
    prediction: str | float
    confidence: float | None


def find_request(root: str, model: str, request_id: str) -> list[LoggedRow] | None:
    """Return the rows of a request, of the newest file that has it; None where none does.

    Reads ids of files one after the other: for feedback that comes too late for memory. Raises
    OSError where the storage cannot be read.
    """
    columns = NO_ROWS[REQUESTS].names
    for table in read_log_tables(log_folder(root, REQUESTS, model), columns):
        chosen = table.filter(pc.equal(table["id"], request_id))
        if chosen.num_rows:
            return [LoggedRow(**line) for line in chosen.to_pylist()]
    return None


def read_requests(root: str, model: str) -> pa.Table:
    """Return all rows of the request log, the oldest files first. Raises OSError.

    What a file does not have of what others have, as of a version with other fields, is null.
    """
    return _read(root, REQUESTS, model)


def read_feedback(root: str, model: str) -> pa.Table:
    """Return all feedback, the oldest files first: also what was corrected. Raises OSError."""
    return _read(root, FEEDBACK, model)


def read_labelled(root: str, model: str) -> pa.Table:
    """Return the logged rows whose truth is known, with a column `truth`. Raises OSError.

    Of several truths of a row the last given counts; of several requests by one id, the last.
    No time of a request is compared with one of feedback: they may be of different clocks.
    """
    feedback = read_feedback(root, model)
    requests = read_requests(root, model)
    truths = _last(feedback, "truth")
    numbered = requests.select([*KEY, "time"]).append_column(
        "index", pa.array(range(requests.num_rows), pa.int64())
    )
    found = _last(numbered, "index").join(truths, KEY, join_type="inner").sort_by("index")
    return requests.take(found["index"]).append_column("truth", found["truth"])


def _last(table: pa.Table, column: str) -> pa.Table:
    """For each id and row the value that is last by time, and of equal times by place."""
    grouped = table.sort_by("time").group_by(KEY, use_threads=False)
    return grouped.aggregate([(column, "last")]).rename_columns([*KEY, column])


def _read(root: str, kind: str, model: str) -> pa.Table:
    found = list(read_log_tables(log_folder(root, kind, model)))
    return concat_tables(found[::-1]) if found else NO_ROWS[kind].empty_table()
