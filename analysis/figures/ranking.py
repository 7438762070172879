"""The arms, ranked by the first objective."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd

from analysis.figures.drawn import Drawn, counted
from analysis.figures.rows import MOST_ARMS, row_figure, rows_of_points
from analysis.statistics import mean_and_interval
from analysis.tables import StudyTables, arm_scores, lines_of
from analysis.theme import text


@lru_cache(maxsize=4)  # most figures ask for it
def ranking_numbers(tables: StudyTables) -> pd.DataFrame:
    """rank, arm, label, group, n, confirmed, mean, low, high, values: by the first objective.

    Arms confirmed with fresh seeds stand first: a single lucky seed does not outrank them.
    """
    columns = ["rank", "arm", "label", "group", "n", "confirmed", "mean", "low", "high", "values"]
    if not tables.objectives:
        return pd.DataFrame(columns=columns)
    goal = tables.objectives[0]
    lines = []
    for arm, scores in arm_scores(tables, goal.key).groupby("arm", sort=False):
        mean, low, high = mean_and_interval(scores["value"])
        confirmed = bool(scores["fresh"].any())
        values = sorted(scores["value"])
        about = [tables.label(str(arm)), tables.arms.at[arm, "group"]]
        lines.append([0, arm, *about, len(scores), confirmed, mean, low, high, values])
    numbers = pd.DataFrame(lines, columns=columns)
    sign = -1 if goal.maximize else 1
    order = np.lexsort((numbers["arm"], sign * numbers["mean"], ~numbers["confirmed"].astype(bool)))
    numbers = numbers.iloc[order].reset_index(drop=True)
    numbers["rank"] = np.arange(1, len(numbers) + 1)
    return numbers


def best_arm(ranks: pd.DataFrame) -> str | None:
    """The first in rank that is a candidate: a searched arm or the control itself."""
    candidates = ranks[ranks["group"].isin(["search", "control"])]
    return None if candidates.empty else str(candidates["arm"].iloc[0])


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
