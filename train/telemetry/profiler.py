"""Record a torch profiler trace of a few steps, for Perfetto or chrome://tracing."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cluster import storage

TRACE = "trace.json.gz"
OPERATORS = "operators.txt"
# Numbers of skipped, warm-up and recorded steps. The first steps are slower than later ones.
WAIT_STEPS, WARM_UP_STEPS, RECORDED_STEPS = 3, 2, 5


@contextmanager
def profile_steps(url: str, device: torch.device) -> Iterator[Callable[[], None]]:
    """Record steps of this process; yield a function to call after each step.

    Writes the trace, and a table of operators sorted by time, to the directory at `url`.
    """

    def write(finished: profile) -> None:
        by_time = f"self_{device.type}_time_total"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            finished.export_chrome_trace(str(folder / TRACE))
            table = finished.key_averages().table(sort_by=by_time, row_limit=40)
            (folder / OPERATORS).write_text(table)
            fs, path = storage.filesystem(url)
            fs.makedirs(path, exist_ok=True)
            for file in (TRACE, OPERATORS):
                fs.put_file(str(folder / file), storage.join_path(path, file))

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    steps = schedule(wait=WAIT_STEPS, warmup=WARM_UP_STEPS, active=RECORDED_STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as running:
        yield running.step
