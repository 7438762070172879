"""What people may ask of a study, running or not.  pytest tests/study/test_requests.py"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from study import requests
from study.conductor import Conductor
from study.folder import Storage, StudyFolder
from study.ledger import (
    Ledger,
    Outcome,
    Suggestion,
    damage,
    read_answers,
    read_results,
    read_spec,
    read_suggestions,
    sealed,
)
from study.loading import changes, parse_spec
from study.overview import arms_table, studies_table
from study.steps import Finished
from tests.conftest import TINY_STUDY
from tests.study.test_conductor import DATA, play
from tests.terminal import call
from trainables.errors import UserError

ARM: dict[str, Any] = {
    "model.patch": 4,
    "masking.ratio": {"name": "linear", "start": 0.2, "end": 0.7},
}


def begin(root: Path, text: str = TINY_STUDY) -> StudyFolder:
    folder = StudyFolder(root / "tiny")
    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(text, {"data_fingerprint": DATA.fingerprint})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return begin(tmp_path)


def drive(folder: StudyFolder, most: int = 99) -> list[Suggestion]:
    """What a driver begins until nothing is left."""
    text = read_spec(folder)
    assert text is not None
    played = []
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(parse_spec(text, Path(), where="study.yaml"), ledger, DATA)
        while len(played) < most and not isinstance(conductor.next_step(), Finished):
            played.append(play(conductor, 0.5))
    return played


def test_a_finished_study_that_is_extended_goes_on_with_so_many_trials(
    folder: StudyFolder, tmp_path: Path
) -> None:
    frozen = folder.spec.read_bytes()
    assert len(drive(folder)) == 4
    assert drive(folder) == []
    assert requests.extend(folder, 3) == (
        f"3 more trials, 7 in all; to go on: maskstudy resume tiny --storage {tmp_path}"
    )
    assert [one.origin for one in drive(folder)] == ["search"] * 3
    assert drive(folder) == [], "an extension counts once"
    assert requests.extend(folder, 2).startswith("2 more trials, 9 in all")
    assert len(drive(folder)) == 2
    assert folder.spec.read_bytes() == frozen
    assert os.listdir(folder.requests) == []
    assert [one.content for one in read_answers(folder)] == [{"trials": 3}, {"trials": 2}]


def test_extending_in_two_steps_proposes_what_a_larger_budget_does(
    folder: StudyFolder, tmp_path: Path
) -> None:
    whole = begin(tmp_path / "whole", TINY_STUDY.replace("trials: 4", "trials: 7"))
    drive(folder)
    requests.extend(folder, 3)
    drive(folder)
    drive(whole)
    assert read_suggestions(folder) == read_suggestions(whole)


def test_a_running_study_heeds_a_request_at_its_next_decision(folder: StudyFolder) -> None:
    spec = parse_spec(TINY_STUDY, Path(), where="study.yaml")
    with Ledger.open(folder, {}) as ledger:
        conductor = Conductor(spec, ledger, DATA)
        for _ in range(3):
            play(conductor, 0.5)
        told = requests.enqueue(folder, ARM)
        assert told.endswith("comes next; its driver heeds it at its next decision")
        requests.extend(folder, 1)
        following = play(conductor, 0.5)
        assert following.arm in told
        assert conductor.progress.total == 6
        assert len([play(conductor, 0.5) for _ in range(2)]) == 2
        assert isinstance(conductor.next(), Finished)


def test_an_enqueued_arm_comes_before_the_samplers_next_one_with_all_its_seeds(
    tmp_path: Path,
) -> None:
    folder = begin(tmp_path, TINY_STUDY.replace("trials: 4", "trials: 7")
                   + "seeds: 2\n")  # fmt: skip
    drive(folder)
    assert len(read_suggestions(folder)) == 7, "the last arm has one seed of two"
    requests.enqueue(folder, ARM)
    new = drive(folder)
    assert [(one.config["model"]["patch"], one.seed) for one in new] == [(4, 0), (4, 1)]
    assert new[0].config["masking"]["ratio"] == ARM["masking.ratio"]
    assert new[0].labels == {"model.patch": 4, "masking.ratio": "rising"}
    assert new[0].params == {
        "model.patch": 4,
        "masking.ratio": "rising",
        "masking.ratio/rising.start": 0.2,
        "masking.ratio/rising.end": 0.7,
    }
    assert {read_results(folder)[one.trial].outcome for one in new} == {Outcome.COMPLETE}


def test_a_crash_between_answer_and_removal_answers_nothing_twice(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(folder)
    requests.extend(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(requests, "remove", lambda *_: None)
        assert len(drive(folder)) == 1
    assert len(os.listdir(folder.requests)) == 1
    assert "5 of 5" in rendered(studies_table(folder.storage))
    assert drive(folder) == []
    assert os.listdir(folder.requests) == []
    assert len(read_answers(folder)) == 1


def test_a_crash_between_answer_and_suggestion_keeps_the_arm(folder: StudyFolder) -> None:
    drive(folder)
    requests.enqueue(folder, ARM)
    drive(folder, most=0)  # a driver that reads the request and dies
    assert os.listdir(folder.requests) == []
    assert [one.config["model"]["patch"] for one in drive(folder)] == [4]


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a setting that is not searched": (
        {"model.pach": 4},
        ["model.pach: not searched; expected one of model.patch, masking.ratio", "did you mean"],
    ),
    "a choice that there is not": (
        {"model.patch": 16},
        ["model.patch: given 16; expected one of 4, 8"],
    ),
    "a range that does not hold the value": (
        {"masking.ratio": {"name": "constant", "value": 0.95}},
        ["masking.ratio: given", "0.95", "constant", "a number from 0.1 to 0.9"],
    ),
    "a label whose ranges are open": (
        {"masking.ratio": "rising"},
        ["masking.ratio: given 'rising', which holds ranges", "a number from 0.5 to 0.9"],
    ),
    "an option that there is not": (
        {"masking.ratio": {"name": "constant", "valu": 0.5}},
        ["masking.ratio: ", "valu: unknown key", "did you mean 'value'"],
    ),
    "text for a number": ({"model.patch": "eight"}, ["model.patch: given 'eight'"]),
    "nothing": ({}, ["expected a value for some of model.patch, masking.ratio"]),
    "a list": ([4, 8], ["expected a value for some of"]),  # type: ignore[dict-item]
    "what JSON has no word for": ({"model.patch": float("nan")}, ["model.patch"]),
    "the control itself": ({"model.patch": 8}, ["is in the study already", "control"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_arm_outside_the_space_is_refused_in_the_usual_words(
    name: str, folder: StudyFolder
) -> None:
    settings, words = MISTAKES[name]
    drive(folder)
    with pytest.raises(UserError) as error:
        requests.enqueue(folder, settings)
    for word in words:
        assert word in str(error.value)
    assert not folder.requests.exists()


def test_all_mistakes_of_an_arm_are_told_at_once_and_by_line(
    folder: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = tmp_path / "arm.yaml"
    arm.write_text("# mine\nmodel.patch: 5\nmasking.ratio: {name: constant, value: 1e-2}\n")
    assert call("enqueue", folder.root, "--file", arm) == 2
    told = capsys.readouterr().err
    assert f"{arm}:2: model.patch: given 5; expected one of 4, 8" in told
    assert f"{arm}:3: masking.ratio: given" in told


def test_a_setting_that_is_given_twice_is_refused(
    folder: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("enqueue", folder.root, "model.patch=4", "model.patch=8") == 2
    assert "model.patch: given twice" in capsys.readouterr().err
    assert not folder.requests.exists()


def test_the_best_arms_of_another_study_come_next(
    folder: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are judged by this study's first objective; what it has already is told apart."""
    other = begin(tmp_path / "other", TINY_STUDY.replace("trials: 4", "trials: 6"))
    assert call("enqueue", folder.root, "--from", other.root) == 2
    assert "no searched arm is complete and measured" in capsys.readouterr().err
    scores = [0.5, 0.5, 0.2, 0.8, 0.3, 0.9]  # of the controls, then of four arms
    with Ledger.open(other, {}) as ledger:
        text = parse_spec(read_spec(other) or "", Path(), where="study.yaml")
        conductor = Conductor(text, ledger, DATA)
        arms = [play(conductor, score) for score in scores]
    assert call("enqueue", folder.root, "--from", other.root, "--best", 2) == 0
    assert [one.arm for one in drive(folder)[2:4]] == [arms[5].arm, arms[3].arm]
    capsys.readouterr()
    assert call("enqueue", folder.root, "--from", other.root, "--best", 3) == 2
    # the third one the sampler has proposed by itself, as it did there
    assert capsys.readouterr().err.count("is in the study already") == 3
    assert call("enqueue", folder.root, "model.patch=4", "--from", other.root) == 2


