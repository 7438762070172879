"""Strategies that ask a teacher where it is hard, or where it looks.

The teacher (`request.model`) is the exponential moving average of the model, with the strategy's
`momentum`. A share `guided` of what is hidden follows the teacher, the rest is drawn by chance, so
the count is exact. Nobody asks for gradients here: the caller says so. Counts are those of an image
that is not padded; of a padded one as large a part of what it hides is guided (`of_real`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainables.masking.plain import random
from trainables.masking.request import (
    MaskRequest,
    errors_under,
    hide_first,
    hide_highest,
    hide_smallest,
    mean_of_real,
)
from trainables.schedules import Schedule, parse, value_at

if TYPE_CHECKING:
    from torch import Tensor

Part = Annotated[float, Field(ge=0, le=1)]

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
    difficulty_BP = request.model.predicted_difficulty(request.images)
    return hide_hardest(request, mean_of_real(request, difficulty_BP), num_guided)


def attmask(
    request: MaskRequest,
    *,
    kind: Literal["high", "hint", "low"] = "high",
    shown: Part = 0.1,
    shown_from: Part = 0.1,
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
