"""One trial: pretrain, then segment. Knows no scheduler; a debugger can walk through it."""

from __future__ import annotations

import torch

from trainables import checkpoint, distributed
from trainables.config import ProbeConfig, TrialConfig
from trainables.context import Context as Context
from trainables.context import Row as Row
from trainables.data import Dataset
from trainables.pretrain import pretrain
from trainables.segment import segment


def run_trial(
    config: TrialConfig, seed: int, dataset: Dataset, probe: ProbeConfig, context: Context
) -> str:
    """Run, or go on with, one trial: "complete", "stopped" at a rung, "diverged" or LEAVING.

    Pretraining is left out by the control `random-init`, segmentation when nothing is labelled.
    """
    resume = _newest_checkpoint(context)
    phase = resume[1]["phase"] if resume else None

    encoder_state = None
    if config.segment.encoder != "random-init" and phase != "segment":
        outcome, encoder_state = pretrain(config, seed, dataset, probe, context, resume)
        resume = None
        if outcome != "complete":
            return outcome

    if not dataset.is_labelled:
        return "complete"
    return segment(config, seed, dataset, encoder_state, context, resume)


def _newest_checkpoint(
    context: Context,
) -> tuple[dict[str, torch.Tensor], checkpoint.State] | None:
    """Rank 0 chooses, so that workers never go on from different ones."""
    folder = context.folder / "checkpoints"
    newest = checkpoint.load_latest(folder, context.remote) if context.is_main else None
    name = distributed.decided_by_main(newest and newest[2], context)
    if name is None:
        return None
    if newest is not None:
        return newest[0], newest[1]
    return checkpoint.load(folder, name, context.remote)
