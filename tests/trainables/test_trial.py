"""A whole trial, from pretraining to segmentation: `pytest tests/trainables/test_trial.py`."""

import json
import math
import multiprocessing
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as workers

from tests import toy
from trainables import checkpoint, phase
from trainables.endings import Ending
from trainables.sharing import find
from trainables.trial import run_trial

torch.set_num_threads(1)

PRETRAIN = [("pretrain", step) for step in (4, 7, 14)]
SEGMENT = [("segment", step) for step in (2, 4, 9)]  # round(2 epochs x 18 images / 4) = 9


def run(folder, diary, config=None, data=None, **surroundings):
    surroundings = toy.context(folder, diary, **surroundings)
    return run_trial(config or toy.trial(), 5, data or toy.discs(), toy.PROBE, surroundings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder, diary = tmp_path_factory.mktemp("whole"), toy.Diary()
    assert run(folder, diary) == "complete"
    assert diary.calls == PRETRAIN + SEGMENT
    return checkpoint.load_latest(folder / "checkpoints")[0], toy.repeatable(diary), folder


def test_a_trial_leaves_what_was_promised(uninterrupted):
    _, values, folder = uninterrupted
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert [name for name in left if not name.startswith("checkpoints")] == [
        "encoder/encoder.json",
        "encoder/encoder.safetensors",
        *(f"pictures/masks-{percent:03d}.png" for percent in (0, 25, 50, 100)),
        "pictures/masks.json",
        "pictures/reconstruction.png",
        "pictures/segmentation.png",
    ]
    assert len({name.split("/")[1] for name in left if name.startswith("checkpoints")}) == 2
    assert {"miou", "iou/disc", "object_f1", "loss"} <= {name for _, _, name in values}
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize(
    "end",
    [
        {"pretrain": 9},
        *({"segment": step} for step in (0, 3, 6, 8)),
        {"crash_before": ("segment", 4)},
        {"crash_after": ("segment", 4)},
        {"crash_after": ("segment", 9)},
    ],
    ids=lambda end: "-".join(f"{key}-{value}" for key, value in end.items()),
)
def test_an_interrupted_trial_ends_bit_by_bit_as_an_uninterrupted_one(
    tmp_path, monkeypatch, uninterrupted, end
):
    first = toy.Diary(**{key: value for key, value in end.items() if key.startswith("crash")})

    def update(learner, loss, plan, step, real=phase.update):
        if step == end.get(plan.phase):
            raise toy.Interrupted
        return real(learner, loss, plan, step)

    with monkeypatch.context() as crashing, pytest.raises(toy.Interrupted):
        crashing.setattr(phase, "update", update)
        run(tmp_path, first)

    second = toy.Diary()
    assert run(tmp_path, second, attempt="a2") == "complete"
    weights, values, _ = uninterrupted
    found = checkpoint.load_latest(tmp_path / "checkpoints")[0]
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)
    assert toy.repeatable(first) | toy.repeatable(second) == values
    assert toy.repeatable(first).items() <= values.items()
    assert ("pretrain", 4) not in second.calls
    if end.get("segment", 0) > 4:  # it went on within the phase
        assert ("segment", 2) not in second.calls


@pytest.mark.parametrize(
    "places",
    [
        [("pretrain", 1), ("pretrain", 5), ("pretrain", 6)],  # within the first and second epoch
        [("pretrain", 4), ("pretrain", 10), ("segment", 8)],  # at a rung, and two more times
        [("pretrain", 14), ("segment", 1), ("segment", 9)],  # after the last step nothing is left
    ],
    ids=str,
)
def test_a_trial_that_has_to_leave_saves_after_that_step_and_no_step_is_done_twice(
    tmp_path, monkeypatch, uninterrupted, places
):
    steps = []

    def update(learner, loss, plan, step, real=phase.update):
        steps.append((plan.phase, step))
        return real(learner, loss, plan, step)

    monkeypatch.setattr(phase, "update", update)

    values, outcomes = {}, []
    for number in range(len(places) + 1):
        diary, told = toy.Diary(), places[number:]
        is_leaving = lambda phase, step, told=told: (phase, step) in told  # noqa: E731
        attempt = f"a{number}"
        outcomes.append(run(tmp_path, diary, attempt=attempt, is_leaving=is_leaving))
        values = toy.repeatable(diary) | values
        if outcomes[-1] == "complete":
            break
    at_ends = sum(place in (("pretrain", 14), ("segment", 9)) for place in places)
    assert outcomes == [Ending.LEAVING] * (len(places) - at_ends) + ["complete"]
    assert len(steps) == len(set(steps)) == 14 + 9
    weights, expected, _ = uninterrupted
    found = checkpoint.load_latest(tmp_path / "checkpoints")[0]
    assert all(found[name].equal(weights[name]) for name in weights)
    assert values == expected


