"""Run a function in several processes that communicate through torch.distributed (gloo)."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.loop.parallelism import Worker


def run_workers(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(worker, *arguments)` in each worker; one worker runs in this process."""
    if world_size == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            function(Worker(0, 1, torch.device("cpu")), *arguments)
        finally:
            torch.set_num_threads(threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, (world_size, str(Path(folder) / "store"), function, arguments), world_size)


def _start(
    rank: int, world_size: int, store: str, function: Callable[..., None], arguments: tuple[Any]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(Worker(rank, world_size, torch.device("cpu")), *arguments)
    finally:
        dist.destroy_process_group()
    # os._exit skips the finalization of the interpreter. DistributedDataParallel keeps the group in
    # a reference cycle, so its threads may still release tensors. That needs the GIL, which aborts
    # the process during finalization ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
