"""One image file, read with care: PNG, JPEG, TIFF; 8 or 16 bit; any number of channels.

The size is taken from the header and limited before a pixel is decoded, a truncated file is an
error, and nothing is converted behind the user's back (16-bit colour PNG would become 8-bit).
Letters: C channels, H W pixels.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from trainables.errors import UserError
from trainables.late import Late

if TYPE_CHECKING:
    import tifffile
else:
    tifffile = Late("tifffile")

Array = npt.NDArray[Any]

MAX_PIXELS = 25_000_000  # of one image; some large slide should be cut up first
MAX_CHANNELS = 64
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

ImageFile.LOAD_TRUNCATED_IMAGES = False  # some packages turn it on; half an image is no image


@dataclass(frozen=True)
class Header:
    """What an image file says of itself."""

    size: tuple[int, int]  # H, W
    channels: int
    bits: int
    has_alpha: bool
    is_lossy: bool = False
    is_stack: bool = False  # pages that nobody called channels
    channel_axis: Literal[0, 2] = 2


def read(path: Path, inside: Path | None) -> bytes:
    """The bytes of a regular file, which must lie in the folder `inside`, links followed."""
    with opened(path, inside) as file:
        return file.read()


@contextmanager
def opened(path: Path, inside: Path | None) -> Iterator[BinaryIO]:
    """A regular file to read, which must lie in the folder `inside`, links followed."""
    try:
        real = path.resolve(strict=True)
        if inside is not None and not real.is_relative_to(inside.resolve()):
            raise UserError(
                f"leads out of the data folder {inside}; move it there, or set allow_outside: true"
            )
        if not stat.S_ISREG(real.stat().st_mode):
            raise UserError("is not a regular file")
        with real.open("rb") as file:
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError("does not exist") from None
    except (OSError, ValueError, RuntimeError) as error:  # a circle of links: RuntimeError
        raise UserError(f"cannot be read: {error}") from error


def inspect(data: bytes, *, as_labels: bool = False) -> Header:
    """The header of an image; a palette means colours in pictures and indices in labels."""
    is_tiff = data[:4] in TIFF_MAGIC
    with _reading():
        header = _inspect_tiff(data, as_labels) if is_tiff else _inspect_pillow(data, as_labels)
    height, width = header.size
    if height * width > MAX_PIXELS or header.channels > MAX_CHANNELS:
        raise UserError(
            f"is {height}x{width} with {header.channels} channels; expected at most "
            f"{MAX_PIXELS // 10**6} megapixels and {MAX_CHANNELS} channels: cut it up first"
        )
    return header


def pixels(data: bytes, *, as_labels: bool = False) -> Array:
    """The decoded image (C, H, W), uint8 or uint16; `inspect` comes first."""
    is_tiff = data[:4] in TIFF_MAGIC
    with _reading():
        array = _decode_tiff(data, as_labels) if is_tiff else _decode_pillow(data, as_labels)
    return np.ascontiguousarray(array)


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever a decoder stumbles over is the fault of the file."""
    try:
        yield
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"is larger than {MAX_PIXELS // 10**6} megapixels: cut it up first"
        ) from None
    except UnidentifiedImageError:
        raise UserError("is not a PNG, JPEG or TIFF image") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot be decoded, it may be truncated: {reason}") from error


def _inspect_pillow(data: bytes, as_labels: bool) -> Header:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        mode, (width, height), kind = image.mode, image.size, image.format
        frames = getattr(image, "n_frames", 1) if kind == "PNG" else 1
    if mode not in PILLOW_MODES or frames > 1:
        raise UserError(f"is a {kind} of mode {mode} with {frames} frames; expected grey or RGB")
    if data.startswith(PNG_MAGIC) and data[24] == 16 and data[25] != PNG_GREY:
        raise UserError("is a colour PNG of 16 bits, which would be read as 8; save it as TIFF")
    channels, bits, has_alpha = PILLOW_MODES[mode]
    if as_labels and mode == "P":
        channels = 1
    return Header((height, width), channels, bits, has_alpha, is_lossy=kind != "PNG")


def _decode_pillow(data: bytes, as_labels: bool) -> Array:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
        image.load()
        if image.mode in ("1", "P") and not as_labels:
            array = np.asarray(image.convert("L" if image.mode == "1" else "RGB"))
        else:
            array = np.asarray(image)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.dtype.byteorder == ">":
        array = array.astype(np.uint16)
    return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


def _inspect_tiff(data: bytes, as_labels: bool) -> Header:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        if len(tiff.series) != 1:
            raise UserError(f"holds {len(tiff.series)} images; expected one")
        series, page = tiff.series[0], tiff.series[0].keyframe
        shape, axes, dtype = series.shape, series.axes, np.dtype(series.dtype)
        is_palette = page.photometric == tifffile.PHOTOMETRIC.PALETTE
        has_alpha = page.samplesperpixel in (2, 4) and any(kind != 0 for kind in page.extrasamples)
        is_lossy = page.compression in (6, 7)
    if dtype not in (np.uint8, np.uint16, np.bool_):
        raise UserError(f"holds {dtype} values; expected unsigned integers of 8 or 16 bits")
    if is_palette and not as_labels:
        raise UserError("is a TIFF with a palette; save it as RGB")
    if axes not in ("YX", "YXS") and not (len(axes) == 3 and axes.endswith("YX")):
        raise UserError(f"has the axes {axes} of {shape}; expected height, width and channels")
    bits = 16 if dtype == np.uint16 else 8
    if len(axes) == 2:
        return Header((shape[0], shape[1]), 1, bits, False, is_lossy)
    if axes == "YXS":
        return Header((shape[0], shape[1]), shape[2], bits, has_alpha, is_lossy)
    is_stack = axes[0] not in "CS"
    return Header((shape[1], shape[2]), shape[0], bits, has_alpha, is_lossy, is_stack, 0)


def _decode_tiff(data: bytes, as_labels: bool) -> Array:
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
        try:
            array = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error) or header.channel_axis == 0:
                raise
            array = _decode_pillow(data, as_labels=True)  # it knows LZW and JPEG in TIFF
            if array.shape != (header.channels, *header.size) or header.bits != _bits(array):
                raise
            return array
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * (1 if as_labels else 255)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and not as_labels:
        array = np.invert(array)
    if array.ndim == 2:
        return np.asarray(array[None])
    return np.moveaxis(array, header.channel_axis, 0)


def _bits(array: Array) -> int:
    return 8 * array.dtype.itemsize
