"""How well what is measured in pretraining foretells the arms' scores after fine-tuning."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analysis.figures.drawn import Drawn
from analysis.figures.rows import error_bars, row_figure
from analysis.statistics import FEWEST_ARMS, RESAMPLES, rank_correlation
from analysis.tables import Measure, StudyTables, arm_scores, lines_of, measure_of
from analysis.theme import colour, text
from trainables.metrics import MIOU, PSNR, parse

PROBES = ("pretrain/dense_miou", "pretrain/dense_knn_miou", PSNR, "pretrain/probe_gain")


def fine_tuned(tables: StudyTables) -> Measure:
    """The study's first objective that is a score of segmentation."""
    of_segments = [one for one in tables.objectives if parse(one.key).phase == "segment"]
    return of_segments[0] if of_segments else measure_of(MIOU)


def probes_numbers(tables: StudyTables) -> pd.DataFrame:
    """metric, title, n, mean (Spearman's correlation over arms), low, high, the highest first.

    Of arms that are pretrained, and segmented as the control is: what differs between them is what
    the probes could tell. Each is the mean over its seeds.
    """
    goal = fine_tuned(tables)
    sign = 1 if goal.maximize else -1
    arms = segmented_alike(tables)
    after = arm_scores(tables, goal.key).groupby("arm")["value"].mean()
    lines = []
    for name in PROBES:
        before = arm_scores(tables, name).groupby("arm")["value"].mean()
        both = [arm for arm in arms if arm in before.index and arm in after.index]
        found = rank_correlation(before[both].tolist(), (sign * after[both]).tolist())
        if found is not None:
            lines.append([name, tables.measure(name).title, found.n, *found[:3]])
    columns = ["metric", "title", "n", "mean", "low", "high"]
    numbers = pd.DataFrame(lines, columns=columns)
    return numbers.sort_values("mean", ascending=False, kind="stable", ignore_index=True)


def segmented_alike(tables: StudyTables) -> list[str]:
    """The arms with the control's settings of segmentation; all searched ones if there is none."""
    arms = tables.arms[tables.arms["group"].isin(["search", "control"])]
    ways = {
        str(arm): {path: value for path, value in settings.items() if path.startswith("segment.")}
        for arm, settings in arms["settings"].items()
    }
    control = next((str(arm) for arm in arms.index[arms["group"] == "control"]), None)
    return [arm for arm, way in ways.items() if control is None or way == ways[control]]


def probes(tables: StudyTables) -> Drawn:
    numbers = probes_numbers(tables)
    goal = fine_tuned(tables)
    title = f"Do probes foretell {goal.title}?"
    if numbers.empty:
        return Drawn(
            numbers,
            None,
            title,
            f"Fewer than {FEWEST_ARMS} complete arms differ in {goal.title} and in a probe of "
            f"pretraining: too few to tell whether one foretells the other.",
        )
    heads = [
        f"<b>{text(line.title)}</b>  ·  <b>{_signed(line.mean)}</b> "
        f"[{_signed(line.low)}, {_signed(line.high)}]  ·  {line.n} arms"
        for line in lines_of(numbers)
    ]
    points = go.Scatter(
        x=list(numbers["mean"]),
        y=[row + 0.1 for row in range(len(numbers))],
        mode="markers",
        marker={"size": 12, "color": colour("blue"), "symbol": "circle"},
        error_x=error_bars(numbers, "blue"),
        hovertext=heads,
        hoverinfo="text",
    )
    drawn = row_figure([points], heads, f"rank correlation with {goal.title}", guides=True)
    drawn.update_xaxes(range=[-1.05, 1.05])
    return Drawn(numbers, drawn, title, _words(numbers, goal))


def _words(numbers: pd.DataFrame, goal: Measure) -> str:
    best = numbers.iloc[0]
    interval = f"{_signed(best['mean'])}, 95 % interval {_signed(best['low'])} to "
    interval += _signed(best["high"])
    if best["low"] > 0:
        says = f"The {best['title']} orders the arms most as {goal.title} does ({interval})."
    else:
        says = (
            f"No probe is shown to order the arms as {goal.title} does; closest comes the "
            f"{best['title']} ({interval})."
        )
    return (
        f"{says} Spearman's rank correlation over {best['n']} arms, each the mean over its seeds: "
        f"1 if a probe has them in the same order, 0 if in any. Lines lie between percentiles of "
        f"{RESAMPLES:,} bootstrap resamples of the arms."
    )


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
