"""Studies in a store of objects: what counts is there, one driver at a time, mirrors may vanish."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import doctor
from study import mirror, requests
from study.commands.check import check_study
from study.commands.finding import find_study
from study.folder import Storage, StudyFolder
from study.ledger import (
    FencedError,
    HeldError,
    Ledger,
    Outcome,
    is_held,
    read_results,
    read_rows,
    read_spec,
    read_suggestions,
)
from study.overview import studies
from tests.machine import wait_until
from tests.study.test_ledger import SPEC, ended, row, suggestion
from trainables import checkpoint
from trainables.errors import StorageError, UserError
from trainables.storage import check_uri, mirror_of, store


@pytest.fixture
def folder(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> StudyFolder:
    monkeypatch.setattr(mirror, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(mirror, "BEAT_SECONDS", 0.3)
    mirror._beats.clear()
    return Storage.of(bucket.uri).study("blobs")


def drive(folder: StudyFolder, trials: int = 2) -> None:
    with Ledger.open(folder, {"job": None}) as ledger:
        ledger.freeze(SPEC, {"machine": "test"})
        for number in range(trials):
            ledger.suggest(suggestion(number))
            ledger.commit(suggestion(number), [row(1), row(2)], "a")
            ledger.finish(ended(f"trial{number}"))
        ledger.compact()


def elsewhere(folder: StudyFolder, tmp_path: Path, monkeypatch: Any) -> StudyFolder:
    """The study as another machine sees it."""
    monkeypatch.setenv("MASKSTUDY_CACHE", str(tmp_path / "elsewhere"))
    return Storage.of(folder.storage.remote).study(folder.root.name)


def die(ledger: Ledger) -> None:
    """End as a killed driver does: nothing is said to the store any more."""
    assert ledger._heart is not None
    ledger._heart._ended.set()
    ledger._heart.join()
    os.close(ledger._lock)
    ledger._lock = -1


def files(place: Path) -> dict[str, bytes]:
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != "lock"
    }


# --- what counts is in the store


def test_a_study_is_the_same_in_a_store_and_in_a_folder(folder, tmp_path):
    local = StudyFolder(tmp_path / "local" / "blobs")
    drive(folder)
    drive(local)
    there = store(folder.remote).entries()
    assert set(files(local.root)) == set(there) - {"epochs/000001.beat", "epochs/000001.over"}
    for name, content in files(local.root).items():
        if not name.startswith("epochs/"):
            assert store(folder.remote).read(name)[0] == content, name
            assert (folder.root / name).read_bytes() == content, name


def test_another_machine_sees_all_of_it_and_a_vanished_mirror_comes_back(
    folder, tmp_path, monkeypatch
):
    drive(folder)
    before = files(folder.root)
    shutil.rmtree(folder.root)
    mirror.pull(folder)
    tables = {"results.parquet", "arms.parquet"}  # no reader needs them
    assert files(folder.root) == {k: before[k] for k in before.keys() - tables}
    other = elsewhere(folder, tmp_path, monkeypatch)
    assert other.root != folder.root
    mirror.pull(other)
    assert len(read_rows(other)) == 4 and len(read_results(other)) == 2
    assert read_spec(other) == SPEC


def test_what_the_store_lacks_does_not_stay_in_the_mirror(folder):
    drive(folder)
    extra = folder.suggestion(2)
    extra.write_bytes(folder.suggestion(1).read_bytes())
    mirror.pull(folder)
    assert not extra.exists() and len(read_suggestions(folder)) == 2


def test_a_part_of_another_content_in_the_mirror_is_replaced_by_the_stores(folder):
    drive(folder)
    part = next(folder.rows("trial0").iterdir())
    right = part.read_bytes()
    part.write_bytes(right[:-5])
    mirror.pull(folder)
    assert part.read_bytes() == right


def test_what_changed_in_the_store_comes_even_if_it_is_as_long_as_before(folder):
    drive(folder)
    mirror.pull(folder)
    name = folder.name_of(folder.outcome("trial0"))
    changed = folder.outcome("trial0").read_bytes().swapcase()
    store(folder.remote).put(name, changed)
    mirror.pull(folder)
    assert folder.outcome("trial0").read_bytes() == changed


@pytest.mark.parametrize(
    "name",
    ["trials/../study.yaml", "requests/../../x.json", "trials/a/rows/.parquet", "/study.yaml", "x"],
)
def test_names_that_no_ledger_gives_are_left_in_the_store(name):
    assert not mirror._LEDGER.fullmatch(name) and not mirror._SHOWN.fullmatch(name)


def test_nothing_secret_is_written_to_any_file(bucket, folder, tmp_path):
    drive(folder)
    secret = os.environ[bucket.secret_variable].encode()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert secret not in path.read_bytes(), path
    for name in store(folder.remote).entries():
        assert secret not in store(folder.remote).read(name)[0], name


# --- one driver at a time


def test_a_driver_elsewhere_is_refused_while_this_one_lives(bucket, folder, tmp_path, monkeypatch):
    with Ledger.open(folder, {"job": "first"}) as ledger:
        ledger.freeze(SPEC, {})
        other = elsewhere(folder, tmp_path, monkeypatch)
        with pytest.raises(HeldError, match=rf"{bucket.uri}/blobs: held by .*job first") as told:
            Ledger.open(other, {})
        assert told.value.exit_code == 75
        assert is_held(other) and is_held(folder)
    assert not is_held(other)
    Ledger.open(other, {}).close()


def test_a_driver_that_gave_the_study_back_is_followed_at_once(folder, tmp_path, monkeypatch):
    drive(folder)
    other = elsewhere(folder, tmp_path, monkeypatch)
    monkeypatch.setattr(mirror, "SILENCE_SECONDS", 1000.0)
    Ledger.open(other, {}).close()


def test_a_silent_driver_is_watched_before_it_counts_as_dead(folder, tmp_path, monkeypatch):
    die(Ledger.open(folder, {}))
    other = elsewhere(folder, tmp_path, monkeypatch)
    began = time.monotonic()
    Ledger.open(other, {}).close()
    assert time.monotonic() - began >= 2.0


def test_a_driver_that_slept_is_fenced_and_nothing_of_it_counts(folder, tmp_path, monkeypatch):
    drive(folder)
    stale = Ledger.open(folder, {})
    stale._heart._ended.set()
    stale._heart.join()
    other = elsewhere(folder, tmp_path, monkeypatch)
    with Ledger.open(other, {}) as ledger:
        before = store(folder.remote).entries()
        for write in (
            lambda: stale.suggest(suggestion(2)),
            lambda: stale.commit(suggestion(0), [row(3)], "b"),
            lambda: stale.compact(),
        ):
            stale._broken = None
            with pytest.raises(FencedError):
                write()
        after = store(folder.remote).entries()
        beats = {name for name in after if name.endswith(".beat")}
        assert {k: v for k, v in after.items() if k not in beats} == {
            k: v for k, v in before.items() if k not in beats
        }
        ledger.suggest(suggestion(2))
    stale.close()
    assert not store(folder.remote).exists("epochs/000002.over")


def test_a_write_that_was_under_way_when_the_study_was_taken_does_not_count(
    folder, tmp_path, monkeypatch
):
    """Between the look at the fence and the write another driver comes and goes on."""
    drive(folder)
    stale = Ledger.open(folder, {})
    stale._heart._ended.set()
    stale._heart.join()
    other = elsewhere(folder, tmp_path, monkeypatch)
    looks = []

    def look(self: Ledger) -> None:
        check(self)
        if self is stale and not looks:
            looks.append(Ledger.open(other, {}))
            looks[0].commit(suggestion(0), [row(3, 0.25)], "newer")

    check = Ledger._check_fence
    monkeypatch.setattr(Ledger, "_check_fence", look)
    with pytest.raises(FencedError):
        stale.commit(suggestion(0), [row(3, 0.75)], "stale")
    # its part stands in the store beside the newer one of the same number, which counts
    names = [name for name in store(folder.remote).entries("trials/trial0/rows")]
    assert sorted(name.rpartition("/")[2][:13] for name in names) == [
        "000001-000001", "000002-000002", "000003-000002",
    ]  # fmt: skip
    looks[0].close()
    stale.close()
    mirror.pull(folder)
    rows = read_rows(folder, "trial0")
    assert rows[rows.step == 3].value.tolist() == [0.25]


def test_a_newer_driver_never_overwrites_what_a_stale_one_slipped_in(folder):
    drive(folder)
    with Ledger.open(folder, {}) as ledger:
        store(folder.remote).put("suggestions/000002.json", b"of a driver that was asleep")
        with pytest.raises(StorageError, match="again"):
            ledger.suggest(suggestion(2))
    assert store(folder.remote).read("suggestions/000002.json")[0].startswith(b"of a driver")


def test_what_changes_replaces_only_what_was_read(folder):
    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(SPEC, {})
        store(folder.remote).put("environment.json", b"{}")
        with pytest.raises(StorageError, match=r"environment\.json: an earlier driver"):
            ledger.freeze(f"{SPEC}# more\n", {}, extends=True)


def test_a_driver_notices_that_it_has_been_fenced(folder, tmp_path, monkeypatch):
    with Ledger.open(folder, {}) as ledger:
        store(folder.remote).put("epochs/000002.json", b"{}")
        deadline = time.monotonic() + 20
        while not ledger.is_fenced and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(FencedError):
            ledger.refuse_if_fenced()


def test_a_store_that_overwrites_what_it_should_keep_is_refused(folder, monkeypatch):
    from trainables.storage import Store

    monkeypatch.setattr(Store, "claim", Store.put)
    with pytest.raises(StorageError, match="If-None-Match"):
        Ledger.open(folder, {})


# --- requests reach a driver elsewhere


def test_a_request_from_elsewhere_reaches_the_driver(folder, tmp_path, monkeypatch, tiny_study):
    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(tiny_study.read_text(), {})
        mirror_here = folder
        other = elsewhere(folder, tmp_path, monkeypatch)
        mirror.pull(other)
        requests.extend(other, 2)
        requests.stop(other)
        deadline = time.monotonic() + 20
        while not (requests.pending(mirror_here) and requests.was_stopped(mirror_here)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (asked,) = requests.pending(mirror_here)
        assert asked.content == {"trials": 2}
        requests.remove(mirror_here, asked)
    left = store(folder.remote).entries()
    assert not [name for name in left if name.startswith("requests/") or name == "stop"]


# --- errors


def test_without_the_bucket_the_store_or_the_right_the_error_names_the_uri(bucket, monkeypatch):
    absent = Storage.of(bucket.absent).study("blobs")
    with pytest.raises(StorageError, match=rf"{bucket.absent}/blobs.*no such bucket") as told:
        Ledger.open(absent, {})
    assert told.value.exit_code == 74
    bucket.stop()
    try:
        folder = Storage.of(bucket.uri).study("blobs")
        with pytest.raises(StorageError, match=rf"{bucket.uri}/blobs.*can be reached"):
            Ledger.open(folder, {})
    finally:
        bucket.start()
    monkeypatch.setenv(bucket.secret_variable, "c29tZWJvZHkgZWxzZSdz")
    store.cache_clear()
    with pytest.raises(StorageError, match=rf"{bucket.uri}/blobs\S*: the store refuses") as told:
        Ledger.open(folder, {})
    assert "c29t" not in str(told.value) and told.value.exit_code == 74


def test_a_store_that_goes_away_costs_nothing_that_was_acknowledged(folder, bucket):
    ledger = Ledger.open(folder, {})
    ledger.freeze(SPEC, {})
    ledger.suggest(suggestion(0))
    ledger.commit(suggestion(0), [row(1)], "a")
    bucket.stop()
    try:
        with pytest.raises(
            StorageError, match=rf"{bucket.uri}/blobs/\S+: the store cannot"
        ) as told:
            ledger.commit(suggestion(0), [row(2)], "a")
        assert told.value.exit_code == 74 and "run the same command again" in str(told.value)
        with pytest.raises(StorageError, match="earlier write failed"):
            ledger.compact()
        ledger.close()
        ledger._heart.join()
    finally:
        bucket.start()
    mirror.pull(folder)
    assert read_rows(folder).step.tolist() == [1]
    with Ledger.open(folder, {}) as ledger:
        ledger.commit(suggestion(0), [row(2)], "b")
    assert read_rows(folder).step.tolist() == [1, 2]


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://a/b",
        "s3://",
        "s3:///a",
        "s3://a/../b",
        "s3://key:secret@a/b",
        "s3://a/b?x=1",
        "s3://a b",
    ],
)
def test_bad_addresses_are_refused_and_secrets_in_them_not_repeated(uri):
    with pytest.raises(ValueError, match="expected a folder, or a URI") as told:
        check_uri(uri)
    assert "secret" not in str(told.value).replace("secrets", "")


def test_without_its_package_a_store_is_refused_before_anything_starts(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    store.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'maskstudy\[cloud\]'"):
        find_study("blobs", "s3://bucket/studies")


def test_a_study_is_found_by_name_and_by_uri(folder, tiny_study):
    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(tiny_study.read_text(), {})
    assert find_study("blobs", folder.storage.remote) == folder
    assert find_study(folder.remote, None) == folder
    assert studies(folder.storage) == [folder]
    with pytest.raises(UserError, match="studies there: blobs"):
        find_study("other", folder.storage.remote)


# --- checkpoints


def test_checkpoints_are_kept_and_removed_there_as_here(bucket, tmp_path, monkeypatch):
    import torch

    remote = f"{bucket.uri}/blobs/trials/trial0"
    here = mirror_of(remote) / "checkpoints"
    for step in (1, 2, 3):
        tensors = {"model/a": torch.full((3,), float(step))}
        checkpoint.save(here, f"a-{step}", tensors, {"phase": "pretrain", "step": step}, remote)
        there = store(remote).entries("checkpoints")
        complete = {name.split("/")[1] for name in there if name.endswith("manifest.json")}
        assert complete == {f"a-{one}" for one in (step - 1, step) if one}
        assert len(there) == 3 * len(complete)
    monkeypatch.setenv("MASKSTUDY_CACHE", str(tmp_path / "elsewhere"))
    other = mirror_of(remote) / "checkpoints"
    tensors, state, name = checkpoint.load_latest(other, remote)
    assert (name, state["step"], tensors["model/a"].tolist()) == ("a-3", 3, [3.0, 3.0, 3.0])
    assert checkpoint.load(other, "a-2", remote)[1]["step"] == 2


def test_a_checkpoint_sent_in_part_does_not_count(bucket, monkeypatch):
    import torch

    from trainables.storage import Store

    remote = f"{bucket.uri}/blobs/trials/trial0"
    here = mirror_of(remote) / "checkpoints"
    state = {"phase": "pretrain", "step": 1}
    checkpoint.save(here, "a-1", {"model/a": torch.ones(2)}, state, remote)
    upload = Store.upload

    def fail(self: Store, name: str, path: Path) -> None:
        if path.name == "manifest.json":
            raise StorageError("the node dies here")
        upload(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", fail)
        with pytest.raises(StorageError, match="dies here"):
            checkpoint.save(here, "a-2", {"model/a": torch.ones(2)}, {**state, "step": 2}, remote)
    assert store(remote).exists("checkpoints/a-2/tensors.safetensors")
    found = checkpoint.load_latest(here, remote)
    assert found is not None and found[2] == "a-1"
    assert not store(remote).exists("checkpoints/a-2/tensors.safetensors")


def test_a_damaged_checkpoint_of_the_store_is_passed_over(bucket, caplog):
    import torch

    remote = f"{bucket.uri}/blobs/trials/trial0"
    here = mirror_of(remote) / "checkpoints"
    for step in (1, 2):
        state = {"phase": "pretrain", "step": step}
        checkpoint.save(here, f"a-{step}", {"model/a": torch.ones(2)}, state, remote)
    shutil.rmtree(here)
    store(remote).put("checkpoints/a-2/tensors.safetensors", b"not these")
    found = checkpoint.load_latest(here, remote)
    assert found is not None and found[2] == "a-1"
    assert "taking the checkpoint before" in caplog.text


# --- around it


def test_a_study_in_a_store_of_two_drivers_is_read_on_a_third_machine(
    folder, tmp_path, monkeypatch
):
    """Each driver on its own machine; the last knows what all did, in order."""
    for number in range(3):
        monkeypatch.setenv("MASKSTUDY_CACHE", str(tmp_path / f"machine{number}"))
        here = Storage.of(folder.storage.remote).study("blobs")
        with Ledger.open(here, {}) as ledger:
            ledger.freeze(SPEC, {})
            if number == 0:
                ledger.suggest(suggestion(0))
            ledger.commit(suggestion(0), [row(number)], f"a{number}")
            assert ledger.epoch == number + 1
    assert read_rows(here).step.tolist() == [0, 1, 2]
    assert read_rows(here).attempt.tolist() == ["a0", "a1", "a2"]


def test_a_trial_that_ends_again_after_a_failure_replaces_its_outcome(folder):
    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(SPEC, {})
        ledger.suggest(suggestion(0))
        ledger.finish(ended(outcome=Outcome.FAILED, error="lost its node"))
        assert store(folder.remote).exists("trials/trial0/error.txt")
    shutil.rmtree(folder.root)
    with Ledger.open(folder, {}) as ledger:
        ledger.finish(ended())
    assert not store(folder.remote).exists("trials/trial0/error.txt")
    mirror.pull(folder)
    assert read_results(folder)["trial0"].outcome is Outcome.COMPLETE


def test_a_reader_leaves_the_mirror_of_a_living_driver_alone(folder):
    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(SPEC, {})
        ledger.suggest(suggestion(0))
        only_here = folder.suggestion(1)  # as between the store's yes and the mirror's rename
        only_here.write_bytes(b"{}")
        mirror.pull(folder)
        assert only_here.exists()


def test_the_doctor_tries_a_store(bucket, monkeypatch):
    (verdict,) = doctor._can_keep(bucket.uri)
    assert verdict.level is doctor.Level.OK
    (verdict,) = doctor._can_keep(bucket.absent)
    assert verdict.level is doctor.Level.PROBLEM and bucket.absent in verdict.found
    place, token = doctor._leave_token(bucket.uri)
    assert token is not None
    facts = doctor._exchange(place, token)
    assert facts["error"] == "" and doctor._collect_tokens(place) == [facts["left"]]
    assert doctor._exchange(place, token)["error"] == f"{bucket.uri} is not the head's there"
    assert store(bucket.uri).entries() == {}
    assert doctor._leave_token(bucket.absent)[1] is None


def test_check_says_that_a_storage_cannot_be_opened(bucket, tmp_path, tiny_study):
    tiny_study.write_text(tiny_study.read_text() + f"storage: {bucket.absent}\n")
    with pytest.raises(StorageError, match=rf"{bucket.absent}: .*no such bucket"):
        check_study(tiny_study)


def test_a_driver_that_dies_is_told_from_one_that_lives_without_waiting_again(
    folder, tmp_path, monkeypatch, caplog
):
    """Who looks on for long, as the console does, need not watch anew at each look."""
    ledger = Ledger.open(folder, {})
    other = elsewhere(folder, tmp_path, monkeypatch)
    assert is_held(other)
    time.sleep(0.5)
    assert is_held(other)
    die(ledger)
    wait_until(lambda: not is_held(other), 60)
    caplog.clear()
    assert not is_held(other)
    assert "whether its driver lives" not in caplog.text


def test_the_console_shows_a_study_of_a_store_and_asks_it(
    folder, tmp_path, monkeypatch, tiny_study
):
    from study.console.index import Index

    with Ledger.open(folder, {}) as ledger:
        ledger.freeze(tiny_study.read_text(), {})
        ledger.suggest(suggestion(0))
        ledger.commit(suggestion(0), [row(1)], "a")
        monkeypatch.setenv("MASKSTUDY_CACHE", str(tmp_path / "elsewhere"))
        index = Index(Storage.of(folder.storage.remote))
        assert index.names() == (["blobs"], 0)
        deadline = time.monotonic() + 30
        while not (found := index.look("blobs")).is_held or len(found.suggestions) < 1:
            assert time.monotonic() < deadline, found.problem
            time.sleep(0.2)
        requests.extend(found.folder, 1)
        assert [name for name in store(folder.remote).entries("requests")]


# --- a folder on another file system


@pytest.fixture
def second_mount(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of its own where that is allowed, else the one at /dev/shm behind a link."""
    place = tmp_path / "mounted"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "maskstudy-test", str(place)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if is_mounted:
        yield place
        subprocess.run(["umount", str(place)], check=True)
        return
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("neither mount is allowed here, nor is there a /dev/shm")
    behind = Path(tempfile.mkdtemp(dir="/dev/shm"))
    place.rmdir()
    place.symlink_to(behind)
    yield place
    shutil.rmtree(behind)


def test_a_study_on_a_second_mount_is_the_same(second_mount, tmp_path):
    assert second_mount.stat().st_dev != tmp_path.stat().st_dev
    there, here = StudyFolder(second_mount / "blobs"), StudyFolder(tmp_path / "here" / "blobs")
    for folder in (there, here):
        drive(folder)
        with Ledger.open(folder, {}), pytest.raises(HeldError):
            Ledger.open(folder, {})
    assert {k for k in files(there.root)} == {k for k in files(here.root)}
    assert all(
        content == files(here.root)[name]
        for name, content in files(there.root).items()
        if not name.startswith("epochs/")
    )
