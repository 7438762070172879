"""The study console in headless Chromium, driven by the keyboard: what a person sees and does.

pytest tests/study/test_console_browser.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.analysis.test_browser import CHROMIUM
from tests.study.test_console import TOKEN, served, settled
from tests.synthetic import draw_slices, hostile_study, write_study

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium on this machine"
    ),
]
SLOW = 60_000  # milliseconds that a loaded machine may take


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "CI must have Chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """What a test leaves open is closed; of one that fails, pytest shows what was to be read."""
    yield chromium
    for context in chromium.contexts:
        for page in context.pages:
            print(f"{page.url}\n{page.inner_text('body')}")
        context.close()


class Person:
    """Somebody at a keyboard. `complaints` is what the browser logged as an error."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(SLOW)
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        # the page that asks for the token is answered with 401, which Chromium mentions
        if message.type in ("error", "warning") and "401" not in message.text:
            self._note(message.text)

    def _note(self, complaint: str) -> None:
        print(complaint)
        self.complaints.append(complaint)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def focus(self) -> str:
        """What has the focus: its name for those who cannot see."""
        words = self.page.evaluate(
            "(document.activeElement.labels?.[0] ?? document.activeElement).textContent"
        )
        return str(words).strip()

    def tab_to(self, name: str, key: str = "Tab") -> None:
        for _ in range(60):
            self.press(key)
            if self.focus() == name:
                return
        raise AssertionError(f"Tab never leads to {name!r}")


def test_by_keyboard_alone_a_study_is_found_and_extended(tmp_path: Path, browser: Any) -> None:
    folder = write_study(tmp_path / "platelets", trials=9)
    with served(tmp_path, allow_changes=True) as ask:
        settled(ask, "platelets", "interrupted")
        person = Person(browser)
        person.page.goto(f"http://127.0.0.1:{ask.port}/")
        field = person.page.wait_for_selector("#token:focus")  # a person sees the caret first
        person.page.keyboard.type(TOKEN)
        assert field.input_value() == TOKEN
        person.press("Enter")
        person.page.wait_for_selector(".studies li")
        person.tab_to("platelets")
        person.press("Enter")
        person.page.wait_for_selector("html[data-shown=yes]")
        assert person.page.locator("h1").inner_text() == "Do small masks help the smallest cells?"
        assert person.page.locator("figure .main-svg").count() > 0
        assert person.page.locator("tbody tr").count() == 9
        before = person.page.locator(".tiles dd").first.inner_text()
        assert before.startswith("9 of 24")
        person.tab_to("by")
        person.press("Control+A")
        person.page.keyboard.type("7")
        person.press("Enter")
        person.page.wait_for_selector("#said:has-text('7 more trials')")
        person.page.wait_for_selector(".tiles dd:has-text('9 of 31')")
        assert person.complaints == []
    assert len(list(folder.requests.iterdir())) == 1


def test_a_token_that_opens_nothing_is_answered_in_words(tmp_path: Path, browser: Any) -> None:
    with served(tmp_path) as ask:
        page = Person(browser).page
        page.goto(f"http://127.0.0.1:{ask.port}/")
        page.fill("#token", "of another console")
        page.keyboard.press("Enter")
        page.wait_for_selector('#said:has-text("this is not the console\'s token")')
        page = Person(browser).page
        answers = [
            lambda route: route.fulfill(status=500, body="Internal Error"),
            lambda route: route.abort(),
        ]
        page.route("**/api/login", lambda route: answers.pop(0)(route))
        page.goto(f"http://127.0.0.1:{ask.port}/")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("#said:has-text('The console has failed (500)')")
        page.keyboard.press("Enter")
        page.wait_for_selector("#said:has-text('The console does not answer.')")


def test_what_fails_is_said_in_words(tmp_path: Path, browser: Any) -> None:
    folder = write_study(tmp_path / "platelets", trials=4)
    with served(tmp_path, allow_changes=True) as ask:
        settled(ask, "platelets", "interrupted")
        page = Person(browser).page
        page.goto(f"http://127.0.0.1:{ask.port}/study/platelets#token={TOKEN}")
        page.wait_for_selector("html[data-shown=yes]")
        page.route("**/resume", lambda route: route.fulfill(status=500, body="Internal Error"))
        page.get_by_role("button", name="Resume").click()
        page.wait_for_selector("#said.wrong:has-text('The console has failed (500)')")
        page.route("**/resume", lambda route: route.abort())
        page.get_by_role("button", name="Resume").click()
        page.wait_for_selector("#said.wrong:has-text('The console does not answer.')")
        page.get_by_text("Enqueue an arm").click()
        page.fill("#arm", "model.patch=4\nmodel.patch=8")
        page.get_by_role("button", name="Enqueue this arm").click()
        page.wait_for_selector("#said.wrong:has-text('model.patch: given twice')")
        page.goto(f"http://127.0.0.1:{ask.port}/study/absent")
        page.wait_for_selector("#away")
        assert not page.get_by_role("button", name="Resume").is_visible(), (
            "there is nothing to steer"
        )
    assert not folder.requests.exists()


