"""The README's first command, from its beginning to its end.

pytest tests/whole/test_quickstart.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from study.folder import StudyFolder
from study.ledger import Outcome, read_results, read_suggestions
from tests.studies import run

pytestmark = [pytest.mark.ray, pytest.mark.chaos(2), pytest.mark.timeout(900)]

QUICKSTART = Path(__file__).parents[2] / "study" / "examples" / "quickstart.yaml"


def test_the_quickstart_runs_all_its_trials_and_writes_its_report(tmp_path: Path) -> None:
    path = Path(shutil.copy(QUICKSTART, tmp_path))
    code, printed = run(path, command=["run", str(path)], seconds=800)
    assert code == 0, printed
    folder = StudyFolder(tmp_path / "studies" / "quickstart")
    suggestions, results = read_suggestions(folder), read_results(folder)
    assert len(suggestions) == len(results) == 21
    assert len({s.arm for s in suggestions}) == 7
    assert {r.outcome for r in results.values()} == {Outcome.COMPLETE}
    assert str(folder.report) in printed
    assert folder.report.exists()
