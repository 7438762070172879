"""What masking costs in time. Run: python -m pytest tests/trainables/test_speed.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from study.commands.bench import steps_table
from tests.terminal import call
from tests.toy import discs, trial
from trainables import speed
from trainables.masking import MASKING
from trainables.speed import REFERENCE, StepTime, step_times, summary

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


def times(config=None, strategies=("random",), **options):
    data = discs(num_images=12)
    return step_times(config or trial(), strategies, data, CPU, threads=1, seconds=0.0, **options)


def test_every_strategy_is_timed_and_the_reference_comes_first():
    strategies = [name for name in reversed(MASKING) if name != REFERENCE]
    found = times(strategies=strategies)
    assert [each.strategy for each in found] == [REFERENCE, *strategies]
    for each in found:
        assert each.milliseconds > 0
        assert 0 < each.lowest <= each.ratio <= each.highest
    assert (found[0].lowest, found[0].ratio, found[0].highest) == (1, 1, 1)


def test_ratios_are_those_of_neighbours_by_hand():
    # the machine was slow in the second round, for both; 8 images a step
    spent = {"random": [0.1, 0.4, 0.2, 0.1], "late": [0.2, 0.6, 0.5, 0.2]}
    random, late = summary(spent, batch=8)
    assert random == StepTime("random", pytest.approx(150), 1.0, 1.0, 1.0, pytest.approx(8 / 0.15))
    assert late.milliseconds == pytest.approx(350)
    assert (late.lowest, late.ratio, late.highest) == pytest.approx((1.5, 2.0, 2.5))


def test_all_take_turns_and_nobody_always_comes_first(monkeypatch):
    turns: list[tuple[str, int]] = []

    def fake_step(config, images, is_padded):
        return config.masking.strategy.name

    def fake_seconds(step, repeats, device):
        turns.append((step, repeats))
        return 0.125 * repeats

    monkeypatch.setattr(speed, "_step", fake_step)
    monkeypatch.setattr(speed, "_seconds", fake_seconds)
    other, third = [name for name in MASKING if name != REFERENCE][:2]
    names = [REFERENCE, other, third]
    found = step_times(trial(), [other, third], discs(12), CPU, threads=1, seconds=5.0)
    assert [each.milliseconds for each in found] == [125.0] * 3
    # 3 for warmth, 1 for the scale, then 10 rounds of 4 steps: 5 s of the reference
    assert turns[:4] == [*((name, 3) for name in names), (REFERENCE, 1)]
    rounds = [turns[start : start + 3] for start in range(4, len(turns), 3)]
    assert len(rounds) == 10
    assert all(sorted(name for name, _ in part) == sorted(names) for part in rounds)
    assert all(repeats == 4 for part in rounds for _, repeats in part)
    assert [part[0][0] for part in rounds[:4]] == [REFERENCE, other, third, REFERENCE]


def test_the_whole_step_of_training_is_what_is_timed(monkeypatch):
    seen = []

    def spy(learner, images, config, seed, plan, step, samples_B):
        before = learner.model.encoder.embed.weight.clone()
        loss = real(learner, images, config, seed, plan, step, samples_B)
        moved = not torch.equal(before, learner.model.encoder.embed.weight)
        seen.append((config.masking.strategy.name, moved, learner.teacher is not None))
        assert step / plan.steps == 0.5
        assert len(images) == len(samples_B) == 2
        return loss

    real = speed.train_step
    monkeypatch.setattr(speed, "train_step", spy)
    times(trial(masking__ratio={"name": "constant"}), ["anatomask"], workers=2)
    assert set(seen) == {("random", True, False), ("anatomask", True, True)}


def test_the_trials_own_strategy_keeps_its_options(monkeypatch):
    guides = {}

    def keep(config, images, is_padded):
        guides[config.masking.strategy.name] = config.masking.strategy
        return lambda: None

    monkeypatch.setattr(speed, "_step", keep)
    strategy = {"name": "anatomask", "complementary": True}
    times(trial(masking__strategy=strategy), ["anatomask", "attmask"])
    assert guides["anatomask"].complementary
    assert list(guides) == ["random", "anatomask", "attmask"]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    step_times(trial(), [], discs(12), CPU, threads=before + 1, seconds=0.0)
    assert torch.get_num_threads() == before


def test_the_command_prints_a_table_and_what_it_ran_on(tiny_study: Path, capsys: Capture):
    call("bench", tiny_study, "--seconds", "0", "--threads", "1")
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in rows] == list(MASKING)
    for word in ("ratio to random", "images/s", "pico/8", "8 images of 32x32", "1 threads"):
        assert word in printed
    assert f"torch {torch.__version__}" in printed


def test_a_row_of_the_table_by_hand():
    late = StepTime("late", 350.04, 2.0, 1.456, 2.5, 22_857.1)
    cells = [list(column.cells) for column in steps_table("a step", [late]).columns]
    assert cells == [["late"], ["350.0"], ["2.00"], ["1.46 .. 2.50"], ["22,857"]]


def test_without_a_study_there_is_a_trial_at_hand(capsys: Capture, monkeypatch):
    asked = []

    def fake(config, strategies, dataset, device, **options):
        asked.append((config, strategies, dataset.size, options))
        return [StepTime("random", 1.0, 1.0, 1.0, 1.0, 64_000.0)]

    monkeypatch.setattr("study.commands.bench.step_times", fake)
    call("bench", "--strategies", "attmask, random", "--seconds", "0.5")
    ((config, strategies, size, options),) = asked
    assert (strategies, size) == (["attmask", "random"], (64, 64))
    expected = {"workers": 1, "threads": torch.get_num_threads(), "seconds": 0.5}
    assert options == expected
    assert "tiny/8, 64 images of 64x64" in capsys.readouterr().out
    assert config.masking.strategy.name == "random"


def test_a_misspelt_strategy_is_named(capsys: Capture):
    assert call("bench", "--strategies", "random,anatomsk") == 2
    assert "did you mean 'anatomask'" in capsys.readouterr().err