def test_trials_are_filtered_sorted_and_opened_by_keyboard(tmp_path: Path, browser: Any) -> None:
    write_study(tmp_path / "platelets", trials=14)
    with served(tmp_path) as ask:
        settled(ask, "platelets")
        person = Person(browser)
        person.page.goto(f"http://127.0.0.1:{ask.port}/study/platelets#token={TOKEN}")
        person.page.wait_for_selector("html[data-shown=yes]")
        assert "token" not in person.page.url
        assert person.page.locator("button:has-text('Resume')").count() == 0, "it only shows"
        person.tab_to("mIoU")
        person.press("Enter")
        person.page.wait_for_selector("th[aria-sort=descending]:has-text('mIoU')")
        assert person.focus() == "mIoU", "the focus stays where it was"
        person.tab_to("with", "Shift+Tab")
        person.page.keyboard.type("worker lost")
        person.page.wait_for_selector("text=1 to 1 of 1 trials")
        person.tab_to("10 · " + person.page.locator("tbody a").inner_text()[5:])
        person.press("Enter")
        person.page.wait_for_selector("pre:has-text('the worker was lost')")
        assert person.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    tmp_path: Path, browser: Any, scheme: str
) -> None:
    folder = hostile_study(tmp_path / "hostile")
    trial = sorted(path.name for path in folder.trials.iterdir())[0]
    with served(tmp_path, allow_changes=True) as ask:
        settled(ask, "hostile")
        person = Person(browser, viewport={"width": 390, "height": 844}, color_scheme=scheme)
        base = f"http://127.0.0.1:{ask.port}"
        for path in ("/study/hostile", f"/study/hostile/trial/{trial}"):
            person.page.goto(f"{base}{path}#token={TOKEN}")
            person.page.wait_for_selector("html[data-shown=yes]")
            wide = "document.documentElement.scrollWidth - innerWidth"
            assert person.page.evaluate(wide) <= 0
            page = "getComputedStyle(document.body).backgroundColor"
            lightness = int(person.page.evaluate(page).split("(")[1].split(",")[0])
            assert (lightness < 60) == (scheme == "dark")
            assert (
                person.page.locator("main script, main img[onerror], main svg[onload]").count() == 0
            )
        assert person.complaints == []


def test_the_slices_of_a_volume_are_leafed_through_by_keyboard(
    tmp_path: Path, browser: Any
) -> None:
    folder = write_study(tmp_path / "volumes", trials=4)
    draw_slices(folder)
    trial = next(folder.trials.glob("*/pictures/segmentation-slices.png")).parent.parent.name
    with served(tmp_path) as ask:
        settled(ask, "volumes")
        person = Person(browser, viewport={"width": 390, "height": 844})
        page = person.page
        page.goto(f"http://127.0.0.1:{ask.port}/study/volumes/trial/{trial}#token={TOKEN}")
        page.wait_for_selector("html[data-shown=yes]")
        box = page.locator("figure:has-text('segmentation, slice by slice') .slices")
        assert box.locator(".planes").inner_text().split() == ["sagittal", "coronal", "axial"]
        assert box.locator(".at").inner_text() == "slice 13 of 24, 52 %"
        image = box.locator("img")
        image.scroll_into_view_if_needed()
        page.wait_for_function("image => image.naturalHeight > 0", arg=image.element_handle())
        shape = "i => [i.clientHeight / i.parentElement.clientHeight, i.clientWidth]"
        frames, width = image.evaluate(shape)
        assert abs(frames - 24) < 0.3 and width > 200
        box.locator("input").focus()
        person.press("ArrowRight", "ArrowRight")
        assert box.locator(".at").inner_text() == "slice 15 of 24, 60 %"
        lines = image.evaluate(
            "i => new DOMMatrix(getComputedStyle(i).transform).f / i.clientHeight"
        )
        assert abs(lines + 14 / 24) < 0.01
        assert box.locator("input").get_attribute("aria-valuetext") == "slice 15 of 24, 60 %"
        # something new of the trial is shown: the slice and the focus stay
        drawn = folder.pictures(trial) / "segmentation.png"
        (folder.pictures(trial) / "masks-050.png").write_bytes(drawn.read_bytes())
        page.wait_for_selector("h3:has-text('hidden at 50')")
        assert box.locator(".at").inner_text() == "slice 15 of 24, 60 %"
        assert page.evaluate("document.activeElement.type") == "range"
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        folder_of_shots = os.environ.get("MASKSTUDY_PICTURES")
        if folder_of_shots:
            page.screenshot(path=Path(folder_of_shots) / "console-slices.png", full_page=True)
        assert person.complaints == []


def test_the_report_is_drawn_in_its_sandbox(tmp_path: Path, browser: Any) -> None:
    write_study(tmp_path / "platelets", trials=5)
    with served(tmp_path) as ask:
        settled(ask, "platelets")
        person = Person(browser)
        base = f"http://127.0.0.1:{ask.port}"
        person.page.goto(f"{base}/#token={TOKEN}")
        person.page.wait_for_selector(".studies li")
        person.page.goto(f"{base}/report/platelets")
        person.page.wait_for_selector("html[data-drawn=yes]")
        assert person.page.evaluate("self.origin") == "null", "it is apart from the console"
        assert person.complaints == []
