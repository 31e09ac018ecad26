"""Losses, by the names that targets give.

Shapes: B batch, K outputs of the net.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import Optim
from train.tasks import Target
from train.tasks.features import imported
from train.tasks.targets import HUBER

# Outputs [B, K] and targets → the mean loss of the batch.
Loss = Callable[[Tensor, Tensor], Tensor]


def loss_of(target: Target, optim: Optim, device: torch.device) -> Loss:
    """Return the loss of a target, with the weights and the smoothing that are configured.

    Raises ValueError for a loss that is unknown, or a setting that the loss has no use for.
    """
    weights_K = None
    if optim.class_weights == "balanced":
        counts = getattr(target, "counts", None)
        if not counts:
            raise ValueError("optim.class_weights is balanced, and the target has no classes")
        counts_K = torch.tensor(counts, dtype=torch.float32, device=device)
        weights_K = counts_K.sum() / (len(counts) * counts_K)
    if target.loss == "cross_entropy":
        return lambda outputs_BK, targets_B: F.cross_entropy(
            outputs_BK, targets_B, weights_K, label_smoothing=optim.label_smoothing
        )
    if target.loss == "binary_cross_entropy":
        smooth = optim.label_smoothing
        return lambda outputs_BK, targets_BK: F.binary_cross_entropy_with_logits(
            outputs_BK, targets_BK * (1 - smooth) + smooth / 2, weights_K
        )
    if target.loss == "huber":
        return lambda outputs_B1, targets_B: F.huber_loss(outputs_B1[:, 0], targets_B, delta=HUBER)
    own: Loss = imported(target.loss)
    return own
