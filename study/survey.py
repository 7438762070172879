"""What a folder of images holds, and how a study file would say it: for `init`.

Every guess is one of the data's settings, and comes with what it was guessed from.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainables.data import files, nifti
from trainables.data.entries import (
    NNUNET_IMAGES,
    NNUNET_MASKS,
    Entry,
    delimiter_of,
    named_classes,
    places_of,
    read_entries,
    text_of,
)
from trainables.data.images import (
    ColouredMaskError,
    look_like_numbers_of_objects,
    mask_values,
)
from trainables.data.labels import MAX_CLASSES, as_numbers, colours
from trainables.data.opened import read
from trainables.data.volumes import DEFAULT_MIB, SEPARATOR, in_ras
from trainables.errors import UserError

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "raw", "photos", "pictures", "scans")
MASK_FOLDERS = (
    "masks", "mask", "labels", "label", "segmentations", "segmentation", "annotations",
    "groundtruth", "ground_truth", "gt", "manual",
)  # fmt: skip
MASK_SUFFIXES = (
    "_mask", "_masks", "_seg", "_segmentation", "_label", "_labels", "_gt", "_cp_masks",
    "-mask", "-labels", ".mask",
)  # fmt: skip
COLUMNS = {
    "image": ("image", "images", "img", "file", "filename", "file_name", "path", "image_path"),
    "mask": ("mask", "masks", "label", "labels", "segmentation", "mask_path", "annotation"),
    "split": ("split", "set", "subset", "fold"),
    "group": ("group", "patient", "patient_id", "subject", "subject_id", "case", "slide"),
}  # fmt: skip
# Patterns of names whose first part may be what belongs together
GROUPS = (r"^(.+?)[_-](?:[A-Za-z]{0,6}\d+|tile.*|crop.*|field.*|f\d+.*)$", r"^([A-Za-z]+\d+)[_-]")
FEW = 0.1  # of the images may be smaller than a tile, and are padded
MOST_CHANNELS = 8  # of a fourth axis; longer ones are of time
BLACK, WHITE = 0x000000, 0xFFFFFF  # what backgrounds are painted in
SEPARATOR_IN_NAME = re.compile(r"[_\-. ]")
COMMON = 3  # one in so many files ends as masks do, where masks lie beside their images
MOST_SHADES = 1000  # different values or colours of a mask, objects counted
MANY = 10**9
LOSSY = (".jpg", ".jpeg")
SHARP = 0.9  # share of the pixels of smoothed masks that are near one of their two values
SHADES = 8  # that there are between them at least
BRIGHT = 200  # what the higher of them is at least
MOST_LOOKED_AT = 48  # files, spread over all
FEWEST_GROUPS = 4
MOST_BYTES = DEFAULT_MIB * 2**20  # of a volume in memory


class Seen(NamedTuple):
    """A picture or volume that was looked at."""

    shape: tuple[int, ...]
    channels: int
    bits: int
    has_alpha: bool
    spacing: tuple[float, ...] | None  # mm of a voxel
    is_stack: bool = False  # pages that nobody called channels


@dataclass
class Survey:
    """What was found; `data` are the settings that say so, `why` what each was guessed from."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    images: int = 0
    masks: int = 0
    seen: list[Seen] = field(default_factory=list)

    def guess(self, option: str, value: Any, reason: str) -> None:
        self.data[option], self.why[option] = value, reason

    @property
    def smallest(self) -> tuple[int, ...]:
        """The edge along each axis that all but a few of what was looked at have at least."""
        edges = np.quantile([one.shape for one in self.seen], FEW, axis=0, method="lower")
        return tuple(edges.astype(int).tolist())


