"""Compute a network's outputs for a whole split on all workers, each sample once.

Shapes: N samples of the split, W workers, T turns, B samples of a batch, K outputs of the network.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.loop.parallelism import Worker
from train.tasks import Arrays
from train.values.ragged import StoredArrays, by_length, in_place
from train.values.records import num_rows

BATCH_SIZE = 500


@torch.no_grad()
def evaluate(forward: Callable[..., Tensor], inputs: StoredArrays, worker: Worker) -> Arrays | None:
    """Return {"logits": float32 [N, K]} in the split's order on rank 0, None on the others.

    inputs: by name, [N, …] each. The batches do not depend on the number of workers, which compute
    them in turns; samples that differ in length are batched with others of about their length. All
    workers must call this together.
    """
    count = num_rows(inputs)
    order = by_length(inputs)
    starts = range(0, count, BATCH_SIZE)
    world_size, parts = worker.world_size, []
    # FSDP needs as many forward passes on every worker; surplus passes repeat the first batch.
    turns = -(-len(starts) // world_size)
    for turn in range(turns):
        number = turn * world_size + worker.rank
        start = starts[number] if number < len(starts) else 0
        taken = slice(start, start + BATCH_SIZE)
        rows = taken if order is None else order[taken]
        batch = [
            torch.from_numpy(np.array(array[rows])).to(worker.device) for array in inputs.values()
        ]
        parts.append(forward(*batch).float())
    if world_size == 1:
        return {"logits": in_place(torch.cat(parts).cpu().numpy(), order)}
    # Tensors of one shape, because torch would pickle other objects, and unpickling what arrives
    # over the network is not safe.
    own_TBK = torch.stack([_padded(part_BK) for part_BK in parts])
    all_WTBK = [torch.empty_like(own_TBK) for _ in range(world_size)]
    dist.gather(own_TBK, all_WTBK if worker.rank == 0 else None)
    if worker.rank != 0:
        return None
    in_order = [all_WTBK[rank][turn] for turn in range(turns) for rank in range(world_size)]
    logits_NK = np.concatenate(
        [
            part_BK[: count - start].cpu().numpy()
            for start, part_BK in zip(starts, in_order, strict=False)
        ]
    )
    return {"logits": in_place(logits_NK, order)}


def _padded(part_BK: Tensor) -> Tensor:
    """Pad the outputs of a split's last batch to the size of the others."""
    missing = BATCH_SIZE - len(part_BK)
    return torch.nn.functional.pad(part_BK, (0, 0, 0, missing)) if missing else part_BK
