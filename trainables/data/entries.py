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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trainables.config import Strict
from trainables.data.source import refuse
from trainables.errors import FileError, UserError

Word = Literal["image", "mask", "split", "group", "instances"]

# Options that every source of files has
Folder = Annotated[
    str | None, Field(description="folder with images/ and masks/ of the same stems")
]
Layout = Annotated[
    Literal["folders", "nnunet"],
    Field(description="nnunet: imagesTr/NAME_0000…, a file a channel, and labelsTr/NAME"),
]
ImageFolder = Annotated[str, Field(description="folder of the images within `folder`; . is itself")]
MaskFolder = Annotated[str, Field(description="folder of the masks within `folder`; . is itself")]
ImageSuffix = Annotated[
    str,
    Field(description="what the stems of images end in, and those of masks do not, such as _ct"),
]
MaskSuffix = Annotated[
    str, Field(description="what the stem of a mask has behind that of its image, such as _mask")
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
DEFAULT_MASKS = "masks"
INSTANCES = "instances"  # folder, and column, of numbers of objects
CLASSES_FILE = "classes.json"
NNUNET_IMAGES, NNUNET_MASKS, NNUNET_FILE = "imagesTr", "labelsTr", "dataset.json"
CHANNEL = re.compile(r"_(\d{4})$")  # of nnU-Net, behind the stem
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
class Places:
    """Where the settings of a source say that its files are: a manifest, or a folder."""

    root: Path  # from which they count
    manifest: str | None
    folder: str | None
    where: Mapping[str, str | int]
    columns: Mapping[Word, str]
    layout: Literal["folders", "nnunet"] = "folders"
    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""
    image_suffix: str = ""

    @property
    def base(self) -> Path:
        """The data folder."""
        if self.manifest is not None:
            return (self.root / self.manifest).parent
        return self.root / str(self.folder)


def places_of(root: Path, options: Mapping[str, Any]) -> Places:
    """Where the options of a source say that its files are."""
    return Places(
        root,
        options.get("manifest"),
        options.get("folder"),
        options.get("where") or {},
        options.get("columns") or {},
        options.get("layout", "folders"),
        options.get("image_folder", "images"),
        options.get("mask_folder", "masks"),
        options.get("mask_suffix", ""),
        options.get("image_suffix", ""),
    )


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
    places: Places, suffixes: Sequence[str], separator: str | None = None
) -> tuple[str, list[Entry], list[str]]:
    """(name of the data, entries, notes for people).

    With a separator a cell of the column image may name several files, which are its channels.
    """
    if (places.manifest is None) == (places.folder is None):
        raise UserError(
            "data: give either manifest (a CSV file) or folder (with images/ and masks/)"
        )
    if places.manifest is not None:
        path = places.root / places.manifest
        chosen = "".join(f" {key}={value}" for key, value in places.where.items())
        entries = read_manifest(path, places.where, places.columns, separator)
        return path.stem + chosen, entries, _notes_of_masks(entries)
    if places.where or places.columns:
        raise UserError("data: where and columns choose from a manifest; leave them out")
    entries, notes = read_folder(places, suffixes)
    return places.base.resolve().name, entries, notes


def read_manifest(
    path: Path,
    where: Mapping[str, str | int],
    columns: Mapping[Word, str],
    separator: str | None,
) -> list[Entry]:
    """The rows of a CSV whose columns have the values of `where`."""
    text = text_of(path)
    try:
        reader = csv.DictReader(
            io.StringIO(text, newline=""), delimiter=delimiter_of(text), strict=True
        )
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
    column[INSTANCES] = columns.get("instances", INSTANCES)
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


