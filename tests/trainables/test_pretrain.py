"""The pretraining loop: order, rungs, interruptions, workers.

pytest tests/trainables/test_pretrain.py
"""

import contextlib
import json
import math
import multiprocessing
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as workers
from torch import nn

from tests import toy
from trainables import checkpoint, distributed, phase, pretrain
from trainables.blocks import Block
from trainables.config import ProbeConfig, TrialConfig
from trainables.cost import planned_flops
from trainables.data.batches import to_device
from trainables.distributed import batch_slice
from trainables.errors import UserError
from trainables.fillings import FILLINGS
from trainables.mae import build_mae
from trainables.masking import MaskRequest, pixels_hidden, split_indices
from trainables.phase import batches, is_epoch_end, rung_steps
from trainables.pictures import to_intensity
from trainables.pretrain import (
    batch_loss,
    choose_patches,
    make_learner,
    make_plan,
    train_step,
)
from trainables.probe import PROBED, probe_mask
from trainables.scores import psnr

torch.set_num_threads(1)

CPU = torch.device("cpu")
STEPS = 14  # round(3 epochs x 18 images / 4)


def run(folder, diary, config=None, data=None, resume=False, **surroundings):
    """Pretrain in `folder`; outcome and weights."""
    surroundings = toy.context(folder, diary, **surroundings)
    found = checkpoint.load_latest(folder / "checkpoints") if resume else None
    return pretrain.pretrain(
        config or toy.trial(), 5, data or toy.discs(), toy.PROBE, surroundings, found
    )


def plan_of(num_images, batch, epochs):
    config = toy.trial(pretrain__batch=batch, pretrain__epochs=epochs)
    return make_plan(config, (16, 16), 1, num_images, (0.5, 1.0), seed=0)


@pytest.mark.parametrize(("num_images", "batch"), [(10, 4), (12, 4), (7, 3), (3, 8), (5, 5)])
def test_every_image_is_seen_equally_often(num_images, batch):
    plan = plan_of(num_images, batch, epochs=batch)
    cut = list(batches(1, plan, 0, CPU))
    assert [step for step, _ in cut] == list(range(num_images))
    assert all(len(positions) == batch for _, positions in cut)
    seen = torch.cat([positions for _, positions in cut])
    assert seen.bincount(minlength=num_images).tolist() == [batch] * num_images
    for end in range(1, len(seen)):
        counts = seen[:end].bincount(minlength=num_images)
        assert counts.max() - counts.min() <= 1


def test_arms_of_equal_operations_report_equal_operations(tmp_path):
    """Of 16 and of 4 patches."""
    rows, steps = [], []
    for patch in (4, 8):
        settings = toy.trial(pretrain__epochs=None, pretrain__flops=2e9).model_dump(mode="json")
        settings["model"]["patch"] = patch
        config, diary = TrialConfig.model_validate(settings), toy.Diary()
        run(tmp_path / str(patch), diary, config)
        last = max(step for _, step, _ in diary.values)
        steps.append(last)
        rows.append(diary.values["pretrain", last, "flops"]["value"])
        assert rows[-1] == diary.values["pretrain", last, "planned_flops"]["value"]
        assert planned_flops(config, (16, 16), 1, 18) == pytest.approx(rows[-1], rel=0.02)
        assert abs(rows[-1] - 2e9) < 2e9 / last
    assert steps[1] > 2 * steps[0] > 10


def test_epochs_have_orders_of_their_own_and_a_resumed_run_meets_the_same():
    plan = plan_of(20, 5, epochs=4)
    cut = [positions.tolist() for _, positions in batches(1, plan, 0, CPU)]
    assert cut[:4] != cut[4:8]
    assert [positions.tolist() for _, positions in batches(1, plan, 6, CPU)] == cut[6:]
    assert [positions.tolist() for _, positions in batches(2, plan, 0, CPU)] != cut


def test_rungs_and_epochs_in_steps_by_hand():
    assert rung_steps((0.25, 0.5, 1.0), 14) == {4: 0.25, 7: 0.5, 14: 1.0}
    assert rung_steps((0.1, 0.25, 1.0), 2) == {1: 0.25, 2: 1.0}
    plan = plan_of(num_images=10, batch=4, epochs=2)
    assert [step for step in range(1, 6) if is_epoch_end(step, plan)] == [3, 5]
    assert plan.steps == 5 and plan.warmup_images == 1
    assert plan_of(num_images=3, batch=64, epochs=1).steps == 1