def test_a_verdict_that_has_begun_keeps_its_seeds(tmp_path: Path) -> None:
    """More seeds after a look at the first ones are no test; before the first one they are."""

    def text(verdict: int) -> str:
        return TINY_STUDY + f"confirm: {{arms: 1, seeds: 1, verdict: {verdict}}}\n"

    folder = begin(tmp_path, text(2))
    other = parse_spec(text(3), Path(), where="study.yaml")
    drive(folder, most=4)
    assert [str(each) for each in changes(folder, other)] == ["confirm.verdict: 2 -> 3"]
    drive(folder)
    assert sum(one.origin == "verdict" for one in read_suggestions(folder)) == 2 * 3
    for changed in (text(3), TINY_STUDY):
        with pytest.raises(UserError, match="more of them after a look are no fair test"):
            changes(folder, parse_spec(changed, Path(), where="study.yaml"))


def test_an_arm_is_enqueued_once(folder: StudyFolder) -> None:
    requests.enqueue(folder, ARM)
    with pytest.raises(UserError, match="asked for already"):
        requests.enqueue(folder, ARM)
    drive(folder)
    with pytest.raises(UserError, match="in the study already: trial"):
        requests.enqueue(folder, ARM)


@pytest.mark.parametrize("trials", [0, -1, 100_001, True, 1.5, "3", None])
def test_an_extension_is_a_whole_number(trials: Any, folder: StudyFolder) -> None:
    with pytest.raises(UserError, match="expected a whole number"):
        requests.extend(folder, trials)


