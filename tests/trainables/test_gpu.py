"""What only a GPU shows: pytest -m gpu. All of it, and the bench: tests/gpu.sh.

Whole trials need Ray nowhere here; one process of the test runs them, as a warm worker would.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests import toy
from tests.balls import PROBE, balls
from tests.balls import trial as volume_trial
from trainables import checkpoint, segment
from trainables.augment import AUGMENTATIONS
from trainables.counter import uniform
from trainables.data.batches import free_memory, to_device
from trainables.hiding import hide
from trainables.masking import MASKING, MaskRequest
from trainables.phase import update
from trainables.pretrain import batch_loss, make_learner, make_plan, pretrain
from trainables.trial import run_trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
KINDS = ("images", "volumes", "padded volumes")
WHOLE = [(8, 12, 11), (13, 12, 8), (8, 15, 9), (10, 12, 8), (9, 14, 10), (8, 12, 9)]


def subject(kind, tmp_path, strategy="random", **changes):
    """(trial, its data)."""
    changes = {"masking__strategy": {"name": strategy}, "pretrain__precision": "fp32", **changes}
    if kind == "images":
        return toy.trial(**changes), toy.discs()
    shapes = {} if kind == "padded volumes" else {"shapes": WHOLE}
    return volume_trial(pretrain__epochs=3, **changes), balls(tmp_path, **shapes)


def learning(kind, tmp_path, strategy, device, world_size=1):
    """(one step of training by its number, the learner) on the device."""
    config, data = subject(kind, tmp_path, strategy)
    context = toy.context(tmp_path, toy.Diary(), device=device, world_size=world_size)
    plan = make_plan(config, data.size, data.channels, 8, (1.0,), seed=1)
    learner = make_learner(config, data.size, data.channels, 1, context, is_padded=data.is_padded)
    resident = to_device(data, data.rows("pretrain"), device, labels=False)
    samples_B = torch.arange(4, device=device)

    def step(number):
        index_B = (samples_B + 4 * number) % len(resident)
        images, _ = resident.draw(index_B, 1, number, samples_B)
        loss = batch_loss(learner, images, config, 1, plan, number, samples_B)
        return update(learner, loss, plan, number)

    return step, learner


@contextlib.contextmanager
def no_waiting():
    """Whoever waits for the GPU fails."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", MASKING)
