"""Studies played on landscapes whose every arm is known: what a way to search finds for what.

A landscape tells, of any arm and seed, what a trial of it would measure at each rung and what each
stretch between rungs costs. Workers are simulated: each takes a trial as far as its next rung, in
as much time as that costs. Nothing is trained, so a study takes seconds.

Who searches is a `Searcher`: the study's own sampler and stopping rule, asked as the conductor asks
them, or another library's (rivals.py). What is told of a study is the true value of the arm that it
would call the best, after so much compute.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, Protocol

from study import best
from study.ledger import Outcome, Result, Suggestion
from study.measured import Measured
from study.optuna_study import OptunaStudy
from study.resume import next_step
from study.spec import StudySpec
from study.steps import AskSampler, Start
from study.stopping import goes_on, rung_at
from trainables.config import arm_id

Params = Mapping[str, Any]


class Reading(NamedTuple):
    """What a trial measures at a rung."""

    phase: str
    progress: float  # of the phase
    cost: float  # since the rung before, in whatever the landscape counts
    values: Mapping[str, float]  # "phase/metric" -> value
    fails: Outcome | None = None  # how the trial ends here instead of measuring anything


@dataclass(frozen=True)
class Landscape:
    """Everything that could be measured."""

    name: str
    spec: StudySpec  # the space, the objective and the rungs
    readings: Callable[[Params, int], Sequence[Reading]]  # of an arm's parameters and a seed
    truth: Callable[[Params], float]  # of an arm's objective, free of noise
    best: float  # of all arms
    typical: float  # the median over random ones
    full_cost: float  # mean over random arms, all rungs

    def regret(self, params: Params | None) -> float:
        """0: the best arm; 1: as good as a random one, or none at all."""
        if params is None:
            return 1.0
        return (self.best - self.truth(params)) / (self.best - self.typical)


class Task(NamedTuple):
    """A trial that a searcher wants to see."""

    name: str
    params: Params
    seed: int


class Searcher(Protocol):
    """Who decides which arm to try, and whether it goes on."""

    def ask(self) -> Task | None:
        """The next trial; None: none now."""

    def goes_on(self, task: Task, reading: Reading) -> bool:
        """Whether a trial goes on after it has measured this."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """A trial has no more rungs, was not to go on, or has failed."""

    def incumbent(self) -> Params | None:
        """The arm that would be called the best now."""


class Point(NamedTuple):
    """After some event of a study."""

    spent: float  # compute so far
    regret: float


def play(
    searcher: Searcher, landscape: Landscape, *, runs: float, workers: int = 1, noise: int = 0
) -> list[Point]:
    """A study until as much compute is spent as `runs` average full trials take.

    `noise` picks the seeds' luck: equal numbers give the same arm and seed the same values.
    """
    budget, spent, order = runs * landscape.full_cost, 0.0, count()
    points = [Point(0.0, 1.0)]
    queue: list[tuple[float, int, Task, Sequence[Reading], int]] = []
    clock = 0.0

    def hand_out() -> None:
        while len(queue) < workers:
            task = searcher.ask()
            if task is None:
                return
            luck = zlib.crc32(f"{noise} {sorted(task.params.items())} {task.seed}".encode())
            readings = landscape.readings(task.params, luck)
            heapq.heappush(queue, (clock + readings[0].cost, next(order), task, readings, 0))

    hand_out()
    while queue and spent < budget:
        clock, _, task, readings, at = heapq.heappop(queue)
        reading = readings[at]
        spent += reading.cost
        is_last = at == len(readings) - 1
        if reading.fails is None and searcher.goes_on(task, reading) and not is_last:
            entry = (clock + readings[at + 1].cost, next(order), task, readings, at + 1)
            heapq.heappush(queue, entry)
            continue
        ending = Outcome.COMPLETE if is_last else Outcome.STOPPED
        searcher.ended(task, reading.fails or ending)
        points.append(Point(spent / landscape.full_cost, landscape.regret(searcher.incumbent())))
        hand_out()
    return points


def regret_at(points: Sequence[Point], runs: float) -> float:
    """The regret once so much compute was spent."""
    return [point.regret for point in points if point.spent <= runs][-1]


@dataclass
class Ours:
    """The study's own sampler and stopping rule."""

    spec: StudySpec
    suggestions: list[Suggestion] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    measured: Measured = field(default_factory=dict)
    running: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.optuna = OptunaStudy(self.spec)
        self.optuna.replay([], {}, self.measured)

    def ask(self) -> Task | None:
        step = next_step(self.spec, self.suggestions, self.results, self.running, self.measured)
        if isinstance(step, AskSampler):
            proposal = self.optuna.ask(step.number)
            if proposal is None:
                return None
            step = Start("search", proposal.config, step.seed, proposal.params, proposal.labels)
        if not isinstance(step, Start):
            return None
        suggestion = Suggestion(
            number=len(self.suggestions),
            trial=f"{len(self.suggestions)}",
            arm=arm_id(step.config),
            seed=step.seed,
            origin=step.origin,
            config={},
            params=step.params,
            labels=step.labels,
        )
        self.suggestions.append(suggestion)
        self.running.add(suggestion.trial)
        self.optuna.add(suggestion)
        return Task(suggestion.trial, suggestion.params, suggestion.seed)

    def goes_on(self, task: Task, reading: Reading) -> bool:
        self.optuna.report(task.name, reading.progress, reading.values)
        at = (task.name, reading.phase, reading.progress)
        rung = rung_at(self.spec, self.suggestions, self.measured, *at)
        suggestion = self.suggestions[int(task.name)]
        return goes_on(self.spec.stopping, rung, suggestion, first_seed=self.spec.seed)

    def ended(self, task: Task, outcome: Outcome) -> None:
        self.running.discard(task.name)
        result = Result(task.name, outcome, seconds=0.0, error=None, progress={})
        self.results[task.name] = result
        self.optuna.tell(result)

    def incumbent(self) -> Params | None:
        found = best.of_study(self.spec, self.suggestions, self.results, self.measured)
        leader = best.best(found) or next(iter(found), None)
        if leader is None:
            return None
        return next(each.params for each in self.suggestions if each.arm == leader.arm)
