"""What a training step costs here, under each masking strategy and in other libraries.

All that are compared take turns in one process, so that what slows the machine slows neighbours
alike: a ratio of one round is trustworthy where milliseconds are not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainables.allocator import keep_freed_memory
from trainables.config import TrialConfig, in_epochs
from trainables.cost import mae_flops
from trainables.data import Dataset
from trainables.data.batches import Resident, to_device
from trainables.edges import Edges
from trainables.optimizers import learning_rate
from trainables.peers import RATE, Work, peer_step
from trainables.pretrain import make_learner, make_plan, train_step
from trainables.speed import idle_context, peak_flops, seconds_of, threads_of

SECONDS = 2.0  # of measuring
REFERENCE = "random"  # the strategy that others are compared with
DRAWN = "random, images drawn"  # the same, with the images drawn anew at each step
MOST_ROUNDS, FEWEST_ROUNDS = 10, 3
WARM_UP = 3  # steps of each before the clock starts
EQUAL_STEPS = 40  # after which the losses of peers are compared


@dataclass(frozen=True)
class StepTime:
    """One contender's step: medians over the rounds, and the ratio's spread over them."""

    name: str
    milliseconds: float
    ratio: float  # to the reference of the same round
    lowest: float
    highest: float
    images_per_second: float
    first_seconds: float  # of making the model, and its first step
    parameters: int
    utilization: float | None = None  # of the peak; None: its operations are not known
    loss: float | None = None  # after `EQUAL_STEPS`; of strategies it is not comparable
    step_bytes: int | None = None  # of a GPU, beside weights and moments


@dataclass(frozen=True)
class Cell:
    """What was timed together."""

    size: str
    patch: Edges
    ratio: float  # of the images hidden
    precision: str
    batch: int
    image: tuple[int, ...]
    hidden: int  # patches of each image
    peak_flops: float
    threads: int
    failed: dict[str, str]  # peer -> why it cannot take such a step
    steps: tuple[StepTime, ...]  # the reference first


@dataclass
class Contender:
    """What takes part: its step is made when its turn comes first."""

    make: Callable[[], tuple[Callable[[], Tensor], int]]  # (step, trained parameters)
    flops: float | None  # of a step
    step: Callable[[], Tensor] = lambda: torch.zeros(())
    parameters: int = 0
    first_seconds: float = 0.0


def bench_cell(
    config: TrialConfig,
    strategies: Sequence[str],
    peers: Sequence[str],
    dataset: Dataset,
    device: torch.device,
    *,
    workers: int = 1,
    threads: int,
    seconds: float = SECONDS,
) -> Cell:
    """One worker's whole training step under each strategy and in each peer, the reference first.

    Whole: augmentation, masking (teacher, clusters), forward, backward, optimiser, the teacher's
    average; not the gradients' way between workers. The trial's own strategy keeps its options,
    others have their defaults. The reference is measured for `seconds`, the others for as many
    steps, half-way in every schedule. Peers are given half a minute more, to compare their losses.
    """
    batch = config.pretrain.batch // workers
    rows = dataset.rows("pretrain")
    resident = to_device(dataset, rows, device, labels=False)
    images = resident.batch(torch.arange(batch, device=resident.rows.device) % len(resident))[0]
    hidden = _hidden(config, dataset)
    work = Work(config, images, hidden)
    flops = (
        batch * mae_flops(_under(config, REFERENCE), dataset.size, dataset.channels, hidden)["step"]
    )
    make = partial(_make, images=images, is_padded=dataset.is_padded)
    drawn = partial(_drawn, resident, batch)
    contenders = {
        REFERENCE: Contender(partial(make, _under(config, REFERENCE)), flops),
        DRAWN: Contender(partial(make, _under(config, REFERENCE), drawn=drawn), flops),
    }
    for name in dict.fromkeys(strategies):
        contenders.setdefault(name, Contender(partial(make, _under(config, name)), None))
    for name in peers:
        contenders[name] = Contender(partial(peer_step, name, work), None)

    if device.type == "cpu":
        keep_freed_memory()
    with threads_of(threads):
        peak = peak_flops(device, config.pretrain.precision)
        failed: dict[str, str] = {}
        for name, each in list(contenders.items()):
            began = time.perf_counter()
            each.step, each.parameters = each.make()
            try:
                each.first_seconds = time.perf_counter() - began + seconds_of(each.step, 1, device)
            except RuntimeError as error:
                if name not in peers:
                    raise
                failed[name] = str(error)
                del contenders[name]
        losses: dict[str, float] = {}
        for name in [REFERENCE, *(name for name in peers if name in contenders)] if peers else ():
            seconds_of(contenders[name].step, EQUAL_STEPS - 1, device)
            losses[name] = float(contenders[name].step())
        memory = {name: _step_bytes(each.step, device) for name, each in contenders.items()}
        spent = _take_turns({name: each.step for name, each in contenders.items()}, device, seconds)
    return Cell(
        size=config.model.size,
        patch=config.model.patch,
        ratio=hidden / work.patches,
        precision=config.pretrain.precision,
        batch=batch,
        image=dataset.size,
        hidden=hidden,
        peak_flops=peak,
        threads=threads,
        failed=failed,
        steps=tuple(summary(spent, contenders, batch, peak, losses, memory)),
    )


def summary(
    spent: dict[str, list[float]],
    contenders: dict[str, Contender],
    batch: int,
    peak: float,
    losses: dict[str, float],
    memory: dict[str, int | None],
) -> list[StepTime]:
    """Seconds of a step in each round -> what is told of each contender."""
    found = []
    for name, seconds in spent.items():
        ratios = [own / other for own, other in zip(seconds, spent[REFERENCE], strict=True)]
        typical, each = statistics.median(seconds), contenders[name]
        found.append(
            StepTime(
                name=name,
                milliseconds=1000 * typical,
                ratio=statistics.median(ratios),
                lowest=min(ratios),
                highest=max(ratios),
                images_per_second=batch / typical,
                first_seconds=each.first_seconds,
                parameters=each.parameters,
                utilization=each.flops / typical / peak if each.flops else None,
                loss=losses.get(name),
                step_bytes=memory.get(name),
            )
        )
    return found


def _take_turns(
    steps: dict[str, Callable[[], Tensor]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of one step of each, round by round; nobody always comes first."""
    names = list(steps)
    for step in steps.values():
        seconds_of(step, WARM_UP, device)
    once = seconds_of(steps[REFERENCE], 1, device)
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / once)))
    repeats = max(1, round(seconds / rounds / once))
    spent: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            spent[name].append(seconds_of(steps[name], repeats, device) / repeats)
    return spent


