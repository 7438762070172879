"""What a step costs. Run: python -m pytest tests/trainables/test_bench.py"""

from __future__ import annotations

import json
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch

from study.commands.bench import cell_table
from tests.terminal import call
from tests.toy import discs, recomputing, trial
from trainables import (
    bench,
    peers,
    speed,
    torchvision_mended,  # noqa: F401  (timm imports torchvision)
)
from trainables.bench import DRAWN, REFERENCE, Cell, Contender, StepTime, bench_cell, summary
from trainables.blocks import Block, ResidualBlock
from trainables.cost import mae_flops, segment_flops
from trainables.errors import UserError
from trainables.mae import MAE, patchify
from trainables.masking import MASKING
from trainables.peers import PEERS, Work, peer_step
from trainables.speed import peak_flops
from trainables.unetr import UNETR

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
HALF = {"name": "constant", "value": 0.5}


def timed(config=None, strategies=("random",), beside=(), **options):
    """The contenders of the toy trial, at a thread and no time."""
    given = {"threads": 1, "seconds": 0.0} | options
    return bench_cell(config or trial(), strategies, beside, discs(num_images=12), CPU, **given)


def step_time(name="late", milliseconds=350.04, **others):
    given = {
        "ratio": 2.0,
        "lowest": 1.456,
        "highest": 2.5,
        "images_per_second": 22_857.1,
        "first_seconds": 0.31,
        "parameters": 12_345,
    }
    return StepTime(name, milliseconds, **(given | others))


def cell(*steps):
    return Cell(
        size="pico",
        patch=8,
        ratio=0.5,
        precision="fp32",
        batch=8,
        image=(32, 32),
        hidden=8,
        peak_flops=2e11,
        threads=1,
        failed={},
        steps=steps,
    )


def test_every_strategy_is_timed_and_the_reference_comes_first():
    strategies = [name for name in reversed(MASKING) if name != REFERENCE]
    found = timed(strategies=strategies)
    assert [each.name for each in found.steps] == [REFERENCE, DRAWN, *strategies]
    for each in found.steps:
        assert each.milliseconds > 0 and each.first_seconds > 0 and each.parameters > 1e5
        assert 0 < each.lowest <= each.ratio <= each.highest
        assert (each.utilization is not None) == (each.name in (REFERENCE, DRAWN))
    first = found.steps[0]
    assert (first.lowest, first.ratio, first.highest) == (1, 1, 1)
    assert 0 < first.utilization < 1
    assert (found.hidden, found.ratio, found.batch) == (8, 0.5, 4)


def test_ratios_are_those_of_neighbours_by_hand():
    # the machine was slow in the second round, for both; 8 images a step
    spent = {"random": [0.1, 0.4, 0.2, 0.1], "late": [0.2, 0.6, 0.5, 0.2]}
    contenders = {
        "random": Contender(make=None, flops=3e9, parameters=5, first_seconds=1.5),
        "late": Contender(make=None, flops=None, parameters=7),
    }
    random, late = summary(spent, contenders, 8, 1e11, {"late": 0.25}, {"late": 9})
    assert random == StepTime(
        name="random",
        milliseconds=pytest.approx(150),
        ratio=1.0,
        lowest=1.0,
        highest=1.0,
        images_per_second=pytest.approx(8 / 0.15),
        first_seconds=1.5,
        parameters=5,
        utilization=pytest.approx(3e9 / 0.15 / 1e11),
    )
    assert late.milliseconds == pytest.approx(350)
    assert (late.lowest, late.ratio, late.highest) == pytest.approx((1.5, 2.0, 2.5))
    assert (late.utilization, late.loss, late.step_bytes) == (None, 0.25, 9)