def test_a_rung_reports_what_was_agreed_and_costs_add_up(tmp_path):
    diary = toy.Diary()
    outcome, weights = run(tmp_path, diary)
    assert outcome == "complete"
    assert diary.calls == [("pretrain", 4), ("pretrain", 7), ("pretrain", 14)]
    names = {metric for _, _, metric in diary.values}
    assert PROBED.keys() >= {"probe_psnr", "probe_ssim"}
    assert names == {
        *("loss", "ratio", "images_per_second", "device_seconds", "flops", "planned_flops"),
        *("peak_memory", "probe_gain", *(f"probe_gain/{key}" for key in FILLINGS), *PROBED),
        *(f"{key}@{r}" for key in PROBED for r in (0.25, 0.5, 0.75)),
        *("native_psnr_hidden", "native_psnr_all"),
        *("dense_miou", "dense_knn_miou", "dense_miou_random", "dense_miou_pixels"),
    }
    last = diary.values["pretrain", 14, "flops"]
    assert last["value"] == diary.values["pretrain", 14, "planned_flops"]["value"]
    assert (last["goal"], last["unit"], last["progress"]) == ("minimize", "FLOP", 1.0)
    assert last["epoch"] == 14 * 4 / 18
    assert diary.values["pretrain", 7, "loss"]["progress"] == 0.5
    assert diary.values["pretrain", 7, "ratio"]["value"] == pytest.approx(0.5, abs=0.1)
    assert all(math.isfinite(row["value"]) for row in diary.values.values())
    assert weights.keys() == build_mae(toy.trial(), (16, 16), 1, 0).encoder.state_dict().keys()
    assert (tmp_path / "encoder" / "encoder.json").is_file()
    assert (tmp_path / "pictures" / "reconstruction.png").is_file()


def test_discs_smaller_than_the_patch_are_not_reconstructed_and_larger_ones_are(tmp_path):
    """Nothing of a disc within one hidden patch is left to see; a larger one shows elsewhere."""
    data = toy.discs(num_images=240, diameters=(2.5, 10.0))
    config = toy.trial(
        pretrain__epochs=40,
        pretrain__batch=16,
        pretrain__optimizer={"name": "adamw", "base_lr": 0.01},
        masking__ratio={"name": "constant", "value": 0.5},
    )
    diary, probe = toy.Diary(), ProbeConfig(unit=4, ratios=(0.5,), images=60)
    context = toy.context(tmp_path, diary, checkpoint_seconds=1e9)
    pretrain.pretrain(config, 5, data, probe, context)
    losses = [row["value"] for key, row in diary.values.items() if key[2] == "loss"]
    assert losses[0] > losses[1] > losses[2]
    assert diary.values["pretrain", 450, "probe_gain/mean"]["value"] > 1

    model = build_mae(config, data.size, 1, seed=5)
    model.load_state_dict(checkpoint.weights(checkpoint.load_latest(tmp_path / "checkpoints")[0]))
    rows = torch.as_tensor(data.rows("val"))
    images, _ = to_device(data, data.rows("val"), CPU).batch(torch.arange(len(rows)))
    is_hidden_BP, hidden = probe_mask(probe, 0.5, data.size, (4, 4), rows)
    is_hidden = pixels_hidden(is_hidden_BP, (4, 4), (4, 4))
    with torch.no_grad():
        guess = model.reconstruct(images, *split_indices(is_hidden_BP, hidden))
    guess, truth = (to_intensity(picture, data.mean, data.std) for picture in (guess, images))

    on_disc = is_hidden & torch.as_tensor(data.masks[rows] == 1)
    filled = [
        FILLINGS["mean"].fill(image, ~hidden, hidden)
        for image, hidden in zip(truth.numpy(), is_hidden.numpy(), strict=True)
    ]
    trivial = psnr(torch.from_numpy(np.stack(filled)), truth, on_disc)
    gain = psnr(guess, truth, on_disc) - trivial
    small, large = (gain[(rows % 2 == turn) & on_disc.any(dim=(1, 2))] for turn in (0, 1))
    assert min(len(small), len(large)) > 15
    assert small.mean() < 0.5 and large.mean() > small.mean() + 1.5


