"""Checkpoints under interruption and damage: `pytest tests/trainables/test_checkpoint.py`."""

import json
import logging
import os
import shutil
import threading
import time

import pytest
import torch
from torch import nn

from trainables import checkpoint, durable
from trainables.errors import StorageError

torch.set_num_threads(1)


class Crash(BaseException):
    """The process ends here."""


def save(folder, step, phase="pretrain", attempt="a1"):
    tensors = {
        "model/weight": torch.full((3, 5), float(step)),
        "optimizer/weight/step": torch.tensor(step),
    }
    name = f"{attempt}-{phase}-{step:08d}"
    return checkpoint.save(folder, name, tensors, {"phase": phase, "step": step, "sum": 0.1 + step})


def newest_step(folder):
    tensors, state, _ = checkpoint.load_latest(folder)
    assert tensors["model/weight"].eq(state["step"]).all()
    return state["step"]


def test_what_is_saved_comes_back_bit_by_bit(tmp_path):
    values = torch.tensor([0.1, -0.0, 1e-42, float("nan")])
    saved = checkpoint.save(
        tmp_path, "a-pretrain-1", {"x": values}, {"phase": "pretrain", "step": 1, "y": 0.1}
    )
    tensors, state, name = checkpoint.load_latest(tmp_path)
    assert tensors["x"].view(torch.int32).equal(values.view(torch.int32))
    assert (state, name) == ({"phase": "pretrain", "step": 1, "y": 0.1}, saved.name)
    assert sorted(p.name for p in saved.iterdir()) == [
        "manifest.json",
        "state.json",
        "tensors.safetensors",
    ]


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path / "none") is None
    assert checkpoint.load_latest(tmp_path) is None


def test_the_newest_is_said_by_phase_and_step_not_by_names_or_clocks(tmp_path):
    save(tmp_path, 900, "pretrain", attempt="z")
    save(tmp_path, 20, "segment", attempt="b")
    save(tmp_path, 3, "segment", attempt="y")
    assert newest_step(tmp_path) == 20


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a1-pretrain-00000003",
        "a1-pretrain-00000004",
    ]


def test_a_name_in_use_is_not_overwritten(tmp_path):
    assert save(tmp_path, 1) != save(tmp_path, 1)
    assert newest_step(tmp_path) == 1


