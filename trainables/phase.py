"""A phase of a trial: the training loop. Pretraining and segmentation fill in what differs.

How it goes on after an interruption:
1. Weights, moments and counters come from the newest checkpoint; nothing else has a memory.
2. Order, crops, masks and flips are functions of (seed, step, place in the batch), so they have no
   state.
3. Steps after the checkpoint are done again and give the same numbers (bit by bit on a CPU).
4. A checkpoint at a rung holds the rung's rows: they are reported again, and the answer obeyed.
5. Told to leave, all workers save after the same step. Within an epoch the loss is a sum that is
   still running on each of them: the checkpoint holds them all, so that rounding stays the same.

To add a phase, write a function that builds a `Phase` and calls `train`; say in trial.py when it is
run, and in metrics.PHASES where it comes.

B images of this worker's part of the batch
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainables import checkpoint, counter, distributed
from trainables.beside import ahead
from trainables.checkpoint import Saved
from trainables.context import Context, Row
from trainables.data.batches import Resident
from trainables.endings import Ending
from trainables.metrics import Phase as PhaseName
from trainables.metrics import rows as metric_rows
from trainables.optimizers import learning_rate, set_learning_rate

HEARTBEAT_SECONDS = 0.3
MOST_STEPS = 1000  # between two looks for what diverged, and chances for a checkpoint
RUNNING_LOSS = "loop/running_loss"  # a checkpoint's tensor

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step."""

    phase: PhaseName
    num_images: int
    batch: int  # images per step over all workers
    steps: int
    warmup_images: int
    flops: list[float]  # done after each number of steps; the first is 0
    rungs: dict[int, float]  # step -> share of the planned budget


@dataclass(frozen=True)
class Learner(Generic[Model]):
    """What learns, on one worker."""

    model: Model
    trained: nn.Module  # the model, wrapped where there are several workers
    optimizer: torch.optim.Optimizer
    teacher: Model | None = None  # the model's moving average, if the strategy asks one
    momentum: Callable[[float], float] | None = None  # of the teacher, by progress
    clip: float | None = None  # longest gradient, over all that is trained
    held: tuple[nn.Parameter, ...] = ()  # parameters of the encoder that learn later
    held_steps: int = 0  # in which these stay as they are


@dataclass(frozen=True)
class Phase:
    """What pretraining and segmentation differ in."""

    plan: Plan
    share: slice  # of a batch, for this worker
    learner: Learner[Any]
    images: Resident  # to train on
    # (images (B, C, *S), their labels, step, their places in the batch (B,)) -> mean loss
    loss_of: Callable[[Tensor, Tensor | None, int, Tensor], Tensor]
    # the steps since the rung before -> what is measured at a rung; a collective
    evaluate: Callable[[range], dict[str, float]]
    foreground: float = 0.0  # share of crops that are drawn around a labelled voxel
    illustrate: Callable[[float], None] = lambda progress: None  # before the first step, at rungs


@dataclass(frozen=True)
class Counters:
    """What a checkpoint holds besides tensors."""

    phase: PhaseName
    step: int = 0
    loss_sum: float = 0.0  # since the rung before
    device_seconds: float = 0.0
    rung_step: int = 0
    rung_device_seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)  # of the rung before


def train(
    phase: Phase, seed: int, context: Context, resume: Saved | None
) -> tuple[Ending, list[Row]]:
    """Train, or go on from a checkpoint; (how it ended, the rows of the newest rung)."""
    learner, counters = phase.learner, Counters(phase.plan.phase)
    if resume is not None:
        checkpoint.unpack(learner.model, learner.optimizer, resume.tensors, learner.teacher)
        counters = Counters(**resume.state)
        if counters.step == counters.rung_step and told_to_stop(counters.rows, context):
            return Ending.STOPPED, counters.rows
    if counters.step == 0:
        phase.illustrate(0.0)

    folder = context.folder / "checkpoints"
    with checkpoint.Writer(folder, context.remote, context.saved) as writer:
        ending, counters = _steps(phase, seed, context, resume, counters, writer)
    return ending, counters.rows


