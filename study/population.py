"""Schedules found while training: population based training, as a function of the ledger alone.

Jaderberg et al. 2017 (arXiv 1711.09846), with truncation selection. A population of trials trains
side by side. At every rung of pretraining but the last its members wait for each other: the worst
share of them is stopped, and each makes room for a child of one of the best, which goes on from its
parent's checkpoint with other values. What a child inherits is its parent's schedule until then, so
its configuration is a whole one: a `step` schedule with a turn wherever its line changed its value.
All have one seed. Whoever trains the last configuration from its start, with that seed, gets the
same encoder.

That members wait for each other makes what is decided at a rung a function of what was measured
there, whoever came first and however many train at once. It costs the time in which workers wait
for the last one.

A suggestion says in `born` that it belongs to the population: its parent (None: it is a founder)
and at which progress of pretraining it took over.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum, auto
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from optuna.distributions import FloatDistribution

from study import space
from study.ledger import Suggestion
from study.measured import Measured, rung_of, value_at_rung
from study.samplers import POPULATIONS, sobol_point, value_at
from trainables.config import TrialConfig, arm_id, completed
from trainables.metrics import PHASES, metric_of, sign

if TYPE_CHECKING:
    from study.spec import StudySpec

VALUE = ".value"  # how a searched path ends: it is that of a constant schedule
MOST_RUNGS = 8  # as a schedule has at most so many different counts of hidden units
DIGITS = 4  # of a value
FEWEST_VALUES = 200  # of a range, as no arm is trained twice
TRIES = 50  # of changing a value before it is drawn anew


class Order(Enum):
    """What a trial is told at a rung."""

    GO_ON = auto()
    REST = auto()  # until all others have come there
    STOP = auto()  # a child takes its place


class Birth(NamedTuple):
    """A trial that is to join the population."""

    config: TrialConfig
    params: dict[str, Any]
    born: dict[str, Any]


class Generation(NamedTuple):
    """Who meets at a rung, and what comes of it."""

    rung: int
    members: list[Suggestion]
    is_decided: bool  # all have been there, or have failed before
    parents: list[Suggestion]  # the best, best first
    losers: list[Suggestion]  # the worst, worst last
    children: list[Suggestion]  # that have begun

    @property
    def is_over(self) -> bool:
        """Whether whoever is left may go on."""
        return self.is_decided and len(self.children) == self.num_births

    @property
    def num_births(self) -> int:
        return len(self.losers) if self.parents else 0


def has_population(spec: StudySpec) -> bool:
    return spec.sampler.name in POPULATIONS


def is_child(suggestion: Suggestion) -> bool:
    """Whether it takes another trial's place, so that the budget counts the two once."""
    return suggestion.born is not None and suggestion.born["parent"] is not None


def num_replaced(spec: StudySpec) -> int:
    """Of a population, at each rung but the last, if nobody fails."""
    options = spec.sampler.options()
    return max(1, int(options["share"] * options["population"]))


def num_children(spec: StudySpec) -> int:
    """Of the whole study, if nobody fails."""
    return num_replaced(spec) * (len(spec.rungs) - 1) if has_population(spec) else 0


def generations(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    ended: AbstractSet[str],
    measured: Measured,
) -> list[Generation]:
    """All until the first that is not over. `ended`: trials that will not be run again."""
    if not has_population(spec):
        return []
    options = spec.sampler.options()
    turned = sign(metric_of(options["metric"]).goal)
    born = [suggestion for suggestion in suggestions if suggestion.born is not None]
    members = [suggestion for suggestion in born if not is_child(suggestion)]
    if len(members) < options["population"]:
        return [Generation(0, members, False, [], [], [])]
    found: list[Generation] = []
    for rung in range(len(spec.rungs) - 1):
        curves = [measured.get(member.trial, {}).get(options["metric"], {}) for member in members]
        values = [_value_from(curve, rung, spec.rungs) for curve in curves]
        if any(
            value is None and member.trial not in ended
            for member, value in zip(members, values, strict=True)
        ):
            return [*found, Generation(rung, members, False, [], [], [])]
        scores = [-math.inf if value is None else turned * value for value in values]
        order = sorted(range(len(members)), key=lambda place: -scores[place])
        num_lost = max(num_replaced(spec), scores.count(-math.inf))
        losers = [members[place] for place in order[len(order) - num_lost :]]
        parents = [
            members[place]
            for place in order[: min(num_replaced(spec), len(order) - num_lost)]
            if scores[place] > -math.inf
        ]
        children = [each for each in born if is_child(each) and _birth(each, spec) == rung]
        found.append(Generation(rung, members, True, parents, losers, children))
        if not found[-1].is_over:
            return found
        members = [member for member in members if member not in losers] + children
    return found


def order_of(
    spec: StudySpec, found: Sequence[Generation], suggestion: Suggestion, phase: str, rung: int
) -> Order:
    """What a trial is told that has come to a rung, or stands there."""
    is_end = phase != PHASES[0] or rung == len(spec.rungs) - 1
    if suggestion.born is None or is_end or not found:
        return Order.GO_ON
    for generation in found:
        if generation.rung <= rung and suggestion in generation.losers:
            return Order.STOP
    # a child may be a rung further before the last of its generation is born
    is_open = not found[-1].is_over and found[-1].rung <= rung
    return Order.REST if is_open else Order.GO_ON


