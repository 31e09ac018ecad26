"""Optimizers, and the parameters that each of them updates."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.config import Optim
from train.loop.parallelism import full_tensor, local_shard
from train.nets.pretrained.encoder import PretrainedEncoder

# Layers whose weights Muon updates, as matrices.
TURNING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LEAST_NORM = 1e-7


class Muon(Optimizer):
    """SGD with Nesterov momentum whose step for a matrix is made orthogonal.

    After Keller Jordan, https://kellerjordan.github.io/posts/muon. A convolution counts as the
    matrix [out, in·kh·kw]. Each weight is kept at the norm √out and needs no weight decay. A step
    has a norm of nearly rate·√out; for a matrix with more rows than columns a factor of √(out/in)
    makes it so. The learning rate is therefore about the angle, in radians, by which a step turns a
    weight. The orthogonal matrix is computed in `dtype`, fp32 or bf16.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                nesterov = weight.grad.add(momentum, alpha=group["momentum"])
                # A weight of zeros stays zero here; the step gives it a direction.
                weight.mul_(len(weight) ** 0.5 / weight.norm().clamp_min(LEAST_NORM))
                matrix = full_tensor(nesterov).reshape(len(weight), -1)
                turn = orthogonalize(matrix.to(self._dtype)).to(weight.dtype).view(weight.shape)
                factor = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                weight.add_(local_shard(weight, turn), alpha=-group["lr"] * factor)


def orthogonalize(matrix_RC: Tensor, num_iterations: int = 3) -> Tensor:
    """Return a matrix with the same singular vectors, whose singular values are closer to 1.

    matrix_RC: fp32 or bf16 [R, C], like the result. Newton-Schulz iteration of fifth order with the
    coefficients of the Muon post. The matrix is first scaled to norm 1. An iteration then raises
    small singular values 3.44-fold; after three, those that were above 0.03 are between 0.65 and
    1.21.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x_RC = matrix_RC / (matrix_RC.norm() + 1e-7)
    transposed = x_RC.shape[0] > x_RC.shape[1]
    if transposed:
        x_RC = x_RC.T
    for _ in range(num_iterations):
        gram_RR = x_RC @ x_RC.T
        x_RC = a * x_RC + (b * gram_RR + c * gram_RR @ gram_RR) @ x_RC
    return x_RC.T if transposed else x_RC


def build_optimizers(
    config: Optim, net: nn.Module, dtype: torch.dtype = torch.float32
) -> list[Optimizer]:
    """Return the optimizers of a run; every trainable parameter is in exactly one group.

    dtype: of the network's matrix products. Weight decay applies only to weights with two or more
    dimensions. The network's last layer, which Muon does not update, is its submodule `head`.
    """
    backbone, rated = _backbone_groups(config, net)
    params = [p for p in net.parameters() if p.requires_grad and id(p) not in rated]
    fused = any(param.is_cuda for param in params)
    own = [torch.optim.AdamW(backbone, fused=fused)] if backbone else []
    return own + _of_parameters(config, net, params, dtype, fused=fused)


def _backbone_groups(config: Optim, net: nn.Module) -> tuple[list[dict[str, Any]], set[int]]:
    """Return groups of the parameters of pretrained encoders, and the ids of these parameters.

    The rate falls by `layer_decay` from layer to layer, towards the embeddings.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    encoders = [each for each in net.modules() if isinstance(each, PretrainedEncoder)]
    for encoder in (each for each in encoders if not each.is_frozen):
        for param, steps in encoder.depths():
            if param.requires_grad:
                rate = config.backbone_lr * config.layer_decay**steps
                groups[rate, config.weight_decay if param.ndim >= 2 else 0.0].append(param)
    found = [
        {"params": params, "lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]
    return found, {id(param) for params in groups.values() for param in params}


def _of_parameters(
    config: Optim, net: nn.Module, params: list[nn.Parameter], dtype: torch.dtype, *, fused: bool
) -> list[Optimizer]:
    matrices = [param for param in params if param.ndim >= 2]
    vectors = [param for param in params if param.ndim < 2]
    groups = [
        {"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": vectors, "lr": config.lr, "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        nesterov = config.momentum > 0
        return [torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, fused=fused)]
    if config.name == "adamw":
        return [torch.optim.AdamW(groups, fused=fused)]
    # Muon updates the weights of hidden layers. AdamW updates all other parameters, for which
    # orthogonal steps have no meaning.
    turning = {
        id(module.weight)
        for name, module in net.named_modules()
        if name != "head" and isinstance(module, TURNING)
    }
    hidden = [param for param in matrices if id(param) in turning]
    heads = [param for param in matrices if id(param) not in turning]
    rest = [
        {"params": heads, "lr": config.head_lr, "weight_decay": config.weight_decay},
        {"params": vectors, "lr": config.vector_lr, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(rest, betas=(0.8, 0.95), fused=fused)
    if not hidden:
        return [adam]
    # The range of fp16 is too small for Muon's iteration.
    turned_in = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return [Muon(hidden, config.lr, config.momentum, turned_in), adam]
