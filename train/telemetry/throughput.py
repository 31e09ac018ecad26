"""Throughput of a run: samples and FLOPs per second, time waiting for data, memory, energy."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from train.telemetry import efficiency

Event = dict[str, Any]


class ThroughputMeter:
    """Measures a run on each worker; rank 0 reports to the driver."""

    def __init__(
        self, observe: Callable[[Event], None], *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self._observe = observe
        self._rank, self._world_size, self._device = rank, world_size, device
        self._data_wait_s = 0.0
        self._flops = 0.0
        self._before: tuple[int, float] | None = None

    def report(self, event: str, **values: Any) -> None:
        """Send an event to the driver, from rank 0."""
        if self._rank == 0:
            self._observe({"event": event, **values})

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the block as time waiting for data."""
        started = time.perf_counter()
        yield
        self._data_wait_s += time.perf_counter() - started

    def add_flops(self, flops: float) -> None:
        """Count floating-point operations of this worker."""
        self._flops += flops

    def report_steps(self, step: int, batch_size: float, **values: float) -> None:
        """Report the steps since the last call; the first call only starts the clock.

        batch_size: samples per step, of all workers.
        """
        now, before = time.perf_counter(), self._before
        self._before = (step, now)
        if before is not None and step > before[0]:
            rate = batch_size * (step - before[0]) / (now - before[1])
            self.report(
                "steps",
                step=step,
                **values,
                samples_per_s=rate,
                data_wait_s=self._data_wait_s,
            )

    def epoch_metrics(self, num_samples: float, seconds: float) -> dict[str, float]:
        """Return speed, work, memory and energy of an epoch, as far as known; reset the counters.

        num_samples: of all workers.
        """
        device, samples_per_s = self._device, num_samples / seconds
        metrics: dict[str, float | None] = {
            "samples_per_s": samples_per_s,
            "seconds": seconds,
            "data_wait_s": self._data_wait_s,
            "peak_memory_bytes": efficiency.peak_memory_bytes(device),
            "joules": efficiency.joules(device),
        }
        if self._flops:
            per_worker = self._flops / seconds
            metrics["flops_per_s"] = per_worker * self._world_size
            metrics["mfu"] = efficiency.utilisation(per_worker, device)
        self._data_wait_s = self._flops = 0.0
        return {name: value for name, value in metrics.items() if value is not None}
