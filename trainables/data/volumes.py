"""Volumes (NIfTI) with class masks, from a manifest (CSV) or from a folder.

Each is kept whole, (C, *S), S from the patient's left to right, from back to front, and upwards
("RAS"), however a file stores it; `size` and `spacing` have the same order. An oblique volume is
turned to the nearest axes and not resampled. Models see crops of `size`.

Intensities become 16-bit levels per volume and channel, so that volumes whose numbers have no
common unit are alike: by `percentiles` of the voxels that are not 0, which leaves out the empty
surroundings, or, where numbers have a unit (CT), by `window` in that unit. Without either, what is
brighter than the percentiles is kept, as small bright lesions lie there; and numbers that look like
Hounsfield units have one window in all volumes.

Models see, and learn from, voxels of `spacing`; they are judged by the labels on the grid of the
file, which resampling may have cost small objects.

A volume that is smaller than a crop is padded at its end; padding counts nowhere.

Letters: C channels, *S voxels along every axis.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from trainables.data import nifti
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
from trainables.data.labels import (
    NEAR,
    Classes,
    Ignored,
    Labels,
    MaskEncoding,
    Threshold,
    labels_of,
)
from trainables.data.rows import (
    check_not_empty,
    duplicates,
    in_parallel,
    naming,
    notes_of_masks_missing,
    notes_of_twins,
    times,
    usable,
)
from trainables.data.source import (
    NOT_LABELLED,
    Decoded,
    Grids,
    Hears,
    Source,
    Whole,
    refuse,
    unheard,
)
from trainables.errors import UserError
from trainables.late import Late

if TYPE_CHECKING:
    import nibabel
    from nibabel import orientations
    from scipy import ndimage
else:
    nibabel = Late("nibabel")
    orientations = Late("nibabel.orientations")
    ndimage = Late("scipy.ndimage")

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Edge = Annotated[int, Field(ge=4, le=1024)]
Millimetres = Annotated[float, Field(gt=0, le=1000)]
Percent = Annotated[float, Field(ge=0, le=100)]
Level = Annotated[int, Field(ge=0, le=65535)]

DEFAULT_SHARES = Shares()
DEFAULT_PERCENTILES = (0.5, 99.5)
DEFAULT_MIB = 2048  # that a volume may take in memory
SEPARATOR = ";"
HIGHEST = 65535  # the level of what lies at or above the window
HEADROOM = 15  # windows above one that nobody set are kept; divides HIGHEST
HOUNSFIELD = (-1000.0, 1000.0)  # from air to dense bone
AIR = -500.0  # Hounsfield units that only air is below; the lowest of no MR or PET
SAME_SPACING = 1e-3  # relative difference that is not worth resampling
HALFWAY = 1e-6  # voxels within which a place is halfway between two
COPIES = 3  # of the values of a channel while it is decoded


@dataclass(frozen=True)
class Inspected:
    """What is known of an entry before its voxels are kept."""

    images: tuple[nifti.Inspected, ...]  # files, of a channel each or more
    mask: nifti.Inspected | None
    shape: Shape  # of the rows' axes, resampled
    spacing: tuple[float, ...]  # likewise

    @property
    def channels(self) -> int:
        return sum(image.header.channels for image in self.images)

    @property
    def content(self) -> str:
        """What makes it the same volume as another: its stored voxels."""
        return " ".join(image.voxels for image in self.images)


@dataclass(frozen=True)
class Reading:
    """How files become rows: the part of the settings that decoding needs."""

    spacing: tuple[float, float, float] | None
    window: tuple[float, float] | None
    percentiles: tuple[float, float]
    labels: Labels
    inside: Path | None
    most_bytes: int
    kind: nifti.Kind
    headroom: int  # windows above the window that are kept, with it


def volumes(
    root: Path,
    looked_at: Hears = unheard,
    *,
    manifest: Annotated[
        str | None,
        Field(
            description="CSV with the columns image, mask and, if wanted, split, group; several "
            "files of one volume, its channels, are separated by ;"
        ),
    ] = None,
    folder: Folder = None,
    layout: Layout = "folders",
    image_folder: ImageFolder = "images",
    mask_folder: MaskFolder = "masks",
    mask_suffix: MaskSuffix = "",
    image_suffix: ImageSuffix = "",
    size: Annotated[
        tuple[Edge, Edge, Edge],
        Field(description="of a crop in voxels: to the right, to the front, upwards"),
    ],
    spacing: Annotated[
        tuple[Millimetres, Millimetres, Millimetres] | Literal["none"],
        Field(description="mm between voxels in the order of size; none: as the files have it"),
    ] = "none",
    window: Annotated[
        tuple[float, float] | None,
        Field(description="intensities that become 0 and 1; instead of percentiles"),
    ] = None,
    percentiles: Annotated[
        tuple[Percent, Percent] | None,
        Field(
            description="of each volume's voxels that are not 0; null: 0.5 and 99.5, and what is "
            "brighter is kept"
        ),
    ] = None,
    fourth_axis: Annotated[
        Literal["channels"] | None,
        Field(description="what the fourth axis of a file is; null: files have three"),
    ] = None,
    overlap: Annotated[
        float,
        Field(ge=0, lt=1, description="of the windows in which whole volumes are segmented"),
    ] = 0.5,
    tolerance: Annotated[
        float, Field(gt=0, le=1000, description="mm within which surfaces agree (nsd)")
    ] = 1.0,
    classes: Classes = None,
    small_classes: list[str] | None = None,
    where: Where = None,
    columns: Columns = None,
    group: GroupPattern = None,
    mask_encoding: MaskEncoding = "index",
    threshold: Threshold = None,
    ignore: Ignored = None,
    split: Shares = DEFAULT_SHARES,
    allow_outside: AllowOutside = False,
    max_mib: Annotated[
        int, Field(ge=1, description="refuse volumes that take more memory, at 4 bytes a voxel")
    ] = DEFAULT_MIB,
) -> Source:
    """NIfTI files named in a manifest (image, mask, split, group), or in a folder, in 3-D crops."""
    _check_intensities(window, percentiles)
    if mask_encoding == "colours":
        raise UserError("data.mask_encoding: volumes have no colours; expected another encoding")
    places = Places(
        root, manifest, folder, where or {}, columns or {}, layout, image_folder, mask_folder,
        mask_suffix, image_suffix,
    )  # fmt: skip
    name, entries, notes = read_entries(places, nifti.SUFFIXES, SEPARATOR)
    if group is None and not all(entry.group for entry in entries):
        notes.append(
            "volumes without a group are a group each: whether two of them show one patient (left "
            "and right, before and after) cannot be known; give a column group, or group: a pattern"
        )
    entries = with_groups(entries, group)
    if classes is None:
        classes, found_small = named_classes(entries, places)
        small_classes = found_small if small_classes is None else small_classes
    reading = Reading(
        spacing=None if spacing == "none" else spacing,
        window=window,
        percentiles=percentiles or DEFAULT_PERCENTILES,
        labels=labels_of(mask_encoding, ignore, classes, small_classes or [], threshold),
        inside=None if allow_outside else places.base,
        most_bytes=max_mib * 2**20,
        kind=fourth_axis or "volume",
        headroom=HEADROOM if window is None and percentiles is None else 1,
    )

    inspected = in_parallel(lambda entry: inspect_entry(entry, reading), entries, looked_at)
    found = {i: item for i, item in enumerate(inspected) if isinstance(item, Inspected)}
    problems: list[str | UserError] = [i for i in inspected if isinstance(i, UserError)]
    problems += _disagreements(entries, found)
    entries, notes_of_split, leaks = split_by_group(entries, split)
    notes += notes_of_split
    problems += leaks + duplicates(entries, {i: item.content for i, item in found.items()})
    if problems:  # decode what is left, so that one run tells everything
        rest = in_parallel(lambda i: decode_entry(entries[i], found[i], reading), [*found])
        refuse([*problems, *(item for item in rest if isinstance(item, UserError))])

    is_labelled = any(entry.mask for entry in entries)
    kept = usable(entries)
    if len(kept) < len(entries):
        notes.append(f"{len(entries) - len(kept)} volumes of val or test have no mask: left out")
    entries, reads = [entries[i] for i in kept], [found[i] for i in kept]
    check_not_empty(entries)
    if reading.headroom > 1 and _are_hounsfield(reads):
        reading = replace(reading, window=HOUNSFIELD)
    notes += notes_of_masks_missing(entries)
    notes += notes_of_twins(entries, [read.content for read in reads])
    notes += _notes(entries, reads, reading, size)
    scored = Grids(
        shapes=[in_ras(read.images[0].header)[0] for read in reads],
        spacings=[in_ras(read.images[0].header)[1] for read in reads],
    )
    is_resampled = scored.spacings != [read.spacing for read in reads]
    return Source(
        name=name,
        identity={
            "files": [
                {"images": [image.identity for image in read.images], "mask": _identity(read.mask)}
                for read in reads
            ],
            "spacing": reading.spacing,
            "intensities": {"window": reading.window}
            if reading.window
            else {"percentiles": reading.percentiles},
            **reading.labels.identity(),
        },
        size=size,
        channels=reads[0].channels,
        dtype="uint16",
        classes=reading.labels.names or (None if is_labelled else ["background"]),
        small_classes=[(reading.labels.names or []).index(word) for word in small_classes or []],
        window=(0, HIGHEST // reading.headroom),
        highest=HIGHEST if reading.headroom > 1 else None,
        ends=_ends(reading),
        is_labelled=is_labelled,
        has_instances=False,
        names=[entry.name for entry in entries],
        groups=[str(entry.group) for entry in entries],
        splits=[str(entry.split) for entry in entries],
        parts=[range(i, i + 1) for i in range(len(entries))],
        decode=lambda part: decode_entry(entries[part], reads[part], reading),
        notes=notes,
        whole=Whole(
            shapes=[read.shape for read in reads],
            spacings=[read.spacing for read in reads],
            overlap=overlap,
            tolerance=tolerance,
            decode_bytes=max(_decode_bytes(read) for read in reads),
            scored=scored if is_resampled else None,
        ),
    )


def example(folder: Path) -> dict[str, Any]:
    """Six volumes of noise, five of them with a mask."""
    data, chance = folder / "scans", np.random.default_rng(0)
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
    for number in range(6):
        scan = chance.integers(1, 1000, (8, 10, 12), np.int16)
        nibabel.save(nibabel.Nifti1Image(scan, np.eye(4)), data / f"images/{number}.nii.gz")
        if number:
            mask = nibabel.Nifti1Image((scan > 900).astype(np.uint8), np.eye(4))
            nibabel.save(mask, data / f"masks/{number}.nii.gz")
    return {"folder": "scans", "size": [8, 8, 8]}


def inspect_entry(entry: Entry, reading: Reading) -> Inspected:
    """Headers and hashes of an entry's files; an error says what does not fit."""
    with naming(entry.image, entry):
        first = _inspect(entry.image, reading)
        shape = _resampled(first.header, reading.spacing)
        needed = math.prod(shape) * 4
        if needed > reading.most_bytes:
            raise UserError(
                f"becomes {times(shape)} voxels at spacing {_listed(reading.spacing or ())}, "
                f"{needed / 2**20:,.0f} MiB in memory; expected at most "
                f"{reading.most_bytes / 2**20:,.0f}: take a wider spacing, or raise max_mib"
            )
    others = []
    for path in entry.more:
        with naming(path, entry):
            others.append(_inspect(path, reading))
            _check_place(others[-1].header, first.header, entry)
    mask = None
    if entry.mask:
        with naming(entry.mask, entry):
            mask = nifti.inspect(entry.mask, reading.inside, reading.most_bytes)
            _check_place(mask.header, first.header, entry)
    spacing = tuple(
        old * step
        for old, step in zip(in_ras(first.header)[1], _steps(first.header, reading), strict=True)
    )
    return Inspected((first, *others), mask, shape, spacing)


