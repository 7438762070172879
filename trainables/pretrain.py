"""Pretraining: the masked autoencoder learns to fill in what is hidden. A plain loop.

How it goes on after an interruption:
1. Weights, moments and counters come from the newest checkpoint; nothing else has a memory.
2. Order, masks and flips are functions of (seed, step, place in the batch), so they have no state.
3. Steps after the checkpoint are done again and give the same numbers (bit by bit on a CPU).
4. A checkpoint at a rung holds the rung's rows: they are reported again, and the answer obeyed.
5. Told to leave, all workers save after the same step. Within an epoch the loss is a sum that is
   still running on each of them: the checkpoint holds them all, so that rounding stays the same.

B images of this worker's part of the batch · S pixels along every axis
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainables import checkpoint, counter, distributed, padding
from trainables import probe as probing
from trainables.augment import AUGMENTATIONS
from trainables.blocks import Block
from trainables.config import ProbeConfig, TrialConfig
from trainables.context import LEAVING, Context, Row
from trainables.cost import mae_flops
from trainables.cross_decoder import CrossBlock
from trainables.data import Dataset
from trainables.data.batches import to_device
from trainables.edges import grid_of
from trainables.errors import UserError
from trainables.export import export_encoder
from trainables.mae import MAE, build_mae
from trainables.masking import (
    MaskRequest,
    has_teacher,
    hide,
    hide_smallest,
    plan_hidden,
    split_indices,
)
from trainables.metrics import rows as metric_rows
from trainables.optimizers import OPTIMIZERS, learning_rate, parameter_groups, set_learning_rate
from trainables.schedules import value_at

Weights = dict[str, Tensor]

HEARTBEAT_SECONDS = 0.3
RUNNING_LOSS = "loop/running_loss"  # a checkpoint's tensor


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
class Learner:
    """What learns, on one worker."""

    model: MAE
    trained: nn.Module  # the model, wrapped where there are several workers
    optimizer: torch.optim.Optimizer
    teacher: MAE | None  # the model's moving average, if the strategy asks one


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
    plan = make_plan(
        config, dataset.size, dataset.channels, num_pretrain(dataset), context.rungs, seed
    )
    share = distributed.batch_slice(plan.batch, context, "pretrain.batch")
    samples_B = torch.arange(plan.batch, device=device)[share]
    images = to_device(dataset, dataset.rows("pretrain"), device, labels=False)
    places_B = samples_B.to(images.rows.device)
    judge = probing.Judge(config, dataset, probe, context)

    learner = make_learner(
        config, dataset.size, dataset.channels, seed, context, is_padded=dataset.is_padded
    )
    model, teacher = learner.model, learner.teacher
    counters = Counters()
    if resume is not None:
        checkpoint.unpack(model, learner.optimizer, resume[0], teacher)
        counters = Counters(**resume[1])
        if counters.step == counters.rung_step and told_to_stop(counters.rows, context):
            return "stopped", model.encoder.state_dict()

    distributed.reset_peak_memory(device)
    loss_sum = running_loss(resume, context)
    if counters.step == 0:
        judge.draw_masks(model, teacher, 0.0)
    saved = started = beaten = time.perf_counter()
    first_step = beaten_step = counters.step
    for step, positions in batches(seed, plan, counters.step, images.rows.device):
        batch = images.draw(positions[share], seed, step, places_B)[0]
        loss_sum += train_step(learner, batch, config, seed, plan, step, samples_B)
        done = step + 1
        now = time.perf_counter()
        is_due = step == first_step or now - beaten > HEARTBEAT_SECONDS
        if context.is_main and is_due:
            speed = (done - beaten_step) * plan.batch / (now - beaten)
            context.heartbeat("pretrain", done / plan.steps, speed)
            beaten, beaten_step = now, done

        is_rung = done in plan.rungs
        is_leaving = context.is_leaving("pretrain", done)
        if not (is_rung or is_epoch_end(done, plan)):
            if is_leaving:
                counters = leave(counters, done, now - started)
                losses = distributed.from_all_workers(loss_sum, context)
                save(counters, model, learner.optimizer, teacher, context, losses)
                return LEAVING, model.encoder.state_dict()
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
            values = progress_values(counters, plan, context) | judge.scores(model, teacher)
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
            judge.draw_masks(model, teacher, plan.rungs[done])
            if context.is_main:
                context.keep("pictures")
            stop = told_to_stop(rows, context)
            counters = replace(
                counters,
                loss_sum=0.0,
                rung_step=done,
                rung_device_seconds=counters.device_seconds,
                rows=rows,
            )
        if is_rung or is_leaving or now - saved > context.checkpoint_seconds:
            save(counters, model, learner.optimizer, teacher, context)
            saved = time.perf_counter()
        if stop:
            return "stopped", model.encoder.state_dict()
        if is_leaving and done < plan.steps:
            return LEAVING, model.encoder.state_dict()
        started = time.perf_counter()

    if context.is_main:
        judge.draw(model, context.folder / "pictures")
        context.keep("pictures")
        results = {row["metric"]: row["value"] for row in counters.rows}
        export_encoder(context.folder / "encoder", model.encoder, config, seed, dataset, results)
        context.keep("encoder")
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
    seed: int,
) -> Plan:
    """Turn epochs into steps, and the ratio's schedule into whole units at each step."""
    batch, ratio = config.pretrain.batch, config.masking.ratio
    steps = max(1, round(config.pretrain.epochs * num_images / batch))
    unit_grid = grid_of(size, config.unit_edges(len(size)))
    hidden = plan_hidden(partial(value_at, ratio), math.prod(unit_grid), steps, seed)
    patches_per_unit = math.prod(config.patches_per_unit(len(size)))
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


