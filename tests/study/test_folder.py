"""Every path of a study lies inside its folder, and `folder.py` names what the contract names."""

import shlex
from pathlib import Path

import pytest

from study.folder import Storage, StudyFolder

FOLDER = StudyFolder(Path("studies/blobs"))


def relative(path: Path) -> str:
    return str(path.relative_to(FOLDER.root))


def test_a_command_names_a_study_from_wherever_it_is_typed(tmp_path):
    folder = StudyFolder(tmp_path / "my studies" / "blobs")
    told = ["blobs", "--storage", f"{tmp_path}/my studies"]
    assert shlex.split(folder.in_commands) == told
    remote = Storage.of("s3://bucket/prefix/").study("blobs")
    assert remote.in_commands == "blobs --storage s3://bucket/prefix"


def test_the_names_are_the_contract():
    assert [
        relative(path)
        for path in (
            FOLDER.spec,
            FOLDER.environment,
            FOLDER.suggestion(12),
            FOLDER.trial_config("a1"),
            FOLDER.rows("a1"),
            FOLDER.checkpoints("a1"),
            FOLDER.pictures("a1"),
            FOLDER.encoder("a1"),
            FOLDER.outcome("a1"),
            FOLDER.error("a1"),
            FOLDER.results,
            FOLDER.arms,
            FOLDER.report,
            FOLDER.epoch(3),
            FOLDER.lock,
        )
    ] == [
        "study.yaml",
        "environment.json",
        "suggestions/000012.json",
        "trials/a1/config.json",
        "trials/a1/rows",
        "trials/a1/checkpoints",
        "trials/a1/pictures",
        "trials/a1/encoder",
        "trials/a1/outcome.json",
        "trials/a1/error.txt",
        "results.parquet",
        "arms.parquet",
        "report.html",
        "epochs/000003.json",
        "lock",
    ]


@pytest.mark.parametrize(
    "trial", ["..", "../evil", "/etc", "a/b", "", "a\n", "a\0", "-rf", "x" * 65]
)
def test_an_id_that_leads_elsewhere_is_refused(trial):
    with pytest.raises(ValueError, match="trial id"):
        FOLDER.trial(trial)


def test_asking_for_a_path_makes_no_file(tmp_path):
    folder = StudyFolder(tmp_path / "blobs")
    assert not folder.rows("a1").exists() and not folder.stop_request.exists()
    assert list(tmp_path.iterdir()) == []
