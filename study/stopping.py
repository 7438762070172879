"""Whether a trial goes on after a rung. Pure functions of measured values; no clocks, no memory.

To add a rule, write a function of a `Rung` with keyword-only options that returns True to go on,
and add it to STOPPERS. An option `metric` must be the name of a comparable metric. Whoever did not
measure it, or has no rivals, goes on; and so does whoever is better than one that goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field

from study.ledger import Suggestion
from study.measured import Measured, rung_of, values_at_rung
from trainables.metrics import PSNR, metric_of, sign
from trainables.named import Choice


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


class Staged(Protocol):
    """A study, as far as its rungs are concerned."""

    @property
    def rungs(self) -> Sequence[float]:
        """Rising shares of a phase's budget; the last is 1."""

    @property
    def stopping(self) -> Choice:
        """The rule and its options."""


def goes_on(
    study: Staged,
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
    rung = rung_of(progress, study.rungs)
    if suggestion.origin != "search" or rung == len(study.rungs) - 1:
        return True
    rivals = [
        other.trial
        for other in suggestions
        if other.origin in ("search", "control")
        and other.seed == suggestion.seed
        and other.trial != trial
    ]
    at_rung = {
        name: values_at_rung(measured, name, phase, rung, study.rungs) for name in [trial, *rivals]
    }
    others = [at_rung[name] for name in rivals if at_rung[name]]
    rule = STOPPERS[study.stopping.name]
    return rule(Rung(at_rung[trial], others), **study.stopping.options())


STOPPERS = {"none": none, "halving": halving}
