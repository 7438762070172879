"""Run: python -m pytest tests/analysis/test_report.py"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image, PngImagePlugin

from analysis import gallery, theme
from analysis.answer import Answer, answer
from analysis.figures import FIGURES, Figure
from analysis.figures.ranking import ranking
from analysis.gallery import data_uri
from analysis.methods import methods
from analysis.page import as_json
from analysis.report import build_report, render
from analysis.results import results_csv
from analysis.tables import load
from study.folder import StudyFolder
from tests.synthetic import (
    HOSTILE,
    Page,
    draw_slices,
    hand_made,
    hostile_study,
    refreeze,
    study_tables,
    write_study,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return write_study(tmp_path_factory.mktemp("studies") / "platelets")


@pytest.fixture(scope="module")
def report(folder: StudyFolder) -> Path:
    return build_report(folder.root)


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = hostile_study(tmp_path_factory.mktemp("studies") / "hostile")
    return Page(build_report(folder).read_text())


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Control, random-init and frozen, with sheets of slices that have hostile names."""
    folder = write_study(tmp_path_factory.mktemp("studies") / "volumes", trials=3)
    draw_slices(folder)
    pictures = next(folder.trials.glob("*/pictures/reconstruction-slices.png")).parent
    about = json.loads((pictures / "slices.json").read_text())
    about["reconstruction-slices.png"]["columns"][1] = HOSTILE[1]
    about["reconstruction-slices.png"]["planes"][1] = HOSTILE[4]
    (pictures / "slices.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def leafed(volumes: StudyFolder) -> Page:
    return Page(build_report(volumes).read_text())


def test_the_report_lies_in_the_study_or_where_asked_with_the_same_bytes(
    folder: StudyFolder, report: Path, tmp_path: Path
) -> None:
    assert report == folder.report
    other = tmp_path / "new" / "r.html"
    assert build_report(folder, other) == other
    assert [path.name for path in other.parent.iterdir()] == ["r.html"]
    assert other.read_bytes() == report.read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "title", "words"),
    [
        ('study: "platelets"', "study: on", "on · maskstudy report", "Do small masks"),
        ('study: "platelets"', "study: 2026-02-30", "2026-02-30 · maskstudy", "Do small masks"),
        ('question: "Do', "question: off #", "platelets · maskstudy report", "\noff\n"),
        ("seeds: 1\n", "seeds: 1\nseed: 010\n", "platelets", "\nseed\n10\n"),
    ],
)
def test_the_page_tells_the_study_file_as_it_was_run(
    old: str, new: str, title: str, words: str, tmp_path: Path
) -> None:
    folder = write_study(tmp_path / "s", trials=3, pictures=False)
    refreeze(folder, old, new)
    page = build_report(folder).read_text()
    assert f"<title>{title}" in page
    assert words in re.sub(r"(\s*<[^>]*>\s*)+", "\n", page)


def test_the_parts_stand_in_order(page: Page) -> None:
    parts = [
        "Do small masks help the smallest cells?",
        "Ahead, on one seed",
        "The arms, ranked",
        "Mask ratio and patch size",
        "Masking schedules",
        "Learning curves",
        "Trade-offs",
        "What the arms cost",
        "Against the control",
        "Segmentation in detail",
        "What the arms see",
        "How the trials ended",
        "How it was run",
        "Methods",
    ]
    page_text = page.text[page.text.index("Skip to the answer") :]
    places = [page_text.rindex(part) for part in parts[2:]]
    assert places == sorted(places)
    assert page_text.index(parts[0]) < page_text.index(parts[1]) < places[0]


def section_of(page: str, anchor: str) -> str:
    return page.partition(f'<section id="section-{anchor}">')[2].partition("</section>")[0]


