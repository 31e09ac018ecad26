"""Readers of the request log: one request, all requests, and requests with feedback."""

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
    """A row of a logged request, without its record. confidence: None for predicted numbers."""

    id: str
    row: int
    time: datetime
    version: str
    variant: str
    latency_ms: float
    prediction: str | float
    confidence: float | None


def find_request(root: str, model: str, request_id: str) -> list[LoggedRow] | None:
    """Return the rows of a request from the newest file that contains it; None if none does.

    Searches file by file, for feedback on requests that are no longer in memory. Raises OSError if
    the storage cannot be read.
    """
    columns = NO_ROWS[REQUESTS].names
    for table in read_log_tables(log_folder(root, REQUESTS, model), columns):
        chosen = table.filter(pc.equal(table["id"], request_id))
        if chosen.num_rows:
            return [LoggedRow(**line) for line in chosen.to_pylist()]
    return None


def read_requests(root: str, model: str) -> pa.Table:
    """Return all rows of the request log, oldest files first. Raises OSError.

    Fields that some files lack, because they are of a version with other fields, are null there.
    """
    return _read(root, REQUESTS, model)


def read_feedback(root: str, model: str) -> pa.Table:
    """Return all feedback, oldest files first, including corrected labels. Raises OSError."""
    return _read(root, FEEDBACK, model)


def read_labelled(root: str, model: str) -> pa.Table:
    """Return the logged rows that have feedback, with a column `truth`. Raises OSError.

    If a row has several labels, the latest counts; if an id was used for several requests, the last
    request counts. Times of requests and of feedback are not compared with each other, because
    different machines' clocks may have set them.
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
    """Return the latest value for each id and row; among equal times, the last in the table."""
    grouped = table.sort_by("time").group_by(KEY, use_threads=False)
    return grouped.aggregate([(column, "last")]).rename_columns([*KEY, column])


def _read(root: str, kind: str, model: str) -> pa.Table:
    found = list(read_log_tables(log_folder(root, kind, model)))
    return concat_tables(found[::-1]) if found else NO_ROWS[kind].empty_table()
