"""Scores of each class, or of each size of object: the best arm against the controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import Drawn, mark_of, name_of
from analysis.figures.ranking import best_arm, ranking_numbers
from analysis.figures.rows import error_bars, row_figure
from analysis.statistics import mean_and_interval
from analysis.tables import StudyTables, arm_scores, final, lines_of, parts_of
from analysis.theme import colour, text
from trainables.metrics import Part, metric_of

WORDS: dict[Part | None, tuple[str, str]] = {  # in the title, and in "no trial recorded ..."
    "class": ("of each class", "per class"),
    "size": ("by size of the object", "by size"),
}


def classes_numbers(tables: StudyTables, metric: str) -> pd.DataFrame:
    """item (class or size), group, arm, label, n, mean, low, high for best arm and controls."""
    finals = final(tables)
    ranks = ranking_numbers(tables)
    best = best_arm(ranks)
    chosen = {} if best is None else {"best": best}
    for group in ("control", "random-init", "frozen"):
        for arm in ranks.loc[ranks["group"] == group, "arm"]:
            if arm != best:
                chosen.setdefault(group, arm)
    lines = []
    for item in parts_of(tables, metric):
        scores = arm_scores(tables, f"{metric}/{item}", finals)
        for group, arm in chosen.items():
            values = scores.loc[scores["arm"] == arm, "value"]
            if len(values):
                about = [item, group, arm, tables.label(arm), len(values)]
                lines.append([*about, *mean_and_interval(values)])
    columns = ["item", "group", "arm", "label", "n", "mean", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def classes(tables: StudyTables, metric: str) -> Drawn:
    numbers = classes_numbers(tables, metric)
    measure = tables.measure(metric)
    of_each, by_each = WORDS[metric_of(metric).parts]
    title = f"{measure.heading} {of_each}"
    if numbers.empty:
        says = f"No complete trial recorded {measure.title} {by_each}."
        return Drawn(numbers, None, title, says)
    items = list(dict.fromkeys(numbers["item"]))
    unit = f" {measure.unit}" if measure.unit else ""
    groups = list(dict.fromkeys(numbers["group"]))
    traces = []
    for index, group in enumerate(groups):
        part = numbers[numbers["group"] == group]
        rows = [items.index(item) for item in part["item"]]
        offset = (index - (len(groups) - 1) / 2) * 0.13 + 0.08
        hue, symbol = mark_of(group)
        traces.append(
            go.Scatter(
                x=list(part["mean"]),
                y=[row + offset for row in rows],
                mode="markers",
                name=name_of(group),
                marker={"size": 11, "color": colour(hue), "symbol": symbol},
                error_x=error_bars(part, hue),
                hovertext=[
                    f"{text(line.item)}<br>{text(line.label)}<br>{line.mean:.3f}"
                    f"{_interval_text(line)}{unit}"
                    for line in lines_of(part)
                ],
                hoverinfo="text",
            )
        )
    heads = []
    for item in items:
        values = numbers[numbers["item"] == item].set_index("group")["mean"]
        shown = [
            f"<span style='color:{colour(mark_of(group)[0])}'>{values[group]:.2f}</span>"
            for group in groups
            if group in values
        ]
        heads.append(f"<b>{text(item)}</b>  ·  {' / '.join(shown)}")
    about = ", ".join(["validation", *filter(None, [measure.unit])])
    drawn = row_figure(traces, heads, f"{measure.title} ({about})", 74)
    drawn.update_layout(showlegend=True, margin_t=44)
    drawn.update_xaxes(rangemode="nonnegative")
    most = int(numbers["n"].max())
    how = "95 % t intervals over seeds" if most > 1 else "one seed: no intervals"
    says = f"Best arm against the controls; {how}. Numbers in the order of the legend."
    if not measure.maximize:
        says += " Lower is better."
    if "random-init" in groups:
        says += " The distance from random-init is the effect of pretraining."
    return Drawn(numbers, drawn, title, says)


def _interval_text(line: Any) -> str:
    return "" if np.isnan(line.low) else f" [{line.low:.3f}, {line.high:.3f}], n = {line.n}"
