"""Trials that begin at a checkpoint of another one.  pytest tests/trainables/test_inheritance.py"""

import json
import shutil

import pytest
import torch

from tests import toy
from trainables import checkpoint
from trainables.inheritance import inherit
from trainables.pretrain import pretrain

torch.set_num_threads(1)

SEED = 5
FLAT = {"name": "constant", "value": 0.25}
TURN = {"name": "step", "values": [0.25, 0.75], "at": [0.5]}  # of 14 steps: from the eighth on
TEACHER = {"name": "anatomask", "guided": {"name": "linear", "start": 0.0, "end": 0.5}}
DATA = toy.discs()


def run(folder, diary, ratio, strategy="random", **surroundings):
    """Pretraining of three epochs in 14 steps, from the folder's newest checkpoint on."""
    config = toy.trial(masking__ratio=ratio, masking__strategy=strategy)
    resume = checkpoint.load_latest(folder / "checkpoints")
    surroundings = toy.context(folder, diary, checkpoint_seconds=30.0, **surroundings)
    return pretrain(config, SEED, DATA, toy.PROBE, surroundings, resume)[0]


@pytest.fixture
def source(tmp_path):
    """The checkpoints, at a quarter and at half, of one whose ratio stays, and who was stopped."""
    assert run(tmp_path / "parent", toy.Diary(stop_at={("pretrain", 7)}), FLAT) == "stopped"
    return tmp_path / "parent" / "checkpoints"


@pytest.mark.parametrize("strategy", ["random", TEACHER], ids=["random", "anatomask"])
def test_a_child_ends_bit_by_bit_as_if_it_had_trained_its_schedule_from_the_start(
    tmp_path, strategy
):
    stopped = toy.Diary(stop_at={("pretrain", 7)})
    assert run(tmp_path / "parent", stopped, FLAT, strategy) == "stopped"
    folder, scratch = tmp_path / "child", tmp_path / "scratch"
    assert inherit(tmp_path / "parent/checkpoints", folder / "checkpoints", "pretrain", 0.5)
    diaries = toy.Diary(), toy.Diary()
    assert run(folder, diaries[0], TURN, strategy, attempt="b1") == "complete"
    assert run(scratch, diaries[1], TURN, strategy) == "complete"

    assert diaries[0].calls == [("pretrain", 7), ("pretrain", 14)]  # told again, then its own
    found, whole = (
        {key: value for key, value in toy.repeatable(diary).items() if key[1] > 7}
        for diary in diaries
    )
    assert found == whole and found["pretrain", 14, "ratio"] == 0.75
    ends = [checkpoint.load_latest(place / "checkpoints").tensors for place in (folder, scratch)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    without = checkpoint.load_latest(tmp_path / "parent/checkpoints").tensors
    assert any(not torch.equal(value, without[name]) for name, value in ends[0].items())


def test_what_a_parent_does_afterwards_does_not_reach_its_child(tmp_path, source):
    target = tmp_path / "child" / "checkpoints"
    assert inherit(source, target, "pretrain", 0.5)
    before = checkpoint.load_latest(target)
    assert run(source.parent, toy.Diary(), FLAT, attempt="a2") == "complete"
    assert checkpoint.load_latest(source).state["step"] == 14
    shutil.rmtree(source)
    after = checkpoint.load_latest(target)
    assert after.state == before.state and after.state["step"] == 7
    assert all(torch.equal(value, after.tensors[name]) for name, value in before.tensors.items())


def test_only_a_checkpoint_at_the_rung_is_handed_on_and_only_to_who_has_none(tmp_path, source):
    target = tmp_path / "child" / "checkpoints"
    assert not inherit(source, target, "pretrain", 1.0)
    assert not inherit(source, target, "segment", 0.5)
    assert not inherit(tmp_path / "nobody", target, "pretrain", 0.5)
    assert not target.exists()
    state = source / "a1-pretrain-00000007" / "state.json"
    # between rungs: the rows are those of the rung before
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 8}))
    assert not inherit(source, target, "pretrain", 0.5)
    assert inherit(source, target, "pretrain", 0.25)
    assert not inherit(source, target, "pretrain", 0.25)
    assert [path.name for path in target.iterdir()] == ["a1-pretrain-00000004"]


def test_a_storage_without_links_gets_copies(tmp_path, source, monkeypatch):
    def refuse(*_):
        raise OSError(1, "no links here")

    monkeypatch.setattr("os.link", refuse)
    assert inherit(source, tmp_path / "checkpoints", "pretrain", 0.5)
    assert checkpoint.load_latest(tmp_path / "checkpoints").state["step"] == 7