def decode_entry(entry: Entry, inspected: Inspected, reading: Reading) -> Decoded:
    """The whole volume of an entry."""
    picture = np.empty((inspected.channels, *inspected.shape), np.uint16)
    channels = iter(picture)
    paths = (entry.image, *entry.more)
    for path, before in zip(paths, inspected.images, strict=True):
        with naming(path, entry):
            stored = _unchanged(path, before, reading)
            of_channels = [stored] if before.header.channels == 1 else np.moveaxis(stored, -1, 0)
            for of_channel in of_channels:
                intensities = nifti.values(before.header, of_channel)
                low, high = levels_between(intensities, reading)
                intensities = to_ras(intensities, before.header.affine)
                steps = _steps(before.header, reading)
                intensities = resampled(intensities, inspected.shape, steps)
                next(channels)[:] = to_levels(intensities, low, high, reading.headroom)
    header = inspected.images[0].header
    labels = np.full(in_ras(header)[0], NOT_LABELLED, np.uint8)
    if entry.mask and inspected.mask:
        with naming(entry.mask, entry):
            stored = _unchanged(entry.mask, inspected.mask, reading)
            labels = reading.labels.of(nifti.values(inspected.mask.header, stored))
            labels = to_ras(labels, inspected.mask.header.affine)
    learnt = resampled_labels(labels, inspected.shape, _steps(header, reading))
    return Decoded(picture[None], learnt[None], truth=labels[None])


