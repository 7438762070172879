"""Run: python -m pytest tests/analysis/test_figures.py"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import theme
from analysis.answer import answer
from analysis.figures import FIGURES, Figure
from analysis.figures.classes import classes_numbers
from analysis.figures.cost import cost_numbers, scaled
from analysis.figures.curves import curves
from analysis.figures.differences import claimable_arms, differences_numbers
from analysis.figures.labels import labels, labels_numbers
from analysis.figures.pareto import pareto_front, pareto_numbers
from analysis.figures.probes import probes, probes_numbers
from analysis.figures.ranking import best_arm, ranking_numbers
from analysis.figures.ratio_patch import ratio_patch_numbers
from analysis.figures.schedules import schedules_numbers
from analysis.statistics import holm
from analysis.tables import StudyTables, complete_trials, final, measure_of
from study.ledger import Outcome
from study.owed import RETRIES
from tests.synthetic import hand_made, study_tables
from trainables.metrics import METRICS, MIOU, PSNR

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def tables() -> StudyTables:
    return study_tables(Path("study"), confirm_seeds=3)


def numbers_of(figure: Figure) -> Callable[[StudyTables], Any]:
    """What stands beside a figure's ink under its name and `_numbers`, with the same arguments."""
    ink, arguments = figure.draw, {}
    if isinstance(ink, partial):
        ink, arguments = ink.func, ink.keywords
    return partial(getattr(sys.modules[ink.__module__], f"{ink.__name__}_numbers"), **arguments)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_pair_of_numbers_and_ink(name: str, tables: StudyTables) -> None:
    numbers = numbers_of(FIGURES[name])(tables)
    assert isinstance(numbers, pd.DataFrame)
    assert len(numbers) > 0
    drawn = FIGURES[name].draw(tables)
    pd.testing.assert_frame_equal(drawn.numbers, numbers)
    assert drawn.figure is not None
    assert drawn.title and drawn.says.endswith(".")
    json.dumps(drawn.figure.to_plotly_json()["data"], default=list)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_without_data_says_why_in_a_sentence(name: str) -> None:
    assert numbers_of(FIGURES[name])(hand_made()).empty
    drawn = FIGURES[name].draw(hand_made())
    assert drawn.figure is None
    assert drawn.numbers.empty
    assert drawn.says.endswith(".")


@pytest.mark.parametrize("name", FIGURES)
def test_no_figure_takes_tags_from_the_study(name: str) -> None:
    names = ("background", HOSTILE, "platelet")
    drawn = FIGURES[name].draw(
        study_tables(Path("study"), label=HOSTILE, classes=names, confirm_seeds=2)
    )
    assert drawn.figure is not None
    content = json.dumps(drawn.figure.to_plotly_json(), default=list)
    assert "<img" not in content and "</script" not in content


def test_the_hostile_name_does_reach_figures_escaped() -> None:
    drawn = FIGURES["schedules_miou"].draw(study_tables(Path("study"), label=HOSTILE))
    assert drawn.figure is not None
    assert "&lt;img src=x onerror" in json.dumps(drawn.figure.to_plotly_json(), default=list)


def test_text_for_figures_is_escaped_cut_and_has_no_hidden_characters() -> None:
    assert theme.text("<b>&lt;") == "&lt;b&gt;&amp;lt;"
    assert theme.text("a\x00b\u202ec\nd") == "a b c d"
    assert len(theme.plain("x" * 4096)) == 80


def test_class_colours_are_those_of_the_pictures() -> None:
    from trainables.pictures import CLASS_COLOURS

    assert tuple("#{:02x}{:02x}{:02x}".format(*colour) for colour in CLASS_COLOURS) == theme.CLASSES


