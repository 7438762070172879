"""A study file becomes a study: every mistake in it at once, before anything starts.

And what a file changes of a study that was begun with another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError, create_model

from study import checks
from study.best import VERDICT
from study.environment import DEFAULTS
from study.folder import StudyFolder
from study.ledger import read_environment, read_spec, read_suggestions
from study.mistakes import Problems, explain, place
from study.reader import read_document, read_text, show
from study.spec import StudySpec
from trainables.config import Strict, TrialConfig, completed
from trainables.errors import UserError
from trainables.metrics import PSNR
from trainables.settings import flatten

# Of who says nothing of the trial and of what may vary in it
DEFAULT_SEARCH: dict[str, Any] = {"masking.ratio.value": {"low": 0.1, "high": 0.9}}


class Difference(NamedTuple):
    """One setting that two study files do not share."""

    path: str
    old: Any
    new: Any
    is_compatible: bool  # a study may go on with it

    def __str__(self) -> str:
        return f"{self.path}: {show(self.old)} -> {show(self.new)}"


def load_spec(path: Path) -> StudySpec:
    """The study that a file describes; a UserError lists every mistake in it.

    What the file does not say is what it was when the study began, if it has begun.
    """
    text = read_text(path, "a study file")
    spec = parse_spec(text, path.parent, where=str(path))
    defaults = defaults_of(spec.study_folder())
    if defaults == DEFAULTS:
        return spec
    return parse_spec(text, path.parent, where=str(path), defaults=defaults)


def defaults_of(folder: StudyFolder) -> str:
    """The release by whose defaults the study in a folder is read; today's if it has not begun."""
    return begun_by(read_environment(folder)) if folder.environment.exists() else DEFAULTS


def begun_by(environment: Mapping[str, Any]) -> str:
    """The release by whose defaults a study with such an environment.json is read."""
    return environment.get("defaults") or "0.1"


def parse_spec(text: str, folder: Path, *, where: str, defaults: str = DEFAULTS) -> StudySpec:
    """The study that a text describes; relative paths in it count from `folder`.

    `defaults`: the release whose defaults stand for what the text does not say.
    """
    document = read_document(text)
    problems = Problems(where, document)
    spec = None
    if isinstance(document.data, dict) and (document.data or not problems.found):
        if defaults == "0.1":
            trial, data = document.data.get("trial", {}), document.data.get("data")
            if isinstance(trial, dict):
                sections: dict[str, Any] = {section: {} for section in TrialConfig.model_fields}
                document.data["trial"] = completed(sections | trial)
            if isinstance(data, dict) and data.get("source") == "volumes":
                document.data["data"] = data | _percentiles_before_0_2(data)
            document.data |= _rungs_before_0_2(document.data.get("stopping"), document.data)
        spec = _check(document.data, problems)
    if problems.found or spec is None:
        raise UserError("\n".join(problems.lines()))
    spec._folder, spec._text, spec._where = folder, text, where
    return spec


def _percentiles_before_0_2(data: dict[str, Any]) -> dict[str, Any]:
    """What 0.1 did with intensities of volumes of which nothing was said."""
    is_said = data.get("window") is not None or data.get("percentiles") is not None
    return {} if is_said else {"percentiles": [0.5, 99.5]}


def _rungs_before_0_2(stopping: Any, study: Mapping[str, Any]) -> dict[str, Any]:
    """When 0.1 stopped whom, of which nothing is said."""
    found: dict[str, Any] = {} if "rungs" in study else {"rungs": [0.25, 0.5, 1.0]}
    given = {"name": stopping} if isinstance(stopping, str) else stopping
    if isinstance(given, dict) and given.get("name") == "halving":
        found["stopping"] = {"metric": PSNR, "reduction": 3, "min_trials": 6} | given
    return found


def spec_of(folder: StudyFolder) -> StudySpec:
    """The study in a folder, as it was begun."""
    text = read_spec(folder)
    if text is None:
        raise UserError(
            f"{folder.where}: no study has been begun there; start it: maskstudy run STUDY.yaml"
        )
    return parse_spec(
        text, folder.root, where=str(folder.spec), defaults=begun_by(read_environment(folder))
    )


