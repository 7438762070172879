"""U-Net Transformer (Hatamizadeh et al. 2022) on our encoder, for any patch size, any image axes.

Level l has the image's size / 2**l. The decoder climbs from the deepest level, which holds the
last block's tokens, to level 0, and at each level adds the tokens of an earlier block; level 0 adds
the image itself. Each token is mapped to the pixels that its patch has at the level, as in MAE's
own head, as it alone knows where in the patch small things lie (test mIoU 0.67, 0.75, 0.70 with
three seeds, 0.66, 0.46, 0.65 when tokens were interpolated instead: patch 16, size pico, 64 images
of 64 pixels with discs of 2 to 18). Below patch 8 the deepest tokens are averaged, so that there
are always three levels under the image; where a patch is no power of two, what remains is
interpolated. The patch's longest edge says how many levels there are; where it is shorter, tokens
are averaged earlier.

From level to level it goes by interpolation and convolution, which beat transposed convolutions
under a vision transformer (arXiv 2507.01744); skips are added, at two thirds of the cost of
concatenation. The skip from the image goes around the encoder: compare with the random-init and
frozen controls before crediting the pretraining, or leave it out (`segment.image_skip: false`) to
see what the encoder knows by itself.

B batch · C channels · *S spatial axes · P patches · D encoder width · K classes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables import padding
from trainables.blocks import CONVOLUTION, ResidualBlock, laid_out, nested
from trainables.config import TrialConfig
from trainables.levels import levels_of
from trainables.mae import Encoder, initialise, patchify, unpatchify

# By number of axes
INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
POOLING: dict[int, Callable[..., Tensor]] = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}


class UNETR(nn.Module):
    """Encoder blocks as the contracting path, convolutions as the expanding one."""

    def __init__(
        self,
        encoder: Encoder,
        image_size: Sequence[int],
        num_classes: int,
        features: int,
        *,
        trains_encoder: bool = True,
        image_skip: bool = True,
    ) -> None:
        super().__init__()
        self.trains_encoder = trains_encoder
        self.encoder = encoder.requires_grad_(trains_encoder)
        self.sizes, widths = found = levels_of(image_size, encoder.patch, features)
        num_levels = len(widths) - 1
        levels = range(1, num_levels + 1)
        # Blocks (from 1) whose tokens levels 1, 2, ... take in; the deepest takes the last block's
        self.after = [max(1, round(encoder.depth * level / num_levels)) for level in levels]

        axes = len(image_size)
        convolution = CONVOLUTION[axes]
        self.image_skip: nn.Module | None = None
        if image_skip:
            self.image_skip = convolution(encoder.channels, widths[0], kernel_size=3, padding=1)
        self.token_skips = nn.ModuleList(
            TokenSkip(encoder, found.edges(encoder.patch, level), widths[level], self.sizes[level])
            for level in levels
        )
        self.narrow = nn.ModuleList(
            convolution(deeper, width, kernel_size=1) for width, deeper in pairwise(widths)
        )
        self.refine = nn.ModuleList(
            nested("layer", ResidualBlock(axes, width)) for width in widths[:-1]
        )
        head = convolution(widths[0], num_classes, kernel_size=1)
        self.head = nested("conv", nested("conv", head))

    def train(self, mode: bool = True) -> UNETR:
        """A frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and self.trains_encoder)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Standardised images (B, C, *S) -> class scores (B, K, *S), without meaning in padding."""
        tokens = self.encoder.features(patchify(images, self.encoder.patch), self.after)
        skips: list[Tensor | None] = [None]
        if self.image_skip is not None:
            shown = padding.filled(images) if self.encoder.is_padded else images
            skips = [laid_out(self.image_skip(shown))]
        skips += [skip(found) for skip, found in zip(self.token_skips, tokens, strict=True)]

        features = skips[-1]
        assert features is not None
        for level in reversed(range(len(skips) - 1)):
            # A 1x1 convolution and interpolation commute: narrow first, as that is cheaper
            features = _resized(self.narrow[level](features), self.sizes[level])
            skip = skips[level]
            features = self.refine[level](features if skip is None else features + skip)
        scores: Tensor = self.head(features)
        return scores


class TokenSkip(nn.Module):
    """Tokens (B, P, D) -> features (B, width, *size) of a level, each token in its own place."""

    def __init__(
        self, encoder: Encoder, edges: tuple[int, ...], width: int, size: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.grid, self.width, self.size = encoder.grid, width, size
        self.edges = edges  # of a patch at this level
        # Tokens grow from block to block, and in training; without this they drown the image's skip
        self.norm = nn.LayerNorm(encoder.width)
        self.map = nn.Linear(encoder.width, math.prod(self.edges) * width)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        features = unpatchify(self.map(self.norm(tokens_BPD)), self.grid, self.edges, self.width)
        return _resized(laid_out(features), self.size)


def build_unetr(
    config: TrialConfig,
    image_size: Sequence[int],
    channels: int,
    num_classes: int,
    seed: int = 0,
    *,
    is_padded: bool = False,
) -> UNETR:
    """A model whose weights follow from `seed` alone; load pretrained ones into `.encoder`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        patch = config.patch_edges(len(image_size))
        encoder = Encoder(
            config.model.size,
            patch,
            image_size,
            channels,
            position_unit=config.model.positions,
            is_padded=is_padded,
        )
        model = UNETR(
            encoder,
            image_size,
            num_classes,
            config.segment.features,
            trains_encoder=config.segment.encoder != "frozen",
            image_skip=config.segment.image_skip,
        )
    initialise(encoder, seed)
    return model


def _resized(features: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, *S), each axis averaged down or interpolated up to `size`, first the former."""
    now = features.shape[2:]
    smallest = tuple(map(min, now, size))
    if smallest != now:
        features = POOLING[len(size)](features, smallest)
    if smallest != size:
        features = functional.interpolate(features, size, mode=INTERPOLATION[len(size)])
    return features
