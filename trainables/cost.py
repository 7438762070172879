"""What a trial will cost, before it is started: floating-point operations and memory.

Formulas, equal to `torch.utils.flop_counter`'s count (a multiplication and an addition being two),
which ask for no torch: the driver plans by them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from trainables.config import (
    SIZES,
    DecoderConfig,
    PretrainConfig,
    SegmentConfig,
    TrialConfig,
    num_held,
)
from trainables.edges import grid_of
from trainables.levels import levels_of
from trainables.masking import MASKING, plan_hidden
from trainables.masking.strategy import PartCost
from trainables.schedules import value_at

TYPICAL_STEPS = 1000  # whose mean operations say about how many steps operations buy
MOST_LOOKS = 8  # for the number of steps whose operations are nearest to those asked for
# Bytes that backward needs per token and channel of one block: half precision, float32
_BLOCK_BYTES = {"bf16": 34, "fast": 34, "auto": 34, "fp32": 68}
# The same of a block that keeps its input alone, which is float32 in any precision
_INPUT_BYTES = 4
# Input, target, prediction and their difference
_PIXEL_BYTES = 16
# Of two hidden patches whose order is learned: difference, order, chance, logarithm, and the mask
_PAIR_BYTES = 17


@dataclass(frozen=True)
class TrialSizes:
    """A trial's sizes, and what its networks cost for one image, in operations."""

    width: int  # of the encoder
    depth: int
    decoding: DecoderConfig
    patches: int
    units: int
    patches_per_unit: int
    values: int  # of one patch

    def encoder(self, visible: int) -> int:
        """The encoder's forward pass."""
        embed = 2 * visible * self.values * self.width
        return embed + self.depth * block_flops(1 + visible, self.width)

    def encoder_attention(self) -> int:
        """All blocks but the last, of which the class token's scores are enough."""
        tokens = 1 + self.patches
        last = 6 * tokens * self.width**2 + 2 * tokens * self.width
        return self.encoder(self.patches) - block_flops(tokens, self.width) + last

    def decoder(self, visible: int, patches: int, outputs: int) -> int:
        """A forward pass with self-attention, predicting so many numbers in all."""
        width = self.decoding.width
        into = 2 * (1 + visible) * self.width * width
        return into + self.decoding.depth * block_flops(1 + patches, width) + 2 * outputs * width

    def cross_decoder(self, visible: int, predicted: int) -> int:
        """A forward pass with cross-attention."""
        width, depth, keys = self.decoding.width, self.decoding.depth, 1 + visible
        blocks = depth * cross_block_flops(predicted, keys, self.width, width)
        mix = layer_mix_flops(keys, self.width, self.depth, depth)
        return blocks + mix + 2 * predicted * width * self.values

    def predicted(self, hidden_patches: int) -> int:
        """Those of the hidden patches that training predicts."""
        if self.decoding.attention == "self":
            return hidden_patches
        return max(1, round(self.decoding.predicted * hidden_patches))

    def reconstruction(self, hidden_patches: int) -> int:
        """Encoder and decoder, every hidden patch predicted."""
        visible = self.patches - hidden_patches
        if self.decoding.attention == "cross":
            return self.encoder(visible) + self.cross_decoder(visible, hidden_patches)
        outputs = hidden_patches * self.values
        return self.encoder(visible) + self.decoder(visible, self.patches, outputs)


def sizes_of(config: TrialConfig, image_size: Sequence[int], channels: int) -> TrialSizes:
    """The trial's sizes on such images."""
    axes, size = len(image_size), SIZES[config.model.size]
    return TrialSizes(
        width=size["width"],
        depth=size["depth"],
        decoding=config.model.decoder,
        patches=math.prod(grid_of(image_size, config.patch_edges(axes))),
        units=math.prod(grid_of(image_size, config.unit_edges(axes))),
        patches_per_unit=math.prod(config.patches_per_unit(axes)),
        values=math.prod(config.patch_edges(axes)) * channels,
    )


