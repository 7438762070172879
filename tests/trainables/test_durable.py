"""What is written is there whole or not at all, whenever the process or the power goes.

pytest tests/trainables/test_durable.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainables import durable


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, in its order."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def told_fsync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def told_replace(old: Path, new: Path) -> None:
        done.append(f"rename {old.name} {new.name}")
        replace(old, new)

    monkeypatch.setattr(durable.os, "fsync", told_fsync)
    monkeypatch.setattr(durable.os, "replace", told_replace)
    return done


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_is_synced_and_never_written_over(tmp_path: Path, calls: list[str]) -> None:
    path = tmp_path / "new"
    durable.write_new(path, b"first")
    assert calls == ["sync new"]
    with pytest.raises(FileExistsError):
        durable.write_new(path, b"second")
    assert path.read_bytes() == b"first"


def test_what_is_published_lasts_when_that_returns(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "file").write_bytes(b"old")
    durable.write_new(tmp_path / "aside", b"new")
    durable.publish(tmp_path / "aside", tmp_path / "file")
    assert calls == ["sync aside", "rename aside file", f"sync {tmp_path.name}"]
    assert (tmp_path / "file").read_bytes() == b"new" and names(tmp_path) == ["file"]


def test_a_published_folder_has_every_file_on_the_disk_before_its_name(
    tmp_path: Path, calls: list[str]
) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    for name in ("one", "two"):
        (aside / name).write_text(name)
    durable.publish_folder(aside, tmp_path / "folder")
    assert sorted(calls[:2]) == ["sync one", "sync two"]
    assert calls[2:] == ["sync aside", "rename aside folder", f"sync {tmp_path.name}"]
    assert names(tmp_path / "folder") == ["one", "two"]


def test_a_folder_lasts_with_those_above_it(tmp_path: Path, calls: list[str]) -> None:
    for _ in range(2):
        durable.make_folder(tmp_path / "a" / "b")
    assert calls == [f"sync {tmp_path.name}", "sync a"]


@pytest.mark.parametrize("only_writer", [True, False])
@pytest.mark.parametrize("synced", [True, False])
def test_a_file_is_replaced_once_all_of_it_is_written(
    tmp_path: Path, calls: list[str], synced: bool, only_writer: bool
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with durable.replacing(path, synced=synced, only_writer=only_writer) as aside:
        aside.write_text("new")
        assert path.read_text() == "old" and not calls
    rename = f"rename {aside.name} file"
    assert calls == ([f"sync {aside.name}", rename] if synced else [rename])
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), durable.replacing(path) as aside:
        aside.write_text("ne")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_file_that_cannot_be_synced_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), durable.replacing(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_process_killed_before_the_rename_leaves_the_old_file_and_is_written_over(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, pathlib, signal, sys; from trainables import durable\n"
        "with durable.replacing(pathlib.Path(sys.argv[1]), only_writer=True) as aside:\n"
        "    aside.write_text('half of what')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text() == "old" and len(names(tmp_path)) == 2
    with durable.replacing(path, only_writer=True) as aside:
        aside.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


def test_two_processes_do_not_write_aside_to_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    with durable.replacing(path) as aside:
        aside.write_text("ours")
        with monkeypatch.context() as other:
            other.setattr(durable.os, "getpid", lambda: 1)
            with durable.replacing(path) as theirs:
                theirs.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours"


def test_the_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        durable.write_new(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_removed_hides_no_error(tmp_path: Path) -> None:
    durable.discard(tmp_path / "absent")
    durable.discard(tmp_path)  # a folder


def test_the_lowest_layer_imports_the_standard_library_alone() -> None:
    code = "import sys; before = set(sys.modules); import trainables.durable;"
    code += "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}"
    code += " - sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['trainables']"