def test_all_take_turns_and_nobody_always_comes_first(monkeypatch):
    turns: list[tuple[str, int]] = []

    def fake_seconds(step, repeats, device):
        turns.append((step, repeats))
        return 0.125 * repeats

    monkeypatch.setattr(bench, "seconds_of", fake_seconds)
    names = [REFERENCE, "second", "third"]
    spent = bench._take_turns({name: name for name in names}, CPU, seconds=5.0)
    assert spent == {name: [0.125] * 10 for name in names}
    # 3 for warmth, 1 for the scale, then 10 rounds of 4 steps: 5 s of the reference
    assert turns[:4] == [*((name, 3) for name in names), (REFERENCE, 1)]
    rounds = [turns[start : start + 3] for start in range(4, len(turns), 3)]
    assert len(rounds) == 10
    assert all(sorted(name for name, _ in part) == sorted(names) for part in rounds)
    assert all(repeats == 4 for part in rounds for _, repeats in part)
    assert [part[0][0] for part in rounds[:4]] == [REFERENCE, "second", "third", REFERENCE]


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

    real = bench.train_step
    monkeypatch.setattr(bench, "train_step", spy)
    timed(trial(masking__ratio={"name": "constant"}), ["anatomask"], workers=2)
    assert set(seen) == {("random", True, False), ("anatomask", True, True)}


def test_images_are_drawn_anew_where_that_is_timed(monkeypatch):
    seen = {}

    def spy(learner, images, *rest):
        seen.setdefault(id(learner), []).append(images.clone())
        return torch.zeros(())

    monkeypatch.setattr(bench, "train_step", spy)
    timed()
    fixed, drawn = seen.values()
    assert all(images.equal(fixed[0]) for images in fixed)
    assert not drawn[0].equal(drawn[1]) and drawn[0].shape == fixed[0].shape


def test_the_trials_own_strategy_keeps_its_options(monkeypatch):
    guides = {}

    def keep(config, images, *, is_padded, drawn=None):
        guides[config.masking.strategy.name] = config.masking.strategy
        return (lambda: torch.zeros(())), 1

    monkeypatch.setattr(bench, "_make", keep)
    strategy = {"name": "anatomask", "complementary": True}
    timed(trial(masking__strategy=strategy), ["anatomask", "attmask"])
    assert guides["anatomask"].complementary
    assert list(guides) == ["random", "anatomask", "attmask"]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    timed(strategies=[], threads=before + 1)
    assert torch.get_num_threads() == before


