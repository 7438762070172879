"""Landscapes that studies are played on (replay.py): recorded ones, and three with a known trap.

A recorded one is a table of real trials (tables/). Between two recorded values of a number, such as
a learning rate, its curves are interpolated; the noise is that of the recorded seeds.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from study import space, tables
from study.ledger import Outcome
from study.loading import load_spec, parse_spec
from study.replay import Landscape, Params, Reading
from study.samplers import value_at
from study.spec import StudySpec
from trainables.metrics import MIOU, PHASES, PSNR

Floats = npt.NDArray[np.float64]
Curve = Callable[[float, float, random.Random], float]  # of (quality, progress, luck)
RANDOM_ARMS = 400  # by which a random arm is judged


class _Chance:
    """Draws parameters by chance; Optuna's own random sampler takes a study for that."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return value_at(CategoricalDistribution(choices), self.chance.random())

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        return int(value_at(IntDistribution(low, high, **options), self.chance.random()))

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        return float(value_at(FloatDistribution(low, high, **options), self.chance.random()))


def random_arms(spec: StudySpec, number: int, seed: int = 0) -> list[Params]:
    ask = _Chance(seed)
    return [space.draw(spec.search, ask).params for _ in range(number)]


def recorded(name: str, objective: str) -> Landscape:
    """A table that comes with the package, with that objective; later phases are left out."""
    return of_table(tables.table(name), load_spec(tables.study_file(name)), objective, name)


def of_table(rows: pd.DataFrame, whole: StudySpec, objective: str, name: str) -> Landscape:
    spec = whole.model_copy(
        update={
            "objectives": [type(whole.objectives[0]).model_validate({"metric": objective})],
            "controls": [],
            "seeds": 1,
        }
    )
    phases = PHASES[: PHASES.index(objective.split("/")[0]) + 1]
    records = _Records(rows[rows.phase.isin(phases)], space.parameters(spec.search))

    def readings(params: Params, luck: int) -> list[Reading]:
        return records.readings(params, random.Random(luck).choice(records.seeds))

    def truth(params: Params) -> float:
        return fmean(records.readings(params, seed)[-1].values[objective] for seed in records.seeds)

    return _landscape(name, spec, readings, truth, records.arms)


def _landscape(
    name: str,
    spec: StudySpec,
    readings: Callable[[Params, int], list[Reading]],
    truth: Callable[[Params], float],
    arms: Sequence[Params],
) -> Landscape:
    chance = random_arms(spec, RANDOM_ARMS)
    values = [truth(params) for params in chance]
    costs = [sum(each.cost for each in readings(params, 0)) for params in chance]
    return Landscape(
        name=name,
        spec=spec,
        readings=readings,
        truth=truth,
        best=max([*values, *map(truth, arms)]),
        typical=median(values),
        full_cost=fmean(costs),
    )


class _Records:
    """A table by its arms; numbers between recorded ones are interpolated."""

    def __init__(self, rows: pd.DataFrame, known: Mapping[str, space.Parameter]) -> None:
        names = self.names = list(known)
        self.is_log = {name: parameter.item.log for name, parameter in known.items()}
        self.seeds = sorted(rows.seed.unique().tolist())
        self.metrics = [m for m in tables.METRICS if m in rows and m != "device_seconds"]
        self.levels = {
            name: sorted(rows[name].dropna().unique().tolist())
            for name in names
            if rows[name].dtype.kind == "f"
        }
        self.curves: dict[tuple[Any, ...], list[tuple[str, float, Floats]]] = {}
        for values in rows[[*names, *tables.INDEX, *self.metrics]].itertuples(index=False):
            arm = tuple(None if value != value else value for value in values[: len(names)])
            seed, phase, progress = values[len(names) : len(names) + 3]
            measured = np.array(values[len(names) + 3 :], float)
            self.curves.setdefault((*arm, seed), []).append((phase, progress, measured))
        for curve in self.curves.values():
            curve.sort(key=lambda each: (PHASES.index(each[0]), each[1]))

    @property
    def arms(self) -> list[Params]:
        found = {arm[:-1] for arm in self.curves}
        return [
            {n: v for n, v in zip(self.names, arm, strict=True) if v is not None} for arm in found
        ]

    def readings(self, params: Params, seed: int) -> list[Reading]:
        corners = [self._between(name, params.get(name)) for name in self.names]
        total: list[Floats] | None = None
        for corner in itertools.product(*corners):
            share = math.prod(weight for _, weight in corner)
            curve = self.curves[(*(value for value, _ in corner), seed)]
            parts = [share * measured for _, _, measured in curve]
            total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
        assert total is not None
        found, before, of_phase = [], 0.0, ""
        for (phase, progress, _), measured in zip(curve, total, strict=True):
            if phase != of_phase:
                before, of_phase = 0.0, phase
            values = {
                f"{phase}/{metric}": float(value)
                for metric, value in zip(self.metrics, measured, strict=True)
                if not math.isnan(value)
            }
            done = values.pop(f"{phase}/flops")
            found.append(Reading(phase, progress, done - before, values))
            before = done
        return found

    def _between(self, name: str, value: Any) -> list[tuple[Any, float]]:
        """(recorded value, its weight): one, or the two around it."""
        if value is None or name not in self.levels:
            return [(value, 1.0)]
        levels = self.levels[name]
        high = min(max(int(np.searchsorted(levels, value)), 1), len(levels) - 1)
        low = high - 1
        low_value, high_value, at = (
            map(math.log, (levels[low], levels[high], value))
            if self.is_log[name]
            else (levels[low], levels[high], value)
        )
        share = min(max((at - low_value) / (high_value - low_value), 0.0), 1.0)
        both = [(levels[low], 1 - share), (levels[high], share)]
        return [(level, weight) for level, weight in both if weight > 0]


