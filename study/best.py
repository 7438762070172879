"""Which trial's encoder is the one to hand over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from study.ledger import Suggestion
from study.resume import best_arms
from study.stopping import Measured, final_value

if TYPE_CHECKING:
    from study.spec import StudySpec


@dataclass(frozen=True)
class NoEncoder:
    """None of the arm's trials has one."""

    arms: tuple[str, ...]  # that have one: the best first, then those that are not ranked


def best_encoder(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    measured: Measured,
    with_encoder: AbstractSet[str],
    arm: str | None = None,
) -> Suggestion | NoEncoder:
    """The best trial of an arm, by default of the best searched one; of those with an encoder.

    While no arm has measured the first objective in every seed, arms rank by their ids.
    """
    able = [suggestion for suggestion in suggestions if suggestion.trial in with_encoder]
    of_arms = {suggestion.arm for suggestion in able}
    ranked = best_arms(spec, suggestions, measured) or sorted(of_arms)
    candidates = [each for each in ranked if each in of_arms]
    chosen = arm or next(iter(candidates), None)
    trials = [suggestion for suggestion in able if suggestion.arm == chosen]
    if not trials:
        return NoEncoder((*candidates, *sorted(of_arms.difference(candidates))))
    objective = spec.objectives[0]
    sign = 1 if objective.goal == "maximize" else -1

    def score(suggestion: Suggestion) -> float:
        value = final_value(measured, suggestion.trial, objective.metric)
        return -math.inf if value is None or math.isnan(value) else sign * value

    return max(trials, key=score)