def test_heat_map_cells_by_hand() -> None:
    tables = hand_made(
        {"arm": "a", "patch": 4, "ratio": 0.3, "miou": 0.60},
        {"arm": "a", "patch": 4, "ratio": 0.3, "miou": 0.64, "seed": 1},
        {"arm": "b", "patch": 4, "ratio": 0.7, "miou": 0.50, "origin": "control"},
        {"arm": "c", "patch": 8, "ratio": 0.3, "miou": 0.40},
        {"arm": "d", "patch": 8, "ratio": 0.7, "miou": 0.99, "outcome": "stopped"},
        {"arm": "e", "patch": 8, "ratio": 0.7, "miou": 0.99, "origin": "control:random-init"},
    )
    numbers = ratio_patch_numbers(tables, MIOU).set_index(["patch", "ratio"])
    assert list(numbers.index) == [(4, "0.30"), (4, "0.70"), (8, "0.30")]
    assert list(numbers["mean"]) == pytest.approx([0.62, 0.50, 0.40])
    assert list(numbers["n"]) == [2, 1, 1]
    assert numbers.at[(4, "0.30"), "sd"] == pytest.approx(np.std([0.60, 0.64], ddof=1))
    assert np.isnan(numbers.at[(8, "0.30"), "sd"])
    assert list(numbers["has_control"]) == [False, True, False]


def test_patches_of_numbers_and_of_lists_share_a_map() -> None:
    tables = hand_made(
        *(
            {"arm": f"{patch}{ratio}", "patch": patch, "ratio": ratio, "miou": 0.5 + ratio / 10}
            for patch in (16, [4, 8, 8], 8, [2, 4, 4])
            for ratio in (0.3, 0.7)
        ),
        {"arm": "control", "origin": "control", "patch": 8, "miou": 0.5},
    )
    numbers = ratio_patch_numbers(tables, MIOU)
    assert list(numbers["patch"].unique()) == ["2x4x4", "4x8x8", 8, 16]
    drawn = FIGURES["ratio_patch_miou"].draw(tables)
    assert drawn.figure is not None
    assert list(drawn.figure.layout.yaxis.ticktext) == ["2x4x4", "4x8x8", "8", "16"]
    for name, figure in FIGURES.items():
        assert figure.draw(tables).says, name


def test_continuous_ratios_are_binned_and_schedules_count_with_their_mean() -> None:
    ratios: list[Any] = [0.05, 0.11, 0.33, 0.39, 0.61, 1 - 1e-9]
    ratios.append({"name": "linear", "start": 0.2, "end": 0.9})  # mean 0.55
    tables = hand_made(
        *({"arm": f"a{i}", "ratio": ratio, "miou": 0.5} for i, ratio in enumerate(ratios))
    )
    numbers = ratio_patch_numbers(tables, MIOU)
    counts = dict(zip(numbers["ratio"], numbers["n"], strict=True))
    assert counts == {"0.0–0.2": 2, "0.2–0.4": 2, "0.4–0.6": 1, "0.6–0.8": 1, "0.8–1.0": 1}


def test_one_patch_size_is_no_map() -> None:
    tables = hand_made(
        {"arm": "a", "ratio": 0.3, "miou": 0.6}, {"arm": "b", "ratio": 0.7, "miou": 0.5}
    )
    drawn = FIGURES["ratio_patch_miou"].draw(tables)
    assert drawn.figure is None
    assert drawn.says == "Only one patch size was tried (8 px): no map."


def test_ranking_by_hand_and_confirmed_arms_first() -> None:
    tables = hand_made(
        {"arm": "control", "miou": 0.50, "origin": "control"},
        {"arm": "lucky", "miou": 0.70},
        {"arm": "good", "miou": 0.69},
        {"arm": "good", "miou": 0.60, "origin": "confirm", "seed": 1},
        {"arm": "good", "miou": 0.64, "origin": "confirm", "seed": 2},
        {"arm": "cut", "miou": 0.99, "outcome": "stopped"},
    )
    numbers = ranking_numbers(tables)
    assert list(numbers["arm"]) == ["good", "lucky", "control"]
    assert list(numbers["mean"]) == pytest.approx([0.62, 0.70, 0.50])
    assert list(numbers["n"]) == [2, 1, 1]
    assert best_arm(numbers) == "good"


