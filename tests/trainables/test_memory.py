"""Memory that training on large volumes takes: that of crops and of one volume, not of the data.

glibc keeps freed memory for later, and how much it keeps depends on chance: without a fixed
threshold a phase is blamed for what an earlier one gave back, or is given it for nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHAPE = (256, 256, 160)
MIB = 2**20
VOXELS = SHAPE[0] * SHAPE[1] * SHAPE[2]

SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import numpy as np, torch
import torch._dynamo  # the first optimizer does so: 65 MiB that are no phase's
from trainables.config import TrialConfig
from trainables.context import Context
from trainables.data import open_dataset
from trainables.data.batches import to_device
from trainables.data.source import Decoded, Source, Whole
from trainables.data.store import write
from trainables.phase import batches
from trainables.pretrain import make_learner, make_plan, train_step
from trainables.segment import predict_volume
from trainables.unetr import build_unetr

torch.set_num_threads(1)
SHAPE, SIZE, COUNT = (256, 256, 160), (64, 64, 64), 6
peak, looking = 0, threading.Lock()

def own_mib():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

def watch():
    global peak
    while True:
        with looking:
            peak = max(peak, own_mib())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
found = {}

def phase(name, task):
    global peak
    with looking:  # or a look begun before would bring in the peak of the phase before
        before = peak = own_mib()
    result = task()
    found[name] = max(peak, own_mib()) - before
    return result

def decode(part):
    levels = np.zeros((1, 1, *SHAPE), np.uint16)
    levels[..., part * 10 : part * 10 + 50] = 40_000
    return Decoded(levels, (levels[0] > 0).astype(np.uint8))

names = [str(number) for number in range(COUNT)]
source = Source(
    name="large", identity="one", size=SIZE, channels=1, dtype="uint16",
    classes=["background", "body"], small_classes=[], window=(0, 65535), is_labelled=True,
    has_instances=False, names=names, groups=names, splits=["train"] * 5 + ["val"],
    parts=[range(n, n + 1) for n in range(COUNT)], decode=decode, notes=[],
    whole=Whole([SHAPE] * COUNT, [(1.0, 1.0, 1.0)] * COUNT, 0.25, 1.0, 2**31),
)
dataset = phase("prepare", lambda: open_dataset(write(source, Path(sys.argv[1]))))
config = TrialConfig.model_validate({
    "model": {"size": "pico", "patch": 16, "decoder": {"depth": 1, "width": 64}},
    "pretrain": {"epochs": 1, "batch": 2}, "segment": {"features": 4, "batch": 2},
})
context = Context(torch.device("cpu"), Path(), "a", (1.0,), lambda _: False, lambda *_: None)

def pretrain():
    learner = make_learner(config, SIZE, 1, 0, context)
    plan = make_plan(config, SIZE, 1, 40, (1.0,), 0)
    images = to_device(dataset, dataset.rows("pretrain"), context.device, labels=False)
    samples = torch.arange(2)
    for step, places in batches(0, plan, 0, images.rows.device):
        batch, _ = images.draw(places, 0, step, samples)
        train_step(learner, batch, config, 0, plan, step, samples)

phase("pretrain", pretrain)
model = build_unetr(config, SIZE, 1, 2)
phase("segment", lambda: predict_volume(model, dataset, 5, config.segment, context.device))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """MiB that each phase took beyond what the process had, without the files it maps."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux, which tells a process's own memory from files it maps")
    script = [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("cache"))]
    # arrays over 128 KiB are mapped on their own, and given back when they are freed
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def test_preparing_takes_the_memory_of_one_volume_at_a_time(grown):
    # what this source decodes has 2 + 1 bytes a voxel, and looking for objects takes 8 to 14 more
    assert grown["prepare"] < 20 * VOXELS / MIB


def test_pretraining_takes_the_memory_of_its_crops(grown):
    # all volumes are 120 MiB of levels; a batch is 2 MiB as float32
    assert grown["pretrain"] < 60


def test_a_whole_volume_takes_some_floats_a_voxel_and_one_batch_of_windows(grown):
    # standardised, scores of two classes, weights, and as much again: 8 float32 a voxel
    assert grown["segment"] < 8 * 4 * VOXELS / MIB + 150