def mae_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, hidden_patches: int
) -> dict[str, int]:
    """Operations per image: `forward` (of the loss), `guide` (where to hide), and `step`.

    A step is the guide, forward and backward. Clustering and filters count little and are left out;
    a guide counts at every step, also where its share is still too small to guide anything.
    """
    sizes = sizes_of(config, image_size, channels)
    visible, predicted = sizes.patches - hidden_patches, sizes.predicted(hidden_patches)
    leaf = 2 * visible * sizes.values * sizes.width  # the embedding
    forward = sizes.encoder(visible)
    if config.model.decoder.attention == "cross":
        forward += sizes.cross_decoder(visible, predicted)
    else:
        outputs = sizes.patches if config.pretrain.visible_weight > 0 else hidden_patches
        forward += sizes.decoder(visible, sizes.patches, outputs * sizes.values)
    part = _part_cost(config, sizes, visible, predicted)
    if part is not None:
        forward += part.forward
        leaf += part.leaf
    guide_flops, guide = MASKING[config.masking.strategy.name].guide_flops, 0
    if guide_flops is not None:
        guide = guide_flops(sizes, hidden_patches, **config.masking.strategy.options())
    # Backward costs twice the forward pass, but nobody asks for the gradient of what comes in
    return {"forward": forward, "guide": guide, "step": guide + 3 * forward - leaf}


def planned_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, num_images: int, seed: int = 0
) -> float:
    """Operations of the whole planned pretraining on `num_images`, its schedule included."""
    steps = pretrain_steps(config, image_size, channels, num_images)
    return pretrain_flops(config, image_size, channels, steps, seed)


def pretrain_steps(
    config: TrialConfig, image_size: Sequence[int], channels: int, num_images: int
) -> int:
    """Steps of pretraining on `num_images`: the same for every seed and machine."""
    if config.pretrain.flops is None:
        return _steps_of(config.pretrain, num_images)
    relevant = config.model_dump_json(exclude={"segment"})
    return _pretrain_steps_of_flops(relevant, tuple(image_size), channels)


def segment_steps(
    config: TrialConfig,
    image_size: Sequence[int],
    channels: int,
    num_classes: int,
    num_images: int,
) -> int:
    """Steps of segmentation, where `num_images` are labelled in the whole split."""
    settings = config.segment
    if settings.flops is None:
        return _steps_of(settings, num_images)

    def flops_of(steps: int) -> float:
        return segment_flops(config, image_size, channels, num_classes, steps)[-1]

    return _nearest_steps(settings.flops, flops_of)


def pretrain_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, steps: int, seed: int = 0
) -> float:
    """Operations of a pretraining of so many steps, whatever the config says of its length."""
    batch = config.pretrain.batch
    sizes = sizes_of(config, image_size, channels)
    plan = _plan(config, sizes.units, steps, seed)
    per_image = {
        hidden: mae_flops(config, image_size, channels, hidden * sizes.patches_per_unit)["step"]
        for hidden in set(plan)
    }
    return float(sum(batch * per_image[hidden] for hidden in plan))


def segment_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, num_classes: int, steps: int
) -> list[float]:
    """Operations done after 0, 1, ... `steps` steps of segmentation, forward and backward."""
    size, settings = tuple(image_size), config.segment
    held = num_held(settings, steps)
    frozen = settings.model_copy(update={"encoder": "frozen"})
    flops = np.zeros(steps + 1)
    for of_steps, stage in ((slice(1, held + 1), frozen), (slice(held + 1, None), settings)):
        if len(flops[of_steps]):
            trial = config.model_copy(update={"segment": stage})
            flops[of_steps] = unetr_flops(trial, size, channels, num_classes)
    done: list[float] = (flops.cumsum() * settings.batch).tolist()
    return done


def unetr_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, num_classes: int
) -> int:
    """Operations for one image: forward, and backward to whatever learns.

    Backward costs twice the forward pass, but nobody asks for the gradient of an image, nor for any
    of a frozen encoder.
    """
    sizes, patch = sizes_of(config, image_size, channels), config.patch_edges(len(image_size))
    levels = levels_of(image_size, patch, config.segment.features)
    pixels, widths, kernel = [*map(math.prod, levels.sizes)], levels.widths, 3 ** len(image_size)
    embedding = 2 * sizes.patches * sizes.values * sizes.width
    encoding = sizes.encoder(sizes.patches)
    if config.segment.encoder != "frozen":
        encoding = 3 * encoding - embedding
    skipping = sum(
        2 * sizes.patches * sizes.width * math.prod(levels.edges(patch, level)) * widths[level]
        for level in range(1, len(widths))
    )
    image = 2 * pixels[0] * kernel * channels * widths[0] if config.segment.image_skip else 0
    decoding = 2 * pixels[0] * widths[0] * num_classes
    for level, width in enumerate(widths[:-1]):
        decoding += 2 * pixels[level + 1] * widths[level + 1] * width
        decoding += 2 * (2 * pixels[level] * kernel * width**2)
    return encoding + 3 * (skipping + decoding) + 2 * image