def make_learner(
    config: TrialConfig,
    size: Sequence[int],
    channels: int,
    seed: int,
    context: Context,
    *,
    is_padded: bool = False,
) -> Learner:
    """Model, optimiser and, for a strategy that has one, the teacher, all at their start."""
    model = build_mae(config, size, channels, seed, is_padded=is_padded).to(context.device)
    settings = config.pretrain
    optimizer = OPTIMIZERS[settings.optimizer.name](
        parameter_groups(model, None), settings.batch, **settings.optimizer.options()
    )
    teacher = None
    if has_teacher(config):
        teacher = copy.deepcopy(model).requires_grad_(False)
    if settings.compile:
        compile_blocks(model)
        if teacher is not None:
            compile_blocks(teacher)
    return Learner(model, distributed.data_parallel(model, context), optimizer, teacher)


def train_step(
    learner: Learner,
    images: Tensor,
    config: TrialConfig,
    seed: int,
    plan: Plan,
    step: int,
    samples_B: Tensor,
) -> Tensor:
    """One step on this worker's images, whose places in the batch are given; its loss."""
    loss = batch_loss(learner, images, config, seed, plan, step, samples_B)
    loss.backward()  # type: ignore[no-untyped-call]
    seen = step * plan.batch + plan.batch // 2  # mid-batch, so no step has a rate of 0
    rate = learning_rate(seen, plan.steps * plan.batch, plan.warmup_images)
    set_learning_rate(learner.optimizer, rate)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.teacher is not None:
        momentum = config.masking.strategy.options()["momentum"]
        follow(learner.teacher, learner.model, value_at(momentum, (step + 1) / plan.steps))
    return loss.detach()


def batch_loss(
    learner: Learner,
    images: Tensor,
    config: TrialConfig,
    seed: int,
    plan: Plan,
    step: int,
    samples_B: Tensor,
) -> Tensor:
    """Augment, hide, fill in: the mean loss of these images, whose places in the batch are given.

    Every image hides the same number of patches, so the mean over equal shares of a batch is the
    mean over the batch, and so are the gradients. Every image counts the same, padded or not.
    """
    settings = config.pretrain
    images, _ = AUGMENTATIONS[settings.augment.name](
        images, None, seed, step, samples_B, **settings.augment.options()
    )
    is_padding_BU = None
    if learner.model.is_padded:
        is_padding_BU = padding.is_padding(images, config.unit_edges(images.ndim - 2))
    request = MaskRequest(
        grid=plan.unit_grid,
        hidden=plan.hidden_units[step],
        progress=step / plan.steps,
        seed=seed,
        step=step,
        samples_B=samples_B,
        images=images,
        model=learner.teacher or learner.model,
        patches_per_unit=learner.model.patches_per_unit,
        is_padding_BU=is_padding_BU,
    )
    # In a context of its own: the next one would find weights in its cache that ask for no gradient
    with torch.no_grad(), distributed.autocast(settings.precision, images.device):
        masks = choose_patches(config, request)
    with distributed.autocast(settings.precision, images.device):
        loss: Tensor = learner.trained(images, *masks)
    return loss