def test_the_peak_is_that_of_the_precision(monkeypatch):
    kinds, multiply = [], torch.mm

    def spied(left, right):
        kinds.append(left.dtype)
        assert not left.equal(right)  # equal numbers cost a GPU less power
        return multiply(left, right)

    monkeypatch.setattr(torch, "mm", spied)
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        kinds.clear()
        assert peak_flops(CPU, precision) > 1e8
        assert set(kinds) == {kind}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forecasts_are_timed_in_the_precision_of_training(monkeypatch, precision):
    kinds = {}

    def spied(model, *inputs, real):
        if inputs[0].device == CPU:  # operations are counted on the meta device
            kinds.setdefault(type(model), set()).add((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return real(model, *inputs)

    for model in (MAE, UNETR):
        monkeypatch.setattr(model, "forward", partialmethod(spied, real=model.forward))
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    config = trial(pretrain__precision=precision, segment__precision=precision)
    found = speed.measurer(discs(12), CPU, threads=1)(config)
    assert min(found) > 0
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    assert kinds == {MAE: {kind}, UNETR: {kind}}


def test_speeds_are_the_operations_of_whole_steps_over_their_seconds(monkeypatch):
    monkeypatch.setattr(speed, "seconds_of", lambda step, repeats, device: 0.25 * repeats)
    config = trial(pretrain__batch=4, segment__batch=2)
    data = discs(12)
    found = speed.measurer(data, CPU, threads=1)(config)
    hidden = 8  # of 16 patches
    once = 4 * mae_flops(config, data.size, data.channels, hidden)["step"]
    assert found.pretrain == pytest.approx(once / 0.25)
    # what is held at first learns in the step that is timed
    whole = trial(segment__batch=2, segment__decoder_first=0.0)
    once = segment_flops(whole, data.size, data.channels, len(data.classes), 1)[1]
    assert found.segment == pytest.approx(once / 0.25)


@pytest.mark.parametrize("recomputes", [False, True])
def test_steps_are_timed_with_the_blocks_of_the_study(monkeypatch, recomputes):
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    found = recomputing(monkeypatch)
    speed.measurer(discs(12), CPU, threads=1, recomputes=recomputes)(trial())
    assert found == {(Block, recomputes), (ResidualBlock, recomputes)}


def test_an_arm_is_timed_once_however_long_it_trains(monkeypatch):
    timed = []

    def measured(config, dataset, context):
        timed.append(config)
        return speed.Speeds(1.0, None)

    monkeypatch.setattr(speed, "_measured", measured)
    measure = speed.measurer(discs(12), CPU, threads=1)
    for epochs in (3, 5):
        measure(trial(pretrain__epochs=epochs, segment__epochs=epochs))
    measure(trial(model__patch=8))
    assert len(timed) == 2


def test_what_does_not_fit_is_timed_with_fewer_images(monkeypatch):
    batches = []

    def measured(config, dataset, context):
        batches.append((config.pretrain.batch, config.segment.batch))
        if config.pretrain.batch > 4:
            raise torch.OutOfMemoryError
        return speed.Speeds(1.0, 1.0)

    monkeypatch.setattr(speed, "_measured", measured)
    config = trial(pretrain__batch=128, segment__batch=8)
    assert speed.measurer(discs(12), CPU, threads=1)(config) == (1.0, 1.0)
    assert batches == [(64, 8), (16, 8), (4, 4)]


# Other libraries


def work(hidden=8, size=(16, 16), channels=3, batch=4):
    config = trial(masking__ratio=HALF, pretrain__augment={"name": "none"})
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, channels, *size, generator=generator)
    return Work(config, images, hidden)


@pytest.mark.parametrize("hidden", [1, 5, 8, 12, 15])
@pytest.mark.parametrize("name", ["timm", "monai"])
def test_peers_hide_as_much_and_predict_the_hidden_patches(name, hidden):
    given = work(hidden)
    assert given.patches == 16
    step, parameters = peer_step(name, given)  # which compares the number of hidden patches
    ours = bench._make(given.config, given.images, is_padded=False)[1]
    assert parameters == pytest.approx(ours, rel=0.01)
    assert 0 < step().item() < 3


@pytest.mark.parametrize("name", ["timm", "monai"])
def test_peers_learn_what_they_are_asked(name, monkeypatch):
    """A peer whose patches or places were mixed up could not learn one image by heart."""
    monkeypatch.setattr(peers, "RATE", 3e-3)
    torch.manual_seed(0)
    edges = torch.arange(16.0)
    picture = (edges[:, None] + 3 * edges % 7).expand(4, 3, 16, 16)
    images = ((picture - picture.mean()) / picture.std()).contiguous()
    given = work()._replace(images=images)
    step, _ = peer_step(name, given)
    first = step().item()
    for _ in range(150):
        last = step().item()
    assert last < 0.2 * first


def test_timm_told_anew_predicts_places_of_its_own_order():
    given = work()
    model, predict = PEERS["timm"](given)
    predicted_BXQ, hidden_BX = predict(given.images)
    assert predicted_BXQ.shape == (4, 8, patchify(given.images, (4, 4)).shape[2])
    assert all(len(set(row)) == 8 for row in hidden_BX.tolist())
    volumes = work(hidden=5, size=(8, 8, 8), channels=1)
    step, _ = peer_step("timm", volumes)
    assert step().isfinite()
    assert model is predict


def test_a_library_that_is_not_there_is_named(monkeypatch):
    def missing(_):
        raise ImportError("No module named 'lightly'")

    monkeypatch.setitem(PEERS, "lightly", missing)
    with pytest.raises(UserError, match=r"lightly cannot be imported .*; install what"):
        peer_step("lightly", work())


def test_losses_are_compared_and_a_peer_that_fails_is_told(monkeypatch):
    def failing(given):
        model, predict = PEERS["timm"](given)
        return model, partial(fail, predict)

    def fail(predict, images):
        raise RuntimeError("no such dtype")

    torch.manual_seed(0)  # peers begin at weights of torch's own generator
    monkeypatch.setitem(PEERS, "lightly", failing)
    found = timed(beside=["timm", "lightly"])
    assert [each.name for each in found.steps] == [REFERENCE, DRAWN, "timm"]
    random, drawn, timm = found.steps
    assert (drawn.loss, found.failed) == (None, {"lightly": "no such dtype"})
    assert 0.7 < random.loss / timm.loss < 1.5


# The command


def test_the_command_prints_a_table_and_what_it_ran_on(tiny_study: Path, capsys: Capture):
    output = tiny_study.parent / "bench.json"
    call("bench", tiny_study, "--seconds", "0", "--threads", "1", "--output", output)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "│" in line]
    names = [REFERENCE, DRAWN, *(name for name in MASKING if name != REFERENCE)]
    assert [line.split("│")[1].strip() for line in rows] == names
    for word in ("ratio to random", "images/s", "pico/8", "8 images of 32x32", "1 threads"):
        assert word in printed
    assert f"torch {torch.__version__}" in printed
    written = json.loads(output.read_text())
    assert [each["name"] for each in written["cells"][0]["steps"]] == names


