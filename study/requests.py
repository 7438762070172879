"""What people ask of a study that is under way or at rest: stop, extend, enqueue.

A request is a file in the study's folder, so it works wherever the driver runs, and before there is
one. Whoever asks is told at once what cannot be granted. The driver looks again before each of its
decisions, keeps its answer in the ledger, and only then removes the request: after a crash in
between, the name of the request says that it has been answered. The frozen study file stays as it
was; a resumed study counts what the answers grant.

To stop is not kept: it changes when a study goes on, not what it is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from study import space
from study.folder import StudyFolder
from study.ledger import (
    Answer,
    Suggestion,
    is_held,
    put_beside,
    read_answers,
    read_suggestions,
    sealed,
    unsealed,
)
from study.loading import spec_of
from study.mistakes import Problems, explain, listed, near
from study.population import has_population
from study.reader import Document, read_document, read_text, show
from study.spec import UNITS, Budget, StudySpec
from study.steps import Enqueued
from trainables.config import TrialConfig, arm_id
from trainables.errors import StorageError, UserError
from trainables.storage import store

MOST_TRIALS = 100_000  # of one extension
MAX_BYTES = 64 * 1024  # of a request
_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z-(extend|enqueue)-[0-9a-f]{8}\.json")


@dataclass(frozen=True)
class Request:
    """What somebody asked, as it was found."""

    name: str
    kind: str
    content: dict[str, Any] | None  # None: cannot be read, see `problem`
    problem: str = ""


def stop(folder: StudyFolder) -> str:
    """Ask the driver to stop; what was done, in a sentence."""
    name = folder.root.name
    spec_of(folder)
    if not is_held(folder):
        raise UserError(f"{name} is not running: no driver holds {folder.where}")
    if folder.remote:
        store(folder.remote).put(folder.name_of(folder.stop_request), b"")
    try:
        folder.stop_request.touch()
    except OSError as error:
        raise StorageError(f"{folder.stop_request}: cannot be made: {error.strerror}") from error
    return f"{name} has been asked to stop"


def enqueued_arms(answers: Sequence[Answer]) -> set[str]:
    """The arms that people asked for."""
    return {
        str(answer.content["arm"])
        for answer in answers
        if answer.kind == "enqueue" and answer.refused is None
    }


def was_stopped(folder: StudyFolder) -> bool:
    """Whether somebody has asked the driver to stop; whoever looks is the one who is told."""
    if not folder.stop_request.exists():
        return False
    with contextlib.suppress(StorageError):  # the next driver forgets it
        forget_stop(folder)
    return True


def forget_stop(folder: StudyFolder) -> None:
    """Clear away what an earlier driver was asked and did not heed."""
    if folder.remote:
        store(folder.remote).remove([folder.name_of(folder.stop_request)])
    folder.stop_request.unlink(missing_ok=True)


def extend(folder: StudyFolder, amount: float, unit: str = "trials") -> str:
    """Ask for so much more of a unit of the budget; what will be, in a sentence."""
    spec = spec_of(folder)
    content = {unit: amount}
    before = expected(folder, spec)
    judged = _judge("extend", content, spec, [], before)
    if isinstance(judged, str):
        raise UserError(judged)
    _leave(folder, "extend", content)
    total = grown(spec, before).budget.given[unit] + amount
    return f"{_number(amount)} more {UNITS[unit]}, {_number(total)} in all; {_when(folder)}"


def amount_in_words(content: Mapping[str, Any]) -> str:
    """What an extension grants."""
    ((unit, amount),) = content.items()
    return f"{_number(amount)} {UNITS[unit]}"


def enqueue(
    folder: StudyFolder,
    settings: dict[str, Any],
    *,
    where: str = "",
    document: Document | None = None,
) -> str:
    """Ask for one arm, all its seeds, before the sampler's next one; what will be, in a sentence.

    `settings`: searched path -> what is to stand there, or a label of it; elsewhere the arm is the
    control. `where` and `document`: the file that the settings come from, for lines of mistakes.
    """
    spec = spec_of(folder)
    content = {"settings": settings}
    problems = Problems(where, document or Document(data=settings))
    suggestions, answers = read_suggestions(folder), expected(folder, spec)
    judged = _judge("enqueue", content, spec, suggestions, answers, problems)
    if isinstance(judged, str):
        raise UserError(judged)
    _leave(folder, "enqueue", content)
    return f"arm {judged['arm']}, {spec.seeds} trial(s), comes next; {_when(folder)}"


def settings_of(file: Path) -> tuple[dict[str, Any], Document]:
    """The settings of an arm in a file: a line `path: value` for each, paths dotted."""
    document = read_document(read_text(file, "a file of `path: value` lines"))
    if document.problems:
        raise UserError("\n".join(Problems(str(file), document).lines()))
    return document.data, document


def pending(folder: StudyFolder) -> list[Request]:
    """Requests that no driver has removed yet, the oldest first; never raises for a bad one."""
    try:
        names = sorted(name for name in os.listdir(folder.requests) if _NAME.fullmatch(name))
    except OSError:  # none yet, or a storage that is away for a moment: the next look sees them
        return []
    return [request for name in names if (request := _read(folder, name)) is not None]


def expected(folder: StudyFolder, spec: StudySpec) -> list[Answer]:
    """The answers of the ledger, and those that waiting requests will get."""
    answers = read_answers(folder)
    answered = {answer.request for answer in answers}
    waiting = [request for request in pending(folder) if request.name not in answered]
    suggestions = read_suggestions(folder) if waiting else []
    for request in waiting:
        answers.append(answer_to(request, spec, suggestions, answers))
    return answers


def answer_to(
    request: Request,
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    answers: Sequence[Answer],
) -> Answer:
    """What becomes of a request; `spec` is the study file, `answers` are the earlier ones."""
    judged: dict[str, Any] | str = request.problem
    if request.content is not None:
        judged = _judge(request.kind, request.content, spec, suggestions, answers)
    refused = judged if isinstance(judged, str) else None
    content = {} if isinstance(judged, str) else judged
    return Answer(len(answers), request.name, request.kind, content, refused)


def remove(folder: StudyFolder, request: Request) -> None:
    """Clear away an answered request; one that stays is known by its name."""
    path = folder.requests / request.name
    with contextlib.suppress(OSError):
        if folder.remote:
            store(folder.remote).remove([folder.name_of(path)])
        path.unlink(missing_ok=True)


def grown(spec: StudySpec, answers: Sequence[Answer]) -> StudySpec:
    """The study with the budget that extensions and enqueued arms, each with its seeds, make.

    What enqueued arms take of a budget in operations or hours, the search has less.
    """
    more: Counter[str] = Counter()
    for answer in answers:
        if answer.refused is None:
            more.update(answer.content if answer.kind == "extend" else {"trials": spec.seeds})
    total = {unit: amount + more[unit] for unit, amount in spec.budget.given.items()}
    return spec.model_copy(update={"budget": Budget.model_validate(total)})


def queue(answers: Sequence[Answer]) -> list[Enqueued]:
    """Arms that were granted, in their order."""
    return [
        Enqueued(
            TrialConfig.model_validate_json(json.dumps(answer.content["config"]), strict=True),
            answer.content["params"],
            answer.content["labels"],
        )
        for answer in answers
        if answer.kind == "enqueue" and answer.refused is None
    ]


def _judge(
    kind: str,
    content: dict[str, Any],
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    answers: Sequence[Answer],
    problems: Problems | None = None,
) -> dict[str, Any] | str:
    """What a request grants, as its answer keeps it; or, as a text, why it is refused."""
    if not spec.search:
        return f"{spec.study} has no `search`: its controls are all there is to run"
    if kind == "extend" and has_population(spec):
        return (
            f"{spec.study} trains a population, which has its size; begin another study with "
            f"another `seed` for another one"
        )
    if kind == "extend":
        return _judge_extension(content, spec)
    return _judge_arm(content, spec, suggestions, answers, problems)


def _judge_extension(content: dict[str, Any], spec: StudySpec) -> dict[str, Any] | str:
    unit: str = next(iter(content), "trials")
    amount: Any = content.get(unit)
    given = spec.budget.given
    if unit not in UNITS or len(content) != 1:
        return f"given {show(content)}; expected more of one of {listed(list(given))}"
    if unit not in given:
        ways = [f"maskstudy extend {spec.study} --{one.replace('_', '-')} N" for one in given]
        return (
            f"{unit}: the budget of {spec.study} is in {listed([UNITS[one] for one in given])}; "
            f"extend what ends it: {' or '.join(ways)}"
        )
    if unit != "trials":
        if type(amount) not in (int, float) or not 0 < amount < math.inf:
            return f"{unit}: given {show(amount)}; expected a number above 0"
        return {unit: amount}
    trials = amount
    if type(trials) is not int or not 1 <= trials <= MOST_TRIALS:
        return f"trials: given {show(trials)}; expected a whole number from 1 to {MOST_TRIALS:,}"
    return {"trials": trials}


def _judge_arm(
    content: dict[str, Any],
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    answers: Sequence[Answer],
    problems: Problems | None,
) -> dict[str, Any] | str:
    settings = content.get("settings")
    if not isinstance(settings, dict) or not settings:
        paths = listed(list(spec.search))
        return f"given {show(settings)}; expected a value for some of {paths}"
    problems = problems or Problems("", Document(data=settings))
    config = _config_of(settings, spec, problems)
    params = space.params_of(spec, config) if config is not None else None
    if config is not None and params is None:
        _say_what_lies_outside(settings, spec, config, problems)
    if config is None or params is None or problems.found:
        if problems.where:
            return "\n".join(problems.lines())
        found = [f"{'.'.join(map(str, path))}: {problem}" for _, path, problem in problems.found]
        return "\n".join(found) or "this arm lies outside `search`"
    arm = arm_id(config)
    for control in (spec.trial, *(spec.twin(name) for name in spec.controls)):
        if arm == arm_id(control):  # perhaps not begun yet
            return f"this arm ({arm}) is in the study already: a control"
    for suggestion in suggestions:
        if suggestion.arm == arm:
            what = f"trial {suggestion.trial}, {suggestion.origin}"
            return f"this arm ({arm}) is in the study already: {what}"
    if any(answer.content.get("arm") == arm for answer in answers if answer.refused is None):
        return f"this arm ({arm}) has been asked for already"
    return {
        "settings": settings,
        "arm": arm,
        "config": config.model_dump(mode="json"),
        "params": params,
        "labels": {path: params[path] for path in spec.search},
    }


def _config_of(settings: dict[str, Any], spec: StudySpec, problems: Problems) -> TrialConfig | None:
    """The control with these settings; None if they make no valid trial."""
    before = len(problems.found)
    known, parameters = list(spec.search), space.parameters(spec.search)
    trial: dict[str, Any] = spec.trial.model_dump(mode="json")
    for path in sorted(settings):  # what lies around comes before what lies within
        if not any(path == other or path.startswith(f"{other}.") for other in known):
            problems.add(
                (path,), f"not searched; expected one of {listed(known)}{near(path, known)}"
            )
            continue
        value = settings[path]
        item = spec.search.get(path)
        if item is not None and isinstance(item.choices, dict) and value in list(item.choices):
            if any(f"{name}.".startswith(f"{path}/{value}.") for name in parameters):
                problem = f"given {show(value)}, which holds ranges; expected what stands there"
                problems.add((path,), f"{problem}: {space.tree_in_words(item.choices[value])}")
                continue
            value = item.choices[value]
        try:
            space.set_at(trial, path.split("."), value)
        except (KeyError, TypeError):
            problems.add((path,), "the arm has no such setting")
    if len(problems.found) > before:
        return None
    try:
        return TrialConfig.model_validate_json(json.dumps(trial), strict=True)
    except ValidationError as error:
        for where, problem in explain(error, TrialConfig, trial):
            path = ".".join(map(str, where))
            given = next((one for one in known if f"{path}.".startswith(f"{one}.")), path)
            rest = path.removeprefix(given).lstrip(".")
            problems.add((given,), f"{rest}: {problem}" if rest else problem)
    except (TypeError, ValueError) as error:  # no JSON
        problems.add((next(iter(settings)),), f"given what is not JSON: {error}")
    return None


def _say_what_lies_outside(
    settings: dict[str, Any], spec: StudySpec, config: TrialConfig, problems: Problems
) -> None:
    for path, value in space.outside(spec, config).items():
        is_given = any(one == path or one.startswith(f"{path}.") for one in settings)
        given = f"given {show(value)}" if is_given else f"given nothing, so the trial's {value!r}"
        problems.add((path,), f"{given}; expected {space.in_words(spec.search[path])}")


def _leave(folder: StudyFolder, kind: str, content: dict[str, Any]) -> None:
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    raw = sealed(content)
    if len(raw) > MAX_BYTES:
        raise UserError(f"given {len(raw):,} bytes; expected at most {MAX_BYTES:,}")
    put_beside(folder, folder.requests / f"{now}-{kind}-{secrets.token_hex(4)}.json", raw)


def _read(folder: StudyFolder, name: str) -> Request | None:
    """A request as it lies there; None if it has gone or cannot be read just now."""
    match = _NAME.fullmatch(name)
    assert match
    try:
        # others may write here: no links to elsewhere, no pipes to wait at, no floods
        descriptor = os.open(folder.requests / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError:
        return None
    if len(raw) > MAX_BYTES:
        return Request(name, match[1], None, f"more than {MAX_BYTES:,} bytes")
    try:
        return Request(name, match[1], unsealed(raw))
    except ValueError as error:
        return Request(name, match[1], None, str(error))


def _number(amount: float) -> str:
    return f"{amount:.3g}" if amount >= MOST_TRIALS * 1000 else f"{amount:.10g}"


def _when(folder: StudyFolder) -> str:
    if is_held(folder):
        return "its driver heeds it at its next decision"
    return f"to go on: maskstudy resume {folder.in_commands}"