def test_rows_are_reported_before_the_checkpoint_and_the_checkpoint_before_the_stop(tmp_path):
    seen = []

    class Watching(toy.Diary):
        def report(self, rows):
            found = checkpoint.load_latest(tmp_path / "checkpoints")
            seen.append((rows[0]["step"], found and found[1]["step"]))
            return super().report(rows)

    outcome, _ = run(tmp_path, Watching(stop_at=[("pretrain", 7)]), checkpoint_seconds=1e9)
    assert outcome == "stopped"
    assert seen == [(4, None), (7, 4)]
    assert checkpoint.load_latest(tmp_path / "checkpoints")[1]["step"] == 7


def test_nothing_waits_for_the_device_within_an_epoch(tmp_path, monkeypatch):
    """On a GPU each of these would stall the queue; CPU tensors are counted in its stead."""
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu"):
        real = getattr(torch.Tensor, name)

        def counted(tensor, *args, real=real, name=name):
            waits.append(name)
            return real(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def waits_until(step):
        waits.clear()
        seen = []
        with monkeypatch.context() as watching:
            real = phase.learning_rate
            watching.setattr(
                phase, "learning_rate", lambda *args: seen.append(len(waits)) or real(*args)
            )
            run(tmp_path / str(step), toy.Diary())
        return seen[step]

    before, after = waits_until(0), waits_until(3)  # the first rung is at 4, the first epoch at 5
    assert before == after


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder, diary = tmp_path_factory.mktemp("whole"), toy.Diary()
    outcome, _ = run(folder, diary)
    assert outcome == "complete"
    return checkpoint.load_latest(folder / "checkpoints")[0], toy.repeatable(diary)


@pytest.mark.parametrize(
    "end",
    [
        *({"step": step} for step in (2, 5, 6, 8, 11, 13)),
        {"crash_before": ("pretrain", 7)},
        {"crash_after": ("pretrain", 7)},
        {"crash_after": ("pretrain", 14)},
    ],
    ids=lambda end: "-".join(f"{key}-{value}" for key, value in end.items()),
)
def test_an_interrupted_run_ends_bit_by_bit_as_an_uninterrupted_one(
    tmp_path, monkeypatch, uninterrupted, end
):
    step = end.pop("step", None)
    first = toy.Diary(**end)

    def learning_rate(images_seen, *args, real=phase.learning_rate):
        if images_seen // 4 == step:
            raise toy.Interrupted
        return real(images_seen, *args)

    with monkeypatch.context() as crashing, pytest.raises(toy.Interrupted):
        crashing.setattr(phase, "learning_rate", learning_rate)
        run(tmp_path, first)
    second = toy.Diary()
    assert run(tmp_path, second, attempt="a2", resume=True)[0] == "complete"

    weights, values = uninterrupted
    found = checkpoint.load_latest(tmp_path / "checkpoints")[0]
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)
    assert toy.repeatable(first) | toy.repeatable(second) == values
    assert values.items() >= toy.repeatable(first).items()
    if step in (8, 11, 13):  # it did go on from a checkpoint
        assert ("pretrain", 4) not in second.calls


@pytest.mark.parametrize("strategy", ["anatomask", "hpm", "amlp"])
def test_a_strategy_with_parts_of_its_own_goes_on_bit_by_bit(tmp_path, monkeypatch, strategy):
    config = toy.trial(
        masking__strategy=STRATEGIES[strategy],
        masking__ratio={"name": "uniform", "low": 0.2, "high": 0.8},
    )
    whole, diary = toy.Diary(), toy.Diary()
    assert run(tmp_path / "whole", whole, config)[0] == "complete"
    cut = toy.Diary(crash_after=("pretrain", 7))
    with pytest.raises(toy.Interrupted):
        run(tmp_path / "cut", cut, config)
    assert run(tmp_path / "cut", diary, config, resume=True, attempt="a2")[0] == "complete"
    assert toy.repeatable(cut) | toy.repeatable(diary) == toy.repeatable(whole)
    expected, found = (
        checkpoint.load_latest(tmp_path / name / "checkpoints")[0] for name in ("whole", "cut")
    )
    assert expected.keys() == found.keys()
    assert any(name.startswith("teacher/") for name in found) == (strategy != "amlp")
    assert all(value.equal(found[name]) for name, value in expected.items())