def test_a_row_of_the_table_by_hand():
    late = step_time(utilization=0.256, loss=0.5, step_bytes=3 * 2**30)
    drawn = step_time(DRAWN, 10.0, ratio=1.25, parameters=1)
    table = cell_table(cell(drawn, late))
    cells = [list(column.cells)[1] for column in table.columns]
    assert cells == [
        *(
            "late",
            "350.0",
            "2.00",
            "1.46 .. 2.50",
            "22,857",
            "26%",
            "0.3",
            "12,345",
            "3,072",
            "0.500",
        )
    ]
    assert table.caption == "loader off / on: 0.80"
    assert "50% hidden, fp32; peak 200 GFLOP/s" in table.title


def test_without_a_study_there_is_a_trial_at_hand(capsys: Capture, monkeypatch):
    asked = []

    def fake(config, strategies, beside, dataset, device, **options):
        asked.append((config, strategies, beside, dataset.size, options))
        return cell(step_time())

    monkeypatch.setattr("study.commands.bench.bench_cell", fake)
    call("bench", "--strategies", "attmask, random", "--seconds", "0.5", "--beside", "monai")
    ((config, strategies, beside, size, options),) = asked
    assert (strategies, beside, size) == (["attmask", "random"], ["monai"], (64, 64))
    expected = {"workers": 1, "threads": torch.get_num_threads(), "seconds": 0.5}
    assert options == expected
    assert config.masking.strategy.name == "random"


def test_each_is_timed_with_each(capsys: Capture, monkeypatch):
    asked = []

    def fake(config, *_, **__):
        ratio = config.masking.ratio.options()["value"]
        asked.append((config.model.size, config.model.patch, ratio, config.pretrain.precision))
        return cell(step_time())

    monkeypatch.setattr("study.commands.bench.bench_cell", fake)
    grid = ("--sizes", "pico,nano", "--patches", "8,16", "--ratios", ".25", "--precisions", "fp32")
    call("bench", *grid)
    assert asked == [(size, patch, 0.25, "fp32") for size in ("pico", "nano") for patch in (8, 16)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--strategies", "random,anatomsk"), "did you mean 'anatomask'"),
        (("--beside", "lightning"), "did you mean 'lightly'"),
        (("--patches", "4,x"), "expected whole numbers"),
        (("--patches", "7"), "7 does not divide the image size 64x64"),
        (("--ratios", "0.5,1.5"), "given 1.5; expected numbers between 0 and 1"),
        (("--sizes", "tny"), "did you mean 'tiny'"),
        (("--precisions", "fp16"), "some of fast, fp32, bf16"),
    ],
)
def test_what_cannot_be_timed_is_named(capsys: Capture, options, words):
    assert call("bench", *options) == 2
    assert words in capsys.readouterr().err
