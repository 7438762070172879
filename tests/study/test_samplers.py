"""Proposals depend on history and number only; bad news is never good news."""

import dataclasses
import inspect
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from statistics import fmean

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import GPSampler
from optuna.trial import TrialState
from pydantic import TypeAdapter

from study import samplers
from study.landscapes import dead
from study.ledger import Outcome, Result, Suggestion
from study.loading import parse_spec
from study.measured import collect
from study.optuna_study import OptunaStudy, is_doomed
from study.replay import Ours, play
from study.resume import next_step
from study.samplers import ONE_OBJECTIVE, POPULATIONS, SAMPLERS
from study.spec import Sampler
from study.steps import Start
from tests.drawn import drawn
from trainables.config import arm_id, trial_id

PSNR = "pretrain/probe_psnr"
ONE = "[{metric: pretrain/probe_psnr, goal: maximize}]"
TWO = (
    "[{metric: pretrain/probe_psnr, goal: maximize},"
    " {metric: pretrain/planned_flops, goal: minimize}]"
)
WIDE = """\
  model.patch: {choices: [4, 8, 16]}
  masking.ratio:
    choices:
      constant: {name: constant, value: {low: 0.1, high: 0.9}}
      rising: {name: linear, start: {low: 0.1, high: 0.5}, end: {low: 0.5, high: 0.9}}
  pretrain.optimizer.base_lr: {low: 1e-5, high: 1e-3, log: true}
"""
SMALL = """\
  model.patch: {choices: [4, 8, 16]}
  masking.ratio.value: {low: 0.25, high: 0.75, step: 0.25}
"""

ASKED = [name for name in SAMPLERS if name not in POPULATIONS]
PROPOSING = [name for name in ASKED if SAMPLERS[name](0, 1) is not None]  # not those that walk
LEARNING = [name for name in SAMPLERS if "startup" in inspect.signature(SAMPLERS[name]).parameters]

NAMES_AND_OBJECTIVES = [
    pytest.param(name, objectives, id=f"{name}-{count}")
    for name in ASKED
    for count, objectives in (("one", ONE), ("two", TWO))
    if objectives is ONE or name not in ONE_OBJECTIVE
]


def soon(name, startup):
    """The setting of a sampler that learns from so many arms on, if it ever does."""
    return f"{{name: {name}, startup: {startup}}}" if name in LEARNING else name


def study(search=WIDE, sampler="{name: tpe, startup: 4}", objectives=ONE, rest=""):
    text = f"""\
study: s
data: {{source: smears, size: 64}}
trial: {{model: {{size: pico, patch: 8}}, masking: {{ratio: {{name: constant, value: 0.75}}}}}}
objectives: {objectives}
sampler: {sampler}
stopping: {{name: halving, metric: pretrain/probe_psnr, min_trials: 2}}
rungs: [0.25, 0.5, 1.0]
controls: []
budget: {{trials: 1000}}
search:
{search}{rest}"""
    return parse_spec(text, Path(), where="s.yaml")


def suggestion(number, config, seed=0, origin="search", params=None):
    return Suggestion(
        number=number,
        trial=trial_id(config, seed, "data"),
        arm=arm_id(config),
        seed=seed,
        origin=origin,
        config=config.model_dump(mode="json"),
        params=params or {},
        labels={},
    )


def result(one, outcome=Outcome.COMPLETE, error=None, failures=0):
    return Result(one.trial, outcome, 1.0, error, {}, failures)


def row(one, value, progress=1.0, metric="probe_psnr"):
    return {
        "trial": one.trial,
        "phase": "pretrain",
        "metric": metric,
        "progress": progress,
        "value": value,
    }


def score(config):
    """A landscape with its best at patch 4, ratio 0.6."""
    ratio = config.masking.ratio
    mean = ratio.value if ratio.name == "constant" else (ratio.start + ratio.end) / 2
    return 30 - config.model.patch / 4 - 20 * (mean - 0.6) ** 2


