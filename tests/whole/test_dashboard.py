"""What its users see of a study on a cluster: Ray's dashboard and the console, in Chromium.

pytest tests/whole/test_dashboard.py; pictures of every step go to $MASKSTUDY_PICTURES, if set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from study.folder import StudyFolder
from study.ledger import Outcome, is_held, read_results, read_rows
from tests.analysis.test_browser import CHROMIUM
from tests.clusters import Head, held_still, maskstudy
from tests.machine import free_ports, wait_until
from tests.studies import STUDY

pytestmark = [
    pytest.mark.ray,
    pytest.mark.browser,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's, about itself
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium on this machine"
    ),
]
TRIALS = 4
SLOW = 120_000  # milliseconds that a loaded machine may take


@pytest.fixture
def page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "CI must have Chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(SLOW)
        yield page
        browser.close()


def test_a_study_is_found_stopped_and_resumed_from_the_dashboard(
    head: Head, tmp_path: Path, page: Any
) -> None:
    address, storage = head.dashboard, head.storage
    pictures = Path(os.environ.get("MASKSTUDY_PICTURES") or tmp_path / "pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    study = tmp_path / "seen.yaml"
    study.write_text(STUDY.replace("study: tiny", "study: seen"))
    folder = StudyFolder(storage / "studies" / "seen")

    (storage / "studies").mkdir(exist_ok=True)
    options = ["--storage", str(storage / "studies"), "--port", str(free_ports(1)[0])]
    started = maskstudy("console", "--address", address, "--allow-changes", *options)
    link = re.search(r"study console: (http://127\.0\.0\.1:\d+/#token=\S+)", started.stdout)
    assert link, started.stdout

    maskstudy("submit", str(study), "--address", address, "--storage", str(storage))
    page.goto(f"{address}/#/jobs")
    page.wait_for_selector("td:has-text('study seen')")
    page.wait_for_selector("td:has-text('RUNNING')")
    page.screenshot(path=pictures / "1-jobs.png")
    page.goto(f"{address}/#/serve")
    page.wait_for_selector("text=maskstudy-console")
    page.screenshot(path=pictures / "2-serve.png")

    wait_until(lambda: folder.spec.is_file() and len(read_results(folder)) >= 1, 300)
    with held_still(head.mark):  # until somebody has found the button that stops it
        page.goto(link[1])
        page.click("a:has-text('seen')")
        page.wait_for_selector(".state:has-text('running')")
        page.screenshot(path=pictures / "3-running.png", full_page=True)
        page.click("button:has-text('Stop')")
        page.wait_for_selector("#said:has-text('has been stopped')")
    page.wait_for_selector(".state:has-text('interrupted')")
    page.screenshot(path=pictures / "4-stopped.png", full_page=True)
    wait_until(lambda: not is_held(folder), 60)
    ended, rows = read_results(folder), read_rows(folder)
    assert len(ended) < TRIALS, "it was not stopped midway"

    page.click("button:has-text('Resume')")
    page.wait_for_selector("#said:has-text('goes on as job seen-2-')")
    page.wait_for_selector(".state:has-text('running')")
    page.screenshot(path=pictures / "5-resumed.png", full_page=True)
    page.wait_for_selector(".state:has-text('finished')", timeout=400_000)
    page.screenshot(path=pictures / "6-finished.png", full_page=True)
    page.goto(f"{address}/#/jobs")
    page.wait_for_selector("td:has-text('SUCCEEDED')")
    page.screenshot(path=pictures / "7-jobs.png")

    results = read_results(folder)
    assert [result.outcome for result in results.values()] == [Outcome.COMPLETE] * TRIALS
    assert {trial: results[trial] for trial in ended} == ended, "a trial was run again"
    found = read_rows(folder)
    assert not found.duplicated(["trial", "phase", "step", "metric"]).any()
    assert len(found.merge(rows, how="inner")) == len(rows), "rows of before have changed"
