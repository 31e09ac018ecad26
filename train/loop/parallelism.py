"""How the workers' gradients become one: the same for every number of workers.

A global batch is divided into micro-batches, whose number is fixed for the run. A worker computes
some of them, one after the other. What a micro-batch contributes does not depend on the worker that
computed it, and contributions are summed in float64, so that the order of the sum leaves no trace
in float32: on the same kind of device the weights come out the same on one worker as on many.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device

    def micro_batches(self, num_micro_batches: int) -> range:
        """The micro-batches that this worker computes."""
        return range(self.rank, num_micro_batches, self.world_size)

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any worker. All workers must ask."""
        if self.world_size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all workers, in float64. All workers must ask."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return list(total.tolist())


class Gradients(Protocol):
    """Collects the gradients of a step's micro-batches, each weighted by its samples."""

    forward: nn.Module

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward pass."""
        ...

    def finish(self) -> None:
        """Leave the sum over all micro-batches of all workers in each parameter's `grad`."""
        ...


class ExactGradients:
    """Sums micro-batches in float64, in one piece after the last."""

    def __init__(self, net: nn.Module, worker: Worker) -> None:
        self.forward = net
        self._worker = worker
        self._params = [param for param in net.parameters() if param.requires_grad]
        count = sum(param.numel() for param in self._params)
        self._sum = torch.zeros(count, dtype=torch.float64, device=worker.device)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        yield
        self._sum += torch.cat(
            [
                torch.zeros_like(param).view(-1) if param.grad is None else param.grad.reshape(-1)
                for param in self._params
            ]
        )
        for param in self._params:
            param.grad = None

    def finish(self) -> None:
        if self._worker.world_size > 1:
            dist.all_reduce(self._sum)
        parts = self._sum.float().split([param.numel() for param in self._params])
        for param, part in zip(self._params, parts, strict=True):
            # In the parameter's own memory format, which the optimizers expect.
            param.grad = torch.empty_like(param).copy_(part.view(param.shape))
        self._sum.zero_()


class OverlappedGradients:
    """DistributedDataParallel: buckets are sent while the backward pass goes on."""

    def __init__(self, net: nn.Module, worker: Worker) -> None:
        # Buffers are averaged over all micro-batches by `Buffers`.
        self._ddp = DistributedDataParallel(
            net, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.forward: nn.Module = self._ddp
        self._params = [param for param in net.parameters() if param.requires_grad]
        self._worker = worker

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def finish(self) -> None:
        _sum_of_mean(self._params, self._worker)


class ShardedGradients:
    """FSDP2: each worker keeps a shard of weights, gradients and optimizer state."""

    def __init__(self, net: nn.Module, worker: Worker) -> None:
        self.forward = net
        self._params = [param for param in net.parameters() if param.requires_grad]
        self._worker = worker

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.forward.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def finish(self) -> None:
        _sum_of_mean(self._params, self._worker)


def _sum_of_mean(params: list[nn.Parameter], worker: Worker) -> None:
    """Make the sum of gradients of their mean over workers, which is what torch's wrappers give."""
    for param in params:
        if param.grad is not None:
            param.grad.mul_(worker.world_size)


class Buffers:
    """Running statistics (of batch norms) as the mean over a step's micro-batches.

    Every micro-batch starts from the step's first values. Without this they would depend on which
    worker computed which micro-batches.
    """

    def __init__(self, net: nn.Module, worker: Worker, num_micro_batches: int) -> None:
        self._worker = worker
        self._num_micro_batches = num_micro_batches
        buffers = dict(net.named_buffers())
        self._floats = [buffer for buffer in buffers.values() if buffer.is_floating_point()]
        # Other whole numbers, of a user's own net, stay what they are.
        self._counts = [
            buffer for name, buffer in buffers.items() if name.endswith("num_batches_tracked")
        ]
        self._sizes = [buffer.numel() for buffer in self._floats]
        self._start: list[Tensor] = []
        self._sum = torch.zeros(sum(self._sizes), dtype=torch.float64, device=worker.device)

    def start(self) -> None:
        """Before a step's first micro-batch."""
        self._start = [buffer.clone() for buffer in (*self._floats, *self._counts)]
        self._sum.zero_()

    def collect(self) -> None:
        """After a micro-batch's forward pass."""
        if self._floats:
            self._sum += torch.cat([buffer.view(-1) for buffer in self._floats])

    def restore(self) -> None:
        """After a micro-batch's backward pass."""
        for buffer, value in zip((*self._floats, *self._counts), self._start, strict=True):
            buffer.copy_(value)

    def finish(self) -> None:
        """After a step's last micro-batch."""
        if self._worker.world_size > 1 and self._floats:
            dist.all_reduce(self._sum)
        means = (self._sum / self._num_micro_batches).split(self._sizes)
        for buffer, mean in zip(self._floats, means, strict=True):
            buffer.copy_(mean.view(buffer.shape))
        for buffer in self._counts:
            buffer += 1


def build_gradients(net: nn.Module, worker: Worker, kind: str) -> Gradients:
    """Return what collects the gradients of `net`.

    On the processor there is nothing to overlap a transfer with, and the exact sum costs little.
    """
    if kind == "fsdp":
        return ShardedGradients(net, worker)
    if worker.device.type == "cpu" or worker.world_size == 1:
        return ExactGradients(net, worker)
    return OverlappedGradients(net, worker)


def shard_net(net: nn.Module, worker: Worker) -> None:
    """Shard the weights of `net` over the workers, each of its blocks as a unit (FSDP2)."""
    # Imported only where it is used: it takes a second, in every worker.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    for block in _blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def checkpoint_activations(net: nn.Module) -> None:
    """Keep only the inputs of each block of `net`; compute the rest again when it is needed."""
    for block in _blocks(net):
        forward = partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = forward


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The parts of a net that repeat: what its modules call blocks or layers."""
    return [
        block
        for module in net.modules()
        for name, group in module.named_children()
        if name in ("blocks", "layers") and isinstance(group, nn.Sequential | nn.ModuleList)
        for block in group
    ]


def is_shard(tensor: Tensor) -> bool:
    """Whether this worker holds only a part of the tensor (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def local_shard(model: Tensor, tensor: Tensor) -> Tensor:
    """This worker's shard of a whole tensor, where `model` is in shards; else all of it."""
    if not is_shard(model):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    return distribute_tensor(tensor, model.device_mesh, model.placements)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this worker may hold a shard. All workers must ask."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
