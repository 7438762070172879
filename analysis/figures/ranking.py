"""The arms, ranked by the first objective."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pandas as pd

from analysis.figures.drawn import Drawn, counted
from analysis.figures.rows import MOST_ARMS, row_figure, rows_of_points
from analysis.statistics import mean_and_interval
from analysis.tables import StudyTables, lines_of
from analysis.theme import text


@lru_cache(maxsize=4)  # most figures ask for it
def ranking_numbers(tables: StudyTables) -> pd.DataFrame:
    """rank, arm, label, group, n, confirmed, mean, low, high, values, probe_gain.

    By the first objective; the gain is the mean over the arm's encoders.

    In the order of study/best.py: arms confirmed with fresh seeds stand first, as a single lucky
    seed does not outrank them, then those with all their seeds.
    """
    columns = ["rank", "arm", "label", "group", "n", "confirmed", "mean", "low", "high", "values"]
    columns.append("probe_gain")
    gained = pd.Series({trial: gain.decibels for trial, gain in tables.gains.items()}, dtype=float)
    gain_of_arm = gained.groupby(gained.index.map(tables.arm_of)).mean()
    if not tables.objectives:
        return pd.DataFrame(columns=columns)
    lines: list[list[Any]] = []
    for rank, one in enumerate(tables.standings(tables.objectives[0]), 1):
        values = sorted(one.values.values())
        about = [rank, one.arm, tables.label(one.arm), one.group, len(values), one.is_confirmed]
        lines.append([*about, *mean_and_interval(values), values, gain_of_arm.get(one.arm)])
    return pd.DataFrame(lines, columns=columns)


def best_arm(ranks: pd.DataFrame) -> str | None:
    """The best searched arm; while there is none, the control."""
    for group in ("search", "control"):
        candidates = ranks.loc[ranks["group"] == group, "arm"]
        if len(candidates):
            return str(candidates.iloc[0])
    return None


def ranking(tables: StudyTables) -> Drawn:
    numbers = ranking_numbers(tables)
    if numbers.empty:
        return Drawn(numbers, None, "Arms, ranked", "No trial has finished, so no arm has a score.")
    goal = tables.objectives[0]
    title = f"Arms ranked by {goal.title}"
    shown = pd.concat([numbers[:MOST_ARMS], numbers[MOST_ARMS:].query("group != 'search'")])
    heads = []
    for line in lines_of(shown):
        interval = "" if line.n < 2 else f" [{goal.show(line.low)}, {goal.show(line.high)}]"
        seeds = counted(line.n, "seed")
        heads.append(
            f"<b>{line.rank}</b>  {text(line.label)}  ·  <b>{goal.show(line.mean)}</b>{interval}"
            f"  ·  {seeds}"
        )
    traces = rows_of_points(shown, shown["group"], heads)
    says = f"Large mark: mean of an arm. {_interval_words(numbers)}"
    if not goal.maximize:
        says += " Lower is better."
    if numbers["confirmed"].any():
        says += " Arms confirmed with fresh seeds stand first."
    if len(numbers) > len(shown):
        says += f" The {len(shown)} shown of {len(numbers)} arms include every control."
    return Drawn(numbers, row_figure(traces, heads, goal.axis, guides=True), title, says)


def _interval_words(numbers: pd.DataFrame) -> str:
    if (numbers["n"] > 1).any():
        return "Line: 95 % t interval over its seeds; small marks: the seeds."
    return "One seed per arm: no intervals, so close ranks mean nothing."
