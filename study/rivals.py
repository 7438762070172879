"""Other libraries' ways to search, played on the same landscapes (replay.py).

Their own classes decide, as in a script that their documentation shows: a trial reports a number at
every rung, and the number of its rung as the time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna

from study import space
from study.ledger import Outcome
from study.replay import Landscape, Params, Reading, Searcher, Task
from trainables.metrics import PSNR, parse

SLASH = " in "
FIRST = 1 / 16  # of a phase: what a rival's unit of time is
MANY = 10_000  # trials that nobody comes to


@dataclass
class _Rival:
    """What all know: the space, the number that a trial reports, and when."""

    place: Landscape
    seed: int
    early: str | None = None  # metric that is reported in pretraining, if the objective comes later
    params: dict[str, Params] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)  # what each trial reported last
    complete: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        objective = self.place.spec.objectives[0].metric
        self.metrics = {parse(objective).phase: objective}  # phase -> what it reports
        if self.early is not None:
            self.metrics = {parse(self.early).phase: self.early} | self.metrics
        self.longest = round(len(self.metrics) / FIRST)
        self.set_up()

    def set_up(self) -> None:
        """Begin a study with the library."""

    def score(self, task: Task, reading: Reading) -> tuple[int, float] | None:
        """(time, value) that a trial reports; None: nothing, in this phase."""
        if reading.phase not in self.metrics:
            return None
        self.last[task.name] = value = reading.values[self.metrics[reading.phase]]
        before = list(self.metrics).index(reading.phase)
        return round((before + reading.progress) / FIRST), value

    def incumbent(self) -> Params | None:
        able = {name: value for name, value in self.last.items() if name in self.complete}
        leader = max(able, key=lambda name: able[name], default=None)
        return None if leader is None else self.params[leader]


class _Renamed:
    """A trial of Optuna's under names that Ray does not take for paths."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def __getattr__(self, suggest: str) -> Any:
        return lambda name, *given, **options: getattr(self.trial, suggest)(
            name.replace("/", SLASH), *given, **options
        )


class RayASHA(_Rival):
    """`tune.Tuner` with OptunaSearch and ASHAScheduler: they decide there as they do here."""

    def set_up(self) -> None:
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        def drawn(trial: Any) -> None:
            space.draw(self.place.spec.search, _Renamed(trial))

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search = OptunaSearch(space=drawn, metric="score", mode="max", seed=self.seed)
        self.scheduler = ASHAScheduler(
            metric="score", mode="max", max_t=self.longest, grace_period=1, reduction_factor=4
        )

    def ask(self) -> Task | None:
        name = f"{len(self.params)}"
        found = self.search.suggest(name)
        assert found is not None
        params = {key.replace(SLASH, "/"): value for key, value in found.items()}
        self.params[name] = params
        self.scheduler.on_trial_add(None, SimpleNamespace(trial_id=name))
        return Task(name, params, seed=0)

    def goes_on(self, task: Task, reading: Reading) -> bool:
        reported = self.score(task, reading)
        if reported is None:
            return True
        result = dict(zip(("training_iteration", "score"), reported, strict=True))
        trial = SimpleNamespace(trial_id=task.name)
        return bool(self.scheduler.on_trial_result(None, trial, result) == "CONTINUE")

    def ended(self, task: Task, outcome: Outcome) -> None:
        if outcome is Outcome.COMPLETE:
            self.complete.add(task.name)
        failed = outcome not in (Outcome.COMPLETE, Outcome.STOPPED)
        score = None if failed else {"score": self.last.get(task.name, math.nan)}
        self.search.on_trial_complete(task.name, result=score, error=failed)


class OptunaHyperband(_Rival):
    """Optuna's TPE with its HyperbandPruner."""

    def set_up(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            pruner=optuna.pruners.HyperbandPruner(
                min_resource=1, max_resource=self.longest, reduction_factor=4
            ),
        )
        self.trials: dict[str, optuna.Trial] = {}

    def ask(self) -> Task | None:
        trial = self.study.ask()
        name = f"{trial.number}"
        self.trials[name], self.params[name] = (
            trial,
            space.draw(self.place.spec.search, trial).params,
        )
        return Task(name, self.params[name], seed=0)

    def goes_on(self, task: Task, reading: Reading) -> bool:
        reported = self.score(task, reading)
        if reported is None:
            return True
        trial = self.trials[task.name]
        trial.report(reported[1], reported[0])
        return not trial.should_prune()

    def ended(self, task: Task, outcome: Outcome) -> None:
        states = {
            Outcome.COMPLETE: optuna.trial.TrialState.COMPLETE,
            Outcome.STOPPED: optuna.trial.TrialState.PRUNED,
        }
        if outcome is Outcome.COMPLETE:
            self.complete.add(task.name)
        state = states.get(outcome, optuna.trial.TrialState.FAIL)
        value = self.last[task.name] if state == optuna.trial.TrialState.COMPLETE else None
        self.study.tell(self.trials[task.name], value, state=state)


