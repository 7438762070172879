"""The page of a data set. python -m pytest tests/analysis/test_sheet.py"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import theme
from analysis.page import write_page
from analysis.sheet import GAP, WIDEST, build_sheet, overlaid
from tests.study.test_commands import Capture, call
from tests.study.test_commands import blood as blood  # a fixture
from tests.trainables.test_store import source_of
from tests.trainables.test_whole_volumes import balls
from trainables.data import Dataset, open_dataset
from trainables.data.rows import cut
from trainables.data.source import tile_corners
from trainables.data.store import write
from trainables.errors import UserError

SHAPE = (24, 40)


def tiled(tmp_path: Path, name: str) -> Dataset:
    """Four images cut into tiles; a cell in each, a platelet in one of them."""
    masks = np.zeros((4, *SHAPE), np.uint8)
    masks[:, 4:20, 10:30] = 1
    masks[0, 0, 0] = 2
    masks[1, -1] = 255
    corners = tile_corners(SHAPE, (16, 16))
    source = source_of(
        np.zeros((4 * len(corners), 1, 16, 16), np.uint8),
        splits=[split for split in ("train", "train", "val", "test") for _ in corners],
        classes=["background", "cell", "<b>platelet"],
        name=name,
        parts=[range(i * len(corners), (i + 1) * len(corners)) for i in range(4)],
        cut_from=[SHAPE] * 4,
        decode=lambda part: cut(
            (200 * (masks[part] == 1) + part).astype(np.uint8)[None], masks[part], None, (16, 16)
        ),
    )
    return open_dataset(write(source, tmp_path / "cache"))


def pictures(page: str) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found))))
        for found in re.findall(r"data:image/png;base64,([^\"]+)", page)
    ]


def test_outlines_have_the_colour_of_their_class_and_a_little_of_it_within() -> None:
    labels = np.zeros((5, 6), np.uint8)
    labels[1:4, 1:5], labels[0, 0] = 1, 255
    drawn = overlaid(np.full((5, 6, 3), 100, np.uint8), labels)
    orange = np.array([int(theme.CLASSES[0][i : i + 2], 16) for i in (1, 3, 5)])
    assert (drawn[1, 1:5] == orange).all() and (drawn[1:4, 1] == orange).all()
    np.testing.assert_array_equal(drawn[2, 2], (0.35 * orange + 65).round())
    assert (drawn[4] == 100).all() and (drawn[0, 0] == 160).all()


def test_whole_images_are_shown_with_their_masks_in_place(tmp_path: Path) -> None:
    page = build_sheet(tiled(tmp_path, "smears"), "mine", tmp_path / "sheet.html").read_text()
    shown = pictures(page)
    assert len(shown) == 5  # of train two cells and a platelet, of val and test a cell each
    factor = WIDEST // max(SHAPE)
    height, width = (edge * factor for edge in SHAPE)
    assert all(one.shape == (height, 2 * width + GAP, 3) for one in shown)
    plain, drawn = shown[0][::factor, :width:factor], shown[0][::factor, width + GAP :: factor]
    is_cell = np.zeros(SHAPE, bool)
    is_cell[4:20, 10:30] = True
    assert (plain[is_cell] >= 200).all() and (plain[~is_cell] < 200).all()
    is_drawn = (drawn != plain).any(axis=2)
    assert is_drawn[is_cell].all() and is_drawn[~is_cell].sum() == 1  # the platelet


def test_it_says_how_much_of_each_class_every_split_has(tmp_path: Path) -> None:
    page = build_sheet(tiled(tmp_path, "<i>smears"), "mine", tmp_path / "sheet.html").read_text()
    rows = re.findall(r"<tr><th scope=\"row\">(\w+)</th>(.*?)</tr>", page)
    cells = {name: re.findall(r">([^<]*)</td>", row) for name, row in rows}
    assert list(cells) == ["train", "val", "test"]
    assert cells["train"][0] == "2" and cells["train"][3] == "34 % · 2"
    assert cells["train"][4] == "0.0532 % · 1" and cells["val"][4] == "0 % · 0"
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;platelet" in page
    assert "<script" not in page and "default-src &#39;none&#39;" in page


def test_volumes_are_shown_where_they_show_most(tmp_path: Path) -> None:
    dataset = balls(tmp_path)
    page = build_sheet(dataset, "mine", tmp_path / "sheet.html").read_text()
    shown = pictures(page)
    assert len(shown) == 5 and all(len(np.unique(one)) > 4 for one in shown)
    depth = (dataset.mask_of(0) == 1).sum(axis=(0, 1)).argmax()
    factor = WIDEST // max(dataset.mask_of(0).shape[:2])
    across, forwards = dataset.mask_of(0).shape[:2]
    drawn = shown[0][::factor, across * factor + GAP :: factor]
    plain = shown[0][::factor, : across * factor : factor]
    is_ball = dataset.mask_of(0)[..., depth][::-1, ::-1].T == 1
    assert drawn.shape[:2] == (forwards, across)
    np.testing.assert_array_equal((drawn != plain).any(axis=2), is_ball)


def test_a_page_replaces_nothing_but_a_page(tmp_path: Path) -> None:
    """A folder, a device and what a link means stay what they are."""
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="expected the name of a file"):
            write_page(path, "page")
    old, link = tmp_path / "old.html", tmp_path / "link.html"
    old.write_text("old")
    link.symlink_to(old)
    assert write_page(link, "new") == old
    assert link.is_symlink() and old.read_text() == "new"


def test_check_writes_it_where_it_is_asked_for(blood: Path, capsys: Capture) -> None:
    page = blood.parent / "sheet.html"
    assert call("check", blood, "--sheet", page) == 0
    assert "sheet.html" in capsys.readouterr().out and "red" in page.read_text()
