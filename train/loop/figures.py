"""What a run tells of itself while it goes on: speed, work, waiting, memory, energy."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from train.config import LAST
from train.loop import efficiency
from train.loop.parallel import Worker
from train.tasks.targets import LOWER_IS_BETTER

Event = dict[str, Any]


class Figures:
    """Kept by every worker; rank 0 tells of them."""

    def __init__(self, worker: Worker, observe: Callable[[Event], None]) -> None:
        self._worker, self._observe = worker, observe
        self._data_wait_s = 0.0
        self._flops = 0.0
        self._before: tuple[int, float] | None = None

    def tell(self, event: str, **values: Any) -> None:
        """Tell the driver, from rank 0."""
        if self._worker.rank == 0:
            self._observe({"event": event, **values})

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._data_wait_s += time.perf_counter() - started

    def computed(self, flops: float) -> None:
        """Count floating-point operations of this worker."""
        self._flops += flops

    def tell_steps(self, step: int, batch_size: float, **values: float) -> None:
        """Tell of the steps since the last call; the first call only starts the clock."""
        now, before = time.perf_counter(), self._before
        self._before = (step, now)
        if before is not None and step > before[0]:
            rate = batch_size * (step - before[0]) / (now - before[1])
            self.tell(
                "steps",
                step=step,
                **values,
                samples_per_s=rate,
                data_wait_s=self._data_wait_s,
            )

    def of_epoch(self, num_samples: float, seconds: float) -> dict[str, float]:
        """Speed, work, memory and energy of an epoch, as far as they are known here."""
        device, samples_per_s = self._worker.device, num_samples / seconds
        figures: dict[str, float | None] = {
            "samples_per_s": samples_per_s,
            "seconds": seconds,
            "data_wait_s": self._data_wait_s,
            "peak_memory_bytes": efficiency.peak_memory_bytes(device),
            "joules": efficiency.joules(device),
        }
        if self._flops:
            per_worker = self._flops / seconds
            figures["flops_per_s"] = per_worker * self._worker.world_size
            figures["mfu"] = efficiency.utilisation(per_worker, device)
        self._data_wait_s = self._flops = 0.0
        return {name: value for name, value in figures.items() if value is not None}


def signed(row: Mapping[str, float], metric: str) -> float:
    """The metric with the sign that makes more of it better; of "last" the epoch."""
    if metric == LAST:
        return row["epoch"]
    return -row[metric] if metric.endswith(LOWER_IS_BETTER) else row[metric]


def kept(rows: Sequence[Mapping[str, float]], metric: str) -> Mapping[str, float]:
    """The epoch whose weights a run keeps: the best, and of equal ones the later."""

    def place(row: Mapping[str, float]) -> tuple[float, float]:
        value = signed(row, metric)
        return (-math.inf if math.isnan(value) else value), row["epoch"]

    return max(rows, key=place)
