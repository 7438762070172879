"""Whether a trial goes on after a rung. Pure functions of measured values; no clocks, no memory.

To add a rule, write a function of a `Rung` with keyword-only options that returns True to go on,
and add it to STOPPERS. One with an option `metric` asks `best_foreteller` for the metric that
counts at this rung. Whoever did not measure it, or has no rivals, goes on; and so does whoever is
better than one that goes on.

A metric that does not foretell the objective stops the wrong arms. So how well it does is measured
while the study runs, on the trials that came to their ends, and where it is too little nobody is
stopped.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median as median_of
from typing import Annotated, NamedTuple, Protocol

from pydantic import Field

from study.ledger import Suggestion
from study.measured import Measured, final_value, rung_of, value_at_rung
from trainables.metrics import PHASES, PSNR, metric_of, parse, sign
from trainables.named import Choice

# Tried in this order where nothing is said; the objective itself comes first in its own phase
FORETELLERS = (PSNR, "pretrain/probe_ssim", "pretrain/dense_miou")
BELIEF_TRIALS = 6  # what is believed of a correlation before it is known counts like so many
PROXY_BELIEF = 0.7  # that of another metric than the objective, beside the objective's
LEAST_CORRELATION = 0.4  # with the objective, from which on a metric may stop anybody
FEWEST_FINALS = 3  # trials of which a correlation is computed

Reduction = Annotated[
    Annotated[int, Field(ge=2)] | None,
    Field(description="of so many the best one goes on; null: by how far the next rung is"),
]


@dataclass(frozen=True)
class Arrival:
    """A trial at a rung."""

    arm: int  # 0, 1, 2, ... in the order in which arms were begun
    values: Mapping[str, float]  # "phase/metric" -> value
    earlier: Sequence[Mapping[str, float]] = ()  # at the rungs of the phase before
    final: float | None = None  # the objective at its end; None: it has not come there


@dataclass(frozen=True)
class Rung:
    """A trial's arrival at a rung, and who was there before, of the same seed."""

    own: Arrival
    others: Sequence[Arrival]
    objective: str
    phase: str = "pretrain"
    number: int = 0  # of the rung in its phase
    count: int = 5  # of rungs of a phase
    progress: float = 0.5  # of the phase
    kept: float = 0.5  # how far a trial has come, as a share of how far it has at the next rung

    def share(self, reduction: int | None) -> float:
        """Of trials that go on."""
        return self.kept if reduction is None else 1 / reduction


class Foreteller(NamedTuple):
    """A metric by which trials are judged at a rung."""

    metric: str
    correlation: float  # of ranks, with the objective; partly believed while trials are few


class _Judged(NamedTuple):
    """The same values turned so that more is better."""

    own: float
    others: list[float]


def none(rung: Rung) -> bool:
    """Every trial runs to its end."""
    return True


def halving(
    rung: Rung,
    *,
    metric: str | None = None,
    reduction: Reduction = None,
    min_trials: Annotated[
        int, Field(ge=1, description="from which on anybody is stopped; one without rivals is not")
    ] = 1,
) -> bool:
    """Asynchronous successive halving: the further away the next rung is, the fewer go there.

    Of trials that have come to a quarter of what the next rung takes, the best quarter. Li et al.,
    2020, arXiv 1810.05934, in its stopping form, as nobody waits; that the share follows the rungs,
    so that every rung costs alike, and that both phases count alike, is interpretation.
    """
    judged = _judged(rung, metric)
    if judged is None or (math.isfinite(judged.own) and len(judged.others) + 1 < min_trials):
        return True
    return _is_among_best(judged, rung.share(reduction))


def hyperband(
    rung: Rung,
    *,
    metric: str | None = None,
    reduction: Reduction = None,
) -> bool:
    """Asynchronous Hyperband: arms take turns in brackets, of which each begins a rung later.

    Within its bracket an arm is treated as by `halving`. Li et al., 2018, JMLR 18 (185), in the
    asynchronous form of arXiv 1810.05934; that brackets get equally many arms is interpretation.
    """
    bracket = rung.own.arm % rung.count
    if rung.number < bracket and rung.phase == PHASES[0]:
        return True
    mates = [other for other in rung.others if other.arm % rung.count == bracket]
    judged = _judged(replace(rung, others=mates), metric)
    return judged is None or _is_among_best(judged, rung.share(reduction))


def median(
    rung: Rung,
    *,
    metric: str | None = None,
    min_trials: Annotated[int, Field(ge=2)] = 4,
) -> bool:
    """The median rule: whoever is worse than half of those that were there before is stopped.

    Golovin et al., 2017, Google Vizier, section 3.2.2, with values at the same rung for running
    means. The first `min_trials` - 1 go on in any case.
    """
    judged = _judged(rung, metric)
    if judged is None:
        return True
    if not math.isfinite(judged.own):
        return False
    finite = [other for other in judged.others if math.isfinite(other)]
    return len(judged.others) + 1 < min_trials or not finite or judged.own >= median_of(finite)


def patience(
    rung: Rung, *, metric: str | None = None, rungs: Annotated[int, Field(ge=1)] = 2
) -> bool:
    """A trial that has not become better for so many rungs of a phase is stopped."""
    found = best_foreteller(rung, metric)
    if found is None:
        return True
    turned = sign(metric_of(found.metric).goal)
    arrived = [*rung.own.earlier, rung.own.values]
    curve = [turned * values[found.metric] for values in arrived if found.metric in values]
    if not math.isfinite(curve[-1]):
        return False
    return len(curve) <= rungs or max(curve[-rungs:]) > max(curve[:-rungs])


