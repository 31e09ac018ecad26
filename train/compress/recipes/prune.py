"""Structured pruning: whole channels are removed, which makes the network smaller and faster."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import torch_pruning
from torch import Tensor, nn

from train.nets.losses import Loss

# Channel counts are multiples of this, because int8 kernels work on blocks of 16 channels.
ROUND_TO = 16


class Unprunable(Exception):
    """The network's channels cannot be removed; the message gives the reason."""


def remove_channels(
    net: nn.Module, inputs: tuple[Tensor, ...], targets_N: Tensor, loss: Loss, share: float
) -> None:
    """Remove the `share` least important channels of each layer, in place.

    inputs: encoded inputs [N, ...]; targets_N: encoded targets, [N] or, for multilabel tasks,
    [N, K labels]. A channel's importance is estimated from the gradient of the loss on these
    records, over all layers that must lose the channel together: Molchanov et al.,
    https://arxiv.org/abs/1906.10771, and Fang et al., https://arxiv.org/abs/2301.12900.
    The last layer keeps its outputs; embeddings and frozen layers are not pruned.
    Raises Unprunable if no channel can be removed.
    """
    head = getattr(net, "head", None)
    frozen = [
        layer
        for layer in net.modules()
        if layer is head
        or isinstance(layer, nn.Embedding)
        or (isinstance(layer, nn.Conv2d | nn.Linear) and not layer.weight.requires_grad)
    ]
    learning = {name: param.requires_grad for name, param in net.named_parameters()}
    before = _size(net)
    net.eval()
    width = net(*inputs).shape
    try:
        with _quiet():
            pruner = torch_pruning.pruner.BasePruner(
                net,
                inputs,
                torch_pruning.importance.GroupTaylorImportance(),
                pruning_ratio=share,
                ignored_layers=frozen,
                round_to=ROUND_TO,
            )
            loss(net(*inputs).float(), targets_N).backward()
            pruner.step()
            net.zero_grad(set_to_none=True)
            after = net(*inputs).shape
    except Exception as error:  # torch_pruning raises many classes
        reason = " ".join(str(error).split())[:200]
        raise Unprunable(f"channels cannot be removed from {type(net).__name__}: {reason}") from (
            error
        )
    if after != width:
        raise Unprunable(
            f"{type(net).__name__} would lose outputs; name its last layer `head`, because only "
            "that layer is exempt from pruning"
        )
    for name, param in net.named_parameters():
        param.requires_grad_(learning[name])
    if _size(net) == before:
        raise Unprunable(
            f"no layer of {type(net).__name__} can lose {share:.0%} of its channels in steps of "
            f"{ROUND_TO}"
        )


def _size(net: nn.Module) -> int:
    return sum(param.numel() for param in net.parameters())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
