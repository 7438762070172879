"""Mistakes in a study file, in words: where, what was given, what is expected, a near miss."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from study.reader import Document, Where, describe, show

MOST_PER_PLACE = 5  # mistakes of one place that are listed


class Problems:
    """All mistakes of one file."""

    def __init__(self, where: str, document: Document) -> None:
        self.where = where
        self.document = document
        self.found = list(document.problems)

    def add(self, path: Where, problem: str) -> None:
        """One more, unless the place could not even be read."""
        entry = (self.document.lines.of(path), path, problem)
        is_unread = any(path[:length] in self.document.unread for length in range(len(path) + 1))
        if entry not in self.found and not is_unread:
            self.found.append(entry)

    def lines(self) -> list[str]:
        """One line for each, by line of the file; many of one place are cut short."""
        shown: dict[Where, int] = {}
        lines = []
        for line, path, problem in sorted(self.found, key=lambda entry: entry[0]):
            shown[path] = shown.get(path, 0) + 1
            if shown[path] <= MOST_PER_PLACE:
                lines.append(describe(self.where, line, path, problem))
            elif shown[path] == MOST_PER_PLACE + 1:
                lines.append(describe(self.where, line, path, "and more of the kind"))
        return lines


def explain(error: ValidationError, root: type[BaseModel], data: Any) -> list[tuple[Where, str]]:
    """Place and problem of each mistake; one for all members of a union that do not match."""
    found: dict[tuple[Where, str], list[str]] = {}
    for detail in error.errors():
        given, _, wanted = message(detail, root, data).partition("; expected ")
        found.setdefault((place(detail, data), given), []).append(wanted)
    return [
        (path, "; expected ".join(part for part in (given, " or ".join(wanted)) if part))
        for (path, given), wanted in found.items()
    ]


def place(detail: ErrorDetails, data: Any) -> Where:
    """pydantic's place of an error without the names of union members, which no file holds."""
    path: list[str | int] = []
    parts = list(detail["loc"])
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        if isinstance(data, dict) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif part == _name_in(data) and not (isinstance(data, dict) and is_last):
            continue
        elif not isinstance(data, dict) and detail["type"] != "missing":
            break  # the names of an untagged union's members
        else:
            data = None
        path.append(part)
    if detail["type"] == "union_tag_invalid" and isinstance(data, dict):
        path.append("source" if "source" in data else "name")
    return tuple(path)


def message(detail: ErrorDetails, root: type[BaseModel], data: Any) -> str:
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        path = place(detail, data)
        known = _known_keys(root, path[:-1], data)
        return f"unknown key; expected one of {listed(known)}{near(str(path[-1]), known)}"
    if kind == "missing":
        return "given nothing; expected this key, which has no default"
    if kind == "union_tag_invalid":
        names = re.findall(r"'([^']*)'", str(context["expected_tags"]))
        tag = str(context["tag"])
        return f"given {show(tag)}; expected one of {listed(names)}{near(tag, names)}"
    if kind == "union_tag_not_found":
        return f"given {show(given)}; expected a mapping with a name"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"given {show(given)}; expected {context['expected']}{near(str(given), names)}"
    if kind == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        known = _known_keys(root, place(detail, data), data)
        return f"given {show(given)}; expected a mapping with {listed(known) or 'keys'}"
    wanted = re.sub(r"^\w+ should (be|have) ", "", detail["msg"])
    return f"given {show(given)}; expected {wanted}"


def _known_keys(root: Any, path: Where, data: Any) -> list[str]:
    """The keys that a mapping at `path` may have."""
    kind = root
    for part in path:
        origin = typing.get_origin(kind)
        if origin in (dict, list, tuple):
            kind = typing.get_args(kind)[-1 if origin is dict else 0]
        else:
            fields = {
                field.alias or name: field.annotation
                for model in _models(kind, data)
                for name, field in model.model_fields.items()
            }
            kind = fields.get(str(part))
        data = data[part] if isinstance(data, dict) and part in data else None
    return [
        field.alias or name
        for model in _models(kind, data)
        for name, field in model.model_fields.items()
    ]


def _models(kind: Any, data: Any) -> list[type[BaseModel]]:
    """The models that a type stands for; of named ones the named, if it is known."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    if typing.get_origin(kind) is Annotated:
        return _models(typing.get_args(kind)[0], data)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        models = [model for member in typing.get_args(kind) for model in _models(member, data)]
        name = _name_in(data)
        same = [
            model
            for model in models
            if "name" in model.model_fields
            and name in typing.get_args(model.model_fields["name"].annotation)
        ]
        return same or models
    return []


def _name_in(data: Any) -> Any:
    return data.get("name", data.get("source")) if isinstance(data, dict) else data


def near(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close and close[0] != given else ""


def listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)
