"""Budgets in operations and hours: kept, and the same after a driver was killed.

pytest tests/study/test_spending.py
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from study import requests
from study.conductor import Conductor, DataView
from study.console import views
from study.console.index import Index
from study.costs import Costs, Work, budget_problems, work_of
from study.fit import DataSize
from study.folder import Storage, StudyFolder
from study.ledger import (
    Ledger,
    LedgerError,
    Outcome,
    Stint,
    Suggestion,
    read_results,
    read_rows,
    read_stints,
    read_suggestions,
)
from study.loading import difference, parse_spec
from study.measured import measure
from study.plan import Plan, plan
from study.resume import account_of
from study.spec import Budget, StudySpec
from study.spending import Account, Amounts, Means, Planned, fits, in_words, line_through
from study.state import outlook_of
from study.steps import Finished
from tests.conftest import TINY_STUDY
from tests.terminal import call
from trainables.config import arm_id
from trainables.endings import Ending
from trainables.errors import UserError
from trainables.speed import Speeds

SIZE = DataSize((64, 64), 3, 100, 60, 20, ("background", "cell"), {})
DATA = DataView(Path(), "f" * 64, is_labelled=True, size=SIZE)
RUNGS = (0.5, 1.0)
SPEED = 1e9  # operations per second of a simulated worker
OVERHEAD = 20.0  # seconds of every trial


def study(budget: str, stopping: str = "none", more: str = "") -> StudySpec:
    """Arms whose operations differ tenfold: patch 4 and 16."""
    text = TINY_STUDY.replace("choices: [4, 8]", "choices: [4, 16]")
    text = text.replace("patch: 8", "patch: 4").replace(
        "{epochs: 4, batch: 8}", "{epochs: 40, batch: 80}"
    )
    text = text.replace("stopping: {name: none}", f"stopping: {stopping}\nsampler: random\n{more}")
    text = text.replace("segment/miou, goal: maximize", "segment/miou")
    text = text.replace("{trials: 4}", budget).replace("rungs:", "")
    spec = parse_spec(text, Path(), where="study.yaml")
    return spec.model_copy(update={"rungs": list(RUNGS)})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rows(phase: str, progress: float, work: Work, miou: float) -> list[dict[str, Any]]:
    flops = progress * (work.pretrain_flops if phase == "pretrain" else work.segment_flops)
    values = {"flops": flops} | ({"miou": miou} if phase == "segment" else {})
    about = {"phase": phase, "step": round(1000 * progress), "epoch": progress}
    return [
        {**about, "progress": progress, "metric": name, "value": value, "goal": "none", "unit": ""}
        | {"seconds": 1.0}
        for name, value in values.items()
    ]


class Killed(Exception):
    """The driver is gone."""


def way(work: Work) -> list[tuple[str, float, float]]:
    """(phase, rung, seconds since the rung before) of a trial."""
    found, seconds = [], OVERHEAD
    for phase, flops in [("pretrain", work.pretrain_flops), ("segment", work.segment_flops)]:
        before = 0.0
        for rung in RUNGS if flops else ():
            seconds += (rung - before) * flops / SPEED
            found.append((phase, rung, seconds))
            before, seconds = rung, 0.0
    return found


def drive(conductor: Conductor, clock: Clock, at_once: int, kill_at: float = float("inf")) -> None:
    """Workers that take as long as operations say; who hands out knows of no budget."""
    conductor.progress.console.quiet = True
    costs, order = Costs(SIZE), iter(range(10**6))
    queue: list[tuple[float, int, Suggestion, list[tuple[str, float, float]]]] = []

    def hand_out() -> None:
        while len(queue) < at_once:
            one = conductor.next()
            if not isinstance(one, Suggestion):
                return
            known = conductor.measured.get(one.trial, {})
            ahead = [
                (phase, rung, seconds)
                for phase, rung, seconds in way(costs.work(one.arm, one.config))
                if rung not in known.get(f"{phase}/flops", {})
            ]
            heapq.heappush(queue, (clock.now + ahead[0][2], next(order), one, ahead))

    hand_out()
    while queue:
        when, _, one, ((phase, rung, _), *ahead) = heapq.heappop(queue)
        if when > kill_at:
            raise Killed
        clock.now = when
        work = costs.work(one.arm, one.config)
        is_stopped = conductor.rows(one, rows(phase, rung, work, luck(one)), "a")
        if ahead and not is_stopped:
            heapq.heappush(queue, (when + ahead[0][2], next(order), one, ahead))
            continue
        conductor.done(one, Ending.STOPPED if is_stopped else Ending.COMPLETE, None)
        hand_out()
    assert isinstance(conductor.next_step(), Finished)


def luck(one: Suggestion) -> float:
    """The mIoU of a trial, by its id."""
    return 0.3 + int(one.trial[:4], 16) / 2**17


def run(spec: StudySpec, folder: StudyFolder, at_once: int, kill_at: float = float("inf")) -> Clock:
    clock = Clock()
    with Ledger.open(folder, {}) as ledger:
        drive(Conductor(spec, ledger, DATA, clock), clock, at_once, kill_at)
    return clock


def spent(folder: StudyFolder) -> Amounts:
    """As the ledger has it."""
    facts = (read_suggestions(folder), read_results(folder), set[str]())
    means = Means(read_stints(folder), Costs(SIZE))
    return account_of(*facts, measure(read_rows(folder)), means).spent


def amount_of(unit: str, at_once: int, trials: int = 27) -> float:
    """What so many trials of both patches take, rounded as people do."""
    flops = sum(map(sum, (work[2:] for work in two_works()))) / 2 * trials
    hours = (flops / SPEED + OVERHEAD * trials) / 3600
    amount = {"flops": flops, "device_hours": hours, "wall_hours": hours / at_once}[unit]
    return float(f"{amount:.2g}")


def two_works() -> list[Work]:
    """Of patch 4 and 16."""
    trial = study("{trials: 4}").trial
    models = [trial.model.model_copy(update={"patch": patch}) for patch in (4, 16)]
    return [work_of(trial.model_copy(update={"model": model}), SIZE) for model in models]


@pytest.mark.parametrize("stopping", ["none", "{name: halving, metric: segment/miou}"])
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("unit", ["flops", "device_hours", "wall_hours"])
def test_a_budget_is_kept_within_a_twentieth_though_a_driver_is_killed(
    unit: str, at_once: int, stopping: str, tmp_path: Path
) -> None:
    """Of a study of twenty trials and more, whose arms' costs differ tenfold."""
    dear, cheap = (sum(work[2:]) for work in two_works())
    assert dear > 10 * cheap
    amount, folder = amount_of(unit, at_once), StudyFolder(tmp_path / "tiny")
    spec = study(f"{{{unit}: {amount!r}}}", stopping)
    middle = amount_of("wall_hours", at_once) / 2 * 3600
    with pytest.raises(Killed):
        run(spec, folder, at_once, middle)
    before = spent(folder)
    ended = run(spec, folder, at_once).now
    found = spent(folder)
    assert 0.95 < getattr(found, unit) / amount < 1.05
    assert len(read_suggestions(folder)) >= 20
    outcomes = [result.outcome for result in read_results(folder).values()]
    assert (outcomes.count(Outcome.STOPPED) >= 3) == ("halving" in stopping)
    if unit == "flops":
        assert read_stints(folder) == []
        return
    assert found.wall_hours == pytest.approx(before.wall_hours + ended / 3600)
    assert before.wall_hours == pytest.approx(middle / 3600, rel=0.2)
    assert unit != "wall_hours" or found.wall_hours <= amount
    assert found.device_hours == pytest.approx(found.wall_hours * at_once, rel=0.2)


