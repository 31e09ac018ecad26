"""Quotes in CSV files, as delimiters of a field and as part of a text."""

import pytest

from cluster.errors import UserError
from train.data.reading import sources
from train.data.reading.csv_files import CsvOptions
from train.data.reading.samples import sample_source

LINES = [f"{'ham' if number % 3 else 'spam'}\tmessage {number}" for number in range(60)]


def read(path, options=None):
    return sample_source(sources.find_source(str(path)), 1000, options or CsvOptions())


@pytest.fixture
def unquoted(tmp_path):
    lines = list(LINES)
    lines[10], lines[40] = 'ham\t"Yes, he said', 'spam\tand "no" again'
    path = tmp_path / "messages.tsv"
    path.write_text("\n".join(["label\ttext", *lines, ""]))
    return path


def test_an_unclosed_quote_that_swallows_records_is_refused(unquoted):
    with pytest.raises(UserError, match="lines that look like records") as caught:
        read(unquoted)
    assert "--data.quotes" in str(caught.value)
    assert "Yes, he said" in str(caught.value)


def test_files_written_without_quotes_are_read_line_by_line(unquoted):
    found = read(unquoted, CsvOptions(quotes=False))
    assert len(found["text"]) == 60
    assert found["text"][10] == '"Yes, he said'


def test_long_texts_in_quotes_stay_one_value(tmp_path):
    letter = (
        "Dear all,\n\nthis is a letter, with commas, of lines\nthat differ,\nas do texts.\n\nYours"
    )
    path = tmp_path / "letters.csv"
    path.write_text("text,label\n" + f'"{letter}",a\n"short, too",b\n' * 20)
    assert read(path)["text"][0] == letter
    records = "\n".join(["one,1"] * 6)
    path.write_text("text,label\n" + f'"{records}",a\n' * 20)
    assert read(path, CsvOptions(quotes=True))["text"][0] == records
