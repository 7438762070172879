"""Which files belong to a data set, and to which split: a manifest (CSV) or a folder.

Splits go by group (patient, slide, field); a group in two splits is an error.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
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
FOLDERS = ("images", "masks", "instances")
DELIMITERS = ",;\t"
MARKS = {  # byte order mark -> encoding
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Columns that name what must not be in two splits, if no other column says so
PEOPLE = ("patient", "subject", "case", "slide", "donor", "animal", "participant", "person")


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
    suffixes: Sequence[str],
    separator: str | None = None,
) -> tuple[str, Path, list[Entry], list[str]]:
    """(name of the data, their folder, entries, notes), from a manifest or a folder of `root`."""
    if (manifest is None) == (folder is None):
        raise UserError(
            "data: give either manifest (a CSV file) or folder (with images/ and masks/)"
        )
    if manifest is not None:
        path = root / manifest
        chosen = "".join(f" {key}={value}" for key, value in where.items())
        entries = read_manifest(path, where, columns, separator)
        return path.stem + chosen, path.parent, entries, _notes_of_masks(entries)
    if where or columns:
        raise UserError("data: where and columns choose from a manifest; leave them out")
    base = root / str(folder)
    entries, notes = read_folder(base, suffixes)
    return base.resolve().name, base, entries, notes


def read_manifest(
    path: Path,
    where: dict[str, str | int],
    columns: dict[Word, str],
    separator: str | None = None,
) -> list[Entry]:
    """The rows of a CSV whose columns have the values of `where`.

    With a separator a cell of the column image may name several files, which are its channels.
    """
    text = _text_of(path)
    first_line = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first_line.count)  # of equals the comma
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(row, reader.line_num) for row in reader]
        header = [name.strip() for name in reader.fieldnames or []]
    except csv.Error as error:
        raise UserError(f"data.manifest: {path} is not a CSV file in UTF-8: {error}") from error
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise UserError(
            f"data.manifest: {path.name} has {header.count(twice[0])} columns {twice[0]!r}; "
            f"expected one: rename or remove the others"
        )
    lines = [
        ({str(key).strip() if key else key: value for key, value in row.items()}, number)
        for row, number in lines
        if any(_filled(value) for value in row.values())  # spreadsheets end in rows of blanks
    ]
    column = {word: columns.get(word, word) for word in ("image", "mask", "split", "group")}
    column["instances"] = columns.get("instances", "instances")
    needed = {"image": column["image"], "mask": column["mask"], **columns}
    missing = [name for name in [*needed.values(), *where] if name not in header]
    if missing:
        raise UserError(
            f"data.manifest: {path.name} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, header))}; `columns: {{mask: NAME}}` maps other names"
        )
    _check_unread(path, header, column)
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
                image=_file(path.parent, first),
                more=tuple(_file(path.parent, other) for other in more),
                mask=_file(path.parent, cell["mask"]) if cell["mask"] else None,
                instances=_file(path.parent, cell["instances"]) if cell["instances"] else None,
                split=cell["split"],
                group=cell["group"],
            )
        )
    refuse([*problems, *_groups_alike(entries)])
    if not entries:
        chosen = ", ".join(f"{key}={value}" for key, value in where.items())
        present = "; ".join(
            f"{key} has {', '.join(sorted({row[key] for row, _ in lines})[:10])}" for key in where
        )
        what = f"no row with {chosen} ({present})" if where and lines else "no rows"
        raise UserError(f"data.manifest: {path} has {what}")
    return entries


def read_folder(base: Path, suffixes: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """Files of images/, with those of the same name in masks/ and instances/; notes for people.

    Sub-folders are read too: what is in one of them is a group.
    """
    found, notes = {}, []
    for kind in FOLDERS:
        found[kind], unread = _by_stem(base / kind, suffixes)
        notes += unread
    if not found["images"]:
        raise UserError(
            f"data.folder: {base / 'images'} holds no file that ends in {', '.join(suffixes)}; "
            f"expected a folder with images/ and, for labelled images, masks/"
        )
    refuse(
        [
            f"{path.relative_to(base)} has no image; expected images/{stem}{suffixes[0]} or the "
            f"like"
            for kind in ("masks", "instances")
            for stem, path in found[kind].items()
            if stem not in found["images"]
        ]
    )
    entries = [
        Entry(
            name=path.relative_to(base).as_posix(),
            line="",
            image=path,
            mask=found["masks"].get(stem),
            instances=found["instances"].get(stem),
            split=None,
            group=stem.rpartition("/")[0] or None,
        )
        for stem, path in found["images"].items()
    ]
    return entries, notes


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


def named_classes(
    entries: Sequence[Entry], base: Path
) -> tuple[list[str] | dict[int | str, str] | None, list[str]]:
    """(names by value, those of small classes), from the nearest classes.json.

    It lies at or above the images, up to the data folder.
    """
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
        if isinstance(named, list):
            named = dict(enumerate(named))
        named = dict(sorted((int(value), name) for value, name in named.items()))
        small = [named[value] for value in content.get("small_classes", [])]
        if not all(isinstance(name, str) for name in named.values()) or 0 not in named:
            raise TypeError("names must be texts, the background's that of 0")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"data: {path} cannot be used ({error!r}); expected "
            f'{{"classes": {{"0": "background", "1": "name"}}, "small_classes": [1]}}'
        ) from error
    return named or None, small


def _by_stem(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """(files by their path in the folder without suffix, in order; what is not read and why).

    Hidden files are passed over. Names are compared in one Unicode form: a Mac writes another.
    """
    if not folder.is_dir():
        return {}, []
    found: dict[str, Path] = {}
    unread: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        name = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
        if any(part.startswith(".") for part in name.split("/")) or path.is_dir():
            continue
        suffix = next((end for end in suffixes if name.lower().endswith(end)), None)
        if suffix is None:
            unread[path.suffix.lower() or "no suffix"] += 1
            continue
        stem = name[: -len(suffix)]
        if stem in found:
            raise UserError(f"data: {path} and {found[stem].name} have the same stem")
        found[stem] = path
    if not unread:
        return found, []
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(unread.items()))
    return found, [
        f"{unread.total()} files in {folder.name}/ are not read ({kinds}); expected "
        f"{', '.join(suffixes)}"
    ]


def _text_of(manifest: Path) -> str:
    """The text of a table, in UTF-8 or, if a mark says so, in UTF-16 as spreadsheets save it."""
    try:
        raw = manifest.read_bytes()
    except OSError as error:
        raise UserError(f"data.manifest: cannot read {manifest}: {error.strerror}") from error
    encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.manifest: {manifest} is not a CSV file in UTF-8: {error}; save it as UTF-8"
        ) from error


def _filled(value: str | list[str] | None) -> bool:
    return bool("".join(value).strip()) if isinstance(value, list) else bool((value or "").strip())


def _check_unread(path: Path, header: Sequence[str], column: dict[str, str]) -> None:
    """A column that nobody reads, although its name says that it keeps splits apart: a leak."""
    read = set(column.values())
    for name in header:
        singular = name.lower().rstrip("s")
        if name not in read and singular in read:
            raise UserError(
                f"data.manifest: {path.name} has a column {name!r}; did you mean {singular!r}?"
            )
    if column["group"] in header:
        return
    for name in header:
        if name not in read and name.lower().replace("_", " ").split(" ")[0] in PEOPLE:
            raise UserError(
                f"data.manifest: {path.name} has no column 'group', but a column {name!r}: if rows "
                f"that share it belong together, set `columns: {{group: {name}}}`; if each image "
                f"stands for itself, `columns: {{group: {column['image']}}}`"
            )


def _file(folder: Path, name: str) -> Path:
    """The file that a cell names, though it was written on another system."""
    name = name.strip()
    for spelling in (name, name.replace("\\", "/")):
        path = folder / spelling
        if path.exists():
            return path
        for form in ("NFC", "NFD"):
            other = folder / unicodedata.normalize(form, spelling)
            if other.exists():
                return other
    return folder / name


def _groups_alike(entries: Sequence[Entry]) -> list[str]:
    """Groups that are spelt in two ways would be kept apart, and leak from split to split."""
    spellings: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        if entry.group:
            spellings[_plain(entry.group)].setdefault(entry.group, entry)
    return [
        f"group {' and '.join(f'{group!r}{entry.line}' for group, entry in alike.items())}: the "
        f"same, spelt in {len(alike)} ways? Spell them alike, or make them differ clearly"
        for alike in spellings.values()
        if len(alike) > 1
    ]


def _plain(group: str) -> str:
    """A group without case, kinds of gap, and what spreadsheets do to numbers (07, 7.0)."""
    plain = re.sub(r"[\s_-]+", "-", unicodedata.normalize("NFKC", group).casefold())
    return re.sub(r"^0*(\d+)(\.0+)?$", r"\1", plain)


def _notes_of_masks(entries: Sequence[Entry]) -> list[str]:
    """Masks that several images have: a cell that was dragged down, perhaps."""
    of_mask: dict[Path, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.mask:
            of_mask[entry.mask].append(entry)
    shared = [(path, users) for path, users in of_mask.items() if len(users) > 1]
    if not shared:
        return []
    path, users = max(shared, key=lambda pair: len(pair[1]))
    return [
        f"{len(shared)} masks belong to several images, such as {path.name} to {len(users)}, from "
        f"{users[0].name}{users[0].line} on: is that meant?"
    ]
