"""Studies that are played, with answers that are known.  pytest tests/study/test_replay.py"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter

from study import contest as contest_module
from study import landscapes
from study.contest import Curve, contest, difference, searcher_of
from study.ledger import Outcome
from study.loading import parse_spec
from study.replay import Landscape, Ours, Reading, Task, play, regret_at
from study.rivals import PACKAGES
from study.spec import Stopper
from tests.terminal import call
from trainables.errors import UserError

PSNR = "pretrain/probe_psnr"
SPEC = parse_spec(
    f"""\
study: s
data: {{source: smears, size: 32}}
trial:
  model: {{size: pico, patch: 8, decoder: {{depth: 1, width: 64}}}}
  pretrain: {{optimizer: {{name: adamw, base_lr: 1.0e-2}}}}
search:
  model.patch: {{choices: [4, 8, 16]}}
  pretrain.optimizer.base_lr: {{low: 1.0e-3, high: 1.0e-1, log: true}}
objectives: [{PSNR}]
controls: []
rungs: [0.5, 1.0]
budget: {{trials: 1000}}
""",
    Path(),
    where="s.yaml",
)


def place(readings, **more):
    given = {
        "name": "toy",
        "spec": SPEC,
        "readings": readings,
        "truth": lambda params: float(params["model.patch"]),
        "best": 16.0,
        "typical": 8.0,
        "full_cost": 2.0,
    }
    return Landscape(**(given | more))


def two_rungs(params, luck):
    value = float(params["model.patch"])
    return [Reading("pretrain", rung, 1.0, {PSNR: value * rung}) for rung in (0.5, 1.0)]


class Scripted:
    """Asks for given patches, stops those of `stopped` at the first rung."""

    def __init__(self, patches, stopped=()):
        self.patches, self.stopped, self.heard = list(patches), stopped, []
        self.best = None

    def ask(self):
        if not self.patches:
            return None
        params = {"model.patch": self.patches.pop(0)}
        return Task(f"{len(self.heard)}-{params['model.patch']}", params, 0)

    def goes_on(self, task, reading):
        self.heard.append((task.params["model.patch"], reading.progress))
        return task.params["model.patch"] not in self.stopped

    def ended(self, task, outcome):
        self.heard.append((task.params["model.patch"], outcome))
        if outcome is Outcome.COMPLETE:
            self.best = max(self.best or task.params, task.params, key=lambda p: p["model.patch"])

    def incumbent(self):
        return self.best


def test_what_is_spent_and_found_is_counted_by_hand():
    searcher = Scripted([4, 8, 16], stopped=(8,))
    points = play(searcher, place(two_rungs), runs=100)
    assert searcher.heard == [
        (4, 0.5), (4, 1.0), (4, Outcome.COMPLETE), (8, 0.5), (8, Outcome.STOPPED),
        (16, 0.5), (16, 1.0), (16, Outcome.COMPLETE),
    ]  # fmt: skip
    # in full trials: one, a half, one; patch 4 is 12 of 8 worse than the best
    assert points == [(0.0, 1.0), (1.0, 1.5), (1.5, 1.5), (2.5, 0.0)]
    assert [regret_at(points, runs) for runs in (0.5, 1.0, 2.4, 9.0)] == [1.0, 1.5, 1.5, 0.0]


def test_workers_take_as_long_as_what_they_train_costs():
    def readings(params, luck):
        patch = params["model.patch"]
        return [Reading("pretrain", rung, 16 / patch, {}) for rung in (0.5, 1.0)]

    searcher = Scripted([4, 16, 8])
    play(searcher, place(readings), runs=100, workers=2)
    assert searcher.heard == [
        (16, 0.5), (16, 1.0), (16, Outcome.COMPLETE),  # after 1 and 2
        (4, 0.5), (8, 0.5),  # after 4, both; the one that was begun first
        (8, 1.0), (8, Outcome.COMPLETE), (4, 1.0), (4, Outcome.COMPLETE),
    ]  # fmt: skip


def test_a_study_ends_with_its_compute():
    searcher = Scripted([4] * 50)
    points = play(searcher, place(two_rungs), runs=3)
    assert points[-1].spent == 3.0 and len(searcher.patches) == 46


def test_a_trial_that_fails_measures_nothing():
    def readings(params, luck):
        return [Reading("pretrain", 0.5, 0.25, {}, Outcome.OUT_OF_MEMORY)]

    searcher = Scripted([4])
    play(searcher, place(readings), runs=1)
    assert searcher.heard == [(4, Outcome.OUT_OF_MEMORY)]


@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_seed_plays_the_same_study(workers):
    def played():
        searcher = begin(landscapes.crossing(0), 3)
        points = play(searcher, landscapes.crossing(0), runs=4, workers=workers, noise=3)
        return points, [each.params for each in searcher.suggestions]

    begin = searcher_of("tpe+halving")
    assert played() == played()


def test_our_searcher_asks_and_stops_as_a_study_does():
    halving = TypeAdapter(Stopper).validate_python({"name": "halving", "metric": PSNR})
    searcher = Ours(SPEC.model_copy(update={"stopping": halving}))
    play(searcher, place(two_rungs), runs=20)
    assert searcher.suggestions[0].origin == "control"
    outcomes = {each.outcome for each in searcher.results.values()}
    assert outcomes == {Outcome.COMPLETE, Outcome.STOPPED}
    assert searcher.incumbent()["model.patch"] == 16
    for each in searcher.suggestions:
        stopped = searcher.results.get(each.trial)
        if stopped and stopped.outcome is Outcome.STOPPED:
            assert each.params["model.patch"] < 16


@pytest.mark.parametrize("way", ["ray", "ray-probe", "optuna"])
@pytest.mark.parametrize("name", landscapes.TRAPS)
def test_rivals_search_with_their_own_classes(way, name):
    trap = landscapes.TRAPS[name](0)
    searcher = searcher_of(way)(trap, 1)
    points = play(searcher, trap, runs=6, workers=2)
    assert 5 < points[-1].spent < 7
    assert len(searcher.complete) >= 1
    assert searcher.incumbent() in searcher.params.values()
    assert len(searcher.params) > len(searcher.complete)  # somebody was stopped


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", PACKAGES)
def test_rivals_that_are_no_dependencies_play_where_they_are_installed(name):
    pytest.importorskip(PACKAGES[name])
    trap = landscapes.TRAPS["crossing"](0)
    searcher = searcher_of(name)(trap, 1)
    points = play(searcher, trap, runs=3, workers=2)
    assert 2 < points[-1].spent < 4
    assert searcher.incumbent() in searcher.params.values()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_rival_that_is_not_installed_is_told(name, monkeypatch):
    monkeypatch.setattr(contest_module, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        searcher_of(name)
    assert not contest_module.is_installed(name)
    assert contest_module.is_installed("ray") and contest_module.is_installed("tpe+none")


# --- landscapes ---


@pytest.mark.parametrize("name", landscapes.TRAPS)
def test_a_trap_is_scaled_so_that_0_is_the_best_and_1_a_random_arm(name):
    trap = landscapes.TRAPS[name](2)
    regrets = [trap.regret(params) for params in landscapes.random_arms(trap.spec, 300, seed=5)]
    assert -0.05 < min(regrets) < 0.15
    assert np.median(regrets) == pytest.approx(1, abs=0.25)
    assert trap.regret(None) == 1
    costs = [
        sum(reading.cost for reading in trap.readings(params, 0))
        for params in landscapes.random_arms(trap.spec, 300, seed=6)
    ]
    assert np.mean(costs) == pytest.approx(trap.full_cost, rel=0.15)


def ranks_at(trap, metric, progress, phase):
    """Spearman's correlation of a metric at a rung with the true value."""
    arms = landscapes.random_arms(trap.spec, 200, seed=7)
    at = [
        next(
            reading.values[metric]
            for reading in trap.readings(params, number)
            if (reading.phase, reading.progress) == (phase, progress)
        )
        for number, params in enumerate(arms)
    ]
    return pd.Series(at).corr(pd.Series(map(trap.truth, arms)), method="spearman")