def changes(folder: StudyFolder, spec: StudySpec) -> list[Difference]:
    """What a study file changes of the study as it was begun; UserError if that cannot go on."""
    begun = read_spec(folder)
    found = []
    if begun is not None and begun != spec.text:
        found = difference(begun, spec.text, defaults_of(folder))
    refused = [str(change) for change in found if not change.is_compatible]
    if any(change.path == "confirm.verdict" for change in found) and _is_judging(folder):
        refused.append(
            "confirm.verdict: its trials have begun, and more of them after a look are no fair test"
        )
    if refused:
        raise UserError(
            f"{folder.root.name} was begun with other settings:\n  "
            + "\n  ".join(refused)
            + "\ngive the changed study another name, or undo the change"
        )
    return found


def _is_judging(folder: StudyFolder) -> bool:
    return any(suggestion.origin == VERDICT for suggestion in read_suggestions(folder))


def difference(old_text: str, new_text: str, defaults: str = DEFAULTS) -> list[Difference]:
    """What a study that was begun with `old_text` would find changed in `new_text`.

    It can go on if every difference `is_compatible`: more of a unit of `budget`, or another
    `confirm`, `resources`, `storage`, `question` or `log`.
    """
    old, new = (
        flatten(
            parse_spec(text, Path(), where=where, defaults=defaults).model_dump(
                mode="json", by_alias=True
            )
        )
        for text, where in ((old_text, "the study as it was begun"), (new_text, "the study file"))
    )
    found = []
    for path in sorted(old.keys() | new.keys()):
        before: Any = old.get(path)
        after: Any = new.get(path)
        if before != after or (path in old) != (path in new):
            is_free = path.split(".")[0] in ("confirm", "resources", "storage", "question", "log")
            is_both = before is not None and after is not None
            is_more = path.startswith("budget.") and is_both and float(after) > float(before)
            found.append(Difference(path, before, after, is_free or is_more))
    return found


def _check(data: dict[str, Any], problems: Problems) -> StudySpec | None:
    """The spec if it is sound; else as many problems as can be seen, whatever else is wrong."""
    spec: Any = None  # a StudySpec, or its sound part: a model made for this file alone
    if not data.keys() & {"trial", "search"}:
        data |= {"search": DEFAULT_SEARCH}
    try:
        spec = StudySpec.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        wrong = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
        for path, problem in explain(error, StudySpec, data):
            problems.add(path, problem)
        spec = _sound_part(data, wrong)
        if "trial" in wrong:
            spec = spec.model_copy(update={"trial": _sound_trial(data.get("trial"))})
    checks.check_metrics(spec.objectives, spec.stopping, spec.sampler, spec.probe, problems)
    checks.check_sampler(spec.sampler, spec.objectives, spec.search, problems)
    trial, search, probe = spec.trial, spec.search, spec.probe
    if trial is not None and search is not None:
        before = len(problems.found)
        checks.check_search(trial, search, spec.sampler, problems)
        if len(problems.found) == before:
            unit = checks.check_together(trial, search, spec.data, spec.resources, probe, problems)
            if probe is not None:
                probe = probe.model_copy(update={"unit": unit})
                spec = spec.model_copy(update={"probe": probe})
    checks.check_budget(spec.budget, spec.controls, spec.seeds, problems)
    checks.check_population(spec, problems)
    return spec if isinstance(spec, StudySpec) else None


def _sound_trial(data: Any) -> TrialConfig | None:
    """The trial without the settings that are wrong, so that the search can be looked at."""
    trial = json.loads(json.dumps(data))
    while isinstance(trial, dict):
        try:
            return TrialConfig.model_validate_json(json.dumps(trial), strict=True)
        except ValidationError as error:
            detail = error.errors()[0]
            path = place(detail, trial)
            if detail["type"] == "missing":
                path = path[:-1]
            around: Any = trial
            for part in path[:-1]:
                around = around[part]
            if not path or not isinstance(around, dict):
                return None
            del around[path[-1]]
    return None


def _sound_part(data: dict[str, Any], wrong: set[str]) -> Any:
    """The spec with None for the top-level settings that are wrong."""
    fields: dict[str, Any] = {
        name: (Any, None) if name in wrong else (field.rebuild_annotation(), field)
        for name, field in StudySpec.model_fields.items()
    }
    part = {key: value for key, value in data.items() if key in fields and key not in wrong}
    model = create_model("SoundPart", __base__=Strict, **fields)
    return model.model_validate_json(json.dumps(part), strict=True)