def test_the_segmenter_starts_from_the_pretrained_encoder(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "trainables.trial.segment", lambda *args: given.append(args[3:]) or "complete"
    )
    assert run(tmp_path, toy.Diary()) == "complete"
    ((encoder_state, _, resume),) = given
    tensors = checkpoint.load_latest(tmp_path / "checkpoints")[0]
    expected = checkpoint.weights(tensors, "encoder")
    assert encoder_state.keys() == expected.keys() and resume is None
    assert all(encoder_state[name].equal(expected[name]) for name in expected)


def test_random_init_is_not_pretrained(tmp_path):
    diary = toy.Diary()
    assert run(tmp_path, diary, toy.trial(segment__encoder="random-init")) == "complete"
    assert diary.calls == SEGMENT
    assert not (tmp_path / "encoder").exists()


def test_the_frozen_encoder_stays_as_it_was_pretrained(tmp_path):
    stopping = toy.Diary(stop_at=[("pretrain", 14)])
    config = toy.trial(segment__encoder="frozen")
    assert run(tmp_path, stopping, config) == "stopped"
    before = checkpoint.weights(checkpoint.load_latest(tmp_path / "checkpoints")[0], "encoder")
    assert run(tmp_path, toy.Diary(), config, attempt="a2") == "complete"
    after = checkpoint.weights(checkpoint.load_latest(tmp_path / "checkpoints")[0], "encoder")
    assert all(after[name].equal(before[name]) for name in before)


def test_without_labels_a_trial_ends_with_pretraining(tmp_path):
    diary = toy.Diary()
    assert run(tmp_path, diary, data=toy.discs(labelled=False)) == "complete"
    assert diary.calls == PRETRAIN


@pytest.mark.parametrize("place", [("pretrain", 7), ("segment", 4)])
def test_a_stopped_trial_goes_no_further_until_it_is_allowed_to(tmp_path, uninterrupted, place):
    stopping = toy.Diary(stop_at=[place])
    assert run(tmp_path, stopping) == "stopped"
    assert stopping.calls[-1] == place
    again = toy.Diary(stop_at=[place])
    assert run(tmp_path, again, attempt="a2") == "stopped"
    assert again.calls == [place]
    going_on = toy.Diary()
    assert run(tmp_path, going_on, attempt="a3") == "complete"
    assert toy.repeatable(stopping) | toy.repeatable(going_on) == uninterrupted[1]


def test_a_trial_whose_pretraining_diverges_is_not_segmented(tmp_path):
    diary = toy.Diary()
    config = toy.trial(pretrain__optimizer={"name": "adamw", "base_lr": 1e30})
    assert run(tmp_path, diary, config) == "diverged"
    assert not [place for place in diary.calls if place[0] == "segment"]


def test_a_damaged_checkpoint_costs_steps_and_not_the_result(tmp_path, uninterrupted, caplog):
    assert run(tmp_path, toy.Diary(stop_at=[("segment", 4)])) == "stopped"
    newest = max(tmp_path.glob("checkpoints/*segment*"))
    (newest / "tensors.safetensors").write_bytes(b"torn")
    diary = toy.Diary()
    assert run(tmp_path, diary, attempt="a2") == "complete"
    assert newest.name in caplog.text
    assert toy.repeatable(diary).items() <= uninterrupted[1].items()
    assert diary.calls[-1] == ("segment", 9)


def test_the_heartbeat_tells_phase_progress_and_speed(tmp_path, monkeypatch):
    diary = toy.Diary()
    monkeypatch.setattr(phase, "HEARTBEAT_SECONDS", 0.0)
    run(tmp_path, diary, data=toy.discs(labelled=False))
    progress = [beat[1] for beat in diary.beats]
    assert {beat[0] for beat in diary.beats} == {"pretrain"}
    assert progress == sorted(progress) and progress[-1] == 1.0
    assert all(0 < beat[2] < 1e6 for beat in diary.beats)


def test_every_checkpoint_tells_how_long_it_took(tmp_path):
    told = []
    run(tmp_path, toy.Diary(), saved=told.append)
    assert len(told) >= 6  # one at every rung of both phases
    assert all(0 < seconds < 60 for seconds in told)


def test_another_number_of_workers_goes_on_from_the_mean_of_the_running_losses(tmp_path):
    resume = checkpoint.Saved({phase.RUNNING_LOSS: torch.tensor([1.0, 4.0])}, {}, "a")
    three = toy.context(tmp_path, toy.Diary(), world_size=3, rank=2)
    assert phase.running_loss(resume, three) == 2.5
    second = toy.context(tmp_path, toy.Diary(), world_size=2, rank=1)
    assert phase.running_loss(resume, second) == 4.0
    nothing = checkpoint.Saved({}, {}, "a")
    assert phase.running_loss(None, second) == phase.running_loss(nothing, second) == 0