def test_a_verdict_is_paid_from_the_budget(tmp_path: Path) -> None:
    """Room is kept for the dearest arm to win; what a cheaper one leaves is left."""
    amount, folder = amount_of("flops", 1, 50), StudyFolder(tmp_path / "tiny")
    rule = "confirm: {arms: 3, seeds: 2, verdict: 5}"
    run(study(f"{{flops: {amount!r}}}", more=rule), folder, 4)
    begun = read_suggestions(folder)
    origins = [each.origin for each in begun]
    num_controls = len({each.arm for each in begun if each.origin.startswith("control")})
    assert origins.count("confirm") == 3 * 2
    assert origins.count("verdict") == 5 * (1 + num_controls)
    assert sum(each == "search" for each in origins) > 5
    winner = next(each for each in begun if each.origin == "verdict")
    cheap, dear = sorted(work.pretrain_flops + work.segment_flops for work in two_works())
    left = amount - spent(folder).flops
    assert winner.params["model.patch"] == 16  # ten times as cheap
    assert -0.05 * amount < left - 5 * (dear - cheap) < 0.05 * amount


def test_confirmations_are_paid_from_the_budget(tmp_path: Path) -> None:
    amount, folder = amount_of("flops", 1, 35), StudyFolder(tmp_path / "tiny")
    run(study(f"{{flops: {amount!r}}}", more="confirm: {arms: 2, seeds: 2}"), folder, 4)
    begun = read_suggestions(folder)
    assert [each.origin for each in begun[-6:]] == ["confirm"] * 6
    assert sum(each.origin == "search" for each in begun) >= 15
    assert 0.95 < spent(folder).flops / amount < 1.05