def test_every_figure_is_drawn_in_its_section_with_title_and_numbers() -> None:
    tables = study_tables(Path("s"), confirm_seeds=3)
    page = render(tables)
    content = next(body for kind, body in Page(page).scripts if kind == "application/json")
    assert set(json.loads(content)["figures"]) == set(FIGURES)
    for name, figure in FIGURES.items():
        section = section_of(page, figure.section)
        shown = section.partition(f'<figure id="{name}">')[2].partition("</figure>")[0]
        title = escape(figure.draw(tables).title)
        assert f"<h3>{title}</h3>" in shown and f'data-figure="{name}"' in shown, name
        assert f"<caption>Numbers of: {title}</caption>" in shown, name


def test_a_figure_without_a_section_stands_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIGURES, "newcomer", Figure(ranking))
    page = render(study_tables(Path("s")))
    assert '<figure id="newcomer">' in section_of(page, "more")
    assert '<a href="#section-more">More</a>' in page
    assert page.index('id="section-more"') > page.index('id="section-segmentation"')


def test_it_says_how_it_was_run(page: Page) -> None:
    for fact in ("Example GPU 80GB", "5d41402abc4b2a76", "2.13.0", "stopping: {name: halving"):
        assert fact in page.text
    assert "RuntimeError: the worker was lost" in page.text
    assert "4.77 dB with no better model" in page.text