def _inspect(path: Path, reading: Reading) -> nifti.Inspected:
    return nifti.inspect(path, reading.inside, reading.most_bytes, kind=reading.kind)


def _are_hounsfield(reads: Sequence[Inspected]) -> bool:
    """Whether most volumes reach so far below 0 as only air in a CT does."""
    is_low = [image.lowest < AIR for read in reads for image in read.images]
    return sum(is_low) * 2 > len(is_low)


def to_ras(stored: Array, affine: Array) -> Array:
    """The same voxels with axes to the right, to the front and upwards."""
    return np.asarray(orientations.apply_orientation(stored, orientations.io_orientation(affine)))


def resampled(values: Array, shape: Shape, steps: Sequence[float]) -> Array:
    """Values at new voxels, `steps` old ones apart along each axis, in the middle of the old ones.

    Linear, after a Gaussian of (step - 1) / 2 along axes that become coarser, so that what lies
    between the new voxels counts. Beyond the first and the last voxel their values go on.
    """
    if all(step == 1 for step in steps):
        return values
    sigma = [max(0.0, (step - 1) / 2) for step in steps]
    values = ndimage.gaussian_filter(values, sigma, mode="nearest")
    middle = [
        (old - 1) / 2 - (new - 1) / 2 * step
        for old, new, step in zip(values.shape, shape, steps, strict=True)
    ]
    return np.asarray(
        ndimage.affine_transform(
            values, np.asarray(steps), middle, output_shape=shape, order=1, mode="nearest"
        )
    )


