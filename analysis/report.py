"""One self-contained interactive page about a study: the answer first, then what it rests on.

Every word that comes from the study is escaped by the template; what goes into figures by
`theme.text`. The page's policy lets no script run but the two whose hashes it names, and lets the
page load nothing. The same ledger gives the same bytes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis import theme
from analysis.figures import FIGURES, SECTIONS
from analysis.figures.differences import differences_numbers, p_words
from analysis.figures.drawn import Drawn
from analysis.figures.ranking import best_arm, ranking_numbers
from analysis.gallery import exhibits
from analysis.statistics import FEWEST_SEEDS, detectable_difference
from analysis.tables import (
    Measure,
    StudyTables,
    arm_scores,
    by_size,
    final,
    flatten,
    lines_of,
    load,
    reported,
)
from analysis.theme import plain
from study.folder import StudyFolder

MOST_LINES = 200  # of a table in the page; the CSV has all trials
LONGEST_ERROR = 2000
SETTINGS = ("seed", "sampler", "stopping", "probe", "budget")  # of the study file, told in words


class Answer(NamedTuple):
    """`is_shown`: a difference from the control is shown beyond chance."""

    headline: str
    sentences: list[str]
    is_shown: bool


class Cell(NamedTuple):
    text: str
    number: str | None = None
    code: bool = False


class Grid(NamedTuple):
    caption: str
    heads: list[str]
    lines: list[list[Cell]]
    left_out: int = 0


def build_report(folder: Path | StudyFolder, output: Path | None = None) -> Path:
    """Write the page about a study, by default into its folder; returns where it lies."""
    tables = load(folder)
    path = Path(output) if output is not None else tables.folder.report
    return theme.write_page(path, render(tables))


def render(tables: StudyTables) -> str:
    """The page as text."""
    drawn = {name: figure.draw(tables) for name, figure in FIGURES.items()}
    drawn = {
        name: item for name, item in drawn.items() if item.figure or not FIGURES[name].needs_volumes
    }
    content = {
        "template": theme.TEMPLATE,
        "figures": {name: plain_figure(item.figure) for name, item in drawn.items() if item.figure},
    }
    plotly, script = report_scripts()
    shown = exhibits(tables)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_resource("report.html"))
    page: str = template.render(
        name=tables.name,
        question=plain(tables.spec.get("question") or "", 400),
        policy=policy([plotly, script]),
        light=Markup(theme.css_variables(dark=False)),
        dark=Markup(theme.css_variables(dark=True)),
        font=Markup(theme.FONT),
        slices_style=Markup(slices_style()),
        answer=answer(tables),
        tiles=_tiles(tables),
        sections=_sections(drawn),
        exhibits=shown,
        has_slices=any(
            picture.slices and picture.slices.uri for item in shown for picture in item.pictures
        ),
        heat=Markup(theme.heat()),
        classes=[
            {"name": plain(name), "colour": colour}
            for name, colour in zip(
                reported(tables, "segment/iou/")[1:], theme.CLASSES, strict=False
            )
        ],
        outcomes=_outcome_counts(tables),
        endings=_endings(tables),
        settings=_settings(tables),
        spec_text=tables.spec_text,
        methods=methods(tables),
        csv=Markup("data:text/csv;charset=utf-8;base64,") + _base64(results_csv(tables)),
        csv_name=f"{plain(tables.name, 64)}.csv",
        content=Markup(as_json(content)),
        plotly=Markup(plotly),
        script=Markup(script),
    )
    return page


def report_scripts() -> tuple[str, str]:
    """The two scripts of every report."""
    return get_plotlyjs(), with_common(_resource("report.js"))


def with_common(script: str) -> str:
    """A page's script behind what the pages share."""
    return _resource("common.js") + script


def slices_style() -> str:
    """How sheets of slices and their sliders look."""
    return _resource("slices.css")


