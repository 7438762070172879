"""NIfTI files: what is read, and what is refused by its header before memory is taken."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from trainables.data import files, nifti
from trainables.data.nifti import SLACK, inspect, load, values
from trainables.errors import UserError

MIB = 2**20
# bytes of the header of version 1
DIM, DATATYPE, OFFSET, SLOPE, INTERCEPT = 40, 70, 108, 112, 116
UNITS, QFORM, SFORM, SROW, MAGIC = 123, 252, 254, 280, 344


def save(path: Path, array: np.ndarray, affine: Any = None) -> Path:
    """A file as other programs write it; an affine in mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def ramp(*shape: int, dtype: Any = np.int16) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def patched(path: Path, place: int, form: str, *numbers: Any) -> Path:
    """The file with some bytes of its header replaced."""
    raw = path.read_bytes()
    is_packed = raw[:2] == b"\x1f\x8b"
    content = bytearray(gzip.decompress(raw) if is_packed else raw)
    struct.pack_into(f"<{form}", content, place, *numbers)
    path.write_bytes(gzip.compress(content) if is_packed else content)
    return path


def refusal(path: Path, most: int = 64 * MIB) -> str:
    with pytest.raises(UserError) as caught:
        values(*header_and_voxels(path, most))
    return str(caught.value)


def header_and_voxels(path: Path, most: int = 64 * MIB) -> Any:
    found, stored = load(path, None, most)
    return found.header, stored


# --- what is read ---


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "f4", "f8", ">i2"])
def test_voxels_are_those_that_were_written(tmp_path, suffix, dtype):
    array = ramp(3, 4, 5, dtype=dtype)
    volume = nibabel.Nifti1Image(array, np.diag([1, 2, 3, 1]), dtype=array.dtype)
    if dtype == ">i2":
        volume = volume.__class__(array, volume.affine, volume.header.as_byteswapped(">"))
    nibabel.save(volume, tmp_path / f"a{suffix}")
    header, stored = header_and_voxels(tmp_path / f"a{suffix}")
    assert header.dtype.newbyteorder("=") == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(values(header, stored), array)
    assert header.shape == (3, 4, 5) and header.spacing == (1, 2, 3) and header.is_placed


