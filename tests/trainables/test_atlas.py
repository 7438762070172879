"""What a masking hides, in pictures, numbers and a page.  pytest tests/trainables/test_atlas.py"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from analysis import gallery
from analysis.atlas import build_atlas
from analysis.report import build_report
from study.__main__ import main
from study.atlas import MOST_SECTIONS, middle, sections
from study.loading import parse_spec
from study.rehearsal import shortened
from study.space import SearchItem
from tests.analysis.test_browser import CHROMIUM, open_in_browser
from tests.conftest import TINY_STUDY
from tests.synthetic import HOSTILE, Page, write_study
from tests.toy import discs, trial
from trainables import pictures
from trainables.atlas import class_numbers, draw_masks, masks_name
from trainables.config import TrialConfig
from trainables.hiding import hide
from trainables.masking import MASKING, MaskRequest, Strategy, pixels_hidden
from trainables.schedules import value_at

CLASSES = {"background", "red cell", "white cell", "platelet"}


def draw(path: Path, config: TrialConfig, progress: float, **options: Any) -> dict[str, Any]:
    images, rows = torch.zeros(2, 1, 16, 16), torch.tensor([5, 9])
    return draw_masks(path, images, rows, config, progress, 3, None, (0.4,), (0.1,), **options)


def spec(text: str = TINY_STUDY) -> Any:
    return parse_spec(text, Path(), where="test")


# -- numbers ---------------------------------------------------------------------------------------


def test_enrichment_and_chance_by_hand() -> None:
    """One row of four patches; the third is always hidden, the fourth in half of the draws."""
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    labels[0, 0, 2] = 1
    often = torch.tensor([[0.0, 0.0, 1.0, 0.5]])
    found = class_numbers(often, labels, ["background", "lesion", "absent"], patch=(1, 1))
    # shifted to the four places the lesion is hidden 0, 0, 1 or 0.5 of the time
    spread = float(np.std([0, 0, 1, 0.5]))
    assert found["lesion"] == pytest.approx(
        {"pixels": 1, "hidden": 1.0, "enrichment": 1 - 0.375, "chance": 3 * spread}
    )
    assert found["background"] == pytest.approx(
        {"pixels": 3, "hidden": 0.5 / 3, "enrichment": 0.5 / 3 - 0.375, "chance": spread}
    )
    assert found["absent"] == {"pixels": 0, "hidden": None, "enrichment": None, "chance": None}


def test_chance_covers_random_masks_about_as_often_as_three_deviations_do() -> None:
    dataset, scores = discs(size=(32, 32)), []
    labels = torch.from_numpy(dataset.masks[:4]).long()
    for seed in range(200):
        requests = [MaskRequest((8, 8), 40, 0.0, seed, step, torch.arange(4)) for step in range(4)]
        often = torch.stack([hide(trial(), request) for request in requests]).float().mean(0)
        found = class_numbers(often, labels, dataset.classes, patch=(4, 4))["disc"]
        scores.append(3 * found["enrichment"] / found["chance"])
    assert abs(np.mean(scores)) < 0.2
    assert 0.85 < np.std(scores) < 1.15


def test_chance_is_the_spread_over_all_shifts() -> None:
    """Two images of two rows of six patches, compared with shifting them one by one."""
    rng = np.random.default_rng(0)
    labels, often = rng.integers(0, 2, (2, 2, 6)), rng.random((2, 2, 6)).astype(np.float32)
    shifts = [(y, x) for y in range(2) for x in range(6)]
    spread = [
        np.var([(np.roll(share, shift, axis=(0, 1)) * label).sum() for shift in shifts])
        for share, label in zip(often, labels, strict=True)
    ]
    tensors = torch.from_numpy(often).reshape(2, 12), torch.from_numpy(labels)
    found = class_numbers(*tensors, ["background", "lesion"], patch=(1, 1))["lesion"]
    assert found["chance"] == pytest.approx(3 * np.sqrt(sum(spread)) / labels.sum())


def test_ignored_pixels_are_of_no_class() -> None:
    labels = torch.full((1, 1, 4), 255)
    labels[0, 0, 0] = 0
    found = class_numbers(torch.tensor([[1.0, 0, 0, 0]]), labels, ["background"], patch=(1, 1))
    assert found["background"]["pixels"] == 1
    assert found["background"]["enrichment"] == 0.75


# -- what a trial draws ----------------------------------------------------------------------------


def test_pictures_show_masks_of_the_schedule_at_that_progress_and_their_share(tmp_path) -> None:
    for progress, share in ((0.0, 0.25), (0.5, 0.5), (1.0, 0.75)):  # linear in the toy trial
        found = draw(tmp_path / masks_name(progress), trial(), progress)
        assert (found["ratio"], found["hidden"], found["units"]) == (share, share, 16)
    written = json.loads((tmp_path / "masks.json").read_text())
    names = ["masks-000.png", "masks-050.png", "masks-100.png"]
    assert sorted(written) == names and written["masks-100.png"] == found
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "masks.json"]


def test_the_grey_of_a_draw_and_the_heat_of_many_are_the_hidden_pixels(tmp_path) -> None:
    config = trial(masking__ratio={"name": "constant", "value": 0.5})
    draw(tmp_path / "m.png", config, 0.5, draws=1)
    picture = np.asarray(Image.open(tmp_path / "m.png"))[:128]
    request = MaskRequest((4, 4), 8, 0.5, 3, -1, torch.tensor([5, 9]))
    hidden = pixels_hidden(hide(config, request), [4, 4], (4, 4))[0].numpy()
    expected = hidden.repeat(8, axis=0).repeat(8, axis=1)
    pitch = 128 + pictures.GAP
    assert ((picture[:, pitch : pitch + 128] == 128).all(axis=-1) == expected).all()
    assert ((picture[:, 2 * pitch :, 0] > 128) == expected).all()  # the ends of the scale


def test_masks_of_training_are_not_shown_again(tmp_path, monkeypatch) -> None:
    asked, random = [], MASKING["random"].hide

    def spy(request: MaskRequest) -> torch.Tensor:
        asked.append(request.step)
        return random(request)

    monkeypatch.setitem(MASKING, "random", Strategy(spy))
    draw(tmp_path / "m.png", trial(), 0.5)
    assert asked == list(range(-1, -17, -1))


def test_drawing_twice_gives_the_same_bytes(tmp_path) -> None:
    for folder in ("a", "b"):
        draw(tmp_path / folder / "m.png", trial(), 0.25)
    assert (tmp_path / "a/m.png").read_bytes() == (tmp_path / "b/m.png").read_bytes()


def test_a_damaged_file_of_numbers_is_begun_anew(tmp_path) -> None:
    (tmp_path / "masks.json").write_text("{")
    draw(tmp_path / "masks-000.png", trial(), 0.0)
    assert list(json.loads((tmp_path / "masks.json").read_text())) == ["masks-000.png"]


def test_a_volume_shows_its_middle_axial_plane(tmp_path) -> None:
    images = torch.zeros(1, 1, 16, 16, 8)
    images[..., 4] = 2.0
    labels = torch.zeros(1, 16, 16, 8, dtype=torch.long)
    labels[..., 4] = 1
    found = draw_masks(
        tmp_path / "m.png",
        images,
        torch.tensor([0]),
        trial(),
        0.0,
        0,
        None,
        (0.4,),
        (0.1,),
        labels=labels,
        classes=("background", "organ"),
    )
    picture = np.asarray(Image.open(tmp_path / "m.png"))
    assert picture[0, 0].tolist() == [153] * 3  # 0.4 + 2 * 0.1
    assert picture[0, 140].tolist() == list(pictures.class_colour(1))
    assert found["classes"]["organ"]["pixels"] == 256 and found["units"] == 32


# -- what a study can try --------------------------------------------------------------------------


def test_the_control_comes_first_and_each_masking_once() -> None:
    found, left_out = sections(spec(), (32, 32), every=False)
    assert [(s.why, s.config.model.patch, s.config.masking.ratio.name) for s in found] == [
        ("the study's own trial", 8, "constant"),  # half-way from 0.1 to 0.9 is its own 0.5
        ("model.patch: 4, masking.ratio: constant", 4, "constant"),
        ("model.patch: 4, masking.ratio: rising", 4, "linear"),
        ("model.patch: 8, masking.ratio: rising", 8, "linear"),
    ]
    assert found[2].config.masking.ratio.options() == {"start": 0.3, "end": 0.7}
    assert left_out == []


def test_all_shows_every_strategy_or_says_why_not() -> None:
    found, left_out = sections(spec(), (32, 32), every=True)
    shown = {section.config.masking.strategy.name for section in found}
    missing = [name for name in MASKING if name not in shown]
    assert "hpm" in shown
    assert all(any(f"strategy {name}," in reason for reason in left_out) for name in missing)


def test_too_many_and_unfit_maskings_are_named() -> None:
    values = [round(0.1 + 0.02 * place, 2) for place in range(30)]
    text = TINY_STUDY[: TINY_STUDY.index("search:")]
    text += f"search:\n  masking.ratio.value: {{choices: {values}}}\n"
    text += TINY_STUDY[TINY_STUDY.index("objectives:") :]
    found, left_out = sections(spec(text), (32, 32), every=False)
    assert len(found) == MOST_SECTIONS == 24
    assert left_out[0].startswith("masking.ratio.value: ") and "more than 24" in left_out[0]
    assert len(found) + len(left_out) == 30  # 0.5, the control's own, is one of them
    found, left_out = sections(spec(), (36, 36), every=False)
    assert {section.config.model.patch for section in found} == {4}
    assert "8 does not divide the image size 36x36" in left_out[0]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"low": 0.1, "high": 0.9}, 0.5),
        ({"low": 2, "high": 9}, 6),
        ({"low": 1, "high": 100, "log": True}, 10),
        ({"low": 0.1, "high": 0.5, "step": 0.1}, 0.3),
        ({"low": 4, "high": 16, "step": 4}, 12),
    ],
)
def test_a_range_is_shown_at_its_middle(item: dict[str, Any], expected: float) -> None:
    found = middle(SearchItem.model_validate(item))
    assert found == expected and type(found) is type(expected)
    assert SearchItem.model_validate(item).contains(found)


def test_a_shorter_run_forgets_as_much_at_every_progress() -> None:
    config = trial(masking__strategy="hpm", pretrain__warmup_images=100)
    short = shortened(config, planned=400, steps=40)
    for reached in (0.25, 0.5, 1.0):
        kept = [
            np.prod([value_at(c.masking.strategy.momentum, (k + 1) / n) for k in range(int(n * r))])
            for c, n, r in ((config, 400, reached), (short, 40, reached))
        ]
        assert kept[1] == pytest.approx(kept[0], rel=0.01)
    assert 0.8 < kept[0] < 0.95
    assert short.pretrain.warmup_images == 10 and not short.pretrain.compile


# -- the page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("atlas")
    (folder / "tiny.yaml").write_text(TINY_STUDY)
    page = folder / "new" / "masks.html"
    arguments = ["masks", folder / "tiny.yaml", "-o", page, "--all", "--steps", 4, "--images", 2]
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code
    assert [path.name for path in page.parent.iterdir()] == ["masks.html"]
    return Page(page.read_text())


def test_the_page_holds_a_section_for_every_strategy(atlas: Page) -> None:
    for name in MASKING:
        assert re.search(rf"\d+\. {name}\b", atlas.text), name
    anchors = [link for link in atlas.attribute("a", "href") if link.startswith("#masking-")]
    places = atlas.attribute("section", "id")
    assert len(anchors) >= 4 + len(MASKING) - 1 and set(anchors) <= {f"#{id}" for id in places}


def test_the_page_says_what_stands_behind_each_picture(atlas: Page) -> None:
    assert "2 validation images of smears (32 x 32 px)" in atlas.text
    assert "4 of the trial's 12 steps" in atlas.text  # 4 epochs of 24 images in batches of 8
    assert "linear (start 0.3, end 0.7)" in atlas.text
    assert "30 → 70 %" in atlas.text
    assert all(name in atlas.text for name in CLASSES)
    alternatives = atlas.attribute("img", "alt")
    assert "random at 0 % to 100 % of pretraining: hidden in one draw and how often hidden" in (
        alternatives
    )
    assert any(text.startswith("hpm at 25 %") for text in alternatives)


def check_that_nothing_runs_or_loads(page: Page, text: str) -> None:
    [policy] = [
        found["content"]
        for tag, found in page.elements
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy"
    ]
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1 and page.scripts == []
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        f"form-action 'none'"
    )
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], tag
        for key in ("src", "href", "srcset", "data", "action", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/png")), (tag, value)
    assert not {tag for tag, _ in page.elements} & {"iframe", "object", "embed", "link", "base"}
    assert set(re.findall(r"url\((.{15})", style[0])) <= {"data:image/png;"}


def hand_made(folder: Path, **changes: Any) -> Path:
    """The folder of an atlas with one section."""
    section = folder / "00"
    draw(section / masks_name(0), trial(), 0.0)
    draw(section / masks_name(1), trial(), 1.0)
    about: dict[str, Any] = {
        "study": "s",
        "question": "?",
        "data": {"name": "d", "size": [16, 16]},
        "images": ["a", "b"],
        "classes": [],
        "left_out": [],
    }
    line = {"folder": "00", "why": "the control", "patch": 4, "trained": 0, "planned": 9}
    line |= {"masking": {"strategy": {"name": "random"}, "unit": 4, "ratio": {"name": "linear"}}}
    line |= {"problem": None}
    about |= changes | {"sections": [line | changes.get("section", {})]}
    (folder / "atlas.json").write_text(json.dumps(about))
    return folder


def test_hostile_words_are_text(tmp_path: Path) -> None:
    words = " ".join(HOSTILE[:8])
    plain = Page(build_atlas(hand_made(tmp_path / "p"), tmp_path / "p.html").read_text())
    folder = hand_made(
        tmp_path / "h",
        study=words,
        question=words,
        data={"name": words, "size": [16, 16]},
        images=[words],
        classes=HOSTILE[:6],
        left_out=[words],
        section={
            "why": words,
            "problem": words,
            "masking": {
                "strategy": {"name": words, words: words},
                "unit": 4,
                "ratio": {"name": words, "value": 0.5},
            },
        },
    )
    numbers = json.loads((folder / "00" / "masks.json").read_text())
    values = {"hidden": 0.5, "enrichment": 0.1, "chance": 0.2}
    for about in numbers.values():
        about["columns"] = [HOSTILE[0], *about["columns"][1:]]
        about["classes"] = {name: values for name in HOSTILE[:6]}
    (folder / "00" / "masks.json").write_text(json.dumps(numbers))
    text = build_atlas(folder, tmp_path / "h.html").read_text()
    page = Page(text)
    check_that_nothing_runs_or_loads(page, text)
    known = {tag for tag, _ in plain.elements} | {"ul", "li", "svg", "rect", "line", "details"}
    assert {tag for tag, _ in page.elements} <= known
    assert "<img src=x onerror=alert(1)>" in page.text and "{{ 7 * 7 }}" in page.text


def test_the_page_runs_nothing_and_loads_nothing(tmp_path: Path) -> None:
    text = build_atlas(hand_made(tmp_path), tmp_path / "m.html").read_text()
    check_that_nothing_runs_or_loads(Page(text), text)


def test_edges_of_each_axis_are_written_with_a_cross(tmp_path: Path) -> None:
    masking = {"strategy": {"name": "random"}, "unit": [8, 4], "ratio": {"name": "linear"}}
    folder = hand_made(tmp_path, section={"patch": [2, 4], "masking": masking})
    text = Page(build_atlas(folder, tmp_path / "m.html").read_text()).text
    assert "2x4 (unit 8x4)" in text and "2x4 px" in text and "8x4 px" in text


def test_of_volumes_the_page_says_which_plane_is_shown_and_how(tmp_path: Path) -> None:
    sentence = "the middle axial plane is shown, with the patient's right on the left"
    for size, is_volume in (([16, 16], False), ([16, 16, 8], True)):
        folder = hand_made(tmp_path, data={"name": "d", "size": size})
        text = Page(build_atlas(folder, tmp_path / "m.html").read_text()).text
        assert (sentence in text) == is_volume


def test_a_section_that_failed_says_why(tmp_path: Path) -> None:
    folder = hand_made(tmp_path, section={"problem": "needs two axes"})
    shutil.rmtree(folder / "00")
    text = Page(build_atlas(folder, tmp_path / "m.html").read_text()).text
    assert "Not drawn to its end: needs two axes" in text


# -- the report ------------------------------------------------------------------------------------


def test_the_report_shows_what_each_arm_hides_along_its_pretraining(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", trials=3)  # control, random-init, frozen
    for drawn in [path for path in folder.trials.iterdir() if (path / "pictures").is_dir()]:
        for progress in (0.0, 0.25, 1.0):
            draw(drawn / "pictures" / masks_name(progress), trial(), progress)
    page = Page(build_report(folder).read_text())
    captions = re.findall(r"Hidden at (\d+) % of pretraining: (\d+) % of pixels", page.text)
    assert captions == [("0", "25"), ("25", "38"), ("100", "75")] * 2
    assert page.text.count("Not pretrained, so it hides nothing.") == 1
    alternatives = [text for text in page.attribute("img", "alt") if text.startswith("Hidden at")]
    assert [text.partition(": image")[1] != "" for text in alternatives] == [True, False, False] * 2


def test_an_arm_without_masks_says_so(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", trials=2)
    assert "No masks were drawn." in Page(build_report(folder).read_text()).text


def test_masks_that_never_change_are_shown_once(tmp_path: Path) -> None:
    config = trial(masking__ratio={"name": "constant", "value": 0.5})
    for progress in (0.0, 0.5, 1.0):
        draw(tmp_path / masks_name(progress), config, progress)
    [shot] = gallery.shots(tmp_path)
    assert (shot.when, shot.ratio, shot.share) == ("0 % to 100 %", 0.5, 0.5)


@pytest.mark.parametrize(
    "numbers",
    [
        "{",
        "[]",
        '{"masks-000.png": 3}',
        '{"masks-000.png": {"columns": 7, "hidden": "x", "classes": [1]}}',
        '{"masks-000.png": {"hidden": NaN, "classes": {"a": 1, "b": {"hidden": null}}}}',
        "[" * 100_000,
    ],
)
def test_odd_numbers_are_as_good_as_none(tmp_path: Path, numbers: str) -> None:
    draw(tmp_path / masks_name(0), trial(), 0.0)
    (tmp_path / "masks.json").write_text(numbers)
    [shot] = gallery.shots(tmp_path)
    assert (shot.columns, shot.share, shot.classes) == ([], None, {})


def test_columns_are_cut_at_the_gaps(tmp_path: Path) -> None:
    assert gallery.GAP == pictures.GAP
    draw(tmp_path / "m.png", trial(), 0.0)
    whole = np.asarray(Image.open(tmp_path / "m.png"))
    for shown, expected in ((slice(-2, None), whole[:, 132:]), (slice(0, 1), whole[:, :128])):
        encoded = gallery.data_uri(tmp_path / "m.png", 3, shown).partition("base64,")[2]
        (tmp_path / "cut.png").write_bytes(base64.b64decode(encoded))
        decoded = Image.open(tmp_path / "cut.png").convert("RGB")
        assert np.array_equal(np.asarray(decoded), expected)
    assert gallery.data_uri(tmp_path / "m.png", 7) == gallery.data_uri(tmp_path / "m.png")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium here")
def test_a_browser_has_no_complaint_about_the_page(tmp_path: Path) -> None:
    page = build_atlas(hand_made(tmp_path), tmp_path / "m.html")
    document, logged = open_in_browser(page, tmp_path / "profile")
    assert "What each masking hides" in document
    assert logged == ""