def test_a_run_stopped_at_a_rung_asks_again_and_may_go_on(tmp_path, uninterrupted):
    stopping = toy.Diary(stop_at=[("pretrain", 7)])
    assert run(tmp_path, stopping)[0] == "stopped"
    again = toy.Diary(stop_at=[("pretrain", 7)])
    assert run(tmp_path, again, attempt="a2", resume=True)[0] == "stopped"
    assert again.calls == [("pretrain", 7)]
    assert toy.repeatable(again).items() <= toy.repeatable(stopping).items()
    going_on = toy.Diary()
    assert run(tmp_path, going_on, attempt="a3", resume=True)[0] == "complete"
    assert going_on.calls == [("pretrain", 7), ("pretrain", 14)]
    assert toy.repeatable(stopping) | toy.repeatable(going_on) == uninterrupted[1]


def test_a_finished_run_only_writes_its_results_again(tmp_path):
    run(tmp_path, toy.Diary())
    before = (tmp_path / "encoder" / "encoder.json").read_text()
    (tmp_path / "encoder" / "encoder.json").unlink()
    again = toy.Diary()
    assert run(tmp_path, again, attempt="a2", resume=True)[0] == "complete"
    assert again.calls == [("pretrain", 14)]
    assert (tmp_path / "encoder" / "encoder.json").read_text() == before


def test_a_run_that_diverges_says_so_and_keeps_a_finite_checkpoint(tmp_path):
    diary = toy.Diary()
    config = toy.trial(pretrain__optimizer={"name": "adamw", "base_lr": 1e30})
    assert run(tmp_path, diary, config)[0] == "diverged"
    assert all(math.isfinite(row["value"]) for row in diary.values.values())
    assert ("pretrain", 14) not in diary.calls
    found = checkpoint.load_latest(tmp_path / "checkpoints")
    assert found is None or all(value.isfinite().all() for value in found[0].values())


def test_a_nan_in_one_step_is_found_at_the_end_of_the_epoch(tmp_path, monkeypatch):
    steps = []

    def poisoned(learner, images, config, seed, plan, step, *rest, real=pretrain.batch_loss):
        steps.append(step)
        loss = real(learner, images, config, seed, plan, step, *rest)
        return loss * float("nan") if step == 7 else loss

    monkeypatch.setattr(pretrain, "batch_loss", poisoned)
    diary = toy.Diary()
    assert run(tmp_path, diary)[0] == "diverged"
    assert diary.calls == [("pretrain", 4), ("pretrain", 7)]
    assert steps[-1] == 8  # the second epoch ends with the ninth step, the next rung is at 14


def test_long_epochs_are_looked_at_and_saved_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "MOST_STEPS", 3)
    steps, long_epochs = [], toy.trial(pretrain__batch=1, pretrain__epochs=1)  # of 18 steps

    def leaves(name, step):
        steps.append(step)
        return step == 8

    whole = run(tmp_path / "whole", toy.Diary(), long_epochs)[1]
    folder = tmp_path / "cut"
    cut = {"checkpoint_seconds": 0.0, "is_leaving": leaves}
    assert run(folder, toy.Diary(), long_epochs, **cut)[0] == "leaving"
    names = sorted(path.name[-2:] for path in (folder / "checkpoints").iterdir())
    assert names == ["06", "08"]
    ending, weights = run(folder, toy.Diary(), long_epochs, resume=True)
    assert ending == "complete"
    assert all(value.equal(whole[name]) for name, value in weights.items())


def test_a_split_without_images_is_the_users_to_mend(tmp_path):
    everything_else = toy.discs(num_images=1)
    with pytest.raises(UserError, match="no image of discs is in the pretrain split"):
        run(tmp_path, toy.Diary(), data=everything_else)


def test_a_batch_that_workers_cannot_share_evenly_is_refused(tmp_path):
    three = toy.context(tmp_path, toy.Diary(), world_size=3, rank=1)
    with pytest.raises(
        UserError, match=r"pretrain.batch: 4 images .* over 3 workers.*multiple of 3"
    ):
        batch_slice(4, three, "pretrain.batch")
    assert batch_slice(12, three, "pretrain.batch") == slice(4, 8)


# One of each kind: looks at nothing, has a teacher, and trains parts of its own
STRATEGIES = {
    "random": {"name": "random"},
    "anatomask": {
        "name": "anatomask",
        "guided": {"name": "constant", "value": 0.8},
        "momentum": {"name": "linear", "start": 0.5, "end": 0.9},
    },
    "hpm": {"name": "hpm", "momentum": {"name": "constant", "value": 0.7}},
    "amlp": {"name": "amlp", "category_weight": 0.1, "lesion": "highest_loss"},
}