def read_folder(places: Places, suffixes: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """Images of a folder, with the masks and instances of the same name; notes for people.

    Sub-folders are read too: what is in one of them is a group.
    """
    base, is_nnunet = places.base, places.layout == "nnunet"
    if places.masks != DEFAULT_MASKS and not is_nnunet and not (base / places.masks).is_dir():
        raise UserError(
            f"data.mask_folder: there is no folder {base / places.masks}; there "
            f"{_listed_folders(base)}"
        )
    of_images, of_masks = (
        (NNUNET_IMAGES, NNUNET_MASKS) if is_nnunet else (places.images, places.masks)
    )
    folders = [base / name for name in (of_images, of_masks, INSTANCES)]
    (images, notes), (masks, of_mask_files), (instances, of_instances) = (
        _by_stem(folder, suffixes, [other for other in folders if other != folder])
        for folder in folders
    )
    is_apart = folders[0] != folders[1]
    if places.mask_suffix:
        if not is_apart:
            images = {k: v for k, v in images.items() if not k.endswith(places.mask_suffix)}
        masks, others = _ending(masks, places.mask_suffix)
        if not masks and others:
            raise UserError(
                f"data.mask_suffix: no file in {folders[1]} is called NAME{places.mask_suffix}; "
                f"there is {min(others)}{others[min(others)].suffix}"
            )
        notes += _left_out(others, folders[1], places.mask_suffix) if is_apart else []
    if places.image_suffix:
        images, others = _ending(images, places.image_suffix)
        notes += _left_out(others, folders[0], places.image_suffix) if is_apart else []
    if is_apart:
        notes += of_mask_files
    if not images:
        raise UserError(
            f"data.folder: {folders[0]} holds no file that ends in {', '.join(suffixes)}; "
            f"expected a folder with images/ and, for labelled images, masks/, or the settings "
            f"image_folder, mask_folder and mask_suffix that say where they are"
        )
    several = _channels(images) if is_nnunet else {stem: [path] for stem, path in images.items()}
    refuse(
        [
            f"{path.relative_to(base)} has no image; expected "
            f"{(Path(of_images) / stem).as_posix()}{suffixes[0]} or the like"
            for found in (masks, instances)
            for stem, path in found.items()
            if stem not in several
        ]
    )
    entries = [
        Entry(
            name=paths[0].relative_to(base).as_posix(),
            line="",
            image=paths[0],
            mask=masks.get(stem),
            instances=instances.get(stem),
            split=None,
            group=stem.rpartition("/")[0] or None,
            more=tuple(paths[1:]),
        )
        for stem, paths in several.items()
    ]
    if is_apart and not is_nnunet:
        notes += _unread_folders(folders, base, suffixes, has_masks=bool(masks))
    return entries, notes + of_instances


def _ending(files: dict[str, Path], suffix: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """(files whose stems end so, by their stems without it; the others)."""
    found = {k.removesuffix(suffix): path for k, path in files.items() if k.endswith(suffix)}
    return found, {k: path for k, path in files.items() if not k.endswith(suffix)}


def _left_out(others: dict[str, Path], folder: Path, suffix: str) -> list[str]:
    count = len(others)
    return [f"{count} files in {folder.name}/ are not called NAME{suffix}: not read"] * (count > 0)


def _listed_folders(base: Path) -> str:
    names = sorted(one.name for one in base.iterdir() if one.is_dir()) if base.is_dir() else []
    shown = ", ".join(f"{name}/" for name in names[:8]) + ", …" * (len(names) > 8)
    return f"are {shown}" if names else "is none"


def _unread_folders(
    folders: Sequence[Path], base: Path, suffixes: Sequence[str], *, has_masks: bool
) -> list[str]:
    """Folders beside those of images and masks that hold pictures as well."""
    notes = []
    for other in sorted(base.iterdir()):
        is_read = any(other == one or other in one.parents for one in folders)
        if is_read or not other.is_dir() or other.name.startswith("."):
            continue
        count = sum(name.lower().endswith(tuple(suffixes)) for name in _files_below(other, set()))
        if count:
            hint = "" if has_masks else f"; if they are masks, set mask_folder: {other.name}"
            notes.append(f"{count} files in {other.name}/ are not read{hint}")
    return notes


def _channels(images: dict[str, Path]) -> dict[str, list[Path]]:
    """The files of each image, whose stems end in the number of a channel (nnU-Net)."""
    several: dict[str, list[Path]] = defaultdict(list)
    for stem, path in images.items():  # in alphabetical order
        number = CHANNEL.search(stem)
        if number is None or int(number[1]) != len(several[stem[: number.start()]]):
            raise UserError(
                f"data.folder: {path} is not called like a channel; expected NAME_0000, NAME_0001, "
                f"and so on, without a gap, as nnU-Net has them"
            )
        several[stem[: number.start()]].append(path)
    return several


def paths_read(root: Path, options: Mapping[str, Any], separator: str | None = None) -> list[Path]:
    """Every file on which reading the data depends, or would if it were there; none is opened.

    Only the manifest is, to know what it names. UserError: it cannot be read.
    """
    places = places_of(root, options)
    if places.manifest is None:
        names = (NNUNET_IMAGES, NNUNET_MASKS, places.images, places.masks, INSTANCES)
        found = [places.base / NNUNET_FILE, places.base / CLASSES_FILE]
        for folder in sorted({os.path.normpath(places.base / name) for name in names}):
            found += [Path(place, name) for place, _, inside in os.walk(folder) for name in inside]
        return found
    path = places.root / places.manifest
    entries = read_manifest(path, places.where, places.columns, separator)
    above = {folder for entry in entries for folder in entry.image.parents}
    found = [path, *(folder / CLASSES_FILE for folder in sorted(above))]
    for entry in entries:
        named = (entry.image, *entry.more, entry.mask, entry.instances)
        found += [file for file in named if file is not None]
    return found


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
    grouped: list[Entry] = []
    problems: list[str | UserError] = []
    for entry in entries:
        group = entry.group or entry.name
        if regex and not entry.group:
            match = regex.search(entry.image.stem)
            if match is None:
                problems.append(
                    FileError(
                        f"{entry.name}{entry.line}",
                        f"has no group: the pattern {pattern!r} does not match its name; expected "
                        f"one that matches every name, such as '^([^_]+)_'",
                    )
                )
            else:
                group = match.group(1) if regex.groups else match.group(0)
        grouped.append(replace(entry, group=group))
    refuse(problems)
    return grouped


def named_classes(
    entries: Sequence[Entry], places: Places
) -> tuple[list[str] | dict[int | str, str] | None, list[str]]:
    """(names by value, those of small classes), from the nearest classes.json.

    It lies at or above the images, up to the data folder; nnU-Net's are in dataset.json.
    """
    if places.layout == "nnunet":
        return _nnunet_classes(places.base / NNUNET_FILE), []
    folder = Path(os.path.commonpath([os.path.normpath(entry.image.parent) for entry in entries]))
    top = Path(os.path.normpath(places.base))
    while not (folder / CLASSES_FILE).is_file():
        if folder == top or top not in folder.parents:
            return None, []
        folder = folder.parent
    path = folder / CLASSES_FILE
    try:
        content = json.loads(path.read_text())
        named = content["classes"]
        if isinstance(named, list):
            named = dict(enumerate(named))
        named = dict(sorted((int(value), name) for value, name in named.items()))
        small = [named[value] for value in content.get("small_classes", [])]
        if not all(isinstance(name, str) for name in named.values()) or (named and 0 not in named):
            raise TypeError("names must be texts, the background's that of 0")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"data: {path} cannot be used ({error!r}); expected "
            f'{{"classes": {{"0": "background", "1": "name"}}, "small_classes": [1]}}'
        ) from error
    return named or None, small


def _nnunet_classes(path: Path) -> dict[int | str, str] | None:
    """The labels of a dataset.json, name: value (version 2) or value: name (version 1)."""
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text())["labels"]
        by_value = all(str(key).lstrip("-").isdigit() for key in labels)
        pairs = labels.items() if by_value else ((value, name) for name, value in labels.items())
        return {int(value): str(name) for value, name in sorted(pairs, key=lambda p: int(p[0]))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data: the labels in {path} cannot be used ({error!r}); expected "
            f'"labels": {{"background": 0, "core": 1}}; or name them: classes: {{0: background}}'
        ) from error


