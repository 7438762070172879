"""Masked autoencoder (He et al. 2022) for images of any number of axes, on timm's blocks.

The encoder sees visible patches only: patches are cut first, the visible ones gathered raw, and
only those embedded. The decoder sees them and a mask token for each hidden one. Which patches are
hidden is an argument, so that a new masking strategy never touches this file.

B batch · C channels · *S spatial axes · P patches of the grid, row-major · V visible · X hidden
Q values of one patch, inner order (pixels..., C) · D encoder width · E decoder width
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from trainables.config import SIZES, ModelConfig, TrialConfig
from trainables.timm_blocks import Block

Target = Literal["pixels", "normalised"]

HEAD_WIDTH = 64  # as attention kernels like it
# Positions count in patches of 16 pixels, the usual size, whatever the patch is
PIXELS_PER_POSITION = 16
# Added to a patch's variance when targets are normalised, as (this many deviations of the data
# set)^2: otherwise one grey level in a black patch would become a target of several units
DEVIATION_FLOOR = 0.05

_norm = partial(nn.LayerNorm, eps=1e-6)  # as timm's models, so that an export computes the same


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, *S) -> patches_BPQ."""
    batch, channels, *size = images.shape
    grid = [edge // patch for edge in size]
    axes = len(grid)
    cut = images.reshape(batch, channels, *(edge for cells in grid for edge in (cells, patch)))
    grid_axes = range(2, 2 + 2 * axes, 2)
    pixel_axes = range(3, 3 + 2 * axes, 2)
    return cut.permute(0, *grid_axes, *pixel_axes, 1).reshape(
        batch, math.prod(grid), patch**axes * channels
    )


def unpatchify(patches_BPQ: Tensor, grid: Sequence[int], patch: int, channels: int) -> Tensor:
    """patches_BPQ -> (B, C, *S)."""
    axes = len(grid)
    cut = patches_BPQ.reshape(-1, *grid, *[patch] * axes, channels)
    interleaved = [axis for pair in range(axes) for axis in (1 + pair, 1 + axes + pair)]
    size = [cells * patch for cells in grid]
    return cut.permute(0, 1 + 2 * axes, *interleaved).reshape(-1, channels, *size)


def positions(grid: Sequence[int], patch: int, width: int) -> Tensor:
    """float32 (P, width): sines and cosines of the patch centres, in units of 16 pixels.

    In image units, so that a place keeps its code at every patch size. Each axis has an equal part
    of the width; what is left over (only with three axes) is zero.
    """
    num_waves = width // (2 * len(grid))
    waves = 10000.0 ** (-torch.arange(num_waves, dtype=torch.float64) / num_waves)
    axes = [
        (torch.arange(cells, dtype=torch.float64) + 0.5) * patch / PIXELS_PER_POSITION
        for cells in grid
    ]
    places = torch.meshgrid(*axes, indexing="ij")
    angles = [place.reshape(-1, 1) * waves for place in places]
    code = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(code, (0, width - code.shape[1])).to(torch.float32)


class Encoder(nn.Module):
    """A plain vision transformer on patches that are cut already; class token first."""

    positions: Tensor

    def __init__(
        self, size_name: str, patch: int, image_size: Sequence[int], channels: int
    ) -> None:
        super().__init__()
        size = SIZES[size_name]
        self.width, self.depth, self.heads = size["width"], size["depth"], size["heads"]
        self.patch, self.channels = patch, channels
        self.grid = tuple(edge // patch for edge in image_size)
        self.embed = nn.Linear(patch ** len(self.grid) * channels, self.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.width))
        # Fixed, and computed again wherever a model is built
        self.register_buffer("positions", positions(self.grid, patch, self.width), persistent=False)
        self.blocks = nn.ModuleList(_block(self.width, self.heads) for _ in range(self.depth))
        self.norm = _norm(self.width)

    def forward(self, patches_BPQ: Tensor, visible_BV: Tensor | None = None) -> Tensor:
        """Tokens (B, 1 + V, D) after the last norm; None: all patches are visible."""
        tokens = self._embed(patches_BPQ, visible_BV)
        for block in self.blocks:
            tokens = block(tokens)
        normed: Tensor = self.norm(tokens)
        return normed

    def features(self, patches_BPQ: Tensor, after: Sequence[int]) -> list[Tensor]:
        """Grid tokens (B, P, D) after the named blocks (from 1), the last block's normed."""
        tokens = self._embed(patches_BPQ, None)
        found = {}
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            found[number] = self.norm(tokens) if number == self.depth else tokens
        return [found[number][:, 1:] for number in after]

    def _embed(self, patches_BPQ: Tensor, visible_BV: Tensor | None) -> Tensor:
        if visible_BV is None:
            tokens_BVD = self.embed(patches_BPQ) + self.positions
        else:
            tokens_BVD = self.embed(_pick(patches_BPQ, visible_BV)) + self.positions[visible_BV]
        class_token = self.class_token.expand(len(tokens_BVD), -1, -1)
        return torch.cat([class_token, tokens_BVD], dim=1)


class Decoder(nn.Module):
    """Self-attention over all patches: encoded where visible, a mask token where hidden."""

    positions: Tensor

    def __init__(
        self,
        grid: Sequence[int],
        patch: int,
        channels: int,
        encoder_width: int,
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", positions(grid, patch, width), persistent=False)
        self.blocks = nn.ModuleList(_block(width, width // HEAD_WIDTH) for _ in range(depth))
        self.norm = _norm(width)
        self.head = nn.Linear(width, patch ** len(grid) * channels)

    def forward(
        self, tokens: Tensor, visible_BV: Tensor, hidden_BX: Tensor, *, predict_visible: bool
    ) -> Tensor:
        """Tokens (B, 1 + V, D) -> predictions: visible patches, if asked for, then hidden ones."""
        tokens = self.embed(tokens)
        class_token, visible = tokens[:, :1], tokens[:, 1:] + self.positions[visible_BV]
        hidden = self.mask_token + self.positions[hidden_BX]
        # Attention does not mind the order, so nobody sorts the patches back
        tokens = torch.cat([class_token, visible, hidden], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        first = 1 if predict_visible else 1 + visible_BV.shape[1]
        predictions: Tensor = self.head(self.norm(tokens[:, first:]))
        return predictions


class MAE(nn.Module):
    """Encoder, decoder and the loss in pixels."""

    def __init__(self, config: ModelConfig, image_size: Sequence[int], channels: int) -> None:
        super().__init__()
        self.encoder = Encoder(config.size, config.patch, image_size, channels)
        self.decoder = Decoder(
            self.encoder.grid,
            config.patch,
            channels,
            self.encoder.width,
            config.decoder.width,
            config.decoder.depth,
        )

    def forward(
        self,
        images: Tensor,
        visible_BV: Tensor,
        hidden_BX: Tensor,
        *,
        visible_weight: float = 0.0,
        target: Target = "pixels",
    ) -> Tensor:
        """Mean squared error on hidden pixels + `visible_weight` times that on visible pixels."""
        patches_BPQ = patchify(images, self.encoder.patch)
        predict_visible = visible_weight > 0
        tokens = self.encoder(patches_BPQ, visible_BV)
        predicted = self.decoder(tokens, visible_BV, hidden_BX, predict_visible=predict_visible)
        if not predict_visible:
            return _error(predicted, _pick(patches_BPQ, hidden_BX), target)
        predicted_BVQ, predicted_BXQ = predicted.split(
            [visible_BV.shape[1], hidden_BX.shape[1]], dim=1
        )
        hidden_error = _error(predicted_BXQ, _pick(patches_BPQ, hidden_BX), target)
        visible_error = _error(predicted_BVQ, _pick(patches_BPQ, visible_BV), target)
        return hidden_error + visible_weight * visible_error

    def reconstruct(
        self, images: Tensor, visible_BV: Tensor, hidden_BX: Tensor, *, target: Target = "pixels"
    ) -> Tensor:
        """Predicted images (B, C, *S), float32, every patch predicted.

        With normalised targets each patch is given its true mean and deviation: an oracle's.
        """
        patches_BPQ = patchify(images, self.encoder.patch)
        tokens = self.encoder(patches_BPQ, visible_BV)
        predicted = self.decoder(tokens, visible_BV, hidden_BX, predict_visible=True).float()
        order_BP = torch.cat([visible_BV, hidden_BX], dim=1)
        predicted_BPQ = _pick(predicted, order_BP.argsort(dim=1))
        if target == "normalised":
            mean, deviation = _moments(patches_BPQ.float())
            predicted_BPQ = predicted_BPQ * deviation + mean
        return unpatchify(
            predicted_BPQ, self.encoder.grid, self.encoder.patch, self.encoder.channels
        )


def build_mae(config: TrialConfig, image_size: Sequence[int], channels: int, seed: int) -> MAE:
    """A model whose weights follow from `seed` alone: the same for every rank and device."""
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation, which is replaced
        model = MAE(config.model, image_size, channels)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Set all weights of linear layers, norms and tokens.

    Linear: Xavier uniform, bias 0 · norms: 1 and 0 · class and mask token: normal, deviation 0.02.
    The encoder stands first, so its weights do not depend on the decoder's shape.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Encoder):
            nn.init.normal_(module.class_token, std=0.02, generator=generator)
        elif isinstance(module, Decoder):
            nn.init.normal_(module.mask_token, std=0.02, generator=generator)


def _block(width: int, heads: int) -> nn.Module:
    block: nn.Module = Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=_norm)
    return block


def _pick(patches_BPQ: Tensor, numbers_BN: Tensor) -> Tensor:
    """The patches of those numbers, (B, N, Q)."""
    return patches_BPQ.gather(1, numbers_BN[..., None].expand(-1, -1, patches_BPQ.shape[-1]))


def _error(predicted: Tensor, truth: Tensor, target: Target) -> Tensor:
    """Mean squared error in float32, whatever the forward pass ran in."""
    truth = truth.float()
    if target == "normalised":
        mean, deviation = _moments(truth)
        truth = (truth - mean) / deviation
    return (predicted.float() - truth).square().mean()


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and floored deviation of each patch over its values, which may be a single one."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, correction=0, keepdim=True)
    return mean, (variance + DEVIATION_FLOOR**2).sqrt()
