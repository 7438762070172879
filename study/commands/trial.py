"""`try`: one tiny trial in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from study.commands.data import dataset_of
from study.commands.terminal import say
from study.loading import load_spec
from trainables.config import TrialConfig, in_epochs
from trainables.context import Context, Row
from trainables.data.source import Array
from trainables.trial import run_trial


def try_trial(path: Path, num_images: int) -> None:
    """The study's own trial, for one epoch of a few images of each split."""
    spec = load_spec(path)
    dataset = dataset_of(spec)
    dataset = replace(dataset, splits=_first_of_each(dataset.splits, num_images))
    with tempfile.TemporaryDirectory(prefix="maskstudy-try-") as folder:
        context = Context(
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            folder=Path(folder),
            attempt="try",
            rungs=(1.0,),
            report=_print_rows,
            heartbeat=lambda *_: None,
        )
        say(
            f"one epoch of each phase on {num_images} images, in this process; its numbers "
            f"mean nothing"
        )
        outcome = run_trial(_of_one_epoch(spec.trial), spec.seed, dataset, spec.probe, context)
    say(f"{outcome}: the study's trial runs")


def _of_one_epoch(config: TrialConfig) -> TrialConfig:
    return config.model_copy(
        update={
            "pretrain": in_epochs(config.pretrain, 1),
            "segment": in_epochs(config.segment, 1),
        }
    )


def _first_of_each(splits: Array, count: int) -> Array:
    """The splits with no more than `count` images in each; the others are in none."""
    kept = splits.copy()
    for split in set(splits):
        kept[(splits == split).nonzero()[0][count:]] = ""
    return kept


def _print_rows(rows: Sequence[Row]) -> bool:
    """What a trial reports; it goes on."""
    for row in rows:
        name = f"{row['phase']}/{row['metric']}"
        say(f"  {name:<38} {row['value']:>10.5g} {row['unit']}")
    return False