def run(spec, num_arms, restart_at=(), stop_below=None):
    """A study at concurrency 1, restarted from JSON before some of its arms."""
    optuna_study = OptunaStudy(spec)
    suggestions, results, rows = [], {}, []
    for number in range(num_arms):
        if number in restart_at:
            text = json.dumps([dataclasses.asdict(one) for one in suggestions])
            suggestions = [Suggestion(**fields) for fields in json.loads(text)]
            optuna_study = OptunaStudy(spec)
            optuna_study.replay(suggestions, dict(results), collect(json.loads(json.dumps(rows))))
        proposal = optuna_study.ask(number)
        if proposal is None:
            break
        one = suggestion(number, proposal.config, params=proposal.params)
        suggestions.append(one)
        optuna_study.add(one)
        value = score(proposal.config)
        flops = float(proposal.config.model.patch)
        is_stopped = stop_below is not None and value < stop_below
        for progress in (0.25,) if is_stopped else (0.25, 0.5, 1.0):
            new = [row(one, value * progress, progress), row(one, flops, progress, "planned_flops")]
            rows += new
            values = {f"pretrain/{each['metric']}": each["value"] for each in new}
            optuna_study.report(one.trial, progress, values)
        end = result(one, Outcome.STOPPED if is_stopped else Outcome.COMPLETE)
        results[one.trial] = end
        optuna_study.tell(end)
    return suggestions, optuna_study


@pytest.mark.parametrize("name", ASKED)
def test_every_sampler_proposes_arms_of_the_space_once(name):
    spec = study(SMALL, name)
    suggestions, optuna_study = run(spec, 20)
    arms = [one.arm for one in suggestions]
    assert len(arms) == len(set(arms)) == 9  # 3 patches x 3 ratios, then nothing is left
    assert optuna_study.ask(99) is None


@pytest.mark.parametrize("name", PROPOSING)
def test_whatever_its_options_a_sampler_proposes_arms_of_the_space(name):
    for setting in drawn(Sampler, name):
        suggestions, _ = run(study(sampler=setting.model_dump_json()), 6)
        assert len({one.arm for one in suggestions}) == 6


@pytest.mark.parametrize(("name", "objectives"), NAMES_AND_OBJECTIVES)
def test_a_resumed_study_proposes_the_same_arms(name, objectives):
    search = WIDE if name in PROPOSING else SMALL
    spec = study(search, soon(name, 4), objectives)
    whole, _ = run(spec, 14, stop_below=26)
    broken, _ = run(spec, 14, restart_at=(1, 5, 6, 11), stop_below=26)
    assert whole == broken
    if name in PROPOSING:
        other, _ = run(study(search, soon(name, 4), objectives, rest="seed: 1\n"), 3)
        assert [one.arm for one in other] != [one.arm for one in whole[:3]]


@settings(max_examples=8, deadline=None)
@given(st.sets(st.integers(1, 9)), st.sampled_from([None, 25.0, 28.0]))
def test_it_does_so_wherever_it_was_interrupted(restarts, stop_below):
    spec = study()
    expected, _ = run(spec, 10, stop_below=stop_below)
    assert run(spec, 10, restart_at=restarts, stop_below=stop_below)[0] == expected


def shown(optuna_study):
    """What a sampler can know of the trials."""
    return [
        (each.number, each.state, each.values, each.params, each.intermediate_values)
        for each in optuna_study.study().get_trials(deepcopy=False)
    ]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["tpe", "gp"]), st.sampled_from([1, 2]), st.randoms(use_true_random=False))
