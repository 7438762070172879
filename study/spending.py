"""What a budget in operations or hours has been spent on, and where it is expected to end.

All from the ledger: operations from rows and formulas, hours from what drivers have kept of theirs
(`Stint`). What a trial still to come takes in hours is what those that ended took: a line through
their seconds over their operations. An arm is expected to take all its steps, though it may be
stopped: what a stopped one has spared is there to be spent once it is.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from study.costs import Costs
from study.ledger import Stint, Suggestion
from study.measured import Measured
from study.spec import UNITS
from trainables.config import TrialConfig
from trainables.metrics import PHASES

if TYPE_CHECKING:
    from study.spec import Budget

HOUR = 3600.0
SPARE = 0.1  # wall time kept for fresh seeds on top of what they should take, as it is a limit


class Means(NamedTuple):
    """What a budget is counted by, beside trials and their rows."""

    stints: Sequence[Stint] = ()
    costs: Costs = Costs(None)
    workers: int = 1  # of a trial to come
    shares: bool = False  # trials that pretrain alike do so once


class Planned(NamedTuple):
    """A trial that has not begun."""

    arm: str
    config: TrialConfig | Mapping[str, Any]
    seed: int


class Amounts(NamedTuple):
    """In a budget's units."""

    device_hours: float
    wall_hours: float
    flops: float


class Account:
    """What trials have taken, and what they and others will have taken."""

    def __init__(
        self,
        suggestions: Sequence[Suggestion],
        ended: AbstractSet[str],
        measured: Measured,
        means: Means,
        *,
        num_running: int = 0,
    ) -> None:
        self._costs, self._workers, self._shares = means.costs, means.workers, means.shares
        held: Counter[str] = Counter()
        self._device = self._wall = 0.0
        for stint in means.stints:
            held.update(stint.held)
            self._wall += stint.seconds
            self._device += stint.workers * sum(stint.held.values())
        self._slots = num_running + 1
        if self._wall > 0:
            self._slots = max(self._slots, round(held.total() / self._wall))

        done: dict[str, float] = {}  # pretraining -> operations so far
        self._pretrained: dict[str, float] = {}  # and once all that has begun has ended
        self._segmented = segmented = 0.0
        points: list[tuple[float, float]] = []  # (operations, seconds) of a trial that has ended
        left: list[tuple[float, float]] = []  # (operations, seconds so far) of one that has not
        for each in suggestions:
            key = self._key(each.arm, each.config, each.seed, each.trial)
            is_first = key not in done
            pretrain, segment = (_done(measured, each.trial, phase) for phase in PHASES)
            done[key] = max(done.get(key, 0.0), pretrain)
            segmented += segment
            is_over = each.trial in ended
            if not is_over:
                work = self._costs.work(each.arm, each.config)
                pretrain = max(pretrain, work.pretrain_flops)
                segment = max(segment, work.segment_flops)
            self._pretrained[key] = max(self._pretrained.get(key, 0.0), pretrain)
            self._segmented += segment
            own = segment + is_first * pretrain
            if not is_over:
                left.append((own, held[each.trial]))
            elif held[each.trial] > 0:
                points.append((own, held[each.trial]))
        self.spent = Amounts(self._device / HOUR, self._wall / HOUR, sum(done.values()) + segmented)
        self._level, self._slope = line_through(points)
        self._left = [max(0.0, self._seconds(flops) - so_far) for flops, so_far in left]

    def expected(self, planned: Sequence[Planned] = (), then: Sequence[Planned] = ()) -> Amounts:
        """Once all that has begun has ended, and `planned`, and after these `then`."""
        known: set[str] = set(self._pretrained)
        flops = sum(self._pretrained.values()) + self._segmented
        seconds: list[list[float]] = []
        for part in (planned, then):
            seconds.append([])
            for number, each in enumerate(part):
                work = self._costs.work(each.arm, each.config)
                key = self._key(each.arm, each.config, each.seed, f"{len(seconds)} {number}")
                own = work.segment_flops + (work.pretrain_flops if key not in known else 0.0)
                known.add(key)
                flops += own
                seconds[-1].append(self._seconds(own))
        device = self._device + self._workers * sum(map(sum, [self._left, *seconds]))
        wall = self._wall
        wall += _longest([*self._left, *seconds[0]], self._slots)
        wall += (1 + SPARE) * _longest(seconds[1], self._slots)
        return Amounts(device / HOUR, wall / HOUR, flops)

    def _seconds(self, flops: float) -> float:
        """That a trial of so many operations has its workers; 0 while nothing is known."""
        return self._level + self._slope * flops

    def _key(self, arm: str, config: TrialConfig | Mapping[str, Any], seed: int, alone: str) -> str:
        """Of the pretraining that a trial has; `alone`: what it is called if no other has it."""
        return f"{self._costs.pretraining(arm, config)} {seed}" if self._shares else alone


def fits(budget: Budget, without: Amounts, added: Amounts) -> bool:
    """Whether something may begin: the end expected with it, and without.

    It does where the end comes nearer to the budget; hours of wall time are never to be exceeded,
    as a cluster's time limit kills.
    """
    for unit, limit in budget.given.items():
        if unit == "trials":
            continue
        before, after = getattr(without, unit), getattr(added, unit)
        if after > limit and (unit == "wall_hours" or after - limit >= limit - before):
            return False
    return True


def is_spent(budget: Budget, expected: Amounts) -> bool:
    """Whether nothing at all may begin any more."""
    return any(
        getattr(expected, unit) >= limit for unit, limit in budget.given.items() if unit != "trials"
    )


def in_words(budget: Budget, spent: Amounts, num_trials: int) -> str:
    """Which part of the budget is spent: of each of its units."""
    parts = []
    for unit, limit in budget.given.items():
        so_far = num_trials if unit == "trials" else getattr(spent, unit)
        amount = f"{limit:.3g}" if unit == "flops" else f"{limit:.10g}"
        parts.append(f"{so_far / limit:.0%} of {amount} {UNITS[unit]}")
    return ", ".join(parts)


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(level, slope), neither below 0, of least squares; through 0 where all x are alike."""
    if not points:
        return 0.0, 0.0
    x, y = np.array(points).T
    if np.ptp(x) > 0:
        slope, level = np.polyfit(x / x.max(), y, 1)
        if slope >= 0 and level >= 0:
            return float(level), float(slope / x.max())
        if slope < 0:
            return fmean(y), 0.0
    if not x.any():
        return fmean(y), 0.0
    return 0.0, float((x * y).sum() / (x * x).sum())


def _longest(seconds: Sequence[float], slots: int) -> float:
    """How long so many slots take, each of which takes the next one when it is free."""
    free = [0.0] * slots
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def _done(measured: Measured, trial: str, phase: str) -> float:
    """Operations up to the newest rung of a phase."""
    curve = measured.get(trial, {}).get(f"{phase}/flops", {})
    return curve[max(curve)] if curve else 0.0
