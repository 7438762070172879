"""Learning curves: a metric at the rungs of every trial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import Drawn, no_metric
from analysis.figures.ranking import best_arm, ranking_numbers
from analysis.tables import Measure, StudyTables, by_size, lines_of
from analysis.theme import GROUPS, PATCHES, colour, figure, text
from trainables.metrics import GAIN, parse


def curves_numbers(tables: StudyTables, metric: str) -> pd.DataFrame:
    """trial, arm, seed, label, outcome, progress, value: every recorded point of one metric."""
    phase, _, name = metric.partition("/")
    rows = tables.rows
    found = rows[(rows["phase"] == phase) & (rows["metric"] == name)]
    found = found[["trial", "arm", "seed", "progress", "value"]].copy()
    outcome = tables.results["outcome"].to_dict()
    found["label"] = found["arm"].map(tables.arms["label"])
    found["outcome"] = [outcome.get(trial, "unfinished") for trial in found["trial"]]
    return found.sort_values(["trial", "progress"], ignore_index=True)


def curves(tables: StudyTables, metric: str) -> Drawn:
    numbers = curves_numbers(tables, metric)
    measure = tables.measure(metric)
    title = f"Learning curves: {measure.title}"
    if absent := no_metric(numbers, measure):
        return Drawn(numbers, None, title, absent)
    ranks = ranking_numbers(tables)
    best = best_arm(ranks)
    arms = tables.arms
    traces: list[Any] = []
    by_patch = numbers.assign(patch=by_size(numbers["arm"].map(arms["patch"])))
    special = numbers["arm"].map(arms["group"]) != "search"
    special |= numbers["arm"] == best
    thin = (1.6, 0.75) if numbers["trial"].nunique() <= 60 else (1.0, 0.4)
    for index, (patch, part) in enumerate(by_patch[~special].groupby("patch", observed=True)):
        traces.append(_curve(part, measure, f"patch {patch}", PATCHES[index % len(PATCHES)], *thin))
    for group in ("random-init", "frozen", "control"):
        part = numbers[numbers["arm"].map(arms["group"]) == group]
        # frozen is pretrained as the control is, whose curve would be hidden
        if len(part) and not (group == "frozen" and parse(metric).phase == "pretrain"):
            traces.append(_curve(part, measure, group, GROUPS[group][0], 2.2, 1, "dash"))
    if best is not None and arms.at[best, "group"] == "search":
        traces.append(_curve(numbers[numbers["arm"] == best], measure, "best arm", "blue", 3, 1))
    ended = numbers.groupby("trial").tail(1)
    cut = ended[~ended["outcome"].isin(["complete", "unfinished"]) & (ended["progress"] < 1)]
    if len(cut):
        traces.append(
            go.Scatter(
                x=_percent(cut["progress"]),
                y=list(cut["value"]),
                mode="markers",
                name="ended early",
                marker={
                    "symbol": "x",
                    "size": 8 if len(cut) <= 40 else 5,
                    "color": colour("card"),
                    "line": {"color": colour("ink"), "width": 1.4},
                },
                hovertext=[
                    f"{text(line.label)}<br>{line.outcome} at {line.progress:.0%}, "
                    f"{measure.show(line.value)}"
                    for line in lines_of(cut)
                ],
                hoverinfo="text",
            )
        )
    drawn = figure(
        traces, height=400, x="progress (% of planned budget)", y=measure.axis, legend=True
    )
    drawn.update_xaxes(range=[0, 104])
    says = "One line per trial, measured at the rungs."
    if metric == GAIN:
        line = {"color": colour("ink"), "width": 1, "dash": "dot"}
        drawn.add_hline(y=0, line=line, layer="below")
        says += " Below 0 a trivial filling of hidden pixels is better than the encoder's."
    ended_words = f" × marks the {len(cut)} that ended early." if len(cut) else ""
    return Drawn(numbers, drawn, title, f"{says}{ended_words}")


def _curve(
    part: pd.DataFrame,
    measure: Measure,
    name: str,
    hue: str,
    width: float,
    opacity: float,
    dash: str = "solid",
) -> go.Scatter:
    """All trials of `part` as one trace with gaps: 500 trials stay a handful of traces."""
    x: list[float | None] = []
    y: list[float | None] = []
    hover: list[str] = []
    for _, trial in part.groupby("trial", sort=True):
        x += [*_percent(trial["progress"]), None]
        y += [*trial["value"], None]
        hover += [
            f"{text(line.label)}, seed {line.seed}<br>{line.progress:.0%}: "
            f"{measure.show(line.value)}"
            for line in lines_of(trial)
        ] + [""]
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers",
        line={"color": colour(hue), "width": width, "dash": dash},
        marker={"size": 4 + width, "color": colour(hue)},
        opacity=opacity,
        hovertext=hover,
        hoverinfo="text",
    )


def _percent(progress: Iterable[float]) -> list[float]:
    return [100 * share for share in progress]
