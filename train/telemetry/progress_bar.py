"""Progress of a run on stderr: a bar on a terminal, otherwise a line for each epoch."""

from collections.abc import Collection
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class ProgressDisplay:
    """Shows the events of a run while its block runs."""

    def __init__(
        self,
        num_epochs: int,
        console: Console | None = None,
        metrics: Collection[str] | None = None,
    ) -> None:
        """metrics: names of the validation metrics to show; None shows all."""
        self._num_epochs, self._metrics = num_epochs, metrics
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._halved_to: int | None = None  # every worker reports it, but it is shown once

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Show an event; kinds that are not displayed are ignored."""
        kind = event["event"]
        if kind == "start":
            self._start(event)
        elif kind == "epoch":
            self._console.print(self._epoch(event), soft_wrap=True)
        elif kind == "halved" and event["micro_batch"] != self._halved_to:
            self._halved_to = event["micro_batch"]
            self._console.print(
                f"out of GPU memory; continuing from the last checkpoint with at most "
                f"{event['micro_batch']} samples at a time in each worker",
                soft_wrap=True,
            )
        elif kind == "tracing":
            self._console.print(f"writing a trace of some steps to {event['url']}", soft_wrap=True)
        elif kind == "unwritten":
            last = "none" if event["last"] is None else f"at step {event['last']}"
            self._console.print(
                f"a checkpoint could not be written: {event['error']}; training continues (last "
                f"checkpoint: {last})",
                soft_wrap=True,
            )
        elif kind == "steps" and self._task is not None:
            figures = f"loss {event['loss']:.3f}  {event['samples_per_s']:.0f} samples/s"
            self._bar.update(self._task, completed=event["step"], figures=figures)

    def _start(self, event: dict[str, Any]) -> None:
        many = "worker" if event["workers"] == 1 else "workers"
        begin = f", from step {event['step']} of {event['total_steps']}" if event["step"] else ""
        self._console.print(f"training on {event['workers']} {many}{begin}")
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(
            "steps", total=event["total_steps"], completed=event["step"], figures=""
        )

    def _epoch(self, event: dict[str, Any]) -> str:
        figures = "  ".join(
            f"{name} {value:.4f}"
            for name, value in event.items()
            if name.startswith("train") or self._is_shown(name)
        )
        rate = f"{event['samples_per_s']:.0f} samples/s"
        return f"epoch {event['epoch']}/{self._num_epochs}  {figures}  {rate}"

    def _is_shown(self, name: str) -> bool:
        return name.startswith("valid") if self._metrics is None else name in self._metrics
