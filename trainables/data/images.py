"""Two-dimensional image files with class masks, from a manifest (CSV) or from a folder.

Each image is inspected and hashed first; every problem of every file is told at once; then the
store decodes. Splits go by group, and a leak between splits is an error.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from trainables.data import files
from trainables.data.entries import (
    AllowOutside,
    Columns,
    Entry,
    Folder,
    GroupPattern,
    ImageFolder,
    ImageSuffix,
    Layout,
    MaskFolder,
    MaskSuffix,
    Places,
    Shares,
    Where,
    named_classes,
    read_entries,
    split_by_group,
    with_groups,
)
from trainables.data.files import Header
from trainables.data.labels import (
    Classes,
    Encoding,
    Ignored,
    Labels,
    MaskEncoding,
    Threshold,
    as_numbers,
    colours,
    labels_of,
    whole,
)
from trainables.data.opened import read
from trainables.data.rows import (
    check_not_empty,
    cut,
    duplicates,
    in_parallel,
    lay_out,
    naming,
    notes_of_masks_missing,
    notes_of_twins,
    times,
    usable,
)
from trainables.data.source import (
    NOT_LABELLED,
    Decoded,
    Hears,
    Source,
    padding_share,
    refuse,
    tile_corners,
    unheard,
)
from trainables.errors import UserError
from trainables.late import Late

if TYPE_CHECKING:
    from scipy import ndimage
else:
    ndimage = Late("scipy.ndimage")

Array = npt.NDArray[Any]
Edge = Annotated[int, Field(ge=8, le=4096)]

DEFAULT_SHARES = Shares()
HIGHEST = 65535  # number of an object, or level
LOOKED_AT = 40  # masks, to tell whether their values number objects
OBJECTS = 3  # that one of them has at least, then
IN_ONE_PIECE = 0.9  # share of the values that are in one piece, then
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Inspected:
    """What is known of an entry before it is decoded; hashes are SHA-256 of the bytes."""

    header: Header
    hashes: dict[str, str]
    labels: Header | None = None  # of the mask
    palette: dict[int, files.Colour] | None = None  # the colours of the mask's indices


class ColouredMaskError(UserError):
    """A mask whose channels differ, where numbers are expected."""


@dataclass(frozen=True)
class Reading:
    """How files become rows: the part of the settings that decoding needs."""

    size: tuple[int, int]
    fit: Literal["tile", "resize"]
    channels: int | None
    labels: Labels
    inside: Path | None
    window: tuple[float, float] | None
    megapixels: int


def images(
    root: Path,
    looked_at: Hears = unheard,
    *,
    manifest: Annotated[
        str | None,
        Field(
            description="CSV with the columns image, mask and, if wanted, split, group, instances"
        ),
    ] = None,
    folder: Folder = None,
    layout: Layout = "folders",
    image_folder: ImageFolder = "images",
    mask_folder: MaskFolder = "masks",
    mask_suffix: MaskSuffix = "",
    image_suffix: ImageSuffix = "",
    size: Edge | tuple[Edge, Edge] = 128,
    fit: Annotated[
        Literal["tile", "resize"],
        Field(description="cut at full resolution, or resize the whole image"),
    ] = "tile",
    channels: Annotated[int, Field(ge=1, le=files.MAX_CHANNELS)] | None = None,
    classes: Classes = None,
    small_classes: list[str] | None = None,
    where: Where = None,
    columns: Columns = None,
    group: GroupPattern = None,
    mask_encoding: MaskEncoding = "index",
    threshold: Threshold = None,
    ignore: Ignored = None,
    window: Annotated[
        tuple[float, float] | None,
        Field(description="intensities that become 0 and 1, of 16 bits or of any unit (TIFF)"),
    ] = None,
    split: Shares = DEFAULT_SHARES,
    allow_outside: AllowOutside = False,
    max_megapixels: Annotated[int, Field(ge=1, description="refuse larger images")] = (
        files.DEFAULT_MEGAPIXELS
    ),
) -> Source:
    """PNG, JPEG, TIFF, BMP or GIF files, named in a manifest (image, mask, …) or in a folder."""
    if window is not None and not window[0] < window[1]:
        raise UserError(f"data.window: {list(window)} is empty; expected [low, high], low < high")
    places = Places(
        root, manifest, folder, where or {}, columns or {}, layout, image_folder, mask_folder,
        mask_suffix, image_suffix,
    )  # fmt: skip
    name, entries, notes = read_entries(places, files.SUFFIXES)
    if any(entry.more for entry in entries):
        raise UserError(
            "data.layout: pictures have a file for each channel; expected one file: save them as "
            "TIFF of several channels (volumes may have several files)"
        )
    entries = with_groups(entries, group)
    if classes is None:
        classes, found_small = named_classes(entries, places)
        small_classes = found_small if small_classes is None else small_classes
    reading = Reading(
        size=(size, size) if isinstance(size, int) else size,
        fit=fit,
        channels=channels,
        labels=labels_of(mask_encoding, ignore, classes, small_classes or [], threshold),
        inside=None if allow_outside else places.base,
        window=window,
        megapixels=max_megapixels,
    )

    inspected = in_parallel(lambda entry: inspect_entry(entry, reading), entries, looked_at)
    found = {i: item for i, item in enumerate(inspected) if isinstance(item, Inspected)}
    problems: list[str | UserError] = [i for i in inspected if isinstance(i, UserError)]
    problems += _disagreements(entries, found, reading) + _palettes(entries, found)
    if not problems and reading.labels.names is None and mask_encoding == "index":
        problems += _numbers_of_objects(entries, reading)
    entries, notes_of_split, leaks = split_by_group(entries, split)
    notes += notes_of_split
    problems += leaks + duplicates(entries, {i: item.hashes["image"] for i, item in found.items()})
    if problems:  # decode what is left, so that one run tells everything
        rest = in_parallel(lambda i: decode_entry(entries[i], found[i], reading, False), [*found])
        refuse([*problems, *(item for item in rest if isinstance(item, UserError))])

    is_labelled = any(entry.mask for entry in entries)
    kept = usable(entries)
    if len(kept) < len(entries):
        count = len(entries) - len(kept)
        notes.append(f"{count} of the images of val or test have no mask: left out")
    entries, reads = [entries[i] for i in kept], [found[i] for i in kept]
    check_not_empty(entries)
    has_instances = mask_encoding == "instances" or any(entry.instances for entry in entries)
    notes += notes_of_masks_missing(entries)
    notes += notes_of_twins(entries, [read.hashes["image"] for read in reads])
    notes += _turned(reads)
    sizes = [read.header.size if fit == "tile" else reading.size for read in reads]
    notes += _padded(sizes, reading.size)
    names, groups, splits, parts = lay_out(
        entries, [tile_corners(one, reading.size) for one in sizes]
    )
    header = reads[0].header
    is_cut = len(names) > len(entries) or any(np.less(one, reading.size).any() for one in sizes)
    levels = _levels_of_type(header.bits, window)
    return Source(
        name=name,
        identity={
            "files": [read.hashes for read in reads],
            "fit": fit,
            **reading.labels.identity(),
            **_read_anew(reads),
            **({"levels": window} if header.bits == 32 else {}),
            **({"window": "robust"} if header.bits == 16 and window is None else {}),
        },
        size=reading.size,
        channels=channels or header.channels,
        dtype="uint8" if header.bits == 8 else "uint16",
        classes=reading.labels.names or (None if is_labelled else ["background"]),
        small_classes=[(reading.labels.names or []).index(word) for word in small_classes or []],
        window=levels,
        ends=f"[{window[0]:g}, {window[1]:g}] of the files"
        if header.bits == 32 and window
        else None,
        is_labelled=is_labelled,
        has_instances=has_instances,
        names=names,
        groups=groups,
        splits=splits,
        parts=parts,
        decode=lambda part: decode_entry(entries[part], reads[part], reading, has_instances),
        notes=notes,
        cut_from=list(sizes) if is_cut else None,
    )


def example(folder: Path) -> dict[str, Any]:
    """Six pictures of noise, each in two tiles, and what the classes are called.

    Five of them have a mask, one of these numbers its objects.
    """
    data, chance = folder / "pictures", np.random.default_rng(0)
    for kind in ("images", "masks", "instances"):
        (data / kind).mkdir(parents=True)
    (data / "classes.json").write_text('{"classes": ["dark", "bright"], "small_classes": [1]}')
    for number in range(6):
        picture = chance.integers(0, 256, (16, 24), np.uint8)
        mask = (picture > 200).astype(np.uint8)
        Image.fromarray(picture).save(data / f"images/{number}.png")
        if number:
            Image.fromarray(mask).save(data / f"masks/{number}.png")
        if number == 1:
            halves = mask * np.repeat([1, 2], 12).astype(np.uint8)
            Image.fromarray(halves).save(data / f"instances/{number}.png")
    return {"folder": "pictures", "size": 16}


def inspect_entry(entry: Entry, reading: Reading) -> Inspected:
    """Headers and hashes of an entry's files; an error says what does not fit."""
    with naming(entry.image, entry):
        image = read(entry.image, reading.inside)
        header = files.inspect(image, megapixels=reading.megapixels)
        _convert(np.empty((header.channels, 0, 0), np.uint8), header, reading.channels)
        if header.bits == 32 and reading.window is None:
            raise UserError(_without_window(files.pixels(image)))
    hashes, of_mask, palette = {"image": hashlib.sha256(image).hexdigest()}, None, None
    for kind in ("mask", "instances"):
        path: Path | None = getattr(entry, kind)
        if path is None:
            continue
        with naming(path, entry):
            data = read(path, reading.inside)
            labels = files.inspect(data, as_labels=True, megapixels=reading.megapixels)
            if labels.size != header.size:
                raise UserError(
                    f"is {times(labels.size)}, but its image {entry.name} is "
                    f"{times(header.size)}; expected the same size: was one of them cut or scaled?"
                )
            encoding = reading.labels.encoding if kind == "mask" else "instances"
            if labels.is_lossy and encoding != "threshold":
                raise UserError(
                    "is lossy, so that its values are not those that were drawn; expected a PNG or "
                    "TIFF, or mask_encoding: threshold"
                )
            if labels.channels != 1 and encoding != "colours":
                _grey(files.pixels(data, as_labels=True), labels)
        hashes[kind] = hashlib.sha256(data).hexdigest()
        if kind == "mask":
            of_mask = labels
            is_indexed = labels.has_palette and encoding != "colours"
            palette = files.colours_of(data) if is_indexed else None
    return Inspected(header, hashes, of_mask, palette)


