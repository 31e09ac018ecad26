"""Progress of work before and after training on stderr: a bar on a terminal, otherwise lines."""

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between two lines. Work that takes less prints none.
LINE_EVERY_S = 10.0


class WorkBar:
    """Shows how much of some work is done while its block runs."""

    def __init__(
        self,
        work: str,
        total: int,
        unit: str,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """work: what is done, such as "encoding". total: number of units, at least 1.

        unit: their name in the plural, such as "records". now: seconds of a steady clock.
        """
        self._work, self._total, self._unit, self._now = work, max(total, 1), unit, now
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(work, total=self._total)
        self._done = 0
        self._began = self._last = now()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, part: str) -> None:
        """Name the part of the work that begins, such as the name of a variant."""
        self._bar.update(self._task, description=f"{self._work} {part}")

    def advance(self, units: int = 1) -> None:
        """Count units that are done."""
        self._done = min(self._done + units, self._total)
        self._bar.update(self._task, completed=self._done)
        now = self._now()
        if self._console.is_terminal or now - self._last < LINE_EVERY_S:
            return
        self._last = now
        left_s = (now - self._began) * (self._total / max(self._done, 1) - 1)
        done = f"{self._done:,} of {self._total:,} {self._unit}"
        self._console.print(f"{self._work}: {done}, about {left_s:.0f} s left", soft_wrap=True)
