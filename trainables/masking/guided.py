"""Strategies that ask a teacher where it is hard, or where it looks.

The teacher (`request.model`) is the exponential moving average of the model, with the strategy's
`momentum`. A share `guided` of what is hidden follows the teacher, the rest is drawn by chance, so
the count is exact. Nobody asks for gradients here: the caller says so. Counts are those of an image
that is not padded; of a padded one as large a part of what it hides is guided (`of_real`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from trainables import losses
from trainables.masking.plain import random
from trainables.masking.request import (
    MaskRequest,
    errors_under,
    hide_first,
    hide_highest,
    hide_smallest,
    mean_of_real,
)
from trainables.masking.strategy import Guide, Part, PartCost, Seen, Sizes, Strategy
from trainables.schedules import Schedule, parse, value_at

if TYPE_CHECKING:
    from torch import Tensor, nn

Share = Annotated[float, Field(ge=0, le=1)]

EASY_TO_HARD = parse({"name": "linear", "start": 0.0, "end": 0.5})
ALL_GUIDED = parse({"name": "constant", "value": 1.0})
ANATOMASK_MOMENTUM = parse({"name": "ramp", "start": 0.999, "end": 0.9999, "until": 0.25})
HPM_MOMENTUM = parse({"name": "ramp", "start": 0.999, "end": 0.9999, "until": 0.5})
ATTMASK_MOMENTUM = parse({"name": "constant", "value": 0.996})


def anatomask(
    request: MaskRequest,
    *,
    guided: Schedule = EASY_TO_HARD,
    score_target: Literal["raw", "normalised"] = "raw",
    complementary: bool = False,
    momentum: Schedule = ANATOMASK_MOMENTUM,
) -> Tensor:
    """Hide what the teacher reconstructs worst (AnatoMask, Li et al. 2024).

    The teacher fills in a random mask of its own; the hidden units with the highest error come
    first, a share `guided` of them, easy to hard by default (`start: 0.5, end: 0` turns it round).
    Rules as in the authors' code (ricklisz/AnatoMask): what the teacher sees scores 0, the count of
    guided units is rounded down. They hold the share for an epoch e at (e + 1) / (E - 1); here it
    moves with every step.

    `score_target: raw` compares the teacher's output with the pixels, as released, even where it
    was trained on normalised targets; `normalised` compares in units of each patch's deviation.
    `complementary` (ours): two masks, each one half of the units, so that every unit has a score.
    """
    num_guided = _num_guided(request, guided)
    if num_guided == 0:
        return random(request)
    noise_BU, normalised = request.noise("teacher"), score_target == "normalised"
    if complementary:
        half = request.num_units // 2
        is_first_BU = hide_first(replace(request, hidden=half), noise_BU)
        scores_BU = errors_under(request, is_first_BU, half, normalised=normalised)
        others = request.num_units - half
        scores_BU += errors_under(request, ~is_first_BU, others, normalised=normalised)
    else:
        is_hidden_BU = hide_first(request, noise_BU)
        scores_BU = errors_under(request, is_hidden_BU, request.hidden, normalised=normalised)
    return hide_hardest(request, scores_BU, num_guided)


def hpm(
    request: MaskRequest,
    *,
    guided: Schedule = EASY_TO_HARD,
    difficulty_loss: Literal["ranking", "absolute"] = "ranking",
    difficulty_weight: Annotated[float, Field(gt=0)] = 1.0,
    momentum: Schedule = HPM_MOMENTUM,
) -> Tensor:
    """Hide what a learned predictor calls hard (Hard Patches Mining, Wang et al. 2023).

    The teacher sees the whole image and its second decoder predicts each patch's loss; the model
    learns that with `difficulty_loss`: the pairwise order of losses, or their standardised values.
    """
    num_guided = _num_guided(request, guided)
    if num_guided == 0:
        return random(request)
    assert request.model is not None and request.images is not None
    difficulty_BP = predicted_difficulty(request.model, request.images)
    return hide_hardest(request, mean_of_real(request, difficulty_BP), num_guided)


def predicted_difficulty(model: Guide, images: Tensor) -> Tensor:
    """The loss that HPM's predictor expects of each patch, seeing the whole image: (B, P)."""
    assert model.part is not None
    whole = model.whole(images)
    nothing_BX = whole.numbers_BP[:, :0]
    difficulty: Tensor = model.part.module(
        whole.tokens, whole.numbers_BP, nothing_BX, whole.is_key, with_visible=True
    )
    return difficulty[..., 0].float()


