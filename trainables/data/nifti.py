"""One NIfTI file (.nii or .nii.gz, version 1 or 2), read with care: a volume, or a plane.

The header is checked before memory is taken: what it promises has to be a volume, to stay below a
limit, and to agree with the file. A packed file is never unpacked further than its header promises.

Letters: i j k voxels along the stored axes, c channels.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from trainables.data.opened import opened
from trainables.data.rows import times
from trainables.errors import UserError
from trainables.late import Late
from trainables.settings import digest

if TYPE_CHECKING:
    import nibabel
    from nibabel import orientations, spatialimages
else:
    nibabel, spatialimages = Late("nibabel"), Late("nibabel.spatialimages")
    orientations = Late("nibabel.orientations")

Array = npt.NDArray[Any]
# channels: a fourth axis has the channels of one volume; plane: one axis of three has one voxel
Kind = Literal["volume", "channels", "plane"]

SUFFIXES = (".nii.gz", ".nii")
GZIP_MAGIC = b"\x1f\x8b"
LARGEST_EDGE = 32767  # what version 1 can say
MOST_BEFORE = 2**26  # bytes of header and extensions before the first voxel
SLACK = 2**20  # bytes that may follow the last voxel
AT_ONCE = 2**20  # bytes read in one go
HIGHEST_RATIO = 1100  # DEFLATE cannot pack tighter than 1032 to 1
LEAST_VOLUME = 1e-6  # of a voxel, over the product of its edges; below that its axes are in a plane
DTYPES = {  # datatype code -> numpy type
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
APART = 0.1  # voxels between the corners of volumes that lie in the same place
MILLIMETRES = {1: 1000.0, 3: 0.001}  # of metres and micrometres; unknown units are millimetres


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its voxels; value = slope x stored + intercept."""

    shape: tuple[int, ...]  # of the first three stored axes
    channels: int  # of the fourth
    dtype: np.dtype[Any]
    offset: int  # bytes before the first voxel
    slope: float
    intercept: float
    affine: Array  # (4, 4): i j k 1 -> mm to the right, forwards, upwards
    is_placed: bool  # False: neither sform nor qform, so that right and left are a guess
    # the axes of a qform, like LAS, that contradicts the sform, which is used; "": its place does
    other_axes: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all voxels as stored."""
        return math.prod(self.shape) * self.channels * self.dtype.itemsize

    @property
    def spacing(self) -> tuple[float, ...]:
        """Millimetres from voxel to voxel along the stored axes."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


@dataclass(frozen=True)
class Inspected:
    """A header, and what the file holds as SHA-256: the stored voxels, and all that counts."""

    header: Header
    voxels: str
    identity: str
    lowest: float  # of its values


def inspect(
    path: Path, inside: Path | None, most_bytes: int, *, kind: Kind = "volume"
) -> Inspected:
    """Check the header and walk through the file once; none of its voxels are kept."""
    with opened(path, inside) as file:
        return _walk(file, most_bytes, kind, lambda header: lambda chunk: None)


def load(
    path: Path, inside: Path | None, most_bytes: int, *, kind: Kind = "volume"
) -> tuple[Inspected, Array]:
    """The same with the stored voxels (i, j, k), or (i, j, k, c) of several channels, unscaled."""
    with opened(path, inside) as file:
        return _load(file, most_bytes, kind)


def is_nifti(data: bytes) -> bool:
    """Whether these are the bytes of such a file, packed or not."""
    return data[:2] == GZIP_MAGIC or data[344:347] == b"n+1" or data[4:7] == b"n+2"


def inspect_plane(data: bytes, most_bytes: int) -> tuple[int, int]:
    """Height and width of the picture that a file of one plane holds."""
    found = _walk(io.BytesIO(data), most_bytes, "plane", lambda header: lambda chunk: None)
    height, width = _upright(np.empty(found.header.shape, np.uint8), found.header.affine).shape
    return height, width


def plane(data: bytes) -> Array:
    """The values (H, W): the patient's right, or what lies forwards, on the right; up is up."""
    found, stored = _load(io.BytesIO(data), len(data) * HIGHEST_RATIO, "plane")
    return np.ascontiguousarray(_upright(values(found.header, stored), found.header.affine))


def _upright(stored: Array, affine: Array) -> Array:
    """A plane (i, j, k), one of them 1, as a picture."""
    turned = orientations.apply_orientation(stored, orientations.io_orientation(affine))
    across = max(axis for axis, edge in enumerate(turned.shape) if edge == 1)
    picture: Array = turned.squeeze(across).T[::-1]
    return picture


