"""Pretraining: the masked autoencoder learns to fill in what is hidden. A plain loop.

How it goes on after an interruption:
1. Weights, moments and counters come from the newest checkpoint; nothing else has a memory.
2. Order, masks and flips are functions of (seed, step, place in the batch), so they have no state.
3. Steps after the checkpoint are done again and give the same numbers (bit by bit on a CPU).
4. A checkpoint at a rung holds the rung's rows: they are reported again, and the answer obeyed.

B images of this worker's part of the batch · S pixels along every axis
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables import checkpoint, counter, distributed
from trainables import probe as probing
from trainables.augment import AUGMENTATIONS
from trainables.config import ProbeConfig, TrialConfig
from trainables.context import Context, Row
from trainables.cost import mae_flops, planned_flops
from trainables.data import Dataset, to_device
from trainables.errors import UserError
from trainables.export import export_encoder
from trainables.mae import build_mae
from trainables.masking import (
    MASKING,
    MaskRequest,
    plan_hidden,
    split_indices,
    unit_to_patch,
)
from trainables.metrics import rows as metric_rows
from trainables.optimizers import OPTIMIZERS, learning_rate, parameter_groups, set_learning_rate
from trainables.schedules import SCHEDULES
from trainables.timm_blocks import Block

Weights = dict[str, Tensor]

HEARTBEAT_SECONDS = 0.3


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step of a phase."""

    num_images: int
    batch: int  # images per step over all workers
    steps: int
    warmup_images: int
    flops: list[float]  # done after each number of steps; the first is 0
    rungs: dict[int, float]  # step -> share of the planned budget
    # of pretraining only
    unit_grid: tuple[int, ...] = ()
    hidden_units: list[int] = field(default_factory=list)  # at each step


@dataclass(frozen=True)
class Counters:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    loss_sum: float = 0.0  # since the rung before
    device_seconds: float = 0.0
    rung_step: int = 0
    rung_device_seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)  # of the rung before
    phase: str = "pretrain"


