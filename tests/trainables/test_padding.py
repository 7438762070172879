"""Padding counts nowhere: `pytest tests/trainables/test_padding.py`."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests import toy
from trainables import padding, probe
from trainables.atlas import class_numbers, draw_masks
from trainables.config import ProbeConfig, TrialConfig
from trainables.context import Context
from trainables.data.store import Volumes
from trainables.hiding import hide
from trainables.losses import DIFFICULTY, LOSSES, absolute_loss, arl, category_loss, ranking_loss
from trainables.mae import MAE, build_mae, patchify
from trainables.masking import MASKING, MaskRequest, Strategy, pixels_hidden
from trainables.masking.guided import hide_hardest, predicted_difficulty
from trainables.masking.lesions import (
    descriptors,
    encoder_features,
    first_centres,
    highest_contrast,
    kmeans,
)
from trainables.masking.request import mean_of_real
from trainables.pictures import to_intensity
from trainables.pretrain import choose_patches, make_learner, make_plan, train_step
from trainables.probe import Judge, Trivial, best_of, measure, metric_names, trivial_psnr
from trainables.unetr import build_unetr

torch.set_num_threads(1)

PATCH, GRID = (4, 2, 4), (2, 3, 2)
SIZE = (8, 6, 8)  # of a volume that fills its crop
ALWAYS = {"name": "constant", "value": 1.0}
HALF = {"name": "constant", "value": 0.5}

# Settings of trials that between them compute every loss, on both decoders
TRIALS = {
    **{name: {"pretrain": {"loss": name}} for name in LOSSES},
    "normalised": {"pretrain": {"target": "normalised"}},
    "visible": {"pretrain": {"visible_weight": 0.5}},
    "all patches": {"pretrain": {"visible_weight": 0.5, "visible_mean": "all_patches"}},
    "arl, soft": {"pretrain": {"loss": {"name": "arl", "temperature": 0.3}}},
    "rrl, normalised": {"pretrain": {"loss": "rrl", "target": "normalised"}},
    "cross": {"decoder": {"attention": "cross"}},
    "cross, normalised": {"decoder": {"attention": "cross"}, "pretrain": {"target": "normalised"}},
    "hpm": {"strategy": {"name": "hpm"}},
    "hpm, cross": {"decoder": {"attention": "cross"}, "strategy": {"name": "hpm"}},
    "hpm, absolute": {"strategy": {"name": "hpm", "difficulty_loss": "absolute"}},
    **{
        f"amlp, {reading}": {
            "strategy": {"name": "amlp", "category_weight": 1.0, "category_reading": reading}
        }
        for reading in ("median", "order", "margin")
    },
}


def config_of(name="mean", patch=PATCH, patches_per_unit=(1, 1, 1), **masking):
    settings = TRIALS.get(name, {"strategy": name})
    unit = [edge * count for edge, count in zip(patch, patches_per_unit, strict=True)]
    decoder = {"depth": 2, "width": 64} | settings.get("decoder", {})
    return TrialConfig.model_validate(
        {
            "model": {"size": "pico", "patch": list(patch), "decoder": decoder},
            "masking": {"strategy": settings.get("strategy", "random"), "unit": unit} | masking,
            "pretrain": settings.get("pretrain", {}),
        }
    )


def volumes(size, batch=3, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator)


def padded(images, size):
    """The same volumes at the beginning of a larger crop."""
    crop = torch.full((*images.shape[:2], *size), math.nan)
    crop[(..., *(slice(edge) for edge in images.shape[2:]))] = images
    return crop


def longer(size, axis, by):
    return tuple(edge + by * (axis == number) for number, edge in enumerate(size))


def places(small, large):
    """Numbers that the cells of a small grid have in a large one, and those of all other cells."""
    numbers = np.arange(math.prod(large)).reshape(large)
    inside = numbers[tuple(slice(edge) for edge in small)].ravel()
    return torch.tensor(inside), torch.tensor(np.setdiff1d(numbers, inside))


def halves(batch, count):
    """Every other patch visible, in an order of its own for each image."""
    order_BP = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(n)) for n in range(batch)]
    )
    return order_BP[:, ::2], order_BP[:, 1::2]


def loss_and_gradients(config, images, visible_BV, hidden_BX, weights=None, is_padded=True):
    model = build_mae(config, images.shape[2:], images.shape[1], seed=1, is_padded=is_padded)
    if weights is not None:
        model.load_state_dict(weights)
    loss = model(images, visible_BV, hidden_BX)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in model.named_parameters()}


def assert_alike(found, expected):
    # float32: to 4 units in the last place, as processors add up in different orders
    assert found[0] == pytest.approx(expected[0], rel=2**-21, abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        if gradient is None:
            assert found[1][name] is None
        else:
            torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def in_larger_crop(numbers_BN, small, large, share):
    """The same patches, and of the padding beyond them every other one."""
    inside, outside = places(small, large)
    more = outside[share::2].expand(len(numbers_BN), -1)
    return torch.cat([inside[numbers_BN], more], dim=1)


# The model


@pytest.mark.parametrize("by", [4, 8, 12])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", TRIALS)
def test_a_padded_volume_has_the_loss_and_the_gradients_of_the_volume(name, axis, by):
    images = volumes(SIZE)
    visible_BV, hidden_BX = halves(3, 12)
    expected = loss_and_gradients(config_of(name), images, visible_BV, hidden_BX, is_padded=False)

    size = longer(SIZE, axis, by)
    grid = tuple(edge // part for edge, part in zip(size, PATCH, strict=True))
    found = loss_and_gradients(
        config_of(name),
        padded(images, size),
        in_larger_crop(visible_BV, GRID, grid, 0),
        in_larger_crop(hidden_BX, GRID, grid, 1),
    )
    assert_alike(found, expected)


@pytest.mark.parametrize("name", TRIALS)
def test_more_padding_changes_nothing_where_patches_are_padded_in_part(name):
    images = volumes((7, 5, 6))
    visible_BV, hidden_BX = halves(3, 12)
    expected = loss_and_gradients(config_of(name), padded(images, SIZE), visible_BV, hidden_BX)
    size, grid = (12, 8, 8), (3, 4, 2)
    found = loss_and_gradients(
        config_of(name),
        padded(images, size),
        in_larger_crop(visible_BV, GRID, grid, 0),
        in_larger_crop(hidden_BX, GRID, grid, 1),
    )
    assert math.isfinite(expected[0])
    assert_alike(found, expected)


def patch_numbers(size, patch):
    """The number of the patch that each voxel lies in, by arithmetic with its own coordinates."""
    grid = [edge // part for edge, part in zip(size, patch, strict=True)]
    x, y, z = np.indices(size)
    return (x // patch[0] * grid[1] + y // patch[1]) * grid[2] + z // patch[2]


@pytest.mark.parametrize("grid", [(2, 3, 4), (4, 3, 2), (1, 5, 2)])
@pytest.mark.parametrize("cut", [(0, 0, 0), (1, 5, 11)])
def test_exactly_the_voxels_of_hidden_patches_are_compared(grid, cut):
    """A model that says 0 everywhere errs by the mean square of the hidden voxels that exist."""
    patch = (4, 8, 8)
    size = tuple(cells * edge for cells, edge in zip(grid, patch, strict=True))
    real = tuple(max(1, edge - less) for edge, less in zip(size, cut, strict=True))
    images = padded(volumes(real, channels=1), size)
    visible_BV, hidden_BX = halves(3, math.prod(grid))
    model = build_mae(config_of(patch=patch), size, 1, seed=0, is_padded=True)
    nn.init.zeros_(model.decoder.head.weight)

    is_hidden = np.stack([np.isin(patch_numbers(size, patch), row) for row in hidden_BX.numpy()])
    is_hidden_BP = torch.zeros(3, math.prod(grid), dtype=torch.bool).scatter_(1, hidden_BX, True)
    assert (pixels_hidden(is_hidden_BP, grid, patch).numpy() == is_hidden).all()
    values = images[:, 0].numpy()
    by_hand = [np.nanmean(values[n][is_hidden[n]] ** 2) for n in range(3)]
    assert model(images, visible_BV, hidden_BX).item() == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_with_visible_patches_every_voxel_that_exists_counts_the_same():
    """The mean over all patches is that over all voxels, however many of them are hidden."""
    settings = config_of().model_dump(mode="json")
    settings["pretrain"] |= {"visible_weight": 1.0, "visible_mean": "all_patches"}
    images = padded(volumes((7, 5, 3)), SIZE)
    model = build_mae(TrialConfig.model_validate(settings), SIZE, 2, seed=0, is_padded=True)
    nn.init.zeros_(model.decoder.head.weight)
    order_BP = torch.cat(halves(3, 12), dim=1)
    by_hand = np.nanmean(images.numpy() ** 2)
    for hidden in (2, 9):
        loss = model(images, order_BP[:, hidden:], order_BP[:, :hidden]).item()
        assert loss == pytest.approx(by_hand, rel=1e-5)


def test_normalised_targets_have_the_moments_of_real_voxels():
    """One hidden patch of 4 voxels, of which 1, 2, 3 exist: mean 2, variance 2/3."""
    config = config_of("normalised", patch=(1, 1, 4))
    model = build_mae(config, (1, 1, 8), 1, seed=0, is_padded=True)
    nn.init.zeros_(model.decoder.head.weight)
    values = torch.tensor([5.0, 6, 7, 8, 1, 2, 3, math.nan]).reshape(1, 1, 1, 1, 8)
    loss = model(values, torch.tensor([[0]]), torch.tensor([[1]])).item()
    variance = 2 / 3
    assert loss == pytest.approx(variance / (variance + 0.05**2), rel=1e-5)

    nn.init.ones_(model.decoder.head.bias)
    picture = model.reconstruct(values, torch.tensor([[0]]), torch.tensor([[1]])).flatten()
    assert picture[4:7].tolist() == pytest.approx([2 + math.sqrt(variance + 0.05**2)] * 3)
    raw = model.patch_errors(values, torch.tensor([[0]]), torch.tensor([[1]]), normalised=False)
    assert raw.item() == pytest.approx((0 + 1 + 4) / 3)


def test_attention_passes_padding_by():
    """The class token, each token and each difficulty are as if the padding were not there."""
    images, size, grid = volumes(SIZE), (8, 8, 16), (2, 4, 4)
    inside, outside = places(GRID, grid)
    small = build_mae(config_of("hpm"), SIZE, 2, seed=1)
    large = build_mae(config_of("hpm"), size, 2, seed=1, is_padded=True)
    crop = padded(images, size)
    with torch.no_grad():
        attention_BP = large.class_attention(crop)
        assert (attention_BP[:, outside] == 0).all()
        torch.testing.assert_close(attention_BP[:, inside], small.class_attention(images))
        tokens = large.encoder(patchify(crop, PATCH))[:, 1:]
        expected = small.encoder(patchify(images, PATCH))[:, 1:]
        torch.testing.assert_close(tokens[:, inside], expected, atol=1e-5, rtol=1e-4)
        difficulty_BP = predicted_difficulty(large, crop)
        torch.testing.assert_close(
            difficulty_BP[:, inside], predicted_difficulty(small, images), atol=1e-5, rtol=1e-4
        )
        assert difficulty_BP.isfinite().all()


def test_who_was_not_told_of_padding_computes_nan():
    visible_BV, hidden_BX = halves(3, 12)
    model = build_mae(config_of(), SIZE, 2, seed=0)
    assert model(padded(volumes((8, 6, 7)), SIZE), visible_BV, hidden_BX).isnan()


def test_nothing_looks_for_padding_where_there_is_none(monkeypatch):
    def looked(*_):
        raise AssertionError

    for name in ("filled", "keys", "real_share", "is_padding"):
        monkeypatch.setattr(padding, name, looked)
    monkeypatch.setattr(torch.Tensor, "isnan", looked)
    images, (visible_BV, hidden_BX) = volumes(SIZE), halves(3, 12)
    for name in TRIALS:
        build_mae(config_of(name), SIZE, 2, seed=0)(images, visible_BV, hidden_BX)
    for name in MASKING:
        model = build_mae(config_of(name), SIZE, 2, seed=0)
        hide(config_of(name), MaskRequest(GRID, 6, 0.5, 0, 0, torch.arange(3), images, model))
    build_unetr(config_of(), SIZE, 2, 3)(images)


@pytest.mark.parametrize("name", TRIALS)
def test_a_volume_of_which_nothing_is_hidden_has_a_loss_of_zero(name):
    """One patch alone is real, and visible: no number becomes infinite, and no gradient."""
    images = padded(volumes(PATCH), SIZE)
    visible_BV, hidden_BX = (torch.arange(12).expand(3, -1)[:, part] for part in ([0, 1], [2, 3]))
    loss, gradients = loss_and_gradients(config_of(name), images, visible_BV, hidden_BX)
    assert loss == 0 if "visible" not in name and "all" not in name else math.isfinite(loss)
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)


# Training


def context():
    return Context(torch.device("cpu"), Path(), "a", (1.0,), lambda _: False, lambda *_: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("name", MASKING)
def test_not_a_number_never_reaches_a_weight(name, attention, precision):
    settings = config_of(name, ratio=HALF).model_dump(mode="json")
    settings["model"]["decoder"] = {"depth": 1, "width": 64, "attention": attention}
    settings["pretrain"] |= {"batch": 4, "epochs": 2, "precision": precision}
    settings["pretrain"]["augment"] = {"name": "flips"}
    config = TrialConfig.model_validate(settings)
    sizes = [(8, 6, 8), (7, 6, 1), (1, 1, 1), (3, 5, 8)]
    images = torch.cat([padded(volumes(size, batch=1, seed=5), SIZE) for size in sizes])
    plan = make_plan(config, SIZE, 2, 4, (1.0,), seed=0)
    learner = make_learner(config, SIZE, 2, 0, context(), is_padded=True)
    for step in range(2):
        loss = train_step(learner, images, config, 0, plan, step, torch.arange(4))
        assert loss.isfinite()
    for model in (learner.model, learner.teacher):
        if model is not None:
            assert all(weight.isfinite().all() for weight in model.parameters())


# Masking


@functools.lru_cache(maxsize=64)
def model_of(name, size, patches_per_unit):
    return build_mae(config_of(name, (2, 1, 2), patches_per_unit), size, 1, 0, is_padded=True)


REAL = [(8, 8, 16), (8, 8, 1), (1, 1, 1), (3, 8, 7), (4, 8, 16), (2, 5, 16), (1, 2, 1), (1, 1, 3)]


def padded_request(name, grid, hidden, patches_per_unit=(1, 1, 1), step=0):
    """A request for one volume of each of the sizes in REAL."""
    unit = [edge * count for edge, count in zip((2, 1, 2), patches_per_unit, strict=True)]
    size = tuple(cells * edge for cells, edge in zip(grid, unit, strict=True))
    real = [tuple(map(min, size, edges)) for edges in REAL]
    images = [padded(volumes(edges, 1, 1, seed), size) for seed, edges in enumerate(real)]
    images = torch.cat(images)
    request = MaskRequest(
        grid,
        hidden,
        0.9,
        0,
        step,
        torch.arange(len(REAL)),
        images,
        model_of(name, size, patches_per_unit),
        patches_per_unit,
        padding.is_padding(images, unit),
    )
    cells = [
        math.prod(-(-edge // part) for edge, part in zip(edges, unit, strict=True))
        for edges in real
    ]
    return request, cells


def expected_count(hidden, real, units):
    count = round(hidden * real / units)
    return min(max(count, 1), real - 1) if real >= 2 else count


@torch.no_grad()
@pytest.mark.parametrize("patches_per_unit", [(1, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("grid", [(4, 8, 8), (2, 3, 4)])
@pytest.mark.parametrize("name", MASKING)
def test_every_strategy_hides_the_same_share_of_what_is_real(name, grid, patches_per_unit):
    config, units = config_of(name, (2, 1, 2), patches_per_unit), math.prod(grid)
    for hidden in (1, units // 4, units // 2, round(0.9 * units), units - 1):
        request, real = padded_request(name, grid, hidden, patches_per_unit)
        assert request.num_real_B1[:, 0].tolist() == real
        is_hidden_BU = hide(config, request)
        assert is_hidden_BU.sum(1).tolist() == [hidden] * len(REAL)
        found = (is_hidden_BU & ~request.is_padding_BU).sum(1).tolist()
        assert found == [expected_count(hidden, count, units) for count in real]
        # the strategy itself, without chance's correction
        raw_BU = MASKING[name].hide(request, **config.masking.strategy.options())
        assert raw_BU.equal(is_hidden_BU)


def test_counts_by_hand():
    # 9 of 12 units: 3/4 of 12, 8, 5 (3.75), 2 (1.5, but one is to be seen), 1 (0.75), none
    is_padding_BU = torch.arange(12) >= torch.tensor([12, 8, 5, 2, 1, 0])[:, None]
    request = MaskRequest((12,), 9, 0, 0, 0, torch.arange(6), is_padding_BU=is_padding_BU)
    assert request.hidden_real_B1[:, 0].tolist() == [9, 6, 4, 1, 1, 0]
    # 2 of 12: 2, 1 (1.33), 1 (0.83), 1 (0.33, but one is to be hidden), 0 (0.17), none
    assert replace(request, hidden=2).hidden_real_B1[:, 0].tolist() == [2, 1, 1, 1, 0, 0]


def test_chance_corrects_a_strategy_that_knows_nothing_of_padding(monkeypatch):
    def first(request):
        places = torch.arange(request.num_units) < request.hidden
        return places.expand(len(request.samples_B), -1)

    monkeypatch.setitem(MASKING, "random", Strategy(first))
    # 6 of 12 units: at first the first 6 of the 8 real ones, where 4 are due
    is_padding_BU = (torch.arange(12) >= 8).expand(3000, -1)
    request = MaskRequest((3, 4), 6, 0, 0, 0, torch.arange(3000), is_padding_BU=is_padding_BU)
    is_hidden_BU = hide(config_of(), request)
    assert is_hidden_BU[:, :6].sum(1).eq(4).all() and is_hidden_BU[:, 8:].sum(1).eq(2).all()
    often = is_hidden_BU.float().mean(0)
    # five standard deviations of 3000 draws at 2/3 and 1/2 are 0.043 and 0.046
    assert (often[:6] - 2 / 3).abs().max() < 0.043 and (often[8:] - 0.5).abs().max() < 0.046


def test_padding_never_guides():
    """Of 8 real units 4 are hidden; guided are the same share of them as of all 6."""
    scores_BU = torch.arange(12.0)[None]  # padding, the last four, has the highest
    is_padding_BU = torch.arange(12)[None] >= 8
    for step in range(20):
        request = MaskRequest((12,), 6, 0, 0, step, torch.tensor([0]), is_padding_BU=is_padding_BU)
        assert hide_hardest(request, scores_BU, 6)[0, :8].nonzero()[:, 0].tolist() == [4, 5, 6, 7]
        assert hide_hardest(request, scores_BU, 3)[0, [6, 7]].all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["high", "low"])
def test_attmask_hides_the_most_or_least_attended_of_what_is_real(kind):
    strategy = {"name": "attmask", "kind": kind}
    config = config_of(strategy=strategy)
    images = padded(volumes((8, 4, 4)), SIZE)  # 2 x 2 x 1 patches
    model = build_mae(config, SIZE, 2, seed=0, is_padded=True)
    is_padding_BU = padding.is_padding(images, PATCH)
    assert is_padding_BU[0].tolist() == [False, True, False, True, True, True] * 2
    request = MaskRequest(
        GRID, 6, 1.0, 0, 0, torch.arange(3), images, model, is_padding_BU=is_padding_BU
    )
    attention_BP = model.class_attention(images)[:, [0, 2, 6, 8]]
    expected = attention_BP.argsort(dim=1, descending=kind == "high")[:, :2].sort(dim=1).values
    is_hidden_BP = hide(config, request)[:, [0, 2, 6, 8]]
    assert is_hidden_BP.nonzero()[:, 1].reshape(3, 2).equal(expected)


@torch.no_grad()
@pytest.mark.parametrize("real", [(7, 5, 6), (3, 6, 1), (8, 2, 3)])
def test_descriptors_and_features_are_those_of_real_voxels(real):
    size, grid = (12, 10, 8), (3, 5, 2)
    inside, outside = places(GRID, grid)
    images = volumes(real)
    small, large = padded(images, SIZE), padded(images, size)
    found = descriptors(large, grid, is_padded=True)
    assert (found[:, outside] == 0).all()
    expected = descriptors(small, GRID, is_padded=True)
    torch.testing.assert_close(found[:, inside], expected, atol=1e-5, rtol=1e-4)

    for crop, units, kept in ((small, GRID, slice(None)), (large, grid, inside)):
        model = build_mae(config_of(), crop.shape[2:], 2, seed=1, is_padded=True)
        is_padding_BU = padding.is_padding(crop, PATCH)
        request = MaskRequest(
            units, 6, 0, 0, 0, torch.arange(3), crop, model, is_padding_BU=is_padding_BU
        )
        features = encoder_features(request)
        assert (features[is_padding_BU] == 0).all()
        if units == GRID:
            expected = features
        else:
            torch.testing.assert_close(features[:, kept], expected, atol=1e-4, rtol=1e-3)
        assignment_BU, _ = kmeans(descriptors(crop, units, is_padded=True), 2, 10, request)
        assert (assignment_BU == -1).equal(is_padding_BU)


def test_padding_begins_no_cluster_and_is_no_part_of_the_median():
    """Of 12 units 5 are real: three at 3, two at -1; what is padding stands at 0."""
    is_padding_BU = (torch.arange(12) >= 5).expand(300, -1)
    request = MaskRequest((12,), 6, 0, 0, 0, torch.arange(300), is_padding_BU=is_padding_BU)
    values_BU1 = torch.tensor([3.0, 3, 3, -1, -1] + [0.0] * 7)[None, :, None].expand(300, -1, -1)
    centres_BK = first_centres(values_BU1, 2, request)[..., 0]
    assert centres_BK.sort(dim=1).values.equal(torch.tensor([-1.0, 3]).expand(300, -1))

    is_member_BUK = torch.zeros(300, 12, 2, dtype=torch.bool)
    is_member_BUK[:, :3, 0], is_member_BUK[:, 3:5, 1] = True, True
    # the median unit is at 3: the others are 4 away; from 0 the first would be 3 away
    assert highest_contrast(request, is_member_BUK, values_BU1).eq(1).all()


def test_descriptors_of_a_volume_without_padding_are_the_usual_ones():
    images = volumes((8, 6, 8))
    torch.testing.assert_close(
        descriptors(images, GRID, is_padded=True), descriptors(images, GRID), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", MASKING)
def test_nothing_waits_for_the_device(name):
    """On the meta device, where no number exists, reading one is an error."""
    config = config_of(name, secondary=0.3)
    with torch.device("meta"):
        images, samples_B = torch.empty(4, 1, *SIZE), torch.arange(4)
        model = MAE(config, SIZE, 1, is_padded=True)
        is_padding_BU = padding.is_padding(images, PATCH)
        request = MaskRequest(
            GRID, 6, 0.9, 0, 0, samples_B, images, model, (1, 1, 1), is_padding_BU
        )
        with torch.no_grad():
            masks = choose_patches(config, request)
        model(images, *masks).backward()


def test_a_share_of_what_is_real_is_replaced():
    """12 units, 6 hidden, half of what is visible replaced: 3 of 6; of 8 real ones 2 of 4."""
    config = config_of(secondary=0.5)
    is_padding_BU = torch.arange(12) >= torch.tensor([12, 8, 5])[:, None]
    request = MaskRequest(GRID, 6, 0, 0, 0, torch.arange(3), is_padding_BU=is_padding_BU)
    visible_BV, _, is_replaced_BV = choose_patches(config, request)
    assert is_replaced_BV.sum(1).tolist() == [3, 2, 2]  # of 5, 2 hidden: half of 3 is rounded to 2
    assert not (is_replaced_BV & is_padding_BU.gather(1, visible_BV)).any()


def test_padding_is_predicted_when_nothing_else_is_left():
    decoder = {"depth": 1, "width": 64, "attention": "cross", "predicted": 0.5}
    settings = config_of().model_dump(mode="json")
    settings["model"]["decoder"] = decoder
    images = padded(volumes((8, 6, 4), channels=1), SIZE)  # 6 real patches, of which 3 are hidden
    request = MaskRequest(
        GRID,
        6,
        0,
        0,
        0,
        torch.arange(3),
        images,
        is_padding_BU=padding.is_padding(images, PATCH),
    )
    _, hidden_BX, _ = choose_patches(TrialConfig.model_validate(settings), request)
    assert hidden_BX.shape == (3, 3) and not request.is_padding_BU.gather(1, hidden_BX).any()


# Losses

WEIGHED = {
    **{name: lambda e, t, w, f=f: f(e, t, w) for name, f in LOSSES.items()},
    "arl, soft": lambda e, t, w: arl(e, t, w, temperature=0.4),
    **{name: lambda e, t, w, f=f: f(t[..., 0], e, w) for name, f in DIFFICULTY.items()},
    **{
        name: lambda e, t, w, reading=name: category_loss(t[..., 0], e, w, reading=reading)
        for name in ("median", "order", "margin")
    },
}


def some_errors():
    generator = torch.Generator().manual_seed(4)
    return torch.rand(5, 7, generator=generator), torch.randn(5, 7, 4, generator=generator)


@pytest.mark.parametrize("name", WEIGHED)
def test_full_weights_are_none(name):
    errors_BX, truth_BXQ = some_errors()
    loss = WEIGHED[name]
    expected = loss(errors_BX, truth_BXQ, None)
    torch.testing.assert_close(loss(errors_BX, truth_BXQ, torch.ones(5, 7)), expected)


@pytest.mark.parametrize("name", WEIGHED)
def test_a_patch_without_weight_might_as_well_not_be_there(name):
    errors_BX, truth_BXQ = some_errors()
    errors_BX, truth_BXQ = errors_BX.clone(), truth_BXQ.clone()
    truth_BXQ[:, [0, 5], 1:] = 0
    weight_BX = torch.tensor([0.0, 1, 0.5, 1, 0.25, 0, 0.75]).expand(5, -1)
    kept = [1, 2, 3, 4, 6]
    found = WEIGHED[name](errors_BX, truth_BXQ, weight_BX)
    expected = WEIGHED[name](errors_BX[:, kept], truth_BXQ[:, kept], weight_BX[:, kept])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    unweighed = WEIGHED[name](errors_BX[:, kept], truth_BXQ[:, kept], None)
    assert not torch.allclose(found, unweighed, rtol=1e-3)


def test_weights_by_hand():
    row = torch.tensor
    errors, weight, nothing = row([[1.0, 4, 3]]), row([[1.0, 0.5, 0.5]]), torch.zeros(1, 3, 4)
    assert LOSSES["mean"](errors, nothing, weight).item() == (1 + 2 + 1.5) / 2
    # mean error 2.25: each patch counts error / 2.25 times its weight
    by_hand = (1 + 0.5 * 16 + 0.5 * 9) / (1 + 0.5 * 4 + 0.5 * 3)
    assert LOSSES["arl"](errors, nothing, weight).item() == pytest.approx(by_hand)
    # of 4 values the real ones are 2: power 4 in the first, of the halves 9 and 1
    truth = row([[[2.0, 2, 2, 2], [3, 3, 0, 0], [1, 1, 0, 0]]])
    by_hand = (1 / 4.1 + 0.5 * 4 / 9.1 + 0.5 * 3 / 1.1) / 2
    rrl = functools.partial(LOSSES["rrl"], errors, truth, weight)
    assert rrl(relative_to="patch").item() == pytest.approx(by_hand)
    # the mean power counts each patch by what is real of it
    by_hand = (1 + 0.5 * 16 + 0.5 * 9) / 2 / 2.25 / ((4 + 0.5 * 9 + 0.5 * 1) / 2 + 0.1)
    assert rrl().item() == pytest.approx(by_hand)
    # pairs weigh 1/2, 1/2 and 1/4; the first is told right, the others by nothing
    predicted = row([[0.0, 1, 0]])
    right = -math.log(1 / (1 + math.exp(-1)) + 1e-6)
    by_hand = (0.5 * right + 0.5 * math.log(2) + 0.25 * right) / 1.25
    assert ranking_loss(predicted, errors, weight).item() == pytest.approx(by_hand, rel=1e-4)
    # mean 2.25, variance (1.25^2 + 0.5 x 1.75^2 + 0.5 x 0.75^2) / 2
    variance = (1.25**2 + 0.5 * 1.75**2 + 0.5 * 0.75**2) / 2
    assert absolute_loss(torch.zeros(1, 3), errors, weight).item() == pytest.approx(
        variance / (variance + 1e-6)
    )
    # half of the weight lies at 1: harder are 3 and 4
    logits = row([[0.0, 5, -5]])
    by_hand = (math.log(2) + 0.5 * math.log1p(math.exp(-5)) + 0.5 * math.log1p(math.exp(5))) / 2
    found = category_loss(logits, errors, weight, reading="median").item()
    assert found == pytest.approx(by_hand)


# The probe


MEAN, STD = [0.5], [0.2]
PROBE = ProbeConfig(unit=(4, 2, 4), ratios=(0.25, 0.5), images=4, seed=3)


def trivial_of(images, rows):
    is_padded = bool(images.isnan().any())
    return best_of(trivial_psnr(images, rows, PROBE, MEAN, STD, is_padded=is_padded))


def test_probe_numbers_are_those_of_the_volume(monkeypatch):
    """The same voxels are hidden; PSNR and gain are the same, the padding is no part of them."""
    images, size, grid = volumes(SIZE, channels=1) * 0.5, (8, 8, 16), (2, 4, 4)
    inside, outside = places(GRID, grid)
    rows = torch.tensor([3, 1, 4])
    config = config_of(ratio=HALF)
    usual_probe, usual_native = probe.probe_mask, probe.native_mask

    def guess(images, visible_BV, hidden_BX):
        return images.nan_to_num(nan=9.0) * 0.7 + 0.1  # far off in padding

    trivial = trivial_of(images, rows)
    expected, counted = measure(guess, None, images, rows, config, PROBE, trivial, MEAN, STD)
    assert all(is_counted.all() for is_counted in counted.values())

    def in_crop(is_hidden_BU):
        crop = torch.zeros(3, math.prod(grid), dtype=torch.bool)
        crop[:, inside], crop[:, outside[::2]] = is_hidden_BU, True
        return crop, int(crop[0].sum())

    def probe_mask(probe, ratio, size, patch, rows_B):
        return in_crop(usual_probe(probe, ratio, SIZE, patch, rows_B)[0])

    def native_mask(config, seed, crop, rows_B, model, is_padded):
        assert is_padded
        return in_crop(usual_native(config, seed, images, rows_B, model)[0])

    monkeypatch.setattr(probe, "probe_mask", probe_mask)
    monkeypatch.setattr(probe, "native_mask", native_mask)
    crop = padded(images, size)
    trivial = trivial_of(crop, rows)
    found, counted = measure(
        guess, None, crop, rows, config, PROBE, trivial, MEAN, STD, is_padded=True
    )
    assert all(is_counted.all() for is_counted in counted.values())
    assert found.keys() == expected.keys() == set(metric_names(PROBE, config))
    for name, values_B in expected.items():
        if "ssim" in name:  # windows at the rim see padding, which both have
            assert ((found[name] > 0) & (found[name] < 1)).all()
        else:
            torch.testing.assert_close(found[name], values_B, atol=1e-5, rtol=0)

    def truth(images, visible_BV, hidden_BX):
        return images.nan_to_num(nan=9.0)

    perfect, _ = measure(truth, None, crop, rows, config, PROBE, trivial, MEAN, STD, is_padded=True)
    assert perfect["probe_ssim"].tolist() == pytest.approx([1] * 3)
    assert perfect["probe_psnr"].tolist() == pytest.approx([100] * 3)


def test_a_prediction_that_is_no_number_is_not_taken_for_black():
    def broken(images, visible_BV, hidden_BX):
        return torch.full_like(images, math.nan)

    images = padded(volumes((8, 6, 7), channels=1), SIZE)
    rows = torch.arange(3)
    trivial = trivial_of(images, rows)
    found, _ = measure(
        broken, None, images, rows, config_of(), PROBE, trivial, MEAN, STD, is_padded=True
    )
    assert all(values_B.isnan().all() for values_B in found.values())


class Fixed:
    """What a data set holds on a device, as volumes that are given."""

    def __init__(self, images):
        self.images = images

    def batch(self, places_B):
        return self.images[places_B], None


@pytest.mark.parametrize("batch", [2, 4])
def test_a_volume_with_nothing_to_fill_in_is_left_out_of_the_mean(monkeypatch, batch):
    crop = torch.cat([padded(volumes(size, 1, 1), SIZE) for size in [SIZE, (3, 2, 3), (5, 6, 8)]])
    monkeypatch.setattr(probe, "to_device", lambda *_, **__: Fixed(crop))
    settings = config_of(ratio=HALF).model_dump(mode="json")
    settings["pretrain"] |= {"batch": batch, "precision": "fp32"}
    config = TrialConfig.model_validate(settings)
    flat = toy.discs(12)  # 3 for validation
    shapes = np.array([(3, 2, 3)])  # of any volume: one that is smaller than a crop
    none = np.zeros((0, 3), np.int64)
    smaller = Volumes(shapes, shapes * 1.0, none, none, none, none, none, overlap=0, tolerance=1)
    data = replace(flat, size=SIZE, mean=tuple(MEAN), std=tuple(STD), volumes=smaller)
    assert data.is_padded
    model = build_mae(config, SIZE, 1, seed=0, is_padded=True)
    scores = Judge(config, data, PROBE, context()).scores(model, None)
    assert scores.keys() == set(metric_names(PROBE, config))

    together = trivial_of(crop, torch.from_numpy(data.rows("val")))

    def alone(place):
        image, row = crop[place : place + 1], torch.tensor([data.rows("val")[place]])
        trivial = Trivial(trivial_of(image, row).psnr_FRB, together.best_R)
        ask = functools.partial(
            measure, model.reconstruct, model, image, row, config, PROBE, trivial
        )
        with torch.no_grad():
            return ask(MEAN, STD, is_padded=True)

    (first, _), (second, is_counted), (third, _) = (alone(place) for place in range(3))
    assert not any(is_counted.values()) and not any(second.values())
    for name, score in scores.items():
        assert score == pytest.approx((first[name] + third[name]).item() / 2, abs=1e-4)

    crop[:] = crop[1].clone()
    assert Judge(config, data, PROBE, context()).scores(model, None) == {}


# Segmentation, pictures and the atlas


def test_segmentation_sees_the_mean_in_place_of_padding():
    model = build_unetr(config_of(), SIZE, 2, 3, is_padded=True).eval()
    images = padded(volumes((7, 5, 3)), SIZE)
    scores = model(images)
    assert scores.isfinite().all()
    scores.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    # without a patch that is padding alone nobody can tell it from a volume with zeros there
    images = padded(volumes((7, 5, 6)), SIZE)
    plain = build_unetr(config_of(), SIZE, 2, 3).eval()
    torch.testing.assert_close(model(images), plain(images.nan_to_num(nan=0.0)))


def test_padding_is_black():
    images = torch.tensor([[[[1.0, math.nan], [-9, 9]]]])
    assert to_intensity(images, MEAN, STD).flatten().tolist() == pytest.approx([0.7, 0, 0, 1])


def test_the_atlas_counts_voxels_that_exist_by_hand():
    """Two patches of 2 voxels, the second half padding: 3 voxels, of which 1 is a lesion."""
    often_BP = torch.tensor([[0.25, 1.0]])
    labels = torch.tensor([[[0, 0, 1, 255]]])
    shares_BP = torch.tensor([[1.0, 0.5]])
    found = class_numbers(often_BP, labels, ["ground", "lesion"], (1, 2), shares_BP)
    assert found["lesion"]["pixels"] == 1 and found["lesion"]["hidden"] == 1.0
    assert found["lesion"]["enrichment"] == pytest.approx(1 - (2 * 0.25 + 1) / 3)
    # the other way round the lesion is at 0.25, and all at (2 + 0.25) / 3: 0.5 and -0.5
    assert found["lesion"]["chance"] == pytest.approx(3 * 0.5)


def test_numbers_of_masks_count_voxels_that_exist(tmp_path):
    config = config_of(ratio=HALF | {"value": 0.25})
    images = padded(volumes((8, 6, 4), 2, 1), SIZE)  # 3 of 12 are hidden, of the 6 real ones 2
    numbers = draw_masks(
        tmp_path / "masks-000.png",
        images,
        torch.arange(2),
        config,
        0.0,
        0,
        None,
        MEAN,
        STD,
        draws=3,
        is_padded=True,
    )
    assert (
        numbers["hidden"] == pytest.approx(1 / 3)
        and (tmp_path / "masks-000.png").stat().st_size > 0
    )


def test_patches_count_in_a_unit_by_their_real_voxels_by_hand():
    """Two units of two patches of 2 voxels: 3 voxels are real in the first, none in the other."""
    images = torch.tensor([1.0, 1, 1, *[math.nan] * 5]).reshape(1, 1, 1, 8)
    is_padding_BU = padding.is_padding(images, (1, 4))
    request = MaskRequest((1, 2), 1, 0, 0, 0, torch.arange(1), images, None, (1, 2), is_padding_BU)
    values_BP = torch.tensor([[3.0, 6, 7, 7]])
    assert mean_of_real(request, values_BP).tolist() == [[4.0, 0.0]]  # (3 + 3 + 6) / 3
    assert mean_of_real(request, values_BP[:, None]).tolist() == [[[4.0, 0.0]]]


def test_shares_of_cells_by_hand():
    images = padded(torch.zeros(1, 2, 3, 4, 1), (4, 4, 2))
    found = padding.real_share(images, (2, 4, 1))
    assert found.tolist() == [[1.0, 0.0, 0.5, 0.0]]
    assert padding.is_padding(images, (2, 4, 1)).tolist() == [[False, True, False, True]]
    assert padding.keys(torch.tensor([[False, True]])).flatten().tolist() == [True, True, False]
