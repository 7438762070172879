"""Which arm is best: the one answer for the log, the report, the console, `export`, Prometheus and
for what is confirmed.

An arm is judged by the first objective at the end of its complete trials, the mean over its seeds.
Arms that were confirmed with fresh seeds stand first, and on those seeds alone: the trials that
made them stand out were picked for being high. First of all stands the one that was picked among
the confirmed, on the seeds of its verdict alone, for the same reason. Arms that lack a seed come
after those that have all. The best arm is a searched one; a control that is ahead of it is said
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured, final_value
from trainables.metrics import sign

if TYPE_CHECKING:
    from study.spec import Objective, StudySpec

Group = Literal["search", "control", "random-init", "frozen"]
CONFIRM, VERDICT = "confirm", "verdict"  # the origins of trials with fresh seeds
FRESH = (CONFIRM, VERDICT)

IN_WORDS: dict[Group, str] = {
    "search": "searched",
    "control": "the control",
    "random-init": "random weights",
    "frozen": "the frozen encoder",
}


class Stage(IntEnum):
    """How far an arm has come; the values of the last stage it reached speak for it."""

    SEARCH = 0
    CONFIRM = 1
    VERDICT = 2


STAGES = {CONFIRM: Stage.CONFIRM, VERDICT: Stage.VERDICT}  # of trials of other origins: SEARCH


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
    stage: Stage
    is_whole: bool  # it has all seeds of its stage

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def is_confirmed(self) -> bool:
        """With fresh seeds."""
        return self.stage > Stage.SEARCH


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
    trials: Iterable[Final], goal: str, *, seeds: int, confirm_seeds: int, verdict_seeds: int = 0
) -> list[Standing]:
    """Every arm that has a value, best first; of equals the older one.

    The seeds are those that an arm gets in each stage.
    """
    planned = {
        Stage.SEARCH: seeds,
        Stage.CONFIRM: confirm_seeds,
        Stage.VERDICT: verdict_seeds,
    }
    origins: dict[str, str] = {}
    values: dict[str, dict[Stage, dict[int, float]]] = {}
    for arm, origin, seed, value in trials:
        origins.setdefault(arm, origin)
        if value is not None:
            of_stage = values.setdefault(arm, {})
            of_stage.setdefault(STAGES.get(origin, Stage.SEARCH), {})[seed] = value
    found = []
    for arm, of_stage in values.items():
        group, stage = group_of(origins[arm]), max(of_stage)
        own = of_stage[stage]
        is_whole = len(own) >= planned[stage]
        # the controls were not picked, so all their seeds count, until they have their verdict's:
        # then both sides of a difference are those of the same seeds
        if group != "search" and not (is_whole and stage is Stage.VERDICT):
            own = {seed: value for part in of_stage.values() for seed, value in part.items()}
        found.append(Standing(arm, group, own, stage, is_whole))
    places = {arm: place for place, arm in enumerate(origins)}
    return sorted(
        found,
        key=lambda one: (-one.stage, not one.is_whole, -sign(goal) * one.mean, places[one.arm]),
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
    confirm = spec.confirm
    return standings(
        trials,
        objective.goal,
        seeds=spec.seeds,
        confirm_seeds=confirm.seeds if confirm else 0,
        verdict_seeds=(confirm and confirm.verdict) or 0,
    )


def of_file(trials: Iterable[Final], goal: str, settings: Mapping[str, Any]) -> list[Standing]:
    """The standings in a study whose file, as it was read, may be anybody's."""
    confirm = settings.get("confirm")
    confirm = confirm if isinstance(confirm, dict) else {}
    asked = [settings.get("seeds"), confirm.get("seeds"), confirm.get("verdict")]
    seeds, confirm_seeds, verdict_seeds = (each if type(each) is int else 1 for each in asked)
    return standings(
        trials, goal, seeds=seeds, confirm_seeds=confirm_seeds, verdict_seeds=verdict_seeds
    )


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
    picking = [each for each in suggestions if each.origin not in FRESH]
    found = of_study(spec, picking, results, measured)
    return [one.arm for one in found if one.group == "search" and one.is_whole]


def to_judge(
    spec: StudySpec,
    suggestions: Iterable[Suggestion],
    results: Mapping[str, Result],
    measured: Measured,
) -> str | None:
    """The arm that gets a verdict, of those that were confirmed; None: there is none."""
    suggestions, objective = list(suggestions), spec.objectives[0]
    assert spec.confirm is not None
    candidates = to_confirm(spec, suggestions, results, measured)[: spec.confirm.arms]
    trials = finals(suggestions, results, measured, objective.metric)
    return winner(trials, candidates, objective.goal)


def winner(trials: Iterable[Final], candidates: Sequence[str], goal: str) -> str | None:
    """The best of the arms that were confirmed, by all their values but those of a verdict.

    Those that made it stand out count here, for among arms that were picked alike the mean of all
    ranks best; whatever is said of it rests on the seeds of its verdict. Of arms of which seeds
    have failed, those that have most are left. None: nobody has any.
    """
    values: dict[str, list[float]] = {arm: [] for arm in candidates}
    num_fresh = dict.fromkeys(candidates, 0)
    for arm, origin, _, value in trials:
        if arm in values and origin != VERDICT and value is not None:
            values[arm].append(value)
            num_fresh[arm] += origin == CONFIRM
    most = max(num_fresh.values(), default=0)
    able = [arm for arm in candidates if num_fresh[arm] == most > 0]
    return max(able, key=lambda arm: sign(goal) * fmean(values[arm]), default=None)


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
