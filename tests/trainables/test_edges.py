"""Patches and units with an edge for each axis, from the settings to the loss.

Every number is worked out pixel by pixel here, without the helpers of the project.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from tests import toy
from trainables import pretrain
from trainables.config import TrialConfig
from trainables.edges import grid_of, in_words, per_axis, simplest
from trainables.hiding import hide
from trainables.mae import build_mae, patchify, positions, unpatchify
from trainables.masking import MASKING, MaskRequest, pixels_hidden, to_units
from trainables.pretrain import choose_patches, make_plan

# image, patch, unit: no two axes alike, and the same turned
SHAPES = [
    ((8, 12, 6), (2, 4, 3), (4, 4, 6)),
    ((12, 6, 8), (4, 3, 2), (4, 6, 4)),
    ((6, 8, 12), (3, 2, 4), (6, 4, 4)),
    ((4, 6, 10), (4, 1, 2), (4, 3, 2)),
    ((6, 20), (3, 2), (3, 10)),
    ((20, 6), (2, 3), (10, 3)),
    ((12,), (2,), (6,)),
]
BATCH, CHANNELS = 3, 2


def config_of(patch, unit, strategy="random"):
    return TrialConfig.model_validate(
        {
            "model": {"size": "pico", "patch": patch, "decoder": {"depth": 1, "width": 64}},
            "masking": {"unit": unit, "strategy": strategy},
        }
    )


def images_of(size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, CHANNELS, *size, generator=generator)


def pixels(size):
    return itertools.product(*map(range, size))


def cell_number(pixel, size, edges):
    """Row-major number of the cell of those edges that holds the pixel."""
    number = 0
    for place, pixels_along, edge in zip(pixel, size, edges, strict=True):
        number = number * (pixels_along // edge) + place // edge
    return number


def masked(size, patch, unit, strategy="random"):
    """A model, a request for half of the units, and what it hides: units, then patches."""
    config = config_of(patch, unit, strategy)
    model = build_mae(config, size, CHANNELS, seed=0)
    grid = [pixels_along // edge for pixels_along, edge in zip(size, unit, strict=True)]
    request = MaskRequest(
        grid=tuple(grid),
        hidden=math.prod(grid) // 2,
        progress=0.5,
        seed=3,
        step=1,
        samples_B=torch.arange(BATCH),
        images=images_of(size),
        model=model,
        patches_per_unit=model.patches_per_unit,
    )
    with torch.no_grad():
        visible_BV, hidden_BX, _ = choose_patches(config, request)
        return model, hide(config, request), visible_BV, hidden_BX


@pytest.mark.parametrize(("size", "patch", "unit"), SHAPES, ids=str)
def test_a_token_is_hidden_exactly_if_its_pixels_are(size, patch, unit):
    model, is_hidden_BU, visible_BV, hidden_BX = masked(size, patch, unit)
    hidden = [set(row) for row in hidden_BX.tolist()]
    visible = [set(row) for row in visible_BV.tolist()]
    is_hidden_BP = torch.zeros(BATCH, math.prod(model.encoder.grid), dtype=torch.bool)
    is_hidden_BS = pixels_hidden(
        is_hidden_BP.scatter(1, hidden_BX, True), model.encoder.grid, model.encoder.patch
    )
    assert is_hidden_BS.shape == (BATCH, *size)
    for pixel in pixels(size):
        of_unit, of_patch = cell_number(pixel, size, unit), cell_number(pixel, size, patch)
        for sample in range(BATCH):
            is_hidden = bool(is_hidden_BU[sample, of_unit])
            assert (of_patch in hidden[sample]) == is_hidden
            assert (of_patch in visible[sample]) != is_hidden
            assert bool(is_hidden_BS[(sample, *pixel)]) == is_hidden
    assert 0 < is_hidden_BS.float().mean() < 1


@pytest.mark.parametrize(("size", "patch", "unit"), SHAPES, ids=str)
def test_the_encoder_ignores_hidden_pixels_and_the_loss_visible_ones(size, patch, unit):
    model, is_hidden_BU, visible_BV, hidden_BX = masked(size, patch, unit)
    nn.init.zeros_(model.decoder.head.weight)  # the loss is the targets' alone
    images, is_hidden = images_of(size), torch.zeros(BATCH, 1, *size, dtype=torch.bool)
    for pixel in pixels(size):
        is_hidden[(slice(None), 0, *pixel)] = is_hidden_BU[:, cell_number(pixel, size, unit)]
    hidden_edited = torch.where(is_hidden, 9.0, images)
    visible_edited = torch.where(is_hidden, images, 9.0)

    def tokens(pictures):
        return model.encoder(patchify(pictures, patch), visible_BV)

    assert torch.equal(tokens(hidden_edited), tokens(images))
    assert not torch.equal(tokens(visible_edited), tokens(images))
    loss = model(images, visible_BV, hidden_BX)
    torch.testing.assert_close(loss, images[is_hidden.expand_as(images)].square().mean())
    assert model(visible_edited, visible_BV, hidden_BX) == loss
    assert model(hidden_edited, visible_BV, hidden_BX) != loss


@pytest.mark.parametrize(("size", "patch", "unit"), SHAPES, ids=str)
def test_every_value_of_a_patch_is_the_pixel_of_its_place(size, patch, unit):
    images = images_of(size)
    patches_BPQ = patchify(images, patch)
    for pixel in pixels(size):
        inner = 0
        for place, edge in zip(pixel, patch, strict=True):
            inner = inner * edge + place % edge
        values = patches_BPQ[:, cell_number(pixel, size, patch), inner * CHANNELS :][:, :CHANNELS]
        assert torch.equal(values, images[(slice(None), slice(None), *pixel)])
    assert torch.equal(unpatchify(patches_BPQ, grid_of(size, patch), patch, CHANNELS), images)


@pytest.mark.parametrize(("size", "patch", "unit"), SHAPES, ids=str)
def test_embedding_patches_equals_a_convolution(size, patch, unit):
    axes, images = len(size), images_of(size)
    encoder = build_mae(config_of(patch, unit), size, CHANNELS, seed=0).encoder
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](CHANNELS, 64, patch, stride=patch)
    with torch.no_grad():
        weight = encoder.embed.weight.reshape(64, *patch, CHANNELS)
        convolution.weight.copy_(weight.movedim(-1, 1))
        convolution.bias.copy_(encoder.embed.bias)
    expected = convolution(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.embed(patchify(images, patch)), expected)


def test_a_place_keeps_its_code_whatever_the_edges_of_its_patch():
    # the centre of one patch of 48 x 16 x 80 pixels is that of the middle one of 3 x 1 x 5 of 16
    one = positions((1, 1, 1), (48, 16, 80), 66, "pixels")[0]
    assert torch.equal(one, positions((3, 1, 5), (16, 16, 16), 66, "pixels")[7])
    assert not torch.equal(one, positions((1, 1, 1), (80, 16, 48), 66, "pixels")[0])


@pytest.mark.parametrize(("size", "patch", "unit"), SHAPES, ids=str)
def test_a_unit_has_the_mean_of_its_own_patches(size, patch, unit):
    num_patches = math.prod(s // p for s, p in zip(size, patch, strict=True))
    values_BP = torch.rand(2, num_patches, generator=torch.Generator().manual_seed(1))
    members = {}
    for pixel in pixels(size):
        members.setdefault(cell_number(pixel, size, unit), set()).add(
            cell_number(pixel, size, patch)
        )
    expected = [values_BP[:, sorted(members[number])].mean(1) for number in range(len(members))]
    found = to_units(values_BP, grid_of(size, unit), grid_of(unit, patch))
    torch.testing.assert_close(found, torch.stack(expected, dim=1))


@pytest.mark.parametrize("strategy", MASKING)
def test_every_strategy_hides_whole_units_of_such_volumes(strategy):
    size, patch, unit = (8, 12, 6), (2, 4, 3), (4, 4, 3)
    _, is_hidden_BU, visible_BV, hidden_BX = masked(size, patch, unit, strategy)
    assert is_hidden_BU.sum(1).tolist() == [6] * BATCH  # of 2 x 3 x 2
    assert hidden_BX.shape == (BATCH, 12) and visible_BV.shape == (BATCH, 12)


def test_a_plan_counts_units_and_their_patches():
    config = config_of([2, 4, 3], [4, 4, 6])
    plan = make_plan(config, (8, 12, 6), CHANNELS, 64, (1.0,), seed=0)
    assert plan.unit_grid == (2, 3, 1)
    assert set(plan.hidden_units) == {4}  # 0.75 of 6, rounded to the even one


def test_a_number_is_as_good_as_a_list_of_it(tmp_path):
    """Bit by bit the same training, and one with other edges that runs to its end as well."""
    scores = {}
    for patch, unit in ((4, 8), ([4, 4], [8, 8]), ([2, 8], [4, 8])):
        diary, config = toy.Diary(), toy.trial(model__patch=patch, masking__unit=unit)
        folder = tmp_path / in_words(config.model.patch)
        context = toy.context(folder, diary)
        outcome, _ = pretrain.pretrain(config, 1, toy.discs(), toy.PROBE, context)
        assert outcome == "complete"
        scores[in_words(config.model.patch)] = {
            key: row["value"]
            for key, row in diary.values.items()
            if key[2] in ("loss", "probe_psnr", "flops", "ratio")
        }
    assert scores["4"] == scores["4x4"]
    assert scores["4"].keys() == scores["2x8"].keys()
    assert scores["4"] != scores["2x8"]


def test_edges_in_words_and_by_axis():
    assert (in_words(8), in_words((4, 8, 8))) == ("8", "4x8x8")
    assert per_axis(8, 3, "model.patch") == (8, 8, 8)
    assert per_axis((4, 8), 2, "model.patch") == (4, 8)
    assert [simplest(value) for value in (8, (8, 8), (4, 8), [4])] == [8, 8, (4, 8), 4]
    assert grid_of((8, 12, 6), (2, 4, 3)) == (4, 3, 2)