def policy(scripts: Iterable[str]) -> str:
    """Nothing is loaded, and only these inline scripts run.

    Plotly sets styles from script, so styles stay open; with nothing to load they cannot leak.
    """
    hashes = " ".join(
        f"'sha256-{_base64(hashlib.sha256(script.encode()).digest())}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def answer(tables: StudyTables) -> Answer:
    """What the data say to the question, and how sure that is."""
    ranks = ranking_numbers(tables)
    best = best_arm(ranks)
    if best is None:
        return Answer(
            "No answer yet: no trial is complete.", [_progress_sentence(tables)], is_shown=False
        )
    goal = tables.objectives[0]
    against = differences_numbers(tables)
    line = ranks[ranks["arm"] == best].iloc[0]
    control = ranks[ranks["group"] == "control"]
    score = f"{goal.title} {goal.show(line['mean'])}"
    sentences: list[str | None] = []
    if line["group"] == "control":
        headline = f"No searched arm is ahead of the control ({line['label']}; {score})."
        if len(ranks[ranks["group"] == "search"]) == 0:
            headline = f"Only controls are complete so far ({line['label']}; {score})."
        is_shown = False
    elif control.empty:
        bound = "Highest" if goal.maximize else "Lowest"
        headline = f"{bound} {goal.title} so far: {line['label']} ({goal.show(line['mean'])})."
        sentences.append("The control is not complete, so there is nothing to compare it with yet.")
        is_shown = False
    else:
        verdict = against[against["arm"] == best].iloc[0]
        is_shown = is_beyond_chance(verdict) and (verdict["mean"] > 0) == goal.maximize
        lead = "Best arm" if is_shown else "Ahead, but not shown to be better"
        if verdict["n"] < 2:
            lead = "Ahead, on one seed"
        headline = (
            f"{lead}: {line['label']}; {score} against {goal.show(control['mean'].iloc[0])} "
            f"of the control."
        )
        sentences.append(_certainty(verdict, goal, tables))
    sentences += [_pretraining_sentence(ranks, against, goal), _test_sentence(tables, best, goal)]
    sentences += [_by_patch_sentence(tables, goal), _other_objectives(tables, ranks)]
    sentences.append(_progress_sentence(tables))
    return Answer(headline, [sentence for sentence in sentences if sentence], is_shown)


def is_beyond_chance(verdict: Any) -> bool:
    """Enough seeds, an interval that leaves out 0, and p still small after Holm's adjustment."""
    return bool(
        verdict["n"] >= FEWEST_SEEDS
        and (verdict["low"] > 0 or verdict["high"] < 0)
        and verdict["p_holm"] < 0.05
    )


def _certainty(verdict: Any, goal: Measure, tables: StudyTables) -> str:
    gap = goal.show(verdict["mean"], signed=True)
    if verdict["n"] < 2:
        return (
            f"One seed: no interval. The difference ({gap}) may be chance, and the best of many "
            f"single runs looks better than it is. To know, run the study with "
            f"`confirm: {{arms: 3, seeds: 5}}` or with `seeds: 3` and more."
        )
    interval = f"{gap}, 95 % interval {goal.show(verdict['low'], signed=True)} to "
    interval += goal.show(verdict["high"], signed=True)
    how = f"{verdict['n']} {'seeds, paired' if verdict['paired'] else 'seeds or more, unpaired'}"
    fresh = ""
    if (tables.suggestions["origin"] == "confirm").any():
        fresh = " on fresh seeds, without the trial that made the arm stand out"
    elif len(tables.arms) > 2:
        fresh = "; the same seeds chose the arm among many, so expect somewhat less on new ones"
    if is_beyond_chance(verdict):
        return (
            f"The difference is {interval} ({how}; {p_words(verdict['p_holm'])} after Holm's "
            f"adjustment){fresh}."
        )
    if verdict["n"] < FEWEST_SEEDS:
        return (
            f"The difference is {interval} ({how}). Two seeds are too few for a claim; "
            f"take {FEWEST_SEEDS} or more."
        )
    if verdict["low"] > 0 or verdict["high"] < 0:
        return (
            f"The difference is {interval} ({how}); alone it would count, but after Holm's "
            f"adjustment for all arms compared {p_words(verdict['p_holm'])}: not shown."
        )
    least = detectable_difference(verdict["sd"], int(verdict["n"])) if verdict["paired"] else None
    missed = (
        f" With this noise {verdict['n']} seeds show a difference of {goal.show(least)} or more "
        f"in four of five studies; a smaller one needs more seeds."
        if least
        else ""
    )
    return f"The difference is {interval} ({how}): not told apart from none.{missed}"


def _pretraining_sentence(ranks: pd.DataFrame, against: pd.DataFrame, goal: Measure) -> str | None:
    """The control against the same network from random weights."""
    scratch = against[against["group"] == "random-init"]
    if scratch.empty:
        return None
    verdict = scratch.iloc[0]
    control = ranks.loc[ranks["group"] == "control", "mean"].iloc[0]
    bare = ranks.loc[ranks["group"] == "random-init", "mean"].iloc[0]
    values = f"{goal.show(control)} with it, {goal.show(bare)} from random weights"
    if verdict["n"] < 2:
        return f"Pretraining (control's settings): {values}; one seed, so no interval."
    low, high = sorted([-verdict["high"], -verdict["low"]])
    interval = (
        f"difference {goal.show(-verdict['mean'], signed=True)}, 95 % interval "
        f"{goal.show(low, signed=True)} to {goal.show(high, signed=True)}, {verdict['n']} seeds"
    )
    if not is_beyond_chance(verdict):
        return f"Pretraining (control's settings): {values}; {interval}: no effect shown."
    helps = (verdict["mean"] < 0) == goal.maximize
    word = "helps" if helps else "hurts"
    return f"Pretraining {word} (control's settings): {values}; {interval}."


def _test_sentence(tables: StudyTables, best: str, goal: Measure) -> str | None:
    """The test split, on which nothing was chosen."""
    phase, _, metric = goal.key.partition("/")
    scores = arm_scores(tables, f"{phase}/test_{metric}").groupby("arm")["value"].mean()
    if best not in scores.index:
        return None
    control = [arm for arm in scores.index if tables.arms.at[arm, "group"] == "control"]
    words = f"On the test images, on which nothing was chosen: {goal.show(scores[best])}"
    if control and control[0] != best:
        words += f" against {goal.show(scores[control[0]])} of the control"
    return words + "."


def _by_patch_sentence(tables: StudyTables, goal: Measure) -> str | None:
    scores = arm_scores(tables, goal.key)
    searched = tables.arms["group"].isin(["search", "control"])
    scores = scores[scores["arm"].isin(tables.arms.index[searched])]
    patches = by_size(scores["arm"].map(tables.arms["patch"]))
    groups = scores.groupby(patches, observed=True)["value"]
    if groups.ngroups < 2:
        return None
    parts = [
        f"patch {patch} {goal.show(values.mean())} (n = {len(values)})" for patch, values in groups
    ]
    return f"Mean {goal.title} by patch size, other settings mixed: {', '.join(parts)}."


def _other_objectives(tables: StudyTables, ranks: pd.DataFrame) -> str | None:
    parts = []
    candidates = ranks.loc[ranks["group"].isin(["search", "control"]), "arm"]
    for measure in tables.objectives[1:]:
        means = arm_scores(tables, measure.key).groupby("arm")["value"].mean()
        means = means[means.index.isin(candidates)]
        if len(means):
            arm = str(means.idxmax() if measure.maximize else means.idxmin())
            bound = "highest" if measure.maximize else "lowest"
            parts.append(
                f"The {bound} {measure.title}, {measure.show(means[arm])}, is that of "
                f"{tables.label(arm)}."
            )
    return " ".join(parts) or None


def _progress_sentence(tables: StudyTables) -> str:
    counts = tables.results["outcome"].value_counts()
    asked = len(tables.suggestions)
    parts = [f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if outcome in counts]
    if waiting := asked - len(tables.results):
        parts.append(f"{waiting} not ended yet")
    trials = "1 trial" if asked == 1 else f"{asked} trials"
    return f"It rests on {trials} of {len(tables.arms)} arms: {', '.join(parts) or 'none yet'}."


OUTCOMES = {
    "complete": "spent the whole budget",
    "stopped": "ended at a rung by the stopping rule",
    "diverged": "the loss was not finite",
    "out-of-memory": "did not fit into memory",
    "failed": "ended by an error",
}


def methods(tables: StudyTables) -> list[str]:
    """What was measured, and why some numbers are not compared."""
    probe = tables.spec.get("probe")
    ratios = probe.get("ratios") if isinstance(probe, dict) else None
    named = reported(tables, "pretrain/probe_psnr@") or ratios or []
    shares = " and ".join(plain(ratio, 8) for ratio in named) or "several"
    of_volumes = [
        "Whole volumes. Dice per volume, HD95 and surface Dice are taken for each class in each "
        "volume and averaged over volumes, then over classes without background. HD95 is the 95th "
        "percentile of the distances between the true and the predicted surface, the worse of both "
        "directions; lower is better. Surface Dice is the share of both surfaces within a "
        "tolerance of the other. A class that a volume has neither truly nor by prediction is left "
        "out there; one that only one of them has scores Dice 0, surface Dice 0, and as HD95 the "
        "length of the volume's diagonal."
    ]
    return [
        f"Probe PSNR. Each trial reconstructs the same validation images with the same regions "
        f"hidden. The regions are fixed in pixels and do not depend on the trial's own ratio, "
        f"patch size or schedule. The hidden shares are {shares}; the mean over them is reported. "
        f"Only hidden pixels count, intensities run from 0 to 1, and PSNR is taken per image and "
        f"then averaged. Higher is better.",
        "Native PSNR uses each trial's own ratio and patch, as papers plot it. It is in the CSV "
        "and is not ranked: a smaller ratio makes the task easier, and pasting the visible "
        "patches into the picture adds −10·log10(ratio) dB, so that going from 0.75 to 0.25 "
        "gains 4.77 dB with no better model.",
        "Training losses are not compared. The loss is averaged over a trial's own hidden pixels, "
        "so it changes with ratio, patch size and target even for the same model.",
        "Segmentation. The pretrained encoder is fine-tuned with a U-Net Transformer. mIoU is the "
        "mean over classes without background; objects are matched one to one at an IoU of 0.5, "
        "and their F1 is split by size. The controls are the study file's own trial (control), "
        "the same network from random weights (random-init), and with the encoder fixed (frozen).",
        *(of_volumes if reported(tables, "segment/hd95") else []),
        "Intervals are 95 % Student t intervals over seeds; differences are paired by seed where "
        "two or more seeds are common, else Welch's. p values are Holm-adjusted over all arms "
        f"compared with the control. A difference is called shown with {FEWEST_SEEDS} or more "
        "seeds, an interval that leaves out zero, and an adjusted p below 0.05. Once an arm is "
        "confirmed with fresh seeds, the trials that made it stand out no longer count for it.",
        "Stopped trials are compared with others at their rung only. They have no final score, "
        "are never ranked, and are never on a Pareto front. Planned FLOPs are those of the whole "
        "budget.",
    ]


def results_csv(tables: StudyTables) -> bytes:
    """One line per trial: identity, outcome, settings, and metrics at progress 1.

    Text that a spreadsheet would run as a formula gets a quote in front.
    """
    finals = final(tables).drop(columns=["arm", "seed", "origin"])
    settings = sorted({key for flat in tables.arms["settings"] for key in flat})
    heads = ["number", "trial", "arm", "label", "seed", "origin", "outcome", "seconds"]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(_harmless(head) for head in [*heads, *settings, *finals.columns])
    settings_of = dict(tables.arms["settings"])
    results, measured = tables.results.to_dict("index"), finals.to_dict("index")
    for line in lines_of(tables.suggestions):
        ended, metrics = results.get(line.trial, {}), measured.get(line.trial, {})
        flat = settings_of[line.arm]
        about = [line.number, line.trial, line.arm, tables.label(line.arm), line.seed, line.origin]
        about += [ended.get("outcome", "unfinished"), ended.get("seconds")]
        values = [*about, *map(flat.get, settings), *map(metrics.get, finals.columns)]
        writer.writerow(_harmless(value) for value in values)
    return written.getvalue().encode("utf-8")


def _harmless(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | float):
        return value
    word = value if isinstance(value, str) else json.dumps(value)
    return "'" + word if word.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else word


# -- what the template shows -------------------------------------------------------------------


def _sections(drawn: dict[str, Drawn]) -> list[dict[str, Any]]:
    """Those of SECTIONS that have a figure, with their figures in the order of FIGURES."""
    sections = []
    for anchor, section in SECTIONS.items():
        items = [_item(name, drawn[name]) for name in drawn if FIGURES[name].section == anchor]
        if items:
            sections.append({"anchor": f"section-{anchor}", **section._asdict(), "figures": items})
    return sections


def _item(name: str, drawn: Drawn) -> dict[str, Any]:
    return {
        "name": name,
        "title": drawn.title,
        "says": drawn.says,
        "height": drawn.figure.layout.height if drawn.figure else None,
        "grid": _grid(f"Numbers of: {drawn.title}", drawn.numbers),
    }


def _grid(caption: str, numbers: pd.DataFrame) -> Grid:
    shown = numbers[:MOST_LINES]
    lines = [[_cell(value) for value in line] for line in shown.itertuples(index=False, name=None)]
    heads = [str(column).replace("_", " ") for column in numbers.columns]
    return Grid(caption, heads, lines, len(numbers) - len(shown))


def _cell(value: Any) -> Cell:
    if isinstance(value, list):
        if len(value) > 8:
            return Cell(", ".join(_cell(item).text for item in value[:8]) + f", … ({len(value)})")
        return Cell(", ".join(_cell(item).text for item in value))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell("–")
    if isinstance(value, bool) or type(value).__name__ == "bool":
        return Cell("yes" if value else "no")
    if isinstance(value, int):
        return Cell(str(value), str(value))
    if isinstance(value, float):
        return Cell(f"{value:.4g}".replace("-", "\N{MINUS SIGN}"), repr(float(value)))
    return Cell(plain(value, 160))


def _tiles(tables: StudyTables) -> list[dict[str, str]]:
    ranks = ranking_numbers(tables)
    tiles = []
    best = best_arm(ranks)
    if best is not None:
        goal = tables.objectives[0]
        for title, line in (
            ("best arm", ranks[ranks["arm"] == best]),
            ("control", ranks[ranks["group"] == "control"]),
            ("random-init", ranks[ranks["group"] == "random-init"]),
        ):
            if len(line):
                mean, low, high, n = line.iloc[0][["mean", "low", "high", "n"]]
                note = "one seed: no interval"
                if n > 1:
                    note = f"[{goal.show(low)}, {goal.show(high)}], {n} seeds"
                tiles.append(
                    {"title": f"{goal.title}, {title}", "value": goal.show(mean), "note": note}
                )
    complete = int((tables.results["outcome"] == "complete").sum())
    tiles.append(
        {
            "title": "complete trials",
            "value": str(complete),
            "note": f"of {len(tables.suggestions)} suggested",
        }
    )
    spent = float(tables.results["seconds"].sum())
    size, unit = (3600, "h") if spent >= 7200 else (60, "min") if spent >= 120 else (1, "s")
    value = f"{spent / size:.1f} {unit}"
    tiles.append({"title": "time in trials", "value": value, "note": "summed"})
    return tiles


def _outcome_counts(tables: StudyTables) -> Grid:
    counts = tables.results["outcome"].value_counts()
    lines = [
        [Cell(outcome), _cell(int(counts.get(outcome, 0))), Cell(meaning)]
        for outcome, meaning in OUTCOMES.items()
    ]
    waiting = len(tables.suggestions) - len(tables.results)
    lines.append([Cell("not ended"), _cell(waiting), Cell("running, or waiting to be resumed")])
    return Grid("Trials by outcome", ["outcome", "trials", "meaning"], lines)


def _endings(tables: StudyTables) -> Grid:
    ended = tables.results[tables.results["outcome"] != "complete"]
    order = tables.suggestions.set_index("trial")["number"].reindex(ended.index)
    ended = ended.assign(number=order).sort_values("number")
    arms = dict(zip(tables.suggestions["trial"], tables.suggestions["arm"], strict=True))
    lines = []
    for line in lines_of(ended[:MOST_LINES]):
        phase, reached = "segment", line.segment
        if pd.isna(reached):
            phase, reached = "pretrain", line.pretrain
        lines.append(
            [
                Cell(line.Index),
                Cell(tables.label(arms[line.Index])),
                Cell(line.outcome),
                Cell("–" if pd.isna(reached) else f"{phase} {reached:.0%}"),
                _cell(float(line.seconds)),
                Cell(error_text(line.error), code=True),
            ]
        )
    heads = ["trial", "arm", "outcome", "reached", "seconds", "error"]
    return Grid("Trials that did not complete", heads, lines, len(ended) - len(lines))


def error_text(error: Any, longest: int = LONGEST_ERROR) -> str:
    """The end of an error's text, without control characters."""
    if not isinstance(error, str) or not error:
        return "–"
    kept = re.sub(r"[^\S\n]*[\x00-\x09\x0b-\x1f\x7f-\x9f]+", " ", error.strip())
    return kept if len(kept) <= longest else "… " + kept[-longest:]


def _settings(tables: StudyTables) -> Grid:
    """Software, hardware, data, seeds, rungs, probe."""
    spec = tables.spec
    seeds = sorted(set(tables.suggestions["seed"]))
    rungs = sorted(set(tables.rows["progress"].round(4)))
    facts: dict[str, Any] = {
        "seeds of the trials": seeds,
        "rungs (share of the budget)": rungs,
        **{key: spec[key] for key in SETTINGS if key in spec},
        **flatten(tables.environment),
    }
    lines = [
        [Cell(plain(key, 120)), Cell(plain(_fact(value), 400))] for key, value in facts.items()
    ]
    return Grid("How it was run", ["what", "value"], lines[:MOST_LINES], len(lines[MOST_LINES:]))


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_fact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact(item) for item in value)
    return "–" if value is None else str(value)


def plain_figure(figure: go.Figure) -> dict[str, Any]:
    """Data and layout for Plotly, without a template: the page has one for all."""
    content = figure.to_plotly_json()
    content["layout"].pop("template", None)
    return {"data": content["data"], "layout": content["layout"]}


def as_json(content: Any) -> str:
    """JSON for a script element: six digits, no NaN, and nothing that could end the element."""
    written = json.dumps(_finite(content), separators=(",", ":"), sort_keys=True, allow_nan=False)
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _resource(name: str) -> str:
    return resources.files("analysis").joinpath(name).read_text(encoding="utf-8")