def resampled_labels(labels: Array, shape: Shape, steps: Sequence[float]) -> Array:
    """The nearest labels at the same new voxels.

    Halfway between two voxels the one below and the one above take turns: always the same one, as
    rounding has it, would move everything by half a voxel.
    """
    places = []
    for old, new, step in zip(labels.shape, shape, steps, strict=True):
        number = np.arange(new)
        place = (old - 1) / 2 + (number - (new - 1) / 2) * step
        is_halfway = np.abs(place - np.floor(place) - 0.5) < HALFWAY
        nearest = np.where(is_halfway, np.floor(place) + number % 2, np.rint(place))
        places.append(nearest.clip(0, old - 1).astype(np.int64))
    return np.asarray(labels[np.ix_(*places)])


def levels_between(intensities: Array, reading: Reading) -> tuple[float, float]:
    """The intensities that become the lowest and the highest level."""
    if reading.window is not None:
        return reading.window
    foreground = intensities[intensities != 0]
    if foreground.size == 0:
        raise UserError("is empty: every voxel is 0; expected a picture: leave it out")
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.percentile(foreground, reading.percentiles, overwrite_input=True).tolist()
    if not 0 < high - low < math.inf:
        raise UserError(
            f"has no contrast: of its voxels that are not 0 the percentiles "
            f"{_listed(reading.percentiles)} are {low:g} and {high:g}; expected two different "
            f"values: leave it out, take other percentiles, or give a window"
        )
    return low, high


