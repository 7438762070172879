"""The report's figures. Each is a pair: `<name>_numbers` (tested), then `<name>` (ink).

To add one, write the pair and a line in FIGURES; name it in the report's SECTIONS to choose its
place, else it stands under "More". A figure without data says in one sentence why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.statistics import difference, holm, t_interval
from analysis.tables import MIOU, PSNR, Measure, StudyTables, arm_scores, by_size, final, lines_of
from analysis.theme import GROUPS, PATCHES, SCALE, SYMBOLS, colour, figure, plain, text

MOST_ARMS = 24  # drawn as rows of one figure; the table below it has them all
GROUP_TITLES = {
    "best": "best arm",
    "search": "searched",
    "control": "control",
    "random-init": "random-init",
    "frozen": "frozen",
}
PER_ITEM = {  # prefix of metrics: title of the figure, what its axis shows
    "segment/iou/": ("IoU of each class", "IoU"),
    "segment/object_f1/": ("Object F1 by size of the object", "object F1"),
    "segment/case_dice/": ("Dice per volume of each class", "Dice per volume"),
    "segment/hd95/": ("Surface distance of each class", "HD95"),
    "segment/nsd/": ("Surface Dice of each class", "surface Dice"),
}


class Drawn(NamedTuple):
    """`says` is the caption, or why there is no figure."""

    numbers: pd.DataFrame
    figure: go.Figure | None
    title: str
    says: str


# -- the arms, ranked --------------------------------------------------------------------------


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
        mean, low, high = _mean_and_interval(scores["value"])
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
        seeds = _count(line.n, "seed")
        heads.append(
            f"<b>{line.rank}</b>  {text(line.label)}  ·  <b>{goal.show(line.mean)}</b>{interval}"
            f"  ·  {seeds}"
        )
    traces = _rows_of_points(shown, shown["group"], heads)
    says = f"Large mark: mean of an arm. {_interval_words(numbers)}"
    if not goal.maximize:
        says += " Lower is better."
    if numbers["confirmed"].any():
        says += " Arms confirmed with fresh seeds stand first."
    if len(numbers) > len(shown):
        says += f" The {len(shown)} shown of {len(numbers)} arms include every control."
    return Drawn(numbers, _row_figure(traces, heads, goal.axis, guides=True), title, says)


# -- against the control -----------------------------------------------------------------------


def differences_numbers(tables: StudyTables) -> pd.DataFrame:
    """Every arm minus the control: mean, interval, p, Holm-adjusted p, n, sd, paired.

    Arms with fewer than two seeds have a mean difference only.
    """
    columns = ["arm", "label", "group", "n", "mean", "low", "high", "p", "p_holm", "sd", "paired"]
    ranks = ranking_numbers(tables)
    if "control" not in set(ranks["group"]):
        return pd.DataFrame(columns=columns)
    scores = arm_scores(tables, tables.objectives[0].key)
    by_seed = {
        arm: dict(zip(found["seed"], found["value"], strict=True))
        for arm, found in scores.groupby("arm")
    }
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
    drawn = _row_figure(
        _rows_of_points(shown, shown["group"], heads),
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


# -- ratio and patch ---------------------------------------------------------------------------


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
    if absent := _no_metric(numbers, measure):
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
        z=_lists(grid.reindex(index=patches, columns=ratios)),
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
        spread = "" if np.isnan(line.sd) else f"<br>±{measure.show(line.sd).split()[0]}"
        drawn.add_annotation(
            x=columns[line.ratio],
            y=rows[line.patch],
            text=f"<b>{measure.show(line.mean).split()[0]}</b><br><span style='font-size:10px'>"
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
    counts = f"{_count(line.arms, 'arm')}, {_count(line.n, 'trial')}:"
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


# -- schedules ---------------------------------------------------------------------------------


def schedules_numbers(tables: StudyTables, metric: str) -> pd.DataFrame:
    """One line per schedule: n trials, arms, mean, sd, min, median, max, values, labels."""
    scores = arm_scores(tables, metric)
    groups = tables.arms["group"].isin(["search", "control"])
    scores = scores[scores["arm"].isin(tables.arms.index[groups])]
    found = scores.assign(schedule=scores["arm"].map(tables.arms["schedule"]))
    lines = []
    for schedule, part in found.groupby("schedule"):
        values = part["value"]
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        spread = [float(values.min()), float(values.median()), float(values.max())]
        about = [schedule, len(values), part["arm"].nunique(), float(values.mean()), sd, *spread]
        lines.append([*about, list(values), [tables.label(arm) for arm in part["arm"]]])
    columns = ["schedule", "n", "arms", "mean", "sd", "min", "median", "max", "values", "labels"]
    numbers = pd.DataFrame(lines, columns=columns)
    numbers["sd"] = numbers["sd"].astype(float)
    return numbers.sort_values(["median", "schedule"], ascending=[False, True], ignore_index=True)


def schedules(tables: StudyTables, metric: str) -> Drawn:
    numbers = schedules_numbers(tables, metric)
    measure = tables.measure(metric)
    title = f"Schedules: {measure.title}"
    if absent := _no_metric(numbers, measure):
        return Drawn(numbers, None, title, absent)
    if len(numbers) < 2:
        only = plain(numbers["schedule"].iloc[0])
        return Drawn(numbers, None, title, f"Only one masking schedule was tried ({only}).")
    heads, traces = [], []
    for row, line in enumerate(lines_of(numbers)):
        heads.append(
            f"<b>{text(line.schedule)}</b>  ·  median {measure.show(line.median)}"
            f"  ·  {_count(line.n, 'trial')}, {_count(line.arms, 'arm')}"
        )
        traces += [
            go.Scatter(
                x=line.values,
                y=list(row + _beeswarm(line.values)),
                mode="markers",
                marker={
                    "size": 9 if line.n <= 60 else 6,
                    "color": colour("blue"),
                    "opacity": 0.7 if line.n <= 60 else 0.45,
                },
                hovertext=[
                    f"{text(label)}<br>{measure.show(value)}"
                    for label, value in zip(line.labels, line.values, strict=True)
                ],
                hoverinfo="text",
            ),
            go.Scatter(
                x=[line.median] * 2,
                y=[row - 0.2, row + 0.2],
                mode="lines",
                line={"color": colour("ink"), "width": 2.5},
                hoverinfo="skip",
            ),
        ]
    drawn = _row_figure(traces, heads, measure.axis, row_height=64)
    return Drawn(
        numbers,
        drawn,
        title,
        "One dot per complete trial; bar: median. Trials of one schedule differ in other settings "
        "too, so this shows where each schedule reached, not its effect alone.",
    )


# -- learning curves ---------------------------------------------------------------------------


def curves_numbers(tables: StudyTables, metric: str) -> pd.DataFrame:
    """trial, arm, seed, label, outcome, progress, value: every recorded point of one metric."""
    phase, _, name = metric.partition("/")
    rows = tables.rows
    found = rows[(rows["phase"] == phase) & (rows["metric"] == name)]
    found = found[["trial", "arm", "seed", "progress", "value"]].copy()
    outcome = tables.results["outcome"].to_dict()
    found["label"] = found["arm"].map(tables.arms["label"])
    found["outcome"] = [outcome.get(trial, "unfinished") for trial in found["trial"]]
    return found.sort_values(["trial", "progress"], ignore_index=True)


def curves(tables: StudyTables, metric: str) -> Drawn:
    numbers = curves_numbers(tables, metric)
    measure = tables.measure(metric)
    title = f"Learning curves: {measure.title}"
    if absent := _no_metric(numbers, measure):
        return Drawn(numbers, None, title, absent)
    ranks = ranking_numbers(tables)
    best = best_arm(ranks)
    arms = tables.arms
    traces: list[Any] = []
    by_patch = numbers.assign(patch=by_size(numbers["arm"].map(arms["patch"])))
    special = numbers["arm"].map(arms["group"]) != "search"
    special |= numbers["arm"] == best
    thin = (1.6, 0.75) if numbers["trial"].nunique() <= 60 else (1.0, 0.4)
    for index, (patch, part) in enumerate(by_patch[~special].groupby("patch", observed=True)):
        traces.append(_curve(part, measure, f"patch {patch}", PATCHES[index % len(PATCHES)], *thin))
    for group in ("random-init", "frozen", "control"):
        part = numbers[numbers["arm"].map(arms["group"]) == group]
        if len(part) and not (metric == PSNR and group == "frozen"):
            traces.append(_curve(part, measure, group, GROUPS[group][0], 2.2, 1, "dash"))
    if best is not None and arms.at[best, "group"] == "search":
        traces.append(_curve(numbers[numbers["arm"] == best], measure, "best arm", "blue", 3, 1))
    ended = numbers.groupby("trial").tail(1)
    cut = ended[~ended["outcome"].isin(["complete", "unfinished"]) & (ended["progress"] < 1)]
    if len(cut):
        traces.append(
            go.Scatter(
                x=_percent(cut["progress"]),
                y=list(cut["value"]),
                mode="markers",
                name="ended early",
                marker={
                    "symbol": "x",
                    "size": 8 if len(cut) <= 40 else 5,
                    "color": colour("card"),
                    "line": {"color": colour("ink"), "width": 1.4},
                },
                hovertext=[
                    f"{text(line.label)}<br>{line.outcome} at {line.progress:.0%}, "
                    f"{measure.show(line.value)}"
                    for line in lines_of(cut)
                ],
                hoverinfo="text",
            )
        )
    drawn = figure(
        traces, height=400, x="progress (% of planned budget)", y=measure.axis, legend=True
    )
    drawn.update_xaxes(range=[0, 104])
    ended_words = f" × marks the {len(cut)} that ended early." if len(cut) else ""
    return Drawn(numbers, drawn, title, f"One line per trial, measured at the rungs.{ended_words}")


def _curve(
    part: pd.DataFrame,
    measure: Measure,
    name: str,
    hue: str,
    width: float,
    opacity: float,
    dash: str = "solid",
) -> go.Scatter:
    """All trials of `part` as one trace with gaps: 500 trials stay a handful of traces."""
    x: list[float | None] = []
    y: list[float | None] = []
    hover: list[str] = []
    for _, trial in part.groupby("trial", sort=True):
        x += [*_percent(trial["progress"]), None]
        y += [*trial["value"], None]
        hover += [
            f"{text(line.label)}, seed {line.seed}<br>{line.progress:.0%}: "
            f"{measure.show(line.value)}"
            for line in lines_of(trial)
        ] + [""]
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers",
        line={"color": colour(hue), "width": width, "dash": dash},
        marker={"size": 4 + width, "color": colour(hue)},
        opacity=opacity,
        hovertext=hover,
        hoverinfo="text",
    )


# -- trade-offs --------------------------------------------------------------------------------


def pareto_numbers(tables: StudyTables, x: str, y: str) -> pd.DataFrame:
    """arm, label, group, n, x, y, on_front: means over complete trials only.

    A stopped trial is cheap and unfinished; it is no candidate. x may be "planned_flops", summed
    over the phases.
    """
    finals = _with_planned_flops(final(tables))
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
    x_down, y_down = not _goal(tables, x), not _goal(tables, y)
    numbers["on_front"] = pareto_front(
        list(-numbers["x"] if x_down else numbers["x"]),
        list(-numbers["y"] if y_down else numbers["y"]),
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
    across, upward = _measure(tables, x), _measure(tables, y)
    title = f"{upward.title} against {across.title}"
    if len(numbers) < 2:
        return Drawn(
            numbers,
            None,
            title,
            f"Fewer than two complete arms have both {across.title} and {upward.title}.",
        )
    unit_x, scale = _scaled(across, numbers["x"])
    traces: list[Any] = []
    front = numbers[numbers["on_front"]]
    shape = "vh" if _goal(tables, x) else "hv"
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
    for group, part in _grouped(numbers):
        traces.append(
            go.Scatter(
                x=list(part["x"] / scale),
                y=list(part["y"]),
                mode="markers+text",
                name=GROUP_TITLES.get(group, plain(group)),
                text=[f"#{line.rank:.0f}" if line.arm in named else "" for line in lines_of(part)],
                textposition="top center",
                textfont={"color": colour("ink"), "size": 12},
                cliponaxis=False,
                marker={
                    "size": [12 if line else 9 for line in part["on_front"]],
                    "opacity": [1.0 if line else 0.75 for line in part["on_front"]],
                    "color": colour(_of_group(group)[0]),
                    "symbol": _of_group(group)[1],
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
    if x == "planned_flops" and numbers["x"].max() > 8 * numbers["x"].min() > 0:
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


# -- cost --------------------------------------------------------------------------------------


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
    measure = _measure(tables, metric)
    title = measure.title.capitalize() if metric != "planned_flops" else "Planned FLOPs"
    if numbers.empty:
        return Drawn(numbers, None, title, f"No complete trial recorded its {measure.title}.")
    shown = pd.concat([numbers[:12], numbers[12:].query("group != 'search'")])
    stacked = metric in ("planned_flops", "device_seconds")
    unit, scale = _scaled(measure, numbers[["pretrain", "segment"]].max(axis=1))
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
                    x=_lists(shown[phase] / scale),
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
    drawn = _row_figure(traces, heads, f"{measure.title}{per_trial} ({unit})")
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


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# -- segmentation in detail --------------------------------------------------------------------


def classes_numbers(tables: StudyTables, prefix: str) -> pd.DataFrame:
    """item (class or size), group, arm, label, n, mean, low, high for best arm and controls."""
    finals = final(tables)
    ranks = ranking_numbers(tables)
    best = best_arm(ranks)
    chosen = {} if best is None else {"best": best}
    for group in ("control", "random-init", "frozen"):
        for arm in ranks.loc[ranks["group"] == group, "arm"]:
            if arm != best:
                chosen.setdefault(group, arm)
    lines = []
    for key in [prefix + item for item in reported(tables, prefix)]:
        scores = arm_scores(tables, key, finals)
        for group, arm in chosen.items():
            values = scores.loc[scores["arm"] == arm, "value"]
            if len(values):
                about = [key.removeprefix(prefix), group, arm, tables.label(arm), len(values)]
                lines.append([*about, *_mean_and_interval(values)])
    columns = ["item", "group", "arm", "label", "n", "mean", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def reported(tables: StudyTables, prefix: str) -> list[str]:
    """What stands behind `prefix`, such as the classes behind "segment/iou/", in their order."""
    phase, _, start = prefix.partition("/")
    metrics = tables.rows.loc[tables.rows["phase"] == phase, "metric"].unique()
    return [metric.removeprefix(start) for metric in metrics if metric.startswith(start)]


def classes(tables: StudyTables, prefix: str) -> Drawn:
    numbers = classes_numbers(tables, prefix)
    title, what = PER_ITEM[prefix]
    if numbers.empty:
        part = "by size" if prefix == "segment/object_f1/" else "per class"
        return Drawn(numbers, None, title, f"No complete trial recorded {what} {part}.")
    items = list(dict.fromkeys(numbers["item"]))
    measure = tables.measure(prefix + items[0])
    unit = f" {measure.unit}" if measure.unit else ""
    groups = list(dict.fromkeys(numbers["group"]))
    traces = []
    for index, group in enumerate(groups):
        part = numbers[numbers["group"] == group]
        rows = [items.index(item) for item in part["item"]]
        offset = (index - (len(groups) - 1) / 2) * 0.13 + 0.08
        hue, symbol = _of_group(group)
        traces.append(
            go.Scatter(
                x=list(part["mean"]),
                y=[row + offset for row in rows],
                mode="markers",
                name=GROUP_TITLES.get(group, plain(group)),
                marker={"size": 11, "color": colour(hue), "symbol": symbol},
                error_x=_error_bars(part, hue),
                hovertext=[
                    f"{text(line.item)}<br>{text(line.label)}<br>{line.mean:.3f}"
                    f"{_interval_text(line)}{unit}"
                    for line in lines_of(part)
                ],
                hoverinfo="text",
            )
        )
    heads = []
    for item in items:
        values = numbers[numbers["item"] == item].set_index("group")["mean"]
        shown = [
            f"<span style='color:{colour(_of_group(group)[0])}'>{values[group]:.2f}</span>"
            for group in groups
            if group in values
        ]
        heads.append(f"<b>{text(item)}</b>  ·  {' / '.join(shown)}")
    about = ", ".join(["validation", *filter(None, [measure.unit])])
    drawn = _row_figure(traces, heads, f"{what} ({about})", 74)
    drawn.update_layout(showlegend=True, margin_t=44)
    drawn.update_xaxes(rangemode="nonnegative")
    most = int(numbers["n"].max())
    how = "95 % t intervals over seeds" if most > 1 else "one seed: no intervals"
    says = f"Best arm against the controls; {how}. Numbers in the order of the legend."
    if not measure.maximize:
        says += " Lower is better."
    if "random-init" in groups:
        says += " The distance from random-init is the effect of pretraining."
    return Drawn(numbers, drawn, title, says)


# -- shared ------------------------------------------------------------------------------------


def best_arm(ranks: pd.DataFrame) -> str | None:
    """The first in rank that is a candidate: a searched arm or the control itself."""
    candidates = ranks[ranks["group"].isin(["search", "control"])]
    return None if candidates.empty else str(candidates["arm"].iloc[0])


def p_words(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _mean_and_interval(values: Iterable[float]) -> tuple[float, float, float]:
    found = [float(value) for value in values]
    if len(found) < 2:
        return found[0], np.nan, np.nan
    mean, low, high, _ = t_interval(found)
    return mean, low, high


def _interval_words(numbers: pd.DataFrame) -> str:
    if (numbers["n"] > 1).any():
        return "Line: 95 % t interval over its seeds; small marks: the seeds."
    return "One seed per arm: no intervals, so close ranks mean nothing."


def _interval_text(line: Any) -> str:
    return "" if np.isnan(line.low) else f" [{line.low:.3f}, {line.high:.3f}], n = {line.n}"


def _no_metric(numbers: pd.DataFrame, measure: Measure) -> str | None:
    if numbers.empty:
        return f"No complete trial recorded {measure.title} ({measure.key})."
    return None


def _goal(tables: StudyTables, key: str) -> bool:
    return False if key == "planned_flops" else tables.measure(key).maximize


def _measure(tables: StudyTables, key: str) -> Measure:
    """Also for a cost given without its phase."""
    if "/" in key:
        return tables.measure(key)
    return tables.measure(f"pretrain/{key}")._replace(key=key)


def _with_planned_flops(finals: pd.DataFrame) -> pd.DataFrame:
    parts = [f"{phase}/planned_flops" for phase in ("pretrain", "segment")]
    known = finals.reindex(columns=parts)
    if known.isna().to_numpy().all():
        return finals
    return finals.assign(planned_flops=known.sum(axis=1, min_count=1))


_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _scaled(measure: Measure, values: pd.Series) -> tuple[str, float]:
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


def _log_ticks(values: pd.Series) -> list[float]:
    """1, 2, 5 and their tenfolds around the values; only the tenfolds if they span a lot."""
    low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in np.arange(low, high + 1) for step in steps]
    return [tick for tick in ticks if values.min() / 1.6 <= tick <= values.max() * 1.6]


def _grouped(numbers: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    order = [*GROUPS, *sorted(set(numbers["group"]) - set(GROUPS))]
    parts = [(group, numbers[numbers["group"] == group]) for group in order]
    return [(group, part) for group, part in parts if len(part)]


def _of_group(group: str) -> tuple[str, str]:
    return GROUPS.get(group, ("amber", SYMBOLS[4]))


def _rows_of_points(shown: pd.DataFrame, groups: pd.Series, heads: list[str]) -> list[Any]:
    """One row per line of `shown`: interval, mean, and the single values behind it."""
    rows = {index: row for row, index in enumerate(shown.index)}
    traces: list[Any] = []
    for group, part in _grouped(shown.assign(group=groups)):
        hue, symbol = _of_group(group)
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
                name=GROUP_TITLES.get(group, plain(group)),
                marker={"size": 12, "color": colour(hue), "symbol": symbol},
                error_x=_error_bars(part, hue),
                hovertext=[heads[rows[index]] for index in part.index],
                hoverinfo="text",
            )
        )
    return traces


def _error_bars(part: pd.DataFrame, hue: str) -> dict[str, Any] | None:
    if part["low"].isna().all():
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": _lists(part["high"] - part["mean"]),
        "arrayminus": _lists(part["mean"] - part["low"]),
        "color": colour(hue),
        "thickness": 2,
        "width": 4,
    }


def _row_figure(
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


def _beeswarm(values: list[float]) -> np.ndarray:
    """Small fixed offsets, so that equal values do not hide one another."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return 0.12 * ((ranks * 0.618034) % 1 - 0.5)