def _steps(
    phase: Phase,
    seed: int,
    context: Context,
    resume: Saved | None,
    counters: Counters,
    writer: checkpoint.Writer,
) -> tuple[Ending, Counters]:
    """All steps that are left; (how it ended, what is counted then)."""
    plan, learner, where = phase.plan, phase.learner, phase.images.rows.device
    samples_B = torch.arange(plan.batch, device=context.device)[phase.share]
    places_B = samples_B.to(where)
    distributed.reset_peak_memory(context.device)
    loss_sum = running_loss(resume, context)
    saved = started = beaten = time.perf_counter()
    first_step = beaten_step = counters.step
    drawn: Iterator[tuple[int, tuple[Tensor, Tensor | None]]] = (
        (
            step,
            phase.images.draw(
                index_B[phase.share], seed, step, places_B, foreground=phase.foreground
            ),
        )
        for step, index_B in batches(seed, plan, counters.step, where)
    )
    if where.type != context.device.type:  # every thread has a device of its own
        drawn = ahead(drawn, partial(torch.cuda.set_device, context.device))
    for step, (images, labels) in drawn:
        loss_sum += learn(phase, images, labels, step, samples_B, context.micro_batches)

        done = step + 1
        now = time.perf_counter()
        is_due = step == first_step or now - beaten > HEARTBEAT_SECONDS
        if context.is_main and is_due:
            speed = (done - beaten_step) * plan.batch / (now - beaten)
            context.heartbeat(plan.phase, done / plan.steps, speed)
            beaten, beaten_step = now, done

        is_rung = done in plan.rungs
        is_leaving = context.is_leaving(plan.phase, done)
        if not (is_rung or is_epoch_end(done, plan) or done % MOST_STEPS == 0):
            if is_leaving:
                seconds = counters.device_seconds + now - started
                counters = replace(counters, step=done, device_seconds=seconds)
                losses = distributed.from_all_workers(loss_sum, context)
                save(counters, learner, context, writer, losses)
                return Ending.LEAVING, counters
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
            return Ending.DIVERGED, counters

        stop = False
        if is_rung:
            values = training_values(counters, plan, context)
            values |= phase.evaluate(range(counters.rung_step, done))
            if not all(map(math.isfinite, values.values())):
                return Ending.DIVERGED, counters
            rows = metric_rows(
                values,
                phase=plan.phase,
                step=done,
                epoch=done * plan.batch / plan.num_images,
                progress=plan.rungs[done],
                seconds=counters.device_seconds,
            )
            phase.illustrate(plan.rungs[done])
            stop = told_to_stop(rows, context)
            counters = replace(
                counters,
                loss_sum=0.0,
                rung_step=done,
                rung_device_seconds=counters.device_seconds,
                rows=rows,
            )
        if is_rung or is_leaving or now - saved > context.checkpoint_seconds:
            save(counters, learner, context, writer)
            saved = time.perf_counter()
        if stop:
            return Ending.STOPPED, counters
        if is_leaving and done < plan.steps:
            return Ending.LEAVING, counters
        started = time.perf_counter()
    return Ending.COMPLETE, counters


