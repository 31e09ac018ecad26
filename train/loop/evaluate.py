"""A net's outputs over a whole split, computed by all workers, each sample once."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.tasks import Arrays

BATCH_SIZE = 500


@torch.no_grad()
def outputs(
    forward: Callable[..., Tensor], inputs: Arrays, device: torch.device, rank: int, world_size: int
) -> Arrays | None:
    """Return {"logits": float32 [N, K]} in the split's order on rank 0, None on the others."""
    count = len(next(iter(inputs.values())))
    mine = np.arange(rank, count, world_size)
    parts = []
    for start in range(0, len(mine), BATCH_SIZE):
        ids = mine[start : start + BATCH_SIZE]
        batch = [torch.from_numpy(array[ids]).to(device) for array in inputs.values()]
        parts.append(forward(*batch).float().cpu().numpy())
    logits = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    if world_size == 1:
        return {"logits": logits}
    gathered: list[np.ndarray] | None = [logits] * world_size if rank == 0 else None
    dist.gather_object(logits, gathered)
    if gathered is None:
        return None
    whole = np.empty((count, gathered[0].shape[1]), np.float32)
    for other, part in enumerate(gathered):
        whole[other::world_size] = part
    return {"logits": whole}