def decode_entry(
    entry: Entry, inspected: Inspected, reading: Reading, with_instances: bool
) -> Decoded:
    """The rows of an entry: its tiles, or itself resized."""
    with naming(entry.image, entry):
        data = _unchanged(entry, "image", inspected, reading)
        picture = files.pixels(data)
        if inspected.header.bits == 32:
            picture = _to_levels(picture, reading.window)
        picture = _convert(picture, inspected.header, reading.channels)
    labels = np.full(inspected.header.size, NOT_LABELLED, np.uint8)
    if entry.mask:
        with naming(entry.mask, entry):
            data = _unchanged(entry, "mask", inspected, reading)
            values = mask_values(data, reading.labels.encoding)
            labels = reading.labels.of(values)
    objects = np.zeros(labels.shape, np.uint16)
    if with_instances and entry.instances:
        with naming(entry.instances, entry):
            data = _unchanged(entry, "instances", inspected, reading)
            objects = numbered(mask_values(data, "instances"))
    elif with_instances and reading.labels.encoding == "instances" and entry.mask:
        with naming(entry.mask, entry):
            objects = numbered(np.where(labels == 1, values, 0))
    elif with_instances:
        objects = _components(labels)
    if reading.fit == "tile":
        return cut(picture, labels, objects, reading.size)
    nearest = [
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(reading.size, labels.shape, strict=True)
    ]
    near = np.ix_(*nearest)
    return Decoded(_resize(picture, reading.size)[None], labels[near][None], objects[near][None])


