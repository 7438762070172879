"""What pretraining is worth: the score against the labels that segmentation learnt from."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import Drawn, mark_of
from analysis.figures.rows import error_bars
from analysis.statistics import FEWEST_SEEDS, LEVEL, difference, holm, mean_and_interval
from analysis.tables import Measure, StudyTables, arm_scores, lines_of
from analysis.theme import colour, figure

LABELS, ENCODER = "segment.labels", "segment.encoder"
# what `segment.encoder` says -> in words, and the group whose colour it has
ENCODERS = {
    "finetune": ("pretrained", "control"),
    "frozen": ("frozen", "frozen"),
    "random-init": ("random weights", "random-init"),
}
COLUMNS = ["labels", "encoder", "n", "mean", "low", "high"]
GAINS = ["gain", "gain_low", "gain_high", "p", "p_holm", "pairs"]


def labels_numbers(tables: StudyTables) -> pd.DataFrame:
    """One line per number of labels and encoder, few labels first.

    labels ("4", "5 %", "all"), encoder, n, mean, low, high; then what it is ahead of random weights
    with as many labels: gain, gain_low, gain_high, p, Holm-adjusted p, paired by seed, and pairs.
    Of the arms that have the control's settings in all else.
    """
    goal = tables.objectives[0] if tables.objectives else None
    controls = tables.arms[tables.arms["group"] == "control"]
    if goal is None or controls.empty or not goal.key.startswith("segment/"):
        return pd.DataFrame(columns=COLUMNS + GAINS)
    alike = _all_else(controls.iloc[0]["settings"])
    by_arm: dict[Hashable, Any] = {
        arm: part for arm, part in arm_scores(tables, goal.key).groupby("arm")
    }
    found: dict[tuple[float, str, str], dict[Hashable, float]] = {}
    for arm, settings in tables.arms["settings"].items():
        if arm in by_arm and _all_else(settings) == alike:
            key = (*_in_order(settings.get(LABELS)), settings.get(ENCODER, "finetune"))
            found.setdefault(key, {}).update(
                zip(by_arm[arm]["seed"], by_arm[arm]["value"], strict=True)
            )
    lines: list[list[Any]] = []
    places = list(ENCODERS)
    for place, labels, encoder in sorted(
        (key for key in found if key[2] in ENCODERS),
        key=lambda key: (key[0], places.index(key[2])),
    ):
        values, gain = found[place, labels, encoder], None
        random = found.get((place, labels, "random-init"))
        if random is not None and encoder != "random-init":
            gain = difference(values, random)
        about = [labels, encoder, len(values), *mean_and_interval(values.values())]
        of_gain: list[Any] = [None] * 5 + [0]
        if gain is not None:
            of_gain = [gain.mean, gain.low, gain.high, gain.p, None, gain.n]
        lines.append([*about, *of_gain])
    numbers = pd.DataFrame(lines, columns=COLUMNS + GAINS)
    numbers[GAINS[:-1]] = numbers[GAINS[:-1]].astype(float)
    is_tested = numbers["p"].notna()
    numbers.loc[is_tested, "p_holm"] = holm(list(numbers.loc[is_tested, "p"]))
    return numbers


def labels(tables: StudyTables) -> Drawn:
    numbers = labels_numbers(tables)
    title = "What pretraining is worth"
    if numbers.empty:
        return Drawn(numbers, None, title, "The control has no score of segmentation yet.")
    goal = tables.objectives[0]
    traces: list[Any] = []
    for encoder, (words, group) in ENCODERS.items():
        part = numbers[numbers["encoder"] == encoder]
        if part.empty:
            continue
        hue, symbol = mark_of(group)
        traces.append(
            go.Scatter(
                x=list(part["labels"]),
                y=list(part["mean"]),
                mode="lines+markers",
                name=words,
                line={"color": colour(hue), "width": 2},
                marker={"size": 9, "color": colour(hue), "symbol": symbol},
                error_y=error_bars(part, hue),
                hovertext=[
                    f"{words}, {_counted(line.labels)}<br>{goal.show(line.mean)}, n = {line.n}"
                    for line in lines_of(part)
                ],
                hoverinfo="text",
            )
        )
    drawn = figure(traces, height=380, x="labelled groups learnt from", y=goal.axis, legend=True)
    order = list(dict.fromkeys(numbers["labels"]))
    drawn.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    return Drawn(
        numbers,
        drawn,
        title,
        f"Means over seeds with 95 % t intervals, all else as the control has it. "
        f"{worth(numbers, goal)}",
    )


def _counted(number: str) -> str:
    return f"{number} label{'' if number == '1' else 's'}"


def worth(numbers: pd.DataFrame, goal: Measure) -> str:
    """What pretrained weights are ahead of random ones, in a sentence."""
    shown = numbers[(numbers["encoder"] == "finetune") & numbers["gain"].notna()]
    if shown.empty:
        return "Pretrained and random weights do not share two seeds, so no difference is told."
    gains = [
        f"{_counted(line.labels)} {goal.number(line.gain, signed=True)} "
        f"[{goal.number(line.gain_low, signed=True)}, {goal.number(line.gain_high, signed=True)}]"
        for line in lines_of(shown)
    ]
    fewest = int(shown["pairs"].min())
    return f"Pretrained − random weights, paired by seed (n ≥ {fewest}): {'; '.join(gains)}."


def is_shown(numbers: pd.DataFrame) -> pd.Series:
    """Which fine-tuned lines differ from random weights beyond chance."""
    is_enough = (numbers["encoder"] == "finetune") & (numbers["pairs"] >= FEWEST_SEEDS)
    return is_enough & (numbers["p_holm"] < LEVEL)


def headline(numbers: pd.DataFrame, goal: Measure) -> str:
    """With how many labels pretraining is shown to pay, or to cost."""
    shown = numbers[is_shown(numbers)]
    is_better = shown["gain"] > 0 if goal.maximize else shown["gain"] < 0
    pays, costs = (", ".join(shown.loc[which, "labels"]) for which in (is_better, ~is_better))
    if not pays and not costs:
        return "Pretraining is not shown to pay or to cost with any number of labels."
    if not pays:
        return f"Pretraining is shown to cost with {costs} labels, and to pay with none."
    also = f", and to cost with {costs}" if costs else ""
    return f"Pretraining is shown to pay with {pays} labels{also}."


def _all_else(settings: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in settings.items() if path not in (LABELS, ENCODER)}


def _in_order(given: Any) -> tuple[float, str]:
    """(place in the figure, in words): counts before shares before all, each by size."""
    if not isinstance(given, int | float):
        return (float("inf"), "all")
    return (given, str(given)) if given >= 1 else (1e9 + given, f"{100 * given:g} %")
