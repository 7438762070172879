"""What the arms cost, by phase."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import Drawn, without_nan
from analysis.figures.ranking import ranking_numbers
from analysis.figures.rows import row_figure
from analysis.tables import Measure, StudyTables, final, lines_of
from analysis.theme import colour, text

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def cost_numbers(tables: StudyTables, metric: str) -> pd.DataFrame:
    """arm, label, group, rank, n, pretrain, segment: mean of a cost over complete trials."""
    finals = final(tables)
    phases = [phase for phase in ("pretrain", "segment") if f"{phase}/{metric}" in finals]
    columns = ["rank", "arm", "label", "group", "n", "pretrain", "segment"]
    ranks = ranking_numbers(tables)
    if not phases or ranks.empty:
        return pd.DataFrame(columns=columns)
    by_arm = finals.groupby("arm")
    numbers = ranks[["rank", "arm", "label", "group"]].copy()
    numbers["n"] = list(by_arm.size().reindex(numbers["arm"]))
    for phase in ("pretrain", "segment"):
        numbers[phase] = (
            list(by_arm[f"{phase}/{metric}"].mean().reindex(numbers["arm"]))
            if phase in phases
            else np.nan
        )
    return numbers.dropna(subset=["pretrain", "segment"], how="all", ignore_index=True)


def cost(tables: StudyTables, metric: str) -> Drawn:
    numbers = cost_numbers(tables, metric)
    measure = cost_measure(tables, metric)
    title = measure.title.capitalize() if metric != "planned_flops" else "Planned FLOPs"
    if numbers.empty:
        return Drawn(numbers, None, title, f"No complete trial recorded its {measure.title}.")
    shown = pd.concat([numbers[:12], numbers[12:].query("group != 'search'")])
    stacked = metric in ("planned_flops", "device_seconds")
    unit, scale = scaled(measure, numbers[["pretrain", "segment"]].max(axis=1))
    heads, traces = [], []
    for line in lines_of(shown):
        values = [line.pretrain / scale, line.segment / scale]
        known = [value for value in values if value == value]
        totals = values if metric == "images_per_second" else [(sum if stacked else max)(known)]
        words = " / ".join("–" if value != value else _three_digits(value) for value in totals)
        heads.append(f"<b>{line.rank}</b>  {text(line.label, 60)}  ·  <b>{words}</b> {unit}")
    for phase, hue in (("pretrain", "blue"), ("segment", "amber")):
        if shown[phase].notna().any():
            offset = 0.14 if stacked else 0.04 if phase == "pretrain" else 0.23
            traces.append(
                go.Bar(
                    x=without_nan(shown[phase] / scale),
                    y=list(np.arange(len(shown)) + offset),
                    orientation="h",
                    width=0.3 if stacked else 0.17,
                    name=phase,
                    marker={"color": colour(hue)},
                    hovertext=[
                        f"{text(line.label)}<br>{phase}: "
                        f"{_three_digits(getattr(line, phase) / scale)} {unit}"
                        for line in lines_of(shown)
                    ],
                    hoverinfo="text",
                )
            )
    per_trial = " per trial" if stacked else ""
    drawn = row_figure(traces, heads, f"{measure.title}{per_trial} ({unit})")
    drawn.update_layout(
        barmode="stack" if stacked else "overlay",
        showlegend=True,
        legend_traceorder="normal",
        margin_t=44,
    )
    drawn.update_xaxes(rangemode="tozero")
    says = {
        "planned_flops": "A multiply-add counts as two; of the whole planned budget.",
        "device_seconds": "Measured time in training steps, without evaluation; comparable only on "
        "one kind of hardware.",
        "peak_memory": "Largest memory held on the device.",
        "images_per_second": "Images per second in training, all workers together.",
    }.get(metric, "")
    if len(numbers) > len(shown):
        says += f" The first {len(shown)} of {len(numbers)} arms by rank, and every control."
    return Drawn(numbers, drawn, title, says.strip())


def cost_measure(tables: StudyTables, key: str) -> Measure:
    """Also for a cost given without its phase."""
    if "/" in key:
        return tables.measure(key)
    return tables.measure(f"pretrain/{key}")._replace(key=key)


def scaled(measure: Measure, values: pd.Series) -> tuple[str, float]:
    """A unit that makes the largest value readable, and what to divide by."""
    largest = float(np.nanmax(values.to_numpy(dtype=float)))
    metric = measure.key.rpartition("/")[2]
    if metric == "peak_memory":
        return ("GiB", 2.0**30) if largest >= 2**30 else ("MiB", 2.0**20)
    if metric == "device_seconds":
        for unit, size in (("h", 3600.0), ("min", 60.0)):
            if largest >= 2 * size:
                return unit, size
        return "s", 1.0
    if metric == "planned_flops":
        for size, prefix in _PREFIXES:
            if largest >= size:
                return f"{prefix}FLOP", size
        return "FLOP", 1.0
    if metric == "images_per_second":
        return "images/s", 1.0
    return measure.unit, 1.0


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