@pytest.mark.parametrize("name", ["page", "hostile", "leafed"])
def test_only_the_scripts_named_by_hash_may_run(name: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(name)
    policy = next(
        found["content"]
        for tag, found in page.elements
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; ")
    allowed = set(re.findall(r"'(sha256-[^']+)'", policy))
    running = [script for kind, script in page.scripts if kind is None]
    hashes = [hashlib.sha256(script.encode()).digest() for script in running]
    assert {"sha256-" + base64.b64encode(digest).decode() for digest in hashes} == allowed
    assert len(running) == 2 and len(page.scripts) == 3


@pytest.mark.parametrize("name", ["page", "hostile", "leafed"])
def test_nothing_is_loaded_and_nothing_listens(name: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(name)
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        for key in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/png", "data:text/csv"))
    assert not {tag for tag, _ in page.elements} & {"iframe", "object", "embed", "link", "base"}


def test_hostile_words_are_text(page: Page, hostile: Page) -> None:
    def kinds(of: Page) -> set[str]:
        return {tag for tag, _ in of.elements}

    assert kinds(hostile) <= kinds(page) | {"code"}
    assert "<img src=x onerror=alert(1)>" in hostile.text
    assert "{{ 7 * 7 }}" in hostile.text
    assert len(hostile.attribute("script", "type")) == 1


def test_plotly_is_embedded_once(report: Path) -> None:
    content = report.read_text()
    assert content.count("* Copyright 2012-") == 1
    assert len(content.encode()) < 7e6


def test_a_thousand_trials_make_a_page_below_ten_megabytes() -> None:
    assert len(render(study_tables(Path("s"), trials=1000)).encode()) < 10e6


def test_one_seed_is_no_proof() -> None:
    found = answer(study_tables(Path("s")))
    assert not found.is_shown
    assert found.headline.startswith("Ahead, on one seed: patch 4, ")
    assert found.sentences[0].startswith("One seed: no interval.")
    assert found.sentences[0].endswith("of which too few have ended well.")
    alone = answer(
        hand_made({"arm": "c", "origin": "control", "miou": 0.5}, {"arm": "a", "miou": 0.6})
    )
    assert "confirm: {arms: 3, seeds: 2, verdict: 10}" in alone.sentences[0]


def test_a_clear_difference_on_fresh_seeds_is_called_so() -> None:
    found = answer(study_tables(Path("s"), confirm_seeds=5))
    assert found.is_shown
    assert found.headline.startswith("Best arm: patch 4, ")
    assert "(5 seeds, paired; p < 0.001 after Holm's adjustment) on fresh" in found.sentences[0]
    assert any(sentence.startswith("Pretraining helps") for sentence in found.sentences)
    assert any(sentence.startswith("On the test images") for sentence in found.sentences)


def judged(verdict: dict[int, float], *more: tuple[str, str, dict[int, float]]) -> Answer:
    """A control, and an arm that was chosen among two and confirmed once.

    `more`: (arm, origin, seed -> mIoU) of others; of arm r the control's twin.
    """
    drawn: list[tuple[str, str, dict[int, float]]] = [
        ("c", "control", {0: 0.50}),
        ("a", "search", {0: 0.70}),
        ("b", "search", {0: 0.60}),
        ("a", "confirm", {1: 0.72}),
        ("b", "confirm", {1: 0.60}),
        ("a", "verdict", verdict),
        ("c", "verdict", {2: 0.50, 3: 0.51, 4: 0.50}),
        *more,
    ]
    trials = [
        {"arm": arm, "origin": origin, "seed": seed, "miou": miou}
        for arm, origin, values in drawn
        for seed, miou in values.items()
    ]
    return answer(hand_made(*trials, confirm={"arms": 2, "seeds": 1, "verdict": 3}))


def test_a_verdict_rests_on_its_own_seeds_alone() -> None:
    found = judged({2: 0.600, 3: 0.613, 4: 0.605})
    assert found.is_shown and found.headline.startswith("Best arm: ")
    assert "mIoU 0.606 against 0.503 of the control" in found.headline
    assert "(3 seeds, paired; p < 0.001 after" in found.sentences[0]
    assert found.sentences[0].endswith("on fresh seeds, by which nothing was chosen.")


def test_before_the_verdict_nothing_is_claimed_however_clear_it_looks() -> None:
    found = judged({2: 0.600, 3: 0.613})
    assert not found.is_shown and found.headline.startswith("Ahead, but not shown to be better: ")
    assert "not all of them have ended." in found.sentences[0]


def test_of_random_weights_nothing_is_claimed_before_their_fresh_seeds_have_ended() -> None:
    whole = {2: 0.600, 3: 0.613, 4: 0.605}
    first = ("r", "control:random-init", {0: 0.40})

    def of_pretraining(seeds: tuple[int, ...]) -> str:
        fresh = ("r", "verdict", {seed: 0.40 + seed / 1000 for seed in seeds})
        found = judged(whole, first, fresh).sentences
        return next(each for each in found if each.startswith("Pretraining"))

    assert of_pretraining((2, 3)).endswith("not tested, as the study's claims rest on fresh seeds, "
                                           "and not all of them have ended.")  # fmt: skip
    assert of_pretraining((2, 3, 4)).startswith("Pretraining helps (control's settings): 0.503")


def test_of_two_arms_with_a_verdict_the_first_is_told_to_have_been_chosen_by_it() -> None:
    other = ("b", "verdict", {2: 0.59, 3: 0.60, 4: 0.59})
    found = judged({2: 0.600, 3: 0.613, 4: 0.605}, other)
    assert "it is the best of several on these seeds, so expect somewhat less" in found.sentences[0]


def test_an_interval_across_zero_is_no_difference() -> None:
    found = answer(study_tables(Path("s"), confirm_seeds=5, gain=0.02, noise=0.03))
    assert found.headline == (
        "Pretraining helps; the best arm is not shown to be better than the control."
    )
    assert found.is_shown and any(
        each.startswith("Pretraining helps (") for each in found.sentences
    )
    assert found.sentences[0].startswith("Ahead, but not shown to be better: ")
    assert "not told apart from none" in found.sentences[1]
    assert "With this noise 5 seeds show a difference of" in found.sentences[1]


def test_that_pretraining_hurts_stands_first_where_no_better_arm_is_shown() -> None:
    values = {"c": (0.50, 0.51, 0.52), "a": (0.51, 0.50, 0.53), "r": (0.60, 0.62, 0.62)}
    kinds = {"c": {"origin": "control"}, "r": {"origin": "control:random-init"}, "a": {}}
    trials = [
        {"arm": arm, "seed": seed, "miou": miou} | kinds[arm]
        for arm, mious in values.items()
        for seed, miou in enumerate(mious)
    ]
    found = answer(hand_made(*trials))
    assert found.headline.startswith("Pretraining hurts; the best arm is not shown to be better")
    assert found.is_shown and found.sentences[0].startswith("Ahead, but not shown")


def test_two_seeds_are_too_few_for_a_claim() -> None:
    control = [{"arm": "c", "origin": "control", "seed": s, "miou": 0.5 + s / 100} for s in (0, 1)]
    better = [{"arm": "a", "seed": s, "miou": 0.6 + s / 100 + s / 1e5} for s in (0, 1)]
    found = answer(hand_made(*control, *better))
    assert not found.is_shown
    assert "Two seeds are too few" in found.sentences[0]


def test_arms_that_are_all_alike_are_rarely_called_better() -> None:
    """Six arms without any difference, five seeds each."""
    rng = np.random.default_rng(5)
    claims = 0
    for _ in range(40):
        trials = [
            {"arm": arm, "seed": seed, "miou": rng.normal(0.5, 0.02), "origin": origin}
            for arm, origin in zip("cabdef", ["control"] + ["search"] * 5, strict=True)
            for seed in range(5)
        ]
        claims += answer(hand_made(*trials)).is_shown
    assert claims <= 4


def test_a_control_that_wins_is_named() -> None:
    found = answer(
        hand_made({"arm": "c", "origin": "control", "miou": 0.6}, {"arm": "a", "miou": 0.5})
    )
    assert found.headline.startswith("No searched arm is ahead of the control")
    assert not found.is_shown


def test_an_arm_that_is_better_by_less_than_is_shown_is_not_called_ahead() -> None:
    control = {"arm": "c", "origin": "control", "miou": 0.6}
    found = answer(hand_made(control, {"arm": "a", "miou": 0.6002}))
    assert found.headline == (
        "No searched arm is ahead of the control: the best (patch 8, ratio 0.50) is level with it "
        "at mIoU 0.600."
    )
    assert "Ahead, on one seed" in answer(hand_made(control, {"arm": "a", "miou": 0.601})).headline


def test_a_control_ahead_of_the_confirmed_arm_is_named() -> None:
    """Fresh seeds put an arm before the control in rank, however low they are."""
    confirmed = {"arm": "a", "seed": 1, "origin": "confirm", "miou": 0.5}
    control = {"arm": "c", "origin": "control", "miou": 0.6}
    found = answer(hand_made(control, {"arm": "a", "miou": 0.7}, confirmed))
    assert found.headline == (
        "No searched arm is ahead of the control: mIoU 0.600 against 0.500 of the best (patch 8, "
        "ratio 0.50)."
    )
    assert not found.is_shown


def random_weights_of(*trials: dict[str, Any]) -> list[str]:
    """What is said of random weights against searched arms; the control has 0.50."""
    found = answer(hand_made({"arm": "c", "origin": "control", "miou": 0.5}, *trials))
    return [sentence for sentence in found.sentences if sentence.startswith("Random weights")]


def test_random_weights_ahead_of_every_searched_arm_are_named() -> None:
    scratch = {"arm": "r", "origin": "control:random-init", "miou": 0.6}
    assert random_weights_of(scratch, {"arm": "a", "miou": 0.55}, {"arm": "b", "miou": 0.4}) == [
        "Random weights, without any pretraining, are ahead of the best searched arm "
        "(patch 8, ratio 0.50 [a]): mIoU 0.600 against 0.550; one seed, so no interval."
    ]
    assert random_weights_of(scratch, {"arm": "a", "miou": 0.65}) == []
    assert random_weights_of(scratch, {"arm": "a", "miou": 0.6}) == []
    assert "are level with the best" in random_weights_of(scratch, {"arm": "a", "miou": 0.5998})[0]
    assert random_weights_of(scratch) == []


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ((0.10, 0.11, 0.12), "difference +0.110, 95 % interval +0.085 to +0.135, 3 seeds."),
        (
            (0.10, 0.00, 0.20),
            "difference +0.100, 95 % interval −0.148 to +0.348, 3 seeds: not told apart from none.",
        ),
        (
            (0.10, 0.11),
            "difference +0.105, 95 % interval +0.041 to +0.169, 2 seeds: not told apart from none.",
        ),
    ],
)
def test_how_sure_it_is_that_random_weights_are_ahead(gaps: tuple[float, ...], words: str) -> None:
    """The half width is t(0.975, n - 1) times the gaps' deviation over the root of n."""
    searched = [{"arm": "a", "seed": seed, "miou": 0.6} for seed in range(len(gaps))]
    scratch = [
        {"arm": "r", "seed": seed, "origin": "control:random-init", "miou": 0.6 + gap}
        for seed, gap in enumerate(gaps)
    ]
    (sentence,) = random_weights_of(*searched, *scratch)
    assert sentence.endswith(f"; {words}")


def test_random_weights_ahead_have_the_smaller_value_where_less_is_better() -> None:
    def told(scratch: float) -> bool:
        tables = hand_made(
            {"arm": "r", "origin": "control:random-init", "miou": 0.9, "flops": scratch},
            {"arm": "a", "miou": 0.1, "flops": 5e12},
        )
        tables.spec["objectives"] = [{"metric": "pretrain/planned_flops", "goal": "minimize"}]
        return any(sentence.startswith("Random weights") for sentence in answer(tables).sentences)

    assert told(4e12) and not told(6e12)


def test_a_smaller_value_wins_where_less_is_better() -> None:
    tables = study_tables(Path("s"))
    tables.spec["objectives"] = [{"metric": "pretrain/planned_flops", "goal": "minimize"}]
    found = answer(tables)
    assert "patch 16" in found.headline


def test_the_smallest_distance_between_surfaces_leads() -> None:
    tables = study_tables(Path("s"), confirm_seeds=5)
    tables.spec["objectives"] = [{"metric": "segment/hd95", "goal": "minimize"}]
    found = answer(tables)
    by_overlap = answer(study_tables(Path("s"), confirm_seeds=5)).headline
    assert found.is_shown
    assert found.headline.partition(";")[0] == by_overlap.partition(";")[0]
    assert "; HD95 " in found.headline and " mm of the control." in found.headline
    assert any(sentence.startswith("Pretraining helps") for sentence in found.sentences)
    assert "Lower is better." in FIGURES["ranking"].draw(tables).says


def test_without_a_control_the_lowest_distance_is_called_lowest() -> None:
    for metric, goal, word in [("hd95", "minimize", "Lowest"), ("nsd", "maximize", "Highest")]:
        tables = study_tables(Path("s"))
        tables.spec["objectives"] = [{"metric": f"segment/{metric}", "goal": goal}]
        controls = tables.suggestions.loc[tables.suggestions["origin"] == "control", "trial"]
        tables.results.loc[controls, "outcome"] = "failed"
        assert answer(tables).headline.startswith(f"{word} ")


def test_scores_of_volumes_are_told_only_where_there_are_volumes() -> None:
    tables = study_tables(Path("s"))
    flat = replace(tables, rows=tables.rows[~tables.rows["metric"].str.match("hd95|nsd|case_")])
    for study, is_told in [(tables, True), (flat, False)]:
        page = render(study)
        of_volumes = [name for name, figure in FIGURES.items() if figure.needs_volumes]
        assert of_volumes
        for name in of_volumes:
            assert (f'id="{name}"' in page) == is_told
        assert any("length of the volume" in words for words in methods(study)) == is_told
        assert 'id="class_iou"' in page


def test_objectives_by_which_arms_cannot_be_compared_are_named() -> None:
    tables = study_tables(Path("s"))
    told = [words for words in answer(tables).sentences if "cannot be compared" in words]
    assert told == [] and any("and is not ranked: a smaller" in words for words in methods(tables))

    goals = ("pretrain/probe_psnr", "pretrain/native_psnr_all", "pretrain/native_psnr_hidden")
    tables = study_tables(Path("s"))
    tables.spec["objectives"] = [{"metric": goal, "goal": "maximize"} for goal in goals]
    told = [words for words in answer(tables).sentences if "cannot be compared" in words]
    assert told == [
        "Arms that differ in ratio or patch cannot be compared by native PSNR, all pixels or "
        "native PSNR, hidden pixels: it depends on the trial's own ratio and patch."
    ]
    assert not any("is not ranked" in words for words in methods(tables))


def test_the_legend_names_the_classes_of_the_data_in_the_colours_of_the_pictures() -> None:
    """Also where the validation images lack one, which therefore has no score."""

    def legend(page: str) -> list[tuple[str, str]]:
        return re.findall(r'class="swatch" style="background: (#\w+)"></span>([^,.<]+)', page)

    tables = study_tables(Path("s"))
    lacks = replace(tables, rows=tables.rows[~tables.rows["metric"].str.endswith("/red cell")])
    expected = list(zip(theme.CLASSES, ("red cell", "white cell", "platelet"), strict=False))
    assert legend(render(tables)) == legend(render(lacks)) == expected
    assert legend(render(replace(tables, environment={}))) == []


def test_a_study_without_any_trial_has_a_report(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "empty", trials=0)
    page = Page(build_report(folder).read_text())
    assert "No answer yet: no trial is complete." in page.text
    assert page.attribute("div", "data-figure") == []


def test_a_study_without_labels_is_answered_in_psnr() -> None:
    found = answer(
        hand_made(
            {"arm": "c", "origin": "control", "psnr": 24.0}, {"arm": "a", "psnr": 26.0, "patch": 4}
        )
    )
    assert "probe PSNR 26.00 dB against 24.00 dB of the control" in found.headline


def test_the_csv_holds_every_trial_and_no_formula() -> None:
    tables = study_tables(Path("s"), label="=1+1", error="@x")
    content = results_csv(tables).decode("utf-8-sig")
    lines = list(csv.DictReader(io.StringIO(content)))
    assert len(lines) == 14
    assert lines[0]["outcome"] == "complete" and lines[3]["outcome"] == "stopped"
    assert float(lines[0]["segment/miou"]) == pytest.approx(0.49, abs=0.05)
    assert lines[3]["segment/miou"] == ""
    assert lines[0]["masking.ratio.value"] == "0.75"
    cells = [cell for line in csv.reader(io.StringIO(content)) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r"))]


def test_a_spreadsheet_does_not_run_a_class_name() -> None:
    tables = study_tables(Path("s"), classes=("background", "=cmd"))
    tables.suggestions.loc[0, "origin"] = "=1+1"
    assert b",'=1+1," in results_csv(tables)


def test_the_downloaded_csv_is_the_results(folder: StudyFolder, page: Page) -> None:
    uri = next(link for link in page.attribute("a", "href") if link.startswith("data:text/csv"))
    assert base64.b64decode(uri.partition("base64,")[2]) == results_csv(load(folder))


def test_pictures_are_made_anew(folder: StudyFolder, page: Page, tmp_path: Path) -> None:
    """Only pixels reach the page, no comment and no colour profile."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("comment", "secret")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png", pnginfo=notes)
    decoded = base64.b64decode(data_uri(tmp_path / "a.png").partition("base64,")[2])
    assert b"secret" not in decoded
    with Image.open(io.BytesIO(decoded)) as image:
        assert image.size == (8, 8) and image.getpixel((0, 0)) == (1, 2, 3)
    assert len(page.attribute("img", "src")) == 2 * 7 - 1  # random-init reconstructs nothing


def test_a_bomb_a_huge_and_a_broken_picture_are_named_not_shown(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", trials=2)
    trials = [path.name for path in folder.trials.iterdir()]
    control = next(trial for trial in trials if len(list(folder.pictures(trial).iterdir())) == 2)
    other = next(trial for trial in trials if trial != control)

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        content += struct.pack(">I", len(body)) + kind + body
        content += struct.pack(">I", zlib.crc32(kind + body))
    (folder.pictures(control) / "reconstruction.png").write_bytes(content)
    Image.new("1", (6000, 5000)).save(folder.pictures(control) / "segmentation.png")
    (folder.pictures(other) / "segmentation.png").write_bytes(b"no picture")

    text = Page(build_report(folder).read_text()).text
    assert "reconstruction.png cannot be shown: Image size (3600000000 pixels)" in text
    assert "segmentation.png cannot be shown: 6000 x 5000 pixels, at most 25000000" in text
    assert "segmentation.png cannot be shown: it is no PNG" in text


def test_sheets_of_slices_have_a_slider_each_and_show_the_middle_without_script(
    leafed: Page,
) -> None:
    sliders = [found for tag, found in leafed.elements if found.get("type") == "range"]
    assert [found["aria-label"] for found in sliders] == [
        f"slice of the {kind}"
        for kind in (
            "reconstruction of control: patch 8, ratio 0.75",
            "segmentation of control: patch 8, ratio 0.75",
            "segmentation of random-init: patch 8, ratio 0.75",
            "reconstruction of frozen: patch 8, ratio 0.75",
            "segmentation of frozen: patch 8, ratio 0.75",
        )
    ]
    assert {(s["min"], s["max"], s["value"]) for s in sliders} == {("1", "24", "13")}
    hidden = [found for tag, found in leafed.elements if found.get("class") == "turn"]
    assert len(hidden) == 1 + 5 and all("hidden" in found for found in hidden)
    styles = [style for style in leafed.attribute("img", "style") if style != "None"]
    assert styles == ["transform: translateY(-50.0000%)"] * 5  # frame 12 of 24, from 0
    windows = [found for tag, found in leafed.elements if found.get("class") == "window"]
    # 24 x 32 x 30 mm at 4 pixels a mm: 96, 128 and 120, with gaps
    assert [found["style"] for found in windows] == [
        f"aspect-ratio: {3 * 132 / (124 + 124 + 132):.4f}"
    ] * 5
    assert "the patient's right is on the left" in leafed.text
    assert "<img src=x onerror=alert(1)>" in leafed.text and HOSTILE[4] in leafed.text


def test_a_study_of_flat_images_has_no_slider(page: Page) -> None:
    assert [found for _, found in page.elements if found.get("type") in ("range", "checkbox")] == []
    assert "radiologists" not in page.text


def test_sheets_are_made_anew_pixel_by_pixel(volumes: StudyFolder) -> None:
    for path in volumes.trials.glob("*/pictures/*-slices.png"):
        found = gallery.slices(path.parent, path.name.removesuffix("-slices.png"))
        assert found is not None and found.uri is not None and found.frames == 24
        decoded = io.BytesIO(base64.b64decode(found.uri.partition("base64,")[2]))
        with Image.open(decoded) as again, Image.open(path) as drawn:
            assert again.mode == drawn.mode and not again.info
            assert np.array_equal(np.asarray(again), np.asarray(drawn))


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ("{", "slices.json does not say what stands in it"),
        ("[]", "slices.json does not say"),
        ({"frames": 0}, "slices.json does not say"),
        ({"frames": 1e9}, "slices.json does not say"),
        ({"frames": 65}, "slices.json does not say"),
        ({"columns": "image"}, "slices.json does not say"),
        ({"planes": ["axial"]}, "slices.json does not say"),
        ({"heights": [1, 2, -3]}, "slices.json does not say"),
        ({"heights": [1, 2, "3"]}, "slices.json does not say"),
        ({"planes": ["x"] * 13, "heights": [1] * 13}, "slices.json does not say"),
        ({"frames": 7}, "its 9120 lines are not 7 frames"),
    ],
)
def test_a_sheet_without_sound_numbers_is_named_not_shown(
    volumes: StudyFolder, tmp_path: Path, numbers: str | dict[str, object], why: str
) -> None:
    path = next(volumes.trials.glob("*/pictures/segmentation-slices.png"))
    (tmp_path / path.name).write_bytes(path.read_bytes())
    if isinstance(numbers, dict):
        about = json.loads(path.with_name("slices.json").read_text())
        about[path.name] |= numbers
        numbers = json.dumps(about)
    (tmp_path / "slices.json").write_text(numbers)
    found = gallery.slices(tmp_path, "segmentation")
    assert found is not None and found.uri is None
    assert found.says.startswith(f"segmentation-slices.png cannot be shown: {why}")


def test_a_broken_a_large_and_no_sheet_are_told_apart(
    volumes: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(volumes.trials.glob("*/pictures/segmentation-slices.png"))
    assert gallery.slices(tmp_path, "segmentation") is None
    (tmp_path / path.name).write_bytes(b"no picture")
    (tmp_path / "slices.json").write_bytes(path.with_name("slices.json").read_bytes())
    found = gallery.slices(tmp_path, "segmentation")
    assert found is not None and found.says.endswith("cannot be shown: it is no PNG.")
    monkeypatch.setattr(gallery, "MOST_SHEET_BYTES", 1000)
    found = gallery.slices(path.parent, "segmentation")
    assert found is not None and found.uri is None and "more than 1000 bytes" in found.says


def test_json_in_the_page_cannot_end_its_element() -> None:
    written = as_json({"a": "</script>&", "b": [float("nan"), 0.123456789, np.float64(2)]})
    assert written == '{"a":"\\u003c/script\\u003e\\u0026","b":[null,0.123457,2.0]}'


def without_an_encoder(*, control: float, best: float, **trivial: float) -> list[str]:
    """What the first screen says of segmenters that have none."""
    scores = {f"segment/{key}_miou": value for key, value in trivial.items()}
    found = answer(
        hand_made(
            {"arm": "c", "origin": "control", "miou": control, **scores},
            {"arm": "a", "patch": 4, "miou": best, **scores},
        )
    )
    return [words for words in found.sentences if "without an encoder" in words]


def test_data_that_a_threshold_solves_are_told_on_the_first_screen() -> None:
    (words,) = without_an_encoder(control=0.83, best=0.853, threshold=0.888, ridge_pixels=0.75)
    assert words == (
        "A segmenter without an encoder is ahead of the best arm: mIoU of a threshold 0.888, "
        "patch 4, ratio 0.50 0.853. Such data cannot tell encoders apart."
    )
    (words,) = without_an_encoder(control=0.83, best=0.8531, threshold=0.1, ridge_pixels=0.8529)
    assert "is level with the best arm: mIoU of raw pixels 0.853" in words
    (words,) = without_an_encoder(control=0.80, best=0.85, threshold=0.76, ridge_pixels=0.1)
    assert words == (
        "A segmenter without an encoder comes close: mIoU of a threshold 0.760 against mIoU "
        "0.800 of the control. Such data hardly tell encoders apart."
    )


def test_data_that_it_does_not_solve_are_not_spoken_of() -> None:
    assert without_an_encoder(control=0.80, best=0.85, threshold=0.759, ridge_pixels=0.7) == []
    assert without_an_encoder(control=0.80, best=0.85) == []


def test_the_arms_stand_beside_segmenters_without_an_encoder(tmp_path: Path) -> None:
    page = build_report(write_study(tmp_path / "s").root, tmp_path / "r.html").read_text()
    text = Page(page).text
    assert "mIoU of a threshold" in text and "0.310" in text
    assert "Without an encoder. Thresholds" in text and "Dense probe. From the frozen" in text
    assert "Do probes foretell mIoU?" in text


def frozen_words(*seeds: float) -> str:
    trials = [
        {"arm": "c", "origin": "control", "seed": seed, "miou": 0.6, "pretrain/dense_miou": value}
        | {"pretrain/dense_miou_random": 0.5, "pretrain/dense_miou_pixels": 0.4}
        for seed, value in enumerate(seeds)
    ]
    sentences = answer(hand_made(*trials)).sentences
    return next(words for words in sentences if words.startswith("Before fine-tuning"))


def test_the_frozen_encoder_is_told_beside_its_random_start_and_raw_pixels() -> None:
    assert frozen_words(0.56) == (
        "Before fine-tuning (control's settings, frozen): dense probe 0.560, 0.500 at the random "
        "start, 0.400 of raw pixels; pretraining +0.060, one seed, so no interval."
    )
    assert "pretraining +0.060, 95 % interval +0.010 to +0.110, 3 seeds." in frozen_words(
        0.54, 0.56, 0.58
    )