def _percent(progress: Iterable[float]) -> list[float]:
    return [100 * share for share in progress]


def _lists(values: pd.DataFrame | pd.Series) -> list[Any]:
    """Numbers with None where there is none."""
    array = values.to_numpy(dtype=float)
    listed: list[Any] = np.where(np.isnan(array), np.array(None), array.astype(object)).tolist()
    return listed


FIGURES: dict[str, Callable[[StudyTables], Drawn]] = {
    "ranking": ranking,
    "ratio_patch_psnr": partial(ratio_patch, metric=PSNR),
    "ratio_patch_miou": partial(ratio_patch, metric=MIOU),
    "schedules_psnr": partial(schedules, metric=PSNR),
    "schedules_miou": partial(schedules, metric=MIOU),
    "curves_psnr": partial(curves, metric=PSNR),
    "curves_miou": partial(curves, metric=MIOU),
    "pareto_quality": partial(pareto, x=PSNR, y=MIOU),
    "pareto_cost": partial(pareto, x="planned_flops", y=MIOU),
    "cost_flops": partial(cost, metric="planned_flops"),
    "cost_seconds": partial(cost, metric="device_seconds"),
    "cost_memory": partial(cost, metric="peak_memory"),
    "cost_speed": partial(cost, metric="images_per_second"),
    "differences": differences,
    "class_iou": partial(classes, prefix="segment/iou/"),
    "object_f1": partial(classes, prefix="segment/object_f1/"),
    "class_case_dice": partial(classes, prefix="segment/case_dice/"),
    "class_hd95": partial(classes, prefix="segment/hd95/"),
    "class_nsd": partial(classes, prefix="segment/nsd/"),
}
