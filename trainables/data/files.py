"""One image file, read as every viewer shows it: PNG, JPEG, BMP, GIF, TIFF, NIfTI of one plane.

The size is taken from the header and limited before a pixel is decoded, a truncated file is an
error, and nothing is converted behind the user's back (16-bit colour PNG would become 8-bit). What
a file says of itself is obeyed: an orientation (EXIF, TIFF) turns the picture, and in pictures, not
in labels, WhiteIsZero inverts the grey and a palette means colours. One decoder reads each format.
Letters: C channels, H W pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from trainables.data import nifti
from trainables.errors import UserError
from trainables.late import Late

if TYPE_CHECKING:
    import tifffile
else:
    tifffile = Late("tifffile")

Array = npt.NDArray[Any]
Colour = tuple[int, int, int]  # red, green, blue of 0 to 255

MEGAPIXEL = 10**6
LARGEST_VALUE = 8  # bytes
DEFAULT_MEGAPIXELS = 25  # of one image, at most
MAX_CHANNELS = 64
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", *nifti.SUFFIXES)
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "GIF")
PILLOW_MODES = {  # mode -> channels, bits, has an alpha channel
    "1": (1, 8, False),
    "L": (1, 8, False),
    "P": (3, 8, False),
    "LA": (2, 8, True),
    "RGB": (3, 8, False),
    "RGBA": (4, 8, True),
    "I;16": (1, 16, False),
    "I;16B": (1, 16, False),
}
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_GREY = 0
# Without one of them a PNG has no EXIF, for which Pillow would decode all of it
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
PICTURE_TYPES = (np.uint8, np.uint16, np.bool_)
READ_ALIKE = (1, 8, 32773, 32946)  # compressions of TIFF: none, Deflate, PackBits
UPRIGHT = 1  # orientation of EXIF and TIFF: the first row on top, the first column left
# orientation -> (rows and columns change places, then rows are reversed, columns are reversed)
TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

ImageFile.LOAD_TRUNCATED_IMAGES = False  # some packages turn it on; half an image is no image


@dataclass(frozen=True)
class Header:
    """What an image file says of itself."""

    size: tuple[int, int]  # H, W, turned upright
    channels: int
    bits: int  # of grey or colours from 0 on; 32: numbers of any unit
    has_alpha: bool
    is_lossy: bool = False
    is_stack: bool = False  # pages that nobody called channels
    channel_axis: Literal[0, 2] = 2
    orientation: int = UPRIGHT  # as it is stored
    has_palette: bool = False
    is_read_anew: bool = False  # otherwise than release 0.1 did


def inspect(
    data: bytes, *, as_labels: bool = False, megapixels: int = DEFAULT_MEGAPIXELS
) -> Header:
    """The header of an image; a palette means colours in pictures and indices in labels."""
    with _reading():
        if nifti.is_nifti(data):
            plane = nifti.inspect_plane(data, megapixels * MEGAPIXEL * LARGEST_VALUE)
            header = Header(plane, 1, 32, has_alpha=False)
            _check_room(header.size, header.channels, megapixels)
        elif data[:4] in TIFF_MAGIC:
            header = _inspect_tiff(data, as_labels)
            _check_room(header.size, header.channels, megapixels)
        else:
            header = _inspect_pillow(data, as_labels, megapixels)
    if TURNS[header.orientation][0]:
        header = replace(header, size=header.size[::-1])
    return header


def pixels(data: bytes, *, as_labels: bool = False) -> Array:
    """The decoded image (C, H, W), upright; `inspect` comes first.

    uint8 or uint16; numbers of any unit, and labels, as they are stored.
    """
    with _reading():
        if nifti.is_nifti(data):
            return nifti.plane(data)[None]
        if data[:4] in TIFF_MAGIC:
            header, array = _decode_tiff(data, as_labels)
        else:
            header, array = _decode_pillow(data, as_labels)
    is_turned, *is_reversed = TURNS[header.orientation]
    if is_turned:
        array = array.swapaxes(1, 2)
    rows, columns = (slice(None, None, -1 if backwards else 1) for backwards in is_reversed)
    return np.ascontiguousarray(array[:, rows, columns])


def colours_of(data: bytes) -> dict[int, Colour]:
    """The colour of each index that a picture with a palette uses."""
    with _reading():
        if data[:4] in TIFF_MAGIC:
            with tifffile.TiffFile(io.BytesIO(data)) as tiff:
                levels_3K = tiff.series[0].keyframe.colormap >> 8
            palette = levels_3K.T
        else:
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                palette = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
    used = np.unique(pixels(data, as_labels=True)).tolist()
    return {index: tuple(palette[index].tolist()) for index in used if index < len(palette)}


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever a decoder stumbles over is the fault of the file."""
    try:
        yield
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            "is larger than 89 megapixels, more than are read of such files: cut it up, or save it "
            "as TIFF"
        ) from None
    except UnidentifiedImageError:
        raise UserError("is not a PNG, JPEG, BMP, GIF, TIFF or NIfTI image") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot be decoded, it may be truncated: {reason}") from error