def pretrain(
    config: TrialConfig,
    seed: int,
    dataset: Dataset,
    probe: ProbeConfig,
    context: Context,
    resume: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> tuple[str, Weights]:
    """Train, or go on from a checkpoint; (outcome, the encoder's weights)."""
    device = context.device
    plan = make_plan(config, dataset.size, dataset.channels, num_pretrain(dataset), context.rungs)
    share = distributed.batch_slice(plan.batch, context, "pretrain.batch")
    samples_B = torch.arange(plan.batch, device=device)[share]
    images = to_device(dataset, dataset.rows("pretrain"), device, labels=False)
    judge = probing.Judge(config, dataset, probe, context)

    model = build_mae(config, dataset.size, dataset.channels, seed).to(device)
    settings = config.pretrain.optimizer
    optimizer = OPTIMIZERS[settings.name](
        parameter_groups(model, None), plan.batch, **settings.options()
    )
    counters = Counters()
    if resume is not None:
        checkpoint.unpack(model, optimizer, resume[0])
        counters = Counters(**resume[1])
        if counters.step == counters.rung_step and told_to_stop(counters.rows, context):
            return "stopped", model.encoder.state_dict()
    if config.pretrain.compile:
        compile_blocks(model)
    trained = distributed.data_parallel(model, context)

    distributed.reset_peak_memory(device)
    loss_sum = torch.zeros((), device=device)
    saved = started = beaten = time.perf_counter()
    first_step = beaten_step = counters.step
    for step, positions in batches(seed, plan, counters.step, images.rows.device):
        batch = images.batch(positions[share])[0]
        with distributed.autocast(config.pretrain.precision, device):
            loss = batch_loss(trained, batch, config, seed, plan, step, samples_B)

        loss.backward()  # type: ignore[no-untyped-call]
        seen = step * plan.batch + plan.batch // 2  # mid-batch, so no step has a rate of 0
        rate = learning_rate(seen, plan.steps * plan.batch, plan.warmup_images)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        loss_sum += loss.detach()
        done = step + 1
        now = time.perf_counter()
        is_due = step == first_step or now - beaten > HEARTBEAT_SECONDS
        if context.is_main and is_due:
            speed = (done - beaten_step) * plan.batch / (now - beaten)
            context.heartbeat("pretrain", done / plan.steps, speed)
            beaten, beaten_step = now, done

        is_rung = done in plan.rungs
        if not (is_rung or is_epoch_end(done, plan)):
            continue

        # The only places where the host waits for the device
        summed = distributed.sum_over_workers(loss_sum, context).item() / context.world_size
        loss_sum.zero_()
        now = time.perf_counter()
        counters = replace(
            counters,
            step=done,
            loss_sum=counters.loss_sum + summed,
            device_seconds=counters.device_seconds + now - started,
        )
        if not math.isfinite(counters.loss_sum):
            return "diverged", model.encoder.state_dict()

        stop = False
        if is_rung:
            values = progress_values(counters, plan, config, dataset, context) | judge.scores(model)
            if not all(map(math.isfinite, values.values())):
                return "diverged", model.encoder.state_dict()
            rows = metric_rows(
                values,
                phase="pretrain",
                step=done,
                epoch=done * plan.batch / plan.num_images,
                progress=plan.rungs[done],
                seconds=counters.device_seconds,
            )
            stop = told_to_stop(rows, context)
            counters = replace(
                counters,
                loss_sum=0.0,
                rung_step=done,
                rung_device_seconds=counters.device_seconds,
                rows=rows,
            )
        if context.is_main and (is_rung or now - saved > context.checkpoint_seconds):
            name = f"{context.attempt}-pretrain-{done:08d}"
            tensors = checkpoint.pack(model, optimizer)
            checkpoint.save(context.folder / "checkpoints", name, tensors, asdict(counters))
            saved = time.perf_counter()
        if stop:
            return "stopped", model.encoder.state_dict()
        started = time.perf_counter()

    if context.is_main:
        judge.draw(model, context.folder / "pictures" / "reconstruction.png")
        results = {row["metric"]: row["value"] for row in counters.rows}
        export_encoder(context.folder / "encoder", model.encoder, config, seed, dataset, results)
    return "complete", model.encoder.state_dict()


def num_pretrain(dataset: Dataset) -> int:
    """Images to train on; an empty split is the user's to mend."""
    for split in ("pretrain", "val"):
        if len(dataset.rows(split)) == 0:
            raise UserError(
                f"data: no image of {dataset.name} is in the {split} split; pretraining needs some "
                f"to learn from and some (val) to be judged on"
            )
    return len(dataset.rows("pretrain"))


def make_plan(
    config: TrialConfig,
    size: Sequence[int],
    channels: int,
    num_images: int,
    rungs: Sequence[float],
) -> Plan:
    """Turn epochs into steps, and the ratio's schedule into whole units at each step."""
    batch, ratio = config.pretrain.batch, config.masking.ratio
    steps = max(1, round(config.pretrain.epochs * num_images / batch))
    unit_grid = tuple(edge // config.unit for edge in size)
    schedule = partial(SCHEDULES[ratio.name], **ratio.options())
    hidden = plan_hidden(schedule, math.prod(unit_grid), steps)
    patches_per_unit = (config.unit // config.model.patch) ** len(unit_grid)
    per_image = {
        units: mae_flops(config, size, channels, units * patches_per_unit)["step"]
        for units in set(hidden)
    }
    warmup = config.pretrain.warmup_images
    return Plan(
        num_images=num_images,
        batch=batch,
        steps=steps,
        warmup_images=steps * batch // 20 if warmup is None else warmup,
        unit_grid=unit_grid,
        hidden_units=hidden,
        flops=np.cumsum([0.0, *(batch * per_image[units] for units in hidden)]).tolist(),
        rungs=rung_steps(rungs, steps),
    )


def rung_steps(rungs: Sequence[float], steps: int) -> dict[int, float]:
    """step -> progress; of rungs that fall on one step the last is kept."""
    return {max(1, round(progress * steps)): progress for progress in rungs}


def batches(
    seed: int, plan: Plan, first_step: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """(step, which training images make its batch): the epochs' orders end to end, cut evenly."""
    epoch, order = -1, torch.empty(0)
    for step in range(first_step, plan.steps):
        position, end = step * plan.batch, (step + 1) * plan.batch
        parts = []
        while position < end:
            if position // plan.num_images != epoch:
                epoch = position // plan.num_images
                order = counter.permutation(seed, "order", epoch, plan.num_images).to(device)
            offset = position % plan.num_images
            parts.append(order[offset : offset + end - position])
            position += len(parts[-1])
        yield step, torch.cat(parts)


def batch_loss(
    model: nn.Module,
    images: Tensor,
    config: TrialConfig,
    seed: int,
    plan: Plan,
    step: int,
    samples_B: Tensor,
) -> Tensor:
    """Augment, hide, fill in: the mean loss of these images, whose places in the batch are given.

    Every image hides the same number of patches, so the mean over equal shares of a batch is the
    mean over the batch, and so are the gradients.
    """
    augment = config.pretrain.augment
    images, _ = AUGMENTATIONS[augment.name](
        images, None, seed, step, samples_B, **augment.options()
    )

    strategy, hidden = config.masking.strategy, plan.hidden_units[step]
    request = MaskRequest(plan.unit_grid, hidden, step / plan.steps, seed, step, samples_B)
    is_hidden_BU = MASKING[strategy.name](request, **strategy.options())
    patches_per_unit = config.unit // config.model.patch
    is_hidden_BP = unit_to_patch(is_hidden_BU, plan.unit_grid, patches_per_unit)
    visible_BV, hidden_BX = split_indices(
        is_hidden_BP, hidden * patches_per_unit ** len(plan.unit_grid)
    )

    loss: Tensor = model(
        images,
        visible_BV,
        hidden_BX,
        visible_weight=config.pretrain.visible_weight,
        target=config.pretrain.target,
    )
    return loss


def is_epoch_end(done: int, plan: Plan) -> bool:
    """Whether the last of `done` steps completed a pass over the images."""
    return done * plan.batch // plan.num_images > (done - 1) * plan.batch // plan.num_images


def progress_values(
    counters: Counters, plan: Plan, config: TrialConfig, dataset: Dataset, context: Context
) -> dict[str, float]:
    """What training itself tells at a rung."""
    steps = counters.step - counters.rung_step
    seconds = counters.device_seconds - counters.rung_device_seconds
    return {
        "loss": counters.loss_sum / steps,
        "ratio": plan.hidden_units[counters.step - 1] / math.prod(plan.unit_grid),
        "images_per_second": steps * plan.batch / max(seconds, 1e-9),
        "device_seconds": counters.device_seconds,
        "flops": plan.flops[counters.step],
        "planned_flops": planned_flops(config, dataset.size, dataset.channels, plan.num_images),
        "peak_memory": distributed.peak_memory(context.device),
    }


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer blocks in place; all blocks of one shape share the machine code.

    Sizes are static: a schedule has at most eight, and dynamic ones are slower. torch gives up on
    a function after eight variants, which one warm process exceeds with its second trial.
    """
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


def told_to_stop(rows: list[Row], context: Context) -> bool:
    """Report the rows of a rung; the same answer on every rank."""
    return bool(distributed.decided_by_main(context.is_main and context.report(rows), context))