def _load(file: BinaryIO, most_bytes: int, kind: Kind) -> tuple[Inspected, Array]:
    parts: list[Array] = []

    def make_room(header: Header) -> Callable[[bytes], None]:
        room = np.empty(header.num_bytes, np.uint8)
        parts.append(room)
        filled = 0

        def keep(chunk: bytes) -> None:
            nonlocal filled
            room[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled += len(chunk)

        return keep

    found = _walk(file, most_bytes, kind, make_room)
    header = found.header
    shape = header.shape if header.channels == 1 else (*header.shape, header.channels)
    return found, parts[0].view(header.dtype).reshape(shape, order="F")


def values(header: Header, stored: Array) -> Array:
    """The values that stored voxels stand for: float32, or float64 where that would round them."""
    is_narrow = header.dtype.itemsize <= 2 or header.dtype == np.float32
    scaled: Array = stored.astype(np.float32 if is_narrow else np.float64)
    if (header.slope, header.intercept) != (1, 0):
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(scaled, header.slope, out=scaled)
            np.add(scaled, header.intercept, out=scaled)
    wrong = scaled.size - int(np.count_nonzero(np.isfinite(scaled)))
    if wrong:
        raise UserError(
            f"holds {wrong:,} voxels that are no number (NaN or infinite) of {scaled.size:,}; "
            f"expected finite values: replace them by what they mean, often the background"
        )
    return scaled


def parse(raw: bytes, *, kind: Kind = "volume") -> Header:
    """The header at the beginning of a file; nothing it says is believed unchecked."""
    order, size = _layout(raw)
    version = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    fields = version(raw[:size], endianness=order, check=False)
    magic = bytes(raw[344:348] if size == 348 else raw[4:8])
    if magic[:3] in (b"ni1", b"ni2"):
        raise UserError(
            "is the header of a pair (.hdr and .img); expected one file: save it as .nii.gz"
        )
    if magic[:3] not in (b"n+1", b"n+2"):
        raise UserError("is not a NIfTI file: its magic word is missing")
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or math.isnan(slope):  # so the format says: not scaled
        slope, intercept = 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise UserError(f"scales its values by {slope} and adds {intercept}; expected numbers")
    offset = float(fields["vox_offset"])
    if not size + 4 <= offset <= MOST_BEFORE:
        raise UserError(
            f"says that its voxels begin at byte {offset:g}; expected {size + 4} to {MOST_BEFORE}"
        )
    shape, channels = _shape([int(edge) for edge in fields["dim"]], kind)
    affine = _affine(fields)
    return Header(
        shape=shape,
        channels=channels,
        dtype=_dtype(int(fields["datatype"])).newbyteorder(order),
        offset=int(offset),
        slope=slope,
        intercept=intercept,
        affine=affine,
        is_placed=int(fields["sform_code"]) > 0 or int(fields["qform_code"]) > 0,
        other_axes=_other_axes(fields, shape, affine),
    )


def _layout(raw: bytes) -> tuple[Literal["<", ">"], int]:
    """(byte order, bytes of the header), both from its first number."""
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        size = struct.unpack(f"{order}i", raw[:4].ljust(4, b"\0"))[0]
        if size in (348, 540):
            if len(raw) < size:
                raise UserError(f"is truncated: {len(raw)} bytes, less than a header of {size}")
            return order, size
    raise UserError("is not a NIfTI file (.nii or .nii.gz)")


def _shape(dim: list[int], kind: Kind) -> tuple[tuple[int, ...], int]:
    """(edges of the first three axes, length of the fourth)."""
    if not 1 <= dim[0] <= 7:
        raise UserError(f"says that it has {dim[0]} axes; expected 3")
    edges = dim[1 : dim[0] + 1]
    if any(not 1 <= edge <= LARGEST_EDGE for edge in edges):
        raise UserError(f"has the size {times(edges)}; expected edges of 1 to {LARGEST_EDGE}")
    given = f"has {len(edges)} axes, {times(edges)}"
    if kind == "plane":
        edges = [*edges, 1, 1, 1]
        if min(edges[:3]) > 1 or any(edge > 1 for edge in edges[3:]):
            raise UserError(f"{given}; expected one plane: volumes are read by source: volumes")
        return tuple(edges[:3]), 1
    if len(edges) < 3:
        way_out = "planes are read by source: images"
        raise UserError(f"{given}; expected one 3-D volume; {way_out}")
    most = 4 if kind == "channels" else 3
    if any(edge > 1 for edge in edges[most:]):
        ways = "name the volumes of a series one by one"
        ways += ", or set fourth_axis: channels if it is one scan" * (kind == "volume")
        raise UserError(f"{given}; expected one 3-D volume; {ways}")
    channels = edges[3] if kind == "channels" and len(edges) > 3 else 1
    return tuple(edges[:3]), channels


def _dtype(code: int) -> np.dtype[Any]:
    if code in DTYPES:
        return np.dtype(DTYPES[code])
    name = nibabel.nifti1.data_type_codes.label.get(code, "unknown")
    raise UserError(
        f"holds values of type {code} ({name}); expected integers of 8 to 64 bits, or floats of "
        f"32 or 64: save each channel as a volume"
    )


def _affine(fields: Any) -> Array:
    try:
        with np.errstate(all="ignore"):
            affine = np.asarray(fields.get_best_affine(), np.float64)
    except (ValueError, ArithmeticError, spatialimages.HeaderDataError) as error:
        raise UserError(f"has an affine that cannot be computed: {error}") from error
    if not np.isfinite(affine).all():
        raise UserError("has an affine that is not finite (NaN or infinite); expected numbers")
    affine[:3] *= MILLIMETRES.get(int(fields["xyzt_units"]) & 7, 1.0)
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    is_flat = not (edges > 0).all()
    if is_flat or abs(np.linalg.det(affine[:3, :3] / edges)) < LEAST_VOLUME:
        raise UserError(
            f"has a singular affine, {affine[:3, :3].tolist()}: its voxels have no volume; "
            f"expected three independent axes"
        )
    return affine


def _other_axes(fields: Any, shape: tuple[int, ...], affine: Array) -> str | None:
    """What the qform says where sform and qform are both given and disagree."""
    if int(fields["sform_code"]) <= 0 or int(fields["qform_code"]) <= 0:
        return None
    try:
        other = np.asarray(fields.get_qform(), np.float64)
    except (ValueError, ArithmeticError, spatialimages.HeaderDataError):
        return None  # it cannot be read, and is not used
    if not np.isfinite(other).all():
        return None
    other[:3] *= MILLIMETRES.get(int(fields["xyzt_units"]) & 7, 1.0)
    if apart(other, affine, shape) <= APART * np.linalg.norm(affine[:3, :3], axis=0).min():
        return None
    theirs, ours = ("".join(map(str, nibabel.aff2axcodes(form))) for form in (other, affine))
    return theirs if theirs != ours else ""


def apart(one: Array, other: Array, shape: tuple[int, ...]) -> float:
    """Millimetres between the corners of a volume under two affines, the farthest ones."""
    ends = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    corners = np.c_[ends, np.ones(8)].T
    return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())