def _hidden(config: TrialConfig, dataset: Dataset) -> int:
    """Patches that a step half-way hides of each image."""
    plan = make_plan(
        _under(config, REFERENCE), dataset.size, dataset.channels, config.pretrain.batch, (1.0,), 0
    )
    return plan.hidden_units[1] * math.prod(config.patches_per_unit(len(dataset.size)))


def _under(config: TrialConfig, strategy: str) -> TrialConfig:
    """The trial with that strategy, planned as two steps."""
    config = config.model_copy(update={"pretrain": in_epochs(config.pretrain, 2)})
    settings = config.model_dump(mode="json")
    if strategy != config.masking.strategy.name:
        settings["masking"]["strategy"] = {"name": strategy}
    return TrialConfig.model_validate(settings)


def _make(
    config: TrialConfig,
    images: Tensor,
    *,
    is_padded: bool,
    drawn: Callable[[int], Tensor] | None = None,
) -> tuple[Callable[[], Tensor], int]:
    """(the second of two steps, half-way in every schedule; trained parameters).

    `drawn`: images for each step, instead of the same.
    """
    batch, channels, *size = images.shape
    context = idle_context(images.device)
    plan = make_plan(config, size, channels, config.pretrain.batch, context.rungs, seed=0)
    learner = make_learner(config, size, channels, 0, context, is_padded=is_padded)
    samples_B = torch.arange(batch, device=images.device)
    shape = learning_rate(plan.batch + plan.batch // 2, 2 * plan.batch, plan.warmup_images)
    for group in learner.optimizer.param_groups:
        group["initial_lr"] = RATE / shape  # the peers', so that losses can be compared
    done = 0

    def step() -> Tensor:
        nonlocal done
        done += 1
        seen = images if drawn is None else drawn(done)
        return train_step(learner, seen, config, 0, plan, 1, samples_B)

    trained = [each.numel() for each in learner.model.parameters() if each.requires_grad]
    return step, sum(trained)


def _drawn(resident: Resident, batch: int, number: int) -> Tensor:
    """The images of a step, others each time."""
    places_B = torch.arange(batch, device=resident.rows.device)
    return resident.draw((places_B + number * batch) % len(resident), 0, number, places_B)[0]


def _step_bytes(step: Callable[[], Tensor], device: torch.device) -> int | None:
    """GPU memory of activations and gradients; whatever lies there of others is left out."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before