def mask_values(data: bytes, encoding: Encoding) -> Array:
    """What a mask holds: numbers (H, W), or colours (3, H, W)."""
    if encoding != "colours":
        return _grey(files.pixels(data, as_labels=True), files.inspect(data, as_labels=True))
    header, picture = files.inspect(data), files.pixels(data)
    return _convert(picture, header, 3)


def _grey(values: Array, header: Header) -> Array:
    """The values (H, W) of a mask (C, H, W) whose colours, if it has any, are all grey."""
    colour = values[:-1] if header.has_alpha else values
    if len(colour) > 1 and not (colour == colour[:1]).all():
        what = f"has {header.channels} channels"
        if len(colour) == 3 and colour.dtype == np.uint8:
            what += f" of the colours {colours(np.unique(as_numbers(colour)).tolist())}"
        raise ColouredMaskError(
            f"{what}; expected one channel of class indices, as PNG or TIFF, or mask_encoding: "
            f'colours with `classes: {{"#000000": background, "#ff0000": core}}`'
        )
    return np.asarray(colour[0])


def _resize(picture: Array, size: tuple[int, int]) -> Array:
    """Mean over areas when shrinking, bilinear otherwise."""
    is_smaller = size[0] <= picture.shape[1] and size[1] <= picture.shape[2]
    how = Image.Resampling.BOX if is_smaller else Image.Resampling.BILINEAR
    resized = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize(size[::-1], how))
        for channel in picture
    ]
    largest = np.iinfo(picture.dtype).max
    return np.asarray(np.clip(np.rint(np.stack(resized)), 0, largest), picture.dtype)


