"""Which files belong to a data set, and to which split: a manifest (CSV) or a folder.

Splits go by group (patient, slide, field); a group in two splits is an error.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainables.config import Strict
from trainables.data.source import refuse
from trainables.errors import UserError

Word = Literal["image", "mask", "split", "group", "instances"]

# Options that every source of files has
Folder = Annotated[
    str | None, Field(description="folder with images/ and masks/ of the same stems")
]
Where = Annotated[
    dict[str, str | int] | None,
    Field(description="column of the manifest: value that its rows must have"),
]
Columns = Annotated[
    dict[Word, str] | None,
    Field(description="our word: the name of that column in the manifest"),
]
GroupPattern = Annotated[
    str | None, Field(description="regular expression on file stems, where the group is blank")
]
AllowOutside = Annotated[bool, Field(description="read files that are not below the data folder")]

SPLITS = ("train", "val", "test", "pretrain")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


class Shares(Strict):
    """Shares of the groups that become validation and test where the files name no split."""

    val: Annotated[float, Field(ge=0, lt=1)] = 0.15
    test: Annotated[float, Field(ge=0, lt=1)] = 0.15
    seed: int = 0


DEFAULT_SHARES = Shares()


@dataclass(frozen=True)
class Entry:
    """One image as the manifest or the folder names it."""

    name: str  # of the file, from the data folder on
    line: str  # " (manifest.csv line 3)" or ""
    image: Path
    mask: Path | None
    instances: Path | None
    split: str | None
    group: str | None
    more: tuple[Path, ...] = ()  # further files of the same image: a channel each


def read_entries(
    root: Path,
    manifest: str | None,
    folder: str | None,
    where: dict[str, str | int],
    columns: dict[Word, str],
    suffixes: Sequence[str] = SUFFIXES,
    separator: str | None = None,
) -> tuple[str, Path, list[Entry]]:
    """(name of the data, their folder, entries), from a manifest or from a folder of `root`."""
    if (manifest is None) == (folder is None):
        raise UserError(
            "data: give either manifest (a CSV file) or folder (with images/ and masks/)"
        )
    if manifest is not None:
        path = root / manifest
        chosen = "".join(f" {key}={value}" for key, value in where.items())
        return path.stem + chosen, path.parent, read_manifest(path, where, columns, separator)
    if where or columns:
        raise UserError("data: where and columns choose from a manifest; leave them out")
    base = root / str(folder)
    return base.resolve().name, base, read_folder(base, suffixes)


def read_manifest(
    path: Path,
    where: dict[str, str | int],
    columns: dict[Word, str],
    separator: str | None = None,
) -> list[Entry]:
    """The rows of a CSV whose columns have the values of `where`.

    With a separator a cell of the column image may name several files, which are its channels.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            lines = [(row, reader.line_num) for row in reader]
            header = list(reader.fieldnames or [])
    except OSError as error:
        raise UserError(f"data.manifest: cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"data.manifest: {path} is not a CSV file in UTF-8: {error}") from error
    column = {word: columns.get(word, word) for word in ("image", "mask", "split", "group")}
    column["instances"] = columns.get("instances", "instances")
    needed = {"image": column["image"], "mask": column["mask"], **columns}
    missing = [name for name in [*needed.values(), *where] if name not in header]
    if missing:
        raise UserError(
            f"data.manifest: {path.name} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, header))}; `columns: {{mask: NAME}}` maps other names"
        )
    for name in header:  # a column 'groups' that nobody reads would be a leak
        if name not in column.values() and name.lower().rstrip("s") in column.values():
            raise UserError(
                f"data.manifest: {path.name} has a column {name!r}; did you mean "
                f"{name.lower().rstrip('s')!r}?"
            )
    entries, problems = [], []
    for row, number in lines:
        if None in row or None in row.values():
            problems.append(f"{path.name} line {number}: expected {len(header)} values")
            continue
        if any(row[key].strip() != str(value) for key, value in where.items()):
            continue
        cell = {word: row.get(name, "").strip() or None for word, name in column.items()}
        if cell["image"] is None:
            problems.append(f"{path.name} line {number}: the column {column['image']!r} is blank")
            continue
        if cell["split"] not in (None, *SPLITS):
            problems.append(
                f"{path.name} line {number}: unknown split {cell['split']!r}; expected one of "
                f"{', '.join(SPLITS)}, or blank"
            )
        first, *more = cell["image"].split(separator) if separator else [cell["image"]]
        if not all(word.strip() for word in (first, *more)):
            problems.append(
                f"{path.name} line {number}: image: a name is blank in {cell['image']!r}"
            )
            continue
        entries.append(
            Entry(
                name=first.strip(),
                line=f" ({path.name} line {number})",
                image=path.parent / first.strip(),
                more=tuple(path.parent / other.strip() for other in more),
                mask=path.parent / cell["mask"] if cell["mask"] else None,
                instances=path.parent / cell["instances"] if cell["instances"] else None,
                split=cell["split"],
                group=cell["group"],
            )
        )
    refuse(problems)
    if not entries:
        chosen = ", ".join(f"{key}={value}" for key, value in where.items())
        present = "; ".join(
            f"{key} has {', '.join(sorted({row[key] for row, _ in lines})[:10])}" for key in where
        )
        what = f"no row with {chosen} ({present})" if where and lines else "no rows"
        raise UserError(f"data.manifest: {path} has {what}")
    return entries


def read_folder(base: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Entry]:
    """Files of images/, with the files of the same stem in masks/ and instances/."""
    found = {kind: _by_stem(base / kind, suffixes) for kind in ("images", "masks", "instances")}
    if not found["images"]:
        raise UserError(
            f"data.folder: {base / 'images'} holds no file that ends in {', '.join(suffixes)}; "
            f"expected a folder with images/ and, for labelled images, masks/"
        )
    refuse(
        [
            f"{kind}/{path.name} has no image; expected images/{stem}{suffixes[0]} or the like"
            for kind in ("masks", "instances")
            for stem, path in found[kind].items()
            if stem not in found["images"]
        ]
    )
    return [
        Entry(
            name=f"images/{path.name}",
            line="",
            image=path,
            mask=found["masks"].get(stem),
            instances=found["instances"].get(stem),
            split=None,
            group=None,
        )
        for stem, path in found["images"].items()
    ]


def split_by_group(
    entries: Sequence[Entry], shares: Shares
) -> tuple[list[Entry], list[str], list[str]]:
    """Entries that all have a split; notes for people; groups that are in two splits."""
    named: dict[str, dict[str, Entry]] = defaultdict(dict)  # group -> split -> first entry
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[str(entry.group)].append(entry)
        if entry.split:
            named[str(entry.group)].setdefault(entry.split, entry)
    leaks = []
    for group, firsts in named.items():
        if len({"train" if split == "pretrain" else split for split in firsts}) > 1:
            places = " and ".join(f"{e.name}{e.line} in {split}" for split, e in firsts.items())
            leaks.append(f"group {group!r} is in two splits: {places}; a group belongs to one")
    is_labelled = any(entry.mask for entry in entries)
    chosen = {group: min(firsts, key=SPLITS.index) for group, firsts in named.items()}
    drawn = []
    for group, members in groups.items():
        if group in chosen:
            continue
        if is_labelled and not any(entry.mask for entry in members):
            chosen[group] = "pretrain"
        else:
            drawn.append(group)
    drawn.sort(key=lambda group: hashlib.sha256(f"{shares.seed}:{group}".encode()).digest())
    counts = {
        split: max(1, round(share * len(drawn))) if share and drawn else 0
        for split, share in (("val", shares.val), ("test", shares.test))
    }
    if drawn and sum(counts.values()) >= len(drawn):
        raise UserError(
            f"data.split: {len(drawn)} groups cannot be shared out to train, val "
            f"{shares.val} and test {shares.test}; give a split column, or smaller shares"
        )
    words = ["val"] * counts["val"] + ["test"] * counts["test"]
    chosen |= dict(itertools.zip_longest(drawn, words, fillvalue="train"))
    notes = []
    if drawn:
        notes.append(f"{len(drawn)} groups without a split were shared out (seed {shares.seed})")
    decided = []
    for entry in entries:
        split = entry.split or chosen[str(entry.group)]
        if split == "train" and entry.mask is None:
            split = "pretrain"
        decided.append(replace(entry, split=split))
    return decided, notes, leaks


def with_groups(entries: Iterable[Entry], pattern: str | None) -> list[Entry]:
    """Entries that all have a group: their own, what the pattern finds in the stem, or the file."""
    try:
        regex = re.compile(pattern) if pattern else None
    except re.error as error:
        raise UserError(f"data.group: {pattern!r} is not a regular expression: {error}") from error
    grouped, problems = [], []
    for entry in entries:
        group = entry.group or entry.name
        if regex and not entry.group:
            match = regex.search(entry.image.stem)
            if match is None:
                problems.append(f"{entry.name}{entry.line}: group: {pattern!r} does not match")
            else:
                group = match.group(1) if regex.groups else match.group(0)
        grouped.append(replace(entry, group=group))
    refuse(problems)
    return grouped


def named_classes(entries: Sequence[Entry], base: Path) -> tuple[list[str] | None, list[str]]:
    """Names from the nearest classes.json at or above the images, up to the data folder."""
    folder = Path(os.path.commonpath([os.path.normpath(entry.image.parent) for entry in entries]))
    top = Path(os.path.normpath(base))
    while not (folder / "classes.json").is_file():
        if folder == top or top not in folder.parents:
            return None, []
        folder = folder.parent
    path = folder / "classes.json"
    try:
        content = json.loads(path.read_text())
        named = content["classes"]
        if isinstance(named, dict):
            named = [named[str(index)] for index in range(len(named))]
        small = [named[index] for index in content.get("small_classes", [])]
        if not all(isinstance(name, str) for name in named):
            raise TypeError("names must be texts")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"data: {path} cannot be used ({error!r}); expected "
            f'{{"classes": {{"0": "background", "1": "name"}}, "small_classes": [1]}}'
        ) from error
    return named or None, small


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Image files of a folder by stem, in alphabetical order; hidden files are no images."""
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((end for end in suffixes if path.name.lower().endswith(end)), None)
        if suffix is None or path.name.startswith("."):
            continue
        stem = path.name[: -len(suffix)]
        if stem in found:
            raise UserError(f"data: {path} and {found[stem].name} have the same stem")
        found[stem] = path
    return found
