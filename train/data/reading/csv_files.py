"""CSV files as tables, part by part: every column as text, null where empty."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
from fsspec.implementations.local import LocalFileSystem

from train.values.records import shorten

CSV_BLOCK_BYTES = 8 << 20
DELIMITERS = ",;\t|"
SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
# A quoted value of more line breaks is looked at, whether it is records that lack an end quote.
SWALLOWED_LINES = 3
# What is looked at to find the delimiter.
SNIFFED_CHARACTERS, SNIFFED_ROWS = 1 << 20, 100
SNIFFED_ZEROS = 1000


@dataclass(frozen=True)
class CsvOptions:
    """How CSV files are written. delimiter: found out if None. quotes: whether they hold a field
    together; if None they do, and fields that seem to be many records are refused."""

    encoding: str = "utf-8"
    delimiter: str | None = None
    quotes: bool | None = None

    @property
    def quoting(self) -> Literal[0, 3]:
        """As csv.reader takes it."""
        return csv.QUOTE_NONE if self.quotes is False else csv.QUOTE_MINIMAL


UNKNOWN_CSV = CsvOptions()


@dataclass(frozen=True)
class CsvHeader:
    """What stands at the beginning of a file. skipped: lines before that with the names."""

    names: list[str]
    encoding: str
    delimiter: str
    skipped: int = 0


def read_column_names(fs: Any, path: str, options: CsvOptions) -> CsvHeader:
    """Raises ValueError for a file without names of columns, or with one name twice."""
    with fs.open(path, "rb", compression="infer") as stream:
        content = stream.read(CSV_BLOCK_BYTES)
    # Its mark leaves no doubt; spreadsheets write it as "Unicode text".
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else options.encoding
    if b"\0" in content[:SNIFFED_ZEROS] and encoding == "utf-8":
        raise ValueError(
            "it has bytes of zero, as text in UTF-16 does; give --data.encoding utf-16-le, or "
            "convert the file"
        )
    start = content.decode(encoding, errors="replace")
    start, skipped, delimiter = start.removeprefix("\ufeff"), 0, options.delimiter
    if found := SEPARATOR_LINE.match(start):  # as spreadsheets write it
        start, skipped, delimiter = start[found.end() :], 1, delimiter or found[1]
    if not start.strip():
        raise ValueError("it is empty; expected a line with the names of the columns")
    delimiter = delimiter or find_delimiter(start, options)
    names = next(row for row in _rows(start, delimiter, options) if row)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        if not twice[0].strip():
            places = [str(place) for place, name in enumerate(names, 1) if not name.strip()]
            raise ValueError(
                f"columns {', '.join(places)} have no name in the header; name them or remove them"
            )
        raise ValueError(f"the column '{twice[0]}' is there twice; rename one of them")
    return CsvHeader(names, encoding, delimiter, skipped)


def read_csv(fs: Any, path: str, options: CsvOptions) -> Iterator[pa.Table]:
    """Read a file. Raises ValueError that names the line of what is wrong with it."""
    header = read_column_names(fs, path, options)
    # Arrow's threads read ahead; with a stream of Python's they would do so when Python is gone.
    local = isinstance(fs, LocalFileSystem)
    try:
        with (
            pa.input_stream(path, compression="detect")
            if local
            else fs.open(path, "rb", compression="infer")
        ) as stream:
            yield from _tables(stream, header, options)
    except (pa.ArrowInvalid, UnicodeError) as error:
        with fs.open(path, "rb", compression="infer") as stream:
            raise _explained(error, stream, header, options) from error


def find_delimiter(start: str, options: CsvOptions = UNKNOWN_CSV) -> str:
    """Return the delimiter that divides header and rows alike, of several the one that divides
    them into most fields; a comma if none does.

    start: the beginning of a file.
    """
    best = (0.0, 1, ",")
    for delimiter in DELIMITERS:
        rows = _rows(start[:SNIFFED_CHARACTERS], delimiter, options)
        counts = [len(row) for row, _ in zip(rows, range(SNIFFED_ROWS), strict=False) if row]
        if len(counts) > 2 and len(start) > SNIFFED_CHARACTERS:
            counts.pop()  # which may be cut
        if counts[:1] > [1]:
            alike = sum(count == counts[0] for count in counts) / len(counts)
            best = max(best, (round(alike, 1), counts[0], delimiter))
    return best[2]


def _rows(text: str, delimiter: str, options: CsvOptions) -> Iterator[list[str]]:
    """The fields of each row, header first; line breaks may stand in quotes."""
    csv.field_size_limit(CSV_BLOCK_BYTES)
    lines = io.StringIO(text, newline="")
    return csv.reader(lines, delimiter=delimiter, quoting=options.quoting)


def _tables(stream: BinaryIO, header: CsvHeader, options: CsvOptions) -> Iterator[pa.Table]:
    reader = pa.csv.open_csv(
        stream,
        read_options=pa.csv.ReadOptions(
            block_size=CSV_BLOCK_BYTES, encoding=header.encoding, skip_rows=header.skipped
        ),
        parse_options=pa.csv.ParseOptions(
            delimiter=header.delimiter,
            quote_char=False if options.quotes is False else '"',
            newlines_in_values=True,
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(header.names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
    with reader:
        for batch in reader:
            table = pa.Table.from_batches([batch])
            if options.quotes is None:
                _check_quotes(table, header)
            yield table


def _check_quotes(table: pa.Table, header: CsvHeader) -> None:
    """Raises ValueError where a quote holds many lines together that look like records."""
    between = len(header.names) - 1
    for column in table.columns if between else []:
        counts = pa.compute.count_substring(column, "\n")
        long = column.filter(pa.compute.greater(counts, SWALLOWED_LINES).fill_null(False))
        for text in long.to_pylist():
            _, *inner, _ = text.split("\n")
            if all(line.count(header.delimiter) == between for line in inner):
                raise ValueError(
                    f"a quote before {shorten(text.split(header.delimiter)[0])} holds "
                    f"{len(inner) + 2} lines together that look like records. Give --data.quotes "
                    "false if the file is written without quotes, true if they are one value"
                )


def _explained(
    error: Exception, stream: BinaryIO, header: CsvHeader, options: CsvOptions
) -> Exception:
    """Name the line of a CSV file that is wrong, or return what is known."""
    encoding = header.encoding
    if "UTF8" in str(error) or isinstance(error, UnicodeError):
        for number, line in enumerate(stream, 1):
            try:
                line.decode(encoding)
            except UnicodeError:
                # Control characters in latin-1, the euro among others in cp1252.
                likely = "cp1252" if any(0x80 <= byte < 0xA0 for byte in line) else "latin-1"
                return ValueError(
                    f"line {number} is not {encoding} text; give its --data.encoding, such as "
                    f"{likely}, or convert the file"
                )
    text = io.TextIOWrapper(stream, encoding, newline="")
    for _ in range(header.skipped):
        text.readline()
    rows = csv.reader(text, delimiter=header.delimiter, quoting=options.quoting)
    count = len(header.names)
    for fields in rows:
        if fields and len(fields) != count:
            number = rows.line_num + header.skipped
            if count == 1:
                return ValueError(
                    f"line {number} has {len(fields)} fields, and the header has one, "
                    f"{shorten(header.names[0])}. Remove the lines before the header, if there "
                    "are any"
                )
            return ValueError(
                f"line {number} has {len(fields)} fields; expected {count}, as the "
                "header has. Mend the line, or quote a field that holds the delimiter, which is "
                f"{header.delimiter!r}"
            )
    return error