def operations(monkeypatch, crash_at):
    """Count every write, flush, rename and removal; crash in the middle of number `crash_at`."""
    count = 0

    def torn(name, args):
        if name == "save_tensors":
            args[1].write_bytes(b"half")
        elif name == "_write_json":
            args[0].write_text("{")
        elif name == "rmtree" and args[0].exists():
            for path in sorted(args[0].iterdir())[:1]:
                os.unlink(path)

    def counted(name, function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == crash_at:
                torn(name, args)
                raise Crash
            return function(*args, **kwargs)

        return call

    for owner, name in [
        (checkpoint, "save_tensors"),
        (checkpoint, "_write_json"),
        (durable.os, "fsync"),
        (durable.os, "replace"),
        (checkpoint.shutil, "rmtree"),
    ]:
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return lambda: count


def test_killed_at_any_operation_the_newest_complete_one_is_loaded(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as counting:
        counted = operations(counting, crash_at=None)
        for step in (1, 2, 3):
            save(tmp_path / "whole", step)
        total = counted()
    assert total > 20

    survivors = []
    for crash_at in range(1, total + 1):
        folder, acknowledged = tmp_path / str(crash_at), 0
        with monkeypatch.context() as crashing:
            operations(crashing, crash_at)
            with pytest.raises(Crash):
                for step in (1, 2, 3):
                    save(folder, step)
                    acknowledged = step
        found = checkpoint.load_latest(folder)
        loaded = 0 if found is None else newest_step(folder)
        assert loaded in (acknowledged, acknowledged + 1)
        assert not caplog.text  # an interruption is not damage
        survivors.append(loaded)
        save(folder, 4)  # the next attempt goes on and clears away what was left
        assert newest_step(folder) == 4
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert set(survivors) == {0, 1, 2, 3}


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "gone", "bit"])
def test_a_damaged_file_falls_back_and_says_so(tmp_path, caplog, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = path.read_bytes()
    cut = {"empty": 0, "half": len(content) // 2, "last byte": len(content) - 1}
    if damage == "gone":
        path.unlink()
    elif damage == "bit":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    else:
        path.write_bytes(content[: cut[damage]])
    with caplog.at_level(logging.WARNING):
        assert newest_step(tmp_path) == 1
    assert "a1-pretrain-00000002" in caplog.text and file in caplog.text


def test_no_flipped_bit_goes_unnoticed(tmp_path, caplog):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    for file in ("tensors.safetensors", "state.json"):
        content = (path / file).read_bytes()
        for bit in range(0, 8 * len(content), 13):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (path / file).write_bytes(flipped)
            assert newest_step(tmp_path) == 1, (file, bit)
        (path / file).write_bytes(content)
    assert newest_step(tmp_path) == 2


def test_when_all_are_damaged_nothing_starts_from_zero_unasked(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(
        StorageError, match=r"no checkpoint is whole .*00000002.*delete this folder"
    ):
        checkpoint.load_latest(tmp_path)


def test_a_damaged_one_is_not_counted_among_the_two_kept(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "tensors.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    shutil.rmtree(tmp_path / "a1-pretrain-00000003")
    assert newest_step(tmp_path) == 1


def test_a_full_disk_is_a_storage_error_and_the_one_before_is_intact(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "save_tensors", full)
        with pytest.raises(StorageError, match=r"00000002.*No space left"):
            save(tmp_path, 2)
    assert newest_step(tmp_path) == 1


def test_no_absolute_path_is_written(tmp_path):
    path = save(tmp_path, 1)
    assert (
        str(tmp_path)
        not in (path / "manifest.json").read_text() + (path / "state.json").read_text()
    )
    shutil.move(tmp_path / path.name, tmp_path / "moved" / path.name)
    assert newest_step(tmp_path / "moved") == 1


def model_and_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [
        {"params": [model[1].weight]},
        {"params": [model[0].weight, model[0].bias], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=0.1, fused=True)  # model[1].bias is not trained


def train(model, optimizer, steps):
    for step in range(*steps):
        optimizer.zero_grad()
        model(torch.full((1, 3), 1.0 + step)).square().sum().backward()
        optimizer.step()


def test_weights_and_moments_go_on_where_they_were(tmp_path):
    whole = model_and_optimizer()
    train(*whole, steps=(0, 6))

    first = model_and_optimizer()
    train(*first, steps=(0, 3))
    checkpoint.save(tmp_path, "a", checkpoint.pack(*first), {"phase": "pretrain", "step": 3})
    second = model_and_optimizer()
    tensors = checkpoint.load_latest(tmp_path)[0]
    checkpoint.unpack(*second, tensors)
    train(*second, steps=(3, 6))

    for key, value in checkpoint.pack(*whole).items():
        assert value.equal(checkpoint.pack(*second)[key]), key
    assert "optimizer/0.weight/exp_avg" in tensors and "optimizer/1.bias/exp_avg" not in tensors
    assert set(checkpoint.weights(tensors, "0")) == {"weight", "bias"}


def test_state_that_json_cannot_hold_exactly_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, "a", {}, {"phase": "pretrain", "step": 1, "x": float("nan")})
    assert json.dumps(0.1 + 0.2) == "0.30000000000000004"  # floats come back as they were


def writing(step, value):
    state = {"phase": "pretrain", "step": step}
    return f"a1-pretrain-{step:08d}", {"model/weight": value}, state


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    goes_on, whole = threading.Event(), checkpoint.save_tensors

    def slow(tensors, path):
        assert goes_on.wait(30)
        whole(tensors, path)

    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    weight = torch.ones(4, 3).t()  # not in one piece
    told = []
    with checkpoint.Writer(tmp_path, saved=told.append) as writer:
        writer.save(*writing(1, weight))
        weight += 1
        assert checkpoint.load_latest(tmp_path) is None
        goes_on.set()
        writer.finish()
        writer.finish()
        assert len(told) == 1 and told[0] > 0
        writer.save(*writing(2, weight))
    assert len(told) == 2
    assert checkpoint.load_latest(tmp_path).tensors["model/weight"].eq(2).all()
    older = checkpoint.load(tmp_path, "a1-pretrain-00000001")
    assert older.tensors["model/weight"].equal(torch.ones(3, 4))


def test_an_error_of_writing_comes_with_the_next_checkpoint_or_at_the_end(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(StorageError, match="the one before is intact"),
        checkpoint.Writer(tmp_path / "file" / "checkpoints") as writer,
    ):
        writer.save(*writing(1, torch.ones(2)))
    with checkpoint.Writer(tmp_path / "file" / "checkpoints") as writer:
        writer.save(*writing(1, torch.ones(2)))
        with pytest.raises(StorageError):
            writer.save(*writing(2, torch.ones(2)))
    with pytest.raises(Crash), checkpoint.Writer(tmp_path / "file" / "checkpoints") as writer:
        writer.save(*writing(1, torch.ones(2)))
        raise Crash


def test_the_checkpoint_before_is_not_read_again_unless_it_has_changed(tmp_path, monkeypatch):
    read, fingerprint = [], checkpoint._fingerprint

    def counted(path):
        if path.name == "tensors.safetensors":
            read.append(path.parent.name.removeprefix(".").removesuffix(".partial")[-1])
        return fingerprint(path)

    monkeypatch.setattr(checkpoint, "_fingerprint", counted)
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert read == ["1", "2", "3"]
    path = save(tmp_path, 4) / "tensors.safetensors"
    time.sleep(0.02)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    save(tmp_path, 5)
    kept = sorted(p.name[-1] for p in tmp_path.iterdir())
    assert kept == ["3", "5"]