def choose_patches(
    config: TrialConfig, request: MaskRequest
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(visible_BV, hidden_BX to predict, is_replaced_BV): what a step hides, shows and replaces.

    Where there is padding, the share that is replaced is one of real units, and patches that are
    padding alone are predicted only when nothing else is left.
    """
    is_hidden_BU, num_hidden = hide(config, request), request.hidden_patches
    visible_BV, hidden_BX = split_indices(request.to_patches(is_hidden_BU), num_hidden)
    is_replaced_BV = None
    if config.masking.secondary > 0:
        secondary, num_shown = config.masking.secondary, request.num_units - request.hidden
        num_replaced: int | Tensor = round(secondary * num_shown)
        order_BU = request.noise("secondary").masked_fill(is_hidden_BU, 2.0)
        if request.is_padding_BU is not None:
            shown_B1 = request.num_real_B1 - request.hidden_real_B1
            num_replaced = (secondary * shown_B1.double()).round()
            order_BU = order_BU.masked_fill(request.is_padding_BU, 2.0)
        is_replaced_BU = hide_smallest(order_BU, num_replaced)
        is_replaced_BV = request.to_patches(is_replaced_BU).gather(1, visible_BV)
    if config.model.decoder.predicted < 1:
        num_predicted = max(1, round(config.model.decoder.predicted * num_hidden))
        order_BX = request.noise("predicted", num_hidden)
        if request.is_padding_BU is not None:
            order_BX = order_BX + (request.real_share() == 0).gather(1, hidden_BX)
        hidden_BX = hidden_BX.gather(1, order_BX.argsort(dim=1)[:, :num_predicted])
    return visible_BV, hidden_BX, is_replaced_BV


@torch.no_grad()
def follow(teacher: nn.Module, model: nn.Module, momentum: float) -> None:
    """Exponential moving average: teacher = momentum * teacher + (1 - momentum) * model."""
    average = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
    average(list(teacher.parameters()), list(model.parameters()), 0)


def is_epoch_end(done: int, plan: Plan) -> bool:
    """Whether the last of `done` steps completed a pass over the images."""
    return done * plan.batch // plan.num_images > (done - 1) * plan.batch // plan.num_images


def progress_values(counters: Counters, plan: Plan, context: Context) -> dict[str, float]:
    """What training itself tells at a rung."""
    steps = counters.step - counters.rung_step
    seconds = counters.device_seconds - counters.rung_device_seconds
    hidden = plan.hidden_units[counters.rung_step : counters.step]
    return {
        "loss": counters.loss_sum / steps,
        "ratio": sum(hidden) / steps / math.prod(plan.unit_grid),
        "images_per_second": steps * plan.batch / max(seconds, 1e-9),
        "device_seconds": counters.device_seconds,
        "flops": plan.flops[counters.step],
        "planned_flops": plan.flops[-1],
        "peak_memory": distributed.peak_memory(context.device),
    }


def save(
    counters: Counters,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: nn.Module | None,
    context: Context,
    losses: Tensor | None = None,
) -> None:
    """Rank 0 writes a checkpoint; `losses` are the workers' sums since the counters' own."""
    if not context.is_main:
        return
    saving = time.perf_counter()
    name = f"{context.attempt}-{counters.phase}-{counters.step:08d}"
    tensors = checkpoint.pack(model, optimizer, teacher)
    if losses is not None:
        tensors[RUNNING_LOSS] = losses
    folder = context.folder / "checkpoints"
    checkpoint.save(folder, name, tensors, asdict(counters), context.remote)
    context.saved(time.perf_counter() - saving)


def leave(counters: Counters, done: int, seconds: float) -> Counters:
    """The counters in the middle of an epoch, whose loss is not in them."""
    return replace(counters, step=done, device_seconds=counters.device_seconds + seconds)


def running_loss(
    resume: tuple[dict[str, Tensor], dict[str, Any]] | None, context: Context
) -> Tensor:
    """This worker's sum of losses since the counters' own; 0 but in the middle of an epoch."""
    if resume is None or RUNNING_LOSS not in resume[0]:
        return torch.zeros((), device=context.device)
    losses = resume[0][RUNNING_LOSS].to(context.device)
    # for another number of workers the mean counts; the last bits of the loss are others then
    return losses[context.rank] if len(losses) == context.world_size else losses.mean()


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer blocks in place; all blocks of one shape share the machine code.

    Sizes are static: a schedule has at most eight, and dynamic ones are slower. torch gives up on
    a function after eight variants, which one warm process exceeds with its second trial.
    """
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    for module in model.modules():
        if isinstance(module, Block | CrossBlock):
            module.compile(dynamic=False)


def told_to_stop(rows: list[Row], context: Context) -> bool:
    """Report the rows of a rung; the same answer on every rank."""
    return bool(distributed.decided_by_main(context.is_main and context.report(rows), context))
