"""A data set of bright discs on a dark ground, and a trial small enough for a test."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from trainables.blocks import Recomputable
from trainables.config import ProbeConfig, TrialConfig
from trainables.context import Context
from trainables.data import Dataset

PROBE = ProbeConfig(unit=8, images=6)


def discs(num_images=24, size=(16, 16), diameters=(3.0, 9.0), labelled=True, seed=0):
    """One disc in each image, at a random place; the diameters take turns."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    images = np.empty((num_images, 1, *size), np.uint8)
    masks = np.zeros((num_images, *size), np.uint8)
    for number in range(num_images):
        diameter = diameters[number % len(diameters)]
        y, x = (rng.uniform(diameter / 2, edge - diameter / 2) for edge in size)
        is_disc = (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 < diameter**2 / 4
        grey = np.where(is_disc, 200, 50) + rng.normal(0, 4, size)
        images[number, 0] = np.clip(grey, 0, 255)
        masks[number][is_disc] = 1
    num_train = num_images * 3 // 4
    numbers = [str(number) for number in range(num_images)]
    return Dataset(
        folder=Path("nowhere"),
        fingerprint=hashlib.sha256(images.tobytes()).hexdigest(),
        name="discs",
        size=size,
        channels=1,
        classes=["background", "disc"],
        small_classes=[1],
        mean=(float(images.mean() / 255),),
        std=(float(images.std() / 255),),
        low=0.0,
        high=255.0,
        object_edges=(4.0, 8.0),
        is_labelled=labelled,
        images=images,
        masks=masks,
        instances=None,
        names=numbers,
        groups=numbers,
        splits=np.array(["train"] * num_train + ["val"] * (num_images - num_train)),
        about={},
    )


def trial(**changes):
    """A pico model with 4-pixel patches: 18 images in batches of 4; the same on every processor."""
    settings = {
        "model": {"size": "pico", "patch": 4, "decoder": {"depth": 1, "width": 64}},
        "masking": {"ratio": {"name": "linear", "start": 0.25, "end": 0.75}},
        "pretrain": {
            "epochs": 3,
            "batch": 4,
            "optimizer": {"name": "adamw", "base_lr": 0.05},
            "precision": "fp32",
        },
        "segment": {"epochs": 2, "batch": 4, "features": 4, "precision": "fp32"},
    }
    for path, value in changes.items():
        phase, key = path.split("__")
        settings[phase][key] = value
    return TrialConfig.model_validate(settings)


class Diary:
    """What a ledger would have: the first value of every (phase, step, metric), and answers."""

    def __init__(self, crash_before=None, crash_after=None, stop_at=()):
        self.values, self.calls, self.beats = {}, [], []
        self.crash_before, self.crash_after, self.stop_at = crash_before, crash_after, stop_at

    def report(self, rows):
        place = (rows[0]["phase"], rows[0]["step"])
        if place == self.crash_before:
            raise Interrupted
        self.calls.append(place)
        for row in rows:
            self.values.setdefault((*place, row["metric"]), row)
        if place == self.crash_after:
            raise Interrupted
        return place in self.stop_at

    def heartbeat(self, *beat):
        self.beats.append(beat)


class Interrupted(BaseException):
    """The process ends here."""


def context(folder, diary, attempt="a1", **changes):
    settings = {
        "device": torch.device("cpu"),
        "folder": Path(folder),
        "attempt": attempt,
        "rungs": (0.25, 0.5, 1.0),
        "report": diary.report,
        "heartbeat": diary.heartbeat,
        "checkpoint_seconds": 0.0,
    }
    return Context(**(settings | changes))


# what a clock or the operating system says, which no rerun repeats
MEASURED = ("images_per_second", "device_seconds", "peak_memory")


def repeatable(diary):
    """(phase, step, metric) -> value of all that a rerun must repeat."""
    return {k: row["value"] for k, row in diary.values.items() if k[2] not in MEASURED}


def recomputing(monkeypatch):
    """The set that gets (kind of block, whether it recomputes) of all blocks that learn."""
    found = set()

    def spied(block, *inputs, real=Recomputable.__call__):
        if torch.is_grad_enabled() and not inputs[0].is_meta:  # there, operations are counted
            found.add((type(block), block.recomputes))
        return real(block, *inputs)

    monkeypatch.setattr(Recomputable, "__call__", spied)
    return found
