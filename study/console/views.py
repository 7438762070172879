"""What the console tells of studies, as plain data for JSON. Words, not markup."""

from __future__ import annotations

import base64
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures.curves import curves
from analysis.figures.drawn import Drawn
from analysis.figures.ratio_patch import ratio_patch
from analysis.gallery import CHANGING, KINDS, UNREADABLE, data_uri, shots, slices, unreadable
from analysis.grids import error_text
from analysis.page import plain_figure
from analysis.tables import OUTCOMES, StudyTables, measure_of
from analysis.theme import GROUPS, colour, figure, plain, text
from study.best import (
    CONFIRM,
    IN_WORDS,
    VERDICT,
    Final,
    Standing,
    ahead,
    best,
    group_of,
    of_file,
)
from study.console.index import NotFound, Reached, Snapshot, refuse_links_out, without_root
from study.gain import best_gain, decibels, rival, warning
from study.ledger import Outcome, Suggestion, read_rows
from study.spec import UNITS
from study.state import Outlook, State
from trainables.errors import StorageError
from trainables.metrics import place_of
from trainables.settings import flatten

PAGE = 50  # trials
MOST_PER_PAGE = 200
LONGEST_ERROR = 20_000
SILENT_SECONDS = 900  # after which a driver may be dead; longer where trials take longer
MOST_CURVES = 200  # of the newest trials
MOST_RUNNING = 32  # trials listed as running
ALIVE = ("PENDING", "RUNNING")  # states of a job
UNFINISHED = "unfinished"
FRESH_MARKS = {CONFIRM: ("blue", "circle-open"), VERDICT: ("blue", "star-open")}


def state_of(
    found: Snapshot, is_finished: bool | None, job: dict[str, str] | None
) -> tuple[State, str]:
    """The word for where a study stands, and a sentence about it.

    `is_finished`: None while that is not known yet.
    """
    held_by = _holder_words(found)
    if found.is_held:
        doubt = _doubt(found, job)
        if doubt:
            return State.HELD, f"{held_by} holds the study, but {doubt}: it may be dead."
        return State.RUNNING, f"{held_by} holds the study."
    if job is not None and job["status"] == "PENDING":
        return State.WAITING, f"Job {job['id']} waits for its turn."
    if job is not None and job["status"] == "RUNNING":
        return State.RUNNING, f"Job {job['id']} runs; its lock is not seen from here."
    if is_finished:
        return State.FINISHED, "Every trial has ended."
    if found.num_trials == 0:
        return State.WAITING, "No trial has begun."
    if is_finished is None:
        return State.AT_REST, "No driver holds the study."
    return State.INTERRUPTED, "No driver holds the study, and trials are left: resume it."


def summary(found: Snapshot, outlook: Outlook, job: dict[str, str] | None) -> dict[str, Any]:
    """What the list of studies says of one; figures and trials are asked for apart."""
    state, why = state_of(found, outlook.is_finished, job)
    ranked, goal = _standings(found), _goal(found)
    counts = {outcome.value: 0 for outcome in Outcome}
    for result in found.results.values():
        counts[result.outcome.value] += 1
    return {
        "name": found.name,
        "question": plain(found.spec.get("question") or "", 400),
        "state": state,
        "why": why,
        "problem": found.problem,
        "revision": found.revision,
        "total": _total(found, outlook),
        "spent": outlook.spent,
        "unit": _unit(found),
        "suggested": found.num_trials,
        "ended": len(found.results),
        "counts": counts,
        "read": found.num_read,
        "best": _tile(found, best(ranked)),
        "control": _tile(found, next((one for one in ranked if one.group == "control"), None)),
        "ahead": [{"who": IN_WORDS[one.group], "value": one.mean} for one in ahead(ranked, goal)],
        "gain": _gain(found),
        "changed": round(found.changed) or None,  # whole: JSON keeps six digits of others
        "job": job,
    }


