"""A pretrained text encoder: token numbers, 0 for padding → one vector.

Shapes: B batch, L tokens, D width.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cluster.errors import UserError, error_line
from train.nets.pretrained.checkpoints import PretrainedCheckpoint

Pooling = Literal["mean", "cls", "last"]


class PretrainedText(nn.Module):
    """An encoder of transformers and a pooling: int32 [B, L] → float32 [B, D].

    The weights are random until they are loaded. The vectors of a frozen encoder are scaled to mean
    0 and standard deviation 1, and may be computed in advance: `forward` takes them, float32
    [B, D], in place of token numbers.
    """

    mean_D: Tensor
    std_D: Tensor

    def __init__(
        self,
        architecture: Mapping[str, Any],
        pooling: Pooling,
        freeze: Literal["all", "none"] | int,
    ) -> None:
        """architecture: a configuration of transformers.

        freeze: what keeps its weights: all, none, or the embeddings and this number of layers, from
        the first. Raises ValueError if there are fewer layers, or if the architecture is not a text
        encoder that this version of transformers knows.
        """
        super().__init__()
        self.backbone = _build(architecture)
        config: Any = self.backbone.config
        self.width = int(config.hidden_size)
        self.pooling = pooling
        self.padding = int(config.pad_token_id or 0)
        self.has_rotary = any("rotary" in name for name, _ in self.backbone.named_modules())
        self.is_frozen = freeze == "all"
        self.register_buffer("mean_D", torch.zeros(self.width))
        self.register_buffer("std_D", torch.ones(self.width))
        if freeze == "all":
            self.backbone.requires_grad_(False)
        elif freeze != "none":
            layers = layers_of(self.backbone)
            if freeze > len(layers):
                raise ValueError(
                    f"net.freeze is {freeze}, and the encoder has {len(layers)} layers"
                )
            embeddings = [part for name, part in self.backbone.named_children() if "embed" in name]
            for part in (*embeddings, *layers[:freeze]):
                part.requires_grad_(False)

    def depths(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield each parameter of the encoder, and how many layers follow its own."""
        layers = layers_of(self.backbone)
        depth_of = {
            id(param): depth for depth, layer in enumerate(layers) for param in layer.parameters()
        }
        for name, param in self.backbone.named_parameters():
            # What is in no layer comes before the first or after the last.
            outside = -1 if "embed" in name.split(".")[0] else len(layers) - 1
            yield param, len(layers) - 1 - depth_of.get(id(param), outside)

    def train(self, mode: bool = True) -> "PretrainedText":
        """Set the mode; a frozen encoder stays without dropout."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """int32 token numbers [B, L] → float32 [B, D]."""
        vectors_BD = tokens_BL if tokens_BL.is_floating_point() else self.embed(tokens_BL)
        return (vectors_BD - self.mean_D) / self.std_D

    @torch.no_grad()
    def fit_inputs(self, vectors_BD: Tensor) -> None:
        """Fit the scale of a frozen encoder to vectors of training records, float32 [B, D]."""
        if self.is_frozen and vectors_BD.is_floating_point():
            self.mean_D.copy_(vectors_BD.mean(dim=0))
            self.std_D.copy_(vectors_BD.std(dim=0).clamp_min(1e-4))

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """int32 token numbers [B, L] → the pooled vectors of the encoder, float32 [B, D]."""
        there_BL = tokens_BL > 0
        ids_BL = torch.where(there_BL, tokens_BL - 1, self.padding).long()
        # A record without any token attends to its first position: a softmax over none is NaN.
        first_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) == 0
        seen_BL = there_BL | (first_L & ~there_BL.any(dim=1, keepdim=True))
        given = {"input_ids": ids_BL, "attention_mask": seen_BL.long()}
        if self.has_rotary:
            # ONNX Runtime's operator for rotary embeddings wants the positions of every record.
            positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
            given["position_ids"] = positions_L.expand(tokens_BL.shape[0], -1)
        x_BLD = self.backbone(**given).last_hidden_state
        if self.pooling == "cls":
            return x_BLD[:, 0]
        if self.pooling == "last":
            last_B = seen_BL.sum(dim=1) - 1
            return x_BLD[torch.arange(x_BLD.shape[0], device=x_BLD.device), last_B]
        weights_BL1 = seen_BL[:, :, None].to(x_BLD.dtype)
        return (x_BLD * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1)


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """Return the encoder's layers, from the first to the last: the longest list of equal modules.

    Raises ValueError if it has none.
    """
    lists = [
        list(module)
        for module in backbone.modules()
        if isinstance(module, nn.ModuleList) and len({type(each) for each in module}) == 1
    ]
    if not lists:
        raise ValueError(f"{type(backbone).__name__} has no list of layers")
    return max(lists, key=len)


def _build(architecture: Mapping[str, Any]) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ValueError(
            "pretrained text encoders need transformers; install it with: pip install "
            "'halyard[text]'"
        ) from error
    options = dict(architecture)
    kind = options.pop("model_type")
    try:
        config = AutoConfig.for_model(kind, **options)
        backbone = AutoModel.from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"net.pretrained has the model type '{kind}', which cannot be built: "
            f"{error_line(error)}"
        ) from error
    if not getattr(config, "vocab_size", None) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"net.pretrained has the model type '{kind}', which is not an encoder of texts; give "
            "one such as BERT, RoBERTa, DistilBERT, MPNet or ModernBERT"
        )
    # Its output is not used, and parameters without a gradient would stop data-parallel training.
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    backbone.float()
    return backbone


def read_weights(checkpoint: PretrainedCheckpoint) -> dict[str, Tensor]:
    """Return the weights of the encoder, named as in `PretrainedText.backbone`.

    Raises UserError if weights are missing, or if their shapes differ from the architecture.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = AutoModel.from_pretrained(
            checkpoint.folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # what transformers raises differs by architecture
        raise UserError(
            f"net.pretrained is '{checkpoint.name}', whose weights cannot be read: "
            f"{error_line(error)}."
        ) from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    differing = sorted(str(each[0]) for each in report["mismatched_keys"])
    if wrong := missing or differing:
        what = "lack" if missing else "have another shape for"
        raise UserError(
            f"net.pretrained is '{checkpoint.name}', whose weights {what} '{wrong[0]}'"
            + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + "; they are of another architecture than its config.json."
        )
    state = model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("pooler.")}
