"""How many operations per second this machine trains with, for forecasts; and how many it could.

The smaller a step, the fewer it does per second, and segmentation does fewer than pretraining: so
forecasts measure steps of the study's own arms, in both phases.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainables import distributed, pretrain, segment
from trainables.allocator import keep_freed_memory
from trainables.config import TrialConfig
from trainables.context import Context
from trainables.data import Dataset
from trainables.phase import update

SECONDS, FEWEST_STEPS = 0.2, 2  # of measuring one phase of one arm
IMAGES = (64, 16, 4, 1)  # in a measured step; fewer where these do not fit
PEAK_SECONDS, PEAK_ROUNDS = 0.2, 10  # of multiplying matrices, at the least


class Speeds(NamedTuple):
    """Operations per second of one worker in whole training steps of an arm."""

    pretrain: float | None  # None: the arm has no such phase
    segment: float | None


def measurer(
    dataset: Dataset, device: torch.device, *, threads: int
) -> Callable[[TrialConfig], Speeds]:
    """Measures arms on the machine, each once however long it is to train."""
    known: dict[str, Speeds] = {}

    def measure(config: TrialConfig) -> Speeds:
        key = _short(config, IMAGES[0]).model_dump_json()
        for most in IMAGES if key not in known else ():
            with threads_of(threads), contextlib.suppress(torch.OutOfMemoryError):
                known[key] = _measured(_short(config, most), dataset, device)
                break
        return known.get(key, Speeds(None, None))

    return measure


def _short(config: TrialConfig, most: int) -> TrialConfig:
    """The arm with no more steps than are looked at, and no more images in one."""
    settings = config.model_dump(mode="json")
    settings["pretrain"] |= {"epochs": 2, "compile": False}
    settings["segment"] |= {"epochs": 2, "decoder_first": 0.0}
    for phase in ("pretrain", "segment"):
        settings[phase]["batch"] = min(settings[phase]["batch"], most)
    return TrialConfig.model_validate(settings)


def _measured(config: TrialConfig, dataset: Dataset, device: torch.device) -> Speeds:
    if device.type == "cpu":
        keep_freed_memory()
    pretraining = config.segment.encoder != "random-init"
    return Speeds(
        _flops_per_second(*_pretraining(config, dataset, device), device) if pretraining else None,
        _flops_per_second(*_segmenting(config, dataset, device), device)
        if dataset.is_labelled
        else None,
    )


def _flops_per_second(step: Callable[[], Tensor], flops: float, device: torch.device) -> float:
    once = seconds_of(step, 1, device)  # it warms up, so those that count are no more than enough
    repeats = max(FEWEST_STEPS, round(SECONDS / once))
    return flops * repeats / seconds_of(step, repeats, device)


def _pretraining(
    config: TrialConfig, dataset: Dataset, device: torch.device
) -> tuple[Callable[[], Tensor], float]:
    """(a step half-way in every schedule, its operations)."""
    batch, size, channels = config.pretrain.batch, dataset.size, dataset.channels
    plan = pretrain.make_plan(config, size, channels, batch, (1.0,), seed=0)
    context = idle_context(device)
    learner = pretrain.make_learner(config, size, channels, 0, context, is_padded=dataset.is_padded)
    images = torch.randn(batch, channels, *size, device=device)
    samples_B = torch.arange(batch, device=device)

    def step() -> Tensor:
        return pretrain.train_step(learner, images, config, 0, plan, 1, samples_B)

    return step, plan.flops[2] - plan.flops[1]


def _segmenting(
    config: TrialConfig, dataset: Dataset, device: torch.device
) -> tuple[Callable[[], Tensor], float]:
    """(a step, its operations)."""
    batch, size = config.segment.batch, dataset.size
    context = idle_context(device)
    plan = segment.make_plan(config, dataset, context, batch)
    learner = segment.make_learner(config, 0, dataset, None, context, plan.steps)
    images = torch.randn(batch, dataset.channels, *size, device=device)
    labels = torch.randint(len(dataset.classes), (batch, *size), device=device)
    samples_B = torch.arange(batch, device=device)

    def step() -> Tensor:
        loss = segment.batch_loss(learner, images, labels, config, 0, context, 0, samples_B)
        return update(learner, loss, plan, 0)

    return step, plan.flops[1]


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
