"""Gauges of a run for Prometheus, from what rank 0 tells the driver.

Ray shows them at the metrics port of the driver's node, as `ray_halyard_train_…`. They are set in
the driver, which costs the workers nothing, and which is there while a run waits for workers too.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from ray.util.metrics import Gauge

from train.telemetry.throughput import Event

PREFIX = "halyard_train_"
# Ray passes values on every 10 s and forgets one that was not set again for 20 s: so a run that has
# ended has no gauges, however it ended, and one that hangs keeps its own.
SET_EVERY_S = 5.0

WORDS = {
    "starts": "Times that workers started on it, the first included.",
    "step": "Steps taken.",
    "total_steps": "Steps of the whole run.",
    "loss": "Mean training loss of the epoch so far.",
    "valid_loss": "Loss of the validation split after the last epoch.",
    "samples_per_second": "Samples trained on per second, of all workers.",
    "progress_timestamp_seconds": "When the run was last further than ever; at first, its start.",
    "checkpoint_timestamp_seconds": "When the last checkpoint was whole; at first, the start.",
    "checkpoint_interval_seconds": "Longest time between checkpoints, by the config.",
}


class GaugeLike(Protocol):
    def set(self, value: float) -> None: ...


def make_gauge(name: str, words: str, run: str) -> GaugeLike:
    gauge: GaugeLike = Gauge(name, words, tag_keys=("run",)).set_default_tags({"run": run})
    return gauge


class TrainingGauges:
    """Exported while its block runs, in a thread."""

    def __init__(
        self,
        run: str,
        checkpoint_interval_s: float,
        *,
        make: Callable[[str, str, str], GaugeLike] = make_gauge,
        now: Callable[[], float] = time.time,
    ) -> None:
        """now: seconds since 1970."""
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
        """Take over what an event says; it is exported some seconds later."""
        values: dict[str, float] = {}
        match event["event"]:
            case "start":
                values = {name: event[name] for name in ("step", "total_steps")}
                values["starts"] = self._values.get("starts", 0) + 1
                # What is trained a second time after a crash is no progress.
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
        # A new dict: the thread may be reading the old one.
        self._values = {**self._values, **values}

    def _keep(self) -> None:
        ended = False
        while not ended:
            for name, value in self._values.items():
                self._gauges[name].set(value)
            ended = self._end.wait(SET_EVERY_S)