def test_differences_by_hand() -> None:
    control = [0.50, 0.52, 0.48]
    tables = hand_made(
        *({"arm": "c", "origin": "control", "seed": s, "miou": v} for s, v in enumerate(control)),
        *({"arm": "a", "seed": s, "miou": v + 0.1 + 0.01 * s} for s, v in enumerate(control)),
        {"arm": "b", "miou": 0.55},
    )
    numbers = differences_numbers(tables).set_index("arm")
    assert numbers.at["a", "mean"] == pytest.approx(0.11)
    assert numbers.at["a", "low"] == pytest.approx(0.11 - 4.302653 * 0.01 / 3**0.5, abs=1e-6)
    assert numbers.at["a", "paired"] and numbers.at["a", "n"] == 3
    assert numbers.at["b", "mean"] == pytest.approx(0.05)
    assert np.isnan(numbers.at["b", "low"]) and np.isnan(numbers.at["b", "p_holm"])


def of_arm(arm: str, values: dict[int, float], **about: object) -> list[dict[str, object]]:
    return [{"arm": arm, "seed": seed, "miou": value} | about for seed, value in values.items()]


FRESH_SEEDS = {1: 0.60, 2: 0.63, 3: 0.61}
CONTROL = {0: 0.50, 1: 0.51, 2: 0.53, 3: 0.50}
TWIN = {0: 0.40, 1: 0.42, 2: 0.43, 3: 0.40}
SEARCHED = [
    *of_arm("c", CONTROL, origin="control"),
    *of_arm("r", TWIN, origin="control:random-init"),
    *of_arm("a", {0: 0.70}),
    *of_arm("b", {0: 0.72}),
]


def test_only_what_was_confirmed_is_tested() -> None:
    """The seeds that an arm was chosen by show nothing, and cost the others nothing either."""
    trials = [*SEARCHED, *of_arm("b", {1: 0.7, 2: 0.73})]
    trials += of_arm("a", FRESH_SEEDS, origin="confirm")
    numbers = differences_numbers(hand_made(*trials, confirm={"arms": 1, "seeds": 3}))
    numbers = numbers.set_index("arm")
    assert list(numbers.index) == ["a", "b", "r"]
    assert numbers["p_holm"].isna().to_dict() == {"a": False, "b": True, "r": False}
    assert numbers.at["b", "n"] == 3 and numbers.at["b", "low"] < 0.2 < numbers.at["b", "high"]
    both = [numbers.at["a", "p"], numbers.at["r", "p"]]
    assert [numbers.at[arm, "p_holm"] for arm in "ar"] == pytest.approx(holm(both))


def test_before_its_last_seed_is_there_no_verdict_is_told() -> None:
    rule = {"arms": 1, "seeds": 1, "verdict": 2}
    rest = [one for one in SEARCHED if one["seed"] == 0]
    rest += of_arm("a", {1: FRESH_SEEDS[1]}, origin="confirm")
    whole = of_arm("a", {2: FRESH_SEEDS[2], 3: FRESH_SEEDS[3]}, origin="verdict")
    fresh = [{**one, "origin": "verdict"} for one in SEARCHED if one["seed"] in (2, 3)]
    for part in (whole[:1], whole, [*whole, *fresh[:1]], fresh):  # the control lacks one, then it
        tables = hand_made(*rest, *part, confirm=rule)
        assert claimable_arms(tables) <= {"c", "r"}
    tables = hand_made(*rest, *whole, *fresh, confirm=rule)
    assert claimable_arms(tables) == {"a", "c", "r"}
    numbers = ranking_numbers(tables).set_index("arm")
    assert list(numbers.index) == ["a", "c", "r", "b"]
    assert numbers.at["a", "mean"] == pytest.approx(0.62)  # of its verdict alone
    # so is the control's, so that the means differ by the difference that is told
    assert numbers.at["c", "mean"] == pytest.approx((CONTROL[2] + CONTROL[3]) / 2)
    against = differences_numbers(tables).set_index("arm")
    assert against.at["a", "mean"] == pytest.approx(0.62 - numbers.at["c", "mean"])
    assert against.at["r", "mean"] == pytest.approx(-0.1) and against.at["r", "n"] == 2


