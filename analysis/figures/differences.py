"""Every arm against the control."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pandas as pd

from analysis.figures.drawn import Drawn
from analysis.figures.ranking import ranking_numbers
from analysis.figures.rows import MOST_ARMS, row_figure, rows_of_points
from analysis.statistics import difference, holm
from analysis.tables import StudyTables, arm_scores, lines_of
from analysis.theme import colour, text


def differences_numbers(tables: StudyTables) -> pd.DataFrame:
    """Every arm minus the control: mean, interval, p, Holm-adjusted p, n, sd, paired.

    Arms with fewer than two seeds have a mean difference only.
    """
    columns = ["arm", "label", "group", "n", "mean", "low", "high", "p", "p_holm", "sd", "paired"]
    ranks = ranking_numbers(tables)
    if "control" not in set(ranks["group"]):
        return pd.DataFrame(columns=columns)
    by_seed = values_by_seed(tables, tables.objectives[0].key)
    control = by_seed[ranks.loc[ranks["group"] == "control", "arm"].iloc[0]]
    lines = []
    for line in lines_of(ranks[ranks["group"] != "control"]):
        values = by_seed[line.arm]
        found = difference(values, control)
        about = [line.arm, line.label, line.group]
        if found is None:
            gap = float(np.mean(list(values.values())) - np.mean(list(control.values())))
            fewest = min(len(values), len(control))
            lines.append([*about, fewest, gap, None, None, None, None, None, False])
        else:
            mean, low, high, p, n, sd, paired = found
            lines.append([*about, n, mean, low, high, p, None, sd, paired])
    numbers = pd.DataFrame(lines, columns=columns)
    for column in ("low", "high", "p", "p_holm", "sd"):
        numbers[column] = numbers[column].astype(float)
    tested = numbers["p"].notna()
    numbers.loc[tested, "p_holm"] = holm(list(numbers.loc[tested, "p"]))
    return numbers


def values_by_seed(tables: StudyTables, metric: str) -> dict[str, dict[Hashable, float]]:
    """Arm -> seed -> value, of the values that may speak for an arm."""
    return {
        str(arm): dict(zip(found["seed"], found["value"], strict=True))
        for arm, found in arm_scores(tables, metric).groupby("arm")
    }


def differences(tables: StudyTables) -> Drawn:
    numbers = differences_numbers(tables)
    title = "Arms against the control"
    if numbers.empty:
        return Drawn(numbers, None, title, "There are not yet two complete arms, one the control.")
    goal = tables.objectives[0]
    shown = numbers[numbers["p"].notna()][:MOST_ARMS]
    if shown.empty:
        return Drawn(
            numbers,
            None,
            title,
            "One seed: no interval. No arm was run with two seeds that the control had too, so no "
            "difference can be told from chance; `confirm` or `seeds` in the study file adds some.",
        )
    heads = [
        f"{text(line.label)}  ·  <b>{goal.show(line.mean, signed=True)}</b> "
        f"[{goal.show(line.low, signed=True)}, {goal.show(line.high, signed=True)}]"
        f"  ·  n = {line.n}, {p_words(line.p_holm)}"
        for line in lines_of(shown)
    ]
    shown = shown.assign(values=pd.Series([[]] * len(shown), shown.index))
    drawn = row_figure(
        rows_of_points(shown, shown["group"], heads),
        heads,
        f"difference in {goal.axis}: arm − control",
        guides=True,
    )
    drawn.add_vline(x=0, line_color=colour("ink"), line_width=1, line_dash="dot", layer="below")
    pairing = "paired by seed" if shown["paired"].all() else "paired by seed where possible"
    return Drawn(
        numbers,
        drawn,
        title,
        f"Difference of the means with 95 % t intervals, {pairing}; p is Holm-adjusted for "
        f"{len(numbers[numbers['p'].notna()])} comparisons. An interval across the dotted line is "
        f"no difference shown.",
    )


def p_words(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
