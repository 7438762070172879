"""How many operations per second this machine trains with, for forecasts; and how many it could.

The smaller a step, the fewer it does per second, and segmentation does fewer than pretraining: so
forecasts measure steps of the study's own arms, in both phases.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainables import distributed, pretrain, segment
from trainables.allocator import keep_freed_memory
from trainables.config import LENGTHS, TrialConfig, in_epochs
from trainables.context import Context
from trainables.data import Dataset
from trainables.phase import update

SECONDS = 0.2  # of measuring one phase of one arm, one step at the least
IMAGES = (64, 16, 4, 1)  # in a measured step; fewer where these do not fit
PEAK_SECONDS, PEAK_ROUNDS = 0.2, 10  # of multiplying matrices, at the least


class Speeds(NamedTuple):
    """Operations per second of one worker in whole training steps of an arm."""

    pretrain: float | None  # None: the arm has no such phase
    segment: float | None


def measurer(
    dataset: Dataset, device: torch.device, *, threads: int, recomputes: bool = False
) -> Callable[[TrialConfig], Speeds]:
    """Measures arms on the machine, each once however long it is to train.

    `recomputes`: blocks keep their inputs alone.
    """
    known: dict[str, Speeds] = {}
    context = replace(idle_context(device), recomputes=recomputes)

    def measure(config: TrialConfig) -> Speeds:
        length = {"pretrain": set(LENGTHS), "segment": set(LENGTHS)}
        key = config.model_dump_json(exclude=length)
        for most in IMAGES if key not in known else ():
            with threads_of(threads), contextlib.suppress(torch.OutOfMemoryError):
                known[key] = _measured(_with_batches(config, most), dataset, context)
                break
        return known.get(key, Speeds(None, None))

    return measure


def _with_batches(config: TrialConfig, most: int) -> TrialConfig:
    """The arm, with at most so many images in a step."""
    settings = config.model_dump(mode="json")
    settings["pretrain"]["compile"] = False  # which takes minutes
    for phase in ("pretrain", "segment"):
        settings[phase]["batch"] = min(settings[phase]["batch"], most)
    return TrialConfig.model_validate(settings)


def _measured(config: TrialConfig, dataset: Dataset, context: Context) -> Speeds:
    if context.device.type == "cpu":
        keep_freed_memory()
    pretraining = segmenting = None
    if config.segment.encoder != "random-init":
        pretraining = _flops_per_second(*_pretrain_step(config, dataset, context), context.device)
    if dataset.is_labelled:
        segmenting = _flops_per_second(*_segment_step(config, dataset, context), context.device)
    return Speeds(pretraining, segmenting)


def _flops_per_second(step: Callable[[], Tensor], flops: float, device: torch.device) -> float:
    once = seconds_of(step, 1, device)  # the first one, which may take longer
    repeats = max(1, round(SECONDS / once))
    return flops * repeats / seconds_of(step, repeats, device)


def _pretrain_step(
    config: TrialConfig, dataset: Dataset, context: Context
) -> tuple[Callable[[], Tensor], float]:
    """(the second of two steps, half-way in every schedule; its operations)."""
    settings = in_epochs(config.pretrain, 2)
    config = config.model_copy(update={"pretrain": settings})
    batch, size, channels, device = settings.batch, dataset.size, dataset.channels, context.device
    plan = pretrain.make_plan(config, size, channels, batch, (1.0,), seed=0)
    learner = pretrain.make_learner(config, size, channels, 0, context, is_padded=dataset.is_padded)
    images = torch.randn(batch, channels, *size, device=device)
    samples_B = torch.arange(batch, device=device)

    def step() -> Tensor:
        return pretrain.train_step(learner, images, config, 0, plan, 1, samples_B)

    return step, plan.flops[2] - plan.flops[1]


def _segment_step(
    config: TrialConfig, dataset: Dataset, context: Context
) -> tuple[Callable[[], Tensor], float]:
    """(the last step, in which all that learns does; its operations)."""
    batch, size, device = config.segment.batch, dataset.size, context.device
    plan = segment.make_plan(config, dataset, context, batch)
    learner = segment.make_learner(config, 0, dataset, None, context, plan.steps)
    images = torch.randn(batch, dataset.channels, *size, device=device)
    labels = torch.randint(len(dataset.classes), (batch, *size), device=device)
    samples_B = torch.arange(batch, device=device)
    last = plan.steps - 1

    def step() -> Tensor:
        loss = segment.batch_loss(learner, images, labels, config, 0, context, last, samples_B)
        return update(learner, loss, plan, last)

    return step, plan.flops[-1] - plan.flops[-2]


def idle_context(device: torch.device) -> Context:
    """Of steps that belong to no trial."""
    return Context(
        device=device,
        folder=Path(),
        attempt="speed",
        rungs=(1.0,),
        report=lambda _: False,
        heartbeat=lambda *_: None,
    )


def peak_flops(device: torch.device, precision: str = "fast") -> float:
    """Operations per second of the fastest of many plain matrix products: what a worker could do.

    In a trial's precision, with as many threads as torch has now. Of random numbers, as a GPU does
    those of equal ones with less power, and faster.
    """
    is_half = distributed.is_half(precision, device)
    # so few at a time that a busy CPU's scheduler leaves some alone
    edge, at_once = (4096, 5) if device.type == "cuda" else (512, 1)
    left, right = torch.randn(2, edge, edge, device=device).to(
        torch.bfloat16 if is_half else torch.float32
    )

    def product() -> Tensor:
        return torch.mm(left, right)

    seconds_of(product, at_once, device)  # libraries load, which may take longer than all the rest
    began, spent = time.perf_counter(), [seconds_of(product, at_once, device)]
    while len(spent) < PEAK_ROUNDS or time.perf_counter() - began < PEAK_SECONDS:
        spent.append(seconds_of(product, at_once, device))
    return at_once * 2 * edge**3 / min(spent)


def seconds_of(step: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Until the device has done it so many times."""
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextlib.contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Torch with that many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