# Three with a known trap

SPACE = """\
study: {name}
data: {{source: smears, size: 32}}
trial:
  model: {{size: pico, patch: 8, decoder: {{depth: 1, width: 64}}}}
  masking: {{ratio: {{name: constant, value: 0.5}}}}
  pretrain: {{optimizer: {{name: adamw, base_lr: 1.0e-2}}}}
search:
  model.patch: {{choices: [4, 8, 16]}}
  masking.ratio:
    choices:
      constant: {{name: constant, value: {{low: 0.1, high: 0.9}}}}
      rising: {{name: linear, start: {{low: 0.1, high: 0.5}}, end: {{low: 0.5, high: 0.9}}}}
  pretrain.optimizer.base_lr: {{low: 1.0e-3, high: 1.0e-1, log: true}}
objectives: [{objective}]
controls: []
rungs: [0.0625, 0.125, 0.25, 0.5, 1.0]
budget: {{trials: 100000}}
"""
COST = {4: 4.0, 8: 2.0, 16: 1.0}  # of a phase, by patch
SEED_NOISE, RUNG_NOISE = 0.15, 0.05  # standard deviations, where good and bad arms differ by 3


def crossing(instance: int) -> Landscape:
    """The better an arm, the later it gets going: early ranks are the wrong way round."""

    def curve(quality: float, progress: float, _: random.Random) -> float:
        half = 0.1 + 0.25 / (1 + math.exp(-2 * quality))  # of the gain is made by then
        return (quality + 4) * progress / (progress + half) * (1 + half)

    return _made("crossing", instance, PSNR, curve)


def misleading(instance: int) -> Landscape:
    """What is measured in pretraining says nothing of segmentation; segmentation's rungs do."""

    def curve(quality: float, progress: float, chance: random.Random) -> float:
        return chance.gauss(0, 1) + 4 * progress / (progress + 0.2)

    return _made("misleading", instance, MIOU, curve)


def dead(instance: int) -> Landscape:
    """The smallest patch never fits into memory; curves keep their order."""

    def curve(quality: float, progress: float, _: random.Random) -> float:
        return (quality + 4) * progress / (progress + 0.2) * 1.2

    return _made("dead", instance, PSNR, curve, dead_patch=4)


TRAPS = {"crossing": crossing, "misleading": misleading, "dead": dead}


def _made(
    name: str, instance: int, objective: str, curve: Curve, dead_patch: int | None = None
) -> Landscape:
    spec = parse_spec(
        SPACE.format(name=name, objective=objective), Path(), where=f"landscape {name}"
    )
    chance = random.Random(f"{name} {instance}")
    ratio_of = {patch: chance.uniform(0.3, 0.8) for patch in COST}
    of_patch = {patch: chance.uniform(-1, 0) for patch in COST}
    of_label = {label: chance.uniform(-0.5, 0) for label in ("constant", "rising")}
    best_rate = chance.uniform(-2.4, -1.4)

    def quality(params: Params) -> float:
        label, patch = params["masking.ratio"], params["model.patch"]
        if label == "constant":
            ratio = params["masking.ratio/constant.value"]
        else:
            ratio = fmean(params[f"masking.ratio/rising.{end}"] for end in ("start", "end"))
        off_ratio = (ratio - ratio_of[patch]) / 0.25
        off_rate = math.log10(params["pretrain.optimizer.base_lr"]) - best_rate
        return float(of_patch[patch] + of_label[label] - off_ratio**2 / 2 - off_rate**2)

    def readings(params: Params, luck: int) -> list[Reading]:
        whole, patch = quality(params), params["model.patch"]
        noise = random.Random(luck)
        of_seed = noise.gauss(0, SEED_NOISE)
        if patch == dead_patch:
            share = spec.rungs[0] * COST[patch]
            return [Reading("pretrain", spec.rungs[0], share, {}, Outcome.OUT_OF_MEMORY)]
        found = []
        for phase in PHASES[: PHASES.index(objective.split("/")[0]) + 1]:
            before = 0.0
            for rung in spec.rungs:
                value = noise.gauss(of_seed, RUNG_NOISE)
                if phase == "segment":
                    value += (whole + 4) * rung / (rung + 0.2) * 1.2
                else:
                    value += curve(whole, rung, random.Random(luck + 1))
                metric = MIOU if phase == "segment" else PSNR
                cost = (rung - before) * COST[patch]
                found.append(Reading(phase, rung, cost, {metric: value}))
                before = rung
        return found

    def truth(params: Params) -> float:
        return -4.0 if params["model.patch"] == dead_patch else quality(params)

    return _landscape(name, spec, readings, truth, random_arms(spec, 4000, seed=1))
