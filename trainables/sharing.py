"""Pretraining that is done once: trials that differ only in segmentation share one encoder.

Two trials of a study with equal model, masking, pretraining and seed would pretrain alike, bit by
bit; the second takes what the first one kept, and reports the same rows, with the time that it took
then. So score against labels, frozen against fine-tuned, cost one pretraining a seed.

    pretrained/<key>/rows.json         of each rung, in order
    pretrained/<key>/weights.safetensors
    pretrained/<key>/{pictures,encoder}/   as they are in the trial's folder

A folder appears whole or not at all, and may be deleted: then the next trial pretrains anew. Only
studies keep them that search settings of segmentation or have the control `frozen`.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file

from trainables import distributed, durable
from trainables.config import ProbeConfig, TrialConfig, content_of
from trainables.context import Context, Row
from trainables.data import Dataset
from trainables.endings import Ending
from trainables.phase import told_to_stop
from trainables.pretrain import Weights, pretrain
from trainables.settings import digest
from trainables.tensors import save_tensors

FORMAT = 1  # raise it when the same settings would train other weights or report other rows
KEPT = ("pictures", "encoder")  # folders of a trial


class Pretrained(NamedTuple):
    """What a finished pretraining left."""

    folder: Path
    rungs: list[list[Row]]
    weights: Weights  # the encoder's


def pretrain_once(
    config: TrialConfig, seed: int, dataset: Dataset, probe: ProbeConfig, context: Context
) -> tuple[Ending, Weights]:
    """What another trial of the study has pretrained in the same way; else pretrain, and keep it.

    Rank 0 looks, so that all workers do the same.
    """
    if context.shared is None:
        return pretrain(config, seed, dataset, probe, context)
    key = key_of(config, seed, dataset.fingerprint, probe, context)
    done = find(context.shared, key) if context.is_main else None
    if distributed.decided_by_main(done is not None, context):
        done = done or find(context.shared, key)
        assert done is not None, f"{context.shared / key} can be read by one worker alone"
        return _replayed(done, context)
    told: list[list[Row]] = []

    def report(rows: list[Row]) -> bool:
        told.append(rows)
        return context.report(rows)

    ending, weights = pretrain(config, seed, dataset, probe, replace(context, report=report))
    if ending is Ending.COMPLETE and context.is_main:
        keep(context.shared, key, told, weights, context.folder)
    return ending, weights


def key_of(
    config: TrialConfig, seed: int, fingerprint: str, probe: ProbeConfig, context: Context
) -> str:
    """Equal for trials that pretrain alike and are asked the same at the same rungs."""
    content = content_of(config)
    del content["segment"]
    return digest(
        {
            "format": FORMAT,
            "config": content,
            "seed": seed,
            "data": fingerprint,
            "probe": probe.model_dump(mode="json"),
            "rungs": context.rungs,
            "device": context.device.type,
            "workers": context.world_size,
        }
    )[:16]


def find(shared: Path, key: str) -> Pretrained | None:
    """What was kept under the key; None if there is nothing, or nothing that can be read."""
    folder = shared / key
    try:
        rungs = json.loads((folder / "rows.json").read_text())
        return Pretrained(folder, rungs, load_file(folder / "weights.safetensors"))
    except (OSError, ValueError, SafetensorError):
        return None


def keep(shared: Path, key: str, rungs: list[list[Row]], weights: Weights, trial: Path) -> None:
    """Keep a finished pretraining for others; whoever comes second leaves the first one's.

    What cannot be read is replaced.
    """
    aside = shared / f".{key}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    durable.make_folder(aside)
    (aside / "rows.json").write_text(json.dumps(rungs))
    save_tensors(
        {name: value.detach().cpu().contiguous() for name, value in weights.items()},
        aside / "weights.safetensors",
    )
    for name in KEPT:
        if (trial / name).is_dir():
            shutil.copytree(trial / name, aside / name)
    if find(shared, key) is None:
        shutil.rmtree(shared / key, ignore_errors=True)
    try:
        durable.publish_folder(aside, shared / key)
    except OSError:
        if not (shared / key).is_dir():
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _replayed(done: Pretrained, context: Context) -> tuple[Ending, Weights]:
    """Report what another trial reported; the rule may stop this one where that went on."""
    for rows in done.rungs:
        if told_to_stop(rows, context):
            return Ending.STOPPED, done.weights
    if context.is_main:
        for name in KEPT:
            if (done.folder / name).is_dir():
                shutil.copytree(done.folder / name, context.folder / name, dirs_exist_ok=True)
                context.keep(name)
    return Ending.COMPLETE, done.weights
