"""Six folders as people have them, made of real images: for `init`, `check` and `try` by hand.

    python -m tests.folders DATA OUT

DATA is a folder of data sets with a manifest.csv of the columns dataset, image, mask, source_id and
shape. What is asked: `maskstudy init OUT/NAME -o NAME.yaml` and `maskstudy check NAME.yaml`, and
nothing has to be edited.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

BLOOD = {0: (255, 255, 255), 1: (200, 60, 60), 2: (90, 40, 160), 3: (30, 160, 90)}
MOST = 60  # images of each folder


class Pair(NamedTuple):
    image: Path
    mask: Path
    name: str
    source: str


def pairs(data: Path, name: str) -> Iterator[Pair]:
    """The first images of a data set with their masks."""
    with (data / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == name]
    for row in rows[:: max(1, len(rows) // MOST)][:MOST]:
        image = data / row["image"]
        name_of = image.name.split(".")[0]
        yield Pair(image, data / row["mask"], name_of, row["source_id"])


def cellpose(data: Path, out: Path) -> None:
    """Pictures with numbered objects beside them, in a folder for each kind of slide."""
    for number, pair in enumerate(pairs(data, "nuclei_dsb")):
        plate = out / f"plate{number // 10:02}"
        plate.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pair.image, plate / f"{pair.name}{pair.image.suffix}")
        numbers = np.asarray(Image.open(pair.mask.parent.parent / "instances" / pair.mask.name))
        tifffile.imwrite(plate / f"{pair.name}_cp_masks.tif", numbers.astype(np.uint16))


def colours(data: Path, out: Path) -> None:
    """Masks in colour, and a table with semicolons."""
    palette = np.array([BLOOD[index] for index in range(4)], np.uint8)
    lines = ["File;Mask;Patient"]
    for folder in ("smears", "drawn"):
        (out / folder).mkdir(parents=True)
    for pair in pairs(data, "blood_bccd_160"):
        shutil.copyfile(pair.image, out / "smears" / pair.image.name)
        mask = palette[np.asarray(Image.open(pair.mask))]
        Image.fromarray(mask).save(out / f"drawn/{pair.name}.png")
        lines.append(f"smears/{pair.image.name};drawn/{pair.name}.png;{pair.source}")
    (out / "table.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig")


def nnunet(data: Path, out: Path) -> None:
    """Volumes as nnU-Net has them."""
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(parents=True)
    for pair in pairs(data, "hippocampus3d"):
        suffix = pair.image.name[pair.image.name.index(".") :]
        shutil.copyfile(pair.image, out / f"imagesTr/{pair.name}_0000{suffix}")
        shutil.copyfile(pair.mask, out / f"labelsTr/{pair.name}{suffix}")
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    (out / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": suffix}))


def deep(data: Path, out: Path) -> None:
    """TIFF of 16 bits, and masks of 0 and 255 in a folder of another name."""
    for folder in ("raw", "annotations"):
        (out / folder).mkdir(parents=True)
    for pair in pairs(data, "nuclei_dsb"):
        grey = np.asarray(Image.open(pair.image).convert("L"), np.uint16) * 150 + 300
        tifffile.imwrite(out / f"raw/{pair.name}.tif", grey, compression="lzw")
        mask = np.where(np.asarray(Image.open(pair.mask)) > 0, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(out / f"annotations/{pair.name}.png")


def phone(data: Path, out: Path) -> None:
    """Photos held in all ways, and masks that were drawn on what a viewer shows."""
    out.mkdir(parents=True)
    for number, pair in enumerate(pairs(data, "blood_wbc_d1")):
        exif = Image.Exif()
        exif[274], turns = ((1, 0), (3, 2), (6, 1), (8, 3))[number % 4]
        picture = np.rot90(np.asarray(Image.open(pair.image).convert("RGB")), turns)
        photo = Image.fromarray(np.ascontiguousarray(picture))
        photo.save(out / f"IMG_{number:04}.jpg", exif=exif, quality=92)
        shutil.copyfile(pair.mask, out / f"IMG_{number:04}_mask.png")


def alone(data: Path, out: Path) -> None:
    """Pictures without a mask."""
    out.mkdir(parents=True)
    for pair in pairs(data, "blood_chula_unlabelled"):
        shutil.copyfile(pair.image, out / pair.image.name)


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "cellpose": cellpose,
    "colours": colours,
    "nnunet": nnunet,
    "deep": deep,
    "phone": phone,
    "alone": alone,
}


if __name__ == "__main__":
    for name, make in FOLDERS.items():
        make(Path(sys.argv[1]), Path(sys.argv[2]) / name)
