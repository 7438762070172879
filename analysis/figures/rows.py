"""Figures of rows, each with its own head: points of arms with intervals, bars, dots."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import grouped, mark_of, name_of, without_nan
from analysis.tables import lines_of
from analysis.theme import colour, figure

MOST_ARMS = 24  # drawn as rows of one figure; the table below it has them all


def row_figure(
    traces: list[Any], heads: list[str], x: str, row_height: int = 46, guides: bool = False
) -> go.Figure:
    """Rows from the top down, each with its own head above the marks: legible on a phone."""
    drawn = figure(
        traces,
        height=78 + row_height * len(heads),
        x=x,
        y=None,
        yaxis={"visible": False, "range": [len(heads) - 0.45, -0.62], "fixedrange": True},
    )
    guide = {"type": "line", "layer": "below", "xref": "x domain", "x0": 0, "x1": 1}
    guide["line"] = {"color": colour("rule"), "width": 1, "dash": "dot"}
    head_of_row = {
        "name": "head",  # the page breaks it into two lines where it is narrow
        "x": 0,
        "xref": "x domain",
        "yshift": 4 if row_height < 60 else 16,
        "bgcolor": colour("card"),
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "bottom",
        "align": "left",
    }
    drawn.update_layout(
        shapes=[guide | {"y0": row + 0.1, "y1": row + 0.1} for row in range(len(heads)) if guides],
        annotations=[head_of_row | {"y": row, "text": head} for row, head in enumerate(heads)],
    )
    return drawn


def rows_of_points(shown: pd.DataFrame, groups: pd.Series, heads: list[str]) -> list[Any]:
    """One row per line of `shown`: interval, mean, and the single values behind it."""
    rows = {index: row for row, index in enumerate(shown.index)}
    traces: list[Any] = []
    for group, part in grouped(shown.assign(group=groups)):
        hue, symbol = mark_of(group)
        dots = [(value, rows[line.Index]) for line in lines_of(part) for value in line.values]
        several = part["values"].map(len).max() > 1
        if several:
            traces.append(
                go.Scatter(
                    x=[value for value, _ in dots],
                    y=[row + 0.1 for _, row in dots],
                    mode="markers",
                    marker={"size": 5, "color": colour(hue), "opacity": 0.6, "symbol": symbol},
                    hoverinfo="skip",
                )
            )
        traces.append(
            go.Scatter(
                x=list(part["mean"]),
                y=[rows[index] + 0.1 for index in part.index],
                mode="markers",
                name=name_of(group),
                marker={"size": 12, "color": colour(hue), "symbol": symbol},
                error_x=error_bars(part, hue),
                hovertext=[heads[rows[index]] for index in part.index],
                hoverinfo="text",
            )
        )
    return traces


def error_bars(part: pd.DataFrame, hue: str) -> dict[str, Any] | None:
    if part["low"].isna().all():
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": without_nan(part["high"] - part["mean"]),
        "arrayminus": without_nan(part["mean"] - part["low"]),
        "color": colour(hue),
        "thickness": 2,
        "width": 4,
    }
