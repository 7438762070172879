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
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from trainables import durable
from trainables.config import ProbeConfig, TrialConfig, content_of
from trainables.context import Context, Row
from trainables.settings import digest

FORMAT = 1  # raise it when the same settings would train other weights or report other rows
KEPT = ("pictures", "encoder")  # folders of a trial


@dataclass(frozen=True)
class Pretrained:
    """What a finished pretraining left."""

    folder: Path
    rungs: list[list[Row]]

    def weights(self) -> dict[str, Tensor]:
        """The encoder's."""
        weights: dict[str, Tensor] = load_file(self.folder / "weights.safetensors")
        return weights

    def copy_to(self, trial: Path) -> None:
        """Put its pictures and its exported encoder into a trial's folder."""
        for name in KEPT:
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, trial / name, dirs_exist_ok=True)


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
    except (OSError, ValueError):
        return None
    return Pretrained(folder, rungs) if (folder / "weights.safetensors").is_file() else None


def keep(
    shared: Path, key: str, rungs: list[list[Row]], weights: dict[str, Tensor], trial: Path
) -> None:
    """Keep a finished pretraining for others; whoever comes second leaves the first one's.

    What cannot be read is replaced.
    """
    aside = shared / f".{key}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    durable.make_folder(aside)
    (aside / "rows.json").write_text(json.dumps(rungs))
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in weights.items()},
        aside / "weights.safetensors",
    )
    for name in KEPT:
        if (trial / name).is_dir():
            shutil.copytree(trial / name, aside / name)
    if find(shared, key) is None:
        shutil.rmtree(shared / key, ignore_errors=True)
    try:
        durable.rename(aside, shared / key)
    except OSError:
        if not (shared / key).is_dir():
            raise
        shutil.rmtree(aside, ignore_errors=True)
