"""Pictures of a few arms: what the best, the control and the worst make of the same images.

Of volumes there are sheets too: frames of planes below each other, which the page leafs through.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, UnidentifiedImageError

from analysis.figures.ranking import best_arm, ranking_numbers
from analysis.tables import StudyTables, final, lines_of
from analysis.theme import plain
from study.reader import MAX_BYTES

BEST_ARMS = 3
MOST_PIXELS = 25_000_000  # checked in the header, before anything is decoded
WIDEST = 1200  # pixels that a page can show
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,  # what Pillow raises for some broken PNG chunks
    Image.DecompressionBombWarning,
    Image.DecompressionBombError,
)
KINDS = {
    "reconstruction": "image | hidden (grey) | reconstructed",
    "segmentation": "image | truth | predicted",
}


MASKS = re.compile(r"masks-(\d{3})\.png")  # drawn at this per cent of pretraining
MASKS_NUMBERS = "masks.json"
CHANGING = 2  # last columns of a picture of masks; the others are the same throughout
GAP = 4  # pixels between the tiles of a picture
SLICES = "slices.json"
MOST_FRAMES, MOST_COLUMNS, MOST_PLANES = 64, 8, 12
MOST_SHEET_BYTES = 3_000_000  # trials keep to a third of it


class Slices(NamedTuple):
    """Frames below each other as a data URI, or why there is none."""

    uri: str | None
    says: str
    columns: list[str]
    planes: list[tuple[str, float]]  # from top to bottom, with their shares of a frame's height
    frames: int
    aspect: float  # width of a frame over its height

    @property
    def middle(self) -> int:
        """The frame shown first, from 0."""
        return self.frames // 2


class Picture(NamedTuple):
    """A picture as a data URI, or why there is none."""

    kind: str
    columns: str
    uri: str | None
    says: str
    slices: Slices | None = None  # of volumes


class Hidden(NamedTuple):
    """How often pixels of a class were hidden, and that minus the share of all pixels."""

    share: float
    enrichment: float
    chance: float  # what the enrichment reaches when masks and classes have nothing to do


class Shot(NamedTuple):
    """Masks at some point of pretraining, or at several where they are all the same."""

    at: list[int]  # per cent
    columns: list[str]
    path: Path
    ratio: float | None  # asked for at the first of them
    share: float | None  # of pixels hidden
    classes: dict[str, Hidden]

    @property
    def when(self) -> str:
        first, last = self.at[0], self.at[-1]
        return f"{first} %" if first == last else f"{first} % to {last} %"


class Exhibit(NamedTuple):
    why: str
    label: str
    trial: str
    pictures: list[Picture]
    masks: list[Picture]


def chosen(tables: StudyTables) -> pd.DataFrame:
    """why, arm, trial: the best arms, the controls, and the worst searched arm."""
    ranks = ranking_numbers(tables)
    candidates = ranks[ranks["group"].isin(["search", "control"])]
    searched = candidates[candidates["group"] == "search"]
    picks: dict[str, str] = {}  # arm -> why
    for place, arm in enumerate(candidates["arm"][:BEST_ARMS], start=1):
        picks[arm] = "best arm" if arm == best_arm(ranks) else f"rank {place}"
    for line in lines_of(ranks[ranks["group"] != "search"]):
        picks.setdefault(str(line.arm), str(line.group))
    if len(searched) > 1:
        picks.setdefault(str(searched["arm"].iloc[-1]), "worst searched arm")
    trials = final(tables).reset_index().groupby("arm")["trial"].apply(list)
    lines = [(why, arm, _with_pictures(tables, trials[arm])) for arm, why in picks.items()]
    return pd.DataFrame(lines, columns=["why", "arm", "trial"])


def exhibits(tables: StudyTables) -> list[Exhibit]:
    """The chosen arms with their pictures, made anew as PNG data URIs."""
    found = []
    for line in lines_of(chosen(tables)):
        arm, trial = str(line.arm), str(line.trial)
        group = str(tables.arms.at[arm, "group"])
        pictures = [_picture(tables, trial, kind, group) for kind in KINDS]
        masks = _masks(tables.folder.pictures(trial), group)
        found.append(Exhibit(str(line.why), tables.label(arm), trial, pictures, masks))
    return found


def shots(folder: Path) -> list[Shot]:
    """The pictures of masks in a folder, in order of progress; neighbours that are alike once."""
    numbers = _numbers(folder / MASKS_NUMBERS)
    found: list[Shot] = []
    before = b""
    for path in sorted(folder.glob("masks-*.png")):
        match = MASKS.fullmatch(path.name)
        if match is None or path.stat().st_size > MOST_PIXELS:
            continue
        content, about = path.read_bytes(), numbers.get(path.name)
        if found and content == before:
            found[-1].at.append(int(match[1]))
            continue
        before = content
        known = about if isinstance(about, dict) else {}
        found.append(
            Shot(
                [int(match[1])],
                [plain(name) for name in _list(known.get("columns"))],
                path,
                _number(known.get("ratio")),
                _number(known.get("hidden")),
                _classes(known.get("classes")),
            )
        )
    return found


def data_uri(path: Path, columns: int = 1, shown: slice = slice(None)) -> str:
    """Decode a PNG and encode its pixels again: nothing else of the file reaches the page.

    Of a picture of so many columns those `shown`.
    """
    return _encoded(_cut(_decoded(path), columns, shown))


def slices(folder: Path, kind: str, *, pixels: bool = True) -> Slices | None:
    """The sheet of a folder that belongs to a kind of picture; None if none was drawn.

    `pixels=False` leaves them out: `says` is then empty if the sheet's header is sound.
    """
    path = folder / f"{kind}-slices.png"
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MOST_SHEET_BYTES:
            raise ValueError(f"it has more than {MOST_SHEET_BYTES} bytes")
        about = _numbers(folder / SLICES).get(path.name)
        columns, planes, frames = _frames(about)
        with _opened(path) as image:
            width, height = image.size
        if height % frames:
            raise ValueError(f"its {height} lines are not {frames} frames")
        uri = data_uri(path) if pixels else None
        return Slices(uri, "", columns, planes, frames, width / (height // frames))
    except UNREADABLE as error:
        return Slices(None, unreadable(path, error), [], [], 0, 1)


def size(path: Path, columns: int, shown: slice) -> tuple[int, int]:
    """Width and height of what `data_uri` shows."""
    height, width = _cut(_decoded(path), columns, shown).shape[:2]
    return width, height


def unreadable(path: Path, error: Exception) -> str:
    """Why a picture is not shown."""
    why = "it is no PNG" if isinstance(error, UnidentifiedImageError) else str(error)
    return f"{path.name} cannot be shown: {why}."


def _encoded(pixels: npt.NDArray[np.uint8]) -> str:
    """Only pixels; what is grey as grey, which takes less."""
    height, width = pixels.shape[:2]
    is_grey = (pixels == pixels[..., :1]).all()
    clean = Image.fromarray(pixels[..., 0] if is_grey else pixels)
    if width > WIDEST:
        clean = clean.resize((WIDEST, max(1, round(height * WIDEST / width))))
    encoded = io.BytesIO()
    clean.save(encoded, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def _decoded(path: Path) -> npt.NDArray[np.uint8]:
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A PNG whose header promises no more than what may be decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"{width} x {height} pixels, at most {MOST_PIXELS} are shown")
            yield image


def _cut(pixels: npt.NDArray[np.uint8], columns: int, shown: slice) -> npt.NDArray[np.uint8]:
    """Some of the columns of tiles; all where the picture has not so many."""
    pitch, rest = divmod(pixels.shape[1] + GAP, max(1, columns))
    places = range(columns)[shown]
    if rest or pitch <= GAP or not places:
        return pixels
    return np.ascontiguousarray(pixels[:, places[0] * pitch : (places[-1] + 1) * pitch - GAP])


def _with_pictures(tables: StudyTables, trials: list[str]) -> str:
    for trial in trials:
        if tables.folder.pictures(trial).is_dir():
            return trial
    return trials[0]


def _picture(tables: StudyTables, trial: str, kind: str, group: str) -> Picture:
    folder = tables.folder.pictures(trial)
    path = folder / f"{kind}.png"
    if kind == "reconstruction" and group == "random-init":
        return Picture(kind, KINDS[kind], None, "Not pretrained, so it reconstructs nothing.")
    if not path.is_file():
        return Picture(kind, KINDS[kind], None, f"No {kind} was drawn.", slices(folder, kind))
    try:
        return Picture(kind, KINDS[kind], data_uri(path), "", slices(folder, kind))
    except UNREADABLE as error:
        says = unreadable(path, error)
        return Picture(kind, KINDS[kind], None, says, slices(folder, kind))


def _masks(folder: Path, group: str) -> list[Picture]:
    """The first picture whole, then of each what changes."""
    if group == "random-init":
        return [Picture("masks", "", None, "Not pretrained, so it hides nothing.")]
    found: list[Picture] = []
    for shot in shots(folder):
        names = shot.columns
        cut = slice(-CHANGING, None) if found and len(names) > CHANGING else slice(None)
        share = "" if shot.share is None else f": {100 * shot.share:.0f} % of pixels"
        says = f"Hidden at {shot.when} of pretraining{share}"
        try:
            uri = data_uri(shot.path, len(names), cut)
        except UNREADABLE as error:
            found.append(Picture("masks", "", None, unreadable(shot.path, error)))
        else:
            found.append(Picture("masks", " | ".join(names[cut]), uri, says))
    return found or [Picture("masks", "", None, "No masks were drawn.")]


def _numbers(path: Path) -> dict[str, Any]:
    """What is in a file of numbers; nothing if it is missing, damaged or too large."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _frames(about: Any) -> tuple[list[str], list[tuple[str, float]], int]:
    """Columns, planes with their shares of the height, and number of frames of a sheet."""
    known = about if isinstance(about, dict) else {}
    columns, names = _list(known.get("columns")), _list(known.get("planes"))
    heights = [_number(height) or 0.0 for height in _list(known.get("heights"))]
    frames = known.get("frames")
    is_sound = (
        0 < len(columns) <= MOST_COLUMNS
        and 0 < len(names) == len(heights) <= MOST_PLANES
        and min(heights) > 0
        and isinstance(frames, int)
        and 0 < frames <= MOST_FRAMES
    )
    if not is_sound:
        raise ValueError(f"{SLICES} does not say what stands in it")
    shares = [height / sum(heights) for height in heights]
    planes = list(zip([plain(name, 20) for name in names], shares, strict=True))
    return [plain(name, 40) for name in columns], planes, int(known["frames"])


def _classes(found: Any) -> dict[str, Hidden]:
    classes = {}
    for name, about in found.items() if isinstance(found, dict) else ():
        known = about if isinstance(about, dict) else {}
        values = [_number(known.get(key)) for key in ("hidden", "enrichment", "chance")]
        if None not in values:
            classes[plain(name)] = Hidden(*values)  # type: ignore[arg-type]
    return classes


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
