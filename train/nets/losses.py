"""Loss functions of targets and of distillation.

Shapes: B batch, M ensemble members, K outputs of the network.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import Optim
from train.tasks import ClassTarget, LabelsTarget, Target, ValueTarget
from train.tasks.plugins import import_object
from train.tasks.regression import HUBER

# (outputs [B, K] or, with several members, [B, M, K]; targets) → mean loss of the batch, a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]


def _by_member(loss: Loss) -> Loss:
    """Extend a loss of outputs [B, K] to members [B, M, K]: the mean of their separate losses."""

    def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim == 2:
            return loss(outputs, targets)
        members = outputs.shape[1]
        return loss(outputs.flatten(0, 1), targets.repeat_interleave(members, dim=0))

    return mean_loss


def distillation_loss(target: Target, temperature: float) -> Loss:
    """Return the loss of outputs against a teacher's outputs [B, K] for the same records.

    Classes: Hinton et al., https://arxiv.org/abs/1503.02531, multiplied by temperature² to keep the
    scale of the gradient. Labels: binary cross-entropy, softened in the same way. Other targets:
    squared error.
    """
    return _by_member(_distillation_loss(target, temperature))


def target_loss(target: Target, optim: Optim, device: torch.device) -> Loss:
    """Return the loss of a target, with the class weights and label smoothing of `optim`.

    Raises ValueError if the loss is unknown or does not support class weights.
    """
    return _by_member(_target_loss(target, optim, device))


def _distillation_loss(target: Target, temperature: float) -> Loss:
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
        # The weights average to 1 over the training records. The loss is not divided by their sum
        # in the micro-batch, so that a record's weight does not depend on the other records in it.
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
        raise ValueError(
            "optim.class_weights is balanced, but the target has no classes; give none"
        )
    if target.loss == "huber":
        return lambda outputs_B1, targets_B: F.huber_loss(outputs_B1[:, 0], targets_B, delta=HUBER)
    if isinstance(target, ValueTarget) and target.quantile is not None:
        quantile = target.quantile
        return lambda outputs_B1, targets_B: _pinball(targets_B - outputs_B1[:, 0], quantile).mean()
    own: Loss = import_object(target.loss)
    return own


def _pinball(errors_B: Tensor, quantile: float) -> Tensor:
    """Return the loss of each error, true − predicted: q · error if positive, else (q − 1) · error.

    Koenker and Bassett, Econometrica 46 (1978), pages 33 to 50.
    """
    return torch.maximum(quantile * errors_B, (quantile - 1) * errors_B)
