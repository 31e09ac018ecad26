"""Progress of encoding and compression, with a clock that the tests set."""

import io

from rich.console import Console

from train.telemetry.work_bar import LINE_EVERY_S, WorkBar


def shown(seconds_per_unit, units, *, terminal=False):
    file, times = io.StringIO(), [0.0]
    console = Console(file=file, force_terminal=terminal, width=100)
    with WorkBar("encoding", units, "records", console, now=lambda: times[0]) as bar:
        for _ in range(units):
            times[0] += seconds_per_unit
            bar.advance()
    return file.getvalue()


def test_short_work_prints_nothing():
    assert shown(LINE_EVERY_S / 20, 10) == ""


def test_long_work_prints_a_line_every_ten_seconds():
    lines = shown(LINE_EVERY_S / 2, 10).splitlines()
    assert lines[0] == "encoding: 2 of 10 records, about 40 s left"
    assert lines[-1] == "encoding: 10 of 10 records, about 0 s left"
    assert len(lines) == 5


def test_a_terminal_shows_a_bar_that_goes_away():
    assert "10 of 10 records" in shown(0.1, 10, terminal=True)


def test_more_units_than_announced_stay_at_the_total():
    console = Console(file=io.StringIO(), width=100)
    with WorkBar("encoding", 0, "records", console) as bar:
        bar.begin("part")
        bar.advance(5)
        bar.advance(5)
