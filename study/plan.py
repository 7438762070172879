"""What a study will take, before it is started: arms, trials, tokens, operations, memory, hours."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cluster.placement import Room, WorkerGroup, num_groups, worker_group
from study import space
from study.costs import work_of
from study.fit import DataSize, data_size
from study.owed import num_fresh
from study.population import has_population, num_children, num_replaced
from study.resume import num_pretrainings
from study.spec import UNITS
from study.spending import HOUR, Amounts
from trainables import cost
from trainables.config import TrialConfig, arm_id
from trainables.edges import Edges, grid_of, in_words
from trainables.hiding import has_teacher
from trainables.mae import MAE
from trainables.masking import hidden_units
from trainables.metrics import metric_of
from trainables.schedules import MIDPOINTS, value_at
from trainables.storage import is_uri

if TYPE_CHECKING:
    from study.spec import Resources, StudySpec
    from trainables.data import Dataset
    from trainables.speed import Speeds

MOST_SAMPLED = 24  # arms whose cost is computed
MOST_WALKED = 2_000
MOST_COUNTED = 100_000  # arms of a grid
BYTES_PER_PARAMETER = 16  # float32: weight, gradient, two moments of AdamW
TEACHER_BYTES = 4  # of each parameter: the moving average's weight


@dataclass(frozen=True)
class ArmCost:
    """One trial of an arm, with everything that is planned for it."""

    arm: str
    patch: Edges
    tokens: int  # patches of an image
    visible_tokens: float  # that the encoder sees, mean over the schedule
    parameters: int  # of encoder and decoder
    pretrain_steps: int
    segment_steps: int
    pretrain_flops: float
    segment_flops: float
    memory_bytes: int  # per worker, estimate

    @property
    def flops(self) -> float:
        return self.pretrain_flops + self.segment_flops


class Phases(NamedTuple):
    """Something of both phases."""

    pretrain: float
    segment: float


@dataclass(frozen=True)
class Plan:
    """Plain data for people; hours are as if nothing were stopped early."""

    study: str
    searched_arms: int
    trials: int  # without confirmations
    confirmations: int
    grid_arms: int | None  # of sampler grid
    children: int  # that take the places of others in a population, and are no trials more
    control: ArmCost
    cheapest: ArmCost
    dearest: ArmCost
    flops: float  # of all trials
    concurrent: int  # trials at once; 0 if a trial does not fit
    hours_of: Phases | None  # of training steps; None without a speed
    warnings: list[str]
    budget: str = ""  # what each unit of a budget that is not in trials alone buys
    workers: int = 1  # of a trial

    @property
    def hours(self) -> float | None:
        """Of the steps of both phases; what is measured at rungs comes on top."""
        return None if self.hours_of is None else sum(self.hours_of)

    def describe(self) -> dict[str, str]:
        """What `maskstudy check` prints."""
        arms = {"control": self.control, "cheapest": self.cheapest, "dearest": self.dearest}
        about = "about " if self.budget else ""
        lines = {
            **({"budget": self.budget} if self.budget else {}),
            "trials": f"{about}{self.trials} and {self.confirmations} to confirm",
            "searched arms": f"{self.searched_arms}"
            + (f" of a grid of {self.grid_arms}" if self.grid_arms is not None else "")
            + ", beside the control",
            **({"population": self._population_in_words()} if self.children else {}),
            **{f"{name} arm": _one_line(cost) for name, cost in arms.items()},
            "operations": f"{self.flops:.2e} FLOP",
            "trials at once": str(self.concurrent),
            "hours of steps": _hours_in_words(self.hours_of),
            **self._device_hours(),
        }
        return lines | {f"warning {n}": text for n, text in enumerate(self.warnings, 1)}

    def _device_hours(self) -> dict[str, str]:
        """Of all workers together, where there are several."""
        at_once = min(self.concurrent, self.trials) * self.workers
        if self.hours is None or at_once < 2:
            return {}
        return {"device-hours of steps": f"{self.hours * at_once:.2f}, on {at_once} at once"}

    def _population_in_words(self) -> str:
        each = self.searched_arms
        return (
            f"{each} trials' worth of training; the ledger will have {each + self.children}, as "
            f"{self.children} go on where a better one stands and take the place of a worse one"
        )


def plan(
    spec: StudySpec,
    data: DataSize | Dataset,
    *,
    cpus: float | None = None,
    gpus: float | None = None,
    measure: Callable[[TrialConfig], Speeds] | None = None,
) -> Plan:
    """What a study will take on so many CPUs and GPUs (by default, this machine's).

    `measure` tells how fast a worker trains an arm. It is asked about the control, the cheapest and
    the dearest one; what lies between them is interpolated by the operations of a step.
    """
    data = data if isinstance(data, DataSize) else data_size(data)
    cpus = float(os.cpu_count() or 1) if cpus is None else cpus
    gpus = float(torch.cuda.device_count()) if gpus is None else gpus
    num_controls = (1 + (len(spec.controls) if data.classes else 0)) * spec.seeds
    grid_arms = _count_grid(spec) if spec.sampler.name == "grid" and spec.search else None
    control = arm_cost(spec.trial, data, spec.resources)
    arms = _some_arms(spec) or [spec.trial]
    costs = [arm_cost(config, data, spec.resources) for config in arms]
    cheapest = min(costs, key=lambda one: one.flops)
    dearest = max(costs, key=lambda one: one.flops)
    shared = num_pretrainings(spec)

    def of_study(cost_of: Callable[[ArmCost], Phases], others: int) -> Phases:
        """The sum over the controls and so many others of what one costs in each phase."""
        of_control, of_others = cost_of(control), [cost_of(one) for one in costs]
        segmenting = of_control.segment * num_controls
        segmenting += fmean(one.segment for one in of_others) * others
        if shared is not None:
            return Phases(of_control.pretrain * shared, segmenting)
        has_random = bool(data.classes) and "random-init" in spec.controls
        verdict = (spec.confirm and spec.confirm.verdict) or 0
        pretraining = of_control.pretrain * (num_controls - spec.seeds * has_random)
        pretraining += fmean(one.pretrain for one in of_others) * (others - verdict * has_random)
        return Phases(pretraining, segmenting)

    concurrent = _concurrent(spec, cpus, gpus)
    known: list[tuple[ArmCost, Speeds]] = []
    if measure is not None and concurrent:
        by_arm = {control.arm: spec.trial} | {
            cost.arm: config for cost, config in zip(costs, arms, strict=True)
        }
        known = [(one, measure(by_arm[one.arm])) for one in (control, cheapest, dearest)]

    def of_operations(one: ArmCost) -> Phases:
        return Phases(one.pretrain_flops, one.segment_flops)

    def amounts(arms: int) -> Amounts:
        """What a study of so many searched arms takes, its confirmations included."""
        others = arms * spec.seeds + num_fresh(spec, arms, is_labelled=bool(data.classes))
        hours = sum(of_study(partial(_seconds, known), others)) / HOUR if known else 0.0
        at_once = spec.resources.workers * max(1, min(concurrent, num_controls + others))
        return Amounts(hours, hours / at_once, sum(of_study(of_operations, others)))

    bought = _bought(spec, num_controls, amounts, is_timed=bool(known))
    room = min(bought.values(), default=0) if spec.search else 0
    searched_trials = room if grid_arms is None else min(room, grid_arms * spec.seeds)
    num_searched = math.ceil(searched_trials / spec.seeds)
    confirmations = num_fresh(spec, num_searched, is_labelled=bool(data.classes))
    others = searched_trials + confirmations
    hours: Phases | None = None
    if known:
        at_once = min(concurrent, num_controls + searched_trials) * spec.resources.workers
        seconds = of_study(partial(_seconds, known), others)
        hours = Phases(*(each / at_once / HOUR for each in seconds))
    return Plan(
        study=spec.study,
        searched_arms=num_searched,
        trials=num_controls + searched_trials,
        confirmations=confirmations,
        grid_arms=grid_arms,
        children=num_children(spec),
        control=control,
        cheapest=cheapest,
        dearest=dearest,
        flops=sum(of_study(of_operations, others)),
        concurrent=concurrent,
        hours_of=hours,
        warnings=_warnings(spec, grid_arms, room, num_searched, concurrent, cpus, gpus),
        budget=_bought_in_words(spec, num_controls, bought) if spec.budget.is_measured else "",
        workers=spec.resources.workers,
    )


def _bought(
    spec: StudySpec,
    num_controls: int,
    amounts: Callable[[int], Amounts],
    *,
    is_timed: bool,
) -> dict[str, int]:
    """Unit of the budget -> searched trials that it buys; hours are left out without a speed."""
    found = {}
    for unit, limit in spec.budget.given.items():
        if unit == "trials":
            found[unit] = max(0, round(limit) - num_controls)
        elif unit == "flops" or is_timed:
            found[unit] = spec.seeds * _most(limit, amounts, unit)
    return found


def _most(limit: float, amounts: Callable[[int], Amounts], unit: str) -> int:
    """The most arms that take no more than that of a unit."""

    def amount(arms: int) -> float:
        return float(getattr(amounts(arms), unit))

    most = 1
    while amount(most) <= limit and most < MOST_COUNTED:
        most *= 2
    return max(0, bisect_right(range(most), limit, key=amount) - 1)


def _bought_in_words(spec: StudySpec, num_controls: int, bought: Mapping[str, int]) -> str:
    """What each unit of the budget buys, and which one ends the study."""
    least, parts = min(bought.values(), default=0), []
    for unit, limit in spec.budget.given.items():
        amount = f"{limit:.3g}" if unit == "flops" else f"{limit:.10g}"
        text = f"{amount} {UNITS[unit]}"
        if unit not in bought:
            text += ": not known without a speed"
        elif unit != "trials":
            text += f": {num_controls + bought[unit]} trials"
        binds = len(spec.budget.given) > 1 and bought.get(unit) == least
        parts.append(text + (" (binds)" if binds else ""))
    return "; ".join(parts)


def arm_cost(config: TrialConfig, data: DataSize, resources: Resources) -> ArmCost:
    """One trial of an arm on these data."""
    parts = resources.workers * resources.micro_batches
    tokens = math.prod(grid_of(data.size, config.patch_edges(len(data.size))))
    num_parameters = count_parameters(config, data.size, data.channels)
    activations = cost.activation_bytes(
        config, data.size, data.channels, recomputes=resources.activation_checkpointing
    )
    bytes_per_parameter = BYTES_PER_PARAMETER + (TEACHER_BYTES if has_teacher(config) else 0)
    return ArmCost(
        arm=arm_id(config),
        patch=config.model.patch,
        tokens=tokens,
        visible_tokens=_visible_share(config, data.size) * tokens,
        parameters=num_parameters,
        **work_of(config, data)._asdict(),
        memory_bytes=activations // parts + bytes_per_parameter * num_parameters,
    )


def count_parameters(config: TrialConfig, size: tuple[int, ...], channels: int) -> int:
    """Weights of the masked autoencoder and of what its strategy trains beside it."""
    return _count_parameters(config.model_dump_json(exclude={"segment"}), tuple(size), channels)


@lru_cache(maxsize=256)
def _count_parameters(config_json: str, size: tuple[int, ...], channels: int) -> int:
    with torch.device("meta"):
        model = MAE(TrialConfig.model_validate_json(config_json), size, channels)
    return sum(parameter.numel() for parameter in model.parameters())


def _seconds(known: Sequence[tuple[ArmCost, Speeds]], cost: ArmCost) -> Phases:
    """A worker's of an arm's steps, by how fast it is at those of the known ones."""

    def of_phase(phase: str) -> float:
        def per_step(one: ArmCost) -> float:
            return float(getattr(one, f"{phase}_flops") / max(1, getattr(one, f"{phase}_steps")))

        speeds = {per_step(one): getattr(speed, phase) for one, speed in known}
        flops = getattr(cost, f"{phase}_flops")
        points = sorted((step, speed) for step, speed in speeds.items() if speed is not None)
        if not flops or not points:
            return 0.0
        steps, rates = np.log(points).T
        return float(flops / np.exp(np.interp(math.log(per_step(cost)), steps, rates)))

    return Phases(of_phase("pretrain"), of_phase("segment"))


def _hours_in_words(hours: Phases | None) -> str:
    if hours is None:
        return "not measured"
    return f"{sum(hours):.2f} (pretraining {hours.pretrain:.2f}, segmentation {hours.segment:.2f})"


def _one_line(cost: ArmCost) -> str:
    return (
        f"patch {in_words(cost.patch)}: {cost.tokens} tokens, {cost.visible_tokens:.0f} visible; "
        f"{cost.parameters / 1e6:.1f} M parameters; {cost.pretrain_steps:,} steps of pretraining, "
        f"{cost.segment_steps:,} of segmentation; {cost.flops:.2e} FLOP; "
        f"about {cost.memory_bytes / 2**30:.2f} GiB per worker"
    )


def _visible_share(config: TrialConfig, size: tuple[int, ...]) -> float:
    units = math.prod(grid_of(size, config.unit_edges(len(size))))
    ratios = [value_at(config.masking.ratio, *point) for point in MIDPOINTS]
    return 1 - fmean(hidden_units(ratio, units) for ratio in ratios) / units


def _some_arms(spec: StudySpec) -> list[TrialConfig]:
    """Arms all over the space: every choice, ranges at both ends, thinned out evenly."""
    if not spec.search:
        return []
    points = list(islice(space.combinations(spec.search, space.ends), MOST_WALKED))
    stride = math.ceil(len(points) / MOST_SAMPLED)
    return [space.resolve(spec, point.overrides) for point in points[::stride]]


def _count_grid(spec: StudySpec) -> int:
    """Arms of the grid that are not the control's."""
    points = space.combinations(
        spec.search, lambda parameter: space.grid_values(parameter.item) or []
    )
    is_control_within = space.params_of(spec, spec.trial) is not None
    return _length(islice(points, MOST_COUNTED)) - int(is_control_within)


def _length(values: Iterable[Any]) -> int:
    return sum(1 for _ in values)


def _concurrent(spec: StudySpec, cpus: float, gpus: float) -> int:
    here = [Room("here", cpus, gpus)]
    fit = num_groups(here, _group(spec.resources, here))
    return min(fit, spec.resources.concurrent or fit)


def _group(each: Resources, rooms: list[Room]) -> WorkerGroup:
    return worker_group(each.workers, each.cpus_per_worker, each.gpus_per_worker, rooms)


def _warnings(
    spec: StudySpec,
    grid_arms: int | None,
    room: int,
    num_searched: int,
    concurrent: int,
    cpus: float,
    gpus: float,
) -> list[str]:
    warnings = []
    if concurrent == 0:
        group = _group(spec.resources, [Room("here", cpus, gpus)])
        warnings.append(
            f"resources: a trial takes {group.workers * group.cpus:g} CPUs and "
            f"{group.workers * group.gpus:g} GPUs, here are {cpus:g} and {gpus:g}: nothing can "
            f"start"
        )
    binding = "budget.trials" if spec.budget.given.keys() == {"trials"} else "budget"
    if grid_arms is not None and grid_arms * spec.seeds > room:
        warnings.append(
            f"{binding}: the grid has {grid_arms} arms besides the controls, "
            f"{grid_arms * spec.seeds} trials, but {room} are left for them: it stays incomplete"
        )
    elif room % spec.seeds and grid_arms is None:
        warnings.append(
            f"budget.trials: the last arm gets {room % spec.seeds} of {spec.seeds} seeds"
        )
    if spec.search and spec.budget.is_measured and num_searched == 0:
        warnings.append(
            "budget: the controls and confirmations take all of it, so that nothing is searched"
        )
    startup = spec.sampler.options().get("startup", 0)
    if spec.search and 0 < num_searched <= startup:
        warnings.append(
            f"sampler: {spec.sampler.name} draws its first {startup} arms by chance, and there are "
            f"{num_searched}; a grid may tell more"
        )
    if has_population(spec) and is_uri(spec.storage):
        twice = num_replaced(spec) * sum(spec.rungs[:-1])
        warnings.append(
            f"storage: from a store of objects no checkpoint is handed on, so members that take "
            f"another's place train from their start: {twice:.3g} trials' worth of pretraining more"
        )
    chosen_by = [("objectives", objective.metric) for objective in spec.objectives]
    chosen_by += [
        (setting, name)
        for setting, chosen in (("stopping", spec.stopping), ("sampler", spec.sampler))
        for key, name in chosen.options().items()
        if key == "metric" and name is not None
    ]
    for setting, name in chosen_by:
        if not metric_of(name).is_comparable:
            warnings.append(
                f"{setting}: {name} depends on the trial's own ratio and patch: arms that differ "
                f"in them cannot be compared by it"
            )
    return warnings
