"""Nothing acknowledged is lost, nothing is there twice, damage is named, one driver at a time."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from study import ledger
from study.folder import StudyFolder
from study.ledger import (
    FencedError,
    HeldError,
    Ledger,
    LedgerError,
    Outcome,
    Result,
    Suggestion,
    damage,
    holding,
    read_arms,
    read_environment,
    read_holder,
    read_results,
    read_rows,
    read_spec,
    read_suggestions,
)
from trainables import durable
from trainables.errors import StorageError, UserError

SPEC = "study: blobs\n"


def suggestion(number: int = 0, **changes: Any) -> Suggestion:
    settings = {
        "number": number,
        "trial": f"trial{number}",
        "arm": f"arm{number}",
        "seed": 7,
        "origin": "search",
        "config": {"model": {"patch": 8 + number}, "betas": [0.9, 0.95]},
        "params": {"model.patch": 8 + number},
        "labels": {"model.patch": f"{8 + number} px"},
    }
    return Suggestion(**{**settings, **changes})


def row(step: int, value: float = 0.5, metric: str = "loss") -> dict[str, Any]:
    return {
        "phase": "pretrain",
        "step": step,
        "epoch": 1.0,
        "progress": 0.25,
        "metric": metric,
        "value": value,
        "goal": "minimize",
        "unit": "",
        "seconds": 2.0,
    }


def ended(trial: str = "trial0", outcome: Outcome = Outcome.COMPLETE, error: str | None = None):
    return Result(trial, outcome, 3.5, error, {"pretrain": 1.0})


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path / "studies" / "blobs")


@pytest.fixture
def two_trials(folder: StudyFolder) -> StudyFolder:
    """Trial 0 has ended with steps 1 and 2, trial 1 runs and has step 1."""
    with Ledger.open(folder, {}) as writer:
        writer.freeze(SPEC, {"python": "3"})
        writer.suggest(suggestion(0))
        writer.suggest(suggestion(1))
        writer.commit(suggestion(0), [row(1, 0.5), row(1, 20.0, "probe_psnr")], "a")
        writer.commit(suggestion(0), [row(2, 0.25)], "a")
        writer.commit(suggestion(1), [row(1, 0.75)], "b")
        writer.finish(ended())
    return folder


def files(folder: StudyFolder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder.root)): path.read_bytes()
        for path in sorted(folder.root.rglob("*"))
        if path.is_file()
    }


# --- what is written is read


def test_rows_come_back_in_the_order_of_their_commits(two_trials):
    rows = read_rows(two_trials)
    assert list(rows.columns) == list(ledger.COLUMNS)
    assert rows[["trial", "step", "metric", "value"]].values.tolist() == [
        ["trial0", 1, "loss", 0.5],
        ["trial0", 1, "probe_psnr", 20.0],
        ["trial0", 2, "loss", 0.25],
        ["trial1", 1, "loss", 0.75],
    ]
    first = rows.iloc[0]
    assert (first.study, first.arm, first.seed, first.attempt) == ("blobs", "arm0", 7, "a")
    assert len(read_rows(two_trials, "trial1")) == 1


def test_suggestions_and_results_come_back(two_trials):
    assert read_suggestions(two_trials) == [suggestion(0), suggestion(1)]
    assert read_results(two_trials) == {"trial0": ended()}
    assert read_spec(two_trials) == SPEC
    assert read_environment(two_trials)["python"] == "3"
    assert read_holder(two_trials)["pid"] == os.getpid()
    assert damage(two_trials) == []


def test_a_study_that_has_not_begun_reads_as_empty(folder):
    assert read_rows(folder).empty and read_arms(folder).empty
    assert list(read_rows(folder).columns) == list(ledger.COLUMNS)
    assert read_suggestions(folder) == [] and read_results(folder) == {}
    assert read_spec(folder) is None and read_holder(folder) is None
    with Ledger.open(folder, {}) as writer:
        writer.compact()
    assert pd.read_parquet(folder.results).empty


def test_an_arm_is_one_line_with_flat_settings_and_labels(two_trials):
    arms = read_arms(two_trials)
    assert arms.to_dict("records") == [
        {
            "arm": f"arm{number}",
            "origin": "search",
            "model.patch": 8 + number,
            "betas": "[0.9, 0.95]",
            "search:model.patch": f"{8 + number} px",
        }
        for number in range(2)
    ]


def test_pandas_reads_the_compacted_tables_and_they_come_back_when_deleted(two_trials):
    for _ in range(2):
        with Ledger.open(two_trials, {}) as writer:
            writer.compact()
        rows = pd.read_parquet(two_trials.results)
        pd.testing.assert_frame_equal(rows, read_rows(two_trials), check_dtype=False)
        assert pd.read_parquet(two_trials.arms)["search:model.patch"].tolist() == ["8 px", "9 px"]
        two_trials.results.unlink()
        two_trials.arms.unlink()


def test_a_label_beside_a_number_is_written_as_text(folder):
    with Ledger.open(folder, {}) as writer:
        writer.suggest(suggestion(0, labels={"masking.ratio": "rising"}))
        writer.suggest(suggestion(1, labels={"masking.ratio": 0.75}))
        writer.suggest(suggestion(2, labels={}))
        writer.compact()
    assert pd.read_parquet(folder.arms)["search:masking.ratio"].tolist()[:2] == ["rising", "0.75"]


def test_of_rows_measured_twice_the_first_committed_counts(folder):
    with Ledger.open(folder, {}) as writer:
        writer.suggest(suggestion())
        writer.commit(suggestion(), [row(1, 0.1), row(1, 0.2)], writer.new_attempt())
        writer.commit(suggestion(), [row(1, 0.3)], writer.new_attempt())
    with Ledger.open(folder, {}) as writer:
        writer.commit(suggestion(), [row(1, 0.4), row(2, 0.5)], writer.new_attempt())
    rows = read_rows(folder)
    assert rows[["step", "value", "attempt"]].values.tolist() == [
        [1, 0.1, "000001-0001"],
        [2, 0.5, "000002-0001"],
    ]


def test_values_that_are_not_finite_are_kept_as_they_are(folder):
    with Ledger.open(folder, {}) as writer:
        writer.suggest(suggestion())
        writer.commit(suggestion(), [row(1, float("nan")), row(2, float("-inf"))], "a")
        writer.finish(ended(outcome=Outcome.DIVERGED))
        writer.compact()
    for values in (read_rows(folder).value, pd.read_parquet(folder.results).value):
        assert [str(value) for value in values] == ["nan", "-inf"]
    assert read_results(folder)["trial0"].outcome is Outcome.DIVERGED


@pytest.mark.parametrize("value", [None, "high", [1.0]])
def test_a_row_without_a_number_is_refused_whole(folder, value):
    with Ledger.open(folder, {}) as writer:
        writer.suggest(suggestion())
        with pytest.raises(ValueError, match="value"):
            writer.commit(suggestion(), [row(1), row(2, value)], "a")
        with pytest.raises(ValueError, match="a row has"):
            writer.commit(suggestion(), [{**row(1), "colour": "red"}], "a")
    assert read_rows(folder).empty


def test_a_failure_may_be_followed_by_an_outcome_and_an_outcome_by_nothing(folder):
    with Ledger.open(folder, {}) as writer:
        writer.suggest(suggestion())
        writer.finish(ended(outcome=Outcome.FAILED, error="disk on fire"))
        assert folder.error("trial0").read_text() == "disk on fire"
        writer.finish(ended())
        assert not folder.error("trial0").exists()
        with pytest.raises(AssertionError, match="has ended"):
            writer.finish(ended(outcome=Outcome.STOPPED))
    assert read_results(folder) == {"trial0": ended()}


def test_only_what_was_suggested_next_is_written(folder):
    with Ledger.open(folder, {}) as writer:
        with pytest.raises(AssertionError, match="number 0 is next"):
            writer.suggest(suggestion(1))
        with pytest.raises(AssertionError, match="never suggested"):
            writer.commit(suggestion(0), [row(1)], "a")
    with Ledger.open(folder, {}) as writer:
        writer.suggest(suggestion(0))
    with Ledger.open(folder, {}) as writer:
        writer.suggest(suggestion(1))
    assert [found.number for found in read_suggestions(folder)] == [0, 1]


def test_another_study_text_is_refused_with_the_difference(two_trials):
    with Ledger.open(two_trials, {}) as writer:
        writer.freeze(SPEC, {})
        with pytest.raises(UserError, match=r"(?s)-study: blobs.*\+study: other"):
            writer.freeze("study: other\n", {})
        writer.freeze(SPEC + "seeds: 3\n", {"python": "4"}, extends=True)
    assert read_spec(two_trials) == SPEC + "seeds: 3\n"


def test_threads_may_commit_at_once(folder):
    with Ledger.open(folder, {}) as writer, ThreadPoolExecutor(4) as pool:
        writer.suggest(suggestion())
        list(pool.map(lambda step: writer.commit(suggestion(), [row(step)], "a"), range(40)))
    assert sorted(read_rows(folder).step) == list(range(40))


# --- one driver


def test_a_second_driver_is_refused_and_told_who_holds_the_study(folder):
    with Ledger.open(folder, {"host": "node7", "pid": 4321, "job_id": "raysubmit_1"}):
        with pytest.raises(HeldError, match=r"epoch 1 .*node7.*4321.*raysubmit_1") as refusal:
            Ledger.open(folder, {})
        assert refusal.value.exit_code == 75
        assert f"maskstudy stop {folder.in_commands}" in str(refusal.value)
    Ledger.open(folder, {}).close()
    assert read_holder(folder)["epoch"] == 2


def test_a_driver_killed_while_it_signed_still_counts(folder):
    folder.epochs.mkdir(parents=True)
    folder.epoch(9).write_bytes(b"")
    assert read_holder(folder) == {"epoch": 9}
    with Ledger.open(folder, {}) as writer:
        assert writer.epoch == 10


def test_a_stale_driver_is_fenced_and_leaves_no_row(two_trials):
    stale = Ledger.open(two_trials, {})
    two_trials.lock.unlink()  # as on a file system that loses locks
    with Ledger.open(two_trials, {"job_id": "newer"}) as newer:
        before = files(two_trials)
        for write in (
            lambda: stale.commit(suggestion(1), [row(2, 9.0)], "a"),
            lambda: stale.suggest(suggestion(2)),
            lambda: stale.finish(ended("trial1")),
            stale.compact,
        ):
            with pytest.raises(FencedError, match=r"epoch 2.*epoch 3.*newer") as refusal:
                write()
            stale._broken = None  # each write is fenced by itself
            assert refusal.value.exit_code == 75
        assert files(two_trials) == before
        newer.commit(suggestion(1), [row(2, 0.5)], "b")
    stale.close()
    assert read_rows(two_trials, "trial1").value.tolist() == [0.75, 0.5]


def test_a_driver_paused_right_before_its_rename_is_fenced(two_trials, monkeypatch):
    stale = Ledger.open(two_trials, {})
    two_trials.lock.unlink()
    look, newer = stale._check_fence, []

    def look_then_sleep_through_a_takeover():
        look()
        if not newer:
            newer.append(Ledger.open(two_trials, {}))

    monkeypatch.setattr(stale, "_check_fence", look_then_sleep_through_a_takeover)
    with pytest.raises(FencedError):
        stale.commit(suggestion(1), [row(2, 9.0)], "a")
    assert len(newer) == 1
    assert read_rows(two_trials, "trial1").value.tolist() == [0.75]
    newer[0].close()
    stale.close()


def compete(root: Path, start: Any, outcomes: Any, all_have_told: Any) -> None:
    start.wait()
    try:
        with Ledger.open(StudyFolder(root), {}):
            outcomes.put("holds")
            all_have_told.wait()
    except HeldError:
        outcomes.put("refused")


def test_of_four_drivers_at_once_one_holds_the_study(folder, processes):
    start, outcomes, all_have_told = processes.Event(), processes.Queue(), processes.Event()
    arguments = (folder.root, start, outcomes, all_have_told)
    drivers = [processes.Process(target=compete, args=arguments) for _ in range(4)]
    for driver in drivers:
        driver.start()
    start.set()
    told = sorted(outcomes.get(timeout=60) for _ in drivers)
    all_have_told.set()
    for driver in drivers:
        driver.join()
    assert told == ["holds", "refused", "refused", "refused"]


def hold_and_write(root: Path, holds: Any, goes_on: Any) -> None:
    with Ledger.open(StudyFolder(root), {"who": "the holder"}) as writer:
        writer.suggest(suggestion(0))
        holds.set()
        goes_on.wait()
        writer.commit(suggestion(0), [row(1)], "a")


def test_a_driver_that_is_stopped_holds_the_study_and_goes_on_when_it_is_continued(
    folder: StudyFolder, processes: Any
) -> None:
    holds, goes_on = processes.Event(), processes.Event()
    holder = processes.Process(target=hold_and_write, args=(folder.root, holds, goes_on))
    holder.start()
    assert holds.wait(30)
    os.kill(holder.pid, signal.SIGSTOP)
    before = files(folder)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(HeldError, match="the holder"):
            Ledger.open(folder, {})
    assert time.monotonic() - began < 3 * 5
    assert files(folder) == before
    os.kill(holder.pid, signal.SIGCONT)
    goes_on.set()  # not before: it waits until the holder, which may wait for it by now, wakes
    holder.join(30)
    assert holder.exitcode == 0
    assert read_rows(folder).value.tolist() == [0.5]
    with Ledger.open(folder, {}) as taken_over:
        assert taken_over.epoch == 2


def test_clocks_do_not_matter(two_trials, monkeypatch):
    class Yesterday:
        @staticmethod
        def now(zone: Any) -> pd.Timestamp:
            return pd.Timestamp(0, tz=zone)

    monkeypatch.setattr(holding, "datetime", Yesterday)
    with Ledger.open(two_trials, {}) as writer:
        writer.commit(suggestion(1), [row(1, 9.0), row(2, 0.5)], "c")
    for number, path in enumerate(sorted(two_trials.root.rglob("*"), reverse=True)):
        os.utime(path, (number, number))
    assert read_rows(two_trials, "trial1").value.tolist() == [0.75, 0.5]


# --- moved and read-only


def test_a_renamed_copied_or_linked_study_reads_and_continues(two_trials, tmp_path):
    rows = read_rows(two_trials)
    moved = StudyFolder(shutil.move(two_trials.root, tmp_path / "elsewhere"))
    link = tmp_path / "link"
    link.symlink_to(moved.root)
    for place in (moved, StudyFolder(link)):
        there = read_rows(place)
        assert set(there.study) == {place.root.name}
        pd.testing.assert_frame_equal(there.drop(columns="study"), rows.drop(columns="study"))
        with Ledger.open(place, {}) as writer:
            writer.commit(suggestion(1), [row(1)], "b")
    assert damage(moved) == []


def test_reading_a_read_only_study_changes_nothing(two_trials):
    paths = [two_trials.root, *two_trials.root.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    before = [(path, path.stat().st_mtime_ns) for path in paths]
    try:
        assert len(read_rows(two_trials)) == 4 and damage(two_trials) == []
        read_results(two_trials), read_arms(two_trials), read_spec(two_trials)
        after = [two_trials.root, *two_trials.root.rglob("*")]
        assert [(path, path.stat().st_mtime_ns) for path in after] == before
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)


def test_no_file_holds_an_absolute_path(folder, tmp_path):
    error = (
        f'File "{tmp_path}/env/lib/torch/nn.py", line 3\nOSError: {folder.root}/trials/x is full'
    )
    with Ledger.open(folder, {}) as writer:
        writer.freeze(SPEC, {})
        writer.suggest(suggestion())
        writer.commit(suggestion(), [row(1)], "a")
        writer.finish(ended(outcome=Outcome.FAILED, error=error))
        writer.compact()
    for name, content in files(folder).items():
        assert str(tmp_path).encode() not in content, name
    assert folder.error("trial0").read_text() == (
        'File ".../torch/nn.py", line 3\nOSError: <study>/trials/x is full'
    )


# --- damage


def part(folder: StudyFolder, trial: str = "trial0", number: int = 0) -> Path:
    return sorted(folder.rows(trial).glob("*.parquet"))[number]


READERS: dict[str, tuple[Callable[[StudyFolder], Path], Callable[[StudyFolder], Any]]] = {
    "rows": (part, read_rows),
    "last rows of a trial that ended": (lambda f: part(f, number=1), read_rows),
    "suggestion": (lambda f: f.suggestion(0), read_suggestions),
    "outcome": (lambda f: f.outcome("trial0"), read_results),
    "study.yaml": (lambda f: f.spec, read_spec),
    "environment.json": (lambda f: f.environment, read_spec),
}
HARMS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-3],
    "zeros inside": lambda content: content[:4] + bytes(8) + content[12:],
    "garbage": lambda content: random.Random(0).randbytes(len(content)),
    "another file": lambda content: b'{"a": 1}\n',
    "a list": lambda content: b"[]",
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_named(two_trials, kind, harm):
    find, read = READERS[kind]
    path = find(two_trials)
    path.write_bytes(HARMS[harm](path.read_bytes()))
    with pytest.raises(LedgerError, match=path.name) as found:
        read(two_trials)
    assert found.value.exit_code == 74
    told = [str(error) for error in damage(two_trials)]
    assert any(path.name in each for each in told) and len(told) == len(set(told))


@pytest.mark.parametrize(
    "kind", [kind for kind in READERS if kind not in ("outcome", "study.yaml")]
)
def test_a_deleted_file_is_missed(two_trials, kind):
    find, read = READERS[kind]
    find(two_trials).unlink()
    with pytest.raises(LedgerError, match="missing"):
        read(two_trials)


def test_a_deleted_part_of_a_running_trial_is_missed_too(two_trials):
    with Ledger.open(two_trials, {}) as writer:
        writer.commit(suggestion(1), [row(2)], "b")
    part(two_trials, "trial1").unlink()
    with pytest.raises(LedgerError, match="part 1 of 1 or more is missing"):
        read_rows(two_trials)


@pytest.mark.parametrize("kind", READERS)
def test_each_of_200_flipped_bits_is_found(two_trials, kind):
    find, read = READERS[kind]
    path = find(two_trials)
    good = path.read_bytes()
    before = read(two_trials)
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        path.write_bytes(flipped(good, rng.randrange(len(good) * 8)))
        try:
            after = read(two_trials)
        except LedgerError as error:
            assert path.name in str(error)
            found += 1
        else:  # a flip between the fields of a JSON file may leave its content as it was
            assert path.suffix == ".json" and after == before
    assert found == 200 or (path.suffix == ".json" and found > 150)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_page_checksums_find_what_the_name_does_not(folder):
    """With names made to fit the flipped files, no flip gives a wrong number."""
    values = [step / 7 for step in range(500)]
    with Ledger.open(folder, {}) as writer:
        writer.suggest(suggestion())
        writer.commit(suggestion(), [row(step, value) for step, value in enumerate(values)], "a")
    path = part(folder)
    good = path.read_bytes()
    place = list(ledger.COLUMNS).index("value")
    chunk = pq.ParquetFile(pa.BufferReader(good)).metadata.row_group(0).column(place)
    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    bits = range(start * 8, (start + chunk.total_compressed_size) * 8)
    path.unlink()
    harmless = wrong_unchecked = 0
    for bit in random.Random(0).sample(bits, 200):
        content = flipped(good, bit)
        path = path.with_name(f"{path.name[:14]}{zlib.crc32(content):08x}.parquet")
        path.write_bytes(content)
        try:
            assert read_rows(folder).value.tolist() == values
            harmless += 1  # statistics in the header of a page, which nobody reads
        except LedgerError as error:
            assert path.name in str(error)
        with contextlib.suppress(OSError, pa.ArrowException):
            wrong_unchecked += pq.read_table(path)["value"].to_pylist() != values
        path.unlink()
    print(f"{200 - harmless} of 200 found; unchecked, {wrong_unchecked} give wrong numbers")
    assert harmless < 10 and wrong_unchecked > 100


def test_files_in_the_wrong_place_are_named(two_trials):
    stray = two_trials.rows("trial1") / part(two_trials, number=1).name
    shutil.copy(part(two_trials, number=1), stray)
    with pytest.raises(LedgerError, match="holds rows of trial0"):
        read_rows(two_trials)
    stray.rename(stray.with_name("mine.parquet"))
    with pytest.raises(LedgerError, match="not a name the ledger gives"):
        read_rows(two_trials)
    shutil.rmtree(two_trials.trial("trial1"))
    shutil.copy(two_trials.outcome("trial0"), two_trials.outcome("trial0").with_name("o"))
    shutil.copytree(two_trials.trial("trial0"), two_trials.trial("trial1"))
    with pytest.raises(LedgerError, match="holds the outcome of trial 'trial0'"):
        read_results(two_trials)
    shutil.copytree(two_trials.trial("trial0"), two_trials.trial("trial9"))
    with pytest.raises(LedgerError, match="trial9, which no suggestion names"):
        read_rows(two_trials)
    shutil.copy(two_trials.suggestion(0), two_trials.suggestion(1))
    with pytest.raises(LedgerError, match="holds number 0 of trial 'trial0'"):
        read_suggestions(two_trials)


def test_a_lost_suggestion_comes_back_from_its_copy_as_the_message_says(two_trials):
    two_trials.suggestion(0).unlink()
    with pytest.raises(LedgerError, match=r"config\.json of its trial"):
        Ledger.open(two_trials, {})
    shutil.copy(two_trials.trial_config("trial0"), two_trials.suggestion(0))
    assert read_suggestions(two_trials) == [suggestion(0), suggestion(1)]


def test_a_removed_trial_folder_lets_the_trial_start_anew(two_trials):
    shutil.rmtree(two_trials.trial("trial0"))
    with Ledger.open(two_trials, {}) as writer:
        assert read_results(two_trials) == {}
        writer.commit(suggestion(0), [row(1, 0.125)], "c")
    assert read_rows(two_trials, "trial0").value.tolist() == [0.125]
    assert two_trials.trial_config("trial0").exists()


def test_extension_types_are_rejected_before_arrow_opens_them(two_trials):
    class Trap(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.float64(), "trap")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> "Trap":
            raise SystemExit("code of the file ran")

    pa.register_extension_type(Trap())
    try:
        path = part(two_trials, "trial1")
        table = pa.table({"value": pa.ExtensionArray.from_storage(Trap(), pa.array([1.0]))})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        content = sink.getvalue().to_pybytes()
        path.unlink()
        trap = path.with_name(f"{path.name[:14]}{zlib.crc32(content):08x}.parquet")
        trap.write_bytes(content)
        with pytest.raises(LedgerError, match="Arrow schema"):
            read_rows(two_trials)
        with pytest.raises(SystemExit):  # the trap works
            pq.ParquetFile(trap)
    finally:
        pa.unregister_extension_type("trap")


# --- storage that fails, power that goes


class PowerCut(BaseException):
    pass


class FaultyOs:
    """`os` for the ledger, with a fault at the k-th operation, and a model of what a disk keeps.

    A file keeps what was in it at its last fsync, a folder the names it had at its own. A failing
    write writes half of what it was given.
    """

    OPERATIONS = ("open", "write", "fsync", "replace", "mkdir")

    def __init__(self, fault_at: int, fault: BaseException, ignore_fsync: bool = False) -> None:
        self.fault_at, self.fault, self.ignore_fsync = fault_at, fault, ignore_fsync
        self.done = 0
        self.kept: dict[int, bytes] = {}  # inode -> content
        self.names: dict[int, dict[str, int]] = {}  # inode of a folder -> name -> inode

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.OPERATIONS:
            return real

        def operation(*arguments: Any) -> Any:
            self.done += 1
            if self.done == self.fault_at:
                if name == "write":
                    os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise self.fault
            if name == "fsync":
                return None if self.ignore_fsync else self.keep(arguments[0])
            result = real(*arguments)
            if name == "open" and arguments[1] & os.O_CREAT:
                self.kept.pop(os.fstat(result).st_ino, None)  # inode numbers come again
            return result

        return operation

    def keep(self, descriptor: int) -> None:
        place = f"/proc/self/fd/{descriptor}"
        inode = os.fstat(descriptor).st_ino
        if os.path.isdir(place):
            self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(place)}
        else:
            self.kept[inode] = Path(place).read_bytes()

    def after_power_cut(self, root: Path, target: Path) -> None:
        """What is left of `root`; content that was never synced is torn."""
        target.mkdir(parents=True)
        real = {path.stat().st_ino: path for path in root.rglob("*")}
        self._restore(root.stat().st_ino, target, real)

    def _restore(self, inode: int, target: Path, real: dict[int, Path]) -> None:
        for name, child in self.names.get(inode, {}).items():
            if child in real and real[child].is_dir():
                (target / name).mkdir()
                self._restore(child, target / name, real)
            elif child in self.kept:
                (target / name).write_bytes(self.kept[child])
            elif child in real:
                torn = real[child].read_bytes()
                (target / name).write_bytes(torn[: len(torn) // 2])


def give_os(patch: pytest.MonkeyPatch, faulty: FaultyOs) -> None:
    """To every module through which a driver touches the disk."""
    for module in (durable, holding):
        patch.setattr(module, "os", faulty)


def history(folder: StudyFolder, acknowledged: list[str]) -> None:
    """A small study that goes on where it stopped, telling what was acknowledged."""
    known = {found.trial for found in read_suggestions(folder)}
    with Ledger.open(folder, {}) as writer:
        writer.freeze(SPEC, {})
        acknowledged.append("spec")
        for number in range(2):
            trial = suggestion(number)
            if trial.trial not in known:
                writer.suggest(trial)
            acknowledged.append(trial.trial)
            if trial.trial in read_results(folder):
                continue
            for step in (1, 2):
                writer.commit(trial, [row(step, number + step / 4)], writer.new_attempt())
                acknowledged.append(f"{trial.trial}: {step}")
            writer.finish(ended(trial.trial))
            acknowledged.append(f"{trial.trial}: {Outcome.COMPLETE}")
        writer.compact()
        acknowledged.append("compacted")


def published(folder: StudyFolder) -> list[str]:
    """What a reader finds, in the words of `history`; raises if anything is damaged."""
    errors = damage(folder)
    assert not errors, errors
    rows = read_rows(folder)
    for line in rows.itertuples():
        assert line.value == int(line.trial[-1]) + line.step / 4
    return [
        *(["spec"] if read_spec(folder) == SPEC else []),
        *(found.trial for found in read_suggestions(folder)),
        *(f"{line.trial}: {line.step}" for line in rows.itertuples()),
        *(f"{result.trial}: {result.outcome}" for result in read_results(folder).values()),
        *(["compacted"] if folder.arms.exists() and len(pq.read_table(folder.results)) else []),
    ]


def test_every_operation_may_fail_for_lack_of_space_and_nothing_is_lost(tmp_path, monkeypatch):
    codes = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
    count = 0
    while True:
        count += 1
        code = codes[count % 3]
        folder = StudyFolder(tmp_path / "s" / f"{count}")
        faulty = FaultyOs(count, OSError(code, os.strerror(code)))
        acknowledged: list[str] = []
        with monkeypatch.context() as patch:
            give_os(patch, faulty)
            try:
                history(folder, acknowledged)
                break
            except StorageError as error:
                assert error.exit_code == 74
                assert str(folder.root.parent) in str(error) and "bytes" in str(error)
                assert os.strerror(code) in str(error)
        found = published(folder)
        assert set(acknowledged) <= set(found), f"lost at operation {count}"
        assert len(found) <= len(acknowledged) + 1
        with monkeypatch.context() as patch:
            give_os(patch, FaultyOs(0, PowerCut()))
            history(folder, [])
        assert sorted(published(folder)) == sorted(EVERYTHING)
        assert not list(folder.root.rglob("*.tmp"))
    assert count > 100


EVERYTHING = [
    *("spec", "compacted", "trial0", "trial1"),
    *("trial0: 1", "trial0: 2", "trial1: 1", "trial1: 2"),
    *("trial0: complete", "trial1: complete"),
]


def cut_power_everywhere(tmp_path: Path, monkeypatch: Any, **faults: Any) -> int:
    """Cut at each operation; a killed process leaves the folder, a power cut what was synced."""
    count = 0
    while True:
        count += 1
        folder = StudyFolder(tmp_path / f"{count}")
        folder.root.mkdir()
        faulty = FaultyOs(count, PowerCut(), **faults)
        acknowledged: list[str] = []
        with monkeypatch.context() as patch:
            give_os(patch, faulty)
            try:
                history(folder, acknowledged)
                finished = True
            except PowerCut:
                finished = False
        left = StudyFolder(tmp_path / f"{count}-left")
        faulty.after_power_cut(folder.root, left.root)
        for place in (folder, left):
            found = published(place)
            assert set(acknowledged) <= set(found), f"lost at operation {count}"
            assert len(found) <= len(acknowledged) + 1
        if finished:
            return count


def test_power_may_go_at_every_operation_and_nothing_is_lost(tmp_path, monkeypatch):
    assert cut_power_everywhere(tmp_path, monkeypatch) > 100


def write_in_place(self: Ledger, path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = durable.os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    durable.os.write(descriptor, content)
    durable.os.fsync(descriptor)
    os.close(descriptor)


def test_the_power_cut_test_fails_without_fsync(tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="lost at"):
        cut_power_everywhere(tmp_path, monkeypatch, ignore_fsync=True)


def test_the_power_cut_test_fails_without_fsync_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "sync", lambda path: None)
    with pytest.raises(AssertionError, match="lost at"):
        cut_power_everywhere(tmp_path, monkeypatch)


def test_the_power_cut_test_fails_with_writes_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "_put", write_in_place)
    with pytest.raises((AssertionError, LedgerError)):
        cut_power_everywhere(tmp_path, monkeypatch)


def test_a_disk_that_takes_little_at_a_time_gets_everything(folder, monkeypatch):
    class Sip(FaultyOs):
        def write(self, descriptor: int, content: memoryview) -> int:
            return os.write(descriptor, content[:100])

    give_os(monkeypatch, Sip(0, PowerCut()))
    history(folder, [])
    assert sorted(published(folder)) == sorted(EVERYTHING)


def test_after_a_failed_write_the_driver_writes_no_more(two_trials, monkeypatch):
    with Ledger.open(two_trials, {}) as writer:
        with monkeypatch.context() as patch:
            give_os(patch, FaultyOs(3, OSError(errno.EIO, "Input/output error")))
            with pytest.raises(StorageError, match="Input/output error"):
                writer.commit(suggestion(1), [row(2)], "b")
        with pytest.raises(StorageError, match="an earlier write failed"):
            writer.commit(suggestion(1), [row(2)], "b")
    with Ledger.open(two_trials, {}) as writer:
        writer.commit(suggestion(1), [row(2)], "b")
    assert len(read_rows(two_trials, "trial1")) == 2


# --- killed processes


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes forked from a small server that has the ledger loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "study.ledger"])
    return context


def write_until_killed(root: Path, side_log: Path, started: Any) -> None:
    """Trials of 4 commits; each acknowledgement goes to the side log before the next write."""
    started.set()
    folder = StudyFolder(root)
    with open(side_log, "a", buffering=1) as log, Ledger.open(folder, {}) as writer:

        def acknowledge(text: str) -> None:
            log.write(text + "\n")
            os.fsync(log.fileno())

        trials = read_suggestions(folder)
        results = read_results(folder)
        while True:
            open_trials = [trial for trial in trials if trial.trial not in results]
            trial = open_trials[0] if open_trials else suggestion(len(trials))
            if not open_trials:
                writer.suggest(trial)
                trials.append(trial)
                acknowledge(trial.trial)
            attempt = writer.new_attempt()
            for step in range(4):
                writer.commit(trial, [row(step, trial.number + step / 4)], attempt)
                acknowledge(f"{trial.trial}: {step}")
            writer.finish(ended(trial.trial))
            results[trial.trial] = ended(trial.trial)
            acknowledge(f"{trial.trial}: {Outcome.COMPLETE}")
            if trial.number % 5 == 4:
                writer.compact()


def test_sixty_killed_drivers_lose_no_acknowledged_row(folder, processes, tmp_path):
    side_log = tmp_path / "acknowledged"
    rng = random.Random(0)
    leftovers = 0
    for kill in range(60):
        started = processes.Event()
        writer = processes.Process(target=write_until_killed, args=(folder.root, side_log, started))
        writer.start()
        started.wait()
        time.sleep(rng.uniform(0.0, 0.2))
        writer.kill()
        writer.join()
        assert writer.exitcode == -9, f"the writer ended by itself before kill {kill}"
        leftovers += len(list(folder.root.rglob("*.tmp")))
        if kill % 10 == 9:
            check_side_log(folder, side_log)
    Ledger.open(folder, {}).close()
    assert not list(folder.root.rglob("*.tmp"))
    num_acknowledged = check_side_log(folder, side_log)
    print(f"60 kills, {num_acknowledged} acknowledged, {leftovers} leftovers swept")
    assert num_acknowledged > 20  # on a busy machine; about 1,000 otherwise


def check_side_log(folder: StudyFolder, side_log: Path) -> int:
    assert damage(folder) == []
    rows = read_rows(folder)
    assert not rows.duplicated(ledger.KEY).any()
    assert (rows.value == rows.trial.str[5:].astype(int) + rows.step / 4).all()
    found = {found.trial for found in read_suggestions(folder)}
    found |= {f"{line.trial}: {line.step}" for line in rows.itertuples()}
    found |= {f"{result.trial}: {result.outcome}" for result in read_results(folder).values()}
    acknowledged = side_log.read_text().splitlines()
    assert set(acknowledged) <= found
    return len(acknowledged)


def test_the_seal_of_a_file_is_its_content_not_its_layout(two_trials):
    path = two_trials.suggestion(0)
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_suggestions(two_trials)[0] == suggestion(0)