def _convert(picture: Array, header: Header, asked: int | None) -> Array:
    """The picture (C, H, W) with the asked channels, if there is one way to get there."""
    have = header.channels
    if asked is None:
        if header.has_alpha or header.is_stack:
            what = "an alpha channel" if header.has_alpha else "pages, which may be channels or not"
            ways = f"channels: {have} keeps them, channels: 1 or 3 converts to grey or RGB"
            if header.is_stack:
                ways += "; slices of a volume are read from NIfTI"
            raise UserError(f"has {have} channels with {what}; say which: {ways}")
        return picture
    if asked == have:
        return picture
    if header.has_alpha:
        opaque = replace(header, channels=have - 1, has_alpha=False)
        return _convert(picture[:-1], opaque, asked)
    if (have, asked) == (1, 3):
        return np.repeat(picture, 3, axis=0)
    if (have, asked) == (3, 1):
        grey = np.tensordot(np.array(LUMINANCE), picture, axes=1)
        return np.asarray(np.rint(grey)[None], picture.dtype)
    raise UserError(
        f"has {have} channels, channels: {asked} was asked for; expected files of {asked} "
        f"channels{', or of one or three' if asked in (1, 3) else ''}"
    )


def _without_window(picture: Array) -> str:
    """What is wrong with a picture of any unit that no window makes intensities."""
    finite = picture[np.isfinite(picture)]
    ends = f" from {finite.min():g} to {finite.max():g}" if finite.size else ""
    return (
        f"holds {picture.dtype} values{ends}; expected integers of 8 or 16 bits, or "
        f"`window: [low, high]`, what becomes 0 and 1 in all images"
    )


def _to_levels(picture: Array, window: tuple[float, float] | None) -> Array:
    """Numbers of any unit as levels of 16 bits, those beyond the window at its ends."""
    assert window is not None
    wrong = picture.size - int(np.count_nonzero(np.isfinite(picture)))
    if wrong:
        raise UserError(
            f"holds {wrong:,} pixels that are no number (NaN or infinite) of {picture.size:,}; "
            f"expected finite values: replace them by what they mean, often the background"
        )
    low, high = window
    share = (np.clip(picture.astype(np.float64), low, high) - low) / (high - low)
    return np.rint(share * HIGHEST).astype(np.uint16)


def _levels_of_type(bits: int, window: tuple[float, float] | None) -> tuple[int, int] | None:
    """The stored levels that become 0 and 1; None: of 8 bits all, of 16 as images have them."""
    if bits == 32:
        return 0, HIGHEST
    if window is None:
        return None
    low, high = map(int, window)
    if (low, high) != window or not 0 <= low < high <= HIGHEST:
        raise UserError(
            f"data.window: {list(window)}; expected whole numbers from 0 to {HIGHEST} for images "
            f"of {bits} bits"
        )
    return low, high


def _padded(sizes: Sequence[Sequence[int]], tile: Sequence[int]) -> list[str]:
    """That some images are smaller than a tile."""
    count = sum(np.less(size, tile).any() for size in sizes)
    if not count:
        return []
    return [
        f"{count} of {len(sizes)} images are smaller than a tile of {times(tile)}, and padded at "
        f"their ends: {padding_share(sizes, tile):.0%} of all pixels; padding counts nowhere"
    ]


def _components(labels: Array) -> npt.NDArray[np.uint16]:
    """Touching pixels of a class as objects, for images without instances of their own."""
    objects = np.zeros(labels.shape, np.uint16)
    for label in np.unique(labels):
        if 0 < label < NOT_LABELLED:
            found, _ = ndimage.label(labels == label, structure=np.ones((3, 3)))
            objects[found > 0] = found[found > 0] + objects.max()
    return objects


def _unchanged(entry: Entry, kind: str, inspected: Inspected, reading: Reading) -> bytes:
    data = read(getattr(entry, kind), reading.inside)
    if hashlib.sha256(data).hexdigest() != inspected.hashes[kind]:
        raise UserError("changed while it was read; start again")
    return data


