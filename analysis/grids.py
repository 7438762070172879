"""The report's tables: cells as the template shows and the page's script sorts them."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pandas as pd

from analysis.tables import OUTCOMES, StudyTables, lines_of
from analysis.theme import plain
from trainables.metrics import PHASES
from trainables.settings import flatten

MOST_LINES = 200  # of a table in the page; the CSV has all trials
LONGEST_ERROR = 2000
SETTINGS = ("seed", "sampler", "stopping", "probe", "budget")  # of the study file, told in words


class Cell(NamedTuple):
    text: str
    number: str | None = None
    code: bool = False


class Grid(NamedTuple):
    caption: str
    heads: list[str]
    lines: list[list[Cell]]
    left_out: int = 0


def numbers_grid(caption: str, numbers: pd.DataFrame) -> Grid:
    """The numbers of a figure."""
    shown = numbers[:MOST_LINES]
    lines = [[_cell(value) for value in line] for line in shown.itertuples(index=False, name=None)]
    heads = [str(column).replace("_", " ") for column in numbers.columns]
    return Grid(caption, heads, lines, len(numbers) - len(shown))


def outcome_counts(tables: StudyTables) -> Grid:
    """How many trials ended how."""
    counts = tables.results["outcome"].value_counts()
    lines = [
        [Cell(outcome), _cell(int(counts.get(outcome, 0))), Cell(meaning)]
        for outcome, meaning in OUTCOMES.items()
    ]
    waiting = len(tables.suggestions) - len(tables.results)
    lines.append([Cell("not ended"), _cell(waiting), Cell("running, or waiting to be resumed")])
    return Grid("Trials by outcome", ["outcome", "trials", "meaning"], lines)


def endings(tables: StudyTables) -> Grid:
    """Where and why trials ended that did not complete."""
    ended = tables.results[tables.results["outcome"] != "complete"]
    order = tables.suggestions.set_index("trial")["number"].reindex(ended.index)
    ended = ended.assign(number=order).sort_values("number")
    arms = dict(zip(tables.suggestions["trial"], tables.suggestions["arm"], strict=True))
    lines = []
    for line in lines_of(ended[:MOST_LINES]):
        shares = {phase: getattr(line, phase) for phase in reversed(PHASES)}
        reached = [f"{phase} {share:.0%}" for phase, share in shares.items() if not pd.isna(share)]
        lines.append(
            [
                Cell(line.Index),
                Cell(tables.label(arms[line.Index])),
                Cell(line.outcome),
                Cell(reached[0] if reached else "–"),
                _cell(float(line.seconds)),
                Cell(error_text(line.error), code=True),
            ]
        )
    heads = ["trial", "arm", "outcome", "reached", "seconds", "error"]
    return Grid("Trials that did not complete", heads, lines, len(ended) - len(lines))


def settings(tables: StudyTables) -> Grid:
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


def error_text(error: Any, longest: int = LONGEST_ERROR) -> str:
    """The end of an error's text, without control characters."""
    if not isinstance(error, str) or not error:
        return "–"
    kept = re.sub(r"[^\S\n]*[\x00-\x09\x0b-\x1f\x7f-\x9f]+", " ", error.strip())
    return kept if len(kept) <= longest else "… " + kept[-longest:]


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


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_fact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact(item) for item in value)
    return "–" if value is None else str(value)
