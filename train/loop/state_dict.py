"""Convert the state of a run to named tensors and back; keep a moving average of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.loop.parallelism import full_tensor, is_shard, local_shard

Tensors = dict[str, Tensor]


class EMA:
    """An exponential moving average of weights and running statistics.

    The decay of a step is min(decay, (1 + step) / (10 + step)). It is small at first, so that the
    initial weights soon lose their influence.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._decay = decay
        self.values = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Update the average after a step. step: number of steps taken, from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)


@contextmanager
def averaged_weights(net: nn.Module, average: EMA | None) -> Iterator[None]:
    """Give a network the averaged weights, if there are any, within the block."""
    if average is None:
        yield
        return
    own = {name: value.detach().clone() for name, value in net.state_dict().items()}
    net.load_state_dict(average.values)
    try:
        yield
    finally:
        net.load_state_dict(own)


def collect_state(net: nn.Module, average: EMA | None, optimizers: list[Optimizer]) -> Tensors:
    """Return copies of all tensors on the CPU, with their shards joined.

    All workers must call this together.
    """
    named = {f"net.{name}": value for name, value in net.state_dict().items()}
    if average is not None:
        named |= {f"ema.{name}": value for name, value in average.values.items()}
    for number, optimizer in enumerate(optimizers):
        for index, param in enumerate(_params(optimizer)):
            for key, value in optimizer.state[param].items():
                named[f"optim.{number}.{index}.{key}"] = value
    return {name: _copy(value) for name, value in named.items()}


def restore_state(
    net: nn.Module, average: EMA | None, optimizers: list[Optimizer], tensors: Tensors
) -> None:
    """Restore tensors from `collect_state`, which any number of workers may have collected."""
    with torch.no_grad():
        for name, value in net.state_dict().items():
            value.copy_(_like(value, tensors[f"net.{name}"]))
        if average is not None:
            for name, value in average.values.items():
                value.copy_(_like(value, tensors[f"ema.{name}"]))
    for name, tensor in tensors.items():
        if name.startswith("optim."):
            _, number, index, key = name.split(".", 3)
            optimizer = optimizers[int(number)]
            param = _params(optimizer)[int(index)]
            if tensor.shape == param.shape:
                optimizer.state[param][key] = _like(param, tensor)
            else:
                optimizer.state[param][key] = tensor


def exported_weights(tensors: Tensors) -> Tensors:
    """Return the weights of a collected state to use: the average if there is one."""
    prefix = "ema." if any(name.startswith("ema.") for name in tensors) else "net."
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _params(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _copy(value: Tensor) -> Tensor:
    return full_tensor(value.detach()).cpu().clone(memory_format=torch.contiguous_format)


def _like(model: Tensor, value: Tensor) -> Tensor:
    """Return `value` on the device, in the memory format and in the shards of `model`."""
    if is_shard(model):
        return local_shard(model, value.to(model.device))
    return torch.empty_like(model).copy_(value)
