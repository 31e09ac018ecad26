"""A pretrained text encoder: token numbers, 0 for padding → one vector.

Shapes: B batch, L tokens, D width.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from train.nets.pretrained.backbones import build_backbone
from train.nets.pretrained.encoder import Freeze, PretrainedEncoder

Pooling = Literal["mean", "cls", "last"]


class PretrainedText(PretrainedEncoder):
    """An encoder of transformers and a pooling: int32 token numbers [B, L] → float32 [B, D]."""

    def __init__(
        self,
        architecture: Mapping[str, Any],
        pooling: Pooling,
        freeze: Freeze,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        """architecture: a configuration of transformers. freeze, adapters: see PretrainedEncoder.

        Raises ValueError for options that do not fit, and if the architecture is not a text encoder
        that this version of transformers knows.
        """
        backbone = build_backbone(architecture)
        config: Any = getattr(backbone, "config", None)
        if not getattr(config, "vocab_size", None) or getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"net.pretrained has the model type '{architecture.get('model_type')}', which is "
                "not an encoder of texts; give one such as BERT, RoBERTa, DistilBERT, MPNet or "
                "ModernBERT"
            )
        super().__init__(backbone, int(config.hidden_size), freeze, adapters)
        self.pooling = pooling
        self.padding = int(config.pad_token_id or 0)
        self.has_rotary = has_rotary(backbone)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """int32 token numbers [B, L] → the pooled vectors of the encoder, float32 [B, D]."""
        given = transformer_inputs(tokens_BL, self.padding, has_rotary=self.has_rotary)
        seen_BL = given["attention_mask"] > 0
        x_BLD = self.backbone(**given).last_hidden_state
        if self.pooling == "cls":
            return x_BLD[:, 0]
        if self.pooling == "last":
            last_B = seen_BL.sum(dim=1) - 1
            return x_BLD[torch.arange(x_BLD.shape[0], device=x_BLD.device), last_B]
        weights_BL1 = seen_BL[:, :, None].to(x_BLD.dtype)
        return (x_BLD * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1)


def has_rotary(model: nn.Module) -> bool:
    """Return whether a model of transformers has rotary embeddings of positions."""
    return any("rotary" in name for name, _ in model.named_modules())


def transformer_inputs(tokens_BL: Tensor, padding: int, *, has_rotary: bool) -> dict[str, Tensor]:
    """int32 token numbers [B, L] → ids and mask, int64 [B, L], as models of transformers take them.

    padding: id of the padding token. has_rotary: whether the model needs positions, too.
    """
    there_BL = tokens_BL > 0
    ids_BL = torch.where(there_BL, tokens_BL - 1, padding).long()
    # A record without any token attends to its first position: a softmax over none is NaN.
    first_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) == 0
    seen_BL = there_BL | (first_L & ~there_BL.any(dim=1, keepdim=True))
    given = {"input_ids": ids_BL, "attention_mask": seen_BL.long()}
    if has_rotary:
        # ONNX Runtime's operator for rotary embeddings wants the positions of every record.
        positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        given["position_ids"] = positions_L.expand(tokens_BL.shape[0], -1)
    return given
