"""How many operations per second this machine trains with, for forecasts; and how many it could."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainables import distributed
from trainables.config import TrialConfig
from trainables.cost import mae_flops
from trainables.data import Dataset
from trainables.mae import build_mae
from trainables.masking import MaskRequest, hidden_units
from trainables.pretrain import choose_patches

SECONDS = 2.0  # of measuring
PEAK_SECONDS, PEAK_ROUNDS = 0.2, 10  # of multiplying matrices, at the least


def flops_per_second(
    config: TrialConfig, dataset: Dataset, device: torch.device, *, threads: int
) -> float:
    """Training operations per second of one worker, at half the patches hidden."""
    with threads_of(threads):
        return _measure(config, dataset, device)


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


def _measure(config: TrialConfig, dataset: Dataset, device: torch.device) -> float:
    settings = config.model_dump(mode="json")
    settings["masking"]["strategy"] = {"name": "random"}
    config = TrialConfig.model_validate(settings)
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
