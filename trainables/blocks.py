"""Blocks that the networks are made of: transformer blocks, and convolutions along any axes.

They are our own because timm and MONAI cost every worker seconds of import for these few lines.
Weights have the names, the order and the initial values that they have there, so that an encoder
loads in timm and an older checkpoint here (tests/trainables/test_blocks.py, bit by bit).

B batch · N tokens · D width · H heads · C channels · *S spatial axes
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MLP_RATIO = 4
NORM_GROUPS = 4
SLOPE = 0.01  # of the leaky rectifier below 0, as in nnU-Net
# By number of axes
CONVOLUTION: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

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
        found_BHN = attention(query_BHN, key_BHN, value_BHN, is_key)
        projected: Tensor = self.proj(found_BHN.transpose(1, 2).reshape(batch, count, width))
        return projected


def attention(query: Tensor, key: Tensor, value: Tensor, is_key: Tensor | None) -> Tensor:
    """Scaled dot-product attention of heads (B, H, N, D); `is_key` (B, 1, 1, N), None: all.

    In half precision on a CPU as plain products, since the backward pass of torch's fused kernel is
    slow there: a step of pretraining takes 0.27 s in float32, 0.30 fused and 0.15 as products (size
    nano, patch 4, 128 images of 32 pixels, one thread of a processor with AMX).
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return functional.scaled_dot_product_attention(query, key, value, is_key)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_key is not None:
        scores = scores.masked_fill(~is_key, -math.inf)
    found: Tensor = scores.softmax(dim=-1) @ value
    return found


def laid_out(features: Tensor) -> Tensor:
    """Features (B, C, *S), the channels first in memory where that is faster.

    That is in half precision on a CPU, where torch's group norm takes 13 to 18 times as long with
    the channels last. Convolutions leave them as they find them: last behind an image of a single
    channel, and where each token has one cell.
    """
    is_half = features.device.type == "cpu" and features.dtype == torch.bfloat16
    return features.contiguous() if is_half else features


class Recomputable(nn.Module):
    """A block that can keep its input alone, and compute the rest once more in the backward pass.

    Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): about a third more time, for the
    memory of one block instead of all. Nothing here draws random numbers, so results are the same.
    """

    recomputes = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            found: Tensor = checkpoint(
                super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False
            )
            return found
        computed: Tensor = super().__call__(*inputs)
        return computed


def recompute(model: nn.Module) -> None:
    """Have all blocks of the model keep their inputs alone."""
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recomputes = True


class Block(Recomputable):
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


class ResidualBlock(Recomputable):
    """Two convolutions, added to their input, of 3 pixels along every axis: (B, C, *S) -> the same.

    As in nnU-Net with residuals (Isensee et al. 2024), but for its norm: group norm, as instance
    norm cannot handle a level of a single pixel.
    """

    def __init__(self, axes: int, width: int) -> None:
        super().__init__()
        convolution = partial(CONVOLUTION[axes], width, width, 3, padding=1, bias=False)
        groups = math.gcd(width, NORM_GROUPS)
        self.conv1 = nested("conv", convolution())
        self.conv2 = nested("conv", convolution())
        self.norm1 = nn.GroupNorm(groups, width)
        self.norm2 = nn.GroupNorm(groups, width)

    def forward(self, features: Tensor) -> Tensor:
        refined = self.norm1(self.conv1(features))
        # In place, as the features of a batch of volumes are most of the memory
        refined = functional.leaky_relu(refined, SLOPE, inplace=True)
        refined = self.norm2(self.conv2(refined))
        refined += features
        return functional.leaky_relu(refined, SLOPE, inplace=True)


def nested(name: str, module: nn.Module) -> nn.Module:
    """The module, its weights' names behind `name`, as MONAI's wrappers have them."""
    return nn.Sequential(OrderedDict({name: module}))