def test_the_second_version_of_the_format_is_read_too(tmp_path):
    nibabel.save(nibabel.Nifti2Image(ramp(3, 4, 5), np.eye(4)), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(header_and_voxels(tmp_path / "a.nii.gz")[1], ramp(3, 4, 5))


def test_stored_numbers_are_scaled_as_the_header_says(tmp_path):
    path = save(tmp_path / "a.nii", ramp(2, 2, 2))
    patched(path, SLOPE, "ff", 0.5, -3.0)
    assert values(*header_and_voxels(path)).ravel().tolist() == [n / 2 - 3 for n in range(8)]
    patched(path, SLOPE, "ff", 0.0, 7.0)  # a slope of 0 says: not scaled
    np.testing.assert_array_equal(values(*header_and_voxels(path)), ramp(2, 2, 2))


def test_whole_numbers_of_32_bits_are_not_rounded(tmp_path):
    array = np.array([[[2**30, 2**30 + 1]]], np.int32)
    path = save(tmp_path / "a.nii", array)
    assert values(*header_and_voxels(path)).tolist() == [[[2**30, 2**30 + 1]]]


def test_trailing_axes_of_one_are_left_out_and_units_are_millimetres(tmp_path):
    path = save(tmp_path / "a.nii.gz", ramp(3, 4, 5, 1, 1))
    assert header_and_voxels(path)[0].shape == (3, 4, 5)
    patched(path, UNITS, "B", 3)  # micrometres
    assert header_and_voxels(path)[0].spacing == pytest.approx((1e-3,) * 3)


def test_the_hashes_follow_voxels_and_header_but_not_the_packing(tmp_path):
    one = inspect(save(tmp_path / "a.nii", ramp(3, 4, 5)), None, MIB)
    packed = inspect(save(tmp_path / "b.nii.gz", ramp(3, 4, 5)), None, MIB)
    assert (one.voxels, one.identity) == (packed.voxels, packed.identity)
    moved = inspect(save(tmp_path / "c.nii", ramp(3, 4, 5), np.diag([2, 1, 1, 1])), None, MIB)
    assert moved.voxels == one.voxels and moved.identity != one.identity
    other = inspect(save(tmp_path / "d.nii", ramp(3, 4, 5) + np.int16(1)), None, MIB)
    assert other.voxels != one.voxels


def test_a_header_without_orientation_is_told(tmp_path):
    path = save(tmp_path / "a.nii", ramp(3, 4, 5))
    patched(patched(path, QFORM, "h", 0), SFORM, "h", 0)
    assert not header_and_voxels(path)[0].is_placed


# --- what is refused ---


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def volume(folder: Path, suffix: str = ".nii") -> Path:
    return save(folder / f"a{suffix}", ramp(6, 7, 8))


def with_holes(folder: Path) -> Path:
    array = ramp(6, 7, 8, dtype=np.float32)
    array[0, 0, :2], array[1, 1, 1] = np.nan, -np.inf
    return save(folder / "a.nii.gz", array)


def packed_bomb(folder: Path) -> Path:
    """A header for 672 bytes, and a hundred MiB of zeros after them."""
    content = volume(folder).read_bytes() + bytes(100 * MIB)
    return write(folder / "a.nii.gz", gzip.compress(content))


def damaged(folder: Path) -> Path:
    content = bytearray(volume(folder, ".nii.gz").read_bytes())
    content[-6] ^= 1  # in the checksum
    return write(folder / "a.nii.gz", bytes(content))


def noise(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    path = save(folder / "a.nii.gz", rng.integers(0, 9999, (20, 20, 20)).astype(np.int16))
    return write(path, path.read_bytes()[:-2000])


def cells(*numbers: int) -> Any:
    return lambda f: patched(volume(f), DIM, f"{len(numbers)}h", *numbers)


BAD = {
    "does not exist": lambda f: f / "gone.nii",
    "is not a regular file": lambda f: f,
    "is not a NIfTI file (.nii or .nii.gz)": lambda f: write(f / "a.nii", b"\x89PNG" * 200),
    "is not a NIfTI file (.nii": lambda f: write(f / "a.nii", b""),
    "is not a NIfTI file: its magic": lambda f: patched(volume(f), MAGIC, "4s", b"\0"),
    "header of a pair": lambda f: patched(volume(f), MAGIC, "4s", b"ni1"),
    "is truncated: 300 bytes, less than a header of 348": lambda f: write(
        f / "a.nii", volume(f).read_bytes()[:300]
    ),
    "says that it has 9 axes": cells(9),
    "has the size 6x0x8; expected edges of 1 to 32767": cells(3, 6, 0, 8),
    "has the size 6x-7x8": cells(3, 6, -7, 8),
    "has 2 axes, 6x7; expected one 3-D volume": cells(2, 6, 7),
    "has 4 axes, 6x7x4x2; expected one 3-D volume; name the volumes": cells(4, 6, 7, 4, 2),
    "is 32767x32767x32767 voxels": cells(3, 32767, 32767, 32767),
    "is truncated: 1,024 bytes, but a header and 6x7x9 voxels of 2 bytes": cells(3, 6, 7, 9),
    "type 32 (complex64); expected": lambda f: patched(volume(f), DATATYPE, "h", 32),
    "type 128 (RGB); expected": lambda f: patched(volume(f), DATATYPE, "h", 128),
    "type 77 (unknown)": lambda f: patched(volume(f), DATATYPE, "h", 77),
    "begin at byte 12; expected 352": lambda f: patched(volume(f), OFFSET, "f", 12.0),
    "begin at byte 1e+30": lambda f: patched(volume(f), OFFSET, "f", 1e30),
    "begin at byte nan": lambda f: patched(volume(f), OFFSET, "f", np.nan),
    "scales its values by inf": lambda f: patched(volume(f), SLOPE, "ff", np.inf, 0.0),
    "scales its values by 1.0 and adds nan": lambda f: patched(volume(f), SLOPE, "ff", 1.0, np.nan),
    "affine that is not finite": lambda f: patched(volume(f), SROW, "f", np.nan),
    "affine that is not finite (NaN or": lambda f: patched(volume(f), SROW, "f", np.inf),
    "has a singular affine": lambda f: patched(volume(f), SROW, "4f", 0, 1, 0, 0),
    "has a singular affine, [[1.0, 1.0, 0.0], [1.0, 1.0": lambda f: patched(
        volume(f), SROW, "8f", 1, 1, 0, 0, 1, 1, 0, 0
    ),
    "is truncated: its packed content ends too early": noise,
    "cannot be unpacked, it is damaged": damaged,
    "holds 3 voxels that are no number (NaN or infinite) of 336": with_holes,
    "goes on for more than 1,048,576 bytes after the 1,024": packed_bomb,
    "after the 1,024 that its header promises; expected 6x7x8": lambda f: write(
        f / "b.nii", volume(f).read_bytes() + bytes(SLACK + 1)
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_files_are_refused_with_what_was_found(tmp_path, reason):
    assert reason in refusal(BAD[reason](tmp_path))


def test_edges_of_version_2_are_limited_as_well(tmp_path):
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti2Image(ramp(6, 7, 8), np.eye(4)), path)
    patched(path, 16, "4q", 3, 2**40, 7, 8)
    assert f"has the size {2**40}x7x8; expected edges of 1 to 32767" in refusal(path)


def test_the_limit_counts_voxels_as_they_are_worked_with(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((64, 64, 64), np.uint8))  # 1 MiB at 4 bytes
    assert inspect(path, None, MIB).header.shape == (64, 64, 64)
    assert "64x64x64 voxels, 1 MiB in memory; expected at most 1" in refusal(path, MIB - 1)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_promises_too_much_costs_no_memory(tmp_path, suffix):
    path = patched(volume(tmp_path, suffix), DIM, "4h", 3, 10000, 10000, 2)  # 763 MiB in memory
    tracemalloc.start()
    assert "is truncated" in refusal(path, 2**31)
    assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    tracemalloc.stop()


def test_a_bomb_is_not_unpacked_and_its_ratio_is_told(tmp_path):
    path = packed_bomb(tmp_path)
    tracemalloc.start()
    text = refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    tracemalloc.stop()
    ratio = int(text.split("unpacking stopped at ")[1].split(" to 1")[0])
    assert 50 < ratio < 1100


def test_files_must_lie_in_the_data_folder(tmp_path):
    path = volume(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="leads out of the data folder"):
        inspect(path, tmp_path / "data", MIB)


# --- planes ---


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 1, 7), (1, 5, 7), (5, 7, 1, 1)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_plane_is_a_picture_with_up_upwards(tmp_path, shape, suffix):
    stored = np.arange(35, dtype=np.float32).reshape(shape) / 10 - 1
    path = save(tmp_path / f"p{suffix}", stored)
    data = path.read_bytes()
    header = files.inspect(data)
    assert (header.size, header.channels, header.bits) == ((7, 5), 1, 32)
    picture = files.pixels(data)
    assert picture.shape == (1, 7, 5) and picture.dtype == np.float32
    np.testing.assert_array_equal(picture[0], stored.reshape(5, 7).T[::-1])


def test_a_plane_stored_along_other_axes_is_the_same_picture(tmp_path):
    stored = np.arange(35, dtype=np.int16).reshape(5, 7, 1)
    expected = files.pixels(save(tmp_path / "straight.nii", stored).read_bytes())
    turned = save(tmp_path / "turned.nii", stored[::-1, ::-1], np.diag([-1, -1, 1, 1]))
    np.testing.assert_array_equal(files.pixels(turned.read_bytes()), expected)
    scaled = nibabel.Nifti1Image(stored / 10, np.eye(4))
    scaled.set_data_dtype(np.int16)
    nibabel.save(scaled, tmp_path / "scaled.nii")
    found = files.pixels((tmp_path / "scaled.nii").read_bytes())
    np.testing.assert_allclose(found, expected / 10, atol=1e-3)


def test_a_volume_is_no_picture_and_a_picture_no_volume(tmp_path):
    volume = save(tmp_path / "v.nii.gz", np.zeros((4, 5, 6), np.int16))
    with pytest.raises(UserError, match="expected one plane: volumes are read by source: volumes"):
        files.inspect(volume.read_bytes())
    plane = save(tmp_path / "p.nii.gz", np.zeros((4, 5), np.int16))
    with pytest.raises(UserError, match=r"has 2 axes, 4x5; .*planes are read by source: images"):
        nifti.inspect(plane, None, 2**20)


def test_a_plane_is_not_unpacked_further_than_the_limit(tmp_path):
    path = save(tmp_path / "p.nii.gz", np.zeros((3000, 3000), np.int16))
    with pytest.raises(UserError, match="expected at most 8"):
        files.inspect(path.read_bytes(), megapixels=1)