def learn(
    phase: Phase,
    images: Tensor,
    labels: Tensor | None,
    step: int,
    samples_B: Tensor,
    micro_batches: int,
) -> Tensor:
    """A step on this worker's images, in as many parts as that; their mean loss.

    Every image counts the same, so the parts' gradients add up to those of the whole, and workers
    exchange them once.
    """
    count = len(images)
    ends = [count * part // micro_batches for part in range(1, micro_batches + 1)]
    parts = [slice(*pair) for pair in pairwise([0, *ends]) if pair[0] < pair[1]]
    total: Tensor | float = 0.0
    for part in parts:
        is_last = part is parts[-1]
        with contextlib.nullcontext() if is_last else unsynced(phase.learner.trained):
            part_labels = None if labels is None else labels[part]
            loss = phase.loss_of(images[part], part_labels, step, samples_B[part])
            loss = loss * ((part.stop - part.start) / count)
            if not is_last:
                loss.backward()  # type: ignore[no-untyped-call]
                total = total + loss.detach()
    return total + update(phase.learner, loss, phase.plan, step)


def unsynced(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients stay with their worker."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def update(learner: Learner[Any], loss: Tensor, plan: Plan, step: int) -> Tensor:
    """Learn from a batch; returns its loss, which asks for no gradient any more.

    What is held has a schedule of its own, which begins when the others have learnt alone.
    """
    loss.backward()  # type: ignore[no-untyped-call]
    seen = step * plan.batch + plan.batch // 2  # mid-batch, so no step has a rate of 0
    total, alone = plan.steps * plan.batch, learner.held_steps * plan.batch
    rate, of_held = learning_rate(seen, total, plan.warmup_images), None
    if learner.held:
        of_held = learning_rate(max(0, seen - alone), total - alone, plan.warmup_images)
    if step < learner.held_steps:
        for parameter in learner.held:
            parameter.grad = None
    if learner.clip is not None:
        nn.utils.clip_grad_norm_(learner.model.parameters(), learner.clip, foreach=True)
    set_learning_rate(learner.optimizer, rate, of_held)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.teacher is not None and learner.momentum is not None:
        follow(learner.teacher, learner.model, learner.momentum((step + 1) / plan.steps))
    return loss.detach()


@torch.no_grad()
def follow(teacher: nn.Module, model: nn.Module, momentum: float) -> None:
    """Exponential moving average: teacher = momentum * teacher + (1 - momentum) * model."""
    average = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
    average(list(teacher.parameters()), list(model.parameters()), 0)


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


def is_epoch_end(done: int, plan: Plan) -> bool:
    """Whether the last of `done` steps completed a pass over the images."""
    return done * plan.batch // plan.num_images > (done - 1) * plan.batch // plan.num_images


def training_values(counters: Counters, plan: Plan, context: Context) -> dict[str, float]:
    """What training itself tells at a rung."""
    steps = counters.step - counters.rung_step
    seconds = counters.device_seconds - counters.rung_device_seconds
    return {
        "loss": counters.loss_sum / steps,
        "images_per_second": steps * plan.batch / max(seconds, 1e-9),
        "device_seconds": counters.device_seconds,
        "flops": plan.flops[counters.step],
        "planned_flops": plan.flops[-1],
        "peak_memory": distributed.peak_memory(context.device),
    }


def told_to_stop(rows: list[Row], context: Context) -> bool:
    """Report the rows of a rung; the same answer on every rank."""
    return bool(distributed.decided_by_main(context.is_main and context.report(rows), context))


def save(
    counters: Counters,
    learner: Learner[Any],
    context: Context,
    writer: checkpoint.Writer,
    losses: Tensor | None = None,
) -> None:
    """Rank 0 begins a checkpoint; `losses` are the workers' sums since the counters' own."""
    if not context.is_main:
        return
    name = f"{context.attempt}-{counters.phase}-{counters.step:08d}"
    tensors = checkpoint.pack(learner.model, learner.optimizer, learner.teacher)
    if losses is not None:
        tensors[RUNNING_LOSS] = losses
    writer.save(name, tensors, asdict(counters))


def running_loss(resume: Saved | None, context: Context) -> Tensor:
    """This worker's sum of losses since the counters' own; 0 but in the middle of an epoch."""
    if resume is None or RUNNING_LOSS not in resume.tensors:
        return torch.zeros((), device=context.device)
    losses = resume.tensors[RUNNING_LOSS].to(context.device)
    # for another number of workers the mean counts; the last bits of the loss are others then
    return losses[context.rank] if len(losses) == context.world_size else losses.mean()
