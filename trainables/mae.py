"""Masked autoencoder (He et al. 2022) for images of any number of axes.

The encoder sees visible patches only: patches are cut first, the visible ones gathered raw, and
only those embedded. The decoder sees them and a mask token for each hidden one. Which patches are
hidden is an argument, so that a new masking strategy never touches this file.

Where there is padding (see padding.py), values of it are 0 to the encoder and in no error; a patch
that is nothing else is attended to by nobody, though it keeps its place, as shapes are static.

B batch · C channels · *S spatial axes · P patches of the grid, row-major · V visible · X hidden
Q values of one patch, inner order (pixels..., C) · D encoder width · E decoder width · U mask units
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainables import losses, padding
from trainables.blocks import Block, layer_norm
from trainables.config import SIZES, TrialConfig
from trainables.cross_decoder import HEAD_WIDTH, CrossDecoder
from trainables.edges import grid_of
from trainables.masking import MASKING
from trainables.masking.strategy import Part, Seen, Whole

# Where positions count in pixels: of the usual patch
PIXELS_PER_POSITION = 16
# Added to a patch's variance when targets are normalised, as (this many deviations of the data
# set)^2: otherwise one grey level in a black patch would become a target of several units
DEVIATION_FLOOR = 0.05


PositionUnit = Literal["patches", "pixels"]


def patchify(images: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, *S) -> patches_BPQ; `patch` has an edge for each axis."""
    batch, channels, *size = images.shape
    grid = grid_of(size, patch)
    axes = len(grid)
    cut = images.reshape(
        batch, channels, *(count for pair in zip(grid, patch, strict=True) for count in pair)
    )
    grid_axes = range(2, 2 + 2 * axes, 2)
    pixel_axes = range(3, 3 + 2 * axes, 2)
    return cut.permute(0, *grid_axes, *pixel_axes, 1).reshape(
        batch, math.prod(grid), math.prod(patch) * channels
    )


def unpatchify(
    patches_BPQ: Tensor, grid: Sequence[int], patch: Sequence[int], channels: int
) -> Tensor:
    """patches_BPQ -> (B, C, *S)."""
    axes = len(grid)
    cut = patches_BPQ.reshape(-1, *grid, *patch, channels)
    interleaved = [axis for pair in range(axes) for axis in (1 + pair, 1 + axes + pair)]
    size = [cells * edge for cells, edge in zip(grid, patch, strict=True)]
    return cut.permute(0, 1 + 2 * axes, *interleaved).reshape(-1, channels, *size)


def positions(
    grid: Sequence[int], patch: Sequence[int], width: int, position_unit: PositionUnit
) -> Tensor:
    """float32 (P, width): sines and cosines of the patch centres, in patches or in 16 pixels.

    In patches (He et al. 2022) the codes of neighbours are equally far apart at every patch size:
    1.17 per wave and axis; in pixels they fall to .60, .30 and .15 at patch 8, 4 and 2, but a place
    keeps its code. Each axis has an equal part of the width; what is left over (only with three
    axes) is zero.
    """
    in_pixels = [edge / PIXELS_PER_POSITION for edge in patch]
    steps = in_pixels if position_unit == "pixels" else [1.0] * len(grid)
    num_waves = width // (2 * len(grid))
    waves = 10000.0 ** (-torch.arange(num_waves, dtype=torch.float64) / num_waves)
    axes = [
        (torch.arange(cells, dtype=torch.float64) + 0.5) * step
        for cells, step in zip(grid, steps, strict=True)
    ]
    places = torch.meshgrid(*axes, indexing="ij")
    angles = [place.reshape(-1, 1) * waves for place in places]
    code = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(code, (0, width - code.shape[1])).to(torch.float32)