def best_foreteller(rung: Rung, metric: str | None = None) -> Foreteller | None:
    """The metric that counts at a rung, by default the best foreteller; None: none is good enough.

    Of another phase than the given metric's, the objective counts if it is measured there.
    """
    of_phase = [rung.objective] if parse(rung.objective).phase == rung.phase else []
    if metric is None:
        of_phase += [name for name in FORETELLERS if parse(name).phase == rung.phase]
    elif parse(metric).phase == rung.phase:
        of_phase = [metric]
    known = dict.fromkeys(name for name in of_phase if name in rung.own.values)
    found = [Foreteller(name, _correlation(rung, name)) for name in known]
    best = max(found, key=lambda each: each.correlation, default=None)
    return best if best is not None and best.correlation >= LEAST_CORRELATION else None


class Staged(Protocol):
    """A study, as far as its rungs are concerned."""

    @property
    def rungs(self) -> Sequence[float]:
        """Rising shares of a phase's budget; the last is 1."""

    @property
    def stopping(self) -> Choice:
        """The rule and its options."""

    @property
    def objectives(self) -> Sequence[Aim]:
        """What arms are chosen by; the first counts."""


class Aim(Protocol):
    @property
    def metric(self) -> str: ...


def goes_on(
    stopping: Choice,
    rung: Rung,
    suggestion: Suggestion,
    *,
    first_seed: int,
    is_labelled: bool = True,
    spared: Collection[str] = (),
) -> bool:
    """Whether a trial that has come to a rung goes on, by a rule and its options.

    Only searched arms are ever stopped, but those that a person asked for (`spared`), and only by
    their first seed: an arm is stopped or goes on as one. At a trial's end nobody is.
    """
    is_end = rung.number == rung.count - 1 and (rung.phase == PHASES[-1] or not is_labelled)
    is_judged = suggestion.origin == "search" and suggestion.seed == first_seed
    if is_end or not is_judged or suggestion.arm in spared:
        return True
    return STOPPERS[stopping.name](rung, **stopping.options())


def rung_at(
    study: Staged,
    suggestions: Sequence[Suggestion],
    measured: Measured,
    trial: str,
    phase: str,
    progress: float,
) -> Rung:
    """A trial's arrival, and which searched and control trials of its seed were there before."""
    number = rung_of(progress, study.rungs)
    objective = study.objectives[0].metric
    arms: dict[str, int] = {}
    for suggestion in suggestions:
        arms.setdefault(suggestion.arm, len(arms))

    asked = study.stopping.options().get("metric")
    names = [
        name for name in (asked, objective, *FORETELLERS) if name and parse(name).phase == phase
    ]

    def values_at(suggestion: Suggestion, rung: int) -> dict[str, float]:
        curves = measured.get(suggestion.trial, {})
        found = {name: value_at_rung(curves.get(name, {}), rung, study.rungs) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def arrival(suggestion: Suggestion) -> Arrival:
        final = final_value(measured, suggestion.trial, objective)
        return Arrival(arms[suggestion.arm], values_at(suggestion, number), (), final)

    own = next(each for each in suggestions if each.trial == trial)
    rivals = [
        other
        for other in suggestions
        if other.origin in ("search", "control") and other.seed == own.seed and other is not own
    ]
    others = [found for other in rivals if (found := arrival(other)).values]
    arrived = replace(arrival(own), earlier=[values_at(own, rung) for rung in range(number)])
    # every phase counts alike
    ends = [place + rung for place in range(len(PHASES)) for rung in study.rungs]
    at = PHASES.index(phase) * len(study.rungs) + number
    kept = ends[at] / ends[min(at + 1, len(ends) - 1)]
    progress = study.rungs[number]
    return Rung(arrived, others, objective, phase, number, len(study.rungs), progress, kept)


def _judged(rung: Rung, metric: str | None) -> _Judged | None:
    found = best_foreteller(rung, metric)
    if found is None:
        return None
    turned = sign(metric_of(found.metric).goal)
    others = [other.values[found.metric] for other in rung.others if found.metric in other.values]
    return _Judged(turned * rung.own.values[found.metric], [turned * value for value in others])


def _is_among_best(judged: _Judged, share: float) -> bool:
    if not math.isfinite(judged.own):
        return False
    num_better = sum(other > judged.own for other in judged.others)  # NaN is better than nothing
    return num_better < math.ceil(share * (len(judged.others) + 1))


def _correlation(rung: Rung, metric: str) -> float:
    """How well ranks by a metric at this rung are those by the objective at the end."""
    turned = sign(metric_of(metric).goal), sign(metric_of(rung.objective).goal)
    pairs = [
        (turned[0] * other.values[metric], turned[1] * other.final)
        for other in rung.others
        if other.final is not None and metric in other.values
    ]
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    believed = math.sqrt(rung.progress) * (1.0 if metric == rung.objective else PROXY_BELIEF)
    if len(finite) < FEWEST_FINALS:
        return believed
    measured = rank_correlation(*zip(*finite, strict=True))
    return (BELIEF_TRIALS * believed + len(finite) * measured) / (BELIEF_TRIALS + len(finite))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: 1 in the same order, -1 the other way round; 0 where one has no order."""
    ranks = [_ranks(one), _ranks(other)]
    mean = (len(one) - 1) / 2
    centred = [[rank - mean for rank in each] for each in ranks]
    norm = math.prod(math.sqrt(sum(value * value for value in each)) for each in centred)
    return sum(a * b for a, b in zip(*centred, strict=True)) / norm if norm > 0 else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """0 for the least; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, first = [0.0] * len(values), 0
    for _, group in groupby(order, key=values.__getitem__):
        places = list(group)
        for place in places:
            ranks[place] = first + (len(places) - 1) / 2
        first += len(places)
    return ranks


STOPPERS = {
    "none": none,
    "halving": halving,
    "hyperband": hyperband,
    "median": median,
    "patience": patience,
}
