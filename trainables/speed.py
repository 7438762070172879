"""How fast this machine trains: a few steps of a trial, timed, for forecasts."""

from __future__ import annotations

import time

import torch

from trainables.config import TrialConfig
from trainables.cost import mae_flops
from trainables.data import Dataset
from trainables.mae import build_mae
from trainables.masking import hidden_units, split_indices

SECONDS = 2.0  # of measuring


def flops_per_second(
    config: TrialConfig, dataset: Dataset, device: torch.device, *, threads: int
) -> float:
    """Training operations per second of one worker, at half the patches hidden."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measure(config, dataset, device)
    finally:
        torch.set_num_threads(before)


def _measure(config: TrialConfig, dataset: Dataset, device: torch.device) -> float:
    model = build_mae(config, dataset.size, dataset.channels, seed=0).to(device)
    num_patches = 1
    for edge in dataset.size:
        num_patches *= edge // config.model.patch
    hidden = hidden_units(0.5, num_patches)
    batch = min(config.pretrain.batch, 64)
    images = torch.randn(batch, dataset.channels, *dataset.size, device=device)
    is_hidden_BP = torch.arange(num_patches, device=device).expand(batch, -1) < hidden
    visible_BV, hidden_BX = split_indices(is_hidden_BP, hidden)

    def step() -> None:
        model(images, visible_BV, hidden_BX).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        step()
        steps += 1
    seconds = time.perf_counter() - began
    per_image: float = mae_flops(config, dataset.size, dataset.channels, hidden)["step"]
    return steps * batch * per_image / seconds
