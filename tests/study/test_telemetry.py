"""A study's metrics and their dashboard, without Ray.  pytest tests/study/test_telemetry.py"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.metrics import METRICS, Publisher, Reading, exported_name
from study.conductor import Conductor, DataView
from study.folder import StudyFolder
from study.ledger import Ledger, Suggestion
from study.loading import parse_spec
from study.telemetry import Telemetry
from tests.conftest import TINY_STUDY
from trainables import speed
from trainables.desk import Desk
from trainables.endings import Ending

DASHBOARD = Path(__file__).parents[2] / "cluster" / "manifests" / "grafana.json"
VITALS = {
    "entered": 2,
    "peak_flops": 50.0,
    "checkpoints": 3,
    "checkpoint_seconds": 1.5,
    "beat": {},
    "told": "",
}
VITALS |= {"nodes": ["n"], "ticket": 0}


@pytest.fixture
def conductor(tmp_path: Path) -> Iterator[Conductor]:
    two_workers = TINY_STUDY.replace("workers: 1", "workers: 2")
    spec = parse_spec(two_workers, Path(), where="study.yaml")
    with Ledger.open(StudyFolder(tmp_path / "tiny"), {}) as ledger:
        yield Conductor(spec, ledger, DataView(Path(), "f" * 64, is_labelled=True))


def rung(phase: str, progress: float, **values: float) -> list[dict[str, Any]]:
    common = {"phase": phase, "step": round(100 * progress), "epoch": 1.0, "progress": progress}
    rest = {"goal": "none", "unit": "", "seconds": 1.0}
    return [{**common, "metric": name, "value": value, **rest} for name, value in values.items()]


def begin(conductor: Conductor) -> Suggestion:
    suggestion = conductor.next()
    assert isinstance(suggestion, Suggestion)
    return suggestion


def figures(telemetry: Telemetry, *vitals: dict[str, Any]) -> dict[str, float]:
    """Readings by name and values of labels, as one word each."""
    return {
        " ".join([reading.name.removeprefix("maskstudy_"), *reading.labels.values()]): reading.value
        for reading in telemetry.readings(vitals)
    }


def test_every_figure_of_a_study_by_hand(conductor: Conductor) -> None:
    telemetry = Telemetry(conductor, list)
    first = begin(conductor)
    conductor.rows(first, rung("pretrain", 0.5, flops=1000.0, device_seconds=20.0), "a")
    conductor.rows(first, rung("pretrain", 1.0, flops=3000.0, device_seconds=50.0), "a")
    last = rung("segment", 1.0, flops=500.0, device_seconds=10.0, miou=0.7)
    conductor.rows(first, last, "a")
    conductor.done(first, Ending.COMPLETE, None)
    conductor.done(begin(conductor), Ending.FAILED, "planted")
    conductor.progress.beat(begin(conductor).trial, "pretrain", 0.1, 120.0)

    other = {**VITALS, "entered": 5, "peak_flops": 40.0}
    known = figures(telemetry, VITALS, other)
    states = ("waiting", "running", "complete", "failed")
    assert [known[f"trials {state}"] for state in states] == [1, 1, 1, 1]
    assert known["best_objective segment/miou control"] == 0.7
    assert (known["images_per_second pretrain"], known["images_per_second segment"]) == (120, 0)
    assert (known["flops"], known["device_seconds"]) == (3500, 60)
    assert known["flops_utilization"] == pytest.approx(3500 / 60 / (2 * 50))  # two workers
    assert (known["checkpoints"], known["checkpoint_seconds"]) == (6, 3)
    assert known["workers_restarted"] == 3  # of the other slot, which began with two


def test_utilization_is_that_of_the_newest_rungs_and_stays_until_there_are_newer_ones(
    conductor: Conductor,
) -> None:
    trial = begin(conductor)
    conductor.rows(trial, rung("pretrain", 0.5, flops=1e6, device_seconds=1.0), "a")
    telemetry = Telemetry(conductor, list)  # as after a restart: what was before does not count
    assert "flops_utilization" not in figures(telemetry, VITALS)
    conductor.rows(trial, rung("pretrain", 1.0, flops=1e6 + 200, device_seconds=5.0), "a")
    assert figures(telemetry, VITALS)["flops_utilization"] == pytest.approx(200 / 4 / 100)
    assert figures(telemetry, VITALS)["flops_utilization"] == pytest.approx(200 / 4 / 100)


def test_a_peak_that_was_measured_on_a_busy_machine_is_at_least_what_training_reached(
    conductor: Conductor,
) -> None:
    telemetry = Telemetry(conductor, list)
    trial = begin(conductor)
    conductor.rows(trial, rung("pretrain", 0.5, flops=3000.0, device_seconds=10.0), "a")
    known = figures(telemetry, VITALS)  # 300 a second on two workers of 50
    assert (known["peak_flops"], known["flops_utilization"]) == (150, 1)
    conductor.rows(trial, rung("pretrain", 1.0, flops=4500.0, device_seconds=20.0), "a")
    known = figures(telemetry, VITALS)
    assert (known["peak_flops"], known["flops_utilization"]) == (150, 0.5)


def test_a_peak_that_is_given_counts_instead_of_the_measured_one(conductor: Conductor) -> None:
    resources = conductor.spec.resources.model_copy(update={"peak_flops": 1e15})
    conductor.spec = conductor.spec.model_copy(update={"resources": resources})
    assert figures(Telemetry(conductor, list), VITALS)["peak_flops"] == 1e15


def test_everything_that_is_read_is_a_metric_with_these_labels(conductor: Conductor) -> None:
    trial = begin(conductor)
    telemetry = Telemetry(conductor, list)
    values = {"flops": 10.0, "device_seconds": 5.0, "probe_gain": -1.0}
    conductor.rows(trial, rung("pretrain", 1.0, **values), "a")
    conductor.rows(trial, rung("segment", 1.0, miou=0.5), "a")
    conductor.done(trial, Ending.COMPLETE, None)
    readings = list(telemetry.readings([VITALS]))
    assert {reading.name for reading in readings} == set(METRICS)
    for reading in readings:
        assert tuple(reading.labels) == METRICS[reading.name].labels


def test_figures_that_cannot_be_had_are_told_once_and_stop_nothing(
    conductor: Conductor, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(readings: Iterator[Reading]) -> None:
        raise OSError("planted")

    telemetry = Telemetry(conductor, broken)
    telemetry.tick([VITALS])
    telemetry.tick([{}])  # nor do vitals that are not as expected
    assert len(caplog.records) == 1
    assert "metrics are not complete" in caplog.text


def test_a_counter_counts_on_from_its_first_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[float, dict[str, str]]] = []

    class Counter:
        def __init__(self, *_: Any) -> None:
            pass

        def inc(self, value: float, tags: dict[str, str]) -> None:
            counted.append((value, tags))

    monkeypatch.setattr("cluster.metrics.ray_metrics.Counter", Counter)
    publisher = Publisher("tiny")
    for total in (7.0, 7.0, 9.0, 9.0, 12.0):
        publisher.publish([Reading("maskstudy_flops", total)])
    assert counted == [(2.0, {"study": "tiny"}), (3.0, {"study": "tiny"})]


def test_the_measured_peak_is_that_of_the_fastest_products_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the first ones load libraries; then the machine is busy, and for once it is not
    spent = chain([90.0, 2.0, 0.5], repeat(1.0))  # a fast machine asks for over a million
    monkeypatch.setattr(speed, "seconds_of", lambda product, repeats, device: next(spent))
    assert speed.peak_flops(torch.device("cpu")) == 2 * 512**3 / 0.5


def test_a_slots_vitals_are_those_of_all_its_workers_and_jobs() -> None:
    async def story() -> dict[str, Any]:
        desk = Desk()
        await desk.enter(40.0)
        await desk.enter()
        for serial, seconds in (("1", 0.5), ("2", 0.25)):
            await desk.place({"serial": serial, "trial": "t"})
            await desk.saved(seconds)
        await desk.beat({"trial": "t"})
        return await desk.vitals()

    found = asyncio.run(story())
    assert found.keys() == VITALS.keys()
    assert (found["entered"], found["peak_flops"], found["beat"]) == (2, 40.0, {"trial": "t"})
    assert (found["checkpoints"], found["checkpoint_seconds"]) == (2, 0.75)


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    drawn = set()
    for target in targets():
        drawn |= set(re.findall(r"ray_\w+", target["expr"]))
    known = {exported_name(name): metric for name, metric in METRICS.items()}
    assert drawn == set(known)
    for target in targets():
        labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"study"}
        (name, *_) = re.findall(r"ray_\w+", target["expr"])
        assert labels == set(known[name].labels), target["legendFormat"]


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", DASHBOARD.read_text()))
    assert used == variables == {"datasource", "study"}
    places = [panel["gridPos"] for panel in panels]
    cells = [(p["x"] + x, p["y"] + y) for p in places for x in range(p["w"]) for y in range(p["h"])]
    assert len(cells) == len(set(cells)), "panels overlap"


def targets() -> list[dict[str, str]]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target for panel in panels for target in panel["targets"]]