def meet_batches(config, context, first_step):
    """(learner, plan, an iterator of (images, step, places)) of this worker."""
    data = toy.discs()
    plan = make_plan(config, data.size, 1, 18, (1.0,), 5)
    share = batch_slice(plan.batch, context, "pretrain.batch")
    learner = make_learner(config, data.size, 1, 5, context)
    images = to_device(data, data.rows("pretrain"), CPU)
    places = torch.arange(plan.batch)[share]
    cut = batches(5, plan, first_step, CPU)
    return learner, plan, ((images.batch(p[share])[0], step, places) for step, p in cut)


def test_visible_units_are_replaced_whole_and_hidden_ones_never():
    """16 units of 2 x 2 patches, 8 hidden; a quarter of the other 8 is replaced."""
    config = toy.trial(masking__unit=8, masking__secondary=0.25)
    request = MaskRequest((4, 4), 8, 0.0, 0, 0, torch.arange(5), patches_per_unit=(2, 2))
    visible_BV, hidden_BX, is_replaced_BV = choose_patches(config, request)
    assert is_replaced_BV.sum(1).tolist() == [8] * 5
    is_replaced_BP = torch.zeros(5, 64, dtype=torch.bool).scatter(1, visible_BV, is_replaced_BV)
    assert not is_replaced_BP.gather(1, hidden_BX).any()
    of_unit = is_replaced_BP.reshape(5, 4, 2, 4, 2)
    assert of_unit.all(dim=(2, 4)).sum(dim=(1, 2)).tolist() == [2] * 5
    assert len({tuple(row) for row in is_replaced_BP.tolist()}) == 5
    assert choose_patches(toy.trial(), request)[2] is None


def test_a_share_of_the_hidden_patches_is_predicted():
    config = toy.trial(
        model__decoder={"attention": "cross", "predicted": 0.5, "depth": 1, "width": 64}
    )
    request = MaskRequest((4, 4), 9, 0.0, 0, 0, torch.arange(200))
    _, every_BX, _ = choose_patches(toy.trial(), request)
    _, some_BX, _ = choose_patches(config, request)
    assert some_BX.shape == (200, 4)  # round(4.5) to even
    assert all(len(set(row)) == 4 for row in some_BX.tolist())
    assert (some_BX[..., None] == every_BX[:, None]).any(-1).all()
    assert some_BX.flatten().bincount().min() > 20  # of 50 expected


