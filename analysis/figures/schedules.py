"""Where the trials of each masking schedule reached."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import Drawn, counted, no_metric
from analysis.figures.rows import row_figure
from analysis.tables import StudyTables, arm_scores, lines_of
from analysis.theme import colour, plain, text


def schedules_numbers(tables: StudyTables, metric: str) -> pd.DataFrame:
    """One line per schedule: n trials, arms, mean, sd, min, median, max, values, labels."""
    scores = arm_scores(tables, metric)
    groups = tables.arms["group"].isin(["search", "control"])
    scores = scores[scores["arm"].isin(tables.arms.index[groups])]
    found = scores.assign(schedule=scores["arm"].map(tables.arms["schedule"]))
    lines = []
    for schedule, part in found.groupby("schedule"):
        values = part["value"]
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        spread = [float(values.min()), float(values.median()), float(values.max())]
        about = [schedule, len(values), part["arm"].nunique(), float(values.mean()), sd, *spread]
        lines.append([*about, list(values), [tables.label(arm) for arm in part["arm"]]])
    columns = ["schedule", "n", "arms", "mean", "sd", "min", "median", "max", "values", "labels"]
    numbers = pd.DataFrame(lines, columns=columns)
    numbers["sd"] = numbers["sd"].astype(float)
    return numbers.sort_values(["median", "schedule"], ascending=[False, True], ignore_index=True)


def schedules(tables: StudyTables, metric: str) -> Drawn:
    numbers = schedules_numbers(tables, metric)
    measure = tables.measure(metric)
    title = f"Schedules: {measure.title}"
    if absent := no_metric(numbers, measure):
        return Drawn(numbers, None, title, absent)
    if len(numbers) < 2:
        only = plain(numbers["schedule"].iloc[0])
        return Drawn(numbers, None, title, f"Only one masking schedule was tried ({only}).")
    heads, traces = [], []
    for row, line in enumerate(lines_of(numbers)):
        heads.append(
            f"<b>{text(line.schedule)}</b>  ·  median {measure.show(line.median)}"
            f"  ·  {counted(line.n, 'trial')}, {counted(line.arms, 'arm')}"
        )
        traces += [
            go.Scatter(
                x=line.values,
                y=list(row + _beeswarm(line.values)),
                mode="markers",
                marker={
                    "size": 9 if line.n <= 60 else 6,
                    "color": colour("blue"),
                    "opacity": 0.7 if line.n <= 60 else 0.45,
                },
                hovertext=[
                    f"{text(label)}<br>{measure.show(value)}"
                    for label, value in zip(line.labels, line.values, strict=True)
                ],
                hoverinfo="text",
            ),
            go.Scatter(
                x=[line.median] * 2,
                y=[row - 0.2, row + 0.2],
                mode="lines",
                line={"color": colour("ink"), "width": 2.5},
                hoverinfo="skip",
            ),
        ]
    drawn = row_figure(traces, heads, measure.axis, row_height=64)
    return Drawn(
        numbers,
        drawn,
        title,
        "One dot per complete trial; bar: median. Trials of one schedule differ in other settings "
        "too, so this shows where each schedule reached, not its effect alone.",
    )


def _beeswarm(values: list[float]) -> np.ndarray:
    """Small fixed offsets, so that equal values do not hide one another."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return 0.12 * ((ranks * 0.618034) % 1 - 0.5)
