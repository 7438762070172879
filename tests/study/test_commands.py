"""The command line: what users see of their mistakes, and the commands that need no cluster.

pytest tests/study/test_commands.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from study.ledger import read_suggestions
from study.loading import load_spec
from tests.conftest import TINY_STUDY
from tests.synthetic import refreeze, write_study
from tests.terminal import call

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def blood(tmp_path: Path) -> Path:
    """A study of eight small images by manifest; two classes and the background."""
    rng = np.random.default_rng(0)
    lines = ["image,mask,split,group"]
    for index in range(8):
        image = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        mask[4:12, 4:12], mask[20:24, 20:24] = 1, 2
        Image.fromarray(image).save(tmp_path / f"i{index}.png")
        Image.fromarray(mask).save(tmp_path / f"m{index}.png")
        lines.append(f"i{index}.png,m{index}.png,{'val' if index > 5 else 'train'},slide{index}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    data = "{source: images, manifest: manifest.csv, size: 32, classes: [none, red, platelet]}"
    smears = "{source: smears, size: 32, images: 24, val: 8, seed: 1}"
    path = tmp_path / "blood.yaml"
    path.write_text(TINY_STUDY.replace(smears, data))
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def truncate(folder: Path) -> None:
    whole = (folder / "i3.png").read_bytes()
    (folder / "i3.png").write_bytes(whole[: len(whole) // 2])


MISTAKES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "an unknown key": (
        lambda f: edit(f / "blood.yaml", "epochs: 4", "epocs: 4"),
        ["blood.yaml:7", "epocs", "did you mean 'epochs'"],
    ),
    "a misspelt path in search": (
        lambda f: edit(f / "blood.yaml", "model.patch:", "model.pach:"),
        ["blood.yaml:10", "model.pach", "did you mean 'model.patch'"],
    ),
    "a patch that does not divide the image": (
        lambda f: edit(f / "blood.yaml", "[4, 8]", "[4, 12]"),
        ["blood.yaml:10", "12", "32x32"],
    ),
    "a manifest that is not there": (
        lambda f: (f / "manifest.csv").unlink(),
        ["manifest.csv"],
    ),
    "an image that is not there": (
        lambda f: (f / "i3.png").unlink(),
        ["manifest.csv", "i3.png"],
    ),
    "a truncated image": (truncate, ["i3.png"]),
    "a mask with a class out of range": (
        lambda f: Image.fromarray(np.full((32, 32), 7, np.uint8)).save(f / "m2.png"),
        ["m2.png", "7"],
    ),
    "a mask of another size": (
        lambda f: Image.fromarray(np.zeros((16, 32), np.uint8)).save(f / "m2.png"),
        ["m2.png", "16"],
    ),
    "a group in two splits": (
        lambda f: edit(f / "manifest.csv", "val,slide7", "val,slide0"),
        ["slide0", "train", "val"],
    ),
    "a storage that is no folder": (
        lambda f: edit(f / "blood.yaml", "budget:", "storage: ftp://bucket\nbudget:"),
        ["blood.yaml", "ftp://bucket"],
    ),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_starts(
    blood: Path, mistake: str, command: str, capsys: Capture
) -> None:
    spoil, expected = MISTAKES[mistake]
    spoil(blood.parent)
    before = sorted(blood.parent.iterdir())
    assert call(command, blood) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in expected), message
    assert "Traceback" not in message
    leftovers = set(blood.parent.iterdir()) - set(before)
    assert leftovers <= {blood.parent / "studies"}
    assert not list(blood.parent.glob("studies/*/suggestions/*"))


def test_all_mistakes_are_told_at_once(blood: Path, capsys: Capture) -> None:
    edit(blood, "epochs: 4", "epocs: 4")
    edit(blood, "model.patch:", "model.pach:")
    assert call("check", blood) == 2
    message = capsys.readouterr().err
    assert "epocs" in message
    assert "model.pach" in message


def test_a_storage_that_cannot_be_written_exits_with_74(blood: Path, capsys: Capture) -> None:
    edit(blood, "budget:", "storage: /proc/nowhere\nbudget:")
    assert call("run", blood) == 74
    assert "/proc/nowhere" in capsys.readouterr().err


def test_a_study_begun_with_other_settings_is_refused_with_the_difference(
    blood: Path, capsys: Capture
) -> None:
    from study.commands.data import dataset_of
    from study.commands.run import freeze
    from study.ledger import Ledger
    from study.loading import load_spec

    spec = load_spec(blood)
    with Ledger.open(spec.study_folder(), {}) as ledger:
        freeze(ledger, spec, dataset_of(spec))
    edit(blood, "epochs: 4", "epochs: 5")
    for command in ("run", "check"):
        assert call(command, blood) == 2
        assert "trial.pretrain.epochs: 4 -> 5" in capsys.readouterr().err
    edit(blood, "epochs: 5", "epochs: 4")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(blood.parent / "i0.png")
    for command in ("run", "check"):
        assert call(command, blood) == 2
        assert "tiny was begun on other data" in capsys.readouterr().err


def test_data_that_would_stay_behind_are_refused_at_submit(blood: Path, capsys: Capture) -> None:
    for given, said in (("../far.csv", "leads out of"), ("/far.csv", "no Ray dashboard")):
        text = blood.read_text().replace("manifest: manifest.csv", f"manifest: {given}")
        (blood.parent / "far.yaml").write_text(text)
        assert call("submit", blood.parent / "far.yaml", "--address", "http://127.0.0.1:9") == 2
        assert said in capsys.readouterr().err


def test_check_prints_the_plan(blood: Path, capsys: Capture) -> None:
    assert call("check", blood) == 0
    printed = capsys.readouterr().out
    for word in ("valid", "platelet", "tokens", "FLOP", "hours"):
        assert word in printed
    assert "one seed shows none; `confirm: {arms: 3, seeds: 2, verdict: 10}` does" in printed
    blood.write_text(blood.read_text() + "confirm: {arms: 1, seeds: 1, verdict: 10}\n")
    assert call("check", blood) == 0
    # 10 pairs show .998 of their differences' deviation in four of five studies
    assert "10 seeds show the best arm's difference" in (printed := capsys.readouterr().out)
    assert "it is 1.0 times its standard deviation" in printed


def test_check_warns_of_data_that_a_threshold_segments(blood: Path, capsys: Capture) -> None:
    assert call("check", blood) == 0
    printed = capsys.readouterr().out
    assert "mIoU of a threshold" in printed and "mIoU of raw pixels" in printed
    assert "warning" not in printed.partition("without an encoder")[2].partition("plan")[0]
    for index in range(8):
        mask = np.array(Image.open(blood.parent / f"m{index}.png"))
        grey = 40 + 90 * mask + index  # no two images are the same
        image = np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
        Image.fromarray(image).save(blood.parent / f"i{index}.png")
    assert call("check", blood) == 0
    printed = capsys.readouterr().out
    assert "the mIoU of a threshold is 1.00: such data cannot tell encoders apart" in printed


def test_three_lines_are_a_study_and_their_defaults_can_be_read(
    tmp_path: Path, capsys: Capture
) -> None:
    """What is printed is a study file that means the same."""
    path = tmp_path / "short.yaml"
    path.write_text("study: short\ndata: {source: smears, size: 32}\nbudget: {trials: 4}\n")
    assert call("check", path, "--resolved") == 0
    printed = capsys.readouterr().out
    assert "goal: maximize" in printed and "masking.ratio.value:" in printed
    spelt_out = tmp_path / "long.yaml"
    spelt_out.write_text(printed)
    assert load_spec(spelt_out).digest == load_spec(path).digest


def test_the_goal_follows_from_the_metric(blood: Path) -> None:
    edit(blood, "{metric: segment/miou, goal: maximize}", "segment/miou")
    assert load_spec(blood).objectives[-1].goal == "maximize"
    edit(blood, "- segment/miou", "- {metric: segment/count_error}")
    assert load_spec(blood).objectives[-1].goal == "minimize"


def test_the_version_is_told(capsys: Capture) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("maskstudy 0.")


def test_check_warns_of_few_labels_that_leave_out_a_class(blood: Path, capsys: Capture) -> None:
    for index in range(1, 8):  # a platelet in a single image
        name = blood.parent / f"m{index}.png"
        Image.fromarray(np.minimum(np.array(Image.open(name)), 1)).save(name)
    edit(blood, "budget: {trials: 4}", "seeds: 3\nbudget: {trials: 6}")
    edit(blood, "segment: {", "segment: {labels: 1, ")
    assert call("check", blood) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "trial.segment.labels: with 1 there is no label of platelet (seed " in printed


def test_try_runs_both_phases_in_this_process(blood: Path, capsys: Capture) -> None:
    assert call("try", blood, "--images", "4") == 0
    printed = capsys.readouterr().out
    assert "pretrain/probe_psnr" in printed
    assert "segment/miou" in printed
    assert not (blood.parent / "studies").exists()


def test_status_report_and_stop_of_a_study_at_rest(tmp_path: Path, capsys: Capture) -> None:
    folder = write_study(tmp_path / "platelets")
    assert call("status", "--storage", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "platelets" in printed and "interrupted" in printed  # as the console has it
    assert call("status", "platelets", "--storage", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "control" in printed and "(interrupted, 14 of 29 trials begun)" in printed
    assert call("stop", "platelets", "--storage", tmp_path) == 0
    assert "is not running" in capsys.readouterr().out
    assert call("report", folder.root, "-o", tmp_path / "r.html") == 0
    assert "<html" in (tmp_path / "r.html").read_text()[:200]


def test_export_copies_the_encoder_of_an_arm_that_has_one(tmp_path: Path, capsys: Capture) -> None:
    folder = write_study(tmp_path / "platelets")
    where = ("--storage", tmp_path, "-o", tmp_path / "out")
    assert call("export", "platelets", *where) == 2
    assert (
        "no encoder of a searched arm with a score; arms with one: none yet"
        in capsys.readouterr().err
    )
    searched = next(s for s in read_suggestions(folder) if s.origin == "search")
    folder.encoder(searched.trial).mkdir(parents=True)
    (folder.encoder(searched.trial) / "encoder.json").write_text('{"usage": "timm [loads] it"}')
    assert call("export", "platelets", "--arm", "nobody", *where) == 2
    assert f"of arm 'nobody'; arms with one: {searched.arm}" in capsys.readouterr().err
    assert call("export", "platelets", "--arm", searched.arm, *where) == 0
    printed = capsys.readouterr().out
    assert f"arm {searched.arm}, trial {searched.trial}: {tmp_path / 'out'}" in printed
    assert "timm [loads] it" in printed
    assert call("export", "platelets", "--arm", searched.arm, *where) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_unknown_study_is_answered_with_those_that_exist(
    tmp_path: Path, capsys: Capture
) -> None:
    write_study(tmp_path / "platelets")
    assert call("status", "plateletts", "--storage", tmp_path) == 2
    assert "platelets" in capsys.readouterr().err


def test_the_storage_of_submit_is_answered_with_the_folder_of_studies_in_it(
    tmp_path: Path, capsys: Capture
) -> None:
    write_study(tmp_path / "studies" / "platelets")
    for command in (["status"], ["resume"], ["resume", "--address", "http://127.0.0.1:9"]):
        assert call(*command, "platelets", "--storage", tmp_path) == 2
        assert f"expected --storage {tmp_path / 'studies'}" in capsys.readouterr().err


def test_a_damaged_study_does_not_hide_the_others(tmp_path: Path, capsys: Capture) -> None:
    write_study(tmp_path / "sound", trials=3)
    write_study(tmp_path / "damaged", trials=3).suggestion(1).write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "study.yaml").write_text("study: half")
    assert call("status", "--storage", tmp_path) == 0
    told = capsys.readouterr().out
    words = " ".join(told.split())
    assert "3 of 18" in words and "000001.json" in words and "environment.json" in words


@pytest.mark.parametrize("defect", [TypeError("ours"), RuntimeError("ours")])
def test_a_defect_is_not_told_as_a_mistake_of_the_user(
    defect: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logs(*_: object, **__: object) -> None:
        raise defect

    monkeypatch.setattr("cluster.jobs.logs", logs)
    with pytest.raises(type(defect), match="ours"):
        call("logs", "platelets", "--address", "http://127.0.0.1:9")


def test_a_study_file_of_another_kind_is_named_and_does_not_hide_the_others(
    tmp_path: Path, capsys: Capture
) -> None:
    write_study(tmp_path / "sound", trials=3)
    strange = write_study(tmp_path / "strange", trials=3)
    refreeze(strange, strange.spec.read_text(), "study: &x strange\nseeds: *x\n")
    assert call("status", "--storage", tmp_path) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "3 of 18" in words and "damaged" in words and "an alias (*x)" in words
    assert call("report", "strange", "--storage", tmp_path) == 74
    assert "study.yaml:1: study: an anchor (&x)" in capsys.readouterr().err


def test_the_schema_describes_the_study_file(capsys: Capture) -> None:
    assert call("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"study", "data", "trial", "search", "objectives"} <= set(schema["properties"])


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "study", "--help"], capture_output=True, text=True, check=True
    )
    commands = "check try run submit resume stop status report export masks bench schema"
    assert all(command in done.stdout for command in commands.split())