def test_what_is_kept_between_questions_is_what_the_ledger_says(sampler, seeds, chance):
    """Trials end, fail, are lost and come back, in any order."""
    spec = study(sampler=sampler, rest=f"seeds: {seeds}\n")
    kept = OptunaStudy(spec)
    suggestions, results, rows = [], {}, []
    for number in range(16):
        what = (
            chance.choice(["begins", "begins", "reports", "ends", "ends"])
            if suggestions
            else "begins"
        )
        if what == "begins":
            seconds = [one for one in suggestions if one.seed == 0 and chance.random() < 0.3]
            first = seconds[0] if seconds else None
            if first and sum(one.arm == first.arm for one in suggestions) < seeds:
                config = spec.trial.model_validate(first.config)
                new = suggestion(number, config, seed=1, params=first.params)
            else:
                proposal = kept.ask(number)
                new = suggestion(number, proposal.config, params=proposal.params)
            suggestions.append(new)
            kept.add(new)
        one = chance.choice(suggestions)
        if what != "begins":
            progress = 1.0 if what == "ends" else chance.choice([0.25, 0.5])
            value = chance.uniform(10, 20)
            rows.append(row(one, value, progress))
            kept.report(one.trial, progress, {PSNR: value})
        if what == "ends":
            lost = chance.random() < 0.2
            outcome = Outcome.FAILED if lost else chance.choice([*Outcome, *[Outcome.COMPLETE] * 5])
            results[one.trial] = result(one, outcome, failures=int(lost))
            kept.tell(results[one.trial])
        rebuilt = OptunaStudy(spec)
        rebuilt.replay(suggestions, results, collect(rows))
        assert shown(kept) == shown(rebuilt)
        assert kept._ended() == rebuilt._ended()
        assert [each[0] for each in shown(kept)] == list(range(len(shown(kept))))


def test_an_arm_that_has_ended_is_not_built_again_before_there_is_news_of_it():
    optuna_study, (one, _) = asked(study(), 2)
    optuna_study.report(one.trial, 1.0, {PSNR: 20.0})
    optuna_study.tell(result(one))

    def trials():
        return optuna_study.study().get_trials(deepcopy=False)

    (ended, runs), (ended_again, runs_again) = trials(), trials()
    assert ended_again is ended and runs_again is not runs
    optuna_study.add(suggestion(2, study().trial.model_validate(one.config), 1, params=one.params))
    assert trials()[0] is not ended


@pytest.mark.parametrize("name", LEARNING)
def test_the_search_learns(name):
    scores = []
    for sampler in (soon(name, 8), "random"):
        spec = study(sampler=sampler)
        suggestions, _ = run(spec, 40)
        late = [score(spec.trial.model_validate(one.config)) for one in suggestions[20:]]
        scores.append(sum(late) / len(late))
    learnt, chance = scores
    assert learnt > chance + 0.5


def test_a_gaussian_process_is_fitted_once_for_a_question(monkeypatch):
    """Where one of nine arms is left, so that proposals are nearly always known."""
    suggestions, brain = run(study(SMALL, soon("gp", 4)), 8)
    fitted = []

    def fit(self, *given, real=GPSampler.sample_relative):
        fitted.append(given)
        return real(self, *given)

    monkeypatch.setattr(GPSampler, "sample_relative", fit)
    assert arm_id(brain.ask(8).config) not in {one.arm for one in suggestions}
    assert len(fitted) == 1


def test_the_number_of_the_question_changes_the_answer():
    optuna_study = OptunaStudy(study(sampler="random"))
    assert optuna_study.ask(0) == optuna_study.ask(0)
    assert optuna_study.ask(0) != optuna_study.ask(1)


def asked(spec, count):
    optuna_study = OptunaStudy(spec)
    trials = []
    for number in range(count):
        proposal = optuna_study.ask(number)
        trials.append(suggestion(number, proposal.config, params=proposal.params))
        optuna_study.add(trials[-1])
    return optuna_study, trials


def states(optuna_study):
    return [trial.state for trial in optuna_study.study().trials]


def test_what_is_running_is_shown_as_running_with_its_rungs():
    optuna_study, (one,) = asked(study(), 1)
    optuna_study.report(one.trial, 0.25, {"pretrain/probe_psnr": 17.0, "pretrain/loss": 3.0})
    (trial,) = optuna_study.study().trials
    assert trial.state == TrialState.RUNNING
    assert trial.params == one.params
    assert trial.intermediate_values == {0: 17.0}


