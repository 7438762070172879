"""What a trial will cost, before it is started: floating-point operations and memory.

Formulas where the model is ours (equal to `torch.utils.flop_counter`'s count, a multiplication and
an addition being two), that counter on the meta device where most of the model is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainables.config import SIZES, TrialConfig
from trainables.cross_decoder import cross_block_flops, layer_mix_flops
from trainables.edges import grid_of
from trainables.masking import MASKING, plan_hidden
from trainables.masking.lesions import CATEGORY_WIDTH, NUM_DESCRIPTORS
from trainables.schedules import value_at
from trainables.unetr import build_unetr

# Bytes that backward needs per token and channel of one block: half precision, float32
_BLOCK_BYTES = {"bf16": 34, "auto": 34, "fp32": 68}
# Input, target, prediction and their difference
_PIXEL_BYTES = 16
# Of two hidden patches whose order is learned: difference, order, chance, logarithm, and the mask
_PAIR_BYTES = 17


def mae_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, hidden_patches: int
) -> dict[str, int]:
    """Operations per image: `forward` (of the loss), `guide` (where to hide), and `step`.

    A step is the guide, forward and backward. Clustering and filters count little and are left out;
    a guide counts at every step, also where its share is still too small to guide anything.
    """
    width, _ = _encoder_shape(config)
    decoder = config.model.decoder
    patches = _patches(config, image_size)
    values = math.prod(config.patch_edges(len(image_size))) * channels
    visible = patches - hidden_patches

    embed = 2 * visible * values * width
    forward = _encoder_flops(config, visible, values)
    asked = hidden_patches  # of the hidden ones, those to be predicted
    if decoder.attention == "cross":
        asked = max(1, round(decoder.predicted * hidden_patches))
        forward += _cross_decoder_flops(config, visible, asked, values)
    else:
        predicted = patches if config.pretrain.visible_weight > 0 else hidden_patches
        forward += _decoder_flops(config, visible, patches, predicted * values)
    strategy = config.masking.strategy.options()
    no_pixel_gradient = embed
    if "difficulty_weight" in strategy:
        forward += _decoder_flops(config, visible, visible + asked, asked)
    if strategy.get("category_weight", 0) > 0:
        units = _units(config, image_size)
        first = 2 * units * NUM_DESCRIPTORS * CATEGORY_WIDTH
        forward += first + 2 * units * CATEGORY_WIDTH
        no_pixel_gradient += first
    guide = GUIDES[config.masking.strategy.name](config, image_size, values, hidden_patches)
    # Backward costs twice the forward pass, but nobody asks for the gradient of the pixels
    return {"forward": forward, "guide": guide, "step": guide + 3 * forward - no_pixel_gradient}


def planned_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, num_images: int, seed: int = 0
) -> float:
    """Operations of the whole planned pretraining on `num_images`, its schedule included."""
    batch = config.pretrain.batch
    steps = max(1, round(config.pretrain.epochs * num_images / batch))
    patches_per_unit = _patches_per_unit(config, image_size)
    plan = _plan(config, image_size, steps, seed)
    per_image = {
        hidden: mae_flops(config, image_size, channels, hidden * patches_per_unit)["step"]
        for hidden in set(plan)
    }
    return float(sum(batch * per_image[hidden] for hidden in plan))


def segment_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, num_classes: int
) -> float:
    """Operations of one image's forward and backward pass when segmenting."""
    relevant = config.model_dump_json(include={"model", "segment"})
    return _count_segment_flops(relevant, tuple(image_size), channels, num_classes)


def activation_bytes(config: TrialConfig, image_size: Sequence[int], channels: int) -> int:
    """Estimate of what pretraining's backward pass keeps for a whole batch over all workers.

    At the schedule's smallest ratio, when most is visible. Weights and their gradients come on top.
    """
    width, depth = _encoder_shape(config)
    decoder = config.model.decoder
    patches = _patches(config, image_size)
    patches_per_unit = _patches_per_unit(config, image_size)
    visible = patches - min(_plan(config, image_size, steps=1000, seed=0)) * patches_per_unit
    per_token = _BLOCK_BYTES[config.pretrain.precision]
    encoder = depth * (1 + visible) * width * per_token
    decoding = decoder.depth * (1 + patches) * decoder.width * per_token
    if decoder.attention == "cross":
        asked = max(1, round(decoder.predicted * (patches - visible)))
        decoding = decoder.depth * asked * decoder.width * per_token
        kept = 2 if per_token == _BLOCK_BYTES["bf16"] else 4  # bytes of a number
        decoding += kept * (1 + visible) * width * (1 + depth + 2 * decoder.depth)  # the mixtures
    pixels = math.prod(image_size) * channels * _PIXEL_BYTES
    pairs = 0
    options = config.masking.strategy.options()
    learns_order = options.get("category_weight") and options["category_reading"] == "order"
    if learns_order or options.get("difficulty_loss") == "ranking":
        pairs = (patches - visible) ** 2 // 2 * _PAIR_BYTES
    return config.pretrain.batch * (encoder + decoding + pixels + pairs)


