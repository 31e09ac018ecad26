"""Gauges of a run for Prometheus, set from the events that rank 0 sends to the driver.

Ray exports them at the metrics port of the driver's node, as `ray_halyard_train_…`. They are set in
the driver, which takes no time from the workers and also works while the run waits for workers.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from ray.util.metrics import Gauge

from train.telemetry.throughput import Event

PREFIX = "halyard_train_"
# Ray exports values every 10 s and drops a gauge that was not set for 20 s. A run that has ended,
# even by a crash, therefore has no gauges, and a run that hangs keeps its gauges.
SET_EVERY_S = 5.0

WORDS = {
    "starts": "Times that the workers started, including the first.",
    "step": "Steps taken so far.",
    "total_steps": "Steps of the whole run.",
    "loss": "Mean training loss of the epoch so far.",
    "valid_loss": "Validation loss after the last epoch.",
    "samples_per_second": "Training samples per second, of all workers.",
    "progress_timestamp_seconds": "Time of the last progress, initially of the start.",
    "checkpoint_timestamp_seconds": "Time of the last complete checkpoint, initially of the start.",
    "checkpoint_interval_seconds": "Configured longest time between checkpoints.",
}


class GaugeLike(Protocol):
    """The part of Ray's Gauge that is used here."""

    def set(self, value: float) -> None: ...


def make_gauge(name: str, words: str, run: str) -> GaugeLike:
    """Return a Ray gauge with a label of the run; `words` is its help text."""
    gauge: GaugeLike = Gauge(name, words, tag_keys=("run",)).set_default_tags({"run": run})
    return gauge


class TrainingGauges:
    """Exports the gauges of a run from another thread, while its block runs."""

    def __init__(
        self,
        run: str,
        checkpoint_interval_s: float,
        *,
        make: Callable[[str, str, str], GaugeLike] = make_gauge,
        now: Callable[[], float] = time.time,
    ) -> None:
        """now: returns the Unix time in seconds."""
        self._gauges = {name: make(PREFIX + name, words, run) for name, words in WORDS.items()}
        self._now = now
        self._furthest = -1
        self._values: dict[str, float] = {
            "progress_timestamp_seconds": now(),
            "checkpoint_timestamp_seconds": now(),
            "checkpoint_interval_seconds": checkpoint_interval_s,
        }
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="gauges", daemon=True)

    def __enter__(self) -> "TrainingGauges":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def show(self, event: Event) -> None:
        """Update the values from an event; they are exported some seconds later."""
        values: dict[str, float] = {}
        match event["event"]:
            case "start":
                values = {name: event[name] for name in ("step", "total_steps")}
                values["starts"] = self._values.get("starts", 0) + 1
                # Steps that are repeated after a crash are not progress.
                self._furthest = max(self._furthest, event["step"])
            case "steps":
                values = {name: event[name] for name in ("step", "loss")}
                values["samples_per_second"] = event["samples_per_s"]
            case "epoch":
                values = {"loss": event["train_loss"], "valid_loss": event["valid_loss"]}
                values["samples_per_second"] = event["samples_per_s"]
            case "checkpoint":
                values["checkpoint_timestamp_seconds"] = self._now()
        if event["event"] in ("steps", "checkpoint") and event["step"] > self._furthest:
            self._furthest = event["step"]
            values["progress_timestamp_seconds"] = self._now()
        # A new dict, because the thread may be reading the old one.
        self._values = {**self._values, **values}

    def _keep(self) -> None:
        ended = False
        while not ended:
            for name, value in self._values.items():
                self._gauges[name].set(value)
            ended = self._end.wait(SET_EVERY_S)