def test_nothing_can_be_asked_of_what_is_no_study(tmp_path: Path) -> None:
    for ask in (lambda f: requests.extend(f, 1), requests.stop, lambda f: requests.enqueue(f, ARM)):
        with pytest.raises(UserError, match="no study has been begun there"):
            ask(StudyFolder(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_study_without_search_is_not_extended(tmp_path: Path) -> None:
    text = TINY_STUDY[: TINY_STUDY.index("search:")] + TINY_STUDY[TINY_STUDY.index("objectives:") :]
    folder = begin(tmp_path, text)
    with pytest.raises(UserError, match="no `search`"):
        requests.extend(folder, 1)


def test_who_does_not_run_cannot_be_stopped(folder: StudyFolder) -> None:
    with pytest.raises(UserError, match="tiny is not running"):
        requests.stop(folder)
    with Ledger.open(folder, {}):
        assert requests.stop(folder) == "tiny has been asked to stop"
    assert folder.stop_request.exists()


def place(folder: StudyFolder, kind: str, content: bytes, number: int = 0) -> Path:
    """A request as somebody might write it by hand."""
    folder.requests.mkdir(exist_ok=True)
    path = folder.requests / f"20260101T000000.{number:06d}Z-{kind}-0123abcd.json"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("extend", b""),
        ("extend", b"\xff\x00"),
        ("extend", b'{"trials": 5}'),  # not sealed
        ("extend", sealed({"trials": -5})),
        ("extend", sealed({"trials": 10**12})),
        ("extend", sealed({})),
        ("enqueue", sealed({"trials": 5})),
        ("enqueue", sealed({"settings": {"model": {"patch": 4}}})),
        ("enqueue", sealed({"settings": {"model.patch": [[4]], "masking.ratio.x.y": {}}})),
        ("enqueue", sealed({"settings": {"model.patch": 8}})),  # the control
        ("enqueue", b"[" * 50_000),
        ("enqueue", b" " * 100_000),
    ],
)
def test_a_bad_request_is_refused_in_the_ledger_and_stops_no_driver(
    kind: str, content: bytes, folder: StudyFolder
) -> None:
    place(folder, kind, content)
    assert len(drive(folder)) == 4
    (answer,) = read_answers(folder)
    assert answer.refused
    assert answer.content == {}
    assert os.listdir(folder.requests) == []
    assert damage(folder) == []


