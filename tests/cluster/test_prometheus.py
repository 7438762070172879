"""A study's metrics as a real Prometheus finds them on a real head node.

pytest tests/cluster/test_prometheus.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.metrics import METRICS, exported_name
from study.folder import StudyFolder
from study.ledger import read_results, read_rows
from tests.clusters import Head, maskstudy, running_head
from tests.conftest import TINY_STUDY
from tests.machine import free_ports, wait_until
from tests.study.test_telemetry import targets

pytestmark = [
    pytest.mark.ray,
    pytest.mark.chaos(2),
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus in the PATH"),
]
NEVER_COUNTED = "maskstudy_workers_restarted"  # Ray exports no counter before it has counted


@pytest.fixture
def publishing_head(tmp_path: Path) -> Iterator[Head]:
    """A head whose metrics are of this second."""
    with running_head(tmp_path / "head", RAY_metrics_report_interval_ms="1000") as head:
        yield head


@pytest.fixture
def prometheus(publishing_head: Head, tmp_path: Path) -> Iterator[str]:
    """Its address; it asks the head node what there is to be scraped."""
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {
                "job_name": "ray",
                "http_sd_configs": [
                    {
                        "url": f"{publishing_head.dashboard}/api/prometheus/sd",
                        "refresh_interval": "2s",
                    }
                ],
            }
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    (port,) = free_ports(1)
    with (tmp_path / "prometheus.log").open("w") as log:
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        server.wait(30)


def test_prometheus_finds_every_metric_and_the_dashboard_draws_them(
    publishing_head: Head, prometheus: str, tmp_path: Path
) -> None:
    address, storage = publishing_head.dashboard, publishing_head.storage
    study = tmp_path / "tiny.yaml"
    # a phase that is published every five seconds has to last longer than that
    study.write_text(TINY_STUDY.replace("epochs: 4, batch: 8", "epochs: 400, batch: 8"))
    maskstudy("submit", str(study), "--address", address, "--storage", str(storage))
    folder = StudyFolder(storage / "studies" / "tiny")
    wait_until(lambda: folder.spec.exists() and len(read_results(folder)) >= 2, 300)

    found: dict[str, dict[str, float]] = {}

    def has_found_all() -> bool:
        for name in METRICS:
            seen = query(prometheus, f"max_over_time({exported_name(name)}[10m])")
            found.setdefault(name, {}).update(seen)
        return all(found[name] for name in METRICS if name != NEVER_COUNTED)

    wait_until(has_found_all, 120)
    wait_until(lambda: len(read_results(folder)) == 4, 200)
    has_found_all()

    assert found[NEVER_COUNTED] == {}
    trials = found["maskstudy_trials"]
    assert trials["complete"] >= 2
    assert trials["running"] == 1
    assert trials["failed"] == 0
    rows = read_rows(folder)
    mious = rows[(rows.metric == "miou") & (rows.progress == 1)].value.tolist()
    assert found["maskstudy_best_objective"]["segment/miousearch"] in [
        pytest.approx(m) for m in mious
    ]
    assert found["maskstudy_images_per_second"]["pretrain"] > 1
    assert 0 < found["maskstudy_flops_utilization"][""] <= 1
    assert found["maskstudy_checkpoint_seconds"][""] > 0
    assert found["maskstudy_checkpoints"][""] >= 6  # one at every rung

    for target in targets():  # Prometheus understands what the dashboard asks
        query(prometheus, target["expr"].replace("$study", ".*"))


def query(prometheus: str, expression: str) -> dict[str, float]:
    """Value by what tells the study's series apart: a state, a phase, a metric."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        content = json.load(answer)
    assert content["status"] == "success"
    found = {}
    for series in content["data"]["result"]:
        labels = series["metric"]
        assert labels.get("study", "tiny") == "tiny"
        own = [labels[key] for key in ("state", "phase", "metric", "group") if key in labels]
        found["".join(own)] = float(series["value"][1])
    return found