def test_a_stopped_arm_is_pruned_and_its_value_is_never_final():
    optuna_study, (one,) = asked(study(), 1)
    optuna_study.report(one.trial, 0.25, {"pretrain/probe_psnr": 17.0})
    optuna_study.report(one.trial, 0.5, {"pretrain/probe_psnr": 18.0})
    optuna_study.tell(result(one, Outcome.STOPPED))
    (trial,) = optuna_study.study().trials
    assert (trial.state, trial.values) == (TrialState.PRUNED, None)
    assert trial.intermediate_values == {0: 17.0, 1: 18.0}
    assert optuna_study.study().get_trials(states=[TrialState.COMPLETE]) == []


def test_a_stopped_arm_is_not_on_the_pareto_front():
    optuna_study, (one, other) = asked(study(objectives=TWO), 2)
    optuna_study.report(
        one.trial, 1.0, {"pretrain/probe_psnr": 99.0, "pretrain/planned_flops": 1.0}
    )
    optuna_study.tell(result(one, Outcome.STOPPED))
    optuna_study.report(
        other.trial, 1.0, {"pretrain/probe_psnr": 9.0, "pretrain/planned_flops": 9.0}
    )
    optuna_study.tell(result(other))
    assert [trial.params for trial in optuna_study.study().best_trials] == [other.params]


@pytest.mark.parametrize(
    "outcome", [Outcome.DIVERGED, Outcome.OUT_OF_MEMORY, Outcome.FAILED]
)  # fmt: skip
def test_an_arm_that_ended_badly_repels_whatever_it_measured_before(outcome):
    optuna_study, (one,) = asked(study(), 1)
    optuna_study.report(one.trial, 0.5, {"pretrain/probe_psnr": 99.0})
    optuna_study.tell(result(one, outcome, "bang"))
    (trial,) = optuna_study.study().trials
    assert (trial.state, trial.values) == (TrialState.PRUNED, None)
    assert trial.intermediate_values == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize(("name", "objectives"), NAMES_AND_OBJECTIVES)
def test_a_value_that_is_not_finite_is_never_complete_and_the_search_goes_on(
    name, value, objectives
):
    spec = study(SMALL, name, objectives)
    optuna_study, (one,) = asked(spec, 1)
    values = {} if value is None else {"pretrain/probe_psnr": value, "pretrain/planned_flops": 1.0}
    for progress in (0.25, 1.0):
        optuna_study.report(one.trial, progress, values)
    assert states(optuna_study) == [TrialState.RUNNING]
    optuna_study.tell(result(one))
    assert states(optuna_study) == [TrialState.PRUNED]
    assert optuna_study.study().trials[0].intermediate_values == {}
    assert optuna_study.ask(1) is not None


def test_failures_of_the_infrastructure_are_never_shown():
    optuna_study, (one, other) = asked(study(), 2)
    optuna_study.tell(result(one, Outcome.FAILED, "node lost", failures=1))
    assert states(optuna_study) == [TrialState.RUNNING]
    assert optuna_study.study().trials[0].params == other.params
    assert arm_id(optuna_study.ask(0).config) != one.arm  # but the arm is known


def test_an_arm_is_told_the_mean_of_its_seeds_when_all_are_in():
    spec = study(rest="seeds: 2\n")
    optuna_study, (one,) = asked(spec, 1)
    config = spec.trial.model_validate(one.config)
    second = suggestion(1, config, seed=1, params=one.params)
    optuna_study.report(one.trial, 1.0, {"pretrain/probe_psnr": 20.0})
    optuna_study.tell(result(one))
    assert states(optuna_study) == [TrialState.RUNNING]
    optuna_study.add(second)
    optuna_study.report(second.trial, 1.0, {"pretrain/probe_psnr": 23.0})
    optuna_study.tell(result(second))
    (trial,) = optuna_study.study().trials
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [21.5])


def test_one_stopped_seed_stops_the_arm():
    spec = study(rest="seeds: 2\n")
    optuna_study, (one,) = asked(spec, 1)
    optuna_study.tell(result(one, Outcome.STOPPED))
    assert states(optuna_study) == [TrialState.PRUNED]


