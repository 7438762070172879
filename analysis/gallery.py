"""Pictures of a few arms: what the best, the control and the worst make of the same images."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from analysis.figures import best_arm, ranking_numbers
from analysis.tables import StudyTables, final, lines_of

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


class Picture(NamedTuple):
    """A picture as a data URI, or why there is none."""

    kind: str
    columns: str
    uri: str | None
    says: str


class Exhibit(NamedTuple):
    why: str
    label: str
    trial: str
    pictures: list[Picture]


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
    return [
        Exhibit(
            str(line.why),
            tables.label(str(line.arm)),
            str(line.trial),
            [
                _picture(tables, str(line.trial), kind, str(tables.arms.at[line.arm, "group"]))
                for kind in KINDS
            ],
        )
        for line in lines_of(chosen(tables))
    ]


def data_uri(path: Path) -> str:
    """Decode a PNG and encode its pixels again: nothing else of the file reaches the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"{width} x {height} pixels, at most {MOST_PIXELS} are shown")
            pixels = image.convert("RGB")
    if width > WIDEST:
        pixels = pixels.resize((WIDEST, max(1, round(height * WIDEST / width))))
    clean = Image.fromarray(np.asarray(pixels))  # without the metadata
    encoded = io.BytesIO()
    clean.save(encoded, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def _with_pictures(tables: StudyTables, trials: list[str]) -> str:
    for trial in trials:
        if tables.folder.pictures(trial).is_dir():
            return trial
    return trials[0]


def _picture(tables: StudyTables, trial: str, kind: str, group: str) -> Picture:
    path = tables.folder.pictures(trial) / f"{kind}.png"
    if kind == "reconstruction" and group == "random-init":
        return Picture(kind, KINDS[kind], None, "Not pretrained, so it reconstructs nothing.")
    if not path.is_file():
        return Picture(kind, KINDS[kind], None, f"No {kind} was drawn.")
    try:
        return Picture(kind, KINDS[kind], data_uri(path), "")
    except UnidentifiedImageError:
        return Picture(kind, KINDS[kind], None, f"{path.name} cannot be shown: it is no PNG.")
    except UNREADABLE as error:
        return Picture(kind, KINDS[kind], None, f"{path.name} cannot be shown: {error}.")