def activation_bytes(
    config: TrialConfig, image_size: Sequence[int], channels: int, *, recomputes: bool = False
) -> int:
    """Estimate of what pretraining's backward pass keeps for a whole batch over all workers.

    At the schedule's smallest ratio, when most is visible. Weights and their gradients come on top.
    Where blocks keep their inputs alone (`recomputes`), all of what it keeps of the largest only.
    """
    sizes = sizes_of(config, image_size, channels)
    decoder = config.model.decoder
    hidden = min(_plan(config, sizes.units, steps=1000, seed=0)) * sizes.patches_per_unit
    visible, predicted = sizes.patches - hidden, sizes.predicted(hidden)
    per_token = _BLOCK_BYTES[config.pretrain.precision]
    encoding = (1 + visible) * sizes.width  # numbers in and out of a block
    decoding = (1 + sizes.patches) * decoder.width
    if decoder.attention == "cross":
        decoding = predicted * decoder.width
    per_block = _INPUT_BYTES if recomputes else per_token
    blocks = (sizes.depth * encoding + decoder.depth * decoding) * per_block
    if recomputes:
        blocks += max(encoding, decoding) * per_token
    if decoder.attention == "cross":
        kept = 2 if per_token == _BLOCK_BYTES["bf16"] else 4  # bytes of a number
        mixtures = 1 + sizes.depth + 2 * decoder.depth
        blocks += kept * encoding * mixtures
    pixels = math.prod(image_size) * channels * _PIXEL_BYTES
    pairs = 0
    part = _part_cost(config, sizes, visible, predicted)
    if part is not None and part.compares_pairs:
        pairs = hidden**2 // 2 * _PAIR_BYTES
    return config.pretrain.batch * (blocks + pixels + pairs)


def cross_block_flops(queries: int, keys: int, encoder_width: int, width: int) -> int:
    """Question, projection and the two layers of the MLP; key and value; scores and their use.

    `keys` are all tokens of the encoder, the class token among them.
    """
    return 20 * queries * width**2 + 4 * keys * encoder_width * width + 4 * queries * keys * width


def layer_mix_flops(keys: int, encoder_width: int, encoder_depth: int, depth: int) -> int:
    """The mixtures of all `depth` blocks of a decoder with cross-attention: one matrix product."""
    return 2 * depth * (1 + encoder_depth) * keys * encoder_width


def block_flops(tokens: int, width: int) -> int:
    """Query, key, value, projection and the two layers of the MLP; scores and their use."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def _steps_of(settings: PretrainConfig | SegmentConfig, num_images: int) -> int:
    if settings.images is not None:
        images: float = settings.images
    else:
        assert settings.epochs is not None, "LengthConfig has one unit"
        images = settings.epochs * num_images
    return max(1, round(images / settings.batch))


@lru_cache(maxsize=1024)
def _pretrain_steps_of_flops(config_json: str, image_size: tuple[int, ...], channels: int) -> int:
    config = TrialConfig.model_validate_json(config_json)
    assert config.pretrain.flops is not None
    return _nearest_steps(
        config.pretrain.flops, partial(pretrain_flops, config, image_size, channels)
    )


def _nearest_steps(flops: float, flops_of: Callable[[int], float]) -> int:
    """How many steps take that many operations, to half a step of the mean one; at least one.

    A schedule is drawn out over the steps, so their mean hardly depends on how many they are.
    """
    steps = max(1, round(flops * TYPICAL_STEPS / flops_of(TYPICAL_STEPS)))
    off: dict[int, float] = {}  # steps -> how far their operations are from those asked for
    while len(off) < MOST_LOOKS and steps not in off:
        found = flops_of(steps)
        off[steps] = abs(found - flops)
        steps = max(1, round(steps * flops / found))
    return min(off, key=lambda number: (off[number], number))


def _part_cost(
    config: TrialConfig, sizes: TrialSizes, visible: int, predicted: int
) -> PartCost | None:
    strategy = config.masking.strategy
    part_cost = MASKING[strategy.name].part_cost
    if part_cost is None:
        return None
    return part_cost(sizes, visible, predicted, **strategy.options())


def _plan(config: TrialConfig, units: int, steps: int, seed: int) -> list[int]:
    return plan_hidden(partial(value_at, config.masking.ratio), units, steps, seed)