def test_the_control_is_shown_if_it_lies_in_the_space():
    for search, expected in ((WIDE, 1), ("  model.patch: {choices: [4, 16]}\n", 0)):
        spec = study(search)
        step = next_step(spec, [], {}, set(), {})
        assert isinstance(step, Start) and step.origin == "control"
        one = suggestion(0, step.config, origin="control", params=step.params)
        optuna_study = OptunaStudy(spec)
        optuna_study.replay([one], {one.trial: result(one)}, collect([row(one, 25.0)]))
        assert states(optuna_study) == [TrialState.COMPLETE] * expected
        proposals = {arm_id(optuna_study.ask(number).config) for number in range(5)}
        assert one.arm not in proposals


def test_the_value_at_a_rung_is_turned_so_that_better_is_the_objectives_better():
    cost = "[{metric: pretrain/device_seconds, goal: minimize}]"
    optuna_study, (one,) = asked(study(objectives=cost), 1)
    optuna_study.report(one.trial, 0.5, {"pretrain/probe_psnr": 18.0})
    assert optuna_study.study().trials[0].intermediate_values == {1: -18.0}


def test_confirmations_and_the_controls_twins_are_not_shown():
    spec = study()
    optuna_study, (one,) = asked(spec, 1)
    config = spec.trial.model_validate(one.config)
    optuna_study.tell(result(one))
    optuna_study.report(one.trial, 1.0, {"pretrain/probe_psnr": 20.0})
    optuna_study.add(suggestion(1, config, seed=1, origin="confirm", params=one.params))
    optuna_study.add(suggestion(2, spec.trial, origin="control:frozen"))
    (trial,) = optuna_study.study().trials
    assert trial.values == [20.0]


def test_the_grid_is_walked_in_order_without_the_arms_that_are_known():
    spec = study(SMALL, "grid")
    control = suggestion(0, spec.trial, origin="control")
    optuna_study = OptunaStudy(spec)
    optuna_study.add(control)
    seen = []
    while (proposal := optuna_study.ask(len(seen))) is not None:
        seen.append(tuple(proposal.params.values()))
        optuna_study.add(suggestion(len(seen), proposal.config, params=proposal.params))
    full = [(patch, ratio) for patch in (4, 8, 16) for ratio in (0.25, 0.5, 0.75)]
    assert seen == [cell for cell in full if cell != (8, 0.75)]


def test_a_wide_space_is_never_exhausted_by_a_sampler_that_repeats_itself(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "random", lambda *_: optuna.samplers.RandomSampler(seed=0))
    spec = study(sampler="random")
    suggestions, _ = run(spec, 3)
    assert len({one.arm for one in suggestions}) == 3


# --- where everything fails ---

RANGES = {
    "patch": CategoricalDistribution([4, 8, 16]),
    "rate": FloatDistribution(1e-4, 1e-1, log=True),
    "depth": IntDistribution(1, 9),
}


def arm(patch=8, rate=1e-3, depth=5):
    return {"patch": patch, "rate": rate, "depth": depth}


@pytest.mark.parametrize(
    ("failed", "others", "doomed", "hopeful"),
    [
        # one choice, wherever else it lies
        (
            [arm(4), arm(4, 1e-1), arm(4, depth=9)],
            [arm(8), arm(16)],
            [arm(4, 1e-4), arm(4, depth=1)],
            [arm(8), arm(16, 1e-1)],
        ),
        # the end of a range
        (
            [arm(8, 3e-2), arm(4, 9e-2), arm(16, 5e-2)],
            [arm(8, 2e-2), arm(4), arm(16, 1e-2)],
            [arm(8, 9.5e-2), arm(4, 9e-2)],
            [arm(8, 2e-2), arm(8, 1e-4)],
        ),
        # neither alone: a patch of 4 with many layers
        (
            [arm(4, depth=9), arm(4, depth=8), arm(4, 2e-3, depth=9)],
            [arm(4, depth=1), arm(8, depth=9), arm(4, 2e-3, depth=2), arm(16, 1e-1)],
            [arm(4, 1.5e-3, depth=9)],
            [arm(4, depth=2), arm(8, depth=9)],
        ),
    ],
)
def test_what_is_like_nothing_but_failures_is_doomed(failed, others, doomed, hopeful):
    ended = [(one, True) for one in failed] + [(one, False) for one in others]
    assert all(is_doomed(one, ended, RANGES) for one in doomed)
    assert not any(is_doomed(one, ended, RANGES) for one in hopeful)