def test_arms_of_several_seeds_are_begun_where_all_seeds_fit(tmp_path: Path) -> None:
    amount, folder = amount_of("device_hours", 1, 60), StudyFolder(tmp_path / "tiny")
    run(study(f"{{device_hours: {amount!r}}}", more="seeds: 2"), folder, 4)
    begun = read_suggestions(folder)
    assert {sum(each.arm == one.arm for each in begun) for one in begun} == {2}
    assert 0.95 < spent(folder).device_hours / amount < 1.05


def test_whichever_is_reached_first_ends_the_study(tmp_path: Path) -> None:
    amount = amount_of("flops", 1)
    run(study(f"{{flops: {amount!r}, trials: 6}}"), StudyFolder(tmp_path / "few"), 1)
    assert len(read_suggestions(StudyFolder(tmp_path / "few"))) == 6
    hours = amount_of("device_hours", 1)
    both = f"{{flops: {amount!r}, device_hours: {hours / 4!r}}}"
    run(study(both), StudyFolder(tmp_path / "short"), 1)
    assert spent(StudyFolder(tmp_path / "short")).flops < amount / 3


def test_more_of_a_budget_is_spent_too(tmp_path: Path) -> None:
    amount, folder = amount_of("flops", 1, 8), StudyFolder(tmp_path / "tiny")
    run(study(f"{{flops: {amount!r}}}", more="confirm: {arms: 1, seeds: 1}"), folder, 1)
    before = read_suggestions(folder)
    more = study(f"{{flops: {2 * amount!r}}}", more="confirm: {arms: 1, seeds: 1}")
    run(more, folder, 1)
    after = read_suggestions(folder)
    assert after[: len(before)] == before
    assert after[len(before)].origin == "search"
    assert 0.85 < spent(folder).flops / (2 * amount) < 1.15


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_study_that_was_killed_begins_the_same_trials(at_once: int, tmp_path: Path) -> None:
    spec = study(f"{{flops: {amount_of('flops', at_once, 20)!r}}}")
    whole, parts = StudyFolder(tmp_path / "whole"), StudyFolder(tmp_path / "parts")
    seconds = run(spec, whole, at_once).now
    with pytest.raises(Killed):
        run(spec, parts, at_once, seconds / 3)
    if at_once > 1:  # alone, the next trial begins where the last one has ended
        run(spec, parts, at_once)
        assert 0.95 < spent(parts).flops / spec.budget.given["flops"] < 1.05
        return
    run(spec, parts, at_once)
    assert read_suggestions(parts) == read_suggestions(whole)
    assert spent(parts) == spent(whole)


FEW = Amounts(device_hours=8.0, wall_hours=3.0, flops=80.0)


