"""`stop`, `extend` and `enqueue`: what people ask of a study, wherever its driver runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study import requests
from study.commands.finding import find_study
from study.commands.terminal import say
from study.ledger import is_held
from study.reader import read_yaml
from trainables.errors import UserError


def ask_to_stop(name: str, storage: str | None) -> None:
    """Ask the driver to stop."""
    folder = find_study(name, storage)
    say(requests.stop(folder) if is_held(folder) else f"{folder.root.name} is not running")


def ask_for_trials(name: str, trials: int, storage: str | None) -> None:
    """Ask for more searched trials of a study, whether it runs or not."""
    say(requests.extend(find_study(name, storage), trials))


def ask_for_arm(name: str, given: list[str], file: Path | None, storage: str | None) -> None:
    """Ask for one arm of a study, whether it runs or not."""
    folder = find_study(name, storage)
    if file is None:
        say(requests.enqueue(folder, _settings(given)))
        return
    if given:
        raise UserError(f"given both --file and {given[0]!r}; expected one of them")
    settings, document = requests.settings_of(file)
    say(requests.enqueue(folder, settings, where=str(file), document=document))


def _settings(given: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for path, value in map(_setting, given):
        if path in settings:
            raise UserError(f"{path}: given twice; expected one value")
        settings[path] = value
    return settings


def _setting(given: str) -> tuple[str, Any]:
    """`path=value` of a command line; the value is written as in a study file."""
    path, separator, value = given.partition("=")
    if not separator or not path:
        raise UserError(f"given {given!r}; expected path=value, such as model.patch=8")
    return path, read_yaml(f"value: {value}", given)[0]["value"]
