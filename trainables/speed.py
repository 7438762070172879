"""How fast this machine trains: a few steps of a trial, timed.

For forecasts, the operations per second; for the price of masking, every strategy's whole step.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainables import distributed
from trainables.config import TrialConfig
from trainables.context import Context
from trainables.cost import mae_flops
from trainables.data import Dataset
from trainables.data.batches import to_device
from trainables.mae import build_mae
from trainables.masking import MaskRequest, hidden_units
from trainables.pretrain import choose_patches, make_learner, make_plan, train_step

SECONDS = 2.0  # of measuring
PEAK_SECONDS, PEAK_ROUNDS = 0.2, 10  # of multiplying matrices, at the least
REFERENCE = "random"  # the strategy that others are compared with
MOST_ROUNDS, FEWEST_ROUNDS = 10, 3
WARM_UP = 3  # steps of each strategy before the clock starts


@dataclass(frozen=True)
class StepTime:
    """One strategy's step: medians over the rounds, and the ratio's spread over them."""

    strategy: str
    milliseconds: float
    ratio: float  # to the reference of the same round
    lowest: float
    highest: float
    images_per_second: float


def flops_per_second(
    config: TrialConfig, dataset: Dataset, device: torch.device, *, threads: int
) -> float:
    """Training operations per second of one worker, at half the patches hidden."""
    with _threads(threads):
        return _measure(config, dataset, device)


def peak_flops(device: torch.device) -> float:
    """Operations per second of the fastest of many plain matrix products: what a worker could do.

    In the faster of bfloat16 and float32, with as many threads as torch has now. Of random numbers,
    as a GPU does those of equal ones with less power, and faster.
    """
    kind = torch.bfloat16 if distributed.is_faster_in_bf16(device) else torch.float32
    # so few at a time that a busy CPU's scheduler leaves some alone
    edge, at_once = (4096, 5) if device.type == "cuda" else (512, 1)
    left, right = torch.randn(2, edge, edge, device=device).to(kind)

    def product() -> Tensor:
        return torch.mm(left, right)

    _seconds(product, at_once, device)  # libraries load, which may take longer than all the rest
    began, spent = time.perf_counter(), [_seconds(product, at_once, device)]
    while len(spent) < PEAK_ROUNDS or time.perf_counter() - began < PEAK_SECONDS:
        spent.append(_seconds(product, at_once, device))
    return at_once * 2 * edge**3 / min(spent)


def step_times(
    config: TrialConfig,
    strategies: Sequence[str],
    dataset: Dataset,
    device: torch.device,
    *,
    workers: int = 1,
    threads: int,
    seconds: float = SECONDS,
) -> list[StepTime]:
    """One worker's whole training step under each strategy, the reference first.

    Whole: augmentation, masking (teacher, clusters), forward, backward, optimiser, the teacher's
    average; not the gradients' way between workers. The trial's own strategy keeps its options,
    others have their defaults. All take turns in one process, so that what slows the machine slows
    neighbours alike; the reference is measured for `seconds`, the others for as many steps.
    """
    names = list(dict.fromkeys([REFERENCE, *strategies]))
    batch = config.pretrain.batch // workers
    resident = to_device(dataset, dataset.rows("pretrain"), device, labels=False)
    images = resident.batch(torch.arange(batch) % len(resident))[0]
    with _threads(threads):
        steps = {name: _step(_under(config, name), images, dataset.is_padded) for name in names}
        for step in steps.values():
            _seconds(step, WARM_UP, device)
        once = _seconds(steps[REFERENCE], 1, device)
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / once)))
        repeats = max(1, round(seconds / rounds / once))
        spent: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            first = number % len(names)  # nobody always comes first
            for name in names[first:] + names[:first]:
                spent[name].append(_seconds(steps[name], repeats, device) / repeats)
    return summary(spent, batch)


def summary(spent: dict[str, list[float]], batch: int) -> list[StepTime]:
    """Seconds of a step in each round -> what is told of each strategy."""
    found = []
    for name, seconds in spent.items():
        ratios = [own / other for own, other in zip(seconds, spent[REFERENCE], strict=True)]
        typical = statistics.median(seconds)
        found.append(
            StepTime(
                strategy=name,
                milliseconds=1000 * typical,
                ratio=statistics.median(ratios),
                lowest=min(ratios),
                highest=max(ratios),
                images_per_second=batch / typical,
            )
        )
    return found


def _under(config: TrialConfig, strategy: str) -> TrialConfig:
    """The trial with that strategy, planned as two steps."""
    settings = config.model_dump(mode="json")
    if strategy != config.masking.strategy.name:
        settings["masking"]["strategy"] = {"name": strategy}
    settings["pretrain"]["epochs"] = 2
    return TrialConfig.model_validate(settings)


def _step(config: TrialConfig, images: Tensor, is_padded: bool) -> Callable[[], Tensor]:
    """The second of two steps, half-way in every schedule, to be done over and over."""
    batch, channels, *size = images.shape
    context = Context(
        device=images.device,
        folder=Path(),
        attempt="bench",
        rungs=(1.0,),
        report=lambda _: False,
        heartbeat=lambda *_: None,
    )
    plan = make_plan(config, size, channels, config.pretrain.batch, context.rungs, seed=0)
    learner = make_learner(config, size, channels, 0, context, is_padded=is_padded)
    samples_B = torch.arange(batch, device=images.device)
    return partial(train_step, learner, images, config, 0, plan, 1, samples_B)


def _seconds(step: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    """Until the device has done it."""
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(config: TrialConfig, dataset: Dataset, device: torch.device) -> float:
    config = _under(config, REFERENCE)
    is_padded, channels = dataset.is_padded, dataset.channels
    model = build_mae(config, dataset.size, channels, seed=0, is_padded=is_padded).to(device)
    units = math.prod(model.unit_grid)
    batch = min(config.pretrain.batch, 64)
    images = torch.randn(batch, dataset.channels, *dataset.size, device=device)
    request = MaskRequest(
        grid=model.unit_grid,
        hidden=hidden_units(0.5, units),
        progress=0.0,
        seed=0,
        step=0,
        samples_B=torch.arange(batch, device=device),
        patches_per_unit=model.patches_per_unit,
    )
    masks = choose_patches(config, request)

    def step() -> None:
        with distributed.autocast(config.pretrain.precision, device):
            loss = model(images, *masks)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        step()
        steps += 1
    seconds = time.perf_counter() - began
    cost = mae_flops(config, dataset.size, dataset.channels, request.hidden_patches)
    return steps * batch * cost["step"] / seconds
