"""A map of mask ratio and patch size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import Drawn, counted, no_metric, without_nan
from analysis.tables import Measure, StudyTables, arm_scores, by_size, lines_of
from analysis.theme import SCALE, figure, text


def ratio_patch_numbers(tables: StudyTables, metric: str) -> pd.DataFrame:
    """One line per cell: patch, ratio (bin), mean over arms, sd over trials, arms, n, labels.

    The ratio is its mean over progress, exact if few recur, else in bins.
    """
    arms = tables.arms[tables.arms["group"].isin(["search", "control"])]
    scores = arm_scores(tables, metric)
    scores = scores[scores["arm"].isin(arms.index)]
    found = scores.assign(
        patch=scores["arm"].map(arms["patch"]), share=scores["arm"].map(arms["ratio"])
    ).dropna(subset=["patch", "share"])
    found["ratio"] = _ratio_bins(found["share"].astype(float), found["arm"].nunique())
    found["patch"] = by_size(found["patch"])
    lines = []
    for (patch, ratio), cell in found.groupby(["patch", "ratio"], observed=True):
        means = cell.groupby("arm")["value"].mean()
        sd = float(cell["value"].std(ddof=1)) if len(cell) > 1 else None
        labels = [tables.label(arm) for arm in means.index]
        has_control = bool((tables.arms.loc[means.index, "group"] == "control").any())
        lines.append(
            [patch, ratio, float(means.mean()), sd, len(means), len(cell), labels, has_control]
        )
    columns = ["patch", "ratio", "mean", "sd", "arms", "n", "labels", "has_control"]
    numbers = pd.DataFrame(lines, columns=columns)
    numbers["sd"] = numbers["sd"].astype(float)
    return numbers


def ratio_patch(tables: StudyTables, metric: str) -> Drawn:
    numbers = ratio_patch_numbers(tables, metric)
    measure = tables.measure(metric)
    title = f"Ratio × patch: {measure.title}"
    if absent := no_metric(numbers, measure):
        return Drawn(numbers, None, title, absent)
    patches = list(by_size(numbers["patch"]).cat.categories)
    ratios = _without_gaps(sorted(numbers["ratio"].unique()))
    if len(patches) < 2:
        return Drawn(
            numbers, None, title, f"Only one patch size was tried ({patches[0]} px): no map."
        )
    if len(ratios) < 2:
        return Drawn(numbers, None, title, f"Only one mean ratio was tried ({ratios[0]}): no map.")
    columns = {ratio: column for column, ratio in enumerate(ratios)}
    rows = {patch: row for row, patch in enumerate(patches)}
    grid = numbers.pivot(index="patch", columns="ratio", values="mean")
    low, high = numbers["mean"].min(), numbers["mean"].max()
    heat = go.Heatmap(
        x=list(columns.values()),
        y=list(rows.values()),
        z=without_nan(grid.reindex(index=patches, columns=ratios)),
        colorscale=SCALE,
        reversescale=not measure.maximize,
        colorbar={"thickness": 10, "outlinewidth": 0, "title": {"text": measure.unit}},
        xgap=3,
        ygap=3,
        hoverongaps=False,
        hoverinfo="skip",
    )
    cells = go.Scatter(
        x=[columns[ratio] for ratio in numbers["ratio"]],
        y=[rows[patch] for patch in numbers["patch"]],
        mode="markers",
        marker={"size": 34, "symbol": "square", "color": "rgba(0,0,0,0)"},
        hovertext=[_cell_hover(line, measure) for line in lines_of(numbers)],
        hoverinfo="text",
    )
    drawn = figure(
        [heat, cells],
        height=130 + 78 * len(patches),
        x="mask ratio (share hidden, mean over progress)",
        y="patch (px)",
        xaxis=_cell_axis(ratios),
        yaxis=_cell_axis(patches),
    )
    for line in lines_of(numbers):
        place = 0.5 if high == low else (line.mean - low) / (high - low)
        is_light = (place > 0.55) == measure.maximize
        spread = "" if np.isnan(line.sd) else f"<br>±{measure.number(line.sd)}"
        drawn.add_annotation(
            x=columns[line.ratio],
            y=rows[line.patch],
            text=f"<b>{measure.number(line.mean)}</b><br><span style='font-size:10px'>"
            f"{'□ ' if line.has_control else ''}n={line.n}{spread}</span>",
            font={
                "size": 12.5 if len(ratios) <= 6 else 11,
                "color": "#14181c" if is_light else "#ffffff",
            },
            showarrow=False,
        )
    return Drawn(
        numbers,
        drawn,
        title,
        f"Mean {measure.title} over the arms of a cell, n trials, ± their standard deviation; "
        f"□ holds the control. Cells differ in more than ratio and patch when more was searched; "
        f"hover for the arms.",
    )


def _cell_hover(line: Any, measure: Measure) -> str:
    spread = "one trial, no spread" if np.isnan(line.sd) else f"sd {measure.show(line.sd)}"
    arms = [text(label, 60) for label in line.labels[:6]]
    more = [f"and {len(line.labels) - 6} more"] if len(line.labels) > 6 else []
    head = f"<b>patch {line.patch} px, ratio {line.ratio}</b>"
    values = f"{measure.title} {measure.show(line.mean)} ({spread})"
    counts = f"{counted(line.arms, 'arm')}, {counted(line.n, 'trial')}:"
    return "<br>".join([head, values, counts, *arms, *more])


def _ratio_bins(shares: pd.Series, num_arms: int) -> list[str]:
    """Exact ratios if they recur, as on a grid; else fifths, or tenths once there are many."""
    exact = shares.round(2)
    if exact.nunique() <= min(8, num_arms / 1.5):
        return [f"{share:.2f}" for share in exact]
    parts = 5 if num_arms < 60 else 10
    bins = np.clip(np.floor(shares * parts + 1e-9), 0, parts - 1).astype(int)
    return [_bin_name(index, parts) for index in bins]


def _bin_name(index: int, parts: int) -> str:
    return f"{index / parts:.1f}–{(index + 1) / parts:.1f}"


def _without_gaps(ratios: list[str]) -> list[str]:
    """Bins between the first and the last stay in the axis even if nothing lies in them."""
    for parts in (5, 10):
        names = [_bin_name(index, parts) for index in range(parts)]
        if set(ratios) <= set(names):
            return names[names.index(ratios[0]) : names.index(ratios[-1]) + 1]
    return ratios


def _cell_axis(names: list[Any]) -> dict[str, Any]:
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [str(name) for name in names],
        "range": [-0.5, len(names) - 0.5],
        "showgrid": False,
        "showline": False,
        "ticks": "",
    }