class Encoder(nn.Module):
    """A plain vision transformer on patches that are cut already; class token first."""

    positions: Tensor

    def __init__(
        self,
        size_name: str,
        patch: Sequence[int],
        image_size: Sequence[int],
        channels: int,
        *,
        position_unit: PositionUnit = "pixels",
        is_padded: bool = False,
    ) -> None:
        super().__init__()
        self.is_padded = is_padded
        size = SIZES[size_name]
        self.width, self.depth, self.heads = size["width"], size["depth"], size["heads"]
        self.patch, self.channels = tuple(patch), channels
        self.grid = grid_of(image_size, patch)
        self.embed = nn.Linear(math.prod(patch) * channels, self.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.width))
        # Fixed, and computed again wherever a model is built
        places = positions(self.grid, patch, self.width, position_unit)
        self.register_buffer("positions", places, persistent=False)
        self.blocks = nn.ModuleList(Block(self.width, self.heads) for _ in range(self.depth))
        self.norm = layer_norm(self.width)

    def forward(
        self,
        patches_BPQ: Tensor,
        visible_BV: Tensor | None = None,
        stand_in: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Tokens (B, 1 + V, D) after the last norm; None: all patches are visible.

        `stand_in` = (is_replaced_BV, token): that token is seen in place of those patches.
        """
        normed: Tensor = self.norm(self.layers(patches_BPQ, visible_BV, stand_in)[-1])
        return normed

    def layers(
        self,
        patches_BPQ: Tensor,
        visible_BV: Tensor | None = None,
        stand_in: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """The embedded tokens (B, 1 + V, D), then those after each block, none normed."""
        tokens, is_key = self._embed(patches_BPQ, visible_BV, stand_in)
        layers = [tokens]
        for block in self.blocks:
            layers.append(block(layers[-1], is_key))
        return layers

    def class_attention(self, patches_BPQ: Tensor) -> Tensor:
        """How much the class token attends to each patch in the last block, mean of heads: (B, P).

        All patches are visible; what the class token gives to itself is left out.
        """
        blocks: list[Any] = list(self.blocks)
        *others, last = blocks
        tokens, is_key = self._embed(patches_BPQ, None, None)
        for block in others:
            tokens = block(tokens, is_key)
        tokens = last.norm1(tokens)
        batch, count = tokens.shape[:2]
        query, key, _ = last.attn.qkv(tokens).reshape(batch, count, 3, self.heads, -1).unbind(2)
        scores = torch.einsum("bhd,bnhd->bhn", query[:, 0].float(), key.float())
        scores = scores * key.shape[-1] ** -0.5
        if is_key is not None:
            scores = scores.masked_fill(~is_key[:, 0], -math.inf)
        shares: Tensor = scores.softmax(dim=-1).mean(dim=1)
        return shares[:, 1:]

    def features(self, patches_BPQ: Tensor, after: Sequence[int]) -> list[Tensor]:
        """Grid tokens (B, P, D) after the named blocks (from 1), the last block's normed."""
        layers = self.layers(patches_BPQ)
        layers[-1] = self.norm(layers[-1])
        return [layers[number][:, 1:] for number in after]

    def _embed(
        self,
        patches_BPQ: Tensor,
        visible_BV: Tensor | None,
        stand_in: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens (B, 1 + V, D), which of them are attended to; None: all)."""
        if visible_BV is None:
            seen_BVQ, places = patches_BPQ, self.positions
        else:
            seen_BVQ, places = pick(patches_BPQ, visible_BV), self.positions[visible_BV]
        is_key = None
        if self.is_padded:
            is_key = padding.keys(seen_BVQ.isnan().all(dim=-1))
            seen_BVQ = padding.filled(seen_BVQ)
        tokens_BVD = self.embed(seen_BVQ)
        if stand_in is not None:
            is_replaced_BV, token = stand_in
            tokens_BVD = torch.where(is_replaced_BV[..., None], token.to(tokens_BVD), tokens_BVD)
        tokens_BVD = tokens_BVD + places
        class_token = self.class_token.expand(len(tokens_BVD), -1, -1)
        return torch.cat([class_token, tokens_BVD], dim=1), is_key


class Decoder(nn.Module):
    """Self-attention over all patches: encoded where visible, a mask token where hidden.

    Predicts `values` numbers of each patch; `places` (P, width) are their position codes.
    """

    positions: Tensor

    def __init__(
        self,
        places: Tensor,
        values: int,
        encoder_width: int,
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", places, persistent=False)
        self.blocks = nn.ModuleList(Block(width, width // HEAD_WIDTH) for _ in range(depth))
        self.norm = layer_norm(width)
        self.head = nn.Linear(width, values)

    def forward(
        self,
        tokens: Tensor,
        visible_BV: Tensor,
        hidden_BX: Tensor,
        is_key: Tensor | None = None,
        *,
        with_visible: bool,
    ) -> Tensor:
        """Tokens (B, 1 + V, D) -> predictions: visible patches, if asked for, then hidden ones.

        `is_key`: which of class token, visible and hidden patches are attended to; None: all.
        """
        tokens = self.embed(tokens)
        class_token, visible = tokens[:, :1], tokens[:, 1:] + self.positions[visible_BV]
        hidden = self.mask_token + self.positions[hidden_BX]
        # Attention does not mind the order, so nobody sorts the patches back
        tokens = torch.cat([class_token, visible, hidden], dim=1)
        for block in self.blocks:
            tokens = block(tokens, is_key)
        first = 1 if with_visible else 1 + visible_BV.shape[1]
        predictions: Tensor = self.head(self.norm(tokens[:, first:]))
        return predictions


class Truth(NamedTuple):
    """What is to be predicted of some patches, and what of it is real."""

    values_BNQ: Tensor  # float32, 0 in place of padding
    is_real_BNQ: Tensor | None  # None: all

    @property
    def weight_BN(self) -> Tensor | None:
        """How much each patch counts: the share of it that is real; None: all the same."""
        return None if self.is_real_BNQ is None else self.is_real_BNQ.float().mean(dim=-1)


class MAE(nn.Module):
    """Encoder, decoder and the loss; with the part that some strategies train beside them.

    `stand_in` (UM-MAE) is seen in place of some patches.
    """

    def __init__(
        self,
        config: TrialConfig,
        image_size: Sequence[int],
        channels: int,
        *,
        is_padded: bool = False,
    ) -> None:
        super().__init__()
        model, self.settings, self.is_padded = config.model, config.pretrain, is_padded
        axes = len(image_size)
        patch = config.patch_edges(axes)
        self.encoder = Encoder(
            model.size,
            patch,
            image_size,
            channels,
            position_unit=model.positions,
            is_padded=is_padded,
        )
        self.patches_per_unit = config.patches_per_unit(axes)
        self.unit_grid = grid_of(image_size, config.unit_edges(axes))
        grid, width, values = self.encoder.grid, self.encoder.width, math.prod(patch) * channels
        shape = (width, model.decoder.width, model.decoder.depth)
        places = positions(grid, patch, model.decoder.width, model.positions)
        self.decoder: Decoder | CrossDecoder
        if model.decoder.attention == "cross":
            self.decoder = CrossDecoder(places, values, width, self.encoder.depth, *shape[1:])
        else:
            self.decoder = Decoder(places, values, *shape)

        strategy = config.masking.strategy
        self.loss = partial(losses.LOSSES[self.settings.loss.name], **self.settings.loss.options())
        self.part: Part | None = None
        self.stand_in: nn.Parameter | None = None
        make_part = MASKING[strategy.name].part
        if make_part is not None:
            self.part = make_part(
                lambda outputs: Decoder(places, outputs, *shape), **strategy.options()
            )
        if self.part is not None:
            self.add_module(self.part.name, self.part.module)
        reads_tokens = self.part is not None and self.part.reads_tokens
        if isinstance(self.decoder, CrossDecoder) and not reads_tokens:
            self.encoder.norm.requires_grad_(False)  # nobody reads what it norms
        if config.masking.secondary > 0:
            self.stand_in = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        images: Tensor,
        visible_BV: Tensor,
        hidden_BX: Tensor,
        is_replaced_BV: Tensor | None = None,
    ) -> Tensor:
        """The loss, its mean over the images.

        Squared error on hidden patches, summed up by `pretrain.loss`, and `visible_weight` times
        its mean over visible ones; then the loss of the part that a strategy trains beside it.
        """
        patches_BPQ = patchify(images, self.encoder.patch)
        stand_in = None
        if is_replaced_BV is not None:
            assert self.stand_in is not None
            stand_in = (is_replaced_BV, self.stand_in)
        weight = self.settings.visible_weight
        tokens, predicted = self._predict(
            patches_BPQ, visible_BV, hidden_BX, stand_in, with_visible=weight > 0
        )
        hidden = self._truth(pick(patches_BPQ, hidden_BX))
        weight_BX = hidden.weight_BN
        error_BX = _error(predicted[:, -hidden_BX.shape[1] :], hidden)
        loss_B: Tensor = self.loss(error_BX, hidden.values_BNQ, weight_BX)
        if weight > 0:
            num_visible = visible_BV.shape[1]
            visible = self._truth(pick(patches_BPQ, visible_BV))
            weight_BV = visible.weight_BN
            error_BV = _error(predicted[:, :num_visible], visible)
            visible_B = losses.mean(error_BV, visible.values_BNQ, weight_BV)
            if self.settings.visible_mean == "all_patches":
                share = _share_hidden(error_BX, weight_BX, error_BV, weight_BV)
                loss_B = share * loss_B + (1 - share) * weight * visible_B
            else:
                loss_B = loss_B + weight * visible_B
        if self.part is not None:
            seen = Seen(
                images,
                tokens,
                visible_BV,
                hidden_BX,
                self._keys(patches_BPQ, visible_BV, hidden_BX),
                error_BX,
                weight_BX,
                self.unit_grid,
                self.patches_per_unit,
                self.is_padded,
            )
            loss_B = loss_B + self.part.weight * self.part.loss(self.part.module, seen)
        return loss_B.mean()

    def reconstruct(self, images: Tensor, visible_BV: Tensor, hidden_BX: Tensor) -> Tensor:
        """Predicted images (B, C, *S), float32, every patch predicted.

        A decoder with cross-attention predicts hidden patches only: visible ones are the truth.
        With normalised targets each patch is given its true mean and deviation: an oracle's.
        """
        patches_BPQ = patchify(images, self.encoder.patch)
        _, predicted = self._predict(patches_BPQ, visible_BV, hidden_BX, None, with_visible=True)
        predicted = predicted.float()
        if predicted.shape[1] == hidden_BX.shape[1]:
            truth = self._truth(pick(patches_BPQ, visible_BV))
            predicted = torch.cat([truth.values_BNQ, predicted], dim=1)
        order_BP = torch.cat([visible_BV, hidden_BX], dim=1)
        predicted_BPQ = pick(predicted, order_BP.argsort(dim=1))
        if self.settings.target == "normalised":
            mean, deviation = _moments(self._pixels(patches_BPQ))
            predicted_BPQ = predicted_BPQ * deviation + mean
        return unpatchify(
            predicted_BPQ, self.encoder.grid, self.encoder.patch, self.encoder.channels
        )

    def patch_errors(
        self, images: Tensor, visible_BV: Tensor, hidden_BX: Tensor, *, normalised: bool
    ) -> Tensor:
        """Mean squared error of each hidden patch (B, X), float32.

        `normalised`: in units of the patch's own deviation; else the output as it is, compared with
        the pixels, whatever the model is trained on.
        """
        patches_BPQ = patchify(images, self.encoder.patch)
        _, predicted = self._predict(patches_BPQ, visible_BV, hidden_BX, None, with_visible=False)
        truth = self._pixels(pick(patches_BPQ, hidden_BX))
        if not normalised:
            return _error(predicted, truth)
        mean, deviation = _moments(truth)
        if self.settings.target == "pixels":
            predicted = (predicted.float() - mean) / deviation
        return _error(predicted, _normalised(truth))

    def class_attention(self, images: Tensor) -> Tensor:
        """How much the encoder's class token attends to each patch of the whole image: (B, P)."""
        return self.encoder.class_attention(patchify(images, self.encoder.patch))

    def whole(self, images: Tensor) -> Whole:
        """What the encoder makes of whole images."""
        patches_BPQ = patchify(images, self.encoder.patch)
        batch, count = patches_BPQ.shape[:2]
        all_BP = torch.arange(count, device=images.device).expand(batch, -1)
        return Whole(self.encoder(patches_BPQ), all_BP, self._keys(patches_BPQ, all_BP))

    def _predict(
        self,
        patches_BPQ: Tensor,
        visible_BV: Tensor,
        hidden_BX: Tensor,
        stand_in: tuple[Tensor, Tensor] | None,
        *,
        with_visible: bool,
    ) -> tuple[Tensor, Tensor]:
        """(normed tokens, predictions): of visible patches, if asked for, then of hidden ones."""
        layers = self.encoder.layers(patches_BPQ, visible_BV, stand_in)
        tokens: Tensor = self.encoder.norm(layers[-1])
        if isinstance(self.decoder, CrossDecoder):
            return tokens, self.decoder(layers, hidden_BX, self._keys(patches_BPQ, visible_BV))
        is_key = self._keys(patches_BPQ, visible_BV, hidden_BX)
        return tokens, self.decoder(
            tokens, visible_BV, hidden_BX, is_key, with_visible=with_visible
        )

    def _keys(self, patches_BPQ: Tensor, *numbers_BN: Tensor) -> Tensor | None:
        """Which of the class token and those patches are attended to; None: all."""
        if not self.is_padded:
            return None
        is_padding_BP = patches_BPQ.isnan().all(dim=-1)
        return padding.keys(is_padding_BP.gather(1, torch.cat(numbers_BN, dim=1)))

    def _pixels(self, patches_BNQ: Tensor) -> Truth:
        """Patches in float32, whatever the forward pass runs in."""
        if not self.is_padded:
            return Truth(patches_BNQ.float(), None)
        return Truth(padding.filled(patches_BNQ.float()), ~patches_BNQ.isnan())

    def _truth(self, patches_BNQ: Tensor) -> Truth:
        """What is to be predicted of patches."""
        truth = self._pixels(patches_BNQ)
        return _normalised(truth) if self.settings.target == "normalised" else truth


def build_mae(
    config: TrialConfig,
    image_size: Sequence[int],
    channels: int,
    seed: int,
    *,
    is_padded: bool = False,
) -> MAE:
    """A model whose weights follow from `seed` alone: the same for every rank and device."""
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation, which is replaced
        model = MAE(config, image_size, channels, is_padded=is_padded)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Set all weights of linear layers, norms and tokens.

    Linear and mixtures of layers: Xavier uniform, bias 0 · norms: 1 and 0 · tokens: normal,
    deviation 0.02.
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
        elif isinstance(module, Decoder | CrossDecoder):
            nn.init.normal_(module.mask_token, std=0.02, generator=generator)
            if isinstance(module, CrossDecoder):
                nn.init.xavier_uniform_(module.layer_mix, generator=generator)
    if isinstance(model, MAE) and model.stand_in is not None:
        nn.init.normal_(model.stand_in, std=0.02, generator=generator)


def pick(patches_BPQ: Tensor, numbers_BN: Tensor) -> Tensor:
    """The patches of those numbers, (B, N, Q)."""
    return patches_BPQ.gather(1, numbers_BN[..., None].expand(-1, -1, patches_BPQ.shape[-1]))


def _error(predicted: Tensor, truth: Truth) -> Tensor:
    """Mean squared error of each patch in float32: (B, N, Q) twice -> (B, N)."""
    squared_BNQ = (predicted.float() - truth.values_BNQ).square()
    return _mean_of_real(squared_BNQ, truth.is_real_BNQ)[..., 0]


def _normalised(truth: Truth) -> Truth:
    """Each patch with its own mean and deviation taken out."""
    mean, deviation = _moments(truth)
    values_BNQ = (truth.values_BNQ - mean) / deviation
    if truth.is_real_BNQ is not None:
        values_BNQ = values_BNQ.masked_fill(~truth.is_real_BNQ, 0.0)
    return Truth(values_BNQ, truth.is_real_BNQ)


def _moments(truth: Truth) -> tuple[Tensor, Tensor]:
    """Mean and floored deviation of each patch over its values, which may be a single one."""
    values_BNQ, is_real_BNQ = truth
    mean = _mean_of_real(values_BNQ, is_real_BNQ)
    if is_real_BNQ is None:
        variance = values_BNQ.var(dim=-1, correction=0, keepdim=True)
    else:
        variance = _mean_of_real((values_BNQ - mean).square(), is_real_BNQ)
    return mean, (variance + DEVIATION_FLOOR**2).sqrt()


def _mean_of_real(values_BNQ: Tensor, is_real_BNQ: Tensor | None) -> Tensor:
    """Of each patch (B, N, 1); 0 where nothing is real."""
    if is_real_BNQ is None:
        return values_BNQ.mean(dim=-1, keepdim=True)
    total_BN1 = values_BNQ.masked_fill(~is_real_BNQ, 0.0).sum(dim=-1, keepdim=True)
    return total_BN1 / is_real_BNQ.sum(dim=-1, keepdim=True).clamp(min=1)


def _share_hidden(
    error_BX: Tensor, weight_BX: Tensor | None, error_BV: Tensor, weight_BV: Tensor | None
) -> Tensor | float:
    """How much of an image is hidden: a number for all, or one for each where there is padding."""
    if weight_BX is None or weight_BV is None:
        return error_BX.shape[1] / (error_BX.shape[1] + error_BV.shape[1])
    hidden_B, visible_B = weight_BX.sum(dim=1), weight_BV.sum(dim=1)
    return hidden_B / (hidden_B + visible_B).clamp(min=torch.finfo(torch.float32).tiny)