def test_crossing_curves_are_in_the_wrong_order_early_and_in_the_right_one_late():
    trap = landscapes.crossing(0)
    assert ranks_at(trap, PSNR, 0.0625, "pretrain") < ranks_at(trap, PSNR, 0.25, "pretrain")
    assert ranks_at(trap, PSNR, 1.0, "pretrain") > 0.95


def test_the_misleading_proxy_says_nothing_and_segmentation_does():
    trap = landscapes.misleading(0)
    assert abs(ranks_at(trap, PSNR, 1.0, "pretrain")) < 0.2
    assert ranks_at(trap, "segment/miou", 0.25, "segment") > 0.9


def table(seeds=(0, 1)):
    """Three patches, two rates, curves that are sums of what is known."""
    rows = []
    for patch in (4, 8, 16):
        for rate in (0.01, 0.1):
            for seed in seeds:
                for phase, metric in (("pretrain", "probe_psnr"), ("segment", "miou")):
                    for progress in (0.5, 1.0):
                        value = patch + 10 * math.log10(rate) + seed + progress
                        values = {"probe_psnr": math.nan, "miou": math.nan} | {metric: value}
                        flops = 100.0 * progress * (2 if phase == "segment" else 1) / patch
                        rows.append(
                            {"model.patch": patch, "pretrain.optimizer.base_lr": rate}
                            | {"seed": seed, "phase": phase, "progress": progress, "flops": flops}
                            | values
                        )
    return pd.DataFrame(rows)