def test_two_failures_doom_nothing():
    ended = [(arm(4), True), (arm(4, 1e-1), True), (arm(8), False)]
    assert not is_doomed(arm(4), ended, RANGES)


@pytest.mark.parametrize(("name", "instances", "runs"), [("tpe", 3, 45), ("gp", 1, 33)])
def test_a_third_of_the_space_that_always_fails_is_left_alone(name, instances, runs):
    """Chance would go there in every third trial."""
    late = []
    for instance in range(instances):
        landscape = dead(instance)
        sampler = {"sampler": TypeAdapter(Sampler).validate_python(name), "seed": instance}
        searcher = Ours(landscape.spec.model_copy(update=sampler))
        play(searcher, landscape, runs=runs, workers=4)
        late += [each.params["model.patch"] for each in searcher.suggestions[20:]]
    assert len(late) > 6 * instances
    assert late.count(4) <= 0.15 * len(late)


@pytest.mark.parametrize(("goal", "turned"), [("maximize", 1), ("minimize", -1)])
def test_samplers_that_see_values_alone_are_told_likely_ones_of_what_was_stopped(goal, turned):
    metric = {"maximize": "probe_psnr", "minimize": "device_seconds"}[goal]
    objective = f"[{{metric: pretrain/{metric}, goal: {goal}}}]"
    text = study(sampler="gp", objectives=objective).text.replace(PSNR, f"pretrain/{metric}")
    optuna_study, arms = asked(parse_spec(text, Path(), where="s.yaml"), 7)
    name = f"pretrain/{metric}"
    for one, early in zip(arms[:6], (1.0, 2.0, 3.0, 0.5, 2.9, 9.0), strict=True):
        optuna_study.report(one.trial, 0.25, {name: turned * early})
    for one, final in zip(arms[:3], (10.0, 20.0, 30.0), strict=True):
        optuna_study.report(one.trial, 1.0, {name: turned * final})
        optuna_study.tell(result(one))
    for one in arms[3:5]:
        optuna_study.tell(result(one, Outcome.STOPPED))
    optuna_study.tell(result(arms[5], Outcome.DIVERGED))
    trials = optuna_study.study().trials
    # on a line of 10 a unit, no better than the median; the worst; one still runs
    found = [turned * trial.values[0] for trial in trials[3:6]]
    assert found == pytest.approx([5.0, 20.0, 10.0])
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6 + [TrialState.RUNNING]


def test_samplers_that_see_values_alone_are_told_the_worst_of_what_failed():
    optuna_study, (one, two, bad) = asked(study(sampler="gp"), 3)
    optuna_study.tell(result(bad, Outcome.OUT_OF_MEMORY))
    told = []
    for suggestion, value in ((one, 17.0), (two, 12.0)):
        optuna_study.report(suggestion.trial, 1.0, {"pretrain/probe_psnr": value})
        optuna_study.tell(result(suggestion))
        told.append([trial.values for trial in optuna_study.study().trials])
    assert told == [[[17.0], None, [17.0]], [[17.0], [12.0], [12.0]]]


# --- evolution ---


@pytest.mark.parametrize("name", ["nsga-ii", "nsga-iii"])
def test_of_two_objectives_each_cost_gets_its_best_arms(name):
    """Small patches score and cost more; of each, the ratio of .6 is the best."""

    def far_off(sampler):
        spec = study("  masking.ratio.value: {low: 0.1, high: 0.9}\n" + SMALL.split("\n")[0] + "\n",
                     sampler, TWO)  # fmt: skip
        late = run(spec, 60)[0][30:]
        patches = {one.params["model.patch"] for one in late}
        return patches, fmean(abs(one.params["masking.ratio.value"] - 0.6) for one in late)

    patches, off = far_off(name)
    assert patches == {4, 8, 16}
    assert off < 0.5 * far_off("random")[1]


