"""Every sampler with every stopping rule where arms fail.  pytest tests/study/test_failures.py"""

from __future__ import annotations

import math
import random

import pytest
from pydantic import TypeAdapter

from study.ledger import Outcome
from study.measured import collect
from study.optuna_study import OptunaStudy
from study.replay import Landscape, Ours, Reading, play
from study.spec import Sampler, Stopper
from study.stopping import STOPPERS
from tests.study.test_replay import PSNR, SPEC
from tests.study.test_samplers import (
    LEARNING,
    NAMES_AND_OBJECTIVES,
    PROPOSING,
    SMALL,
    WIDE,
    result,
    row,
    score,
    soon,
    study,
    suggestion,
)

RATE = "pretrain.optimizer.base_lr"
LOW, HIGH = 1e-3, 1e-1


def share(params):
    """Where a learning rate lies in its range."""
    return math.log(params[RATE] / LOW) / math.log(HIGH / LOW)


def quality(params):
    """Best at patch 4 and in the middle of the range of rates."""
    return 4 / params["model.patch"] - 9 * (share(params) - 1 / 2) ** 2


def place(fails=lambda params: None, spoilt=lambda params: None):
    """`fails`: an outcome, `spoilt`: what the trial measures at its end instead, for some arms."""

    def readings(params, luck):
        found = []
        for rung in SPEC.rungs:
            values = {PSNR: quality(params) + 5 * rung}
            if rung == 1 and spoilt(params) is not None:
                values = spoilt(params)
            found.append(Reading("pretrain", rung, 1.0, values, fails(params)))
        return found

    return Landscape("toy", SPEC, readings, quality, 1.0, 0.0, 2.0)


def played(name, stopping, landscape, runs, seed=0, **options):
    sampler = {"name": name} | (options if name in LEARNING else {})
    chosen = {
        "sampler": TypeAdapter(Sampler).validate_python(sampler),
        "stopping": TypeAdapter(Stopper).validate_python(stopping),
        "seed": seed,
    }
    searcher = Ours(landscape.spec.model_copy(update=chosen))
    play(searcher, landscape, runs=runs, workers=4)
    return searcher


@pytest.mark.parametrize("stopping", STOPPERS)
@pytest.mark.parametrize("name", PROPOSING)
def test_where_every_arm_fails_the_search_goes_on_to_others(name, stopping):
    outcomes = {4: Outcome.DIVERGED, 8: Outcome.OUT_OF_MEMORY, 16: Outcome.FAILED}
    landscape = place(fails=lambda params: outcomes[params["model.patch"]])
    searcher = played(name, stopping, landscape, runs=7, startup=8)
    assert len(searcher.results) == 14  # of a rung each
    assert len({each.arm for each in searcher.suggestions}) == len(searcher.suggestions)
    assert searcher.incumbent() is None


@pytest.mark.parametrize("stopping", STOPPERS)
@pytest.mark.parametrize("name", PROPOSING)
def test_what_is_not_finite_or_missing_is_never_the_best(name, stopping):
    def spoilt(params):
        which = int(8 * share(params)) % 4
        return [None, {PSNR: math.nan}, {PSNR: math.inf}, {}][which]

    searcher = played(name, stopping, place(spoilt=spoilt), runs=11, startup=8)
    assert len(searcher.results) >= 10
    complete = searcher.results.values()
    spoils = [spoilt(searcher.suggestions[int(each.trial)].params) is not None for each in complete]
    assert 2 <= sum(spoils) < len(spoils)
    assert spoilt(searcher.incumbent()) is None


THIRDS = {  # that fail, or measure nothing
    "large rates": lambda params: share(params) > 2 / 3,
    "small rates": lambda params: share(params) < 1 / 3,
    "the best choice": lambda params: params["model.patch"] == 4 and share(params) > 0.1,
}


@pytest.mark.parametrize("third", THIRDS)
@pytest.mark.parametrize("name", [name for name in LEARNING if name != "gp"])  # which takes long
def test_a_third_of_the_space_that_fails_is_left_alone_wherever_it_lies(name, third):
    """Chance would go there in every third trial."""
    is_dead = THIRDS[third]
    for stopping, landscape in (
        ("halving", place(fails=lambda params: Outcome.OUT_OF_MEMORY if is_dead(params) else None)),
        ("none", place(spoilt=lambda params: {PSNR: math.nan} if is_dead(params) else None)),
    ):
        searcher = played(name, stopping, landscape, runs=50)
        late = [is_dead(each.params) for each in searcher.suggestions[20:]]
        assert len(late) > 25
        assert sum(late) <= 0.15 * len(late)


def test_beside_what_fails_a_question_is_asked_until_the_answer_may_live():
    """The best rate is the lowest that does not fail; the sampler likes those below it as well."""
    late = []
    for seed in range(2):
        landscape = place(fails=lambda params: Outcome.DIVERGED if share(params) < 0.5 else None)
        searcher = played("tpe", "none", landscape, runs=40, seed=seed)
        late += [share(each.params) < 0.5 for each in searcher.suggestions[20:]]
    assert sum(late) <= 0.2 * len(late)


# --- resumed ---

HAPPENS = ["complete"] * 4 + ["stopped", "diverged", "memory", "nan", "missing", "lost"]
ENDS = {
    "stopped": Outcome.STOPPED,
    "diverged": Outcome.DIVERGED,
    "memory": Outcome.OUT_OF_MEMORY,
    "lost": Outcome.FAILED,
}


def eventful(spec, num_arms, workers, restart_at=()):
    """A study of which so many trials run at once, end out of turn, and badly in any way."""
    optuna_study, suggestions, results, rows, running = OptunaStudy(spec), [], {}, [], []
    chance = random.Random(1)

    def measures(one, progress, **values):
        new = [row(one, value, progress, metric) for metric, value in values.items()]
        rows.extend(new)
        told = {f"pretrain/{each['metric']}": each["value"] for each in new}
        optuna_study.report(one.trial, progress, told)

    for number in range(num_arms):
        while len(running) >= workers:
            one = running.pop(chance.randrange(len(running)))
            what = chance.choice(HAPPENS)
            config = spec.trial.model_validate(one.config)
            values = {"probe_psnr": score(config), "planned_flops": float(config.model.patch)}
            if what == "nan":
                values["probe_psnr"] = math.nan
            if what in ("complete", "nan"):
                measures(one, 1.0, **values)
            outcome = ENDS.get(what, Outcome.COMPLETE)
            results[one.trial] = result(one, outcome, failures=int(what == "lost"))
            optuna_study.tell(results[one.trial])
        if number in restart_at:
            optuna_study = OptunaStudy(spec)
            optuna_study.replay(suggestions, results, collect(rows))
        proposal = optuna_study.ask(number)
        one = suggestion(number, proposal.config, params=proposal.params)
        suggestions.append(one)
        running.append(one)
        optuna_study.add(one)
        measures(one, 0.25, probe_psnr=score(proposal.config) / 4, planned_flops=1.0)
    return [one.params for one in suggestions]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(("name", "objectives"), NAMES_AND_OBJECTIVES)
def test_a_resumed_study_proposes_the_same_whatever_happened(name, objectives, workers):
    spec = study(WIDE if name in PROPOSING else SMALL, soon(name, 3), objectives)
    arms = {"gp": 8, "grid": 9}.get(name, 16)
    whole = eventful(spec, arms, workers)
    assert whole == eventful(spec, arms, workers, restart_at={2, 6, 7, 12})