def test_what_is_no_request_is_left_alone(folder: StudyFolder, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_bytes(sealed({"trials": 5}))
    link = place(folder, "extend", b"")
    link.unlink()
    link.symlink_to(secret)
    (folder.requests / "notes.txt").write_text("mine")
    (folder.requests / f"{link.name}.tmp").write_bytes(sealed({"trials": 5}))
    os.mkfifo(folder.requests / link.name.replace("abcd", "abce"))
    drive(folder)
    kept = sorted(os.listdir(folder.requests))
    assert "notes.txt" in kept
    assert f"{link.name}.tmp" in kept
    assert all(answer.refused for answer in read_answers(folder))
    assert secret.exists()


def test_a_request_that_was_granted_meanwhile_is_refused_with_its_reason(
    folder: StudyFolder,
) -> None:
    place(folder, "enqueue", sealed({"settings": ARM}), 1)
    place(folder, "enqueue", sealed({"settings": ARM}), 2)
    drive(folder)
    first, second = read_answers(folder)
    assert first.refused is None
    assert "asked for already" in str(second.refused)
    assert len(read_suggestions(folder)) == 5


def test_a_damaged_answer_is_told(folder: StudyFolder) -> None:
    requests.extend(folder, 1)
    drive(folder)
    path = folder.answer(0)
    path.write_bytes(path.read_bytes().replace(b'"trials": 1', b'"trials": 9'))
    (found,) = damage(folder)
    assert str(path) in str(found)


def test_commands_ask_and_the_tables_count(
    folder: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("extend", "tiny", "--trials", "6", "--storage", tmp_path) == 0
    assert "6 more trials, 10 in all" in capsys.readouterr().out
    ratio = "masking.ratio={name: constant, value: 0.3}"
    assert call("enqueue", "tiny", "model.patch=4", ratio, "--storage", tmp_path) == 0
    assert "comes next" in capsys.readouterr().out
    assert call("enqueue", "tiny", "model.patch", "--storage", tmp_path) == 2
    assert "expected path=value" in capsys.readouterr().err
    assert call("enqueue", "tiny", "model.patch=[4", "--storage", tmp_path) == 2
    assert "not YAML" in capsys.readouterr().err
    assert "0 of 11" in rendered(studies_table(Storage(tmp_path)))
    assert "0 of 11 trials begun" in rendered(arms_table(folder))
    drive(folder)
    assert "11 of 11" in rendered(studies_table(Storage(tmp_path)))
    answers = [json.loads(path.read_text()) for path in sorted(folder.answers.iterdir())]
    assert [answer["kind"] for answer in answers] == ["extend", "enqueue"]


def rendered(table: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_finished_study_is_submitted_only_with_a_file_that_asks_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[Path] = []

    def submit(address: str, yaml: Path, **_: Any) -> tuple[str, str]:
        submitted.append(yaml)
        return "tiny-2", "a link"

    monkeypatch.setattr("cluster.jobs.submit", submit)
    drive(begin(tmp_path / "studies"))
    file = tmp_path / "tiny.yaml"

    def submit_with(old: str, new: str) -> int:
        file.write_text(TINY_STUDY.replace(old, new))
        address = "http://127.0.0.1:8265"
        return call("submit", file, "--address", address, "--storage", tmp_path)

    assert submit_with("", "") == 0 and submitted == []
    told = capsys.readouterr().out
    assert "nothing is left to do" in told
    assert f"resume tiny --storage {tmp_path / 'studies'} --address http://127.0.0.1:8265" in told
    assert submit_with("epochs: 4", "epochs: 5") == 2 and submitted == []
    assert "trial.pretrain.epochs: 4 -> 5" in capsys.readouterr().err
    with Ledger.open(StudyFolder(tmp_path / "studies" / "tiny"), {}):
        assert submit_with("trials: 4", "trials: 6") == 75 and submitted == []
    assert submit_with("trials: 4", "trials: 6") == 0 and submitted == [file]


FLOPS = TINY_STUDY.replace("{trials: 4}", "{flops: 1e9, wall_hours: 2.5}")


def test_a_budget_is_extended_in_its_own_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begin(tmp_path, FLOPS)
    at = ("--storage", tmp_path)
    assert call("extend", "tiny", "--trials", 3, *at) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "trials: the budget of tiny is in hours of wall time, FLOP; extend what ends it" in said
    assert "maskstudy extend tiny --wall-hours N or maskstudy extend tiny --flops N" in said
    assert call("extend", "tiny", *at) == 2
    assert "given 0 amounts; expected one of --trials, --device-hours" in capsys.readouterr().err
    assert call("extend", "tiny", "--flops", -1, *at) == 2
    assert "flops: given -1.0; expected a number above 0" in capsys.readouterr().err
    assert call("extend", "tiny", "--wall-hours", 0.5, *at) == 0
    assert "0.5 more hours of wall time, 3 in all" in capsys.readouterr().out
    requests.extend(folder, 5e8, "flops")
    spec = parse_spec(FLOPS, Path(), where="study.yaml")
    grown = requests.grown(spec, requests.expected(folder, spec))
    assert grown.budget.given == {"wall_hours": 3.0, "flops": 1.5e9}
    assert grown.digest != spec.digest


def test_an_arm_that_is_asked_for_runs_though_the_budget_is_spent(tmp_path: Path) -> None:
    folder = begin(tmp_path, TINY_STUDY.replace("{trials: 4}", "{flops: 1e9, trials: 3}"))
    assert len(drive(folder)) == 3
    requests.enqueue(folder, ARM)
    (asked,) = drive(folder)
    assert asked.config["model"]["patch"] == 4 and asked.origin == "search"
