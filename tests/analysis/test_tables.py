"""Run: python -m pytest tests/analysis/test_tables.py"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.tables import (
    Measure,
    arm_label,
    arm_scores,
    by_size,
    final,
    load,
    mean_ratio,
    measure_of,
    parts_of,
)
from study.folder import StudyFolder
from study.ledger import LedgerError, Suggestion, sealed
from study.ledger.files import sha256
from study.loading import parse_spec
from tests.drawn import drawn
from tests.synthetic import hand_made, refreeze, study_tables, write_study
from trainables.errors import StorageError, UserError
from trainables.schedules import SCHEDULES, Schedule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return write_study(tmp_path_factory.mktemp("studies") / "platelets", pictures=False)


def test_a_study_is_read_from_its_folder(folder: StudyFolder) -> None:
    tables = load(folder.root)
    assert tables.name == "platelets"
    assert tables.spec["question"] == "Do small masks help the smallest cells?"
    assert len(tables.suggestions) == len(tables.arms) == 14
    assert list(tables.arms["group"][:4]) == ["control", "random-init", "frozen", "search"]
    assert [goal.key for goal in tables.objectives] == ["segment/miou", "pretrain/probe_psnr"]
    assert tables.measure("pretrain/probe_psnr").axis == "probe PSNR (dB)"
    assert tables.environment["data"]["fingerprint"] == "5d41402abc4b2a76"


def test_analysis_imports_neither_torch_nor_ray_nor_optuna(folder: StudyFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from analysis.report import build_report\n"
        "build_report(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print([name for name in ('torch', 'ray', 'optuna', 'monai') if name in sys.modules])"
    )
    output = folder.root.parent / "report.html"
    command = [sys.executable, "-c", code, str(folder.root), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_complete_trials_have_final_scores(folder: StudyFolder) -> None:
    tables = load(folder)
    finals = final(tables)
    outcomes = tables.results["outcome"]
    assert set(outcomes) == {"complete", "stopped", "failed"}
    assert set(finals.index) == set(outcomes.index[outcomes == "complete"])
    trial = finals.index[0]
    rows = tables.rows[(tables.rows["trial"] == trial) & (tables.rows["metric"] == "miou")]
    assert list(rows["progress"]) == [0.25, 0.5, 1.0]
    assert finals.at[trial, "segment/miou"] == rows["value"].iloc[-1]


def test_a_failed_trial_has_no_final_score_though_its_pretraining_is_complete() -> None:
    tables = study_tables(Path("x"))
    failed = tables.results.index[tables.results["outcome"] == "failed"][0]
    rows = tables.rows[tables.rows["trial"] == failed]
    assert 1.0 in set(rows.loc[rows["phase"] == "pretrain", "progress"])
    assert failed not in final(tables).index


def test_the_trial_that_made_an_arm_stand_out_no_longer_counts_once_confirmed() -> None:
    tables = study_tables(Path("x"), confirm_seeds=3)
    scores = arm_scores(tables, "segment/miou")
    seeds = scores.groupby("arm")["seed"].apply(list).to_dict()
    groups = tables.arms["group"]
    confirmed = set(tables.suggestions.loc[tables.suggestions["origin"] == "confirm", "arm"])
    for arm in confirmed:
        assert seeds[arm] == ([1, 2, 3] if groups[arm] == "search" else [0, 1, 2, 3])
    others = [arm for arm in seeds if arm not in confirmed]
    assert others and all(seeds[arm] == [0] for arm in others)


def test_patches_with_edges_of_each_axis_are_named_and_ordered_by_size() -> None:
    sizes = [[16, 8, 8], 8, [4, 8, 8], [8, 8, 8], [4, 4, 40], 4]
    tables = hand_made(
        *({"arm": f"a{n}", "patch": size, "miou": 0.5} for n, size in enumerate(sizes))
    )
    assert list(tables.arms["patch"]) == ["16x8x8", 8, "4x8x8", 8, "4x4x40", 4]
    assert list(tables.arms["unit"]) == list(tables.arms["patch"])
    assert tables.arms.at["a2", "label"] == "patch 4x8x8, ratio 0.50"
    ordered = by_size(tables.arms["patch"])
    assert list(ordered.cat.categories) == [4, "4x8x8", 8, "4x4x40", "16x8x8"]
    assert list(ordered) == list(tables.arms["patch"])


@pytest.mark.parametrize(
    ("schedule", "mean"),
    [
        ({"name": "constant", "value": 0.3}, 0.3),
        ({"name": "linear", "start": 0.2, "end": 0.8}, 0.5),
        ({"name": "cosine", "start": 0.2, "end": 0.6}, 0.4),
        ({"name": "step", "values": [0.2, 0.8], "at": [0.25]}, 0.65),
        ({"name": "power", "start": 0.2, "end": 0.8, "exponent": 2.0}, 0.4),
        ({"name": "ramp", "start": 0.2, "end": 0.8, "until": 0.5}, 0.65),
        ({"name": "piecewise", "values": [0.2, 0.6, 0.9], "at": None}, 0.575),
        ({"name": "piecewise", "values": [0.2, 0.8], "at": [0.5, 1.0]}, 0.35),
        ({"name": "amr", "start": 0.25, "end": 0.75}, 0.5),
        ({"name": "amr", "start": 0.1, "end": 0.7, "shape": "power"}, 0.3),
        ({"name": "uniform", "low": 0.5, "high": 0.9}, 0.7),
        ({"name": "truncated_normal"}, 0.6936),
        ({"name": "truncated_normal", "mean": 0.5, "low": 0.3, "high": 0.7}, 0.5),
    ],
)
def test_mean_ratio_by_hand(schedule: dict[str, object], mean: float) -> None:
    assert mean_ratio(schedule) == pytest.approx(mean, abs=2e-5)


def test_a_schedule_of_a_newer_version_has_no_computed_mean() -> None:
    assert mean_ratio({"name": "spiral", "turns": 3}) is None
    assert mean_ratio({"name": "linear", "from": 3}) is None
    assert mean_ratio({"name": "uniform", "low": 0.9, "high": 0.1}) is None


@pytest.mark.parametrize(
    ("ratio", "words", "schedule"),
    [
        ({"name": "constant", "value": 0.75}, "ratio 0.75", "constant"),
        ({"name": "linear", "start": 0.2, "end": 0.8}, "ratio 0.20→0.80 linear", "linear"),
        ({"name": "cosine", "start": 0.9, "end": 0.1}, "ratio 0.90→0.10 cosine", "cosine"),
        (
            {"name": "power", "start": 0.2, "end": 0.8, "exponent": 2.0},
            "ratio 0.20→0.80 power exponent 2",
            "power",
        ),
        (
            {"name": "ramp", "start": 0.2, "end": 0.8, "until": 0.25},
            "ratio 0.20→0.80 ramp until 0.25",
            "ramp",
        ),
        (
            {"name": "amr", "start": 0.25, "end": 0.75, "shape": "linear", "exponent": None},
            "ratio 0.25→0.75 amr",
            "amr",
        ),
        (
            {"name": "amr", "start": 0.25, "end": 0.75, "shape": "power", "exponent": 1.5},
            "ratio 0.25→0.75 amr power exponent 1.5",
            "amr power",
        ),
        (
            {"name": "amr", "start": 0.25, "end": 0.75, "shape": "step", "levels": 4},
            "ratio 0.25→0.75 amr step levels 4",
            "amr step",
        ),
        ({"name": "uniform", "low": 0.5, "high": 1.0}, "ratio 0.50-1.00 random", "uniform"),
        (
            {"name": "truncated_normal", "mean": 0.55, "deviation": 0.25, "low": 0.5, "high": 1.0},
            "ratio 0.50-1.00 normal 0.55±0.25",
            "truncated_normal",
        ),
        (
            {"name": "piecewise", "values": [0.2, 0.6, 0.9], "at": None},
            "ratio 0.2/0.6/0.9 piecewise",
            "piecewise",
        ),
        (
            {"name": "piecewise", "values": [0.123456, 0.6], "at": [0.0, 0.5]},
            "ratio 0.123/0.6 piecewise at 0/0.5",
            "piecewise",
        ),
        (
            {"name": "step", "values": [0.2, 0.8], "at": [0.25]},
            "ratio 0.2/0.8 step at 0.25",
            "step",
        ),
        ({"name": "spiral", "turns": 3}, "ratio spiral 3", "spiral"),
    ],
)
def test_the_words_for_a_schedule_by_hand(
    ratio: dict[str, object], words: str, schedule: str
) -> None:
    arm = hand_made({"arm": "a", "ratio": ratio}).arms.loc["a"]
    assert (arm["label"], arm["schedule"]) == (f"patch 8, {words}", schedule)


def test_schedules_between_the_same_values_have_words_of_their_own_and_a_mean() -> None:
    rising = {"start": 0.4, "end": 0.6}
    options: dict[str, dict[str, object]] = {
        "constant": {"value": 0.5},
        "linear": {**rising},
        "cosine": {**rising},
        "power": {**rising},
        "step": {"values": [0.4, 0.6], "at": [0.5]},
        "ramp": {**rising, "until": 1.0},
        "piecewise": {"values": [0.4, 0.6]},
        "amr": {**rising},
        "uniform": {"low": 0.4, "high": 0.6},
        "truncated_normal": {"mean": 0.5, "deviation": 0.1, "low": 0.4, "high": 0.6},
    }
    given = [{"arm": name, "ratio": {"name": name} | options[name]} for name in options]
    arms = hand_made(*given).arms
    assert arms["label"].is_unique
    assert not arms["label"].str.contains("[", regex=False).any()
    assert list(arms["ratio"]) == pytest.approx(
        [0.5 if name != "power" else 0.4 + 0.2 / 3 for name in options], abs=1e-5
    )


def test_every_schedule_has_a_mean_and_words_for_each_of_its_settings() -> None:
    ratios = [each.model_dump(mode="json") for name in SCHEDULES for each in drawn(Schedule, name)]
    arms = hand_made(*({"arm": f"a{n}", "ratio": ratio} for n, ratio in enumerate(ratios))).arms
    assert arms["label"].is_unique, sorted(arms["label"])
    assert not arms["label"].str.contains("[", regex=False).any()
    assert arms["ratio"].between(0, 1).all()


def test_a_searched_option_of_the_ratio_is_told_once() -> None:
    ratio = {"name": "uniform", "low": 0.25, "high": 0.9}
    labels = {"masking.ratio.low": 0.25, "masking.ratio.high": 0.9, "masking.ratios": 3}
    arms = hand_made({"arm": "a", "ratio": ratio, "labels": labels}).arms
    assert arms.at["a", "label"] == "patch 8, ratio 0.25-0.90 random, ratios 3"


def test_labels_say_what_was_varied() -> None:
    tables = study_tables(Path("x"))
    labels = list(tables.arms["label"])
    assert labels[:4] == [
        "control: patch 8, ratio 0.75",
        "random-init: patch 8, ratio 0.75",
        "frozen: patch 8, ratio 0.75",
        "patch 4, ratio 0.60",
    ]
    assert labels[4] == "patch 8, ratio 0.46→0.81 linear rising"
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({}, "patch 8, ratio 0.60, hpm"),
        ({"masking.strategy": "hard ones"}, "patch 8, ratio 0.60, hard ones"),
        (
            {"masking": "hard ones", "pretrain.loss": "arl"},
            "patch 8, ratio 0.60, hard ones, loss arl",
        ),
    ],
)
def test_a_strategy_is_told_once_by_the_studys_own_word(labels: dict[str, str], words: str) -> None:
    ratio = {"name": "constant", "value": 0.6}
    config = {"model": {"patch": 8}, "masking": {"strategy": {"name": "hpm"}, "ratio": ratio}}
    suggestion = Suggestion(
        number=0,
        trial="t",
        arm="a",
        seed=0,
        origin="search",
        config=config,
        params={},
        labels=labels,
    )
    assert arm_label(suggestion) == words


def test_the_table_of_metrics_counts_and_rows_only_for_a_metric_it_does_not_have() -> None:
    tables = study_tables(Path("x"))
    miou = tables.rows[tables.rows["metric"] == "miou"]
    new = miou.assign(metric="glow_worm/red cell", unit="cd", goal="minimize")
    wrong = miou.assign(metric="hd95/spleen", unit="inch", goal="maximize")
    tables = replace(tables, rows=pd.concat([tables.rows, new, wrong]))
    assert tables.measure("segment/glow_worm/red cell") == (
        "segment/glow_worm/red cell", "glow worm, red cell", "cd", False,
    )  # fmt: skip
    assert tables.measure("segment/hd95/spleen") == measure_of("segment/hd95/spleen")
    assert tables.measure("segment/hd95/spleen")[2:] == ("mm", False)
    assert tables.measure("segment/unheard_of") == ("segment/unheard_of", "unheard of", "", True)
    assert measure_of("segment/new", unit="1").unit == measure_of("segment/new").unit == ""


def test_an_objective_of_another_version_has_the_goal_of_the_study_file() -> None:
    tables = study_tables(Path("x"))
    miou = tables.rows[tables.rows["metric"] == "miou"]
    tables = replace(tables, rows=miou.assign(metric="glow_worm", unit="cd", goal="maximize"))
    tables.spec["objectives"] = [{"metric": "segment/glow_worm", "goal": "minimize"}]
    assert tables.objectives == [("segment/glow_worm", "glow worm", "cd", False)]


def test_parts_of_a_metric_stand_in_the_order_of_its_rows() -> None:
    tables = study_tables(Path("x"), classes=("background", "red/cell", "a@b"))
    assert parts_of(tables, "segment/iou") == ["background", "red/cell", "a@b"]
    assert parts_of(tables, "segment/object_f1") == ["small", "medium", "large"]
    assert parts_of(tables, "pretrain/probe_psnr") == ["0.25", "0.5", "0.75"]
    assert parts_of(tables, "segment/miou") == parts_of(tables, "pretrain/iou") == []


def test_values_have_as_many_digits_as_mean_something() -> None:
    flops, decibels = measure_of("planned_flops"), measure_of("pretrain/probe_psnr")
    assert flops.show(2.2528e15) == "2.253e+15 FLOP"
    assert flops.show(-2.2528e15, signed=True) == "\N{MINUS SIGN}2.253e+15 FLOP"
    assert (flops.number(99_999.0), flops.number(100_000.0)) == ("99999.0", "1e+05")
    assert decibels.show(24.0) == "24.00 dB" and decibels.number(24.0) == "24.00"
    assert decibels.show(None) == decibels.number(float("nan")) == "–"
    assert Measure("segment/x", "x", "", True).show(0.5) == "0.500"


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no study lies here.*study\.yaml is missing"):
        load(tmp_path)


def test_a_changed_or_huge_study_file_is_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", trials=1, pictures=False)
    folder.spec.write_text(folder.spec.read_text() + "# changed\n")
    with pytest.raises(LedgerError, match="changed after it was frozen"):
        load(folder)
    (folder.root / "environment.json").write_bytes(sealed({"study_sha256": [sha256(b"\xff")]}))
    folder.spec.write_bytes(b"\xff")
    with pytest.raises(LedgerError, match="not text in UTF-8"):
        load(folder)
    folder.spec.write_bytes(b"#" * (256 * 1024 + 1))
    with pytest.raises(StorageError, match="at most 262144 bytes"):
        load(folder)


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ('study: "platelets"', "study: on", "study", "on"),
        ('study: "platelets"', "study: 2026-02-30", "study", "2026-02-30"),
        ('study: "platelets"', "study: 1_000", "study", "1_000"),
        ('question: "Do', "question: off #", "question", "off"),
        ('question: "Do', "question: 12:30 #", "question", "12:30"),
        ("seeds: 1\n", "seeds: 1\nseed: 010\n", "seed", 10),
        ("seeds: 1\n", "seeds: 1\nseed: 0o10\n", "seed", 8),
        ("rungs: [0.25", "rungs: [1e-5, 0.25", "rungs", [1e-5, 0.25, 0.5, 1.0]),
    ],
)
def test_what_is_reported_of_the_study_file_is_what_was_run(
    old: str, new: str, key: str, value: object, tmp_path: Path
) -> None:
    folder = write_study(tmp_path / "s", trials=3, pictures=False)
    run = parse_spec(refreeze(folder, old, new), Path(), where="s.yaml")
    reported = load(folder).spec[key]
    assert reported == getattr(run, key) == value
    assert type(reported) is type(value)


@pytest.mark.parametrize(
    "mistake", ["- a list", "a: [1,", "a: &x 1", "a: *x", "a: 1\na: 2", "a: \t"]
)
def test_a_study_file_that_cannot_be_read_is_named_with_a_way_out(
    mistake: str, tmp_path: Path
) -> None:
    folder = write_study(tmp_path / "s", trials=1, pictures=False)
    refreeze(folder, folder.spec.read_text(), mistake)
    with pytest.raises(StorageError, match=r"s/study\.yaml:\d: .*; bring it back from a copy"):
        load(folder)
