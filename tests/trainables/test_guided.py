"""Strategies that follow a teacher: AnatoMask, HPM, AttMask.

pytest tests/trainables/test_guided.py
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from trainables.config import TrialConfig
from trainables.mae import build_mae, patchify
from trainables.masking import MaskRequest, hide_smallest, split_indices, to_units
from trainables.masking.guided import (
    ANATOMASK_MOMENTUM,
    EASY_TO_HARD,
    HPM_MOMENTUM,
    anatomask,
    attmask,
    hide_hardest,
    hpm,
    predicted_difficulty,
)
from trainables.masking.strategy import Whole
from trainables.phase import follow
from trainables.schedules import parse, value_at

HALF = parse({"name": "constant", "value": 0.5})
WHOLE = parse({"name": "constant", "value": 1.0})


def mae(strategy="random", size=(16, 16), patch=4, channels=1, **pretrain):
    model = {"size": "pico", "patch": patch, "decoder": {"depth": 1, "width": 64}}
    config = {"model": model, "masking": {"strategy": strategy}, "pretrain": pretrain}
    return build_mae(TrialConfig.model_validate(config), size, channels, seed=0).eval()


def ask(
    model, images, hidden, *, progress=0.5, grid=None, per_unit=1, seed=0, step=0, samples=None
):
    edges = images.shape[2:]
    grid = grid or tuple(edge // model.encoder.patch[0] // per_unit for edge in edges)
    samples = torch.arange(len(images)) if samples is None else samples
    return MaskRequest(
        grid, hidden, progress, seed, step, samples, images, model, (per_unit,) * len(grid)
    )


class Told:
    """A teacher whose answers are written down."""

    def __init__(self, values_BP, channels=1):
        self.values_BP = values_BP
        self.asked = []

    def class_attention(self, images):
        return self.values_BP

    @property
    def part(self):
        return SimpleNamespace(module=lambda *seen, with_visible: self.values_BP[..., None])

    def whole(self, images):
        return Whole(None, torch.arange(self.values_BP.shape[1])[None], None)

    def patch_errors(self, images, visible_BV, hidden_BX, *, normalised):
        self.asked.append((visible_BV, hidden_BX, normalised))
        return self.values_BP.gather(1, hidden_BX)


def told(values, hidden, grid, **changes):
    values_BP = torch.tensor(values, dtype=torch.float32)
    return ask(Told(values_BP), torch.zeros(len(values_BP), 1, *grid), hidden, grid=grid, **changes)


# How many are guided


def test_anatomask_guides_as_many_cells_as_published():
    """235 of 392 cells hidden (112 x 112 x 128 voxels, cells of 16, ratio 0.6), 1000 epochs.

    The authors' code has 1, 29, 58, 88 and 117 guided at epochs 8, 250, 500, 750, 999, none before.
    """
    scores_BU = torch.arange(392.0).expand(2, -1)
    counts = {}
    for epoch in (0, 7, 8, 250, 500, 750, 999):
        request = MaskRequest((7, 7, 8), 235, (epoch + 1) / 1000, 0, epoch, torch.arange(2))
        counts[epoch] = int(value_at(EASY_TO_HARD, request.progress) * 235)
        is_hidden_BU = hide_hardest(request, scores_BU, counts[epoch])
        assert is_hidden_BU.sum(1).tolist() == [235, 235]
        assert is_hidden_BU[:, 392 - counts[epoch] :].all()
    assert list(counts.values()) == [0, 0, 1, 29, 58, 88, 117]


def test_hpm_guides_as_many_patches_as_published():
    """147 of 196 patches hidden, 200 epochs: 0, 1, 18, 37, 55, 73 at 0, 2, 50, 100, 150, 199."""
    epochs = (0, 2, 50, 100, 150, 199)
    counts = [int(value_at(EASY_TO_HARD, (epoch + 1) / 200) * 147) for epoch in epochs]
    assert counts == [0, 1, 18, 37, 55, 73]


def test_the_hardest_come_first_and_the_rest_is_chance():
    scores_BU = torch.tensor([[5.0, 1, 9, 3, 7, 0, 8, 2]])
    hits = torch.zeros(8)
    for step in range(2000):
        request = MaskRequest((2, 4), 4, 0.5, 0, step, torch.arange(1))
        hits += hide_hardest(request, scores_BU, 2)[0]
    assert hits[[2, 6]].tolist() == [2000, 2000]  # with 9 and 8
    # 2 of the other 6: 1/3 each; five standard deviations are 0.053
    assert (hits[[0, 1, 3, 4, 5, 7]] / 2000 - 1 / 3).abs().max() < 0.053


@pytest.mark.parametrize("strategy", [anatomask, hpm, attmask])
def test_nobody_is_asked_while_nothing_is_guided(strategy):
    """A share of 0.24 of 4 units is none: the same as random masking, and no teacher is there."""
    few = parse({"name": "constant", "value": 0.24})
    request = MaskRequest((3, 4), 4, 0.5, 7, 3, torch.arange(5))
    assert strategy(request, guided=few).equal(hide_smallest(request.noise(), 4))
    with pytest.raises(AssertionError):
        strategy(request, guided=parse({"name": "constant", "value": 0.25}))


# Momentum


def test_the_momentum_rises_as_published():
    quarter = [value_at(ANATOMASK_MOMENTUM, progress) for progress in (0, 0.125, 0.25, 1)]
    assert quarter == pytest.approx([0.999, 0.99945, 0.9999, 0.9999])
    half = [value_at(HPM_MOMENTUM, progress) for progress in (0, 0.25, 0.5, 1)]
    assert half == pytest.approx([0.999, 0.99945, 0.9999, 0.9999])


def test_the_teacher_is_the_moving_average_by_hand():
    model, teacher = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        for module, value in ((model, 4.0), (teacher, 2.0)):
            module.weight.fill_(value)
            module.bias.fill_(-value)
    follow(teacher, model, 0.75)
    assert teacher.weight.item() == 2.5 and teacher.bias.item() == -2.5
    assert model.weight.item() == 4.0
    follow(teacher, model, 0.75)
    assert teacher.weight.item() == 2.875


# AnatoMask


def test_anatomask_hides_where_the_teacher_errs_most_among_what_it_had_to_fill_in():
    values = [[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -2]] * 2
    request = told(values, 6, (3, 4))
    is_hidden_BU = anatomask(request, guided=HALF)
    ((_visible_BV, hidden_BX, normalised),) = request.model.asked
    assert hidden_BX.shape == (2, 6) and not normalised
    for sample in range(2):
        worst = hidden_BX[sample][:3]  # ascending numbers are descending errors here
        assert is_hidden_BU[sample, worst].all()
    assert is_hidden_BU.sum(1).tolist() == [6, 6]
    assert hidden_BX[0].tolist() != hidden_BX[1].tolist()


@pytest.mark.parametrize("complementary", [False, True])
def test_the_target_of_the_score_is_the_trials_choice(complementary):
    for target in ("raw", "normalised"):
        request = told([[1.0] * 12], 6, (3, 4))
        anatomask(request, score_target=target, complementary=complementary)
        assert {asked[2] for asked in request.model.asked} == {target == "normalised"}


def test_what_the_teacher_saw_scores_nothing():
    """All errors negative: the visible ones, which score 0, are the hardest."""
    request = told([[-1.0] * 12], 6, (3, 4))
    is_hidden_BU = anatomask(request, guided=WHOLE)
    visible_BV = request.model.asked[0][0]
    assert is_hidden_BU[0, visible_BV[0]].all()


@pytest.mark.parametrize("grid", [(3, 4), (3, 3), (1, 5)])
def test_complementary_masks_score_every_unit(grid):
    units = math.prod(grid)
    hardest = torch.arange(units) % units
    request = told([hardest.tolist()], 2, grid)
    is_hidden_BU = anatomask(request, guided=WHOLE, complementary=True)
    first, second = (asked[1][0] for asked in request.model.asked)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(units))
    assert is_hidden_BU[0].nonzero()[:, 0].tolist() == [units - 2, units - 1]


def test_the_score_of_a_teacher_with_normalised_targets_by_hand():
    visible_BV, hidden_BX = torch.tensor([[1]]), torch.tensor([[0]])
    whole = mae(size=(4, 8), patch=4, target="normalised")
    torch.nn.init.zeros_(whole.decoder.head.weight)
    torch.nn.init.constant_(whole.decoder.head.bias, 0.5)
    picture = torch.zeros(1, 1, 4, 8)
    picture[..., :2], picture[..., 2:4] = 1.0, 3.0  # hidden patch: mean 2, deviation 1
    raw = whole.patch_errors(picture, visible_BV, hidden_BX, normalised=False)
    assert raw.item() == pytest.approx(((0.5 - 1) ** 2 + (0.5 - 3) ** 2) / 2)
    own = whole.patch_errors(picture, visible_BV, hidden_BX, normalised=True)
    assert own.item() == pytest.approx(((0.5 + 1) ** 2 + (0.5 - 1) ** 2) / 2, rel=2e-3)
    pixels = mae(size=(4, 8), patch=4)
    torch.nn.init.zeros_(pixels.decoder.head.weight)
    torch.nn.init.constant_(pixels.decoder.head.bias, 2.5)
    same = pixels.patch_errors(picture, visible_BV, hidden_BX, normalised=True)
    assert same.item() == pytest.approx(((0.5 + 1) ** 2 + (0.5 - 1) ** 2) / 2, rel=4e-3)


def test_errors_are_the_mean_square_of_each_patch():
    model = mae(size=(8, 12), channels=2)
    images = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(1))
    is_hidden_BP = hide_smallest(torch.rand(3, 6, generator=torch.Generator().manual_seed(2)), 4)
    visible_BV, hidden_BX = split_indices(is_hidden_BP, 4)
    error = (model.reconstruct(images, visible_BV, hidden_BX) - images).square()
    expected = patchify(error, (4, 4)).mean(-1).gather(1, hidden_BX)
    found = model.patch_errors(images, visible_BV, hidden_BX, normalised=False)
    torch.testing.assert_close(found, expected)


# HPM


def test_hpm_hides_what_is_predicted_to_be_hard():
    request = told([[0.0, 5, 1, 4, 2, 3]], 3, (2, 3))
    assert hpm(request, guided=WHOLE)[0].tolist() == [False, True, False, True, False, True]


def test_the_predictor_sees_the_whole_image_and_every_patch_of_it():
    model = mae("hpm")
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    before = predicted_difficulty(model, images)
    assert before.shape == (2, 16)
    for patch in (0, 7, 15):
        changed = images.clone()
        row, column = patch // 4 * 4, patch % 4 * 4
        changed[:, :, row : row + 4, column : column + 4] += 1
        assert (predicted_difficulty(model, changed) != before).all()


def test_the_predictor_learns_the_order_of_the_losses():
    """One flat and one noisy half: after some steps the noisy half is called harder."""
    torch.manual_seed(0)
    model = mae({"name": "hpm"}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.zeros(16, 1, 16, 16)
    noise = torch.Generator().manual_seed(4)
    for step in range(60):
        images[..., 8:] = torch.randn(16, 1, 16, 8, generator=noise)
        request = ask(model, images, 8, step=step)
        visible_BV, hidden_BX = split_indices(hide_smallest(request.noise(), 8), 8)
        model(images, visible_BV, hidden_BX).backward()
        optimizer.step()
        optimizer.zero_grad()
    difficulty = predicted_difficulty(model, images).reshape(16, 4, 4)
    assert (difficulty[..., 2:].mean((1, 2)) > difficulty[..., :2].mean((1, 2))).all()


# AttMask

RANKED = [[0.0, 11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6]]


def test_high_and_low_hide_the_most_and_the_least_attended():
    high = attmask(told(RANKED, 4, (3, 4)))[0].nonzero()[:, 0].tolist()
    assert high == [1, 3, 5, 7]
    low = attmask(told(RANKED, 4, (3, 4)), kind="low")[0].nonzero()[:, 0].tolist()
    assert low == [0, 2, 4, 6]


def test_a_hint_leaves_some_of_the_most_attended_visible():
    shown = set()
    for step in range(40):
        request = told(RANKED, 4, (3, 4), step=step)
        is_hidden_BU = attmask(request, kind="hint", shown=0.25, shown_from=0.25)
        hidden = set(is_hidden_BU[0].nonzero()[:, 0].tolist())
        # int(0.25 * 4) = 1 of the int(0.25 * 12) = 3 most attended is shown, the fifth fills in
        (hint,) = {1, 3, 5, 7, 9} - hidden
        assert hint in {1, 3, 5} and hidden == {1, 3, 5, 7, 9} - {hint}
        shown.add(hint)
    assert shown == {1, 3, 5}


def test_chance_does_not_hide_what_a_hint_shows():
    often = torch.zeros(12)
    for step in range(400):
        request = told(RANKED, 8, (3, 4), step=step)
        hidden = attmask(request, kind="hint", shown=0.125, shown_from=0.01, guided=HALF)
        assert hidden.sum() == 8
        often += hidden[0]
    # the most attended is always shown, the next four are guided, 4 of the other 7 by chance
    assert often[1] == 0 and (often[[3, 5, 7, 9]] == 400).all()
    assert (often[[0, 2, 4, 6, 8, 10, 11]] / 400 - 4 / 7).abs().max() < 0.13


def test_attention_of_the_class_token_equals_the_last_blocks_own():
    model = mae()
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    found = model.class_attention(images)

    encoder, last = model.encoder, model.encoder.blocks[-1]
    tokens = encoder.layers(patchify(images, (4, 4)))[-2]
    query, key, _ = last.attn.qkv(last.norm1(tokens)).chunk(3, dim=-1)
    heads = encoder.heads
    expected = torch.stack(
        [
            (q[:, :1] @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)[:, 0]
            for q, k in zip(query.chunk(heads, -1), key.chunk(heads, -1), strict=True)
        ]
    ).mean(0)
    torch.testing.assert_close(found, expected[:, 1:])


# Units


@pytest.mark.parametrize("unit_grid", [(2, 3), (1, 2), (2, 1, 3)])
def test_a_unit_has_the_mean_of_its_patches(unit_grid):
    grid = [2 * units for units in unit_grid]
    values_BP = torch.randn(2, math.prod(grid), generator=torch.Generator().manual_seed(6))
    found = to_units(values_BP, unit_grid, (2,) * len(grid))
    pooled = values_BP.reshape(2, *grid)
    for axis in range(len(grid)):
        pooled = pooled.unflatten(axis + 1, (-1, 2)).mean(axis + 2)
    torch.testing.assert_close(found, pooled.flatten(1))


# Guidance, measured


def lesions(count, size=32, edge=4, seed=0):
    """Noise of deviation 0.2 with three bright, textured squares in each image, on the grid."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.randn(count, 1, size, size, generator=generator)
    cells = size // edge
    order = torch.rand(count, cells**2, generator=generator).argsort(1)[:, :3]
    is_lesion_BU = torch.zeros(count, cells**2, dtype=torch.bool).scatter_(1, order, True)
    texture = 2 + torch.randn(count, 1, size, size, generator=generator)
    is_lesion = is_lesion_BU.reshape(count, 1, cells, cells)
    is_lesion = is_lesion.repeat_interleave(edge, 2).repeat_interleave(edge, 3)
    return torch.where(is_lesion, texture, images), is_lesion_BU


def test_anatomask_hides_lesions_more_often_than_chance():
    """A teacher of 40 steps, half of the hidden units guided at the end, ratio 0.5."""
    model = mae(size=(32, 32)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(40):
        images, _ = lesions(16, seed=step)
        request = ask(model, images, 32, step=step)
        visible_BV, hidden_BX = split_indices(hide_smallest(request.noise(), 32), 32)
        model(images, visible_BV, hidden_BX).backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher = copy.deepcopy(model).eval()
    images, is_lesion_BU = lesions(256, seed=99)
    shares = {}
    with torch.no_grad():
        for complementary in (False, True):
            request = ask(teacher, images, 32, progress=1.0)
            is_hidden_BU = anatomask(request, complementary=complementary)
            shares[complementary] = is_hidden_BU[is_lesion_BU].float().mean().item()
    chance = hide_smallest(request.noise(), 32)[is_lesion_BU].float().mean().item()
    assert abs(chance - 0.5) < 0.09  # 768 lesion units: five standard deviations
    # one mask scores half of the units: 0.5 + 0.5 * (1 - 1/3); two masks score all of them
    assert shares[False] > chance + 0.1
    assert shares[True] > chance + 0.25
