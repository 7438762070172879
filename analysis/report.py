"""One self-contained interactive page about a study: the answer first, then what it rests on.

Every word that comes from the study is escaped by the template; what goes into figures by
`theme.text`. The page's policy lets no script run but the two whose hashes it names, and lets the
page load nothing. The same ledger gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from analysis import theme
from analysis.answer import answer
from analysis.figures import FIGURES, SECTIONS
from analysis.figures.drawn import Drawn
from analysis.figures.ranking import best_arm, ranking_numbers
from analysis.gallery import exhibits
from analysis.grids import endings, numbers_grid, outcome_counts, settings
from analysis.methods import methods
from analysis.page import (
    as_json,
    base64_of,
    plain_figure,
    policy,
    report_scripts,
    resource,
    slices_style,
    write_page,
)
from analysis.results import results_csv
from analysis.tables import StudyTables, load, trivial_scores
from analysis.theme import plain
from study.folder import StudyFolder
from study.gain import best_gain, decibels, rival
from trainables.metrics import MIOU


def build_report(folder: Path | StudyFolder, output: Path | None = None) -> Path:
    """Write the page about a study, by default into its folder; returns where it lies."""
    tables = load(folder)
    path = Path(output) if output is not None else tables.folder.report
    return write_page(path, render(tables))


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
    template = environment.from_string(resource("report.html"))
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
            for name, colour in zip(tables.classes[1:], theme.CLASSES, strict=False)
        ],
        outcomes=outcome_counts(tables),
        endings=endings(tables),
        settings=settings(tables),
        spec_text=tables.spec_text,
        methods=methods(tables),
        csv=Markup("data:text/csv;charset=utf-8;base64,") + base64_of(results_csv(tables)),
        csv_name=f"{plain(tables.name, 64)}.csv",
        content=Markup(as_json(content)),
        plotly=Markup(plotly),
        script=Markup(script),
    )
    return page


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
        "grid": numbers_grid(f"Numbers of: {drawn.title}", drawn.numbers),
    }


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
    for measure, reached in trivial_scores(tables) if MIOU in tables.measured else ():
        note = "on validation images, without an encoder"
        tiles.append({"title": measure.title, "value": measure.show(reached), "note": note})
    leader = best_gain(tables.gains)
    if leader is not None:
        note = f"against {rival(leader[1])}"
        title = "probe gain, best encoder"
        tiles.append({"title": title, "value": decibels(leader[1].decibels), "note": note})
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
