"""YAML text -> plain data and the line of every path in it; and back. A strict part of YAML 1.2.

All study files come through here, a user's own as much as the frozen ones of begun studies, so that
what is reported is what was run.

Refused: text over 256 KiB, more than 10,000 values, nesting deeper than 20, anchors, aliases, merge
keys, tags, duplicate keys, several documents, numbers that are not finite. Scalars are those of
YAML 1.2's core schema: `1e-5` is a number, `on` and `12:30` are text, `0777` is 777. Keys are text.
Read from PyYAML's events, which it makes one at a time without recursion, so that a hostile file
costs no more than these limits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainables.errors import UserError

MAX_BYTES = 256 * 1024
MAX_VALUES = 10_000
MAX_DEPTH = 20
MAX_INTEGER = 2**63 - 1

Where = tuple[str | int, ...]  # the keys and the numbers of items that lead to a value

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BASES = {"0o": 8, "0x": 16}


class Lines(dict[Where, int]):
    """Line number (from 1) of the key or item at each path."""

    def of(self, path: Where) -> int:
        """The line of `path`, or of the nearest thing around it."""
        while path and path not in self:
            path = path[:-1]
        return self.get(path, 1)


@dataclass
class Document:
    """What could be read, and what is wrong with the rest: (line, path, what is wrong)."""

    data: Any = None
    lines: Lines = field(default_factory=Lines)
    problems: list[tuple[int, Where, str]] = field(default_factory=list)
    unread: set[Where] = field(default_factory=set)  # where None stands for what could not be read

    def refuse(self, event: yaml.Event, path: Where, problem: str) -> None:
        self.problems.append((_line(event), path, problem))


def read_text(path: Path, expected: str) -> str:
    """What a user's YAML file holds."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(describe(str(path), 1, (), _too_large(size)))
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:1: not text in UTF-8 ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], Lines]:
    """The mapping that `text` holds; a UserError names every problem with its line."""
    document = read_document(text)
    if document.problems:
        raise UserError("\n".join(describe(where, *problem) for problem in document.problems))
    return document.data, document.lines


def describe(where: str, line: int, path: Where, problem: str) -> str:
    """One line for the user."""
    name = ".".join(str(part) for part in path)
    if not name.isprintable():
        name = name.encode("unicode_escape").decode()
    return f"{where}:{line}: {name[:200]}: {problem}" if name else f"{where}:{line}: {problem}"


def read_document(text: str) -> Document:
    """All that can be read, with all problems; after a broken limit or bad syntax nothing is."""
    document = Document()
    events = _events(text)
    try:
        for event in events:
            if isinstance(event, yaml.NodeEvent):
                document.data = _value(event, events, (), document)
        if not document.problems and not isinstance(document.data, dict):
            raise _Unreadable(1, f"given {show(document.data)}; expected `key: value` lines")
    except _Unreadable as error:
        document.data = None
        document.problems.append((error.line, (), str(error)))
    if not isinstance(document.data, dict):
        document.data = {}
    return document


def show(value: Any) -> str:
    """A value as the user would write it, on one line and not too long."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Unreadable(Exception):
    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def _events(text: str) -> Iterator[yaml.Event]:
    """Those of PyYAML, as far as the limits go; an _Unreadable where they end before the text."""
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise _Unreadable(1, _too_large(size))
    num_documents = num_values = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            num_documents += isinstance(event, yaml.DocumentStartEvent)
            num_values += isinstance(event, yaml.NodeEvent)
            if num_documents > 1:
                problem = "a second document (`---`); expected one per file"
                raise _Unreadable(_line(event), problem)
            if num_values > MAX_VALUES:
                raise _Unreadable(_line(event), f"more than {MAX_VALUES:,} values")
            yield event
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"given the character {show(chr(error.character))}; expected printable text"
        raise _Unreadable(line, problem) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        raise _Unreadable(line, f"not YAML: {' '.join(reason.split())}") from None


def _value(event: yaml.Event, events: Iterator[yaml.Event], path: Where, document: Document) -> Any:
    """What begins with `event`, read to its end."""
    _refuse_references(event, path, document)
    if isinstance(event, yaml.AliasEvent):
        document.unread.add(path)
        return None
    if isinstance(event, yaml.ScalarEvent):
        if not _is_plain(event):
            return _text(event, path, document)
        try:
            return _plain_value(event.value)
        except ValueError as error:
            document.refuse(event, path, str(error))
            document.unread.add(path)
            return None
    if len(path) >= MAX_DEPTH:
        raise _Unreadable(_line(event), f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events, path, document)
    return _list(events, path, document)


def _mapping(events: Iterator[yaml.Event], path: Where, document: Document) -> dict[str, Any]:
    content: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _key(event, path, document)
        inside = (*path, key)
        if key in content:
            first = document.lines[inside]
            document.refuse(event, inside, f"given twice, first on line {first}; expected once")
        document.lines.setdefault(inside, _line(event))
        content[key] = _value(next(events), events, inside, document)
    return content


def _list(events: Iterator[yaml.Event], path: Where, document: Document) -> list[Any]:
    content: list[Any] = []
    while not isinstance(event := next(events), yaml.SequenceEndEvent):
        inside = (*path, len(content))
        document.lines[inside] = _line(event)
        content.append(_value(event, events, inside, document))
    return content


def _key(event: yaml.Event, around: Where, document: Document) -> str:
    """A key is text, whatever it looks like."""
    _refuse_references(event, around, document)
    if isinstance(event, yaml.AliasEvent):
        return f"*{event.anchor}"
    if not isinstance(event, yaml.ScalarEvent):
        raise _Unreadable(_line(event), "a list or a mapping as a key; expected a word")
    if event.value == "<<" and _is_plain(event):
        document.refuse(event, around, "a merge key (<<); write the content out")
    return _text(event, around, document)


def _refuse_references(event: yaml.Event, path: Where, document: Document) -> None:
    """Names of places elsewhere in the text, and of types."""
    if isinstance(event, yaml.AliasEvent):
        document.refuse(event, path, f"an alias (*{event.anchor}); write its content out")
    elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
        if event.anchor is not None:
            problem = f"an anchor (&{event.anchor}); write the content out at each place"
            document.refuse(event, path, problem)
        if event.tag is not None:
            document.refuse(event, path, f"a tag ({event.tag}); expected plain values")


def _is_plain(event: yaml.ScalarEvent) -> bool:
    """Neither quoted nor tagged, so that it may be something else than text."""
    return event.implicit[0] and event.style is None


def _text(event: yaml.ScalarEvent, path: Where, document: Document) -> str:
    if any("\ud800" <= character <= "\udfff" for character in event.value):
        document.refuse(event, path, "half a character (a surrogate); expected whole ones")
        return ""
    return event.value


def _plain_value(text: str) -> bool | int | float | str | None:
    """By the core schema of YAML 1.2."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.fullmatch(text):
        # Python refuses to read decimal numbers of thousands of digits
        number = int(text, _BASES.get(text[:2], 10)) if len(text) <= 24 else math.inf
        if abs(number) > MAX_INTEGER:
            raise ValueError(f"given {show(text)}; expected a number of at most 64 bits")
        return number
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        raise ValueError(f"given {show(text)}; expected a finite number")
    return text


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _too_large(size: int) -> str:
    return f"the file has {size:,} bytes; expected at most {MAX_BYTES:,}"


def written(content: Any) -> str:
    """Plain data as the text of a study file."""
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text


def in_one_line(value: Any) -> str:
    """A value as it may stand behind its key."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()