def work(rank, folder):
    """Stop in the middle of segmentation, then go on from what rank 0 finds."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", meet, timedelta(seconds=30), rank=rank, world_size=2)
    told = []
    for attempt, stop_at in (("a1", [("segment", 4)]), ("a2", [])):
        diary = toy.Diary(stop_at=stop_at)
        outcome = run(folder / "trial", diary, attempt=attempt, rank=rank, world_size=2)
        told.append([outcome, diary.calls])
        told.append(sorted([*key, value] for key, value in toy.repeatable(diary).items()))
    values = {}
    for attempt, leave_at in (("b1", ("pretrain", 6)), ("b2", ("segment", 7)), ("b3", None)):
        diary, ranks = toy.Diary(), {"rank": rank, "world_size": 2}
        is_leaving = lambda *place, leave_at=leave_at: place == leave_at  # noqa: E731
        outcome = run(folder / "left", diary, attempt=attempt, is_leaving=is_leaving, **ranks)
        values |= toy.repeatable(diary)
        told.append(outcome)
    told.append(sorted([*key, value] for key, value in values.items()))
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def test_two_workers_stop_and_go_on_together(tmp_path, uninterrupted):
    multiprocessing.set_forkserver_preload(["trainables.trial"])
    workers.start_processes(work, (tmp_path,), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    calls = [list(place) for place in PRETRAIN + SEGMENT]
    assert first[0] == ["stopped", calls[:5]] and first[2] == ["complete", calls[4:]]
    assert second == [["stopped", []], [], ["complete", []], [], *first[4:7], []]
    found = {tuple(key): value for *key, value in first[1] + first[3]}
    assert found.keys() == uninterrupted[1].keys()
    for name in ("loss", "probe_psnr"):
        key = ("pretrain", 14, name)
        assert found[key] == pytest.approx(uninterrupted[1][key], rel=2e-3)
    key = ("segment", 9, "loss")
    assert found[key] == pytest.approx(uninterrupted[1][key], rel=0.02)
    assert first[4:7] == [Ending.LEAVING, Ending.LEAVING, "complete"]
    assert {tuple(key): value for *key, value in first[7]} == found


# Pretraining that trials share


def test_who_pretrains_alike_takes_what_is_there(tmp_path, monkeypatch, uninterrupted):
    """All but the clock as if it had been done again, also where segmentation differs."""
    shared = tmp_path / "pretrained"
    run(tmp_path / "first", toy.Diary(), shared=shared)
    _, values, _ = uninterrupted
    with monkeypatch.context() as barred:
        barred.setattr("trainables.pretrain.train", None)
        second = toy.Diary()
        assert run(tmp_path / "second", second, shared=shared) == "complete"
        assert second.calls == PRETRAIN + SEGMENT and toy.repeatable(second) == values
        for name in ("encoder/encoder.safetensors", "pictures/reconstruction.png"):
            ours, first = (tmp_path / which / name for which in ("second", "first"))
            assert ours.read_bytes() == first.read_bytes()
        frozen = toy.trial(segment__encoder="frozen")
        assert run(tmp_path / "frozen", toy.Diary(), frozen, shared=shared) == "complete"
        # the rule may say another thing to this one
        stopped = toy.Diary(stop_at=[("pretrain", 7)])
        assert run(tmp_path / "stopped", stopped, shared=shared) == "stopped"
        assert stopped.calls == PRETRAIN[:2]
        for other in ({"masking__unit": 8}, {"pretrain__epochs": 2}):
            with pytest.raises(TypeError):
                run(tmp_path / "other", toy.Diary(), toy.trial(**other), shared=shared)


def test_only_what_is_whole_is_shared(tmp_path):
    shared = tmp_path / "pretrained"
    assert run(tmp_path / "a", toy.Diary(stop_at=[("pretrain", 7)]), shared=shared) == "stopped"
    assert not shared.exists()
    run(tmp_path / "b", toy.Diary(), shared=shared)
    (kept,) = shared.iterdir()
    for place, broken in enumerate(("rows.json", "weights.safetensors")):
        whole = (kept / broken).read_bytes()
        (kept / broken).write_bytes(whole[: len(whole) // 2])
        assert find(shared, kept.name) is None
        assert run(tmp_path / f"again-{place}", toy.Diary(), shared=shared) == "complete"
        assert (kept / broken).stat().st_size > len(whole) // 2
        assert find(shared, kept.name) is not None