def gradients_of_step(context, strategy):
    config = toy.trial(masking__strategy=STRATEGIES[strategy])
    learner, plan, cut = meet_batches(config, context, 6)
    images, step, places = next(cut)
    batch_loss(learner, images, config, 5, plan, step, places).backward()
    return {name: parameter.grad for name, parameter in learner.model.named_parameters()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_asks_the_teacher_where_there_is_one(tmp_path, monkeypatch, strategy):
    asked = []

    def choose(config, request, real=pretrain.choose_patches):
        asked.append(request.model)
        return real(config, request)

    monkeypatch.setattr(pretrain, "choose_patches", choose)
    config = toy.trial(masking__strategy=STRATEGIES[strategy])
    learner, plan, cut = meet_batches(config, toy.context(tmp_path, toy.Diary()), 0)
    images, step, places = next(cut)
    batch_loss(learner, images, config, 5, plan, step, places)
    assert (learner.teacher is None) == (strategy in ("random", "amlp"))
    assert asked[0] is (learner.teacher or learner.model)


def weights_after_steps(context, strategy, steps=3):
    """Of the model and, if there is one, of its teacher."""
    config = toy.trial(masking__strategy=STRATEGIES[strategy])
    learner, plan, cut = meet_batches(config, context, 0)
    for _ in range(steps):
        images, step, places = next(cut)
        train_step(learner, images, config, 5, plan, step, places)
    both = {"model": learner.model, "teacher": learner.teacher}
    return {
        f"{part}/{name}": value
        for part, module in both.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def work(rank, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", meet, timedelta(seconds=30), rank=rank, world_size=2)
    diary = toy.Diary()
    context = toy.context(folder, diary, rank=rank, world_size=2)
    gradients = {strategy: gradients_of_step(context, strategy) for strategy in STRATEGIES}
    stepped = {strategy: weights_after_steps(context, strategy) for strategy in STRATEGIES}
    outcome, weights = pretrain.pretrain(toy.trial(), 5, toy.discs(), toy.PROBE, context)
    torch.save([gradients, weights, stepped], folder / f"{rank}.pt")
    summary = [outcome, sorted([*k, v] for k, v in toy.repeatable(diary).items())]
    (folder / f"{rank}.json").write_text(json.dumps(summary))
    diary = toy.Diary()
    context = toy.context(folder / "parts", diary, rank=rank, world_size=2, micro_batches=2)
    pretrain.pretrain(toy.trial(), 5, toy.discs(), toy.PROBE, context)
    wrapped = distributed.data_parallel(nn.Linear(1, 1), context)
    with phase.unsynced(wrapped):
        stays = not wrapped.require_backward_grad_sync
    if rank == 0:
        rows = sorted([*k, v] for k, v in toy.repeatable(diary).items())
        (folder / "parts.json").write_text(json.dumps([stays, rows]))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """What two gloo workers come to, each with half of every batch."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.set_forkserver_preload(["trainables.pretrain"])
    workers.start_processes(work, (folder,), nprocs=2, start_method="forkserver")
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_workers_have_the_gradients_of_one(two_workers, tmp_path, strategy):
    whole = gradients_of_step(toy.context(tmp_path, toy.Diary()), strategy)
    largest = max(gradient.abs().max() for gradient in whole.values())
    for rank in (0, 1):
        halves = torch.load(two_workers / f"{rank}.pt")[0][strategy]
        for name, gradient in whole.items():
            torch.testing.assert_close(halves[name], gradient, atol=1e-6 * largest, rtol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_worker_has_the_same_teacher(two_workers, tmp_path, strategy):
    first, second = (torch.load(two_workers / f"{rank}.pt")[2][strategy] for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    alone = weights_after_steps(toy.context(tmp_path, toy.Diary()), strategy)
    for name, value in alone.items():
        if name.endswith(("qkv.bias", "predictor.head.bias", "predictor.norm.bias")):
            continue  # the loss does not feel (all of) it, and Adam gives rounding full weight
        assert (first[name] - value).abs().mean() < 2e-4, name


def assert_nearly_the_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-3), key


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_a_batch_is_learnt_in_parts_as_it_is_whole(uninterrupted, tmp_path, monkeypatch, parts):
    sizes = []

    def spied(learner, images, *rest, real=pretrain.batch_loss):
        sizes.append(len(images))
        return real(learner, images, *rest)

    monkeypatch.setattr(pretrain, "batch_loss", spied)
    diary = toy.Diary()
    assert run(tmp_path, diary, micro_batches=parts)[0] == "complete"
    assert sizes == {2: [2, 2], 3: [1, 1, 2], 9: [1, 1, 1, 1]}[parts] * STEPS
    assert_nearly_the_same(toy.repeatable(diary), uninterrupted[1])


def test_blocks_that_recompute_change_no_number(uninterrupted, tmp_path, monkeypatch):
    recomputed = toy.recomputing(monkeypatch)
    diary = toy.Diary()
    assert run(tmp_path, diary, recomputes=True)[0] == "complete"
    assert recomputed == {(Block, True)}
    tensors = checkpoint.load_latest(tmp_path / "checkpoints").tensors
    assert all(tensors[name].equal(value) for name, value in uninterrupted[0].items())
    assert toy.repeatable(diary) == uninterrupted[1]


def test_two_workers_learn_in_parts_what_one_learns(two_workers, uninterrupted):
    gradients_stay, rows = json.loads((two_workers / "parts.json").read_text())
    assert gradients_stay
    assert_nearly_the_same({tuple(key): value for *key, value in rows}, uninterrupted[1])


def test_workers_exchange_gradients_once_a_batch(tmp_path, monkeypatch):
    order = []

    @contextlib.contextmanager
    def apart(model):
        order.append("apart")
        yield

    def updated(learner, loss, plan, step, real=phase.update):
        order.append("together")
        return real(learner, loss, plan, step)

    monkeypatch.setattr(phase, "unsynced", apart)
    monkeypatch.setattr(phase, "update", updated)
    run(tmp_path, toy.Diary(), micro_batches=3)
    assert order == ["apart", "apart", "together"] * STEPS


def test_two_workers_come_to_the_rows_of_one(two_workers, uninterrupted):
    outcome, rows = json.loads((two_workers / "0.json").read_text())
    found = {tuple(key): value for *key, value in rows}
    assert outcome == "complete"
    assert_nearly_the_same(found, uninterrupted[1])
    assert json.loads((two_workers / "1.json").read_text()) == ["complete", []]
    first, second = (torch.load(two_workers / f"{rank}.pt")[1] for rank in (0, 1))
    assert all(first[name].equal(second[name]) for name in first)
