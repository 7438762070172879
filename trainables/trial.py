"""One trial: pretrain, then segment. Knows no scheduler; a debugger can walk through it."""

from __future__ import annotations

from trainables import checkpoint, distributed
from trainables.config import ProbeConfig, TrialConfig
from trainables.context import Context as Context
from trainables.context import Row as Row
from trainables.data import Dataset
from trainables.endings import Ending
from trainables.pretrain import pretrain
from trainables.segment import segment
from trainables.sharing import pretrain_once


def run_trial(
    config: TrialConfig, seed: int, dataset: Dataset, probe: ProbeConfig, context: Context
) -> Ending:
    """Run, or go on with, one trial: COMPLETE, STOPPED at a rung, DIVERGED or LEAVING.

    Pretraining is left out by the control `random-init`, segmentation when nothing is labelled.
    """
    resume = _newest_checkpoint(context)
    phase = resume.state["phase"] if resume else None

    encoder_state = None
    if config.segment.encoder != "random-init" and phase != "segment":
        if resume is None:
            ending, encoder_state = pretrain_once(config, seed, dataset, probe, context)
        else:
            ending, encoder_state = pretrain(config, seed, dataset, probe, context, resume)
            resume = None
        if ending is not Ending.COMPLETE:
            return ending

    if not dataset.is_labelled:
        return Ending.COMPLETE
    return segment(config, seed, dataset, encoder_state, context, resume)


def _newest_checkpoint(context: Context) -> checkpoint.Saved | None:
    """Rank 0 chooses, so that workers never go on from different ones."""
    folder = context.folder / "checkpoints"
    newest = checkpoint.load_latest(folder, context.remote) if context.is_main else None
    name = distributed.decided_by_main(newest and newest.name, context)
    if name is None:
        return None
    return newest or checkpoint.load(folder, name, context.remote)
