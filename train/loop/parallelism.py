"""Combine the gradients of all workers, with the same result for every number of workers.

A global batch is divided into micro-batches, whose number is fixed for the run. Each worker
computes some of them, one after the other. The gradients of a micro-batch do not depend on the
worker that computed them. They are summed in float64, so that the order of summation does not
affect the float32 result: on the same kind of device, one worker and many workers train the same
weights.
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
        """Return the indices of the micro-batches that this worker computes."""
        return range(self.rank, num_micro_batches, self.world_size)

    def any(self, *flags: bool) -> list[bool]:
        """Return whether each flag is set on any worker. All workers must call this together."""
        if self.world_size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def sum(self, values: list[float]) -> list[float]:
        """Return float64 sums over all workers. All workers must call this together."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return list(total.tolist())


class Gradients(Protocol):
    """Combines the gradients of a step's micro-batches, whose losses the caller weights.

    forward: the network to call in forward passes.
    """

    forward: nn.Module

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch's forward and backward pass."""
        ...

    def finish(self) -> None:
        """Set each parameter's `grad` to the sum over all micro-batches of all workers."""
        ...


class ExactGradients:
    """Sums micro-batches in float64; one all-reduce after the last one adds up the workers."""

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
            # Copied into the parameter's memory format, which the optimizers expect.
            param.grad = torch.empty_like(param).copy_(part.view(param.shape))
        self._sum.zero_()


class OverlappedGradients:
    """DistributedDataParallel: sends buckets of gradients during the backward pass."""

    def __init__(self, net: nn.Module, worker: Worker) -> None:
        # No broadcast, because `Buffers` averages the buffers over all micro-batches.
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
    """FSDP2: each worker holds a shard of the weights, gradients and optimizer state."""

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
    """Turn the means over workers that torch's wrappers leave in `grad` into sums."""
    for param in params:
        if param.grad is not None:
            param.grad.mul_(worker.world_size)


class Buffers:
    """Averages running statistics (of batch norms) over the micro-batches of a step.

    Every micro-batch starts from the values at the start of the step. Otherwise the statistics
    would depend on which worker computed which micro-batches.
    """

    def __init__(self, net: nn.Module, worker: Worker, num_micro_batches: int) -> None:
        self._worker = worker
        self._num_micro_batches = num_micro_batches
        buffers = dict(net.named_buffers())
        self._floats = [buffer for buffer in buffers.values() if buffer.is_floating_point()]
        # Other integer buffers, which custom networks may have, are left unchanged.
        self._counts = [
            buffer for name, buffer in buffers.items() if name.endswith("num_batches_tracked")
        ]
        self._sizes = [buffer.numel() for buffer in self._floats]
        self._start: list[Tensor] = []
        self._sum = torch.zeros(sum(self._sizes), dtype=torch.float64, device=worker.device)

    def start(self) -> None:
        """Save the buffers; called before a step's first micro-batch."""
        self._start = [buffer.clone() for buffer in (*self._floats, *self._counts)]
        self._sum.zero_()

    def collect(self) -> None:
        """Add the buffers to the sum; called after a micro-batch's forward pass."""
        if self._floats:
            self._sum += torch.cat([buffer.view(-1) for buffer in self._floats])

    def restore(self) -> None:
        """Restore the saved buffers; called after a micro-batch's backward pass."""
        for buffer, value in zip((*self._floats, *self._counts), self._start, strict=True):
            buffer.copy_(value)

    def finish(self) -> None:
        """Set the buffers to the means; called after a step's last micro-batch."""
        if self._worker.world_size > 1 and self._floats:
            dist.all_reduce(self._sum)
        means = (self._sum / self._num_micro_batches).split(self._sizes)
        for buffer, mean in zip(self._floats, means, strict=True):
            buffer.copy_(mean.view(buffer.shape))
        for buffer in self._counts:
            buffer += 1


def build_gradients(net: nn.Module, worker: Worker, kind: str) -> Gradients:
    """Return the object that combines the gradients of `net`.

    kind: "ddp" or "fsdp", see workers.parallel. On a CPU the exact sum is used, because no transfer
    could overlap with computation there and the exact sum costs little.
    """
    if kind == "fsdp":
        return ShardedGradients(net, worker)
    if worker.device.type == "cpu" or worker.world_size == 1:
        return ExactGradients(net, worker)
    return OverlappedGradients(net, worker)


def shard_net(net: nn.Module, worker: Worker) -> None:
    """Shard the weights of `net` over the workers (FSDP2), with each of its blocks as a unit."""
    # Imported only where it is used, because the import takes a second in every worker.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    for block in _blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def checkpoint_activations(net: nn.Module) -> None:
    """Store only the inputs of each block of `net`; recompute its activations when needed."""
    for block in _blocks(net):
        forward = partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = forward


def _blocks(net: nn.Module) -> list[nn.Module]:
    """Return the repeated parts of a network: the items of lists named `blocks` or `layers`."""
    return [
        block
        for module in net.modules()
        for name, group in module.named_children()
        if name in ("blocks", "layers") and isinstance(group, nn.Sequential | nn.ModuleList)
        for block in group
    ]


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor of any shape is a DTensor, of which this worker holds a shard."""
    return hasattr(tensor, "full_tensor")


def local_shard(model: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` sharded like `model`, a tensor of the same shape, if `model` is sharded."""
    if not is_shard(model):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    return distribute_tensor(tensor, model.device_mesh, model.placements)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor in its full shape, gathered from its shards if it is sharded.

    All workers must call this together.
    """
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
