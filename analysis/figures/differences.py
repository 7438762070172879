"""Every arm against the control."""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
import pandas as pd

from analysis.figures.drawn import Drawn, counted
from analysis.figures.ranking import ranking_numbers
from analysis.figures.rows import MOST_ARMS, row_figure, rows_of_points
from analysis.statistics import against_control, holm
from analysis.tables import StudyTables, arm_scores, lines_of
from analysis.theme import colour, text
from study.best import Stage


def differences_numbers(tables: StudyTables) -> pd.DataFrame:
    """Every arm minus the control: mean, interval, p, Holm-adjusted p, n, sd, paired.

    Arms with fewer than two seeds have a mean difference only. p is adjusted, and there at all, for
    `claimable_arms` alone.
    """
    columns = ["arm", "label", "group", "n", "mean", "low", "high", "p", "p_holm", "sd", "paired"]
    ranks = ranking_numbers(tables)
    if "control" not in set(ranks["group"]):
        return pd.DataFrame(columns=columns)
    by_seed = values_by_seed(tables, tables.objectives[0].key)
    control = by_seed[ranks.loc[ranks["group"] == "control", "arm"].iloc[0]]
    lines = []
    compared = ranks[ranks["group"] != "control"]
    against = against_control({arm: by_seed[arm] for arm in compared["arm"]}, control)
    for line in lines_of(compared):
        values, found = by_seed[line.arm], against[line.arm]
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
    numbers["p"] = numbers["p"].where(numbers["arm"].isin(claimable_arms(tables)))
    tested = numbers["p"].notna()
    numbers.loc[tested, "p_holm"] = holm(list(numbers.loc[tested, "p"]))
    return numbers


def claimable_arms(tables: StudyTables) -> set[str]:
    """Arms of which something is to be claimed, once each.

    A searched arm when it has come to the study's last stage, so that nothing is claimed on the
    seeds that it was chosen by; of a verdict nobody is told before all of its trials have ended,
    the control's too. One that has failed leaves the others. The control's twins were chosen by
    nobody.
    """
    last = tables.last_stage
    found = tables.standings(tables.objectives[0])
    if last is Stage.VERDICT:
        over = tables.verdicts_over
        return {one.arm for one in found if one.stage is last and one.arm in over}
    return {one.arm for one in found if one.stage >= last or one.group != "search"}


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
    shown = numbers[numbers["low"].notna()][:MOST_ARMS]
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
    says = (
        f"Difference of the means with 95 % t intervals, {pairing}; p is Holm-adjusted for "
        f"{counted(int(numbers['p'].notna().sum()), 'comparison')}. An interval across the dotted "
        f"line is no difference shown."
    )
    if shown["p"].isna().any():
        says += (
            " What is not tested was chosen by these very seeds, or has not got all of them; the "
            "study makes its claims on fresh ones."
        )
    return Drawn(numbers, drawn, title, says)


def p_words(p: float) -> str:
    if math.isnan(p):
        return "not tested"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