def test_a_trial_that_is_to_be_run_again_has_not_ended() -> None:
    trials = [*of_arm("c", {2: 0.5, 3: 0.5}, origin="verdict"), *of_arm("a", {0: 0.6})]
    trials += of_arm("a", {2: 0.6, 3: 0.6}, origin="verdict")
    trials[1] |= {"outcome": "failed", "failures": 1}
    rule = {"arms": 1, "seeds": 1, "verdict": 2}
    control = of_arm("c", {0: 0.5}, origin="control")
    assert hand_made(*control, *trials, confirm=rule).verdicts_over == set()
    trials[1]["failures"] = RETRIES + 1  # it will not be
    assert hand_made(*control, *trials, confirm=rule).verdicts_over == {"a", "c"}


def test_a_seed_of_a_verdict_that_has_failed_leaves_the_others() -> None:
    rule = {"arms": 1, "seeds": 1, "verdict": 3}
    rest = [one for one in SEARCHED if one["seed"] == 0]
    rest += of_arm("a", {1: 0.6}, origin="confirm")
    fresh = of_arm("a", {2: 0.60, 3: 0.63, 4: 0.61}, origin="verdict")
    fresh += of_arm("c", {2: 0.50, 3: 0.51, 4: 0.50}, origin="verdict")
    fresh[0]["outcome"] = "diverged"
    tables = hand_made(*rest, *fresh, confirm=rule)
    assert claimable_arms(tables) == {"a", "c"}
    line = differences_numbers(tables).set_index("arm").loc["a"]
    assert line["n"] == 2 and line["mean"] == pytest.approx(0.115)


def test_one_seed_per_arm_has_no_interval() -> None:
    drawn = FIGURES["differences"].draw(study_tables(Path("study")))
    assert drawn.figure is None
    assert drawn.says.startswith("One seed: no interval.")


def test_pareto_front_by_hand() -> None:
    assert pareto_front([1, 2, 3, 2], [3, 2, 1, 1]) == [True, True, True, False]
    assert pareto_front([1, 1], [1, 1]) == [True, True]
    assert pareto_front([], []) == []


