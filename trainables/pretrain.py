"""Pretraining: the masked autoencoder learns to fill in what is hidden. The loop is in phase.py.

B images of this worker's part of the batch · S pixels along every axis · U mask units · P patches
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from trainables import distributed, padding
from trainables import probe as probing
from trainables.augment import AUGMENTATIONS
from trainables.blocks import Block, recompute
from trainables.checkpoint import Saved
from trainables.config import ProbeConfig, TrialConfig, warmup_images
from trainables.context import Context
from trainables.cost import mae_flops, pretrain_steps
from trainables.cross_decoder import CrossBlock
from trainables.data import Dataset
from trainables.data.batches import to_device
from trainables.dense import Prober
from trainables.edges import grid_of
from trainables.endings import Ending
from trainables.errors import UserError
from trainables.export import export_encoder
from trainables.hiding import has_teacher, hide
from trainables.mae import MAE, build_mae
from trainables.masking import (
    MaskRequest,
    hide_smallest,
    plan_hidden,
    split_indices,
)
from trainables.optimizers import OPTIMIZERS, parameter_groups
from trainables.phase import Learner, Phase, Plan, rung_steps, train, update
from trainables.schedules import value_at

MOST_VARIANTS = 1024  # of compiled code in a process; one trial makes tens

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class MaskPlan(Plan):
    """A plan of pretraining."""

    unit_grid: tuple[int, ...]
    hidden_units: list[int]  # at each step


def pretrain(
    config: TrialConfig,
    seed: int,
    dataset: Dataset,
    probe: ProbeConfig,
    context: Context,
    resume: Saved | None = None,
) -> tuple[Ending, Weights]:
    """Train, or go on from a checkpoint; (how it ended, the encoder's weights)."""
    plan = make_plan(
        config, dataset.size, dataset.channels, num_pretrain(dataset), context.rungs, seed
    )
    share = distributed.batch_slice(plan.batch, context, "pretrain.batch")
    learner = make_learner(
        config, dataset.size, dataset.channels, seed, context, is_padded=dataset.is_padded
    )
    model, teacher = learner.model, learner.teacher
    judge = probing.Judge(config, dataset, probe, context)
    prober = Prober(config, seed, dataset, dataset.rows("train"), context)

    def loss_of(images: Tensor, _: Tensor | None, step: int, samples_B: Tensor) -> Tensor:
        return batch_loss(learner, images, config, seed, plan, step, samples_B)

    def evaluate(steps: range) -> dict[str, float]:
        hidden = plan.hidden_units[steps.start : steps.stop]
        ratio = sum(hidden) / len(hidden) / math.prod(plan.unit_grid)
        return {"ratio": ratio} | judge.scores(model, teacher) | prober.scores(model.encoder)

    def illustrate(progress: float) -> None:
        judge.draw_masks(model, teacher, progress)
        if context.is_main:
            context.keep("pictures")

    phase = Phase(
        plan=plan,
        share=share,
        learner=learner,
        images=to_device(dataset, dataset.rows("pretrain"), context.device, labels=False),
        loss_of=loss_of,
        evaluate=evaluate,
        illustrate=illustrate,
    )
    ending, rows = train(phase, seed, context, resume)
    if ending is Ending.COMPLETE and context.is_main:
        judge.draw(model, context.folder / "pictures")
        context.keep("pictures")
        results = {row["metric"]: row["value"] for row in rows}
        export_encoder(context.folder / "encoder", model.encoder, config, seed, dataset, results)
        context.keep("encoder")
    return ending, model.encoder.state_dict()


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
) -> MaskPlan:
    """Turn the length into steps, and the ratio's schedule into whole units at each step."""
    batch, ratio = config.pretrain.batch, config.masking.ratio
    steps = pretrain_steps(config, size, channels, num_images)
    unit_grid = grid_of(size, config.unit_edges(len(size)))
    hidden = plan_hidden(partial(value_at, ratio), math.prod(unit_grid), steps, seed)
    patches_per_unit = math.prod(config.patches_per_unit(len(size)))
    per_image = {
        units: mae_flops(config, size, channels, units * patches_per_unit)["step"]
        for units in set(hidden)
    }
    return MaskPlan(
        phase="pretrain",
        num_images=num_images,
        batch=batch,
        steps=steps,
        warmup_images=warmup_images(config.pretrain, steps),
        unit_grid=unit_grid,
        hidden_units=hidden,
        flops=np.cumsum([0.0, *(batch * per_image[units] for units in hidden)]).tolist(),
        rungs=rung_steps(rungs, steps),
    )


def make_learner(
    config: TrialConfig,
    size: Sequence[int],
    channels: int,
    seed: int,
    context: Context,
    *,
    is_padded: bool = False,
) -> Learner[MAE]:
    """Model, optimiser and, for a strategy that has one, the teacher, all at their start."""
    model = build_mae(config, size, channels, seed, is_padded=is_padded).to(context.device)
    settings = config.pretrain
    optimizer = OPTIMIZERS[settings.optimizer.name](
        parameter_groups(model, None), settings.batch, **settings.optimizer.options()
    )
    teacher, momentum = None, None
    if has_teacher(config):
        teacher = copy.deepcopy(model).requires_grad_(False)
        momentum = partial(value_at, config.masking.strategy.options()["momentum"])
    if context.recomputes:
        recompute(model)
    if settings.compile:
        compile_blocks(model)
        if teacher is not None:
            compile_blocks(teacher)
    trained = distributed.data_parallel(model, context)
    return Learner(model, trained, optimizer, teacher, momentum, clip=settings.clip)


def train_step(
    learner: Learner[MAE],
    images: Tensor,
    config: TrialConfig,
    seed: int,
    plan: MaskPlan,
    step: int,
    samples_B: Tensor,
) -> Tensor:
    """One step on this worker's images, whose places in the batch are given; its loss."""
    loss = batch_loss(learner, images, config, seed, plan, step, samples_B)
    return update(learner, loss, plan, step)


def batch_loss(
    learner: Learner[MAE],
    images: Tensor,
    config: TrialConfig,
    seed: int,
    plan: MaskPlan,
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


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer blocks in place; all blocks of one shape share the machine code.

    Sizes are static: a schedule has at most eight, and dynamic ones are slower. torch gives up on
    a function after eight variants, which one warm process exceeds with its second trial. Where
    they have come to many it forgets them all; what a trial meets again is found on the disk.
    """
    from torch._dynamo import config, reset  # seconds of import
    from torch._dynamo.utils import counters

    config.recompile_limit = config.accumulated_recompile_limit = MOST_VARIANTS
    if counters["stats"]["unique_graphs"] > MOST_VARIANTS // 2:
        reset()
        counters["stats"]["unique_graphs"] = 0
    for module in model.modules():
        if isinstance(module, Block | CrossBlock):
            module.compile(dynamic=False)
