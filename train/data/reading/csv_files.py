"""CSV files as tables, in parts: every column is text, and empty fields are null."""

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
# Quoted values with more line breaks than this are checked: a missing end quote may have joined
# several records.
SWALLOWED_LINES = 3
# How much of a file is examined to find the delimiter.
SNIFFED_CHARACTERS, SNIFFED_ROWS = 1 << 20, 100
# How many bytes are searched for zeros, which indicate UTF-16.
SNIFFED_ZEROS = 1000


@dataclass(frozen=True)
class CsvOptions:
    """Dialect of CSV files.

    delimiter: detected if None. quotes: whether double quotes enclose fields; if None they do, and
    a quoted field that looks like several records is an error.
    """

    encoding: str = "utf-8"
    delimiter: str | None = None
    quotes: bool | None = None

    @property
    def quoting(self) -> Literal[0, 3]:
        """The `quoting` argument for csv.reader."""
        return csv.QUOTE_NONE if self.quotes is False else csv.QUOTE_MINIMAL


UNKNOWN_CSV = CsvOptions()


@dataclass(frozen=True)
class CsvHeader:
    """Header of a CSV file. skipped: number of lines before the one with the column names."""

    names: list[str]
    encoding: str
    delimiter: str
    skipped: int = 0


def read_column_names(fs: Any, path: str, options: CsvOptions) -> CsvHeader:
    """Return column names, encoding and delimiter from the start of a file.

    Raises ValueError if the file is empty, a column has no name or a repeated one, or the file
    looks like UTF-16 without a byte order mark.
    """
    with fs.open(path, "rb", compression="infer") as stream:
        content = stream.read(CSV_BLOCK_BYTES)
    # A UTF-16 byte order mark overrides data.encoding; spreadsheets' "Unicode text" has one.
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else options.encoding
    if b"\0" in content[:SNIFFED_ZEROS] and encoding == "utf-8":
        raise ValueError(
            "it has zero bytes, as UTF-16 text does; give --data.encoding utf-16-le, or convert "
            "the file to UTF-8"
        )
    start = content.decode(encoding, errors="replace")
    start, skipped, delimiter = start.removeprefix("\ufeff"), 0, options.delimiter
    if found := SEPARATOR_LINE.match(start):  # Excel writes such a line
        start, skipped, delimiter = start[found.end() :], 1, delimiter or found[1]
    if not start.strip():
        raise ValueError("it is empty; expected a line with the column names")
    delimiter = delimiter or find_delimiter(start, options)
    names = next(row for row in _rows(start, delimiter, options) if row)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        if not twice[0].strip():
            places = [str(place) for place, name in enumerate(names, 1) if not name.strip()]
            raise ValueError(
                f"columns {', '.join(places)} have no name in the header; name them or remove them"
            )
        raise ValueError(f"the column name '{twice[0]}' occurs twice; rename one of the columns")
    return CsvHeader(names, encoding, delimiter, skipped)


def read_csv(fs: Any, path: str, options: CsvOptions) -> Iterator[pa.Table]:
    """Yield the tables of a file. Raises ValueError that names the malformed line."""
    header = read_column_names(fs, path, options)
    # Arrow's threads read ahead. From a Python stream they might still read while the interpreter
    # shuts down, so local files are opened by Arrow itself.
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
    """Return the delimiter that gives the most rows as many fields as the header.

    Ties go to the delimiter with the most fields; the result is a comma if none divides the
    header. start: the beginning of a file.
    """
    best = (0.0, 1, ",")
    for delimiter in DELIMITERS:
        rows = _rows(start[:SNIFFED_CHARACTERS], delimiter, options)
        counts = [len(row) for row, _ in zip(rows, range(SNIFFED_ROWS), strict=False) if row]
        if len(counts) > 2 and len(start) > SNIFFED_CHARACTERS:
            counts.pop()  # the last row may be truncated
        if counts[:1] > [1]:
            alike = sum(count == counts[0] for count in counts) / len(counts)
            best = max(best, (round(alike, 1), counts[0], delimiter))
    return best[2]


def _rows(text: str, delimiter: str, options: CsvOptions) -> Iterator[list[str]]:
    """Yield the fields of each row, header first; quoted fields may contain line breaks."""
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
    """Raise ValueError if a quoted field spans several lines that look like records."""
    between = len(header.names) - 1
    for column in table.columns if between else []:
        counts = pa.compute.count_substring(column, "\n")
        long = column.filter(pa.compute.greater(counts, SWALLOWED_LINES).fill_null(False))
        for text in long.to_pylist():
            _, *inner, _ = text.split("\n")
            if all(line.count(header.delimiter) == between for line in inner):
                raise ValueError(
                    f"the quote before {shorten(text.split(header.delimiter)[0])} encloses "
                    f"{len(inner) + 2} lines that look like records. Give --data.quotes false if "
                    "quotes do not enclose fields in this file, true if the lines are one value"
                )


def _explained(
    error: Exception, stream: BinaryIO, header: CsvHeader, options: CsvOptions
) -> Exception:
    """Return a ValueError that names the malformed line, or `error` if no line is found."""
    encoding = header.encoding
    if "UTF8" in str(error) or isinstance(error, UnicodeError):
        for number, line in enumerate(stream, 1):
            try:
                line.decode(encoding)
            except UnicodeError:
                # 0x80..0x9F are control characters in latin-1 and printable ones in cp1252.
                likely = "cp1252" if any(0x80 <= byte < 0xA0 for byte in line) else "latin-1"
                return ValueError(
                    f"line {number} is not {encoding} text; give the file's --data.encoding, such "
                    f"as {likely}, or convert the file"
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
                    f"line {number} has {len(fields)} fields, but the header has one, "
                    f"{shorten(header.names[0])}. Remove the lines before the header, if there "
                    "are any"
                )
            return ValueError(
                f"line {number} has {len(fields)} fields; expected {count}, as in the header. Fix "
                f"the line, or quote fields that contain the delimiter {header.delimiter!r}"
            )
    return error
