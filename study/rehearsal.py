"""A trial's pretraining in fewer steps than planned, in this process, to see where it leads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainables.config import TrialConfig, in_epochs
from trainables.context import Context
from trainables.cost import pretrain_steps
from trainables.data.batches import to_device
from trainables.errors import UserError
from trainables.phase import batches
from trainables.pretrain import make_learner, make_plan, num_pretrain, train_step
from trainables.schedules import parse, value_at

if TYPE_CHECKING:
    from trainables.data import Dataset
    from trainables.mae import MAE

KNOTS = 21  # of a momentum that is made shorter

# (progress, the model, its teacher if it has one)
Visit = Callable[[float, "MAE", "MAE | None"], None]


def rehearse(
    config: TrialConfig,
    seed: int,
    dataset: Dataset,
    steps: int,
    device: torch.device,
    progress: Sequence[float],
    visit: Visit,
) -> None:
    """Pretrain from the start to the end in so many steps; `visit` is called on the way.

    UserError: the loss was not finite.
    """
    config = shortened(config, planned_steps(config, dataset), steps)
    rungs = [share for share in progress if share > 0]
    context = Context(device, Path(), "rehearsal", tuple(rungs), lambda _: False, lambda *_: None)
    num_images = steps * config.pretrain.batch  # as if they were seen once each
    plan = make_plan(config, dataset.size, dataset.channels, num_images, context.rungs, seed)
    plan = replace(plan, num_images=num_pretrain(dataset))
    images = to_device(dataset, dataset.rows("pretrain"), device, labels=False)
    learner = make_learner(
        config, dataset.size, dataset.channels, seed, context, is_padded=dataset.is_padded
    )
    samples_B = torch.arange(plan.batch, device=device)
    places_B = samples_B.to(images.rows.device)
    loss = torch.zeros((), device=device)
    if len(rungs) < len(progress):
        visit(0.0, learner.model, learner.teacher)
    for step, positions in batches(seed, plan, 0, images.rows.device):
        batch = images.draw(positions, seed, step, places_B)[0]
        loss += train_step(learner, batch, config, seed, plan, step, samples_B)
        if step + 1 in plan.rungs:
            visit(plan.rungs[step + 1], learner.model, learner.teacher)
    if not math.isfinite(loss.item()):
        raise UserError("its loss was not finite, so that its model is worth nothing")


def shortened(config: TrialConfig, planned: int, steps: int) -> TrialConfig:
    """The same run in `steps` steps: warm-up and the teacher's memory keep their share of it.

    A teacher that keeps a part m of itself in one of `planned` steps keeps m^(planned / steps) in
    one of `steps`, so that at every progress it has forgotten as much as it will have in the study.
    """
    warmup = config.pretrain.warmup_images
    changes: dict[str, Any] = {"compile": False}
    if warmup is not None:
        changes["warmup_images"] = round(warmup * steps / planned)
    update: dict[str, Any] = {"pretrain": in_epochs(config.pretrain, 1).model_copy(update=changes)}
    momentum = getattr(config.masking.strategy, "momentum", None)
    if momentum is not None:
        kept = [value_at(momentum, knot / (KNOTS - 1)) for knot in range(KNOTS)]
        values = [value ** (planned / steps) for value in kept]
        faster = {"momentum": parse({"name": "piecewise", "values": values})}
        strategy = config.masking.strategy.model_copy(update=faster)
        update["masking"] = config.masking.model_copy(update={"strategy": strategy})
    return config.model_copy(update=update)


def planned_steps(config: TrialConfig, dataset: Dataset) -> int:
    """Steps of the trial's pretraining as the study plans it."""
    num_images = len(dataset.rows("pretrain"))
    return pretrain_steps(config, dataset.size, dataset.channels, num_images)
