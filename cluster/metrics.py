"""A study's figures as metrics of Ray, for Prometheus to scrape and Grafana to draw.

Ray exports each as `ray_<name>`, a counter as `ray_<name>_total`, a few seconds later, from the
node of the process that publishes it. To add one, add a line to METRICS and publish readings of it.
No label may name a trial: every value of a label is a time series of its own, kept for weeks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ray.util import metrics as ray_metrics


class Metric(NamedTuple):
    """What Prometheus is told of a number."""

    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]  # besides `study`
    explains: str


@dataclass(frozen=True)
class Reading:
    """A number as it stands now; of a counter, its total since any fixed time."""

    name: str  # a key of METRICS
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


class Publisher:
    """Passes one study's readings on to Ray, which must be initialised."""

    def __init__(self, study: str) -> None:
        self._study = study
        self._exported: dict[str, Any] = {}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}

    def publish(self, readings: Iterable[Reading]) -> None:
        """Set gauges; count on from what a counter's total was at its first reading."""
        for reading in readings:
            metric = METRICS[reading.name]
            exported = self._exported.get(reading.name)
            if exported is None:
                kind = ray_metrics.Gauge if metric.kind == "gauge" else ray_metrics.Counter
                exported = kind(reading.name, metric.explains, ("study", *metric.labels))
                self._exported[reading.name] = exported
            labels = {"study": self._study, **reading.labels}
            if metric.kind == "gauge":
                exported.set(reading.value, tags=labels)
                continue
            key = reading.name, tuple(labels.values())
            added = reading.value - self._totals.setdefault(key, reading.value)
            if added > 0:  # Ray refuses to count by nothing
                exported.inc(added, tags=labels)
                self._totals[key] = reading.value


def exported_name(name: str) -> str:
    """What Prometheus calls a metric."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


METRICS: dict[str, Metric] = {
    "maskstudy_trials": Metric(
        "gauge", ("state",), "Trials by state: waiting, running, or how they ended"
    ),
    "maskstudy_best_objective": Metric(
        "gauge",
        ("metric", "group"),
        "Best mean of an objective over an arm's complete trials: searched arms, each control",
    ),
    "maskstudy_probe_gain": Metric(
        "gauge",
        (),
        "Decibels by which the best encoder beats the best trivial filling of hidden pixels",
    ),
    "maskstudy_images_per_second": Metric(
        "gauge", ("phase",), "Images trained on per second, over all running trials"
    ),
    "maskstudy_flops_utilization": Metric(
        "gauge", (), "Operations per second of the newest rungs, as a share of the peak"
    ),
    "maskstudy_peak_flops": Metric(
        "gauge", (), "Operations per second that one worker could do: given, or measured"
    ),
    "maskstudy_flops": Metric("counter", (), "Operations of training, by formula"),
    "maskstudy_device_seconds": Metric("counter", (), "Seconds in which worker groups trained"),
    "maskstudy_checkpoint_seconds": Metric("counter", (), "Seconds spent writing checkpoints"),
    "maskstudy_checkpoints": Metric("counter", (), "Checkpoints written"),
    "maskstudy_workers_restarted": Metric("counter", (), "Workers started in place of lost ones"),
}
