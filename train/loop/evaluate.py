"""A net's outputs over a whole split, computed by all workers, each sample once."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.loop.parallel import Worker
from train.tasks import Arrays

BATCH_SIZE = 500


@torch.no_grad()
def outputs(forward: Callable[..., Tensor], inputs: Arrays, worker: Worker) -> Arrays | None:
    """Return {"logits": float32 [N, K]} in the split's order on rank 0, None on the others.

    The same batches are computed whatever the number of workers, in turns.
    """
    count = len(next(iter(inputs.values())))
    starts = range(0, count, BATCH_SIZE)
    parts: dict[int, np.ndarray] = {}
    # Every worker makes as many forward passes, as FSDP needs; the surplus ones repeat the first.
    for turn in range(-(-len(starts) // worker.world_size)):
        number = turn * worker.world_size + worker.rank
        start = starts[number] if number < len(starts) else 0
        batch = [
            torch.from_numpy(np.array(array[start : start + BATCH_SIZE])).to(worker.device)
            for array in inputs.values()
        ]
        parts[start] = forward(*batch).float().cpu().numpy()
    if worker.world_size > 1:
        gathered: list[dict[int, np.ndarray]] = [{}] * worker.world_size
        dist.gather_object(parts, gathered if worker.rank == 0 else None)
        if worker.rank != 0:
            return None
        parts = {start: part for each in gathered for start, part in each.items()}
    return {"logits": np.concatenate([parts[start] for start in starts])}
