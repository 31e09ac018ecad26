"""What pretrained encoders of texts and of images have in common.

Shapes: B batch, D width.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from train.nets.pretrained import lora

Freeze = Literal["all", "none"] | int
# Gradient descent on a linear layer is as fast, and as stable, for vectors of any width if their
# length is the same.
LENGTH = 20.0
# A pretrained batch norm keeps its statistics: those of a few records would be worse.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class PretrainedEncoder(nn.Module):
    """A pretrained network without its last layer: an encoded column → float32 [B, D].

    The weights are random until they are loaded. The vectors of a frozen encoder are centred and
    scaled to the length LENGTH, as a root mean square. They may be computed in advance: `forward`
    takes them, float32 [B, D], in place of the column.
    """

    mean_D: Tensor
    scale: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        freeze: Freeze,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        """width: D. freeze: what keeps its weights: all, none, or all before a number of layers and
        these layers. adapters: options of low-rank adapters, the only part that is then trained.

        Raises ValueError if there are fewer layers, or no layers that the adapters are for.
        """
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.is_frozen = freeze == "all"
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        if adapters is not None:
            lora.add_adapters(backbone, layers_of(backbone), adapters)
        elif freeze == "all":
            backbone.requires_grad_(False)
        elif freeze != "none":
            count = len(layers_of(backbone))
            if freeze > count:
                raise ValueError(f"net.freeze is {freeze}, and the encoder has {count} layers")
            for param, steps in self.depths():
                param.requires_grad_(steps < count - freeze)

    def depths(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield each parameter of the encoder, and how many layers follow its own.

        What precedes the layers, such as embeddings, counts as a layer; what follows them counts
        as a part of the last.
        """
        layers = layers_of(self.backbone)
        depth_of = {
            id(param): depth for depth, layer in enumerate(layers) for param in layer.parameters()
        }
        depth = -1
        for param in self.backbone.parameters():
            if id(param) in depth_of:
                depth = depth_of[id(param)]
            elif depth >= 0:
                depth = len(layers) - 1
            yield param, len(layers) - 1 - depth

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        """Set the mode; a frozen encoder stays without dropout, and batch norms as they are."""
        super().train(mode)
        for module in self.backbone.modules():
            if self.is_frozen or isinstance(module, BATCH_NORMS):
                module.training = False
        return self

    def forward(self, values: Tensor) -> Tensor:
        """An encoded column, or vectors [B, D] → float32 [B, D]."""
        is_vectors = values.ndim == 2 and values.is_floating_point()
        vectors_BD = values if is_vectors else self.embed(values)
        return (vectors_BD - self.mean_D) * self.scale

    def embed(self, values: Tensor) -> Tensor:
        """An encoded column → the vectors of the backbone, float32 [B, D]."""
        raise NotImplementedError

    @torch.no_grad()
    def fit_inputs(self, values: Tensor) -> None:
        """Fit the scale of a frozen encoder to training records: a column, or vectors [B, D]."""
        if not self.is_frozen:
            return
        is_vectors = values.ndim == 2 and values.is_floating_point()
        vectors_BD = values if is_vectors else self.eval().embed(values)
        self.mean_D.copy_(vectors_BD.mean(dim=0))
        lengths_B = (vectors_BD - self.mean_D).square().sum(dim=1)
        self.scale.copy_(LENGTH / lengths_B.mean().sqrt().clamp_min(1e-4))

    def load_backbone(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights of the backbone, with the names and shapes that it has without adapters."""
        name_of = lora.base_names(self.backbone)
        state = self.backbone.state_dict()
        self.backbone.load_state_dict(state | {name_of[name]: weights[name] for name in name_of})

    def merge_adapters(self) -> None:
        """Add the low-rank adapters to the weights they belong to, and remove them."""
        lora.merge_adapters(self.backbone)


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers of an encoder, from the first to the last.

    They are the outermost lists of equal modules; each of several such lists is itself a layer.
    Raises ValueError if there are none.
    """
    level = [backbone]
    while level:
        level = [child for module in level for child in module.children()]
        lists = [module for module in level if _is_list(module)]
        if len(lists) == 1:
            return list(lists[0].children())
        if lists:
            return lists
    raise ValueError(f"{type(backbone).__name__} has no list of layers")


def _is_list(module: nn.Module) -> bool:
    children = list(module.children())
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(child) for child in children}) == 1
        and any(True for child in children for _ in child.children())
    )