def test_something_begins_where_the_end_comes_nearer_to_the_budget() -> None:
    for unit, limit in [("device_hours", 10), ("flops", 100)]:
        budget = Budget.model_validate({unit: limit})
        for share, expected in [(0.9, True), (1.1, True), (1.19, True), (1.2, False), (2, False)]:
            assert fits(budget, FEW, FEW._replace(**{unit: share * limit})) == expected
    budget = Budget(wall_hours=4.0)
    for hours, expected in [(3.9, True), (4.0, True), (4.01, False)]:
        assert fits(budget, FEW, FEW._replace(wall_hours=hours)) == expected
    both = Budget(flops=100.0, wall_hours=4.0, trials=1)
    assert fits(both, FEW, FEW._replace(flops=110.0, wall_hours=3.5))
    assert not fits(both, FEW, FEW._replace(flops=110.0, wall_hours=4.5))
    assert not fits(both, FEW, FEW._replace(flops=130.0, wall_hours=3.5))


def test_how_much_is_spent_is_told_in_words() -> None:
    budget = Budget(device_hours=40.0, flops=160.0)
    assert in_words(budget, FEW, 5) == "20% of 40 device-hours, 50% of 160 FLOP"
    assert in_words(Budget(trials=20, wall_hours=1.5), FEW, 5) == (
        "25% of 20 trials, 200% of 1.5 hours of wall time"
    )


def test_seconds_lie_on_a_line_over_operations() -> None:
    assert line_through([]) == (0.0, 0.0)
    assert line_through([(0, 4.0), (0, 6.0)]) == (5.0, 0.0)
    assert line_through([(10, 20.0)]) == (0.0, 2.0)
    assert line_through([(10, 25.0), (20, 45.0), (30, 65.0)]) == pytest.approx((5.0, 2.0))
    assert line_through([(10, 10.0), (20, 30.0)]) == pytest.approx((0.0, 1.4))  # not below 0
    assert line_through([(10, 30.0), (20, 10.0)]) == (20.0, 0.0)


class Fixed(Costs):
    """Arms that are called by their operations: "3+1", a number for each phase."""

    def work(self, arm: str, config: Any) -> Work:
        pretrain, segment = map(float, arm.split("+"))
        return Work(1, 1, pretrain, segment)

    def pretraining(self, arm: str, config: Any) -> str:
        return arm.split("+")[0]


def begun(trial: str, arm: str, seed: int = 0) -> Suggestion:
    return Suggestion(0, trial, arm, seed, "search", {}, {}, {})


def test_an_account_by_hand() -> None:
    trials = [begun("a", "30+10"), begun("b", "30+10"), begun("c", "90+10")]
    measured = {
        "a": {"pretrain/flops": {0.5: 15.0, 1.0: 30.0}, "segment/flops": {1.0: 10.0}},
        "b": {"pretrain/flops": {0.5: 15.0}},  # stopped there
        "c": {"pretrain/flops": {0.5: 45.0}},  # still runs
    }
    stints = [Stint(1, 3600.0, 2, {"a": 80.0, "b": 30.0}), Stint(2, 1800.0, 1, {"c": 60.0})]
    means = Means(stints, Fixed(None), workers=3)
    account = Account(trials, {"a", "b"}, measured, means, num_running=1)
    assert account.spent == Amounts((2 * 110 + 60) / 3600, 1.5, 40 + 15 + 45)
    # two seconds an operation: c takes 200, of which 60 have passed
    now = account.expected()
    assert now == pytest.approx(Amounts((280 + 3 * 140) / 3600, 1.5 + 140 / 3600, 155))
    more = [Planned("5+5", {}, 0), Planned("5+5", {}, 1)]
    added = account.expected(more)  # beside c: two slots, as one runs and one is free
    assert added == pytest.approx(Amounts((280 + 3 * 180) / 3600, 1.5 + 140 / 3600, 175))
    then = account.expected(more, [Planned("10+0", {}, 0)])  # 20 s, once all others have ended
    # of the time of the last ones a tenth more is kept
    assert then == pytest.approx(Amounts((280 + 3 * 200) / 3600, 1.5 + 162 / 3600, 185))


