"""What trials measured, as samplers, stopping rules and rankings want it: by trial and metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# trial -> "phase/metric" -> progress -> value
Measured = dict[str, dict[str, dict[float, float]]]


def measure(rows: pd.DataFrame) -> Measured:
    """That of the ledger's rows."""
    records = rows[["trial", "phase", "metric", "progress", "value"]].to_dict("records")
    return collect({str(key): value for key, value in record.items()} for record in records)


def collect(rows: Iterable[Mapping[str, Any]], measured: Measured | None = None) -> Measured:
    """Rows of the ledger (dicts with trial, phase, metric, progress, value) by trial and metric.

    With `measured`, they are added to it. Of equal keys the first counts, as in the ledger.
    """
    measured = {} if measured is None else measured
    for row in rows:
        metric = measured.setdefault(row["trial"], {}).setdefault(
            f"{row['phase']}/{row['metric']}", {}
        )
        metric.setdefault(float(row["progress"]), float(row["value"]))
    return measured


def rung_of(progress: float, rungs: Sequence[float]) -> int:
    """Number of the rung nearest to `progress`; rungs lie on whole steps, so not exactly there."""
    return min(range(len(rungs)), key=lambda index: abs(rungs[index] - progress))


def values_at_rung(
    measured: Measured, trial: str, phase: str, rung: int, rungs: Sequence[float]
) -> dict[str, float]:
    """Metric -> value of a trial at a rung of a phase; empty if it was not there."""
    values = {}
    for metric, curve in measured.get(trial, {}).items():
        if metric.startswith(f"{phase}/"):
            value = value_at_rung(curve, rung, rungs)
            if value is not None:
                values[metric] = value
    return values


def value_at_rung(curve: Mapping[float, float], rung: int, rungs: Sequence[float]) -> float | None:
    """What a curve, progress -> value, says of a rung; None: nothing."""
    if rungs[rung] in curve:
        return curve[rungs[rung]]
    near = [progress for progress in curve if rung_of(progress, rungs) == rung]
    return curve[min(near, key=lambda progress: abs(progress - rungs[rung]))] if near else None


def final_value(measured: Measured, trial: str, metric: str) -> float | None:
    """What a trial measured at the end of the metric's phase; None if it never got there."""
    return measured.get(trial, {}).get(metric, {}).get(1.0)
