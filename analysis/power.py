"""How often a study shows its best arm, and how often it claims what is not so.

    python -m analysis.power --studies 1000

In simulated studies, whose every arm is known, the same functions choose and judge as in real ones.
A plan says how many seeds arms get; the one with a verdict is what study files are advised to take.
To add a plan, an effect or a noise, add it to its table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np

from analysis.statistics import LEVEL, against_control, difference, holm, t_interval
from study.best import CONFIRM, VERDICT, Final, Standing, standings, winner
from study.tables import table

NUM_ARMS = 12
CONTROL, GOAL = "control", "maximize"
RECORDED = "recorded"


class Plan(NamedTuple):
    """Seeds of every arm, then of the best few, then of the best of these and of the control."""

    seeds: int
    arms: int = 0
    confirm: int = 0
    verdict: int = 0
    is_pooled: bool = True  # the noise of arms is learnt together, as the report does

    @property
    def trials(self) -> int:
        controls = self.seeds + (self.verdict or self.confirm)
        return NUM_ARMS * self.seeds + self.arms * self.confirm + self.verdict + controls


class Found(NamedTuple):
    """What the report would say of one study: 0 and 1 for no and yes; of many studies, shares."""

    is_best: float  # it shows the best arm to be better than the control
    is_better: float  # it shows one that is better
    is_false: float  # it claims a difference that does not exist, or has the other sign
    covers_difference: float  # of the arm that stands first, less the control
    covers_score: float
    bias: float  # of that arm's printed score, in standard deviations of a seed
    regret: float  # what the best arm has more than that arm


PLANS = {
    "3 seeds, each arm by itself": Plan(3, is_pooled=False),
    "3 seeds": Plan(3),
    "confirm 3 x 5": Plan(1, 3, 5),
    "confirm 3 x 2, verdict 10": Plan(1, 3, 2, 10),
}


def _spread() -> np.ndarray:
    """Like 12 draws of a normal whose standard deviation is that of a seed."""
    shares = (np.arange(NUM_ARMS) + 0.5) / NUM_ARMS
    drawn = np.array([NormalDist().inv_cdf(1 - share) for share in shares])
    return np.asarray(drawn / drawn.std())


# Arms' true scores less the control's, the best first, in standard deviations of a seed
EFFECTS: dict[str, np.ndarray] = {
    "all alike": np.zeros(NUM_ARMS),
    "one is ahead by 1": np.array([1.0] + [0.0] * (NUM_ARMS - 1)),
    "a ladder, 1 apart": np.array([1.0, *-np.arange(1.0, NUM_ARMS)]),
    "spread by 1": _spread(),
}

Noise = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def _scaled(scales: np.ndarray) -> Noise:
    return lambda rng, shape: rng.normal(size=shape) * scales[:, None]


def _scales(**of: float) -> np.ndarray:
    scales = np.ones(NUM_ARMS + 1)
    scales[0] = of.get("best", 1.0)
    scales[-1] = of.get("control", 1.0)
    scales[1:-1:2] = of.get("half", 1.0)
    return scales


def _shared(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    common = rng.normal(size=(1, shape[1]))
    return math.sqrt(0.5) * (common + rng.normal(size=shape))


# (generator, (arms + control, seeds)) -> what is added to the true scores, the control last
NOISES: dict[str, Noise] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "half of it shared by a seed's arms": _shared,
    "the control's threefold": _scaled(_scales(control=3.0)),
    "the best arm's threefold": _scaled(_scales(best=3.0)),
    "every other arm's threefold": _scaled(_scales(half=3.0)),
    "rising to threefold": _scaled(np.linspace(1, 3, NUM_ARMS + 1)),
    "heavy tails (t, 3)": lambda rng, shape: rng.standard_t(3, size=shape) / math.sqrt(3),
    "skewed (exponential)": lambda rng, shape: 1 - rng.exponential(size=shape),
}


def recorded_arms() -> tuple[np.ndarray, np.ndarray]:
    """Means and seeds' standard deviations of the arms of study/tables, in those of a seed.

    Three seeds say little of one arm's noise: it is that of all arms of its patch and rate.
    """
    rows = table("textures")
    ends = rows[(rows["phase"] == "segment") & (rows["progress"] == 1)]
    arms = [name for name in ends.columns if "." in name]
    found = ends.groupby(arms, dropna=False)["miou"].agg(["mean", "var"]).reset_index()
    alike = ["model.patch", "pretrain.optimizer.base_lr"]
    variances = found.groupby(alike)["var"].transform("mean")
    unit = math.sqrt(found["var"].mean())
    return found["mean"].to_numpy() / unit, np.sqrt(variances.to_numpy()) / unit


def play(plan: Plan, effects: np.ndarray, noise: Noise, rng: np.random.Generator) -> Found:
    """One study of arms with these effects, and what is said of it."""
    names = [f"arm {place}" for place in range(NUM_ARMS)]
    truth = dict(zip(names, effects, strict=True)) | {CONTROL: 0.0}
    total = plan.seeds + plan.confirm + plan.verdict
    drawn = noise(rng, (NUM_ARMS + 1, total)) + np.array([*effects, 0.0])[:, None]
    scores = dict(zip(truth, drawn.tolist(), strict=True))

    def trials(arms: Iterable[str], origin: str, first: int, number: int) -> list[Final]:
        seeds = range(first, first + number)
        return [Final(arm, origin, seed, scores[arm][seed]) for arm in arms for seed in seeds]

    def ranked(done: Sequence[Final]) -> list[Standing]:
        seeds = {"confirm_seeds": plan.confirm, "verdict_seeds": plan.verdict}
        return standings(done, GOAL, seeds=plan.seeds, **seeds)

    done = trials([CONTROL], "control", 0, plan.seeds) + trials(names, "search", 0, plan.seeds)
    if plan.confirm:
        best = [one.arm for one in ranked(done) if one.group == "search"][: plan.arms]
        beside = [] if plan.verdict else [CONTROL]
        done += trials([*best, *beside], CONFIRM, plan.seeds, plan.confirm)
        if plan.verdict:
            judged = [winner(done, best, GOAL) or "", CONTROL]
            done += trials(judged, VERDICT, plan.seeds + plan.confirm, plan.verdict)
    found = ranked(done)
    leader = next(one for one in found if one.group == "search")
    control = _by_seed(next(one for one in found if one.group == "control"))
    tested = {
        one.arm: _by_seed(one)
        for one in found
        if one.group == "search" and one.stage is leader.stage
    }
    if plan.is_pooled:
        against = against_control(tested, control)
    else:
        against = {arm: difference(own, control) for arm, own in tested.items()}
    told = {arm: one for arm, one in against.items() if one is not None}
    adjusted = holm([one.p for one in told.values()])
    claims = {arm: p < LEVEL for arm, p in zip(told, adjusted, strict=True)}
    best_arm, gap = leader.arm, told[leader.arm]
    score = t_interval(list(leader.values.values()))
    is_shown = claims[best_arm] and gap.mean > 0
    return Found(
        is_best=is_shown and truth[best_arm] > 0 and truth[best_arm] == max(effects),
        is_better=is_shown and truth[best_arm] > 0,
        is_false=any(claims[arm] and told[arm].mean * truth[arm] <= 0 for arm in told),
        covers_difference=gap.low <= truth[best_arm] <= gap.high,
        covers_score=score.low <= truth[best_arm] <= score.high,
        bias=score.mean - truth[best_arm],
        regret=float(max(effects) - truth[best_arm]),
    )


def _by_seed(one: Standing) -> dict[Hashable, float]:
    return {seed: value for seed, value in one.values.items()}


def played(plan: Plan, effect: str, noise: str, studies: int, seed: int = 0) -> Found:
    """The means over many studies. `recorded` as effect and noise: arms of study/tables."""
    rng = np.random.default_rng([seed, *f"{effect}, {noise}".encode()])
    found = []
    means, scales = recorded_arms() if effect == RECORDED else (np.empty(0), np.empty(0))
    for _ in range(studies):
        if effect == RECORDED:
            chosen = rng.choice(len(means), NUM_ARMS + 1, replace=False)
            effects = means[chosen[:-1]] - means[chosen[-1]]
            found.append(play(plan, effects, _scaled(scales[chosen]), rng))
        else:
            found.append(play(plan, EFFECTS[effect], NOISES[noise], rng))
    return Found(*map(fmean, zip(*found, strict=True)))


def scenarios() -> list[tuple[str, str]]:
    """(effect, noise) of all."""
    return [(effect, noise) for effect in EFFECTS for noise in NOISES] + [(RECORDED, RECORDED)]


def line(effect: str, noise: str, name: str, found: Mapping[str, float]) -> str:
    shares = "  ".join(f"{word} {value:5.3f}" for word, value in found.items())
    return f"{effect:18} {noise:36} {name:28} {shares}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--plans", nargs="*", choices=PLANS, default=list(PLANS))
    given = parser.parse_args()
    for name in given.plans:
        print(f"{name}: {PLANS[name].trials} trials")
    for effect, noise in scenarios():
        for name in given.plans:
            found = played(PLANS[name], effect, noise, given.studies)
            print(line(effect, noise, name, found._asdict()), flush=True)


if __name__ == "__main__":
    main()
