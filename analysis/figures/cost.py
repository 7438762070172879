"""What the arms cost, by phase."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import Drawn, without_nan
from analysis.figures.ranking import ranking_numbers
from analysis.figures.rows import row_figure
from analysis.tables import Measure, StudyTables, capitalised, final, lines_of
from analysis.theme import colour, text
from trainables.metrics import PHASES, metric_of

HUES = dict(zip(PHASES, ("blue", "amber"), strict=True))
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# unit -> from which value on another one is readable, that one, and its size; the largest first
_LARGER_UNITS: dict[str, tuple[tuple[float, str, float], ...]] = {
    "FLOP": tuple((size, f"{prefix}FLOP", size) for size, prefix in _PREFIXES),
    "s": ((2 * 3600.0, "h", 3600.0), (2 * 60.0, "min", 60.0)),
    "bytes": ((2.0**30, "GiB", 2.0**30), (0.0, "MiB", 2.0**20)),
}


def cost_numbers(tables: StudyTables, metric: str) -> pd.DataFrame:
    """arm, label, group, rank, n, and by phase: mean of a cost over complete trials."""
    finals = final(tables)
    phases = [phase for phase in PHASES if f"{phase}/{metric}" in finals]
    columns = ["rank", "arm", "label", "group", "n", *PHASES]
    ranks = ranking_numbers(tables)
    if not phases or ranks.empty:
        return pd.DataFrame(columns=columns)
    by_arm = finals.groupby("arm")
    numbers = ranks[["rank", "arm", "label", "group"]].copy()
    numbers["n"] = list(by_arm.size().reindex(numbers["arm"]))
    for phase in PHASES:
        numbers[phase] = (
            list(by_arm[f"{phase}/{metric}"].mean().reindex(numbers["arm"]))
            if phase in phases
            else np.nan
        )
    return numbers.dropna(subset=[*PHASES], how="all", ignore_index=True)


def cost(tables: StudyTables, metric: str) -> Drawn:
    numbers = cost_numbers(tables, metric)
    measure, entry = tables.measure(metric), metric_of(metric)
    if numbers.empty:
        says = f"No complete trial recorded its {measure.title}."
        return Drawn(numbers, None, measure.heading, says)
    shown = pd.concat([numbers[:12], numbers[12:].query("group != 'search'")])
    stacked = entry.over_phases == "sum"
    unit, scale = scaled(measure, numbers[[*PHASES]].max(axis=1))
    heads, traces = [], []
    for line in lines_of(shown):
        values = [getattr(line, phase) / scale for phase in PHASES]
        measured = [value for value in values if value == value]
        totals = values
        if entry.over_phases is not None:
            totals = [sum(measured) if stacked else max(measured)]
        words = " / ".join("–" if value != value else _three_digits(value) for value in totals)
        heads.append(f"<b>{line.rank}</b>  {text(line.label, 60)}  ·  <b>{words}</b> {unit}")
    for place, (phase, hue) in enumerate(HUES.items()):
        if shown[phase].notna().any():
            offset = 0.14 if stacked else 0.04 + 0.19 * place
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
    says = f"{capitalised(entry.explains)}."
    if len(numbers) > len(shown):
        says += f" The first {len(shown)} of {len(numbers)} arms by rank, and every control."
    return Drawn(numbers, drawn, measure.heading, says)


def scaled(measure: Measure, values: pd.Series) -> tuple[str, float]:
    """A unit that makes the largest value readable, and what to divide by."""
    largest = float(np.nanmax(values.to_numpy(dtype=float)))
    for least, unit, size in _LARGER_UNITS.get(measure.unit, ()):
        if largest >= least:
            return unit, size
    return measure.unit, 1.0


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
