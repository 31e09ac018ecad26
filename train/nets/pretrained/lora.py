"""Low-rank adapters (LoRA, Hu et al., https://arxiv.org/abs/2106.09685) by peft.

An adapted layer computes W·x + (alpha / rank)·B·A·x. Only A and B are trained; B starts as 0. For
inference their product is added to W, so adapters cost nothing there.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cluster.errors import error_line
from train.nets.pretrained.torchvision_operators import declare_operators


def add_adapters(
    backbone: nn.Module, layers: Sequence[nn.Module], options: Mapping[str, Any]
) -> None:
    """Add an adapter to layers of a backbone in place, and freeze everything else.

    layers: those of the backbone, whose linear layers are adapted unless options["targets"] gives
    names. Raises ValueError if no layer has such a name, or peft is not installed.
    """
    declare_operators()
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "net.lora needs peft; install it with: pip install 'halyard[lora]'"
        ) from error
    targets = options["targets"]
    if targets is None:
        inside = {id(module) for layer in layers for module in layer.modules()}
        targets = [
            name
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Linear) and id(module) in inside
        ]
        if not targets:
            raise ValueError("net.lora finds no linear layers; name layers in net.lora.targets")
    backbone.requires_grad_(False)
    config = LoraConfig(r=options["rank"], lora_alpha=options["alpha"], target_modules=targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, backbone)
    except ValueError as error:
        if any(_matches(name, targets) for name, _ in backbone.named_modules()):
            raise ValueError(f"net.lora does not fit the encoder: {error_line(error)}") from error
        names = {name.rpartition(".")[2] for name, each in backbone.named_modules() if _fits(each)}
        raise ValueError(
            f"net.lora.targets is {list(targets)}, which no layer is named; the names are "
            f"{', '.join(sorted(names))}"
        ) from error


def base_names(backbone: nn.Module) -> dict[str, str]:
    """Return, by name without adapters, the name of each weight that is not of an adapter."""
    return {
        name.replace(".base_layer.", "."): name
        for name in backbone.state_dict()
        if ".lora_" not in name
    }


def merge_adapters(backbone: nn.Module) -> None:
    """Add adapters to the weights of their layers, and put these layers back, in place."""
    for name, module in list(backbone.named_modules()):
        if hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, module.get_base_layer())


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)
