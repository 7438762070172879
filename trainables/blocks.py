"""Blocks that the networks are made of.

They are our own because timm costs every worker seconds of import for these few lines.
Weights have the names, the order and the initial values that they have there, so that an encoder
loads in timm and an older checkpoint here. tests/test_blocks.py compares them bit by bit.

B batch · N tokens · D width · H heads
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

MLP_RATIO = 4

# as timm's models, so that an export computes the same
layer_norm = partial(nn.LayerNorm, eps=1e-6)


class Attention(nn.Module):
    """Self-attention of several heads (Vaswani et al. 2017), with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BND: Tensor, is_key: Tensor | None = None) -> Tensor:
        """`is_key` (B, 1, 1, N): which tokens are attended to; None: all."""
        batch, count, width = tokens_BND.shape
        split = self.qkv(tokens_BND).reshape(batch, count, 3, self.heads, width // self.heads)
        query_BHN, key_BHN, value_BHN = split.permute(2, 0, 3, 1, 4).unbind(0)
        found_BHN = functional.scaled_dot_product_attention(query_BHN, key_BHN, value_BHN, is_key)
        projected: Tensor = self.proj(found_BHN.transpose(1, 2).reshape(batch, count, width))
        return projected


class Block(nn.Module):
    """Attention, then an MLP: each behind a norm, added to its input (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, MLP_RATIO * width),
                act=nn.GELU(),
                fc2=nn.Linear(MLP_RATIO * width, width),
            )
        )

    def forward(self, tokens_BND: Tensor, is_key: Tensor | None = None) -> Tensor:
        """`is_key` (B, 1, 1, N): which tokens are attended to; None: all."""
        tokens_BND = tokens_BND + self.attn(self.norm1(tokens_BND), is_key)
        tokens_BND = tokens_BND + self.mlp(self.norm2(tokens_BND))
        return tokens_BND