def _numbers_of_objects(entries: Sequence[Entry], reading: Reading) -> list[str]:
    """Masks whose values, which nobody named, number objects rather than classes."""
    masks = [entry for entry in entries if entry.mask]

    def values(entry: Entry) -> Array:
        assert entry.mask is not None
        with naming(entry.mask, entry):
            found = mask_values(read(entry.mask, reading.inside), "index")
        return np.where(np.isin(found, reading.labels.ignore), 0, found)

    if not look_like_numbers_of_objects(map(values, masks[:: max(1, len(masks) // LOOKED_AT)])):
        return []
    return [
        f"the values of {len(masks)} masks look like numbers of objects, not classes: nearly "
        f"each is in one piece, and which there are differs from mask to mask; set "
        f"mask_encoding: instances, or, if they are classes, name them: classes: [background, …]"
    ]


def look_like_numbers_of_objects(masks: Iterable[Array]) -> bool:
    """Whether nearly every value (of H, W) is in one piece, and it is chance which a mask has.

    A few are in several, where an object was cut by others or by the rim of a picture.
    """
    kinds, most, total, whole_ones = set(), 0, 0, 0
    for values in masks:
        numbers = np.setdiff1d(np.unique(values), [0])
        for number in numbers:
            pieces = ndimage.label(values == number, structure=np.ones((3, 3)))[1]
            whole_ones += pieces == 1
        total += len(numbers)
        kinds.add(tuple(numbers.tolist()))
        most = max(most, len(numbers))
    return len(kinds) > 1 and most >= OBJECTS and whole_ones >= IN_ONE_PIECE * total


def _palettes(entries: Sequence[Entry], found: dict[int, Inspected]) -> list[str]:
    """Masks whose palettes give a value another colour than those of most masks do."""
    counts: dict[int, Counter[files.Colour]] = defaultdict(Counter)
    for item in found.values():
        for value, colour in (item.palette or {}).items():
            counts[value][colour] += 1
    usual = {value: counter.most_common(1)[0][0] for value, counter in counts.items()}
    odd = [
        (entries[i].mask, value, colour)
        for i, item in found.items()
        for value, colour in (item.palette or {}).items()
        if colour != usual[value]
    ]
    if not odd:
        return []
    path, value, colour = odd[0]
    count = len({path for path, _, _ in odd})
    return [
        f"palettes of masks differ: {count} give a value another colour than most do, such as "
        f"{path}, where {value} is #{bytes(colour).hex()} and not "
        f"#{bytes(usual[value]).hex()}; expected one palette: save them anew, or set "
        f"mask_encoding: colours with `classes: {{'#{bytes(usual[0]).hex()}': background, …}}`"
    ]


def _turned(reads: Sequence[Inspected]) -> list[str]:
    """That some files were turned."""
    headers = [header for read in reads for header in (read.header, read.labels) if header]
    turned = sum(header.orientation != files.UPRIGHT for header in headers)
    if not turned:
        return []
    return [
        f"{turned} files carry an orientation (EXIF or TIFF): turned upright, as viewers show them"
    ]


def _read_anew(reads: Sequence[Inspected]) -> dict[str, int]:
    """Another identity for data that release 0.1 read otherwise."""
    headers = [header for read in reads for header in (read.header, read.labels) if header]
    count = sum(header.is_read_anew for header in headers)
    return {"read_anew": count} if count else {}


def numbered(values: Array) -> npt.NDArray[np.uint16]:
    """Numbers of objects, 0 for none, as 16 bits: as they are, or counted anew."""
    numbers = whole(values)
    if numbers.min() < 0:
        raise UserError(f"has the value {numbers.min()}; expected numbers of objects")
    if numbers.max() <= HIGHEST:
        return numbers.astype(np.uint16)
    present, places = np.unique(np.append(numbers, 0), return_inverse=True)  # 0 comes first
    if len(present) > HIGHEST:
        raise UserError(f"has {len(present):,} objects; expected at most {HIGHEST:,}")
    return places[:-1].reshape(numbers.shape).astype(np.uint16)


def _disagreements(
    entries: Sequence[Entry], found: dict[int, Inspected], reading: Reading
) -> list[str]:
    """Images that differ from most of the others in bits or channels."""

    def kind(inspected: Inspected) -> tuple[int, int]:
        return inspected.header.bits, reading.channels or inspected.header.channels

    usual = Counter(map(kind, found.values())).most_common(1)
    return [
        f"{entries[i].image}{entries[i].line} has {kind(item)[1]} channels of {kind(item)[0]} "
        f"bits; most images have {usual[0][0][1]} of {usual[0][0][0]}; set channels, or leave it "
        f"out"
        for i, item in found.items()
        if kind(item) != usual[0][0]
    ]