def _encoder_flops(config: TrialConfig, visible: int, values: int) -> int:
    width, depth = _encoder_shape(config)
    return 2 * visible * values * width + depth * _block_flops(1 + visible, width)


def _decoder_flops(config: TrialConfig, visible: int, patches: int, outputs: int) -> int:
    width, _ = _encoder_shape(config)
    decoder = config.model.decoder
    into = 2 * (1 + visible) * width * decoder.width
    blocks = decoder.depth * _block_flops(1 + patches, decoder.width)
    return into + blocks + 2 * outputs * decoder.width


def _cross_decoder_flops(config: TrialConfig, visible: int, predicted: int, values: int) -> int:
    width, depth = _encoder_shape(config)
    decoder, keys = config.model.decoder, 1 + visible
    blocks = decoder.depth * cross_block_flops(predicted, keys, width, decoder.width)
    mix = layer_mix_flops(keys, width, depth, decoder.depth)
    return blocks + mix + 2 * predicted * decoder.width * values


def _teacher_flops(
    config: TrialConfig, image_size: Sequence[int], values: int, hidden_patches: int
) -> int:
    """One forward pass that predicts every hidden patch."""
    patches = _patches(config, image_size)
    visible = patches - hidden_patches
    encoder = _encoder_flops(config, visible, values)
    if config.model.decoder.attention == "cross":
        return encoder + _cross_decoder_flops(config, visible, hidden_patches, values)
    return encoder + _decoder_flops(config, visible, patches, hidden_patches * values)


def _no_guide(*_: object) -> int:
    return 0


def _anatomask_guide(
    config: TrialConfig, image_size: Sequence[int], values: int, hidden_patches: int
) -> int:
    if not config.masking.strategy.options()["complementary"]:
        return _teacher_flops(config, image_size, values, hidden_patches)
    units, per_unit = _units(config, image_size), _patches_per_unit(config, image_size)
    halves = ((units + 1) // 2 * per_unit, units // 2 * per_unit)
    return sum(_teacher_flops(config, image_size, values, half) for half in halves)


def _hpm_guide(
    config: TrialConfig, image_size: Sequence[int], values: int, hidden_patches: int
) -> int:
    patches = _patches(config, image_size)
    encoder = _encoder_flops(config, patches, values)
    return encoder + _decoder_flops(config, patches, patches, patches)


def _attmask_guide(
    config: TrialConfig, image_size: Sequence[int], values: int, hidden_patches: int
) -> int:
    """All blocks but the last, of which the class token's scores are enough."""
    width, _ = _encoder_shape(config)
    patches = _patches(config, image_size)
    whole = _encoder_flops(config, patches, values)
    last = 6 * (1 + patches) * width**2 + 2 * (1 + patches) * width
    return whole - _block_flops(1 + patches, width) + last


def _amlp_guide(
    config: TrialConfig, image_size: Sequence[int], values: int, hidden_patches: int
) -> int:
    strategy, flops = config.masking.strategy.options(), 0
    if strategy["features"] == "encoder":
        flops += _encoder_flops(config, _patches(config, image_size), values)
    if strategy["lesion"] == "highest_loss":
        flops += _teacher_flops(config, image_size, values, hidden_patches)
    if strategy["category_weight"] > 0:
        units = _units(config, image_size)
        flops += 2 * units * CATEGORY_WIDTH * (NUM_DESCRIPTORS + 1)
    return flops


def _block_flops(tokens: int, width: int) -> int:
    """Query, key, value, projection and the two layers of the MLP; scores and their use."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def _encoder_shape(config: TrialConfig) -> tuple[int, int]:
    size = SIZES[config.model.size]
    return size["width"], size["depth"]


def _patches(config: TrialConfig, image_size: Sequence[int]) -> int:
    return math.prod(grid_of(image_size, config.patch_edges(len(image_size))))


def _units(config: TrialConfig, image_size: Sequence[int]) -> int:
    return math.prod(grid_of(image_size, config.unit_edges(len(image_size))))


def _patches_per_unit(config: TrialConfig, image_size: Sequence[int]) -> int:
    return math.prod(config.patches_per_unit(len(image_size)))


def _plan(config: TrialConfig, image_size: Sequence[int], steps: int, seed: int) -> list[int]:
    schedule = partial(value_at, config.masking.ratio)
    return plan_hidden(schedule, _units(config, image_size), steps, seed)


@lru_cache(maxsize=256)
def _count_segment_flops(
    config_json: str, image_size: tuple[int, ...], channels: int, num_classes: int
) -> float:
    config = TrialConfig.model_validate_json(config_json)
    with torch.device("meta"):
        model = build_unetr(config, image_size, channels, num_classes)
        image = torch.empty(1, channels, *image_size)
    # Fused attention on the CPU is not in the counter's table
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return float(counter.get_total_flops())


# What finding out where to hide costs per image, for strategies that ask a model
GUIDES: dict[str, Callable[..., int]] = dict.fromkeys(MASKING, _no_guide) | {
    "anatomask": _anatomask_guide,
    "hpm": _hpm_guide,
    "attmask": _attmask_guide,
    "amlp": _amlp_guide,
}
