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
from train.values.ragged import Ragged, StoredArrays, by_length, in_place
from train.values.records import num_rows

# Most samples of a batch, and most bytes: what a network computes of a sample may take hundreds of
# times the memory of the sample.
BATCH_SIZE, BATCH_BYTES = 500, 8 << 20
# Most samples of a batch of texts, whose length one sample does not tell.
TEXT_BATCH_SIZE = 64


@torch.no_grad()
def evaluate(forward: Callable[..., Tensor], inputs: StoredArrays, worker: Worker) -> Arrays | None:
    """Return {"logits": float32 [N, K]} in the split's order on rank 0, None on the others.

    inputs: by name, [N, …] each. The batches do not depend on the number of workers, which compute
    them in turns; samples that differ in length are batched with others of about their length. All
    workers must call this together.
    """
    count = num_rows(inputs)
    order = by_length(inputs)
    size = _batch_size(inputs)
    starts = range(0, count, size)
    world_size, parts = worker.world_size, []
    # FSDP needs as many forward passes on every worker; surplus passes repeat the first batch.
    turns = -(-len(starts) // world_size)
    for turn in range(turns):
        number = turn * world_size + worker.rank
        start = starts[number] if number < len(starts) else 0
        taken = slice(start, start + size)
        rows = taken if order is None else order[taken]
        batch = [
            torch.from_numpy(np.array(array[rows])).to(worker.device) for array in inputs.values()
        ]
        parts.append(forward(*batch).float())
    if world_size == 1:
        return {"logits": in_place(torch.cat(parts).cpu().numpy(), order)}
    # Tensors of one shape, because torch would pickle other objects, and unpickling what arrives
    # over the network is not safe.
    own_TBK = torch.stack([_padded(part_BK, size) for part_BK in parts])
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


def _batch_size(inputs: StoredArrays) -> int:
    if any(isinstance(array, Ragged) for array in inputs.values()):
        return TEXT_BATCH_SIZE
    row_bytes = sum(array[0].nbytes for array in inputs.values())
    return max(min(BATCH_SIZE, BATCH_BYTES // max(row_bytes, 1)), 1)


def _padded(part_BK: Tensor, size: int) -> Tensor:
    """Pad the outputs of a split's last batch to the size of the others."""
    missing = size - len(part_BK)
    return torch.nn.functional.pad(part_BK, (0, 0, 0, missing)) if missing else part_BK
