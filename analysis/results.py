"""The results as a file for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from analysis.tables import StudyTables, final, lines_of


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
    return written.getvalue().encode("utf-8-sig")  # without the mark Excel takes it for Latin 1


def _harmless(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | float):
        return value
    word = value if isinstance(value, str) else json.dumps(value)
    return "'" + word if word.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else word