def test_no_step_of_pretraining_waits_for_the_device(kind, strategy, tmp_path):
    step, _ = learning(kind, tmp_path, strategy, CUDA)
    step(0)  # kernels load
    with no_waiting():
        losses = [step(number) for number in (1, 2)]
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_segmentation_waits_for_the_device(kind, tmp_path):
    config, data = subject(kind, tmp_path)
    context = toy.context(tmp_path, toy.Diary(), device=CUDA)
    learner = segment.make_learner(config, 1, data, None, context, steps=4)
    plan = segment.make_plan(config, data, context, len(data.rows("train")))
    resident = to_device(data, data.rows("train"), CUDA)
    samples_B = torch.arange(2, device=CUDA)
    augment = config.segment.augment

    def step(number):
        images, labels = resident.draw(samples_B, 1, number, samples_B, foreground=0.5)
        images, labels = AUGMENTATIONS[augment.name](
            images, labels, 1, number, samples_B, **augment.options()
        )
        loss = segment.dice_cross_entropy(learner.trained(images), labels)
        return update(learner, loss, plan, 0)

    step(0)
    with no_waiting():
        step(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", MASKING)
def test_a_step_is_that_of_the_cpu(kind, strategy, tmp_path):
    here, there = (
        learning(kind, tmp_path / device.type, strategy, device)[0] for device in (CPU, CUDA)
    )
    torch.testing.assert_close(there(0).cpu(), here(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["random", "uniform", "grid", "block", "color", "multiblock"])
def test_masks_and_order_are_bit_by_bit_those_of_the_cpu(strategy):
    config = toy.trial(masking__strategy={"name": strategy})
    masks = []
    for device in (CPU, CUDA):
        request = MaskRequest(
            grid=(8, 8),
            hidden=24,
            progress=0.3,
            seed=5,
            step=7,
            samples_B=torch.arange(16, device=device),
            patches_per_unit=(1, 1),
        )
        masks.append(hide(config, request).cpu())
    assert masks[0].equal(masks[1])
    draws = [uniform(5, "order", 7, torch.arange(64, device=each), 9) for each in (CPU, CUDA)]
    assert draws[0].equal(draws[1].cpu())


def test_a_killed_trial_goes_on_from_its_checkpoint(tmp_path):
    config, data = subject("images", tmp_path)
    scores = {}
    for name, how in (("whole", {}), ("cut", {"crash_after": ("pretrain", 7)})):
        diary = toy.Diary(**how)
        with contextlib.suppress(toy.Interrupted):
            pretrain(config, 5, data, toy.PROBE, toy.context(tmp_path / name, diary, device=CUDA))
        saved = checkpoint.load_latest(tmp_path / name / "checkpoints")
        if how:
            assert 0 < saved.state["step"] < 14
            diary = toy.Diary()
            again = toy.context(tmp_path / name, diary, attempt="a2", device=CUDA)
            pretrain(config, 5, data, toy.PROBE, again, saved)
        scores[name] = diary.values["pretrain", 14, "probe_psnr"]["value"]
    assert scores["cut"] == pytest.approx(scores["whole"], abs=0.05)


def test_after_an_arm_that_ran_out_of_memory_the_next_one_is_whole(tmp_path):
    large = toy.trial(model__size="huge", pretrain__batch=4, segment__epochs=1)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run_trial(
                large,
                1,
                toy.discs(),
                toy.PROBE,
                toy.context(tmp_path / "large", toy.Diary(), device=CUDA),
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()
    config, data = subject("images", tmp_path)
    diary = toy.Diary()
    ending = run_trial(
        config, 1, data, toy.PROBE, toy.context(tmp_path / "next", diary, device=CUDA)
    )
    assert ending == "complete"
    assert torch.cuda.memory_allocated() - before < 64 * 2**20  # nothing of either is left


def test_memory_that_torch_keeps_counts_as_free():
    free = free_memory(CUDA)
    kept = torch.empty(2**28, dtype=torch.uint8, device=CUDA)
    assert free - free_memory(CUDA) == pytest.approx(2**28, rel=0.1)
    del kept
    assert free_memory(CUDA) == pytest.approx(free, abs=2**24)


ASSERTS = """
import torch
from trainables.ray_worker import _answers
place = torch.arange(4, device="cuda")
use = lambda: torch.ones(1).cuda() + 1
assert _answers(use)
try:
    place[place + 9].sum().item()
except RuntimeError:
    print("spent" if not _answers(use) else "answers")
"""


def test_a_device_that_has_failed_an_assertion_is_known_to_be_spent():
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-c", ASSERTS], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["spent"]


def test_one_rank_of_nccl_learns_what_no_group_learns(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    alone, _ = learning("images", tmp_path, "random", CUDA)
    expected = [alone(number).item() for number in range(3)]
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        step, learner = learning("images", tmp_path, "random", CUDA, world_size=2)
        assert isinstance(learner.trained, DistributedDataParallel)
        assert [step(number).item() for number in range(3)] == pytest.approx(expected, rel=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_whole_volumes_have_the_labels_of_the_cpu(kind, tmp_path):
    config, data = subject(kind, tmp_path)
    labels = []
    for device in (CPU, CUDA):
        context = toy.context(tmp_path, toy.Diary(), device=device)
        model = segment.make_learner(config, 1, data, None, context, steps=4).model
        labels.append(
            [
                segment.predict_volume(
                    model, data, volume, config.segment, device, lambda: None, as_filed=True
                ).numpy()
                for volume in data.volumes_of("val").tolist()
            ]
        )
    for here, there in zip(*labels, strict=True):
        assert here.ndim == 4
        assert np.mean(here == there) > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_trial_scores_as_on_the_cpu_resident_or_not(kind, tmp_path, monkeypatch):
    found = {}
    for name, device, share in (("cpu", CPU, 0.5), ("gpu", CUDA, 0.5), ("host", CUDA, 0.0)):
        monkeypatch.setattr("trainables.data.batches.RESIDENT_SHARE", share)
        config, data = subject(kind, tmp_path / name)
        diary = toy.Diary()
        context = toy.context(tmp_path / name, diary, device=device)
        probe = toy.PROBE if kind == "images" else PROBE
        assert run_trial(config, 5, data, probe, context) == "complete"
        last = max(step for phase, step, _ in diary.values if phase == "pretrain")
        found[name] = diary.values["pretrain", last, "probe_psnr"]["value"]
    assert found["gpu"] == pytest.approx(found["cpu"], abs=0.3)
    assert found["host"] == pytest.approx(found["gpu"], abs=0.05)