def resting(
    spec: StudySpec,
    found: Sequence[Generation],
    suggestions: Sequence[Suggestion],
    measured: Measured,
) -> set[str]:
    """Trials that are not to be run on now, whether for a while or for ever."""
    waiting: set[str] = set()
    if not found:
        return waiting
    metric = spec.sampler.options()["metric"]
    for suggestion in suggestions:
        curve = measured.get(suggestion.trial, {}).get(metric, {})
        if suggestion.born is None or not curve:
            continue
        rung = max(rung_of(progress, spec.rungs) for progress in curve)
        if order_of(spec, found, suggestion, PHASES[0], rung) is not Order.GO_ON:
            waiting.add(suggestion.trial)
    return waiting


def losers(found: Sequence[Generation]) -> list[Suggestion]:
    """All that are to be stopped, or were."""
    return [loser for generation in found for loser in generation.losers]


def births(
    spec: StudySpec,
    found: Sequence[Generation],
    suggestions: Sequence[Suggestion],
    running: AbstractSet[str],
) -> Iterator[Birth]:
    """Who is to join now. Children come when all of their parents' generation are at rest."""
    if not found:
        return
    last, known = found[-1], {suggestion.arm for suggestion in suggestions}
    is_moving = any(member.trial in running for member in last.members)
    if len(last.members) < spec.sampler.options()["population"] and last.rung == 0:
        yield _founder(spec, len(last.members), known)
    elif last.is_decided and not last.is_over and not is_moving:
        yield _child(spec, last, known)


def is_before_birth(suggestion: Suggestion, phase: str, progress: float) -> bool:
    """Whether what a trial reports there was its parent's, of whom it is known already."""
    born = suggestion.born
    return born is not None and phase == PHASES[0] and progress <= born["progress"]


def schedule_problem(trial: TrialConfig, path: str, item: space.SearchItem) -> str | None:
    """Why a population cannot find that setting while it trains; None if it can."""
    if item.low is None or item.is_integer or item.step is not None:
        return "expected a range of fractions, `{low: 0.2, high: 0.9}`"
    shares = [place / (10 * FEWEST_VALUES) for place in range(10 * FEWEST_VALUES)]
    num_values = len({_drawn(item, share) for share in shares})
    if num_values < FEWEST_VALUES:
        return f"its range has {num_values} values of {DIGITS} digits; expected a wider one"
    owner: Any = None
    if path.endswith(VALUE):
        owner = space.get_at(trial.model_dump(mode="json"), _owner(path))
    if not isinstance(owner, dict) or owner.get("name") != "constant":
        return f"expected the `value` of a constant schedule, such as masking.ratio{VALUE}"
    return None


def _value_from(curve: Mapping[float, float], rung: int, rungs: Sequence[float]) -> float | None:
    """What was measured at a rung, or next after it where several rungs fall on one step."""
    at_rungs = (value_at_rung(curve, each, rungs) for each in range(rung, len(rungs)))
    return next((value for value in at_rungs if value is not None), None)


def _birth(child: Suggestion, spec: StudySpec) -> int:
    """At which rung it took over."""
    assert child.born is not None
    return rung_of(child.born["progress"], spec.rungs)


def _owner(path: str) -> list[str]:
    """Where the schedule stands whose value is searched."""
    return path.removesuffix(VALUE).split(".")


def _founder(spec: StudySpec, number: int, known: AbstractSet[str]) -> Birth:
    """Spread out evenly over the ranges, as a sampler's first arms are."""
    for place in count(number):
        shares = sobol_point(len(spec.search), place, spec.seed)
        params = {
            path: _drawn(item, share)
            for (path, item), share in zip(spec.search.items(), shares, strict=True)
        }
        config = space.resolve(spec, params)
        if arm_id(config) not in known:
            return Birth(config, params, {"parent": None, "progress": 0.0})
    raise AssertionError("counting does not end")


def _child(spec: StudySpec, generation: Generation, known: AbstractSet[str]) -> Birth:
    """The next one of a generation: of a parent by chance, with other values from here on.

    A value is drawn anew, or made smaller or larger by a factor (Jaderberg et al., appendix A).
    """
    options, number = spec.sampler.options(), len(generation.children)
    chance = random.Random(f"{spec.seed}/{generation.rung}/{number}")
    parent = chance.choice(generation.parents)
    before, progress = parent.params, spec.rungs[generation.rung]
    for attempt in count():
        params = {}
        for path, item in spec.search.items():
            if chance.random() < options["resample"] or attempt >= TRIES:
                params[path] = _drawn(item, chance.random())
            else:
                factor = 1 + chance.choice([-1, 1]) * options["change"]
                params[path] = _within(item, before[path] * factor)
        config = _turned(parent, params, progress)
        if params != before and arm_id(config) not in known:
            return Birth(config, params, {"parent": parent.trial, "progress": progress})
    raise AssertionError("counting does not end")


def _drawn(item: space.SearchItem, share: float) -> float:
    value = value_at(FloatDistribution(item.low, item.high, log=item.log), share)
    return _within(item, value)


def _within(item: space.SearchItem, value: float) -> float:
    return float(min(max(float(f"{value:.{DIGITS}g}"), item.low), item.high))


def _turned(parent: Suggestion, params: Mapping[str, float], progress: float) -> TrialConfig:
    """The parent's configuration with these values from that progress on."""
    config = TrialConfig.model_validate(completed(parent.config))
    overrides = {}
    for path, value in params.items():
        if value == parent.params[path]:
            continue
        before = space.get_at(parent.config, _owner(path))
        is_flat = before["name"] == "constant"
        values, turns = ([before["value"]], []) if is_flat else (before["values"], before["at"])
        overrides[".".join(_owner(path))] = {
            "name": "step",
            "values": [*values, value],
            "at": [*turns, progress],
        }
    return space.override(config, overrides)
