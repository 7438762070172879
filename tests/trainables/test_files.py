"""One image file, read as every viewer shows it. pytest tests/trainables/test_files.py"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from trainables.data import files
from trainables.errors import UserError

HEIGHT_WIDTH = (48, 64)  # tiles of TIFF are multiples of 16


def texture(seed: int, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


COMPRESSIONS = [None, "lzw", "zlib", "packbits", "zstd", "lzma"]


@pytest.mark.parametrize("as_labels", [False, True])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_grey_tiff_is_the_same_however_it_is_packed(
    compression: str | None,
    dtype: Any,
    tile: tuple[int, int] | None,
    photometric: str,
    as_labels: bool,
) -> None:
    """WhiteIsZero inverts a picture, and no labels, which are numbers."""
    array = texture(1, *HEIGHT_WIDTH, dtype=dtype)
    data = tiff(array, compression=compression, tile=tile, photometric=photometric)
    header = files.inspect(data, as_labels=as_labels)
    assert (header.size, header.channels) == (HEIGHT_WIDTH, 1)
    expected = ~array if photometric == "miniswhite" and not as_labels else array
    np.testing.assert_array_equal(files.pixels(data, as_labels=as_labels)[0], expected)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_colour_tiff_is_the_same_however_it_is_packed(
    compression: str | None, dtype: Any, tile: tuple[int, int] | None, planar: str
) -> None:
    array = texture(2, 3, *HEIGHT_WIDTH, dtype=dtype)
    stored = array if planar == "separate" else array.transpose(1, 2, 0)
    data = tiff(stored, compression=compression, tile=tile, photometric="rgb", planarconfig=planar)
    assert files.inspect(data).channels == 3
    np.testing.assert_array_equal(files.pixels(data), array)


@pytest.mark.parametrize(
    "compression", ["raw", "tiff_lzw", "group3", "group4", "packbits", "tiff_deflate"]
)
def test_one_bit_tiff_is_black_and_white_however_it_is_packed(compression: str) -> None:
    """As pictures 0 and 255, as labels 0 and 1; Pillow reads the same."""
    is_set = texture(3, *HEIGHT_WIDTH) > 127
    data = saved(Image.fromarray(is_set), "TIFF", compression=compression)
    seen = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    np.testing.assert_array_equal(files.pixels(data)[0], seen)
    assert set(np.unique(seen).tolist()) == {0, 255}
    labels = files.pixels(data, as_labels=True)[0]
    np.testing.assert_array_equal(labels, is_set)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_an_orientation_turns_the_picture_as_viewers_do(kind: str, orientation: int) -> None:
    picture = Image.fromarray(texture(4, *HEIGHT_WIDTH, 3))
    if kind == "TIFF":
        data = tiff(np.asarray(picture), photometric="rgb", extratags=[(274, 3, 1, orientation)])
    else:
        exif = Image.Exif()
        exif[274] = orientation
        data = saved(picture, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).transpose(2, 0, 1)
    header = files.inspect(data)
    assert header.size == seen.shape[1:] and header.orientation == orientation
    np.testing.assert_array_equal(files.pixels(data), seen)


def test_what_is_no_orientation_turns_nothing() -> None:
    exif = Image.Exif()
    exif[274] = 0
    array = texture(4, *HEIGHT_WIDTH)
    np.testing.assert_array_equal(
        files.pixels(saved(Image.fromarray(array), "PNG", exif=exif))[0], array
    )


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG"])
def test_bmp_and_gif_are_read_with_their_palettes(kind: str) -> None:
    """A palette means colours in pictures and indices in labels."""
    index = texture(5, *HEIGHT_WIDTH) % 3
    colours = [(0, 0, 0), (200, 30, 40), (10, 220, 90)]
    picture = Image.fromarray(index)
    picture.putpalette([level for colour in colours for level in colour])
    data = saved(picture, kind)
    np.testing.assert_array_equal(files.pixels(data, as_labels=True)[0], index)
    expected = np.array(colours, np.uint8)[index].transpose(2, 0, 1)
    np.testing.assert_array_equal(files.pixels(data), expected)
    assert files.colours_of(data) == dict(enumerate(colours))
    assert files.inspect(data, as_labels=True).has_palette


def test_a_palette_of_a_tiff_is_known_too() -> None:
    index = texture(6, *HEIGHT_WIDTH) % 2
    palette = np.zeros((3, 256), np.uint16)
    palette[:, 1] = (65535, 0, 257)
    data = tiff(index, photometric="palette", colormap=palette)
    assert files.colours_of(data) == {0: (0, 0, 0), 1: (255, 0, 1)}
    np.testing.assert_array_equal(files.pixels(data, as_labels=True)[0], index)


def test_moving_pictures_are_refused() -> None:
    frames = [Image.fromarray(texture(seed, 8, 8)) for seed in (1, 2)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="with 2 frames"):
        files.inspect(data)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float32, np.int8])
def test_masks_and_pictures_may_hold_any_numbers(dtype: Any) -> None:
    mask = (texture(7, *HEIGHT_WIDTH) % 5).astype(dtype) - dtype(0 if dtype is np.uint32 else 1)
    data = tiff(mask)
    np.testing.assert_array_equal(files.pixels(data, as_labels=True)[0], mask)
    assert files.inspect(data).bits == 32
    assert files.pixels(data).dtype == dtype
    np.testing.assert_array_equal(files.pixels(data)[0], mask)


def test_only_what_is_read_otherwise_than_before_says_so() -> None:
    """Such files make other data of a study that release 0.1 began; all others do not."""
    grey = texture(8, *HEIGHT_WIDTH)
    plain = [
        tiff(grey),
        tiff(grey, compression="zlib", photometric="miniswhite"),
        tiff(grey, compression="lzw"),
        saved(Image.fromarray(grey), "PNG"),
        saved(Image.fromarray(grey > 9), "TIFF", compression="raw"),
    ]
    assert not any(files.inspect(data).is_read_anew for data in plain)
    anew = [
        tiff(grey, compression="lzw", photometric="miniswhite"),
        saved(Image.fromarray(grey > 9), "TIFF", compression="group4"),
        tiff(grey, extratags=[(274, 3, 1, 3)]),
    ]
    assert all(files.inspect(data).is_read_anew for data in anew)