def _by_stem(
    folder: Path, suffixes: Sequence[str], elsewhere: Sequence[Path]
) -> tuple[dict[str, Path], list[str]]:
    """(files by their path in the folder without suffix, in order; what is not read and why).

    What lies in a folder `elsewhere` belongs there. Hidden files are passed over. Names are
    compared in one Unicode form: a Mac writes another.
    """
    if not folder.is_dir():
        return {}, []
    found: dict[str, Path] = {}
    unread: Counter[str] = Counter()
    not_here = {str(other.relative_to(folder)) for other in elsewhere if folder in other.parents}
    for written in sorted(_files_below(folder, not_here), key=lambda one: one.split("/")):
        name = unicodedata.normalize("NFC", written)
        suffix = next((end for end in suffixes if name.lower().endswith(end)), None)
        if suffix is None:
            unread[Path(name).suffix.lower() or "no suffix"] += 1
            continue
        stem = name[: -len(suffix)]
        if stem in found:
            raise UserError(f"data: {folder / written} and {found[stem].name} have the same stem")
        found[stem] = folder / written
    if not unread:
        return found, []
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(unread.items()))
    return found, [
        f"{unread.total()} files in {folder.name}/ are not read ({kinds}); expected "
        f"{', '.join(suffixes)}"
    ]


def _files_below(folder: Path, not_here: set[str], below: str = "") -> Iterator[str]:
    """Files, by their path from the folder on, but for hidden ones and folders not to look into.

    Links are followed to files and not to folders, which might lead in circles.
    """
    with os.scandir(folder / below) as found:
        for one in found:
            if one.name.startswith("."):
                continue
            name = f"{below}/{one.name}" if below else one.name
            if not one.is_dir():
                yield name
            elif not one.is_symlink() and name not in not_here:
                yield from _files_below(folder, not_here, name)


def text_of(manifest: Path) -> str:
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
            f"data.manifest: {manifest} is not a CSV file in UTF-8: {error}; save it as CSV UTF-8, "
            f"as spreadsheets call it"
        ) from error


def delimiter_of(text: str) -> str:
    """What separates the values of a table: what its head has most of, of equals the comma."""
    return max(DELIMITERS, key=text.partition("\n")[0].count)


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