def test_random_weights_have_no_pretraining_that_others_could_share() -> None:
    costs = Costs(SIZE)
    trial = study("{trials: 4}").trial
    bare = trial.model_copy(
        update={"segment": trial.segment.model_copy(update={"encoder": "random-init"})}
    )
    frozen = trial.model_copy(
        update={"segment": trial.segment.model_copy(update={"encoder": "frozen"})}
    )
    names = [costs.pretraining(arm_id(each), each) for each in (trial, frozen, bare)]
    assert names[0] == names[1] != names[2]


def test_a_verdict_begins_whole_or_not_at_all(tmp_path: Path) -> None:
    """A part of one shows nothing; what is too little for it ends with the confirmations."""
    rule = "confirm: {arms: 1, seeds: 1, verdict: 10}"
    for trials in (8, 12, 16, 24, 32, 40):
        folder = StudyFolder(tmp_path / f"{trials}")
        run(study(f"{{flops: {amount_of('flops', 1, trials)!r}}}", more=rule), folder, 4)
        arms = Counter(one.arm for one in read_suggestions(folder) if one.origin == "verdict")
        assert set(arms.values()) <= {10} and len(arms) in (0, 2, 3)
    assert arms


def test_pretraining_that_is_shared_is_paid_once() -> None:
    trials = [begun("a", "30+10"), begun("b", "30+5"), begun("c", "30+5", seed=1)]
    whole = {"pretrain/flops": {1.0: 30.0}}
    measured = {"a": whole | {"segment/flops": {1.0: 10.0}}, "b": whole}
    means = Means([], Fixed(None), shares=True)
    account = Account(trials, {"a"}, measured, means)
    assert account.spent.flops == 40
    assert account.expected().flops == 30 + 30 + 10 + 5 + 5
    more = [Planned("30+1", {}, 0), Planned("7+1", {}, 0), Planned("7+2", {}, 0)]
    assert account.expected(more).flops == 80 + 1 + 7 + 1 + 2
    alone = Account(trials, {"a"}, measured, Means([], Fixed(None)))
    assert alone.spent.flops == 70


def test_time_that_drivers_kept_is_read_back_and_damage_told(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "tiny")
    assert read_stints(folder) == []
    for seconds in (10.0, 20.0):
        with Ledger.open(folder, {}) as ledger:
            ledger.keep_time(Stint(ledger.epoch, 1.0, 1, {}))
            ledger.keep_time(Stint(ledger.epoch, seconds, 2, {"a": 5.0}))
    assert read_stints(folder) == [Stint(n, 10.0 * n, 2, {"a": 5.0}) for n in (1, 2)]
    folder.stint(2).write_text(folder.stint(2).read_text().replace("20.0", "2.0"))
    with pytest.raises(LedgerError, match=r"000002.json: .* do not fit their SHA-256. Bring it"):
        read_stints(folder)


def test_a_driver_keeps_its_time_between_events(tmp_path: Path) -> None:
    spec, folder, clock = study("{device_hours: 1.0}"), StudyFolder(tmp_path / "tiny"), Clock()
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA, clock)
        one = conductor.next()
        assert isinstance(one, Suggestion)
        clock.now = 29.0
        conductor.keep_time(30.0)
        assert read_stints(folder)[0].seconds == 0.0
        clock.now = 31.0
        conductor.keep_time(30.0)
        assert read_stints(folder) == [Stint(1, 31.0, 1, {one.trial: 31.0})]
        clock.now = 40.0
        conductor.hand_back(one)
        clock.now = 50.0
        conductor.keep_time()
        assert read_stints(folder) == [Stint(1, 50.0, 1, {one.trial: 40.0})]


def test_a_budget_that_the_controls_exceed_is_told_by_line() -> None:
    spec = study("{flops: 1e9}", more="seeds: 2")
    (problem,) = budget_problems(spec, SIZE)
    first, random = (
        work_of(spec.trial, SIZE),
        work_of(spec.twin("random-init"), SIZE),
    )
    least = 2 * (sum(first[2:]) + sum(random[2:]))
    assert problem.startswith("study.yaml:2")
    assert f": budget.flops: given 1e+09; expected at least {least:.3g}, which the" in problem
    assert budget_problems(study(f"{{flops: {1.01 * least!r}}}", more="seeds: 2"), SIZE) == []


