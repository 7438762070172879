"""YAML text -> plain data and the line of every path in it. A small, strict part of YAML 1.2.

Refused: text over 256 KiB, more than 10,000 values, nesting deeper than 20, anchors, aliases, merge
keys, tags, duplicate keys, several documents, numbers that are not finite. Scalars are those of
YAML 1.2's core schema: `1e-5` is a number, `on` and `12:30` are text, `0777` is 777.
Read from PyYAML's events, which it makes one at a time without recursion, so that a hostile file
costs no more than these limits.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from trainables.errors import UserError

MAX_BYTES = 256 * 1024
MAX_VALUES = 10_000
MAX_DEPTH = 20
MAX_INTEGER = 2**63 - 1

Path = tuple[str | int, ...]

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BASES = {"0o": 8, "0x": 16}


class Lines(dict[Path, int]):
    """Line number (from 1) of the key or item at each path."""

    def of(self, path: Path) -> int:
        """The line of `path`, or of the nearest thing around it."""
        while path and path not in self:
            path = path[:-1]
        return self.get(path, 1)


@dataclass
class Document:
    """What could be read, and what is wrong with the rest: (line, path, what is wrong)."""

    data: Any = None
    lines: Lines = field(default_factory=Lines)
    problems: list[tuple[int, Path, str]] = field(default_factory=list)


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], Lines]:
    """The mapping that `text` holds; a UserError names every problem with its line."""
    document = read_document(text)
    if document.problems:
        raise UserError("\n".join(describe(where, *problem) for problem in document.problems))
    return document.data, document.lines


def describe(where: str, line: int, path: Path, problem: str) -> str:
    """One line for the user."""
    name = ".".join(str(part) for part in path)
    if not name.isprintable():
        name = name.encode("unicode_escape").decode()
    return f"{where}:{line}: {name[:200]}: {problem}" if name else f"{where}:{line}: {problem}"


def read_document(text: str) -> Document:
    """All that can be read, with all problems; after a broken limit or bad syntax nothing is."""
    document = Document()
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        problem = f"the file has {size:,} bytes; expected at most {MAX_BYTES:,}"
        document.problems.append((1, (), problem))
        return document
    try:
        _Builder(document).build(text)
        if not document.problems and not isinstance(document.data, dict):
            problem = f"given {show(document.data)}; expected `key: value` lines"
            document.problems.append((1, (), problem))
    except _Unreadable as error:
        document.data = None
        document.problems.append((error.line, (), str(error)))
    except yaml.reader.ReaderError as error:
        document.data = None
        line = text.count("\n", 0, error.position) + 1
        problem = f"given the character {show(chr(error.character))}; expected printable text"
        document.problems.append((line, (), problem))
    except yaml.MarkedYAMLError as error:
        document.data = None
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        document.problems.append((line, (), f"not YAML: {' '.join(reason.split())}"))
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


@dataclass
class _Open:
    """A mapping or a list whose end has not been read yet."""

    path: Path
    content: dict[str, Any] | list[Any]
    key: str | None = None  # of a mapping, when its value comes next


class _Builder:
    """Puts the events together; one per document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.open: list[_Open] = []
        self.num_values = 0
        self.num_documents = 0

    def build(self, text: str) -> None:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            if isinstance(event, yaml.DocumentStartEvent):
                self.num_documents += 1
                if self.num_documents > 1:
                    raise _Unreadable(line, "a second document (`---`); expected one per file")
            elif isinstance(event, yaml.AliasEvent):
                self.refuse(line, f"an alias (*{event.anchor}); write its content out")
                self.add(None, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                self.open.pop()
            elif isinstance(event, yaml.NodeEvent):
                self.start(event, line)

    def start(self, event: Any, line: int) -> None:
        if event.anchor is not None:
            self.refuse(line, f"an anchor (&{event.anchor}); write the content out at each place")
        if event.tag is not None:
            self.refuse(line, f"a tag ({event.tag}); expected plain values")
        if isinstance(event, yaml.ScalarEvent):
            is_key = self.expects_key()
            is_plain = event.implicit[0] and event.style is None
            value = event.value if is_key or not is_plain else self.scalar(event.value, line)
            if any("\ud800" <= character <= "\udfff" for character in event.value):
                self.refuse(line, "half a character (a surrogate); expected whole ones")
                value = ""
            if is_key and value == "<<" and is_plain:
                self.refuse(line, "a merge key (<<); write the content out")
            self.add(value, line)
            return
        if self.expects_key():
            raise _Unreadable(line, "a list or a mapping as a key; expected a word")
        if len(self.open) >= MAX_DEPTH:
            raise _Unreadable(line, f"nested deeper than {MAX_DEPTH} levels")
        content: dict[str, Any] | list[Any]
        content = {} if isinstance(event, yaml.MappingStartEvent) else []
        path = self.add(content, line)
        self.open.append(_Open(path, content))

    def expects_key(self) -> bool:
        return bool(
            self.open and isinstance(self.open[-1].content, dict) and self.open[-1].key is None
        )

    def add(self, value: Any, line: int) -> Path:
        """Put a value where the next one belongs, or keep it as the key of the one after it."""
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise _Unreadable(line, f"more than {MAX_VALUES:,} values")
        if not self.open:
            self.document.data = value
            return ()
        around = self.open[-1]
        if isinstance(around.content, list):
            path: Path = (*around.path, len(around.content))
            around.content.append(value)
            self.document.lines[path] = line
        elif around.key is None:
            around.key = str(value)
            path = (*around.path, around.key)
            if around.key in around.content:
                first = self.document.lines.of(path)
                self.refuse(line, f"given twice, first on line {first}; expected once", path)
            else:
                self.document.lines[path] = line
        else:
            path = (*around.path, around.key)
            around.content[around.key] = value
            around.key = None
        return path

    def scalar(self, text: str, line: int) -> Any:
        """A plain scalar by the core schema of YAML 1.2."""
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _INTEGER.fullmatch(text):
            base = _BASES.get(text[:2], 10)
            # Python refuses to read decimal numbers of thousands of digits
            value = int(text, base) if len(text) <= 24 else math.inf
            if abs(value) > MAX_INTEGER:
                self.refuse(line, f"given {show(text)}; expected a number of at most 64 bits")
            return value
        if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and math.isinf(float(text))):
            self.refuse(line, f"given {show(text)}; expected a finite number")
            return None
        return float(text) if _FLOAT.fullmatch(text) else text

    def refuse(self, line: int, problem: str, path: Path | None = None) -> None:
        if path is None and self.open:
            around = self.open[-1]
            path = around.path if around.key is None else (*around.path, around.key)
        self.document.problems.append((line, path or (), problem))