def hpm_part(
    make_decoder: Callable[[int], nn.Module],
    *,
    difficulty_loss: str,
    difficulty_weight: float,
    **_: Any,
) -> Part:
    """A second decoder, which predicts one number of each hidden patch: its loss."""
    compare = losses.DIFFICULTY[difficulty_loss]

    def loss(predictor: nn.Module, seen: Seen) -> Tensor:
        difficulty = predictor(
            seen.tokens, seen.visible_BV, seen.hidden_BX, seen.is_key, with_visible=False
        )
        loss_B: Tensor = compare(difficulty[..., 0].float(), seen.errors_BX, seen.weight_BX)
        return loss_B

    return Part("predictor", make_decoder(1), loss, difficulty_weight, reads_tokens=True)


def hpm_part_cost(
    sizes: Sizes, visible: int, predicted: int, *, difficulty_loss: str, **_: Any
) -> PartCost:
    """That decoder's forward pass."""
    forward = sizes.decoder(visible, visible + predicted, predicted)
    return PartCost(forward, compares_pairs=difficulty_loss == "ranking")


def hpm_guide_flops(sizes: Sizes, hidden_patches: int, **_: Any) -> int:
    """The teacher's encoder and its second decoder on the whole image."""
    patches = sizes.patches
    return sizes.encoder(patches) + sizes.decoder(patches, patches, patches)


def anatomask_guide_flops(
    sizes: Sizes, hidden_patches: int, *, complementary: bool, **_: Any
) -> int:
    """The teacher fills in one random mask, or two complementary ones."""
    if not complementary:
        return sizes.reconstruction(hidden_patches)
    halves = ((sizes.units + 1) // 2, sizes.units // 2)
    return sum(sizes.reconstruction(half * sizes.patches_per_unit) for half in halves)


def attmask_guide_flops(sizes: Sizes, hidden_patches: int, **_: Any) -> int:
    """The teacher's encoder on the whole image, but for most of its last block."""
    return sizes.encoder_attention()


def attmask(
    request: MaskRequest,
    *,
    kind: Literal["high", "hint", "low"] = "high",
    shown: Share = 0.1,
    shown_from: Share = 0.1,
    guided: Schedule = ALL_GUIDED,
    momentum: Schedule = ATTMASK_MOMENTUM,
) -> Tensor:
    """Hide where the teacher's class token looks (AttMask, Kakogeorgiou et al. 2022).

    `high` hides the most attended units, `low` the least. `hint` is `high`, but a number of units,
    `shown` of the hidden count, drawn from the `shown_from` most attended of all, stay visible, and
    as many of the next attended are hidden for them, so that the count is exact. With `guided`
    below 1 the rest is drawn by chance (ours; AttMask leaves half of the images unmasked instead).
    Interpretation: the published class token is trained by self-distillation, here it learns only
    what the decoder asks of it.
    """
    num_guided = _num_guided(request, guided)
    if num_guided == 0:
        return random(request)
    assert request.model is not None and request.images is not None
    attention_BP = request.model.class_attention(request.images)
    attention_BU = mean_of_real(request, attention_BP)
    if kind == "low":
        return _fill_up(request, hide_highest(request, -attention_BU, num_guided))
    if kind == "high":
        return _fill_up(request, hide_highest(request, attention_BU, num_guided))
    num_shown = min(int(shown * request.hidden), request.num_units - num_guided)
    drawn_from = min(max(num_shown, int(shown_from * request.num_units)), num_guided + num_shown)
    is_hint_source_BU = hide_highest(request, attention_BU, drawn_from)
    draw_BU = request.noise("hint").masked_fill(~is_hint_source_BU, 2.0)
    is_shown_BU = hide_smallest(draw_BU, request.of_real(num_shown))
    is_guided_BU = hide_highest(request, attention_BU, num_guided + num_shown)
    return _fill_up(request, is_guided_BU, is_shown_BU)


def hide_hardest(request: MaskRequest, scores_BU: Tensor, num_guided: int) -> Tensor:
    """The `num_guided` highest scores; the others by chance."""
    return _fill_up(request, hide_highest(request, scores_BU, num_guided))


def _num_guided(request: MaskRequest, guided: Schedule) -> int:
    """The guided share of the hidden count, rounded down; where it is 0, nobody need be asked."""
    return int(value_at(guided, request.progress) * request.hidden)


def _fill_up(request: MaskRequest, is_first_BU: Tensor, is_last_BU: Tensor | None = None) -> Tensor:
    """Hide `is_first_BU`, then others by chance; `is_last_BU` only when nothing else is left."""
    order_BU = request.noise().masked_fill(is_first_BU, -1.0)
    if is_last_BU is not None:
        order_BU = order_BU.masked_fill(is_last_BU, 2.0)
    return hide_first(request, order_BU)


STRATEGIES = {
    "attmask": Strategy(attmask, guide_flops=attmask_guide_flops, is_alike_at_every_step=True),
    "hpm": Strategy(hpm, guide_flops=hpm_guide_flops, part=hpm_part, part_cost=hpm_part_cost),
    "anatomask": Strategy(anatomask, guide_flops=anatomask_guide_flops),
}
