"""Pruning: whole channels removed, so that the graph is really smaller."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import torch_pruning
from torch import Tensor, nn

from train.nets.losses import Loss

# int8 kernels work on blocks of so many channels.
ROUND_TO = 16


class Unprunable(Exception):
    """A net whose channels cannot be removed. The message says why."""


def remove_channels(
    net: nn.Module, inputs: tuple[Tensor, ...], targets_N: Tensor, loss: Loss, share: float
) -> None:
    """Remove `share` of the channels of each layer, in place, those first that matter least.

    What matters is estimated from the gradient of the loss on N records, over all layers that must
    lose a channel together: Molchanov et al., https://arxiv.org/abs/1906.10771, and Fang et al.,
    https://arxiv.org/abs/2301.12900. The last layer keeps its outputs; layers that do not learn
    stay as they are. Raises Unprunable.
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
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise Unprunable(f"channels cannot be removed from {type(net).__name__}: {reason}") from (
            error
        )
    if after != width:
        raise Unprunable(
            f"{type(net).__name__} would lose outputs; call its last layer head, as only that one "
            "keeps them"
        )
    for name, param in net.named_parameters():
        param.requires_grad_(learning[name])
    if _size(net) == before:
        raise Unprunable(
            f"{type(net).__name__} has no layer of which {share:.0%} are {ROUND_TO} channels"
        )


def _size(net: nn.Module) -> int:
    return sum(param.numel() for param in net.parameters())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
