"""`stop`, `extend` and `enqueue`: what people ask of a study, wherever its driver runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study import requests, space
from study.best import of_study
from study.commands.finding import find_study
from study.commands.terminal import say
from study.ledger import is_held, read_results, read_rows, read_suggestions
from study.loading import spec_of
from study.measured import measure
from study.mistakes import listed
from study.reader import read_yaml
from trainables.config import completed
from trainables.errors import UserError


def ask_to_stop(name: str, storage: str | None) -> None:
    """Ask the driver to stop."""
    folder = find_study(name, storage)
    say(requests.stop(folder) if is_held(folder) else f"{folder.root.name} is not running")


def ask_for_more(name: str, asked: dict[str, float | None], storage: str | None) -> None:
    """Ask for more of a unit of a study's budget, whether it runs or not."""
    given = {unit: amount for unit, amount in asked.items() if amount is not None}
    if len(given) != 1:
        options = listed([f"--{unit.replace('_', '-')}" for unit in asked])
        raise UserError(f"given {len(given)} amounts; expected one of {options}")
    ((unit, amount),) = given.items()
    say(requests.extend(find_study(name, storage), amount, unit))


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


def ask_for_best_of(name: str, other: str, num_arms: int, storage: str | None) -> None:
    """Ask for the best arms of another study, judged by this one's first objective."""
    folder, source = find_study(name, storage), find_study(other, storage)
    spec, objective = spec_of(folder), spec_of(folder).objectives[0]
    suggestions = read_suggestions(source)
    configs = {suggestion.arm: completed(suggestion.config) for suggestion in suggestions}
    measured = measure(read_rows(source))
    found = of_study(spec_of(source), suggestions, read_results(source), measured, objective)
    best = [one.arm for one in found if one.group == "search"][:num_arms]
    if not best:
        known = listed(sorted({name for metrics in measured.values() for name in metrics}))
        raise UserError(
            f"{source.root.name}: no searched arm is complete and measured {objective.metric}, by "
            f"which {folder.root.name} judges first; it measured {known or 'nothing yet'}"
        )
    refused = []
    for arm in best:
        try:
            settings = {path: space.get_at(configs[arm], path.split(".")) for path in spec.search}
            say(requests.enqueue(folder, settings))
        except KeyError as error:
            refused.append(f"arm {arm} of {source.root.name}: it has no setting {error}")
        except UserError as error:
            refused.append(f"arm {arm} of {source.root.name}: {error}")
    if refused:
        raise UserError("\n".join(refused))


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
