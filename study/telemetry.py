"""The figures of a running study that `cluster/metrics.py` hands to Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster.metrics import Reading
from study.best import of_study
from study.conductor import Conductor
from study.ledger import Outcome
from study.measured import Measured
from trainables.metrics import PHASES

log = logging.getLogger(__name__)


class Telemetry:
    """Reads a conductor and its slots beside their own threads, and changes nothing."""

    def __init__(self, conductor: Conductor, publish: Callable[[Iterator[Reading]], None]) -> None:
        self.conductor, self._publish = conductor, publish
        self._work = _work_done(conductor.measured)  # (FLOPs, device seconds) of before
        self._speed, self._fastest = 0.0, 0.0  # operations per second of a worker
        self._is_broken = False

    def tick(self, vitals: Sequence[Mapping[str, Any]]) -> None:
        """Publish where the study stands; `vitals` are those of the slots' desks.

        A figure that cannot be had is worth a line in the log, never weeks of training.
        """
        try:
            self._publish(self.readings(vitals))
        except Exception:
            if not self._is_broken:
                log.warning("the study's metrics are not complete", exc_info=True)
            self._is_broken = True

    def readings(self, vitals: Sequence[Mapping[str, Any]]) -> Iterator[Reading]:
        """Everything in METRICS that is known by now."""
        conductor = self.conductor
        for state, count in trials_by_state(conductor).items():
            yield Reading("maskstudy_trials", count, {"state": state})
        for objective in conductor.spec.objectives:
            found = of_study(
                conductor.spec,
                list(conductor.suggestions),
                dict(conductor.results),
                conductor.measured,
                objective,
            )
            told = set()
            for one in found:  # the best of each group, controls beside the searched arms
                if one.group not in told:
                    labels = {"metric": objective.metric, "group": str(one.group)}
                    yield Reading("maskstudy_best_objective", one.mean, labels)
                told.add(one.group)

        gain = conductor.best_gain
        if gain is not None:
            yield Reading("maskstudy_probe_gain", gain.decibels)

        lines = [line for line in list(conductor.progress.lines.values()) if not line.outcome]
        for phase in PHASES:
            speed = sum(line.images_per_second for line in lines if line.phase == phase)
            yield Reading("maskstudy_images_per_second", speed, {"phase": phase})

        flops, seconds = _work_done(conductor.measured)
        yield Reading("maskstudy_flops", flops)
        yield Reading("maskstudy_device_seconds", seconds)
        resources = conductor.spec.resources
        if seconds > self._work[1]:
            gained = (flops - self._work[0]) / (seconds - self._work[1])
            self._speed, self._work = gained / resources.workers, (flops, seconds)
            self._fastest = max(self._fastest, self._speed)
        # what slows a machine slows the measuring too: the peak is the best that was ever seen
        seen = max(self._fastest, *(vital["peak_flops"] for vital in vitals), 0.0)
        peak = resources.peak_flops or seen
        if peak > 0:
            yield Reading("maskstudy_peak_flops", peak)
        if self._speed > 0:
            yield Reading("maskstudy_flops_utilization", self._speed / peak)

        for name in ("checkpoint_seconds", "checkpoints"):
            yield Reading(f"maskstudy_{name}", sum(vital[name] for vital in vitals))
        restarted = sum(max(0, vital["entered"] - resources.workers) for vital in vitals)
        yield Reading("maskstudy_workers_restarted", restarted)


def trials_by_state(conductor: Conductor) -> dict[str, int]:
    """waiting, running and every outcome; a trial that is tried again is running."""
    running = set(conductor.running)
    outcomes = [
        result.outcome for trial, result in list(conductor.results.items()) if trial not in running
    ]
    ended = {outcome.value: outcomes.count(outcome) for outcome in Outcome}
    total = conductor.progress.total or 0  # unknown: what waits is not either
    waiting = max(0, total - len(running) - len(outcomes))
    return {"waiting": waiting, "running": len(running), **ended}


def _work_done(measured: Measured) -> tuple[float, float]:
    """(operations, device seconds) up to the newest rung of every trial and phase."""
    sums = {"flops": 0.0, "device_seconds": 0.0}
    for curves in list(measured.values()):
        for phase in PHASES:
            for name in sums:
                curve = dict(curves.get(f"{phase}/{name}", {}))
                sums[name] += curve[max(curve)] if curve else 0.0
    return sums["flops"], sums["device_seconds"]