def test_stopped_trials_are_never_on_a_front() -> None:
    """However good and cheap they look."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        trials = [
            {
                "arm": f"a{number}",
                "miou": rng.random() + (outcome != "complete"),
                "psnr": rng.random() + (outcome != "complete"),
                "flops": rng.random() + 1e-3,
                "outcome": outcome,
            }
            for number, outcome in enumerate(rng.choice([str(o) for o in Outcome], 12))
        ]
        tables = hand_made(*trials)
        complete = tables.suggestions[tables.suggestions["trial"].isin(complete_trials(tables))]
        for x in (PSNR, "planned_flops"):
            numbers = pareto_numbers(tables, x, MIOU)
            assert set(numbers["arm"]) == set(complete["arm"])


def test_cheap_is_good_on_the_front_of_cost() -> None:
    tables = hand_made(
        {"arm": "cheap", "miou": 0.5, "flops": 1e12},
        {"arm": "dear", "miou": 0.6, "flops": 5e12},
        {"arm": "worse", "miou": 0.5, "flops": 9e12},
    )
    numbers = pareto_numbers(tables, "planned_flops", MIOU).set_index("arm")
    assert numbers["on_front"].to_dict() == {"cheap": True, "dear": True, "worse": False}


def test_stopped_curves_are_marked_where_they_end(tables: StudyTables) -> None:
    drawn = FIGURES["curves_psnr"].draw(tables)
    assert drawn.figure is not None
    marks = next(trace for trace in drawn.figure.data if trace.name == "ended early")
    stopped = tables.results["outcome"].value_counts()["stopped"]
    assert len(marks.x) == stopped  # the failed one ended in segmentation
    assert set(marks.x) <= {25.0, 50.0}


def test_five_hundred_trials_are_a_handful_of_traces() -> None:
    drawn = FIGURES["curves_psnr"].draw(study_tables(Path("study"), trials=500))
    assert drawn.figure is not None
    assert len(drawn.figure.data) < 10


def test_schedules_by_hand() -> None:
    rising = {"name": "linear", "start": 0.2, "end": 0.8}
    labels = {"masking.ratio": "rising"}
    tables = hand_made(
        {"arm": "a", "ratio": rising, "miou": 0.6, "labels": labels},
        {"arm": "b", "ratio": rising | {"end": 0.9}, "miou": 0.8, "labels": labels},
        {"arm": "c", "ratio": 0.5, "miou": 0.5},
    )
    numbers = schedules_numbers(tables, MIOU).set_index("schedule")
    assert list(numbers.index) == ["rising", "constant"]
    assert numbers.at["rising", "median"] == pytest.approx(0.7)
    assert list(numbers["n"]) == [2, 1]


def test_classes_compare_the_best_arm_with_the_controls(tables: StudyTables) -> None:
    numbers = classes_numbers(tables, "segment/iou")
    assert list(dict.fromkeys(numbers["item"])) == [
        "background",
        "red cell",
        "white cell",
        "platelet",
    ]
    assert set(numbers["group"]) == {"best", "control", "random-init", "frozen"}
    best = numbers[numbers["group"] == "best"]
    assert (best["n"] == 3).all() and best["low"].notna().all()


def test_every_metric_of_classes_or_sizes_has_a_figure() -> None:
    drawn = {
        key
        for key, metric in METRICS.items()
        if metric.parts in ("class", "size") and metric.is_drawn and not metric.is_held_out
    }
    assert drawn >= {"iou", "object_f1", "detection", "count_error", "case_dice", "hd95", "nsd"}
    for key in drawn:
        name = key if METRICS[key].parts == "size" else f"class_{key}"
        assert FIGURES[name].needs_volumes == METRICS[key].of_volumes
        empty = FIGURES[name].draw(hand_made())
        by = "by size" if METRICS[key].parts == "size" else "per class"
        assert empty.says == f"No complete trial recorded {METRICS[key].title} {by}."
    titles = [FIGURES[name].draw(hand_made()).title for name in ("object_f1", "class_hd95")]
    assert titles == ["Object F1 by size of the object", "Surface distance of each class"]
    assert "class_dice" not in FIGURES and "class_test_iou" not in FIGURES


def test_distances_between_surfaces_say_their_unit_and_that_lower_is_better(
    tables: StudyTables,
) -> None:
    drawn = FIGURES["class_hd95"].draw(tables)
    assert drawn.figure is not None
    assert list(dict.fromkeys(drawn.numbers["item"])) == ["red cell", "white cell", "platelet"]
    assert "Lower is better." in drawn.says
    assert drawn.figure.layout.xaxis.title.text == "HD95 (validation, mm)"
    hovers = [words for trace in drawn.figure.data for words in trace.hovertext]
    assert hovers and all(words.endswith(" mm") for words in hovers)
    assert "Lower is better." not in FIGURES["class_nsd"].draw(tables).says
    measure = tables.measure("segment/hd95/platelet")
    assert (measure.title, measure.unit, measure.maximize) == ("HD95, platelet", "mm", False)
    assert measure.axis == "HD95, platelet (mm, lower is better)"
    assert measure.show(3.14159) == "3.14 mm"


def test_costs_of_a_whole_trial_add_up_or_are_the_larger_one(tables: StudyTables) -> None:
    finals = final(tables)
    for name, whole in [
        ("device_seconds", finals.filter(regex="/device_seconds$").sum(axis=1)),
        ("peak_memory", finals.filter(regex="/peak_memory$").max(axis=1)),
    ]:
        numbers = pareto_numbers(tables, name, MIOU).set_index("group")
        arm = numbers.at["control", "arm"]
        assert numbers.at["control", "x"] == pytest.approx(whole[finals["arm"] == arm].mean())
        cheapest = numbers["x"].min()
        assert numbers.loc[numbers["x"] == cheapest, "on_front"].any()


def test_curves_of_pretraining_leave_out_the_frozen_twin(tables: StudyTables) -> None:
    """It is pretrained as the control is."""

    def names(metric: str) -> set[str]:
        drawn = curves(tables, metric).figure
        assert drawn is not None
        return {trace.name for trace in drawn.data}

    for metric in (PSNR, "pretrain/probe_ssim"):
        assert "control" in names(metric) and "frozen" not in names(metric)
    assert {"control", "frozen"} <= names(MIOU)


@pytest.mark.parametrize(
    ("name", "largest", "unit", "size"),
    [
        ("planned_flops", 5e12, "TFLOP", 1e12),
        ("planned_flops", 5.0, "FLOP", 1.0),
        ("device_seconds", 7200.0, "h", 3600.0),
        ("device_seconds", 7199.0, "min", 60.0),
        ("device_seconds", 119.0, "s", 1.0),
        ("peak_memory", 2.0**30, "GiB", 2.0**30),
        ("peak_memory", 5.0, "MiB", 2.0**20),
        ("images_per_second", 1e9, "images/s", 1.0),
        (PSNR, 1e9, "dB", 1.0),
    ],
)
def test_a_unit_follows_the_largest_value(
    name: str, largest: float, unit: str, size: float
) -> None:
    assert scaled(measure_of(name), pd.Series([1.0, largest, np.nan])) == (unit, size)


def test_costs_are_means_over_complete_trials(tables: StudyTables) -> None:
    numbers = cost_numbers(tables, "planned_flops").set_index("group")
    rows = tables.rows[tables.rows["metric"] == "planned_flops"]
    control = rows[(rows["arm"] == numbers.at["control", "arm"]) & (rows["progress"] == 1)]
    expected = control.groupby("phase")["value"].mean()
    assert numbers.at["control", "pretrain"] == pytest.approx(expected["pretrain"])
    assert np.isnan(numbers.at["random-init", "pretrain"])
    assert numbers.at["random-init", "segment"] > 0


def with_labels(arm: str, labels: Any, encoder: str, *scores: float) -> list[dict[str, Any]]:
    segment = {"segment": {"labels": labels, "encoder": encoder}}
    origin = "control" if (labels, encoder) == (None, "finetune") else "search"
    return [
        {"arm": arm, "seed": seed, "miou": score, "config": segment, "origin": origin}
        for seed, score in enumerate(scores)
    ]


def test_what_pretraining_is_worth_by_labels() -> None:
    tables = hand_made(
        *with_labels("a", None, "finetune", 0.80, 0.82, 0.81),
        *with_labels("b", None, "random-init", 0.80, 0.81, 0.82),
        *with_labels("c", 16, "finetune", 0.70, 0.72, 0.74),
        *with_labels("d", 16, "random-init", 0.60, 0.63, 0.63),
        *with_labels("e", 4, "finetune", 0.60),
        *with_labels("f", 0.5, "frozen", 0.5, 0.5),
        {"arm": "g", "patch": 4, "miou": 0.9},
    )
    numbers = labels_numbers(tables)
    assert list(zip(numbers["labels"], numbers["encoder"], numbers["n"], strict=True)) == [
        ("4", "finetune", 1),
        ("16", "finetune", 3),
        ("16", "random-init", 3),
        ("50 %", "frozen", 2),
        ("all", "finetune", 3),
        ("all", "random-init", 3),
    ]
    line = numbers.iloc[1]
    assert line["gain"] == pytest.approx(0.1) and line["pairs"] == 3
    assert line["gain_low"] == pytest.approx(0.1 - 4.302653 * 0.01 / 3**0.5, abs=1e-6)
    assert numbers["gain"].notna().sum() == 2
    says = labels(tables).says
    found = answer(tables)
    assert any(says.endswith(sentence) for sentence in found.sentences)
    assert found.headline == "Pretraining is shown to pay with 16 labels." and found.is_shown
    assert "16 labels +0.100 [+0.075, +0.125]; all labels +0.000" in says


def test_one_label_is_not_told_in_the_plural() -> None:
    tables = hand_made(
        *with_labels("a", None, "finetune", 0.80, 0.82),
        *with_labels("b", 1, "finetune", 0.70, 0.72),
        *with_labels("c", 1, "random-init", 0.60, 0.60),
    )
    assert ": 1 label +0.110 [" in labels(tables).says


def probed(count: int, told: Callable[[int], float], **changes: Any) -> list[dict[str, Any]]:
    """So many arms of two seeds, with rising mIoU, and what the dense probe tells of each."""
    return [
        {"arm": f"a{arm}", "seed": seed, "miou": 0.5 + arm / 50 + seed / 100, "psnr": 20.0}
        | {"pretrain/dense_miou": told(arm) + (-0.3 if seed else 0.3), **changes}
        for arm in range(count)
        for seed in (0, 1)
    ]


def test_a_probe_that_orders_the_arms_as_fine_tuning_does_is_told() -> None:
    tables = hand_made(*probed(6, lambda arm: arm / 100))
    numbers = probes_numbers(tables)
    # only means over seeds have that order; PSNR is alike for all arms and has none
    assert numbers["metric"].tolist() == ["pretrain/dense_miou"]
    assert numbers[["n", "mean", "low", "high"]].iloc[0].tolist() == [6, 1.0, 1.0, 1.0]
    drawn = probes(tables)
    assert drawn.title == "Do probes foretell mIoU?"
    assert drawn.says.startswith(
        "The dense probe orders the arms most as mIoU does (+1.00, 95 % interval +1.00 to +1.00)."
    )


def test_a_probe_that_does_not_is_told_as_well() -> None:
    tables = hand_made(*probed(6, lambda arm: arm * 5 % 6 / 100))
    drawn = probes(tables)
    assert drawn.numbers["mean"].iloc[0] < 0.5
    assert drawn.says.startswith("No probe is shown to order the arms as mIoU does; closest comes")


def test_four_arms_and_controls_of_another_kind_are_no_order() -> None:
    four = probed(4, lambda arm: arm / 100)
    others = [
        {"arm": f"f{seed}", "seed": seed, "origin": "control:frozen", "miou": 0.9}
        | {"pretrain/dense_miou": seed / 10}
        for seed in range(5)
    ]
    drawn = probes(hand_made(*four, *others))
    assert drawn.numbers.empty and drawn.figure is None
    assert drawn.says.startswith("Fewer than 5 complete arms")
    stopped = probed(2, lambda arm: arm / 100, outcome="stopped")
    assert probes(hand_made(*four, *[one | {"arm": "s"} for one in stopped])).figure is None


def test_that_pretraining_costs_or_does_nothing_is_the_answer_too() -> None:
    """Arms that learnt from more labels are not told as better ones."""
    none = with_labels("b", None, "random-init", 0.8, 0.81, 0.82)
    few = with_labels("d", 4, "random-init", 0.6, 0.63, 0.63)
    same = with_labels("a", None, "finetune", 0.81, 0.8, 0.82)
    worse = with_labels("c", 4, "finetune", 0.50, 0.53, 0.54)
    better = with_labels("e", 4, "finetune", 0.62, 0.60, 0.66)
    found = answer(hand_made(*none, *few, *same, *worse))
    assert found.headline == "Pretraining is shown to cost with 4 labels, and to pay with none."
    found = answer(hand_made(*none, *few, *same, *better))
    assert "not shown to pay or to cost" in found.headline and not found.is_shown
    assert not any("ahead of the best" in sentence for sentence in found.sentences)


def test_only_arms_that_are_segmented_alike_tell_whether_probes_foretell() -> None:
    """Those with few labels score less, whatever their encoders are."""
    alike = probed(6, lambda arm: arm / 100)
    few = [
        {"arm": f"few{arm}", "miou": 0.1, "pretrain/dense_miou": 0.9 + arm / 100}
        | {"config": {"segment": {"labels": 4}}}
        for arm in range(6)
    ]
    control = [one | {"origin": "control"} if one["arm"] == "a0" else one for one in alike]
    numbers = probes_numbers(hand_made(*control, *few))
    assert numbers[["n", "mean"]].iloc[0].tolist() == [6, 1.0]
