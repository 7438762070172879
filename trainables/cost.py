"""What a trial will cost, before it is started: floating-point operations and memory.

Formulas where the model is ours (equal to `torch.utils.flop_counter`'s count, a multiplication and
an addition being two), that counter on the meta device where most of the model is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainables.config import SIZES, TrialConfig
from trainables.masking import plan_hidden
from trainables.schedules import SCHEDULES

# Bytes that backward needs per token and channel of one block: half precision, float32
_BLOCK_BYTES = {"bf16": 34, "auto": 34, "fp32": 68}
# Input, target, prediction and their difference
_PIXEL_BYTES = 16


def mae_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, hidden_patches: int
) -> dict[str, int]:
    """Operations per image: `forward`, and `step` = forward and backward."""
    width, depth = _encoder_shape(config)
    decoder = config.model.decoder
    patches = _count(image_size, config.model.patch)
    values = config.model.patch ** len(image_size) * channels
    visible = patches - hidden_patches
    predicted = patches if config.pretrain.visible_weight > 0 else hidden_patches

    embed = 2 * visible * values * width
    encoder = depth * _block_flops(1 + visible, width)
    into_decoder = 2 * (1 + visible) * width * decoder.width
    decoder_blocks = decoder.depth * _block_flops(1 + patches, decoder.width)
    head = 2 * predicted * decoder.width * values
    forward = embed + encoder + into_decoder + decoder_blocks + head
    # Backward costs twice the forward pass, but nobody asks for the gradient of the pixels
    return {"forward": forward, "step": 3 * forward - embed}


def planned_flops(
    config: TrialConfig, image_size: Sequence[int], channels: int, num_images: int
) -> float:
    """Operations of the whole planned pretraining on `num_images`, its schedule included."""
    batch = config.pretrain.batch
    steps = max(1, round(config.pretrain.epochs * num_images / batch))
    patches_per_unit = _patches_per_unit(config, image_size)
    plan = _plan(config, image_size, steps)
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
    patches = _count(image_size, config.model.patch)
    patches_per_unit = _patches_per_unit(config, image_size)
    visible = patches - min(_plan(config, image_size, steps=1000)) * patches_per_unit
    per_token = _BLOCK_BYTES[config.pretrain.precision]
    encoder = depth * (1 + visible) * width * per_token
    decoding = decoder.depth * (1 + patches) * decoder.width * per_token
    pixels = math.prod(image_size) * channels * _PIXEL_BYTES
    return config.pretrain.batch * (encoder + decoding + pixels)


def _block_flops(tokens: int, width: int) -> int:
    """Query, key, value, projection and the two layers of the MLP; scores and their use."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def _encoder_shape(config: TrialConfig) -> tuple[int, int]:
    size = SIZES[config.model.size]
    return size["width"], size["depth"]


def _count(image_size: Sequence[int], edge: int) -> int:
    return math.prod(pixels // edge for pixels in image_size)


def _patches_per_unit(config: TrialConfig, image_size: Sequence[int]) -> int:
    return math.prod(config.unit // config.model.patch for _ in image_size)


def _plan(config: TrialConfig, image_size: Sequence[int], steps: int) -> list[int]:
    ratio = config.masking.ratio
    schedule = partial(SCHEDULES[ratio.name], **ratio.options())
    return plan_hidden(schedule, _count(image_size, config.unit), steps)


@lru_cache(maxsize=256)
def _count_segment_flops(
    config_json: str, image_size: tuple[int, ...], channels: int, num_classes: int
) -> float:
    from trainables.unetr import build_unetr  # MONAI takes seconds to import

    config = TrialConfig.model_validate_json(config_json)
    with torch.device("meta"):
        model = build_unetr(config, image_size, channels, num_classes)
        image = torch.empty(1, channels, *image_size)
    # Fused attention on the CPU is not in the counter's table
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return float(counter.get_total_flops())
