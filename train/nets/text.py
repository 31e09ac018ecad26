"""Encoders for texts: token ids, 0 for padding → one vector.

Shapes: B batch, L tokens, D width, V tokens of the vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BagOfWords(nn.Module):
    """The mean of the tokens' embeddings, weighted by rarity: int32 [B, L] → float32 [B, D].

    In training, a share `dropout` of the tokens is dropped, so that the network does not depend on
    single tokens.
    """

    rarity_V: Tensor

    def __init__(self, idf_V: Sequence[float], width: int, dropout: float) -> None:
        super().__init__()
        self.width, self.dropout = width, dropout
        self.register_buffer("rarity_V", torch.tensor(idf_V))
        self.table = nn.Embedding(len(idf_V), width)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """int32 token ids [B, L] → float32 [B, D]."""
        weights_BL = F.embedding(tokens_BL, self.rarity_V[:, None])[:, :, 0] * (tokens_BL > 0)
        if self.training and self.dropout:
            weights_BL = weights_BL * (torch.rand_like(weights_BL) >= self.dropout)
        sum_BD = (weights_BL[:, None] @ self.table(tokens_BL))[:, 0]
        return sum_BD / weights_BL.sum(dim=1, keepdim=True).clamp_min(1)


class TransformerEncoder(nn.Module):
    """A small transformer, averaged over the tokens: int32 [B, L] → float32 [B, D].

    After Vaswani et al., https://arxiv.org/abs/1706.03762, with norms before the layers.
    """

    def __init__(
        self, size: int, max_tokens: int, width: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Embedding(size, width)
        self.places = nn.Embedding(max_tokens, width)
        for table in (self.table, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.ModuleList(TransformerLayer(width, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """int32 token ids [B, L] → float32 [B, D]."""
        there_BL = tokens_BL > 0
        places_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        x_BLD = self.table(tokens_BL) + self.places(places_L)
        x_BLD = self.dropout(x_BLD)
        for layer in self.layers:
            x_BLD = layer(x_BLD, there_BL)
        x_BLD = self.norm(x_BLD) * there_BL[:, :, None]
        return x_BLD.sum(dim=1) / there_BL.sum(dim=1, keepdim=True).clamp_min(1)


class TransformerLayer(nn.Module):
    """Attention with four heads over the tokens, without padding; then a hidden layer of 4·D."""

    num_heads = 4

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, there_BL: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]. there_BL: bool [B, L], False for padding."""
        x_BLD = x_BLD + self.dropout(self.out(self._attention(self.norm1(x_BLD), there_BL)))
        return x_BLD + self.dropout(self.down(F.gelu(self.up(self.norm2(x_BLD)))))

    def _attention(self, x_BLD: Tensor, there_BL: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)
            for part in self.qkv(x_BLD).chunk(3, dim=-1)
        )
        # Without any token, attend to all positions: softmax over none would be NaN.
        seen_B11L = (there_BL | ~there_BL.any(dim=1, keepdim=True))[:, None, None]
        # ONNX Runtime's kernel does not repeat the mask for each query.
        seen_B1LL = seen_B11L.expand(batch, 1, length, length)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_B1LL)
        return mixed.transpose(1, 2).reshape(batch, length, width)
