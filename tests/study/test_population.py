"""Schedules found while training, without Ray.  pytest tests/study/test_population.py"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from study import requests
from study.conductor import Conductor, DataView
from study.contest import searcher_of
from study.environment import DEFAULTS
from study.fit import DataSize
from study.folder import StudyFolder
from study.ledger import Ledger, Outcome, Suggestion, read_results, read_rows, read_suggestions
from study.loading import parse_spec
from study.plan import plan
from study.resume import num_planned
from study.spec import StudySpec
from study.steps import Finished, Wait
from trainables.config import TrialConfig
from trainables.data import DataConfig, open_dataset, prepare
from trainables.endings import Ending
from trainables.errors import UserError
from trainables.job import run_job
from trainables.metrics import STOPPED_HERE

torch.set_num_threads(1)

TEXT = """\
study: pop
data: {source: smears, size: 32, images: 16, val: 4, seed: 1}
trial:
  model: {size: pico, patch: 8, decoder: {depth: 1, width: 64}}
  masking: {ratio: {name: constant, value: 0.75}}
  pretrain: {epochs: 4, batch: 8, precision: fp32}
  segment: {epochs: 1, batch: 8}
search:
  masking.ratio.value: {low: 0.1, high: 0.9}
objectives: [pretrain/probe_psnr]
sampler: {name: pbt, population: 4}
controls: []
rungs: [0.25, 0.5, 1.0]
budget: {trials: 5}
"""
PATH = "masking.ratio.value"
DATA = DataView(Path(), "f" * 64, is_labelled=False)
Values = Callable[[Suggestion, int], float | None]  # at a rung; None: the trial diverges


class Killed(BaseException):
    """The driver ends here."""


def parse(text: str = TEXT, *changes: tuple[str, str]) -> StudySpec:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_spec(text, Path(), where="s.yaml")


def rows(progress: float, psnr: float) -> list[dict[str, Any]]:
    row = {"phase": "pretrain", "step": round(100 * progress), "epoch": 4 * progress}
    row |= {"progress": progress, "metric": "probe_psnr", "value": psnr, "goal": "maximize"}
    return [row | {"unit": "dB", "seconds": 1.0}]


def play(
    spec: StudySpec,
    folder: StudyFolder,
    values: Values,
    *,
    workers: int = 1,
    order: int = 0,
    dies_after: int | None = None,
    saved: dict[str, int] | None = None,
) -> list[Suggestion]:
    """Drive the study with pretended workers, who arrive in an order by chance.

    `dies_after` so many events the driver is killed; `saved` then is what the workers' checkpoints
    hold, trial -> rung.
    """
    chance, count = random.Random(order), itertools.count(1)
    saved = {} if saved is None else saved

    def event() -> None:
        if next(count) == dies_after:
            raise Killed

    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        running: dict[str, tuple[Suggestion, int]] = {}
        while True:
            step: Any = None
            while len(running) < workers and isinstance(step := conductor.next(), Suggestion):
                event()
                born = step.born or {"progress": 0.0}
                first = spec.rungs.index(born["progress"]) if born["progress"] else 0
                running[step.trial] = step, saved.get(step.trial, first)
            if not running:
                assert isinstance(step, Finished)
                return conductor.suggestions
            suggestion, rung = running.pop(chance.choice(sorted(running)))
            value = values(suggestion, rung)
            if value is None:
                conductor.done(suggestion, Ending.DIVERGED, None)
                continue
            leaves = conductor.rows(suggestion, rows(spec.rungs[rung], value), "a")
            event()
            saved[suggestion.trial] = rung
            if leaves:
                conductor.done(suggestion, Ending.STOPPED, None)
            elif rung == len(spec.rungs) - 1:
                conductor.done(suggestion, Ending.COMPLETE, None)
            else:
                running[suggestion.trial] = suggestion, rung + 1
            event()


def by_chance(suggestion: Suggestion, rung: int) -> float:
    return zlib.crc32(f"{suggestion.arm}/{rung}".encode()) / 2**32


def level(suggestion: Suggestion) -> float:
    return float(suggestion.params[PATH])


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "pop")


def test_at_every_rung_the_worst_makes_room_for_a_child_of_the_best(folder: StudyFolder) -> None:
    """Numbers: control; four founders; then one child at each of two rungs."""
    told = {1: [3, 5, 5], 2: [1], 3: [4, 9, 9], 4: [2, 2], 5: [None, 7, 7], 6: [None, None, 8]}

    def values(suggestion: Suggestion, rung: int) -> float:
        value = told.get(suggestion.number, [9, 9, 9])[rung]
        return 99.0 if value is None else value  # the parent's, told again

    control, one, two, three, four, five, six = play(parse(), folder, values)
    assert (control.origin, control.born) == ("control", None)
    founders = [one, two, three, four]
    assert [each.born for each in founders] == [{"parent": None, "progress": 0.0}] * 4
    assert sorted(int((level(each) - 0.1) / 0.2) for each in founders) == [0, 1, 2, 3]  # spread out
    assert five.born == {"parent": three.trial, "progress": 0.25}
    assert six.born == {"parent": three.trial, "progress": 0.5}
    for child, turn in ((five, 0.25), (six, 0.5)):
        assert child.config["masking"]["ratio"] == {
            "name": "step",
            "values": [level(three), level(child)],
            "at": [turn],
        }
        assert child.seed == three.seed == 0
    ends = {suggestion.number: read_results(folder)[suggestion.trial] for suggestion in (
        control, *founders, five, six)}  # fmt: skip
    stopped = {number for number, end in ends.items() if end.outcome is Outcome.STOPPED}
    assert stopped == {2, 4}
    assert (ends[2].progress, ends[4].progress) == ({"pretrain": 0.25}, {"pretrain": 0.5})
    assert set(read_rows(folder, two.trial).metric) == {"probe_psnr", STOPPED_HERE}
    kept = read_rows(folder, five.trial)  # not what was its parent's
    assert kept.progress.tolist() == [0.5, 1.0] and 99.0 not in kept.value.tolist()


def test_a_line_of_children_keeps_the_whole_history(folder: StudyFolder) -> None:
    def values(suggestion: Suggestion, rung: int) -> float:
        return suggestion.number * 10 + rung  # the youngest is always the best

    played = play(parse(), folder, values)
    last = played[-1]
    parent = next(each for each in played if each.trial == (last.born or {})["parent"])
    assert (parent.born or {})["progress"] == 0.25
    founder = next(each for each in played if each.trial == (parent.born or {})["parent"])
    assert last.config["masking"]["ratio"] == {
        "name": "step",
        "values": [level(founder), level(parent), level(last)],
        "at": [0.25, 0.5],
    }


EIGHT = (
    ("population: 4", "population: 8"),
    ("trials: 5", "trials: 9"),
    ("[0.25, 0.5, 1.0]", "[0.25, 0.5, 0.75, 1.0]"),
)


def test_a_child_changes_its_parents_value_by_a_fifth_or_draws_it_anew(folder: StudyFolder) -> None:
    spec = parse(TEXT, *EIGHT, ("population: 8", "population: 8, resample: 0.5"))
    played = {one.trial: one for one in play(spec, folder, by_chance)}
    children = [one for one in played.values() if one.born and one.born["parent"]]
    assert len(children) == 6  # two of eight, at three rungs
    pairs = [(level(one), level(played[(one.born or {})["parent"]])) for one in children]
    assert all(0.1 <= value <= 0.9 and value != before for value, before in pairs)
    changed = [
        any(abs(value - min(0.9, before * factor)) < 1e-3 for factor in (0.8, 1.2))
        for value, before in pairs
    ]
    assert 1 <= sum(changed) < len(children)


@pytest.mark.parametrize("workers", [3, 9])
def test_what_is_found_does_not_depend_on_who_comes_first(tmp_path: Path, workers: int) -> None:
    spec = parse(TEXT, *EIGHT)
    first, other = StudyFolder(tmp_path / "one"), StudyFolder(tmp_path / "many")
    play(spec, first, by_chance)
    play(spec, other, by_chance, workers=workers, order=5)
    assert read_suggestions(first) == read_suggestions(other)
    ends = [{trial: one.outcome for trial, one in read_results(each).items()}
            for each in (first, other)]  # fmt: skip
    assert ends[0] == ends[1]


def test_a_study_that_is_killed_anywhere_finds_what_it_would_have_found(tmp_path: Path) -> None:
    spec = parse()
    whole = StudyFolder(tmp_path / "whole")
    expected = play(spec, whole, by_chance)
    for moment in range(1, 50, 4):
        folder, saved = StudyFolder(tmp_path / f"{moment}"), dict[str, int]()
        with pytest.raises(Killed):
            play(spec, folder, by_chance, workers=2, dies_after=moment, saved=saved)
        assert play(spec, folder, by_chance, workers=2, saved=saved) == expected
        assert {t: one.outcome for t, one in read_results(folder).items()} == {
            t: one.outcome for t, one in read_results(whole).items()
        }
        kept = [read_rows(each).drop(columns=["study", "seconds"]) for each in (folder, whole)]
        kept = [each.sort_values(["trial", "step", "metric"]).reset_index(drop=True)
                for each in kept]  # fmt: skip
        assert kept[0].equals(kept[1])


def test_who_fails_is_replaced_at_the_next_rung(folder: StudyFolder) -> None:
    def values(suggestion: Suggestion, rung: int) -> float | None:
        return None if suggestion.number in (2, 3) and rung == 1 else suggestion.number

    played = play(parse(), folder, values)
    # at the first rung 1 is the worst; 2 and 3 fail before the second, and nobody else is stopped
    births = [(one.born or {})["progress"] for one in played if one.born and one.born["parent"]]
    assert births == [0.25, 0.5, 0.5]
    ends = [read_results(folder)[one.trial].outcome for one in played]
    assert ends[1:4] == [Outcome.STOPPED, Outcome.DIVERGED, Outcome.DIVERGED]
    assert ends[4:] == [Outcome.COMPLETE] * 4


def test_a_population_of_which_all_fail_has_no_children(folder: StudyFolder) -> None:
    played = play(parse(), folder, lambda one, rung: None if one.number else 1.0)
    assert len(played) == 5


def test_members_wait_for_each_other_and_children_for_their_parents(folder: StudyFolder) -> None:
    spec = parse()
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        control, *founders = (conductor.next() for _ in range(5))
        assert isinstance(conductor.next(), Wait)
        assert isinstance(control, Suggestion)
        conductor.done(control, Ending.COMPLETE, None)
        for place, founder in enumerate(founders):
            assert isinstance(founder, Suggestion)
            assert conductor.rows(founder, rows(0.25, float(place)), "a")
            if founder is not founders[-1]:
                conductor.done(founder, Ending.STOPPED, None)
                assert founder.trial not in read_results(folder)  # it rests
            # the last one's checkpoint is not on the disk yet
            assert isinstance(conductor.next(), Wait)
        last = founders[-1]
        assert isinstance(last, Suggestion)
        conductor.done(last, Ending.STOPPED, None)
        child = conductor.next()
        assert isinstance(child, Suggestion) and child.born == {
            "parent": last.trial,
            "progress": 0.25,
        }
        assert [conductor.next() for _ in range(3)] == founders[1:]
        assert isinstance(conductor.next(), Wait)


def test_what_is_found_is_what_its_schedule_gives_from_the_start(
    folder: StudyFolder, tmp_path: Path
) -> None:
    """Through real training: a child's rows and encoder are those of its configuration alone."""
    text = TEXT.replace("[0.25, 0.5, 1.0]", "[0.5, 1.0]").replace("epochs: 4", "epochs: 2")
    text += "confirm: {arms: 1, seeds: 1}\n"
    spec = parse(text)
    config: DataConfig = spec.data
    cache = prepare(config, Path(), tmp_path / "cache", lambda *_: None)
    data = DataView(Path(), cache.name, is_labelled=True)
    assert len(open_dataset(cache).rows("pretrain")) >= 16

    first_steps: dict[str, float] = {}  # folder -> share of pretraining done after them

    def train(job: dict[str, Any], report: Callable[[list[dict[str, Any]]], bool]) -> Ending:
        return run_job(
            job,
            device=torch.device("cpu"),
            rank=0,
            world_size=1,
            attempt=job["attempt"],
            report=report,
            heartbeat=lambda phase, share, _: first_steps.setdefault(job["folder"], share),
            saved=lambda _: None,
            alive=lambda: None,
            is_leaving=lambda *_: False,
            tell=lambda _: None,
        )

    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(text, {"defaults": DEFAULTS})
        conductor = Conductor(spec, ledger, data)
        while isinstance(suggestion := conductor.next(), Suggestion):
            job = conductor.job(suggestion)
            report = partial(conductor.rows, suggestion, attempt=job["attempt"])
            conductor.done(suggestion, train(job, report), None)
        (child,) = [one for one in conductor.suggestions if one.born and one.born["parent"]]
        scratch: list[dict[str, Any]] = []
        job = conductor.job(child)
        assert first_steps[job["folder"]] == 0.75  # the third of four
        job["folder"] = str(tmp_path / "scratch")
        train(job, lambda told: bool(scratch.extend(told)))
    assert read_results(folder)[child.trial].outcome is Outcome.COMPLETE
    half = scratch[0]["step"]
    assert first_steps[str(tmp_path / "scratch")] == 0.25
    clocked = ("images_per_second", "device_seconds", "peak_memory")
    expected = {
        (row["phase"], row["step"], row["metric"]): row["value"]
        for row in scratch
        if row["metric"] not in clocked and (row["phase"], row["step"]) != ("pretrain", half)
    }
    found = read_rows(folder, child.trial)
    found = found[~found.metric.isin(clocked)]
    keys = zip(found.phase, found.step, found.metric, strict=True)
    assert dict(zip(keys, found.value, strict=True)) == expected
    name = "encoder/encoder.safetensors"
    ours = folder.trial(child.trial) / name
    assert ours.read_bytes() == (tmp_path / "scratch" / name).read_bytes()
    confirmed = [one for one in conductor.suggestions if one.origin == "confirm"]
    assert [(one.seed, one.born) for one in confirmed] == [(1, None)] * 2