def study(found: Snapshot, outlook: Outlook, job: dict[str, str] | None) -> dict[str, Any]:
    """One study: its summary, the trials that run, what may be enqueued, what outcomes mean."""
    said = summary(found, outlook, job)
    is_driven = said["state"] in (State.RUNNING, State.HELD)
    open_trials = [s for s in found.suggestions if s.trial not in found.results]
    searched = found.spec.get("search")
    trial = flatten(found.spec["trial"]) if isinstance(found.spec.get("trial"), dict) else {}
    return {
        **said,
        "objectives": _objectives(found),
        "meanings": dict(OUTCOMES),
        "running": [_running(found, s) for s in open_trials[-MOST_RUNNING:]] if is_driven else [],
        "waiting": 0 if is_driven else len(open_trials),
        "search": [
            {"path": plain(path, 120), "allowed": plain(_words(item), 300)}
            for path, item in (searched.items() if isinstance(searched, dict) else ())
        ],
        "control_settings": {
            path: trial.get(path) for path in (searched if isinstance(searched, dict) else ())
        },
    }


def trials(
    found: Snapshot, *, offset: int, limit: int, order: str, falling: bool, outcome: str, words: str
) -> dict[str, Any]:
    """A page of the table of trials. `order`: a column's key; `words` must all occur in a line."""
    limit = max(1, min(limit, MOST_PER_PAGE))
    keys = [objective.key for objective in found.objectives]
    lines = [
        suggestion
        for suggestion in found.suggestions
        if (not outcome or _outcome(found, suggestion) == outcome)
        and _mentions(found, suggestion, words.lower().split())
    ]
    if order in keys:
        lines = _sorted(lines, lambda s: _reached(found, s).values.get(order), falling)
    elif order == "seconds":
        lines = _sorted(lines, lambda s: _seconds(found, s), falling)
    elif order == "arm":
        lines.sort(key=lambda s: found.labels[s.trial], reverse=falling)
    elif order == "outcome":
        lines.sort(key=lambda s: _outcome(found, s), reverse=falling)
    elif falling:
        lines.reverse()
    offset = max(0, min(offset, (len(lines) - 1) // limit * limit)) if lines else 0
    return {
        "total": len(lines),
        "offset": offset,
        "limit": limit,
        "revision": found.revision,
        "objectives": _objectives(found),
        "trials": [_line(found, suggestion) for suggestion in lines[offset : offset + limit]],
    }


def trial(found: Snapshot, name: str) -> dict[str, Any]:
    """Everything about one trial; its rows are read anew."""
    suggestion = _suggestion(found, name)
    result = found.results.get(name)
    refuse_links_out(found.folder, found.folder.rows(name))
    try:
        rows, problem = read_rows(found.folder, name), None
    except StorageError as error:
        rows, problem = None, without_root(str(error), found.folder)
    metrics = []
    attempts: list[str] = []
    if rows is not None and len(rows):
        attempts = list(dict.fromkeys(rows["attempt"]))
        ordered = rows.sort_values("progress", kind="stable")
        parts = {
            (str(phase), str(metric)): part
            for (phase, metric), part in ordered.groupby(["phase", "metric"])
        }
        for phase, metric in sorted(parts, key=lambda name: (place_of(name[0]), name)):
            part = parts[phase, metric]
            last = part.iloc[-1]
            measure = measure_of(f"{phase}/{metric}", last["goal"], last["unit"])
            metrics.append(
                {
                    "phase": phase,
                    "metric": plain(metric),
                    "title": plain(measure.title),
                    "unit": plain(measure.unit, 20),
                    "shown": measure.show(float(last["value"])),
                    "progress": [float(value) for value in part["progress"]],
                    "values": [_number(value) for value in part["value"]],
                }
            )
    return {
        **_line(found, suggestion),
        "arm": suggestion.arm,
        "study": found.name,
        "meaning": OUTCOMES.get(_outcome(found, suggestion), "has not ended yet"),
        "error": error_text(result.error, LONGEST_ERROR) if result and result.error else None,
        "problem": problem,
        "attempts": attempts,
        "metrics": metrics,
        "settings": {
            plain(key, 120): plain(value, 400) for key, value in flatten(suggestion.config).items()
        },
        "searched": {plain(key, 120): plain(v, 200) for key, v in suggestion.params.items()},
        "pictures": pictures(found, name),
    }


def pictures(found: Snapshot, name: str) -> list[dict[str, Any]]:
    """What may be asked of `picture`, with the heads of its columns."""
    folder = found.folder.pictures(_suggestion(found, name).trial)
    refuse_links_out(found.folder, folder)
    shown: list[dict[str, Any]] = []
    for kind, heads in KINDS.items():
        if (folder / f"{kind}.png").is_file():
            shown.append({"name": kind, "title": kind, "columns": heads.split(" | ")})
        sheet = slices(folder, kind, pixels=False)
        if sheet is not None and not sheet.says:
            leafed = {"planes": sheet.planes, "frames": sheet.frames, "aspect": sheet.aspect}
            title = f"{kind}, slice by slice"
            named = {"name": f"{kind}-slices", "title": title, "columns": sheet.columns}
            shown.append({**named, **leafed})
    for shot in shots(folder) if folder.is_dir() else []:
        columns = shot.columns if len(shot.columns) > CHANGING else []
        title = f"hidden at {shot.when} of pretraining"
        shown.append({"name": shot.path.stem, "title": title, "columns": columns})
    return shown


def figures(found: Snapshot) -> list[dict[str, Any]]:
    """The few figures of the study's page: data and layout for Plotly, colours by name."""
    tables = found.tables()
    if not len(tables.suggestions):
        return []
    drawn = [("best", best_so_far(found))]
    for objective in found.objectives[:1]:
        if len(tables.rows):
            drawn += [("curves", _curves(found, tables, objective.key))]
            drawn += [("ratio_patch", ratio_patch(tables, objective.key))]
    return [
        {
            "name": name,
            "title": item.title,
            "says": item.says,
            "figure": None if item.figure is None else plain_figure(item.figure),
        }
        for name, item in drawn
    ]


def _curves(found: Snapshot, tables: StudyTables, metric: str) -> Drawn:
    """Of a large study the newest trials, beside the controls and the best one."""
    leader = _tile(found, best(_standings(found)))
    shown = {s.trial for s in found.suggestions[-MOST_CURVES:]}
    shown |= {s.trial for s in found.suggestions if s.origin.startswith("control")}
    shown |= {leader["trial"]} if leader else set()
    if len(shown) >= len(found.suggestions):
        return curves(tables, metric)
    rows = tables.rows[tables.rows["trial"].isin(shown)]
    drawn = curves(replace(tables, rows=rows), metric)
    return drawn._replace(says=f"{drawn.says} The newest {MOST_CURVES}, the controls, the best.")


def picture(found: Snapshot, trial: str, name: str) -> bytes:
    """A PNG made anew from the pixels of the trial's own."""
    if name not in {known["name"] for known in pictures(found, trial)}:
        raise NotFound("no such picture of this trial")
    path = found.folder.pictures(trial) / f"{name}.png"
    refuse_links_out(found.folder, path)
    try:
        return base64.b64decode(data_uri(path).partition(",")[2])
    except UNREADABLE as error:
        raise NotFound(unreadable(path, error)) from error


def best_so_far(found: Snapshot) -> Drawn:
    """The first objective of every complete trial, in the order of the trials, and its best."""
    measure = found.objectives[0] if found.objectives else measure_of("")
    numbers = [
        (suggestion.number + 1, value, suggestion.origin, found.labels[suggestion.trial])
        for suggestion in found.suggestions
        if (value := _final(found, suggestion, measure.key)) is not None
    ]
    frame = pd.DataFrame(numbers, columns=["trial", "value", "origin", "label"])
    title = f"Best so far: {measure.title}"
    if not numbers:
        return Drawn(frame, None, title, "No trial is complete.")
    traces: list[Any] = []
    searched = frame[frame["origin"] == "search"]
    who = [origin if origin in FRESH_MARKS else group_of(origin) for origin in frame["origin"]]
    for name, (hue, symbol) in {**GROUPS, **FRESH_MARKS}.items():
        part = frame[[each == name for each in who]]
        if len(part):
            traces.append(
                go.Scatter(
                    x=list(part["trial"]),
                    y=list(part["value"]),
                    mode="markers",
                    name={"search": "searched"}.get(name, name),
                    marker={"color": colour(hue), "symbol": symbol, "size": 7, "opacity": 0.75},
                    hovertext=[
                        f"trial {number}: {text(label)}<br>{measure.show(value)}"
                        for number, value, label in zip(
                            part["trial"], part["value"], part["label"], strict=True
                        )
                    ],
                    hoverinfo="text",
                )
            )
    if len(searched):
        so_far = searched["value"].cummax() if measure.maximize else searched["value"].cummin()
        traces.append(
            go.Scatter(
                x=list(searched["trial"]),
                y=list(so_far),
                mode="lines",
                line={"shape": "hv", "color": colour("blue"), "width": 2},
                name="best so far",
                hoverinfo="skip",
            )
        )
    drawn = figure(traces, height=400, x="trial", y=measure.axis, legend=True)
    return Drawn(frame, drawn, title, "One mark for each complete trial; what stopped has none.")


def _line(found: Snapshot, suggestion: Suggestion) -> dict[str, Any]:
    reached, result = _reached(found, suggestion), found.results.get(suggestion.trial)
    error = result.error if result else None
    return {
        "number": suggestion.number + 1,
        "trial": suggestion.trial,
        "label": plain(found.labels[suggestion.trial], 200),
        "seed": suggestion.seed,
        "origin": plain(suggestion.origin, 40),
        "outcome": _outcome(found, suggestion),
        "phase": reached.phase,
        "progress": reached.progress,
        "values": {key: _number(value) for key, value in reached.values.items()},
        "seconds": _seconds(found, suggestion),
        "why": plain(error.strip().splitlines()[-1], 160) if error and error.strip() else None,
    }


def _running(found: Snapshot, suggestion: Suggestion) -> dict[str, Any]:
    speed = _reached(found, suggestion).images_per_second
    return {**_line(found, suggestion), "images_per_second": _number(speed)}


def _standings(found: Snapshot) -> list[Standing]:
    """The arms by the first objective, best first, as the report and the log rank them."""
    if not found.objectives:
        return []
    metric = found.objectives[0].key
    trials = [
        Final(each.arm, each.origin, each.seed, _final(found, each, metric))
        for each in found.suggestions
    ]
    return of_file(trials, _goal(found), found.spec)


def _goal(found: Snapshot) -> str:
    return "maximize" if not found.objectives or found.objectives[0].maximize else "minimize"


def _tile(found: Snapshot, one: Standing | None) -> dict[str, Any] | None:
    """An arm as the console shows it: its mean, and its newest complete trial."""
    if one is None:
        return None
    measure = found.objectives[0]
    trial = next(
        each.trial
        for each in reversed(found.suggestions)
        if each.arm == one.arm and _final(found, each, measure.key) is not None
    )
    return {
        "trial": trial,
        "label": plain(found.labels[trial], 200),
        "value": one.mean,
        "seeds": len(one.values),
        "title": measure.title,
    }


def _gain(found: Snapshot) -> dict[str, Any] | None:
    """The encoder that fills in best, and what is wrong if none has learnt anything."""
    known = {trial: reached.gain for trial, reached in found.reached.items() if reached.gain}
    leader = best_gain(known)
    if leader is None:
        return None
    trial, gain = leader
    return {
        "trial": trial,
        "label": plain(found.labels.get(trial, trial), 200),
        "shown": decibels(gain.decibels),
        "rival": rival(gain),
        "warning": warning(gain),
    }


def _total(found: Snapshot, outlook: Outlook) -> int | None:
    return None if outlook.total is None else max(outlook.total, found.num_trials)


def _unit(found: Snapshot) -> dict[str, str]:
    """What the budget can be extended by: a unit, in a word and in words."""
    budget = found.spec.get("budget")
    given = [unit for unit in UNITS if isinstance(budget, dict) and budget.get(unit) is not None]
    unit = given[0] if given else "trials"
    return {"name": unit, "words": "searched trials" if unit == "trials" else UNITS[unit]}


def _objectives(found: Snapshot) -> list[dict[str, str]]:
    return [{"metric": one.key, "title": one.title} for one in found.objectives]


def _final(found: Snapshot, suggestion: Suggestion, metric: str) -> float | None:
    """The value of a metric at the end of a complete trial."""
    result = found.results.get(suggestion.trial)
    if result is None or result.outcome is not Outcome.COMPLETE:
        return None
    return _number(_reached(found, suggestion).values.get(metric))


def _reached(found: Snapshot, suggestion: Suggestion) -> Reached:
    return found.reached.get(suggestion.trial) or Reached()


def _outcome(found: Snapshot, suggestion: Suggestion) -> str:
    result = found.results.get(suggestion.trial)
    return result.outcome.value if result else UNFINISHED


def _seconds(found: Snapshot, suggestion: Suggestion) -> float | None:
    result = found.results.get(suggestion.trial)
    return _number(result.seconds) if result else None


def _suggestion(found: Snapshot, trial: str) -> Suggestion:
    for suggestion in found.suggestions:
        if suggestion.trial == trial:
            return suggestion
    raise NotFound("no such trial in this study")


def _mentions(found: Snapshot, suggestion: Suggestion, words: list[str]) -> bool:
    if not words:
        return True
    result = found.results.get(suggestion.trial)
    line = f"{suggestion.trial} {suggestion.arm} {suggestion.origin} "
    line += f"{found.labels[suggestion.trial]} {(result.error if result else None) or ''}"
    return all(word in line.lower() for word in words)


def _sorted(
    lines: list[Suggestion], key: Callable[[Suggestion], float | None], falling: bool
) -> list[Suggestion]:
    """By value; what has none comes last either way."""
    known = [(value, line) for line in lines if (value := _number(key(line))) is not None]
    unknown = [line for line in lines if _number(key(line)) is None]
    known.sort(key=lambda pair: pair[0], reverse=falling)
    return [line for _, line in known] + unknown


def _holder_words(found: Snapshot) -> str:
    holder = found.holder or {}
    if "host" not in holder:
        return "A driver"
    words = f"A driver on {plain(holder['host'], 60)}, process {plain(holder.get('pid'), 12)},"
    return f"{words} job {plain(holder['job'], 80)}," if holder.get("job") else words


def _doubt(found: Snapshot, job: dict[str, str] | None) -> str | None:
    """Why the driver that holds the study may be dead; None if nothing speaks for it."""
    holder = found.holder or {}
    if job is not None and job["id"] == holder.get("job") and job["status"] not in ALIVE:
        return f"its job has ended ({job['status']})"
    pid = holder.get("pid")
    if holder.get("host") == socket.gethostname() and isinstance(pid, int) and not _lives(pid):
        return "no such process runs on this machine"
    longest = max((result.seconds for result in found.results.values()), default=0.0)
    silent = time.time() - found.changed
    if found.changed and silent > max(SILENT_SECONDS, longest):
        return f"it has written nothing for {silent / 60:.0f} minutes"
    return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _words(item: Any) -> str:
    """An entry of `search` on one line."""
    if isinstance(item, dict):
        return ", ".join(f"{key}: {_words(value)}" for key, value in item.items())
    if isinstance(item, list | tuple):
        return "[" + ", ".join(map(_words, item)) + "]"
    return str(item)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
