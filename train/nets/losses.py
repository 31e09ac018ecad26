"""Losses, by the names that targets give.

Shapes: B batch, M members, K outputs of the net.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import Optim
from train.tasks import ClassTarget, LabelsTarget, Target, ValueTarget
from train.tasks.plugins import import_object
from train.tasks.regression import HUBER

# Outputs [B, K], or of several members [B, M, K], and targets → the mean loss of the batch.
Loss = Callable[[Tensor, Tensor], Tensor]


def _by_member(loss: Loss) -> Loss:
    """Let a loss of outputs [B, K] take those of several members, each of which learns alone."""

    def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim == 2:
            return loss(outputs, targets)
        members = outputs.shape[1]
        return loss(outputs.flatten(0, 1), targets.repeat_interleave(members, dim=0))

    return mean_loss


def distillation_loss(target: Target, temperature: float) -> Loss:
    """Return the loss against a teacher's outputs; see `_distillation_loss`."""
    return _by_member(_distillation_loss(target, temperature))


def target_loss(target: Target, optim: Optim, device: torch.device) -> Loss:
    """Return the loss of a target, with the weights and the smoothing that are configured.

    Raises ValueError for a loss that is unknown, or a setting that the loss has no use for.
    """
    return _by_member(_target_loss(target, optim, device))


def _distillation_loss(target: Target, temperature: float) -> Loss:
    """The loss against a teacher's outputs [B, K] for the same samples.

    Classes: Hinton et al., https://arxiv.org/abs/1503.02531, with the gradient's scale kept.
    Labels: each one's cross-entropy, likewise softened. Other outputs: the squared difference.
    """
    if isinstance(target, ClassTarget):
        return lambda outputs_BK, teacher_BK: (
            F.kl_div(
                F.log_softmax(outputs_BK / temperature, dim=1),
                F.log_softmax(teacher_BK / temperature, dim=1),
                reduction="batchmean",
                log_target=True,
            )
            * temperature**2
        )
    if isinstance(target, LabelsTarget):
        return lambda outputs_BK, teacher_BK: (
            F.binary_cross_entropy_with_logits(
                outputs_BK / temperature, torch.sigmoid(teacher_BK / temperature)
            )
            * temperature**2
        )
    return F.mse_loss


def _target_loss(target: Target, optim: Optim, device: torch.device) -> Loss:
    balanced = optim.class_weights == "balanced"
    smoothing = optim.label_smoothing
    if isinstance(target, ClassTarget) and target.loss == ClassTarget.loss:
        counts_K = torch.tensor(target.counts, dtype=torch.float32, device=device)
        # Their mean over the training records is 1. Divided by nothing else, so that a sample
        # counts the same whatever the others of its micro-batch are.
        weights_K = counts_K.sum() / (len(counts_K) * counts_K) if balanced else None
        return lambda outputs_BK, targets_B: F.cross_entropy(
            outputs_BK, targets_B, weights_K, reduction="none", label_smoothing=smoothing
        ).mean()
    if isinstance(target, LabelsTarget) and target.loss == LabelsTarget.loss:
        counts_K = torch.tensor(target.counts, dtype=torch.float32, device=device)
        positive_K = (target.num_records - counts_K) / counts_K if balanced else None
        return lambda outputs_BK, targets_BK: F.binary_cross_entropy_with_logits(
            outputs_BK, targets_BK * (1 - smoothing) + smoothing / 2, pos_weight=positive_K
        )
    if balanced:
        raise ValueError("optim.class_weights is balanced, and the target has no classes")
    if target.loss == "huber":
        return lambda outputs_B1, targets_B: F.huber_loss(outputs_B1[:, 0], targets_B, delta=HUBER)
    if isinstance(target, ValueTarget) and target.quantile is not None:
        quantile = target.quantile
        return lambda outputs_B1, targets_B: _pinball(targets_B - outputs_B1[:, 0], quantile).mean()
    own: Loss = import_object(target.loss)
    return own


def _pinball(errors_B: Tensor, quantile: float) -> Tensor:
    """The loss of predicting a quantile, which a truth above it raises by `quantile` of its error.

    Koenker and Bassett, Econometrica 46 (1978), pages 33 to 50.
    """
    return torch.maximum(quantile * errors_B, (quantile - 1) * errors_B)