def test_a_child_has_what_its_parents_have():
    """Of two arms, one under each label: whichever it takes, what lies there is a parent's."""
    spec = study(sampler="{name: nsga-ii, startup: 2}")
    optuna_study, arms = asked(spec, 2)
    for one in arms:
        optuna_study.report(one.trial, 1.0, {PSNR: 20.0})
        optuna_study.tell(result(one))
    one, other = (each.params for each in arms)
    assert {one["masking.ratio"], other["masking.ratio"]} == {"constant", "rising"}
    proposals = [optuna_study.ask(number).params for number in range(2, 42)]
    known = [
        child[name] in {parent.get(name) for parent in (one, other)}
        for child in proposals
        for name in child
        if "/" in name or name == "model.patch"
    ]
    assert fmean(known) > 0.6  # but for mutations
    assert len({json.dumps(child) for child in proposals}) > 30


def test_what_the_first_arms_say_is_where_cma_es_begins():
    spec = study("  masking.ratio.value: {low: 0.1, high: 0.9}\n", "{name: cma-es, startup: 4}")
    optuna_study, arms = asked(spec, 4)
    best = max(arms, key=lambda each: each.params["masking.ratio.value"])
    for one in arms:
        optuna_study.report(one.trial, 1.0, {PSNR: one.params["masking.ratio.value"]})
        optuna_study.tell(result(one))
    found = [optuna_study.ask(number).params["masking.ratio.value"] for number in range(4, 44)]
    second = sorted(each.params["masking.ratio.value"] for each in arms)[-2]
    middle = 0.8042 * best.params["masking.ratio.value"] + 0.1958 * second
    assert fmean(found) == pytest.approx(middle, abs=0.08)


@pytest.mark.parametrize(
    "distribution",
    [
        FloatDistribution(1e-4, 1.0, log=True),
        FloatDistribution(-1.0, 3.0),
        FloatDistribution(0.25, 0.75, step=0.25),
        IntDistribution(1, 4),
        IntDistribution(2, 10, step=4),
        IntDistribution(1, 64, log=True),
    ],
)
def test_a_number_has_a_share_at_which_it_lies(distribution):
    for share in (0.0, 0.1, 0.37, 0.5, 0.99, 1.0):
        value = samplers.value_at(distribution, share)
        back = samplers.share_of(distribution, value)
        assert 0 <= back <= 1
        assert samplers.value_at(distribution, back) == pytest.approx(value)


# --- points that are spread out evenly ---


def test_quasi_random_arms_are_spread_out_more_evenly_than_random_ones():
    def gaps(name, number):
        search = "  masking.ratio.value: {low: 0.1, high: 0.9}\n"
        suggestions, _ = run(study(search, name, rest=f"seed: {number}\n"), 16)
        ratios = sorted(one.params["masking.ratio.value"] for one in suggestions)
        return max(b - a for a, b in itertools.pairwise([0.1, *ratios, 0.9]))

    # sixteen points of a net: one in each sixteenth, so no two are two sixteenths apart
    assert max(gaps("quasi-random", number) for number in range(3)) <= 2 * 0.8 / 16 + 1e-9
    assert max(gaps("random", number) for number in range(3)) > 2 * 0.8 / 16


def test_every_choice_and_label_gets_its_share_of_quasi_random_arms():
    suggestions, _ = run(study(sampler="quasi-random"), 48)
    for name, share in (("model.patch", 16), ("masking.ratio", 24)):
        counts = Counter(one.params[name] for one in suggestions)
        assert all(abs(count - share) <= 2 for count in counts.values())


