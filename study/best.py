"""Which arm is best: the one answer for the log, the report, the console, `export`, Prometheus and
for what is confirmed.

An arm is judged by the first objective at the end of its complete trials, the mean over its seeds.
Arms that were confirmed with fresh seeds stand first, and on those seeds alone: the trials that
made them stand out were picked for being high. Arms that lack a seed come after those that have
all. The best arm is a searched one; a control that is ahead of it is said beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured, final_value
from trainables.metrics import sign

if TYPE_CHECKING:
    from study.spec import Objective, StudySpec

Group = Literal["search", "control", "random-init", "frozen"]
CONFIRM = "confirm"  # the origin of trials with fresh seeds

IN_WORDS: dict[Group, str] = {
    "search": "searched",
    "control": "the control",
    "random-init": "random weights",
    "frozen": "the frozen encoder",
}


class Final(NamedTuple):
    """A trial and what it measured at its end; None: it is not complete, or has no finite value."""

    arm: str
    origin: str
    seed: int
    value: float | None


@dataclass(frozen=True)
class Standing:
    """An arm that has a value."""

    arm: str
    group: Group
    values: dict[int, float]  # seed -> value, those that speak for the arm
    is_confirmed: bool  # with fresh seeds
    is_whole: bool  # it has all of them: the study's, or those that confirm

    @property
    def mean(self) -> float:
        return fmean(self.values.values())


@dataclass(frozen=True)
class NoEncoder:
    """None of the arm's trials has one."""

    arms: tuple[str, ...]  # that have one: the best first, then those that are not ranked


def group_of(origin: str) -> Group:
    """What an arm is in the study, by the origin of its first trial."""
    groups: dict[str, Group] = {
        "control": "control",
        "control:random-init": "random-init",
        "control:frozen": "frozen",
    }
    return groups.get(origin, "search")


def finals(
    suggestions: Iterable[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
    metric: str,
) -> list[Final]:
    """What the trials measured at the end of the metric's phase, in their order."""

    def value_of(trial: str) -> float | None:
        result = results.get(trial)
        if result is None or result.outcome is not Outcome.COMPLETE:
            return None
        value = final_value(measured, trial, metric)
        return value if value is not None and math.isfinite(value) else None

    return [Final(each.arm, each.origin, each.seed, value_of(each.trial)) for each in suggestions]


def standings(
    trials: Iterable[Final], goal: str, *, seeds: int, confirm_seeds: int
) -> list[Standing]:
    """Every arm that has a value, best first; of equals the older one."""
    origins: dict[str, str] = {}
    searched: dict[str, dict[int, float]] = {}
    fresh: dict[str, dict[int, float]] = {}
    for arm, origin, seed, value in trials:
        origins.setdefault(arm, origin)
        if value is not None:
            (fresh if origin == CONFIRM else searched).setdefault(arm, {})[seed] = value
    found = []
    for arm, origin in origins.items():
        group, own = group_of(origin), fresh.get(arm, {})
        # the controls were not picked, so all their seeds count
        values = own if own and group == "search" else searched.get(arm, {}) | own
        if values:
            is_whole = len(own) >= confirm_seeds if own else len(values) >= seeds
            found.append(Standing(arm, group, values, bool(own), is_whole))
    return sorted(
        found, key=lambda one: (not one.is_confirmed, not one.is_whole, -sign(goal) * one.mean)
    )


def of_study(
    spec: StudySpec,
    suggestions: Iterable[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
    objective: Objective | None = None,
) -> list[Standing]:
    """The standings by an objective, by default the first."""
    objective = objective or spec.objectives[0]
    trials = finals(suggestions, results, measured, objective.metric)
    confirm_seeds = spec.confirm.seeds if spec.confirm else 0
    return standings(trials, objective.goal, seeds=spec.seeds, confirm_seeds=confirm_seeds)


def of_file(trials: Iterable[Final], goal: str, settings: Mapping[str, Any]) -> list[Standing]:
    """The standings in a study whose file, as it was read, may be anybody's."""
    confirm = settings.get("confirm")
    asked = [settings.get("seeds"), confirm.get("seeds") if isinstance(confirm, dict) else None]
    seeds, confirm_seeds = (each if type(each) is int else 1 for each in asked)
    return standings(trials, goal, seeds=seeds, confirm_seeds=confirm_seeds)


def best(found: Iterable[Standing]) -> Standing | None:
    """The best searched arm."""
    return next((one for one in found if one.group == "search"), None)


def ahead(found: Sequence[Standing], goal: str) -> list[Standing]:
    """The controls whose mean is better than that of the best searched arm."""
    leader = best(found)
    controls = [one for one in found if one.group != "search"]
    if leader is None:
        return []
    return [one for one in controls if sign(goal) * (one.mean - leader.mean) > 0]


def in_short(found: Sequence[Standing], objective: Objective, label: Callable[[str], str]) -> str:
    """The best arm and who is ahead of it, in a few words for a log; "" while no arm has a value.

    `label` names an arm.
    """
    leader, metric = best(found), objective.metric
    if leader is None:
        controls = [f"{IN_WORDS[one.group]} {one.mean:.4g}" for one in found]
        return f"{metric}: {', '.join(controls)}" if controls else ""
    text = f"best {metric} {leader.mean:.4g} ({label(leader.arm)})"
    others = [f"{IN_WORDS[one.group]} {one.mean:.4g}" for one in ahead(found, objective.goal)]
    return f"{text}, behind {' and '.join(others)}" if others else text


def to_confirm(
    spec: StudySpec,
    suggestions: Iterable[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
) -> list[str]:
    """Searched arms that measured the first objective in every seed, the best mean first."""
    picking = [each for each in suggestions if each.origin != CONFIRM]
    found = of_study(spec, picking, results, measured)
    return [one.arm for one in found if one.group == "search" and one.is_whole]


def best_encoder(
    able: Sequence[Suggestion],
    found: Sequence[Standing],
    objective: Objective,
    measured: Measured,
    arm: str | None = None,
) -> Suggestion | NoEncoder:
    """The best trial of an arm, by default of the best searched one.

    `able`: the trials that have an encoder. `found`: the standings by the objective.
    """
    of_arms = {suggestion.arm for suggestion in able}
    candidates = [one.arm for one in found if one.group == "search" and one.arm in of_arms]
    chosen = arm or next(iter(candidates), None)
    trials = [suggestion for suggestion in able if suggestion.arm == chosen]
    if not trials:
        return NoEncoder((*candidates, *sorted(of_arms.difference(candidates))))

    def score(suggestion: Suggestion) -> float:
        value = final_value(measured, suggestion.trial, objective.metric)
        if value is None or not math.isfinite(value):
            return -math.inf
        return sign(objective.goal) * value

    return max(trials, key=score)
