"""What the comparison of overheads trains.  pytest tests/whole/test_overhead.py"""

from __future__ import annotations

from pathlib import Path

from study.conductor import Conductor, DataView
from study.folder import StudyFolder
from study.ledger import Ledger
from study.loading import load_spec
from tests import overhead
from trainables.data import default_cache, open_dataset, prepare


def test_alone_the_comparison_runs_the_trials_that_the_study_has_drawn(tmp_path: Path) -> None:
    path = tmp_path / "overhead.yaml"
    path.write_text(overhead.STUDY.format(trials=2, epochs=1))
    spec = load_spec(path)
    dataset = open_dataset(prepare(spec.data, spec.folder_of_yaml, default_cache()))
    view = DataView(spec.folder_of_yaml, dataset.fingerprint, is_labelled=True)
    with Ledger.open(StudyFolder(tmp_path / "studies" / "overhead"), {}) as ledger:
        ledger.freeze(spec.text, {"data_fingerprint": dataset.fingerprint})
        conductor = Conductor(spec, ledger, view)
        for _ in range(2):
            conductor.next()
    seconds = overhead.alone(path)
    assert len(seconds) == 2 and min(seconds) > 0