def _check_room(size: tuple[int, int], channels: int, megapixels: float) -> None:
    height, width = size
    if height * width > megapixels * MEGAPIXEL or channels > MAX_CHANNELS:
        raise UserError(
            f"is {height}x{width} with {channels} channels; expected at most {megapixels} "
            f"megapixels and {MAX_CHANNELS} channels: cut it up, or raise max_megapixels"
        )


def _inspect_pillow(data: bytes, as_labels: bool, megapixels: float) -> Header:
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        mode, (width, height), kind = image.mode, image.size, image.format
        frames = getattr(image, "n_frames", 1) if kind in ("PNG", "GIF") else 1
        _check_room((height, width), len(image.getbands()), megapixels)
        orientation = UPRIGHT
        if kind != "PNG" or any(word in data for word in PNG_EXIF):
            orientation = _known(image.getexif().get(ExifTags.Base.Orientation))
    if mode not in PILLOW_MODES or frames > 1:
        raise UserError(f"is a {kind} of mode {mode} with {frames} frames; expected grey or RGB")
    if data.startswith(PNG_MAGIC) and data[24] == 16 and data[25] != PNG_GREY:
        raise UserError("is a colour PNG of 16 bits, which would be read as 8; save it as TIFF")
    channels, bits, has_alpha = PILLOW_MODES[mode]
    if as_labels and mode == "P":
        channels = 1
    return Header(
        (height, width),
        channels,
        bits,
        has_alpha,
        is_lossy=kind == "JPEG",
        orientation=orientation,
        has_palette=mode == "P",
        is_read_anew=orientation != UPRIGHT,
    )


def _decode_pillow(data: bytes, as_labels: bool) -> tuple[Header, Array]:
    header = _inspect_pillow(data, as_labels, math.inf)
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        image.load()
        if image.mode in ("1", "P") and not as_labels:
            array = np.asarray(image.convert("L" if image.mode == "1" else "RGB"))
        else:
            array = np.asarray(image)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.dtype.byteorder == ">":
        array = array.astype(np.uint16)
    return header, array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def _inspect_tiff(data: bytes, as_labels: bool) -> Header:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        if len(tiff.series) != 1:
            raise UserError(f"holds {len(tiff.series)} images; expected one")
        series, page = tiff.series[0], tiff.series[0].keyframe
        shape, axes, dtype = series.shape, series.axes, np.dtype(series.dtype)
        is_palette = page.photometric == tifffile.PHOTOMETRIC.PALETTE
        has_alpha = page.samplesperpixel in (2, 4) and any(kind != 0 for kind in page.extrasamples)
        is_lossy = page.compression in (6, 7)
        tag = page.tags.get("Orientation")
        orientation = _known(tag.value if tag else None)
        is_inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        was_left_to_pillow = page.compression not in READ_ALIKE
    if dtype not in PICTURE_TYPES and dtype.kind not in "iuf":
        raise UserError(f"holds {dtype} values; expected integers or floats")
    if is_palette and not as_labels:
        raise UserError("is a TIFF with a palette; save it as RGB")
    if axes not in ("YX", "YXS") and not (len(axes) == 3 and axes.endswith("YX")):
        raise UserError(f"has the axes {axes} of {shape}; expected height, width and channels")
    bits = 8 if dtype in (np.uint8, np.bool_) else 16 if dtype == np.uint16 else 32
    header = Header(
        (shape[0], shape[1]),
        1,
        bits,
        has_alpha=False,
        is_lossy=is_lossy,
        orientation=orientation,
        has_palette=is_palette,
        is_read_anew=orientation != UPRIGHT
        or (was_left_to_pillow and (is_inverted or dtype == np.bool_)),
    )
    if len(axes) == 2:
        return header
    if axes == "YXS":
        return replace(header, channels=shape[2], has_alpha=has_alpha)
    size, is_stack = (shape[1], shape[2]), axes[0] not in "CS"
    return replace(
        header,
        size=size,
        channels=shape[0],
        has_alpha=has_alpha,
        is_stack=is_stack,
        channel_axis=0,
    )


def _decode_tiff(data: bytes, as_labels: bool) -> tuple[Header, Array]:
    header = _inspect_tiff(data, as_labels)
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        series, page = tiff.series[0], tiff.series[0].keyframe
        for part in series.pages:
            # tifffile fills in what is missing, without a word
            if part is None or any(
                start + length > len(data) or not length
                for start, length in zip(part.dataoffsets, part.databytecounts, strict=True)
            ):
                raise UserError("is truncated")
        array = series.asarray()
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * (1 if as_labels else 255)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and not as_labels:
        if array.dtype.kind == "f":
            raise UserError("is WhiteIsZero in floats; expected BlackIsZero: save it anew")
        array = np.invert(array)
    if array.ndim == 2:
        return header, array[None]
    return header, np.moveaxis(array, header.channel_axis, 0)


def _known(orientation: Any) -> int:
    """What is no orientation counts as none, as viewers have it."""
    return int(orientation) if orientation in TURNS else UPRIGHT