def _walk(
    file: BinaryIO,
    most_bytes: int,
    kind: Kind,
    make_room: Callable[[Header], Callable[[bytes], None]],
) -> Inspected:
    """Check the header, then hand the bytes of the voxels on, piece by piece."""
    file_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    is_packed = file.read(2) == GZIP_MAGIC
    file.seek(0)
    with _unpacking():
        stream = gzip.GzipFile(fileobj=file) if is_packed else file
        header = parse(stream.read(540), kind=kind)
        _check_room(header, file_bytes, is_packed, most_bytes)
        stream.seek(header.offset)
        keep, seen, left = make_room(header), hashlib.sha256(), header.num_bytes
        ends: list[float] = []
        while left:
            chunk = stream.read(min(AT_ONCE, left))
            if len(chunk) < min(AT_ONCE, left):
                missing = left - len(chunk)
                raise UserError(f"is truncated: {missing:,} of {header.num_bytes:,} bytes missing")
            seen.update(chunk)
            keep(chunk)
            ends += _ends(np.frombuffer(chunk, header.dtype))
            left -= len(chunk)
        _check_end(header, file, stream)
    shape = header.shape if header.channels == 1 else (*header.shape, header.channels)
    facts = [shape, header.dtype.str, header.slope, header.intercept, header.affine.tolist()]
    voxels = seen.hexdigest()
    lowest = min((end * header.slope + header.intercept for end in ends), default=0.0)
    return Inspected(header, voxels, digest([facts, voxels]), lowest)


def _ends(stored: Array) -> list[float]:
    """The lowest and the highest of some values; none if no value is finite."""
    if stored.dtype.kind == "f":
        stored = stored[np.isfinite(stored)]
    return [float(stored.min()), float(stored.max())] if stored.size else []


def _check_room(header: Header, file_bytes: int, is_packed: bool, most_bytes: int) -> None:
    """What the header promises must be bearable, and possible for a file of this size."""
    needed = math.prod(header.shape) * header.channels * max(4, header.dtype.itemsize)
    if needed > most_bytes:
        raise UserError(
            f"is {times(header.shape)} voxels, {needed / 2**20:,.0f} MiB in memory; expected at "
            f"most {most_bytes / 2**20:,.0f}: crop it, or raise max_mib"
        )
    promised = header.offset + header.num_bytes
    if promised > file_bytes * (HIGHEST_RATIO if is_packed else 1):
        raise UserError(
            f"is truncated: {file_bytes:,} bytes{' (packed)' * is_packed}, but a header and "
            f"{times(header.shape)} voxels of {header.dtype.itemsize} bytes take {promised:,}"
        )


def _check_end(header: Header, file: BinaryIO, stream: Any) -> None:
    """Little may follow the voxels; reading on also compares a packed file with its checksum."""
    surplus = len(stream.read(SLACK + 1))
    if surplus <= SLACK:
        return
    promised = header.offset + header.num_bytes
    ratio = ""
    if stream is not file:
        ratio = f" (unpacking stopped at {(promised + surplus) / file.tell():.0f} to 1)"
    raise UserError(
        f"goes on for more than {SLACK:,} bytes after the {promised:,} that its header "
        f"promises{ratio}; expected {times(header.shape)} voxels and no more"
    )


@contextmanager
def _unpacking() -> Iterator[None]:
    """What cannot be unpacked is the fault of the file."""
    try:
        yield
    except EOFError:
        raise UserError("is truncated: its packed content ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"cannot be unpacked, it is damaged: {error}") from None
