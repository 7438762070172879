"""Whether pretraining has learnt anything, and that everybody is told.

pytest tests/study/test_gain.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.answer import answer
from analysis.figures.curves import curves
from analysis.figures.ranking import ranking_numbers
from analysis.report import render
from study.commands.export import problems
from study.commands.run import conclude
from study.conductor import Conductor, DataView
from study.console import views
from study.console.index import Index
from study.folder import Storage, StudyFolder
from study.gain import best_gain, gains, in_words, warning
from study.ledger import Ledger, Suggestion, read_suggestions
from study.loading import parse_spec
from study.measured import Measured
from study.state import Outlook
from study.telemetry import Telemetry
from tests.conftest import TINY_STUDY
from tests.machine import wait_until
from tests.synthetic import hand_made, study_tables, write_study
from tests.terminal import call
from trainables.endings import Ending
from trainables.fillings import Gain
from trainables.metrics import GAIN

NOT_LEARNT = "No encoder of this study fills in hidden pixels better than"
LEARNT, NOTHING = 10.0, 40.0  # dB of the best trivial filling, below and above every encoder's


def rung(progress: float, **values: float) -> list[dict[str, Any]]:
    about = {"phase": "pretrain", "step": round(100 * progress), "epoch": 1.0, "goal": "maximize"}
    about |= {"progress": progress, "unit": "dB", "seconds": 1.0}
    named = {name.replace("_over_", "/"): value for name, value in values.items()}
    return [{**about, "metric": name, "value": value} for name, value in named.items()]


@pytest.fixture
def conductor(tmp_path: Path) -> Iterator[Conductor]:
    spec = parse_spec(TINY_STUDY, Path(), where="study.yaml")
    with Ledger.open(StudyFolder(tmp_path / "tiny"), {}) as ledger:
        yield Conductor(spec, ledger, DataView(Path(), "f" * 64, is_labelled=True))


def trained(conductor: Conductor, decibels: float) -> None:
    """The next trial pretrains to such a gain over harmonic inpainting."""
    trial = conductor.next()
    assert isinstance(trial, Suggestion)
    conductor.rows(trial, rung(0.5, probe_gain=99.0), "a")
    parts = {"probe_gain_over_laplace": decibels, "probe_gain_over_mean": decibels + 2}
    conductor.rows(trial, rung(1.0, probe_gain=decibels, **parts), "a")
    conductor.done(trial, Ending.COMPLETE, None)


def test_an_encoder_is_judged_at_the_end_of_its_pretraining() -> None:
    measured: Measured = {
        "begun": {GAIN: {0.5: 3.0}},
        "weak": {GAIN: {0.5: 9.0, 1.0: -1.3}, f"{GAIN}/laplace": {1.0: -1.3}},
        "strong": {GAIN: {1.0: 0.25}, f"{GAIN}/mean": {1.0: 2.0}, f"{GAIN}/laplace": {1.0: 0.5}},
        "none": {"segment/miou": {1.0: 0.5}},
        "old": {f"{GAIN}/mean": {1.0: 4.0}},
    }
    found = gains(measured)
    assert found == {"weak": Gain(-1.3, "laplace"), "strong": Gain(0.25, "laplace")}
    assert best_gain(found) == ("strong", Gain(0.25, "laplace"))
    assert best_gain({}) is None


def test_below_zero_is_a_warning_in_words_and_above_it_none() -> None:
    assert in_words(Gain(-1.3, "laplace")) == "−1.30 dB against harmonic inpainting"
    assert in_words(Gain(2.0, "nearest")) == "+2.00 dB against copying the nearest visible pixel"
    told = warning(Gain(-1.3, "laplace"))
    assert told is not None and told.startswith(
        "No encoder of this study fills in hidden pixels better than harmonic inpainting does "
        "(best: −1.30 dB): pretraining has not learnt the images yet."
    )
    assert "the best trivial filling" in (warning(Gain(0.0, None)) or "")
    assert warning(Gain(0.1, "laplace")) is None and warning(None) is None


def test_the_log_tells_each_gain_and_the_end_warns_once(
    conductor: Conductor, capsys: pytest.CaptureFixture[str]
) -> None:
    for decibels in (-2.5, -1.25):
        trained(conductor, decibels)
    conclude(conductor, conductor.ledger.folder, None)
    text = capsys.readouterr().out
    assert "probe gain −2.50 dB against harmonic inpainting · 1/4 trials" in text
    assert "probe gain of the best encoder: −1.25 dB against harmonic inpainting" in text
    assert text.count(NOT_LEARNT) == 1
    trained(conductor, 0.5)
    conclude(conductor, conductor.ledger.folder, None)
    text = capsys.readouterr().out
    assert "best encoder: +0.50 dB against harmonic inpainting" in text and NOT_LEARNT not in text


def test_prometheus_hears_of_the_best_gain(conductor: Conductor) -> None:
    def told() -> list[float]:
        readings = Telemetry(conductor, list).readings([])
        return [one.value for one in readings if one.name == "maskstudy_probe_gain"]

    assert told() == []
    for decibels in (-2.5, -1.25, -4.0):
        trained(conductor, decibels)
    assert told() == [-1.25]


@pytest.mark.parametrize("trivial", [LEARNT, NOTHING])
def test_the_report_says_it_on_the_first_screen_in_the_table_and_in_curves(
    trivial: float, tmp_path: Path
) -> None:
    tables = study_tables(tmp_path / "s", trials=5, trivial=trivial)
    page = render(tables)
    first_screen = page[: page.index('<section id="section-ranking">')]
    assert (NOT_LEARNT in first_screen) == (trivial == NOTHING)
    assert page.count(NOT_LEARNT) == (trivial == NOTHING)
    assert "Probe gain. Without learning" in page
    assert "probe gain, best encoder" in first_screen and "against harmonic inpainting" in page
    sentences = " ".join(answer(tables).sentences)
    assert ("filled in best by an encoder of" in sentences) == (trivial == LEARNT)
    gained = ranking_numbers(tables).set_index("arm")["probe_gain"]
    control = tables.arms.index[tables.arms["group"] == "control"][0]
    bare = tables.arms.index[tables.arms["group"] == "random-init"][0]
    own = [
        tables.gains[trial].decibels for trial in tables.gains if tables.arm_of(trial) == control
    ]
    assert gained[control] == pytest.approx(sum(own) / len(own)) and gained[bare] != gained[bare]
    drawn = curves(tables, GAIN)
    assert drawn.figure is not None and drawn.figure.layout.shapes[0].y0 == 0
    assert "Below 0 a trivial filling" in drawn.says


def test_an_arm_has_the_mean_gain_of_its_encoders_and_the_best_one_speaks_for_the_study() -> None:
    arm: dict[str, Any] = {"arm": "a", "miou": 0.5}
    other: dict[str, Any] = {"arm": "b", "miou": 0.6, "gain": -3.0}
    tables = hand_made({**arm, "seed": 0, "gain": 1.0}, {**arm, "seed": 1, "gain": -2.0}, other)
    assert ranking_numbers(tables).set_index("arm")["probe_gain"].to_dict() == {"a": -0.5, "b": -3}
    (said,) = (line for line in answer(tables).sentences if "Hidden pixels" in line)
    assert "+1.00 dB against copying the nearest visible pixel" in said
    nothing = hand_made({"arm": "a", "miou": 0.5})
    assert not any("hidden pixels" in line.lower() for line in answer(nothing).sentences)


@pytest.mark.parametrize("trivial", [LEARNT, NOTHING])
def test_status_export_and_console_say_it(
    trivial: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "cells", trials=5, pictures=False, trivial=trivial)
    assert call("status", "cells", "--storage", tmp_path) == 0
    status = " ".join(capsys.readouterr().out.split())
    assert "probe gain of the best encoder: " in status
    assert (NOT_LEARNT in status) == (trivial == NOTHING)

    encoder = folder.encoder(read_suggestions(folder)[0].trial)
    encoder.mkdir()
    (encoder / "encoder.json").write_text(json.dumps({"usage": ["import timm"]}))
    arm = read_suggestions(folder)[0].arm
    place = ["--storage", tmp_path, "--output", tmp_path / "out"]
    assert call("export", "cells", "--arm", arm, *place) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "dB against harmonic inpainting" in printed
    assert (NOT_LEARNT in printed) == (trivial == NOTHING)

    index = Index(Storage(tmp_path))
    wait_until(lambda: index.look("cells").is_read and index.look("cells").num_trials == 5)
    told = views.study(index.look("cells"), Outlook(5, True), None)["gain"]
    assert told["rival"] == "harmonic inpainting" and told["shown"].endswith(" dB")
    assert (told["warning"] is None) == (trivial == LEARNT)


def test_the_way_out_of_an_encoder_that_has_learnt_nothing_is_one_that_has() -> None:
    weak, strong = Gain(-2.0, "laplace"), Gain(1.0, "laplace")
    (said,) = problems("a", {"a": weak, "b": strong})
    assert "no better than harmonic inpainting does; that of trial b does (+1.00 dB" in said
    assert list(problems("b", {"a": weak, "b": strong})) == []
    assert list(problems("a", {"a": weak})) == [warning(weak)]