def of_table(objective="segment/miou"):
    rows = table()
    return landscapes.of_table(rows, SPEC, objective, "toy")


def test_recorded_curves_are_given_back_as_they_are():
    found = of_table().readings({"model.patch": 4, "pretrain.optimizer.base_lr": 0.1}, luck=0)
    seed = round(found[0].values[PSNR] - (4 - 10 + 0.5))
    assert seed in (0, 1)
    assert [reading.phase for reading in found] == ["pretrain"] * 2 + ["segment"] * 2
    assert found[3].values == {"segment/miou": pytest.approx(4 - 10 + seed + 1)}
    assert [reading.cost for reading in found] == [12.5, 12.5, 25, 25]


def test_between_recorded_rates_curves_are_interpolated():
    trap = of_table()
    middle = {"model.patch": 8, "pretrain.optimizer.base_lr": math.sqrt(0.001)}
    assert trap.truth(middle) == pytest.approx(8 - 15 + 0.5 + 1)
    beyond = {"model.patch": 8, "pretrain.optimizer.base_lr": 5.0}
    assert trap.truth(beyond) == pytest.approx(8 - 10 + 0.5 + 1)


def test_a_pretraining_objective_has_no_second_phase():
    trap = of_table(PSNR)
    found = trap.readings({"model.patch": 4, "pretrain.optimizer.base_lr": 0.1}, luck=0)
    assert [reading.phase for reading in found] == ["pretrain"] * 2
    assert trap.best == pytest.approx(16 - 10 + 0.5 + 1)


def test_the_noise_of_an_arm_is_one_of_its_seeds():
    trap = of_table()
    arm = {"model.patch": 4, "pretrain.optimizer.base_lr": 0.1}
    finals = {trap.readings(arm, luck)[-1].values["segment/miou"] for luck in range(20)}
    assert finals == {-5.0, -4.0}
    assert trap.truth(arm) == pytest.approx(-4.5)


# --- contests ---


def curve(name, *studies):
    return Curve("toy", name, (0.0, 10.0, 20.0), np.array(studies, float))


def test_differences_are_paired_by_study():
    one, other = curve("a", [1, 0.5, 0.1], [1, 0.9, 0.6]), curve("b", [1, 0.6, 0.3], [1, 0.9, 0.6])
    assert difference(one, other, 10)[0] == pytest.approx(-0.05)
    mean, low, high = difference(one, other, 20)
    assert (mean, (low + high) / 2) == (pytest.approx(-0.1), pytest.approx(-0.1))
    assert high - low == pytest.approx(2 * 12.706 * 0.1, rel=1e-3)  # t of one degree of freedom
    assert difference(one, other, 15) == difference(one, other, 10)


def test_when_a_contender_has_what_another_one_found():
    one = curve("a", [1, 0.5, 0.1], [1, 0.9, 0.6])
    assert [one.reaches(goal) for goal in (1.0, 0.7, 0.35, 0.1)] == [0.0, 10.0, 20.0, None]


def test_ways_to_search_play_the_same_studies():
    ways = ["quasi-random+none", "tpe+none"]
    found = list(contest(ways, ["dead"], studies=2, workers=1, runs=3))
    assert [each.contender for each in found] == ways
    assert found[0].regrets.shape == (2, 13)
    # the first arms of both are the same
    assert (found[0].regrets == found[1].regrets).all()


@pytest.mark.parametrize("way", ["tpe", "tpe+stop", "rays", "+none"])
def test_an_unknown_way_to_search_is_told_what_there_is(way):
    with pytest.raises(UserError, match=r"expected a sampler \(tpe.*tpe\+halving.*ray"):
        searcher_of(way)


def test_the_bench_prints_who_found_what(tmp_path, capsys):
    args = ["--search", "random+none", "--landscapes", "dead", "--studies", "2"]
    assert call("bench", *args, "--output", str(tmp_path / "found.json")) == 0
    said = capsys.readouterr().out
    assert "dead, 4 trials at once, 2 studies" in said
    assert "random+none" in said and "ray" in said
    found = pd.read_json(tmp_path / "found.json")
    assert list(found.contender) == ["ray", "random+none"]
    assert call("bench", "--search", "ray", "--landscapes", "alps") == 2
    assert "--landscapes: given 'alps'" in capsys.readouterr().err
