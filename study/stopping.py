"""Whether a trial goes on after a rung. Pure functions of measured values; no clocks, no memory.

To add a rule, write a function of a `Rung` with keyword-only options that returns True to go on,
and add it to STOPPERS. An option `metric` must be the name of a comparable metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from study.ledger import Suggestion
from trainables.metrics import PSNR, metric_of, sign

if TYPE_CHECKING:
    from study.spec import StudySpec

# trial -> "phase/metric" -> progress -> value
Measured = dict[str, dict[str, dict[float, float]]]


@dataclass(frozen=True)
class Rung:
    """A trial's arrival at a rung: what it measured there, and what others did before."""

    own: Mapping[str, float]  # "phase/metric" -> value
    others: Sequence[Mapping[str, float]]  # of trials with the same seed index


def none(rung: Rung) -> bool:
    """Every trial runs to its end."""
    return True


def halving(
    rung: Rung,
    *,
    metric: str = PSNR,
    reduction: Annotated[int, Field(ge=2)] = 3,
    min_trials: Annotated[int, Field(ge=2)] = 6,
) -> bool:
    """Asynchronous successive halving: the best 1/`reduction` of the values so far go on.

    The first `min_trials` - 1 go on in any case. Li et al., 2020, arXiv 1810.05934; in its stopping
    form, as nobody waits.
    """
    if metric not in rung.own:
        return True
    turned = sign(metric_of(metric).goal)
    own = turned * rung.own[metric]
    others = [turned * values[metric] for values in rung.others if metric in values]
    if not math.isfinite(own):
        return False
    seen = len(others) + 1
    if seen < min_trials:
        return True
    num_better = sum(other > own for other in others)  # NaN is better than nothing
    return num_better < max(1, seen // reduction)


def goes_on(
    spec: StudySpec,
    suggestions: Sequence[Suggestion],
    measured: Measured,
    trial: str,
    phase: str,
    progress: float,
) -> bool:
    """Whether `trial`, whose values at this rung are in `measured`, goes on.

    Only searched arms are ever stopped, and never at the end of a phase. They are compared with
    searched and control trials of the same seed index.
    """
    by_trial = {suggestion.trial: suggestion for suggestion in suggestions}
    suggestion = by_trial[trial]
    rung = rung_of(progress, spec.rungs)
    if suggestion.origin != "search" or rung == len(spec.rungs) - 1:
        return True
    rivals = [
        other.trial
        for other in suggestions
        if other.origin in ("search", "control")
        and other.seed == suggestion.seed
        and other.trial != trial
    ]
    at_rung = {
        name: values_at_rung(measured, name, phase, rung, spec.rungs) for name in [trial, *rivals]
    }
    others = [at_rung[name] for name in rivals if at_rung[name]]
    rule = STOPPERS[spec.stopping.name]
    return rule(Rung(at_rung[trial], others), **spec.stopping.options())


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
        near = [progress for progress in curve if rung_of(progress, rungs) == rung]
        if metric.startswith(f"{phase}/") and near:
            values[metric] = curve[min(near, key=lambda progress: abs(progress - rungs[rung]))]
    return values


def final_value(measured: Measured, trial: str, metric: str) -> float | None:
    """What a trial measured at the end of the metric's phase; None if it never got there."""
    return measured.get(trial, {}).get(metric, {}).get(1.0)


STOPPERS = {"none": none, "halving": halving}