class SyneTuneCQR(_Rival):
    """Syne Tune's ASHACQR: conformalised quantile regression beside ASHA, its successor of MOBSTER.

    Salinas et al. 2023, arXiv 2305.03623. It knows no conditional parameters: all are drawn, and
    those that an arm does not have are left out.
    """

    def set_up(self) -> None:
        from syne_tune.optimizer.baselines import ASHACQR

        found = space.parameters(self.place.spec.search)
        self.scheduler = ASHACQR(
            {name: _syne_tune_domain(parameter.item) for name, parameter in found.items()},
            metric="score",
            time_attr="time",
            max_t=self.longest,
            do_minimize=False,
            random_seed=self.seed,
            grace_period=1,
            reduction_factor=4,
        )
        self.trials: dict[str, Any] = {}

    def ask(self) -> Task | None:
        from syne_tune.backend.trial_status import Trial

        suggestion = self.scheduler.suggest()
        if suggestion is None:
            return None
        name = f"{len(self.params)}"
        self.trials[name] = Trial(int(name), suggestion.config, datetime.now(UTC))
        self.params[name] = space.draw(self.place.spec.search, _Given(suggestion.config)).params
        self.scheduler.on_trial_add(self.trials[name])
        return Task(name, self.params[name], seed=0)

    def goes_on(self, task: Task, reading: Reading) -> bool:
        reported = self.score(task, reading)
        if reported is None:
            return True
        result = dict(zip(("time", "score"), reported, strict=True))
        decision = self.scheduler.on_trial_result(self.trials[task.name], result)
        return bool(decision == "CONTINUE" or reported[0] >= self.longest)

    def ended(self, task: Task, outcome: Outcome) -> None:
        if outcome is Outcome.COMPLETE:
            self.complete.add(task.name)
        elif outcome is Outcome.STOPPED:
            self.scheduler.on_trial_remove(self.trials[task.name])
        else:
            self.scheduler.on_trial_error(self.trials[task.name])


class SMAC(_Rival):
    """SMAC3's random forests by ask and tell, nothing stopped: its Hyperband begins arms anew.

    Lindauer et al. 2022, JMLR 23 (54).
    """

    def set_up(self) -> None:
        from smac import HyperparameterOptimizationFacade, Scenario

        self.scratch = tempfile.TemporaryDirectory(prefix="smac-")
        scenario = Scenario(
            _configspace(self.place.spec.search, self.seed),
            deterministic=True,
            n_trials=MANY,
            seed=self.seed,
            output_directory=Path(self.scratch.name),
        )
        self.smac = HyperparameterOptimizationFacade(
            scenario, lambda config, seed=0: 0.0, overwrite=True, logging_level=False
        )
        self.asked: dict[str, Any] = {}

    def ask(self) -> Task | None:
        name, info = f"{len(self.params)}", self.smac.ask()
        search = self.place.spec.search
        items = {key: parameter.item for key, parameter in space.parameters(search).items()}
        values = {
            key: value if items[key].choices is None else list(items[key].choices or [])[value]
            for key, value in dict(info.config).items()
        }
        self.asked[name] = info
        self.params[name] = space.draw(search, _Given(values)).params
        return Task(name, self.params[name], seed=0)

    def goes_on(self, task: Task, reading: Reading) -> bool:
        self.score(task, reading)
        return True

    def ended(self, task: Task, outcome: Outcome) -> None:
        from smac.runhistory.dataclasses import TrialValue
        from smac.runhistory.enumerations import StatusType

        if outcome is Outcome.COMPLETE:
            self.complete.add(task.name)
            value = TrialValue(cost=-self.last[task.name])
        else:
            value = TrialValue(cost=math.inf, status=StatusType.CRASHED)
        self.smac.tell(self.asked[task.name], value)


def _configspace(search: Mapping[str, space.SearchItem], seed: int) -> Any:
    """The space as SMAC3 has it; a choice is a number, as its values become strings."""
    import ConfigSpace

    found = ConfigSpace.ConfigurationSpace(seed=seed)
    items = {name: parameter.item for name, parameter in space.parameters(search).items()}
    for name, item in items.items():
        if item.choices is not None:
            one = ConfigSpace.Categorical(name, list(range(len(item.choices))))
        else:
            kind = ConfigSpace.Integer if item.is_integer else ConfigSpace.Float
            one = kind(name, (item.low, item.high), log=item.log)
        found.add(one)
        parent, slash, rest = name.rpartition("/")
        if slash:
            labels = list(items[parent].choices or [])
            place = next(n for n, label in enumerate(labels) if f"{rest}.".startswith(f"{label}."))
            found.add(ConfigSpace.EqualsCondition(found[name], found[parent], place))
    return found


class _Given:
    """Suggests what was decided elsewhere."""

    def __init__(self, values: Params) -> None:
        self.values = values

    def __getattr__(self, suggest: str) -> Any:
        return lambda name, *given, **options: self.values[name]


def _syne_tune_domain(item: space.SearchItem) -> Any:
    from syne_tune import config_space

    if item.choices is not None:
        return config_space.choice(list(item.choices))
    if item.is_integer:
        draw = config_space.lograndint if item.log else config_space.randint
        return draw(item.low, item.high)
    return (config_space.loguniform if item.log else config_space.uniform)(item.low, item.high)


RIVALS: dict[str, Callable[[Landscape, int], Searcher]] = {
    "ray": RayASHA,
    "ray-probe": partial(RayASHA, early=PSNR),
    "optuna": OptunaHyperband,
    "syne-tune": SyneTuneCQR,
    "smac": SMAC,
}
PACKAGES = {"syne-tune": "syne_tune", "smac": "smac"}  # to be imported; no dependencies of ours