def survey(folder: Path) -> Survey:
    """Look at a folder. UserError: nothing in it can be read as images."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of images")
    names = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder)]
    is_volumes = _are_volumes(names)
    suffixes = nifti.SUFFIXES if is_volumes else files.SUFFIXES
    pictures = [path for path in names if path.name.lower().endswith(suffixes)]
    if not pictures:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in names).most_common(5)
        there = ", ".join(f"{count} {kind}" for kind, count in kinds) or "nothing"
        raise UserError(
            f"{folder}: holds no image ({there}); expected files that end in "
            f"{', '.join(files.SUFFIXES)}"
        )
    found = Survey("volumes" if is_volumes else "images")
    _find_places(folder, pictures, suffixes, found)
    places = places_of(Path(), found.data)
    _, entries, _ = read_entries(places, suffixes, SEPARATOR if is_volumes else None)
    found.images, found.masks = len(entries), sum(entry.mask is not None for entry in entries)
    _find_groups(entries, found)
    looked_at = entries[:: max(1, len(entries) // MOST_LOOKED_AT)]
    found.seen = [_seen(entry, is_volumes) for entry in looked_at]
    if is_volumes:
        _find_fourth_axis(entries, found)
    else:
        _find_channels(found)
        _find_window(looked_at, found)
    masks = [entry for entry in entries if entry.mask]
    if masks and named_classes(entries, places)[0] is None:
        _find_encoding(masks[:: max(1, len(masks) // MOST_LOOKED_AT)], found)
    return found


def _are_volumes(names: Sequence[Path]) -> bool:
    """Whether there is NIfTI, and not of planes."""
    first = next((path for path in names if path.name.lower().endswith(nifti.SUFFIXES)), None)
    if first is None:
        return False
    try:
        nifti.inspect_plane(read(first, None), MOST_BYTES)
    except UserError:
        return True
    return False


# Where the files are


def _find_places(
    folder: Path, pictures: Sequence[Path], suffixes: Sequence[str], found: Survey
) -> None:
    inside = {path.name.lower(): path.name for path in folder.iterdir() if path.is_dir()}
    if NNUNET_IMAGES.lower() in inside:
        found.data["folder"] = str(folder)
        found.guess("layout", "nnunet", f"{NNUNET_IMAGES}/ and {NNUNET_MASKS}/")
        return
    for path in sorted([*folder.glob("*.csv"), *folder.glob("*.tsv")]):
        columns = _columns(path)
        if columns is not None:
            found.data["manifest"] = str(path)
            renamed = {word: name for word, name in columns.items() if word != name}
            if renamed:
                found.guess("columns", renamed, f"the head of {path.name}")
            return
    found.data["folder"] = str(folder)
    images = next((inside[name] for name in IMAGE_FOLDERS if name in inside), None)
    masks = next((inside[name] for name in MASK_FOLDERS if name in inside), None)
    pair = _pair_of_folders(folder, pictures, suffixes, images, masks)
    if pair is not None:
        _guess_pair(pair, found)
        return
    if images is None:
        found.guess("image_folder", ".", "there is no folder images/: all pictures below")
        images = "."
    elif images != "images":
        found.guess("image_folder", images, "its name")
    where = folder / (masks or images)
    stems, others = (
        {_stem(path, place, suffixes) for path in pictures if place in path.parents}
        for place in (folder / images, where)
    )
    suffix = _mask_suffix(stems, others, is_apart=masks is not None)
    if masks is None and suffix:
        found.guess("mask_folder", images, f"masks lie beside their images, as NAME{suffix}")
    elif masks is not None and masks != "masks":
        found.guess("mask_folder", masks, "its name")
    if suffix:
        found.guess("mask_suffix", suffix, "the names of the masks")


class _Pair(NamedTuple):
    """Two folders whose files are called alike, but for how the names end."""

    images: str
    masks: str
    image_suffix: str
    mask_suffix: str


def _pair_of_folders(
    folder: Path,
    pictures: Sequence[Path],
    suffixes: Sequence[str],
    images: str | None,
    masks: str | None,
) -> _Pair | None:
    """Two sub-folders, or those of one that is known, of which one looks like masks.

    It shows the fewest different values; of several that may be the images those of most bytes are.
    """
    inside: dict[str, list[Path]] = {}
    for path in pictures:
        if path.parent != folder:
            inside.setdefault(path.relative_to(folder).parts[0], []).append(path)
    shades = {name: _shades(paths[0], suffixes) for name, paths in inside.items()}
    found = []
    for one, other in itertools.permutations(inside, 2):
        if images not in (None, one) or masks not in (None, other):
            continue
        stems = [
            {_stem(path, folder / name, suffixes) for path in inside[name]} for name in (one, other)
        ]
        ends = ["", ""]
        if not _are_alike(*stems):
            ends = [_common_end(each) for each in stems]
            pairs = zip(stems, ends, strict=True)
            stems = [{stem.removesuffix(end) for stem in each} for each, end in pairs]
        if _are_alike(*stems) and shades[other] <= MOST_SHADES and 2 * shades[other] < shades[one]:
            size = sum(path.stat().st_size for path in inside[one])
            found.append((-shades[other], size, _Pair(one, other, *ends)))
    return max(found)[2] if found else None


def _are_alike(images: set[str], masks: set[str]) -> bool:
    """Whether half of the masks or more are called like an image."""
    return 2 * len(images & masks) >= len(masks)


def _guess_pair(pair: _Pair, found: Survey) -> None:
    alike = f"{pair.images}/ and {pair.masks}/ hold files of the same names"
    for option, value, default in (
        ("image_folder", pair.images, "images"),
        ("mask_folder", pair.masks, "masks"),
        ("image_suffix", pair.image_suffix, ""),
        ("mask_suffix", pair.mask_suffix, ""),
    ):
        if value != default:
            found.guess(option, value, alike if "folder" in option else "the names of the files")


def _common_end(stems: set[str]) -> str:
    """What all names end in, from a separator on, such as _ct."""
    letters = zip(*(stem[::-1] for stem in stems), strict=False)
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, letters)
    match = re.search(r"[_\-. ].*$", "".join(column[0] for column in alike)[::-1])
    return match[0] if match and len(stems) > 1 else ""


def _shades(path: Path, suffixes: Sequence[str]) -> int:
    """How many different values a picture or volume has; one that cannot be read counts as many."""
    try:
        if suffixes == nifti.SUFFIXES:
            return len(np.unique(nifti.load(path, None, MOST_BYTES, kind="channels")[1]))
        data = read(path, None)
        files.inspect(data, as_labels=True)
        picture = files.pixels(data, as_labels=True)
        return len(np.unique(picture.reshape(len(picture), -1), axis=1).T)
    except UserError:
        return MANY


def _columns(path: Path) -> dict[str, str] | None:
    """Our words for the columns of a table of images; None if it is none."""
    text = text_of(path)
    head = next(csv.reader([text.partition("\n")[0]], delimiter=delimiter_of(text)), [])
    known = {name.strip().lower(): name.strip() for name in head}
    columns = {
        word: next((known[name] for name in names if name in known), None)
        for word, names in COLUMNS.items()
    }
    if columns["image"] is None or columns["mask"] is None:
        return None
    return {word: name for word, name in columns.items() if name is not None}


def _mask_suffix(stems: set[str], others: set[str], *, is_apart: bool) -> str:
    """What masks are called beyond their images: of most of them."""
    if is_apart and _are_alike(stems, others):
        return ""
    counts = {
        suffix: sum(
            other.endswith(suffix) and other.removesuffix(suffix) in stems for other in others
        )
        for suffix in MASK_SUFFIXES
    }
    best = max(counts, key=lambda suffix: (counts[suffix], -len(suffix)))
    if counts[best]:
        return best
    endings = Counter(
        other[match.start() :]
        for other in others
        for match in SEPARATOR_IN_NAME.finditer(other)
        if other[: match.start()] in stems
    )
    ending, count = max(endings.items(), key=lambda pair: pair[1], default=("", 0))
    return ending if count * COMMON >= len(others) else ""


def _find_groups(entries: Sequence[Entry], found: Survey) -> None:
    if any(entry.group for entry in entries):
        return
    for pattern in GROUPS:
        matches = [re.search(pattern, entry.image.stem) for entry in entries]
        names = {match[1] for match in matches if match}
        if all(matches) and FEWEST_GROUPS <= len(names) < len(entries):
            found.guess(
                "group",
                pattern,
                f"names: {len(names)} groups such as {min(names)}; a group is never in two splits",
            )
            return


# What they hold


def _seen(entry: Entry, is_volume: bool) -> Seen:
    if is_volume:
        header = nifti.inspect(entry.image, None, MOST_BYTES, kind="channels").header
        shape, spacing = in_ras(header)
        return Seen(shape, header.channels + len(entry.more), 16, False, spacing)
    picture = files.inspect(read(entry.image, None))
    return Seen(
        picture.size, picture.channels, picture.bits, picture.has_alpha, None, picture.is_stack
    )


def _find_fourth_axis(entries: Sequence[Entry], found: Survey) -> None:
    counts = {one.channels for one in found.seen}
    channels = max(counts)
    if len(counts) == 1 and 1 < channels <= MOST_CHANNELS and not entries[0].more:
        found.guess("fourth_axis", "channels", f"{channels} along it in every file")


def _find_window(entries: Sequence[Entry], found: Survey) -> None:
    """Of pictures that are no integers of 8 or 16 bits: from their lowest to highest value."""
    if all(one.bits <= 16 for one in found.seen):
        return
    pictures = [files.pixels(read(entry.image, None)) for entry in entries]
    finite = np.concatenate([picture[np.isfinite(picture)] for picture in pictures])
    if not finite.size:
        return  # whoever reads them will tell
    low, high = float(finite.min()), float(finite.max())
    if 0 <= low < high <= 1:
        low, high = 0.0, 1.0
    found.guess("window", [low, high], f"{len(entries)} pictures that were looked at")


def _find_channels(found: Survey) -> None:
    counts = sorted({one.channels - one.has_alpha for one in found.seen})
    has_alpha = any(one.has_alpha for one in found.seen)
    if len(counts) == 1 and not has_alpha and not found.seen[0].is_stack:
        return
    if len(counts) > 1:
        channels, reason = 3 if counts[-1] >= 3 else 1, f"pictures of {counts} channels"
    elif found.seen[0].is_stack:
        channels, reason = counts[0], "the pages of the files, taken for channels"
    else:
        channels, reason = counts[0], "what there is beside an alpha channel"
    if channels > MOST_CHANNELS:
        raise UserError(
            f"the pictures have {channels} pages or channels each; expected at most "
            f"{MOST_CHANNELS} channels: save slices of a volume as NIfTI"
        )
    found.guess("channels", channels, reason)


def _find_encoding(masks: Sequence[Entry], found: Survey) -> None:
    """What the values of masks mean that nobody named."""
    count = f"{len(masks)} masks that were looked at"
    values: Counter[int] = Counter()
    is_whole = True
    for entry in masks:
        assert entry.mask is not None
        try:
            part = _values(entry, found.source == "volumes")
        except ColouredMaskError:
            _find_colours(masks, found)
            return
        numbers, counts = np.unique(part, return_counts=True)
        is_whole = is_whole and bool((numbers == np.rint(numbers)).all())
        for number, times in zip(numbers.tolist(), counts.tolist(), strict=True):
            values[round(number)] += times
    present = set(values)
    if not is_whole and max(present) <= 1:
        found.guess("mask_encoding", "threshold", f"values between 0 and 1 in {count}")
        found.guess("threshold", 0.5, "half of the largest value")
    elif present <= {0, 1}:
        found.guess("classes", ["background", "object"], f"0 and 1 in {count}")
    elif present <= {0, 255}:
        found.guess("mask_encoding", "binary", f"0 and 255 in {count}")
        found.guess("classes", ["background", "object"], "its two values; name it as you like")
    elif _are_blurred(masks, values):
        found.guess("mask_encoding", "threshold", f"values between two ends, in {count}")
        found.guess("threshold", max(present) / 2, "half of the largest value")
    elif len(present) > MAX_CLASSES or (
        found.source == "images"
        and look_like_numbers_of_objects(_values(entry, False) for entry in masks)
    ):
        found.guess(
            "mask_encoding",
            "instances",
            f"values up to {max(present)}, nearly each in one piece, in {count}",
        )
        found.guess("classes", ["background", "object"], "all but 0; name it as you like")
    else:
        odd = [
            value for value in sorted(present) if value < 0 or (value == 255 and len(present) > 2)
        ]
        if odd:
            found.guess("ignore", odd[0] if len(odd) == 1 else odd, f"the values in {count}")
        known = sorted({0, *present} - set(odd))
        names = {value: f"class {value}" if value else "background" for value in known}
        found.guess(
            "classes",
            list(names.values()) if known == list(range(len(known))) else names,
            f"the values in {count}; name them as you like",
        )


def _are_blurred(masks: Sequence[Entry], values: Counter[int]) -> bool:
    """Whether masks of one class were smoothed: JPEG, or lines that were drawn with soft edges."""
    top = max(values)
    between = {value: n for value, n in values.items() if top / 10 < value < 0.9 * top}
    is_soft = top >= BRIGHT and len(between) >= SHADES
    is_sharp = sum(between.values()) < (1 - SHARP) * values.total()
    is_lossy = all(entry.mask and entry.mask.suffix.lower() in LOSSY for entry in masks)
    return is_lossy or (is_soft and is_sharp)


def _values(entry: Entry, is_volume: bool) -> Any:
    assert entry.mask is not None
    if is_volume:
        before, stored = nifti.load(entry.mask, None, MOST_BYTES)
        return nifti.values(before.header, stored)
    return mask_values(read(entry.mask, None), "index")


def _find_colours(masks: Sequence[Entry], found: Survey) -> None:
    counts: Counter[int] = Counter()
    for entry in masks:
        assert entry.mask is not None
        picture = mask_values(read(entry.mask, None), "colours")
        numbers, times = np.unique(as_numbers(picture), return_counts=True)
        counts.update(dict(zip(numbers.tolist(), times.tolist(), strict=True)))
    found.guess("mask_encoding", "colours", f"colours in {len(masks)} masks that were looked at")
    if len(counts) > MAX_CLASSES:
        raise UserError(
            f"the masks, such as {masks[0].mask}, have {len(counts):,} colours; expected at most "
            f"{MAX_CLASSES}, one of each class: save them without smoothing, as PNG"
        )
    plain = [number for number in (BLACK, WHITE) if number in counts]
    ground = max(plain or counts, key=lambda number: counts[number])
    names = {colours([ground]): "background"}
    others = [number for number, _ in counts.most_common() if number != ground]
    names |= {colours([number]): f"colour {number:06x}" for number in others}
    found.guess("classes", names, f"{colours([ground])} as the background; name them as you like")


# Names


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _stem(path: Path, folder: Path, suffixes: Iterable[str]) -> str:
    name = path.relative_to(folder).as_posix()
    suffix = next((end for end in suffixes if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)]
