"""Run: python -m pytest tests/analysis/test_browser.py

The report in headless Chromium, opened from a file without any network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis.figures import FIGURES
from analysis.report import build_report
from tests.synthetic import Page, draw_slices, hostile_study, write_study

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium on this machine"
    ),
]


def open_in_browser(page: Path, profile: Path, flags: tuple[str, ...] = ()) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser logged."""
    assert CHROMIUM is not None, "CI must have Chromium"
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=10000",
        *flags,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(logged)


def figures_of(document: str) -> dict[str, str]:
    """Name of each figure's place -> what was drawn in it."""
    parts = re.split(r'data-figure="(\w+)"', document.partition("<script")[0])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_figure_is_drawn_without_an_error(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", confirm_seeds=2)
    document, logged = open_in_browser(build_report(folder), tmp_path / "profile")
    drawn = figures_of(document)
    assert set(drawn) == set(FIGURES)
    for name, content in drawn.items():
        assert 'class="main-svg"' in content, name
        assert "NaN" not in "".join(re.findall(r'(?:d|transform)="[^"]*"', content)), name
    assert "figure-error" not in document.partition("</style>")[2].partition("<script")[0]
    assert "could not be drawn" not in document.partition("<script")[0]
    assert 'data-drawn="yes"' in document
    assert logged == ""


def test_hostile_names_are_shown_and_never_run(tmp_path: Path) -> None:
    folder = hostile_study(tmp_path / "study")
    document, logged = open_in_browser(build_report(folder), tmp_path / "profile")
    before_scripts = document.partition("<script")[0]
    assert set(figures_of(document)) == set(FIGURES)
    assert "&lt;img src=x onerror=alert(1)&gt;" in before_scripts
    for tag, attributes in Page(before_scripts).elements:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        link = attributes.get("href") or attributes.get("xlink:href")
        assert link is None or link.startswith(("#", "data:text/csv", "data:image/png"))
    in_figures = "".join(figures_of(document).values())
    assert "<img src=" in html.unescape(in_figures)
    assert logged == ""


def test_a_phone_and_a_dark_page_draw_too(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", pictures=False)
    page = build_report(folder)
    flags = ("--window-size=390,844", "--force-dark-mode")
    document, logged = open_in_browser(page, tmp_path / "profile", flags)
    assert 'data-drawn="yes"' in document and logged == ""


TURN = """
const sliders = [...document.querySelectorAll(".slices input")];
const turn = (place, frame) => {
  sliders[place].value = frame;
  sliders[place].dispatchEvent(new Event("input"));
};
const box = (slider) => slider.closest(".slices");
const state = () => sliders.map((slider) => [
  slider.getAttribute("aria-valuetext"),
  box(slider).querySelector("img").getBoundingClientRect().top
    - box(slider).querySelector(".window").getBoundingClientRect().top,
  box(slider).querySelector("img").getBoundingClientRect().height,
  box(slider).querySelector(".window").getBoundingClientRect().height,
].map((part) => typeof part === "number" ? part.toFixed(1) : part).join("; "));
const seen = { before: state() };
turn(0, 7);
seen.together = state();
document.getElementById("together").click();
turn(1, 24);
seen.alone = state();
seen.wide = document.documentElement.scrollWidth - innerWidth;
seen.shown = [...document.querySelectorAll(".turn")].every((part) => part.offsetHeight > 0);
document.body.append(Object.assign(document.createElement("pre"),
  { id: "seen", textContent: JSON.stringify(seen) }));
"""


@pytest.mark.parametrize("flags", [(), ("--window-size=390,844", "--force-dark-mode")])
def test_slices_of_all_arms_turn_together_or_alone(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """One more script is allowed by its hash and moves the sliders as a hand would."""
    folder = write_study(tmp_path / "study", trials=3)
    draw_slices(folder)
    page = build_report(folder)
    digest = base64.b64encode(hashlib.sha256(TURN.encode()).digest()).decode()
    text = page.read_text().replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    page.write_text(text.replace("</body>", f"<script>{TURN}</script></body>"))
    document, logged = open_in_browser(page, tmp_path / "profile", flags)
    assert logged == ""
    found = re.search(r'<pre id="seen">(.*?)</pre>', document)
    assert found
    seen = json.loads(html.unescape(found[1]))

    def frames(state: list[str]) -> list[int]:
        """The number of the frame that each window shows, by what it says and by where it is."""
        numbers = []
        for line in state:
            words, top, height, window = line.split("; ")
            said = re.fullmatch(r"slice (\d+) of 24, (\d+) %", words)
            assert said and int(said[2]) == int(100 * (int(said[1]) - 0.5) / 24 + 0.5)
            assert float(height) == pytest.approx(24 * float(window), rel=1e-3)
            assert 1 - float(top) / float(window) == pytest.approx(int(said[1]), abs=0.02)
            numbers.append(int(said[1]))
        return numbers

    # reconstruction and segmentation of the control, segmentation, then both of the frozen
    assert frames(seen["before"]) == [13] * 5
    assert frames(seen["together"]) == [7, 13, 13, 7, 13]
    assert frames(seen["alone"]) == [7, 24, 13, 7, 13]
    assert seen["wide"] <= 0 and seen["shown"]