def test_where_a_study_stands_is_told_by_what_it_has_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    amount, folder = amount_of("flops", 1, 8), StudyFolder(tmp_path / "tiny")
    spec, clock = study(f"{{flops: {amount!r}}}"), Clock()
    data = {"size": [64, 64], "channels": 3, "classes": list(SIZE.classes)}
    data["images"] = {"pretrain": 100, "train": 60, "val": 8, "test": 0}
    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(spec.text, {"data_fingerprint": DATA.fingerprint, "data": data})
        conductor = Conductor(spec, ledger, DATA, clock)
        drive(conductor, clock, 1)
        share = f"{spent(folder).flops / amount:.0%} of {amount:.3g} FLOP"
        num_trials = len(read_suggestions(folder))
        assert conductor.progress.spent == share
        head = conductor.progress.table().renderables[0]
        assert f"tiny: {num_trials} trials, {share} · best" in str(head)
        assert conductor.progress.seconds_left() is None
    assert call("status", "--json", "--storage", tmp_path) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["state"], one["total"], one["spent"]) == ("finished", num_trials, share)
    assert call("status", "tiny", "--storage", tmp_path) == 0
    assert f"finished, {num_trials} of {num_trials} trials begun, {share}" in (
        " ".join(capsys.readouterr().out.split())
    )
    requests.extend(folder, amount, "flops")
    ahead = outlook_of(folder)
    assert (ahead.total, ahead.is_finished) == (None, False)
    assert ahead.spent.endswith(f" of {2 * amount:.3g} FLOP")
    index = Index(Storage(tmp_path))
    told = views.summary(index.look("tiny"), ahead, None)
    assert (told["total"], told["unit"]) == (None, {"name": "flops", "words": "FLOP"})


def test_what_a_budget_will_buy_is_planned() -> None:
    def planned(budget: str, speed: float | None = SPEED, **more: str) -> Plan:
        spec = study(budget, **more)
        measure = None if speed is None else lambda config: Speeds(speed, speed)
        return plan(spec, SIZE, cpus=4, gpus=0, measure=measure)

    ten = planned("{trials: 10}")
    assert ten.budget == "" and ten.trials == 10
    for unit, amount in [
        ("flops", ten.flops),
        ("device_hours", ten.flops / SPEED / 3600),
        ("wall_hours", ten.flops / SPEED / 3600),
    ]:
        found = planned(f"{{{unit}: {1.001 * amount!r}}}")
        assert (found.trials, found.flops) == (10, pytest.approx(ten.flops))
        assert ": 10 trials" in found.budget and found.describe()["trials"].startswith("about 10")
    both = planned(f"{{flops: {1.001 * ten.flops!r}, trials: 40}}").budget
    assert both == f"40 trials; {1.001 * ten.flops:.3g} FLOP: 10 trials (binds)"
    unknown = planned("{wall_hours: 3}", None)
    assert unknown.budget == "3 hours of wall time: not known without a speed"
    confirmed = planned(f"{{flops: {1.001 * ten.flops!r}}}", more="confirm: {arms: 1, seeds: 1}")
    assert (confirmed.trials, confirmed.confirmations) == (8, 2)


def test_a_budget_in_trials_looks_as_it_did() -> None:
    assert json.dumps(study("{trials: 4}").model_dump(mode="json")["budget"]) == '{"trials": 4}'
    spelt = study("{trials: 4, flops: null}")
    assert spelt.digest == study("{trials: 4}").digest
    with pytest.raises(UserError, match=r"budget: given none; expected one or several of trials"):
        study("{}")
    more = study("{flops: 2e12, trials: 9}").text
    changes = difference(study("{flops: 1e12, trials: 9}").text, more)
    assert [(str(one), one.is_compatible) for one in changes] == [
        ("budget.flops: 1000000000000.0 -> 2000000000000.0", True)
    ]
    assert not difference(study("{trials: 9}").text, more)[0].is_compatible
