"""Ways to search, compared on landscapes: `maskstudy bench --search`.

Every contender plays the same studies: the same landscape, the same luck of the seeds. What is
compared is the true regret of the arm that each would call the best, after so much compute; a
difference is paired by study, with a t interval over studies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean

import numpy as np
from pydantic import TypeAdapter

from study import landscapes, tables
from study.replay import Landscape, Ours, Searcher, play, regret_at
from study.rivals import PACKAGES, RIVALS
from study.samplers import POPULATIONS, SAMPLERS
from study.spec import Sampler, Stopper
from study.stopping import STOPPERS
from trainables.errors import UserError
from trainables.late import Late
from trainables.metrics import MIOU, PSNR

stats = Late("scipy.stats")

LOOKS = (5.0, 10.0, 20.0, 40.0)  # at the compute of so many average full trials
REFERENCE = "ray"
OBJECTIVES = (MIOU, PSNR)  # of a recorded table
EVERY = 0.25  # full trials, of the curves


@dataclass(frozen=True)
class Curve:
    """One contender on one landscape: the regret of each study on a grid of compute."""

    landscape: str
    contender: str
    spent: tuple[float, ...]  # full trials
    regrets: np.ndarray  # (studies, points)

    def at(self, runs: float) -> np.ndarray:
        """(studies,): once so much compute was spent."""
        return self.regrets[:, int(np.searchsorted(self.spent, runs + 1e-9)) - 1]

    def reaches(self, regret: float) -> float | None:
        """The compute from which on the mean regret is as small as that; None: never."""
        means = self.regrets.mean(axis=0)
        return next(
            (at for at, mean in zip(self.spent, means, strict=True) if mean <= regret), None
        )


def contest(
    contenders: Sequence[str],
    names: Sequence[str],
    *,
    studies: int,
    workers: int,
    runs: float = LOOKS[-1],
    hears: Callable[[str], None] = lambda text: None,
) -> Iterator[Curve]:
    """All contenders on all landscapes, one after the other."""
    grid = tuple(np.arange(0.0, runs + EVERY / 2, EVERY).tolist())
    for name in names:
        known: dict[int, Landscape] = {}
        for contender in contenders:
            begin, regrets = searcher_of(contender), []
            for number in range(studies):
                hears(f"{name}: {contender}, study {number + 1} of {studies}")
                if number not in known:
                    known[number] = landscape(name, number)
                searcher = begin(known[number], number)
                points = play(searcher, known[number], runs=runs, workers=workers, noise=number)
                regrets.append([regret_at(points, spent) for spent in grid])
            yield Curve(name, contender, grid, np.array(regrets))


def landscape(name: str, number: int) -> Landscape:
    """The landscape of a study's number: a recorded one is always the same, traps are drawn."""
    if name in landscapes.TRAPS:
        return landscapes.TRAPS[name](number)
    table, _, metric = name.partition(":")
    return landscapes.recorded(table, metric)


def all_landscapes() -> list[str]:
    recorded = [f"{name}:{m}" for name in tables.names() for m in OBJECTIVES]
    return [*recorded, *landscapes.TRAPS]


def searcher_of(contender: str) -> Callable[[Landscape, int], Searcher]:
    """Of a landscape and a seed, by a rival's name or as `sampler+stopping`."""
    if contender in RIVALS:
        if not is_installed(contender):
            raise UserError(f"--search: {contender} is not installed here; pip install {contender}")
        return RIVALS[contender]
    sampler, _, stopping = contender.partition("+")
    known = [name for name in SAMPLERS if name not in POPULATIONS]  # others need real training
    if sampler not in known or stopping not in STOPPERS:
        raise UserError(
            f"--search: given {contender!r}; expected a sampler ({', '.join(known)}) and a "
            f"stopping rule ({', '.join(STOPPERS)}) as in tpe+halving, or one of "
            f"{', '.join(RIVALS)}"
        )
    chosen = {
        "sampler": TypeAdapter(Sampler).validate_python(sampler),
        "stopping": TypeAdapter(Stopper).validate_python(stopping),
    }
    return lambda place, seed: Ours(place.spec.model_copy(update=chosen | {"seed": seed}))


def is_installed(contender: str) -> bool:
    """Ours are, and so are rivals that are dependencies of ours."""
    return contender not in PACKAGES or find_spec(PACKAGES[contender]) is not None


def difference(curve: Curve, other: Curve, runs: float) -> tuple[float, float, float]:
    """(mean, low, high) of the paired difference in regret, below 0 where `curve` is ahead."""
    paired = curve.at(runs) - other.at(runs)
    mean, count = fmean(paired), len(paired)
    if count < 2:
        return mean, float("nan"), float("nan")
    half = stats.t.ppf(0.975, count - 1) * paired.std(ddof=1) / count**0.5
    return mean, mean - half, mean + half