def to_levels(
    intensities: Array, low: float, high: float, headroom: int = 1
) -> npt.NDArray[np.uint16]:
    """Intensities as levels from 0 (low and less) to HIGHEST.

    That is the level of what lies `headroom` times as far from low as high does, and of all above.
    """
    levels = np.empty(intensities.shape, np.uint16)
    for level, slab in zip(levels, intensities, strict=True):  # few float64 at a time
        share = np.clip((slab.astype(np.float64) - low) / (high - low), 0, headroom)
        level[...] = np.rint(share * (HIGHEST // headroom))
    return levels


def _unchanged(path: Path, before: nifti.Inspected, reading: Reading) -> Array:
    kind: nifti.Kind = "channels" if before.header.channels > 1 else "volume"
    now, stored = nifti.load(path, reading.inside, reading.most_bytes, kind=kind)
    if now.identity != before.identity:
        raise UserError("changed while it was read; start again")
    return stored


def in_ras(header: nifti.Header) -> tuple[Shape, tuple[float, ...]]:
    """Shape and spacing along the rows' axes."""
    place = {int(axis): i for i, (axis, _) in enumerate(orientations.io_orientation(header.affine))}
    order = [place[axis] for axis in range(3)]
    return tuple(header.shape[i] for i in order), tuple(header.spacing[i] for i in order)


def _steps(header: nifti.Header, reading: Reading) -> list[float]:
    """Old voxels from one new voxel to the next, along the rows' axes; 1: as it is."""
    if reading.spacing is None:
        return [1.0, 1.0, 1.0]
    steps = [new / old for new, old in zip(reading.spacing, in_ras(header)[1], strict=True)]
    return [1.0 if abs(step - 1) < SAME_SPACING else step for step in steps]


def _resampled(header: nifti.Header, spacing: tuple[float, ...] | None) -> Shape:
    """How many voxels a volume has at a spacing, along the rows' axes."""
    shape, old = in_ras(header)
    if spacing is None:
        return shape
    return tuple(
        count if abs(new / was - 1) < SAME_SPACING else max(1, round(count * was / new))
        for count, was, new in zip(shape, old, spacing, strict=True)
    )


def _decode_bytes(inspected: Inspected) -> int:
    """About what decoding takes: all levels, the labels, and a channel as stored and as values."""
    voxels = max(math.prod(inspected.shape), math.prod(inspected.images[0].header.shape))
    stored = max(image.header.dtype.itemsize for image in inspected.images)
    channels = max(image.header.channels for image in inspected.images)  # of one file
    return voxels * (2 * inspected.channels + 1 + stored * channels + COPIES * max(4, stored))


def _check_place(header: nifti.Header, image: nifti.Header, entry: Entry) -> None:
    """Volumes of one entry have to lie voxel on voxel."""
    if header.shape != image.shape:
        raise UserError(
            f"is {times(header.shape)}, but its image {entry.name} is {times(image.shape)}; "
            f"expected the same grid: resample it to its image"
        )
    distance = nifti.apart(header.affine, image.affine, image.shape)
    if distance > nifti.APART * min(image.spacing):
        raise UserError(
            f"lies up to {distance:.3g} mm away from its image {entry.name}; expected the same "
            f"affine, within {nifti.APART:g} voxels: resample it, or give it the image's header if "
            f"the voxels do agree"
        )


def _check_intensities(
    window: tuple[float, float] | None, percentiles: tuple[float, float] | None
) -> None:
    if window is not None and percentiles is not None:
        raise UserError("data: window and percentiles exclude each other; leave one out")
    for key, pair in (("window", window), ("percentiles", percentiles)):
        if pair is not None and not (math.isfinite(pair[1] - pair[0]) and pair[0] < pair[1]):
            raise UserError(f"data.{key}: {list(pair)} is empty; expected [low, high], low < high")


def _disagreements(entries: Sequence[Entry], found: dict[int, Inspected]) -> list[str]:
    """Volumes that differ from most of the others in channels."""
    usual = Counter(item.channels for item in found.values()).most_common(1)
    return [
        f"{entries[i].image}{entries[i].line} has {item.channels} channels; most volumes have "
        f"{usual[0][0]}; expected the same files of all, in the same order"
        for i, item in found.items()
        if item.channels != usual[0][0]
    ]


def _notes(
    entries: Sequence[Entry], reads: Sequence[Inspected], reading: Reading, size: Sequence[int]
) -> list[str]:
    """What a person has to know of how these volumes became rows."""
    what = _ends(reading)
    if reading.headroom > 1:
        if reading.window:
            lowest = min(image.lowest for read in reads for image in read.images)
            what += f", as they look like Hounsfield units (the lowest is {lowest:g})"
        what += "; what is brighter is kept; set `window` or `percentiles` to have it otherwise"
    notes = [f"0 and 1 are {what}; axes go to the right, to the front, upwards"]
    headers = [image.header for read in reads for image in read.images]
    guessed = sum(not header.is_placed for header in headers)
    if guessed:
        notes.append(
            f"{guessed} files say nothing of their orientation (no sform, no qform): right and "
            f"left are a guess"
        )
    masks = [read.mask.header for read in reads if read.mask]
    notes += _notes_of_forms([*headers, *masks])
    scaled = sum(header.slope % 1 != 0 or header.intercept % 1 != 0 for header in masks)
    if scaled:
        notes.append(
            f"{scaled} masks store their values with a scale (scl_slope): what is within {NEAR:g} "
            f"of a whole number is that number"
        )
    if reading.spacing is None:
        spacings = np.array([in_ras(header)[1] for header in headers])
        low, high = spacings.min(axis=0), spacings.max(axis=0)
        if (high / low - 1 > SAME_SPACING).any():
            notes.append(
                f"spacings differ, from {_listed(low)} to {_listed(high)} mm, and are kept; "
                f"spacing: [mm, mm, mm] makes them alike"
            )
    if any(entry.instances for entry in entries):
        notes.append("instances are not read of volumes")
    is_smaller = [any(np.less(read.shape, size)) for read in reads]
    if any(is_smaller):
        notes.append(
            f"{sum(is_smaller)} of {len(reads)} volumes are smaller than a crop of {times(size)}, "
            f"and padded at their ends; padding counts nowhere"
        )
    return notes


def _ends(reading: Reading) -> str:
    """What becomes 0 and 1."""
    if reading.window:
        return f"{_listed(reading.window)} of the files"
    return f"the percentiles {_listed(reading.percentiles)} of each volume, without voxels of 0"


def _notes_of_forms(headers: Sequence[nifti.Header]) -> list[str]:
    """That some files say in two ways where they lie, and which is believed."""
    pairs = Counter(
        (header.other_axes, _axes(header)) for header in headers if header.other_axes is not None
    )
    return [
        f"{count} files have a qform and an sform that disagree"
        f"{f' (axes {theirs} and {ours})' if theirs else ' about their place'}; the sform is used"
        for (theirs, ours), count in pairs.items()
    ]


def _axes(header: nifti.Header) -> str:
    return "".join(map(str, nibabel.aff2axcodes(header.affine)))


def _identity(inspected: nifti.Inspected | None) -> str | None:
    return inspected.identity if inspected else None


def _listed(numbers: Sequence[float] | Array) -> str:
    return "[" + ", ".join(f"{number:g}" for number in numbers) + "]"