def test_the_plan_says_what_the_budget_counts() -> None:
    spec = parse(TEXT, *EIGHT)
    size = DataSize((32, 32), 3, 16, 8, 4, (), {})
    found = plan(spec, size, cpus=2, gpus=0)
    assert (found.trials, found.searched_arms, found.children) == (9, 8, 6)
    assert found.describe()["population"] == (
        "8 trials' worth of training; the ledger will have 14, as 6 go on where a better one "
        "stands and take the place of a worse one"
    )
    assert num_planned(spec) == 15
    far = parse(TEXT, *EIGHT, ("budget:", "storage: s3://bucket\nbudget:"))
    # two at each of .25, .5 and .75
    assert "3 trials' worth of pretraining more" in plan(far, size, cpus=2, gpus=0).warnings[-1]
    assert not plan(spec, size, cpus=2, gpus=0).warnings
    assert "population" not in plan(parse(TEXT, ("{name: pbt, population: 4}", "random")), size,
                                    cpus=2, gpus=0).describe()  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("{low: 0.1, high: 0.9}", "{low: 0.7499, high: 0.7501}", "its range has 3 values of 4"),
        ("trials: 5", "flops: 1.0e12", "budget: given flops; expected trials alone with samp"),
        ("trials: 5", "trials: 40", "budget.trials: given 40; expected 5: the control arm, 0 of"),
        ("{low: 0.1, high: 0.9}", "{choices: [0.1, 0.9]}", f"search.{PATH}: given with sampler pb"),
        ("{low: 0.1, high: 0.9}", "{low: 0.1, high: 0.9, step: 0.2}", "expected a range of fracti"),
        (PATH + ": {low: 0.1, high", "pretrain.optimizer.weight_decay: {low: 0.1, high",
         "expected the `value` of a constant schedule, such as masking.ratio.value"),
        ("budget:", "stopping: median\nbudget:", "stopping: given median; expected none, as"),
        ("budget:", "seeds: 3\nbudget:", "seeds: given 3; expected 1 with sampler pbt"),
        ("[0.25, 0.5, 1.0]", "[1.0]", "rungs: given 1; expected 2 to 8"),
        ("population: 4}", "metric: segment/miou}", "sampler.metric: given 'segment/miou'; expect"),
        ("population: 4}", "metric: pretrain/probe_pnsr}", "did you mean 'pretrain/probe_psnr'?"),
    ],
)  # fmt: skip
def test_what_a_population_cannot_do_is_refused(old: str, new: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(TEXT, (old, new))
    assert told in str(caught.value)


def test_a_population_meets_at_every_eighth_unless_the_file_says_where() -> None:
    assert parse(TEXT, ("rungs: [0.25, 0.5, 1.0]\n", "")).rungs == [n / 8 for n in range(1, 9)]


def test_the_share_that_follows_a_teacher_is_found_in_the_same_way(folder: StudyFolder) -> None:
    guided = "strategy: {name: anatomask, guided: {name: constant, value: 0.3}}, ratio"
    path = "masking.strategy.guided.value"
    more = f"{PATH}: {{low: 0.1, high: 0.9}}\n  {path}: {{low: 0.0, high: 0.5}}"
    spec = parse(TEXT, ("ratio: {name", f"{guided}: {{name"),
                 (f"{PATH}: {{low: 0.1, high: 0.9}}", more))  # fmt: skip
    child = play(spec, folder, by_chance)[-1]
    masking = TrialConfig.model_validate(child.config).masking
    assert masking.strategy.options()["guided"].options()["values"][-1] == child.params[path]
    assert masking.ratio.options()["values"][-1] == child.params[PATH]


def test_a_population_is_not_extended(folder: StudyFolder) -> None:
    asked = requests.Request("r", "extend", {"trials": 3})
    answer = requests.answer_to(asked, parse(), [], [])
    assert answer.refused is not None and "trains a population" in answer.refused


def test_who_belongs_to_no_population_is_written_as_ever(folder: StudyFolder) -> None:
    control, founder, *_ = play(parse(), folder, by_chance)
    assert '"born"' not in folder.suggestion(control.number).read_text()
    assert '"born"' not in folder.trial_config(control.trial).read_text()
    assert '"born"' in folder.suggestion(founder.number).read_text()


def test_a_population_is_not_played_on_landscapes() -> None:
    with pytest.raises(UserError, match=r"given 'pbt\+none'; expected a sampler \(tpe.*grid\) and"):
        searcher_of("pbt+none")