@pytest.mark.parametrize("name", LEARNING)
def test_the_first_arms_of_a_sampler_that_learns_are_quasi_random(name):
    def first(sampler):
        return [one.params for one in run(study(sampler=sampler), 5)[0]]

    learning, even = first(soon(name, 4)), first("quasi-random")
    assert learning[:4] == even[:4] and learning[4] != even[4]


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (CategoricalDistribution(["a", "b", "c"]), ["a", "a", "b", "c", "c"]),
        (FloatDistribution(1e-4, 1.0, log=True), [1e-4, 10**-3.2, 1e-2, 10**-0.4, 1.0]),
        (FloatDistribution(0.0, 1.0), [0.0, 0.2, 0.5, 0.9, 1.0]),
        (FloatDistribution(0.25, 0.75, step=0.25), [0.25, 0.25, 0.5, 0.75, 0.75]),
        (IntDistribution(1, 4), [1, 1, 3, 4, 4]),
    ],
)
def test_a_share_of_a_distribution_is_the_value_below_which_so_much_of_it_lies(
    distribution, values
):
    found = [samplers.value_at(distribution, share) for share in (0.0, 0.2, 0.5, 0.9, 1 - 1e-12)]
    exact = isinstance(values[0], str)
    assert found == values if exact else found == pytest.approx(values)


# --- what the author believes of the first arms ---


@pytest.mark.parametrize(
    ("distribution", "prior", "values"),
    [
        (  # up to 4/7 and 6/7
            CategoricalDistribution([4, 8, 16]),
            [4, 2, 1],
            {0.0: 4, 0.571: 4, 0.572: 8, 0.857: 8, 0.858: 16, 1 - 2**-53: 16},
        ),
        # cut off at two deviations: (.15866 - .02275) / .95450 lies below one deviation less
        (FloatDistribution(0.0, 1.0), 0.5, {0.0: 0.0, 0.14239: 0.25, 0.5: 0.5, 0.85761: 0.75}),
        (FloatDistribution(1e-4, 1.0, log=True), 1e-2, {0.14239: 1e-3, 0.5: 1e-2, 0.85761: 0.1}),
        # at an end it is half of one: half of that lies within .6745 deviations
        (FloatDistribution(0.0, 4.0), 0.0, {0.0: 0.0, 0.5: 0.6745}),
        # around .375: .24173, .38292, .24173 and .06060 of .92698
        (IntDistribution(1, 4), 2, {0.260: 1, 0.262: 2, 0.673: 2, 0.675: 3, 0.934: 3, 0.936: 4}),
    ],
)
def test_a_share_of_a_prior_is_the_value_below_which_so_much_of_it_lies(
    distribution, prior, values
):
    found = {share: samplers.believed_at(distribution, share, prior) for share in values}
    assert found == pytest.approx(values, rel=1e-4, abs=1e-9)


BELIEVED = WIDE.replace("[4, 8, 16]}", "[4, 8, 16], prior: [4, 2, 1]}").replace(
    "{low: 0.1, high: 0.9}", "{low: 0.1, high: 0.9, prior: 0.3}"
)


@pytest.mark.parametrize("name", LEARNING)
def test_the_first_arms_lie_where_the_author_believes_and_no_others(name):
    begun = study(sampler=soon(name, 28))
    believing = study(BELIEVED, soon(name, 28))
    arms = asked(believing, 28)[1]
    patches = Counter(each.params["model.patch"] for each in arms)
    assert [round(patches[patch] / 4) for patch in (4, 8, 16)] == [4, 2, 1]
    ratio = "masking.ratio/constant.value"
    values = [each.params[ratio] for each in arms if ratio in each.params]
    # normal around .3, one deviation is .2: median .347 of what lies from .1 to .9
    assert fmean(value < 0.347 for value in values) == pytest.approx(0.5, abs=0.1)

    def next_of(spec):
        optuna_study = OptunaStudy(spec)
        for number, one in enumerate(arms):
            optuna_study.add(one)
            optuna_study.report(one.trial, 1.0, {PSNR: 20.0 + number})
            optuna_study.tell(result(one))
        return optuna_study.ask(28).params

    assert next_of(believing) == next_of(begun)


def test_equal_weights_are_no_belief():
    alike = WIDE.replace("[4, 8, 16]}", "[4, 8, 16], prior: [0.5, 0.5, 0.5]}")
    first, second = (
        [each.params for each in asked(study(search), 4)[1]] for search in (alike, WIDE)
    )
    assert first == second
