"""What all tests share: one thread, a private cache, and a study that trains in seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from study.folder import StudyFolder
from tests import machine
from tests.stores import Bucket, azurite, ceph

if TYPE_CHECKING:
    from tests.clusters import Head  # which imports Ray

pytest_plugins = ("tests.budget", "tests.order")

# before torch and ray are imported, and for every process that a test starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# or what else runs here would hold up every cluster
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["COLUMNS"] = "200"
os.environ.pop("RAY_ADDRESS", None)  # nobody's cluster but those that tests start

TINY_STUDY = """\
study: tiny
question: Does it run?
data: {source: smears, size: 32, images: 24, val: 8, seed: 1}
trial:
  model: {size: pico, patch: 8, decoder: {depth: 1, width: 64}}
  masking: {strategy: random, ratio: {name: constant, value: 0.5}}
  pretrain: {epochs: 4, batch: 8}
  segment: {epochs: 2, batch: 8}
search:
  model.patch: {choices: [4, 8]}
  masking.ratio:
    choices:
      constant: {name: constant, value: {low: 0.1, high: 0.9}}
      rising: {name: linear, start: {low: 0.1, high: 0.5}, end: {low: 0.5, high: 0.9}}
objectives:
  - {metric: segment/miou, goal: maximize}
stopping: {name: none}
budget: {trials: 4}
resources: {workers: 1, cpus_per_worker: 1, concurrent: 1}
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded data of the tests are shared by them and by nobody else."""
    before = os.environ.get("MASKSTUDY_CACHE")
    os.environ["MASKSTUDY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MASKSTUDY_CACHE"]
    else:
        os.environ["MASKSTUDY_CACHE"] = before


@pytest.fixture
def tiny_study(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_STUDY)
    return path


@pytest.fixture(scope="session")
def by_one_worker(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """What a study comes to that nobody disturbs, on a private cluster; it is only looked at."""
    from tests.studies import undisturbed

    return undisturbed(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def by_two_workers(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """The same of a longer one whose trials are each trained by two workers."""
    from tests.studies import TWO_WORKERS, undisturbed

    return undisturbed(tmp_path_factory.mktemp("two"), TWO_WORKERS)


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head node for whoever needs any; studies on it have names that no other test uses."""
    from tests.clusters import running_head

    with running_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture
def on_the_head(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers that are started here join the head; without it each starts a cluster of its own."""
    monkeypatch.setenv("RAY_ADDRESS", head.gcs)


@pytest.fixture(scope="session", params=["s3", "az"])
def bucket_server(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    pytest.importorskip("obstore")
    with {"s3": ceph, "az": azurite}[request.param]() as server:
        server.make_bucket()
        yield server


@pytest.fixture
def bucket(
    bucket_server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    """An empty store, and a node of which the cache holds no mirror."""
    from trainables.storage import store

    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASKSTUDY_STORE_SECONDS", "2")
    monkeypatch.setenv("MASKSTUDY_CACHE", str(tmp_path / "cache"))
    store.cache_clear()
    objects = store(bucket_server.uri)
    objects.remove(list(objects.entries()))
    yield bucket_server
    store.cache_clear()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with machine.short_folder() as folder:
        yield folder
