"""Trade-offs: two metrics of the arms and their Pareto front."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.figures.cost import scaled
from analysis.figures.drawn import Drawn, grouped, mark_of, name_of
from analysis.figures.ranking import ranking_numbers
from analysis.tables import StudyTables, arm_scores, final, lines_of
from analysis.theme import colour, figure, text
from trainables.metrics import PHASES, metric_of, parse


def pareto_numbers(tables: StudyTables, x: str, y: str) -> pd.DataFrame:
    """arm, label, group, n, x, y, on_front: means over complete trials only.

    A stopped trial is cheap and unfinished; it is no candidate. x may be a whole trial's cost.
    """
    finals = _with_whole(final(tables), x)
    columns = ["arm", "label", "group", "rank", "n", "x", "y", "on_front"]
    if x not in finals or y not in finals:
        return pd.DataFrame(columns=columns)
    found = finals.dropna(subset=[x, y])
    across = arm_scores(tables, x, found).groupby("arm")["value"].mean()
    scores = arm_scores(tables, y, found).groupby("arm")["value"]
    numbers = pd.DataFrame({"n": scores.size(), "x": across, "y": scores.mean()}).reset_index()
    numbers.insert(1, "label", [tables.label(arm) for arm in numbers["arm"]])
    numbers.insert(2, "group", list(tables.arms["group"].reindex(numbers["arm"])))
    ranks = ranking_numbers(tables).set_index("arm")["rank"]
    numbers.insert(3, "rank", list(ranks.reindex(numbers["arm"])))
    numbers["on_front"] = pareto_front(
        list(numbers["x"] if tables.measure(x).maximize else -numbers["x"]),
        list(numbers["y"] if tables.measure(y).maximize else -numbers["y"]),
    )
    return numbers.sort_values(["x", "arm"], ignore_index=True)


def pareto_front(x: list[float], y: list[float]) -> list[bool]:
    """Whether no other point is at least as high in both and higher in one."""
    points = np.column_stack([x, y]).reshape(-1, 2)
    return [
        not bool(((points >= point).all(axis=1) & (points > point).any(axis=1)).any())
        for point in points
    ]


def pareto(tables: StudyTables, x: str, y: str) -> Drawn:
    numbers = pareto_numbers(tables, x, y)
    across, upward = tables.measure(x), tables.measure(y)
    title = f"{upward.title} against {across.title}"
    if len(numbers) < 2:
        return Drawn(
            numbers,
            None,
            title,
            f"Fewer than two complete arms have both {across.title} and {upward.title}.",
        )
    unit_x, scale = scaled(across, numbers["x"])
    traces: list[Any] = []
    front = numbers[numbers["on_front"]]
    shape = "vh" if across.maximize else "hv"
    spread = np.linspace(0, len(front) - 1, min(len(front), 7)).round().astype(int)
    named = set(front["arm"].iloc[spread])  # of a long front, as many as stay legible
    traces.append(
        go.Scatter(
            x=list(front["x"] / scale),
            y=list(front["y"]),
            mode="lines",
            name="front",
            line={"color": colour("muted"), "width": 1.5, "dash": "dot", "shape": shape},
            hoverinfo="skip",
        )
    )
    for group, part in grouped(numbers):
        traces.append(
            go.Scatter(
                x=list(part["x"] / scale),
                y=list(part["y"]),
                mode="markers+text",
                name=name_of(group),
                text=[f"#{line.rank:.0f}" if line.arm in named else "" for line in lines_of(part)],
                textposition="top center",
                textfont={"color": colour("ink"), "size": 12},
                cliponaxis=False,
                marker={
                    "size": [12 if line else 9 for line in part["on_front"]],
                    "opacity": [1.0 if line else 0.75 for line in part["on_front"]],
                    "color": colour(mark_of(group)[0]),
                    "symbol": mark_of(group)[1],
                    "line": {"color": colour("card"), "width": 1},
                },
                hovertext=[
                    f"{text(line.label)}<br>{upward.title} {upward.show(line.y)}<br>"
                    f"{across.title} {line.x / scale:.4g} {unit_x}<br>n = {line.n}"
                    f"{', on the front' if line.on_front else ''}"
                    for line in lines_of(part)
                ],
                hoverinfo="text",
            )
        )
    drawn = figure(
        traces,
        height=420,
        x=f"{across.title} ({unit_x})" if unit_x else across.title,
        y=upward.axis,
        legend=True,
    )
    if _is_whole(x) and numbers["x"].max() > 8 * numbers["x"].min() > 0:
        ticks = _log_ticks(numbers["x"] / scale)
        drawn.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    finished = len(numbers)
    return Drawn(
        numbers,
        drawn,
        title,
        f"Means of {finished} complete arms; # is the rank above. Stopped trials are never on the "
        f"front: they have not spent their budget.",
    )


def _is_whole(name: str) -> bool:
    """Whether it names a cost of the whole trial; such costs may differ by powers of ten."""
    return not parse(name).phase


def _with_whole(finals: pd.DataFrame, name: str) -> pd.DataFrame:
    """With a column of that name, if it is a cost of the whole trial."""
    if not _is_whole(name):
        return finals
    by_phase = finals.reindex(columns=[f"{phase}/{name}" for phase in PHASES])
    if by_phase.isna().to_numpy().all():
        return finals
    how = metric_of(name).over_phases
    whole = by_phase.sum(axis=1, min_count=1) if how == "sum" else by_phase.max(axis=1)
    return finals.assign(**{name: whole})


def _log_ticks(values: pd.Series) -> list[float]:
    """1, 2, 5 and their tenfolds around the values; only the tenfolds if they span a lot."""
    low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in np.arange(low, high + 1) for step in steps]
    return [tick for tick in ticks if values.min() / 1.6 <= tick <= values.max() * 1.6]
