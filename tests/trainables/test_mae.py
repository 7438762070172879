"""The masked autoencoder. Run: python -m pytest tests/trainables/test_mae.py"""

import math
from functools import partialmethod

import pytest
import torch
from torch import nn

from tests.timm_models import create_model
from trainables import pretrain
from trainables.blocks import Block
from trainables.config import TrialConfig
from trainables.edges import grid_of
from trainables.mae import (
    DEVIATION_FLOOR,
    Encoder,
    build_mae,
    initialise,
    patchify,
    positions,
    unpatchify,
)
from trainables.masking import MaskRequest, pixels_hidden, split_indices
from trainables.masking.plain import random

# image size, patch, channels: not square, not cubic
SHAPES = [
    ((8, 12), (4, 4), 3),
    ((12, 8), (2, 2), 1),
    ((4, 6, 8), (2, 2, 2), 1),
    ((3, 5), (1, 1), 2),
    ((8, 12), (4, 2), 1),
    ((8, 12, 6), (2, 4, 3), 2),
    ((6,), (2,), 1),
]


def pico(patch=4, decoder_width=64, masking=None, decoder=None, **pretrain):
    decoder = {"depth": 1, "width": decoder_width} | (decoder or {})
    model = {"size": "pico", "patch": patch, "decoder": decoder}
    return TrialConfig.model_validate(
        {"model": model, "masking": masking or {}, "pretrain": pretrain}
    )


def images_of(size, channels, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator)


def split(grid, hidden, batch=4, step=0):
    """(is_hidden_BP, visible_BV, hidden_BX) at random."""
    request = MaskRequest(grid, hidden, 0.0, 0, step, torch.arange(batch))
    is_hidden_BP = random(request)
    return is_hidden_BP, *split_indices(is_hidden_BP, hidden)


def half(size, patch, batch=4, step=0):
    """Half of the patches hidden, and the same as pixels (B, 1, *S)."""
    grid = grid_of(size, patch)
    is_hidden_BP, visible_BV, hidden_BX = split(grid, math.prod(grid) // 2, batch, step)
    return visible_BV, hidden_BX, pixels_hidden(is_hidden_BP, grid, patch)[:, None]


def without_prediction(model):
    """The same model, but it predicts 0 everywhere, so that the loss is the targets' alone."""
    nn.init.zeros_(model.decoder.head.weight)
    return model


# Patches


def test_patches_by_hand():
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    patches = patchify(image, (2, 2))
    assert patches.shape == (1, 6, 4)
    assert patches[0, 0].tolist() == [0, 1, 6, 7]
    assert patches[0, 1].tolist() == [2, 3, 8, 9]
    assert patches[0, 3].tolist() == [12, 13, 18, 19]


def test_channels_are_the_innermost_axis_of_a_patch():
    image = torch.stack([torch.arange(4.0).reshape(2, 2), 10 + torch.arange(4.0).reshape(2, 2)])
    assert patchify(image[None], (2, 2))[0, 0].tolist() == [0, 10, 1, 11, 2, 12, 3, 13]


@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_patches_go_back_to_where_they_were(size, patch, channels):
    images = images_of(size, channels)
    grid = grid_of(size, patch)
    assert torch.equal(unpatchify(patchify(images, patch), grid, patch, channels), images)


def test_embedding_patches_equals_a_convolution():
    images = images_of((8, 12), 3)
    encoder = Encoder("pico", (4, 4), (8, 12), 3)
    weight_DCpq = encoder.embed.weight.reshape(64, 4, 4, 3).permute(0, 3, 1, 2)
    expected = nn.functional.conv2d(images, weight_DCpq, encoder.embed.bias, stride=4)
    embedded_BPD = encoder.embed(patchify(images, (4, 4)))
    torch.testing.assert_close(embedded_BPD, expected.flatten(2).transpose(1, 2))


# Positions


def test_positions_by_hand():
    # two patches of 8 pixels side by side: centres at 4 and (4, 12) pixels = 0.25 and (0.25, 0.75)
    code = positions((1, 2), (8, 8), 8, "pixels").tolist()
    wave = 10000**-0.5
    first = [0.247404, 0.25 * wave, 0.968912, 1.0]
    second = [0.681639, 0.75 * wave, 0.731689, 1.0]
    assert code[0] == pytest.approx([*first, *first], abs=1e-5)
    assert code[1] == pytest.approx([*first, *second], abs=3e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_place_keeps_its_code_at_every_patch_size(axes):
    # the centre of one patch of 48 pixels is that of the middle one of 3 of 16 and of 9 of 48/9
    one = positions((1,) * axes, (48,) * axes, 64, "pixels")[0]
    assert torch.equal(one, positions((3,) * axes, (16,) * axes, 64, "pixels")[3**axes // 2])


@pytest.mark.parametrize("patch", [2, 4, (2, 16)])
def test_in_patches_neighbours_are_as_far_apart_at_every_patch_size(patch):
    edges = patch if isinstance(patch, tuple) else (patch, patch)
    code = positions((6, 5), edges, 64, "patches")
    assert torch.equal(code, positions((6, 5), (16, 16), 64, "pixels"))


def test_a_code_is_made_of_the_axes_codes_in_the_order_of_patches():
    code = positions((2, 3, 4), (8, 8, 8), 66, "patches").reshape(2, 3, 4, 3, 22)
    for axis in range(3):
        line = [1, 1, 1]
        line[axis] = (2, 3, 4)[axis]
        alone = positions(tuple(line), (8, 8, 8), 66, "patches").reshape(*line, 3, 22)[..., axis, :]
        assert torch.equal(code[..., axis, :], alone.expand(2, 3, 4, 22))
    assert len(code.reshape(24, 66).unique(dim=0)) == 24


def test_what_the_axes_do_not_share_equally_is_zero():
    code = positions((2, 3, 4), (8, 8, 8), 64, "patches")
    assert code.shape == (24, 64)
    assert (code[:, 60:] == 0).all()


# The encoder


@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_the_encoder_sees_visible_pixels_only(size, patch, channels):
    encoder = build_mae(pico(patch), size, channels, 0).encoder
    images = images_of(size, channels)
    visible_BV, _, is_hidden = half(size, patch)
    edited_hidden = torch.where(is_hidden, 99.0, images)
    edited_visible = torch.where(is_hidden, images, 99.0)
    tokens = encoder(patchify(images, patch), visible_BV)
    assert tokens.shape == (4, 1 + visible_BV.shape[1], 64)
    assert torch.equal(tokens, encoder(patchify(edited_hidden, patch), visible_BV))
    assert not torch.equal(tokens, encoder(patchify(edited_visible, patch), visible_BV))


def test_all_patches_visible_is_the_same_as_none_named():
    encoder = build_mae(pico(), (8, 12), 3, 0).encoder
    patches_BPQ = patchify(images_of((8, 12), 3), (4, 4))
    everything = torch.arange(6).expand(4, -1)
    torch.testing.assert_close(encoder(patches_BPQ), encoder(patches_BPQ, everything))


def test_a_visible_patch_keeps_its_position():
    encoder = build_mae(pico(), (8, 12), 3, 0).encoder
    patches_BPQ = patchify(images_of((8, 12), 3), (4, 4))
    # in another order the same tokens come out in that order
    tokens = encoder(patches_BPQ, torch.tensor([[1, 5]] * 4))
    turned = encoder(patches_BPQ, torch.tensor([[5, 1]] * 4))
    torch.testing.assert_close(tokens[:, [0, 2, 1]], turned)


def test_the_encoder_equals_a_vision_transformer_of_timm():
    encoder = build_mae(pico(), (8, 12), 3, 0).encoder
    vit = create_model(
        "vit_tiny_patch16_224",
        img_size=(8, 12),
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=1,
        num_classes=0,
    ).eval()
    state = dict(encoder.state_dict())
    weight_DCpq = state.pop("embed.weight").reshape(64, 4, 4, 3).permute(0, 3, 1, 2)
    state |= {
        "patch_embed.proj.weight": weight_DCpq,
        "patch_embed.proj.bias": state.pop("embed.bias"),
        "cls_token": state.pop("class_token"),
        "pos_embed": torch.cat([torch.zeros(1, 64), encoder.positions])[None],
    }
    vit.load_state_dict(state)
    images = images_of((8, 12), 3)
    torch.testing.assert_close(encoder(patchify(images, (4, 4))), vit.forward_features(images))


def test_features_are_grid_tokens_after_the_named_blocks():
    encoder = build_mae(pico(), (8, 12), 3, 0).encoder
    patches_BPQ = patchify(images_of((8, 12), 3), (4, 4))
    last, first = encoder.features(patches_BPQ, [4, 1])
    assert torch.equal(last, encoder(patches_BPQ)[:, 1:])
    after_one = encoder.blocks[0](encoder.layers(patches_BPQ)[0])
    assert torch.equal(first, after_one[:, 1:])


# The loss


@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_the_loss_is_over_hidden_pixels_only(size, patch, channels):
    model = without_prediction(build_mae(pico(patch), size, channels, 0))
    images = images_of(size, channels)
    visible_BV, hidden_BX, is_hidden = half(size, patch)
    is_hidden = is_hidden.expand_as(images)

    loss = model(images, visible_BV, hidden_BX)
    torch.testing.assert_close(loss, images[is_hidden].square().mean())
    assert loss == model(torch.where(is_hidden, images, 99.0), visible_BV, hidden_BX)
    assert loss != model(torch.where(is_hidden, 99.0, images), visible_BV, hidden_BX)


@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_visible_pixels_count_with_their_weight(size, patch, channels):
    images = images_of(size, channels)
    visible_BV, hidden_BX, is_hidden = half(size, patch)
    is_hidden = is_hidden.expand_as(images)
    hidden, visible = images[is_hidden].square(), images[~is_hidden].square()

    expected = {
        "per_region": hidden.mean() + 0.3 * visible.mean(),
        "all_patches": (hidden.sum() + 0.3 * visible.sum()) / images.numel(),
    }
    for way, value in expected.items():
        config = pico(patch, visible_weight=0.3, visible_mean=way)
        model = without_prediction(build_mae(config, size, channels, 0))
        torch.testing.assert_close(model(images, visible_BV, hidden_BX), value)


@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_the_loss_is_the_error_of_the_reconstruction(size, patch, channels):
    model = build_mae(pico(patch), size, channels, 0)
    images = images_of(size, channels)
    visible_BV, hidden_BX, is_hidden = half(size, patch)
    is_hidden = is_hidden.expand_as(images)
    error = (model.reconstruct(images, visible_BV, hidden_BX) - images).square()

    loss = model(images, visible_BV, hidden_BX)
    torch.testing.assert_close(loss, error[is_hidden].mean())
    both = build_mae(pico(patch, visible_weight=2.0), size, channels, 0)
    loss = both(images, visible_BV, hidden_BX)
    torch.testing.assert_close(loss, error[is_hidden].mean() + 2 * error[~is_hidden].mean())


def test_a_replaced_patch_is_not_seen_but_its_place_is():
    model = build_mae(pico(masking={"secondary": 0.5}), (8, 12), 3, 0)
    images = images_of((8, 12), 3)
    visible_BV, hidden_BX, _ = half((8, 12), (4, 4))
    is_replaced_BV = torch.zeros_like(visible_BV, dtype=torch.bool)
    is_replaced_BV[:, 1] = True
    loss = model(images, visible_BV, hidden_BX, is_replaced_BV)
    assert loss != model(images, visible_BV, hidden_BX)

    patches_BPQ = patchify(images, (4, 4))
    for place, is_felt in ((1, False), (0, True)):
        number_B1 = visible_BV[:, place : place + 1, None].expand(-1, -1, 48)
        changed = unpatchify(patches_BPQ.scatter(1, number_B1, 9.0), (2, 3), (4, 4), 3)
        found = model(changed, visible_BV, hidden_BX, is_replaced_BV)
        assert (found != loss) == is_felt
    other = is_replaced_BV.roll(1, 1)
    assert loss != model(images, visible_BV, hidden_BX, other)


def test_a_cross_decoder_shows_the_truth_where_it_predicts_nothing():
    for target in ("pixels", "normalised"):
        config = pico(decoder={"attention": "cross"}, target=target)
        model = build_mae(config, (8, 12), 3, 0)
        images = images_of((8, 12), 3)
        visible_BV, hidden_BX, is_hidden = half((8, 12), (4, 4))
        picture = model.reconstruct(images, visible_BV, hidden_BX)
        is_hidden = is_hidden.expand_as(images)
        torch.testing.assert_close(picture[~is_hidden], images[~is_hidden])
        assert (picture[is_hidden] - images[is_hidden]).abs().mean() > 0.1


def test_every_patch_knows_its_place_in_the_decoder():
    model = build_mae(pico(), (8, 12), 3, 0)
    images = images_of((8, 12), 3)
    visible_BV, hidden_BX, _ = half((8, 12), (4, 4))
    picture = model.reconstruct(images, visible_BV, hidden_BX)
    turned = model.reconstruct(images, visible_BV.flip(1), hidden_BX.flip(1))
    torch.testing.assert_close(picture, turned)
    predicted_BPQ = patchify(picture, (4, 4))[0, hidden_BX[0]]
    assert (predicted_BPQ[0] - predicted_BPQ[1:]).abs().amax(1).min() > 0.01


def test_normalised_targets_by_hand():
    model = without_prediction(build_mae(pico(2, target="normalised"), (2, 4), 1, 0))
    images = torch.tensor([[5.0, 5, 1, 3], [5, 5, 1, 3]])[None, None]
    order = torch.tensor([[0, 1]])
    # hidden patch 1, 3, 1, 3: mean 2, biased variance 1
    loss = model(images, order[:, :1], order[:, 1:])
    assert loss.item() == pytest.approx(1 / (1 + DEVIATION_FLOOR**2))
    # an even patch has the target 0
    loss = model(images, order[:, 1:], order[:, :1])
    assert loss.item() == 0


def test_one_grey_level_in_an_even_patch_stays_a_small_target():
    model = without_prediction(build_mae(pico(4, target="normalised"), (4, 8), 1, 0))
    images = torch.zeros(1, 1, 4, 8)
    images[0, 0, 0, 0] = 1 / 255 / 0.2  # one of 256 levels where the data set's deviation is 0.2
    order = torch.tensor([[1, 0]])
    loss = model(images, order[:, :1], order[:, 1:])
    # without a floor every patch that is not even has a mean square of 1
    assert 0 < loss.item() < 0.01


def test_patches_of_a_single_value_can_be_normalised():
    model = build_mae(pico(1, target="normalised"), (2, 3), 1, 0)
    visible_BV, hidden_BX, _ = half((2, 3), (1, 1))
    loss = model(images_of((2, 3), 1), visible_BV, hidden_BX)
    assert loss.isfinite()


def test_an_oracle_undoes_the_normalisation():
    model = without_prediction(build_mae(pico(2, target="normalised"), (2, 4), 1, 0))
    images = torch.tensor([[5.0, 5, 1, 3], [5, 5, 1, 3]])[None, None]
    order = torch.tensor([[0, 1]])
    picture = model.reconstruct(images, order[:, :1], order[:, 1:])
    assert picture.tolist() == [[[[5, 5, 2, 2], [5, 5, 2, 2]]]]


# Gradients


@pytest.mark.parametrize("visible_weight", [0.0, 0.5])
@pytest.mark.parametrize("target", ["pixels", "normalised"])
def test_every_parameter_gets_a_gradient(visible_weight, target):
    config = pico(visible_weight=visible_weight, target=target)
    model = build_mae(config, (8, 12), 3, 0)
    visible_BV, hidden_BX, _ = half((8, 12), (4, 4))
    images = images_of((8, 12), 3)
    model(images, visible_BV, hidden_BX).backward()
    without = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ]
    assert without == []


def test_two_half_batches_average_to_the_gradient_of_the_whole():
    model = build_mae(pico(visible_weight=0.5), (8, 12), 3, 0)
    images = images_of((8, 12), 3)
    visible_BV, hidden_BX, _ = half((8, 12), (4, 4))
    gradients = {}
    for name, rows in {"whole": slice(0, 4), "first": slice(0, 2), "second": slice(2, 4)}.items():
        model.zero_grad()
        loss = model(images[rows], visible_BV[rows], hidden_BX[rows])
        loss.backward()
        gradients[name] = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    average = (gradients["first"] + gradients["second"]) / 2
    torch.testing.assert_close(average, gradients["whole"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradients["first"], gradients["whole"], rtol=1e-2, atol=1e-4)


def test_a_few_steps_learn_one_batch():
    model = build_mae(pico(), (8, 12), 1, 0)
    visible_BV, hidden_BX, _ = half((8, 12), (4, 4))
    images = images_of((8, 12), 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(images, visible_BV, hidden_BX)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_half_precision_gives_nearly_the_same_loss_in_float32():
    model = build_mae(pico(), (8, 12), 3, 0)
    visible_BV, hidden_BX, _ = half((8, 12), (4, 4))
    images = images_of((8, 12), 3)
    exact = model(images, visible_BV, hidden_BX)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, visible_BV, hidden_BX)
        picture = model.reconstruct(images, visible_BV, hidden_BX)
    assert loss.dtype == picture.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_the_forward_pass_compiles_in_one_piece():
    model = build_mae(pico(visible_weight=0.1), (8, 12), 1, 0)
    visible_BV, hidden_BX, _ = half((8, 12), (4, 4))
    images = images_of((8, 12), 1)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    expected = model(images, visible_BV, hidden_BX)
    loss = compiled(images, visible_BV, hidden_BX)
    torch.testing.assert_close(loss, expected)


def test_a_warm_process_compiles_more_variants_than_torch_keeps(monkeypatch):
    as_before = {"recompile_limit": 8, "accumulated_recompile_limit": 256}
    monkeypatch.setattr(pretrain, "MOST_VARIANTS", 10)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    with torch._dynamo.config.patch(**as_before, fail_on_recompile_limit_hit=True):
        for trial in range(4):
            block = nn.Sequential(Block(64, 1))
            pretrain.compile_blocks(block)
            for tokens in range(5):
                block(torch.ones(1, 2 + 5 * trial + tokens, 64))


# Weights


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_mae(pico(visible_weight=0.1), (8, 12), 3, 0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = build_mae(pico(), (8, 12), 3, 0).state_dict()
    other = build_mae(pico(), (8, 12), 3, 1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if not torch.equal(first[name], other[name])]
    assert {"encoder.class_token", "decoder.mask_token", "encoder.embed.weight"} < set(drawn)


EVERY_PART = [
    {},
    {"masking": {"strategy": "hpm", "secondary": 0.5}},
    {"masking": {"strategy": {"name": "amlp", "category_weight": 0.1}}},
    {"decoder": {"attention": "cross"}},
]


@pytest.mark.parametrize("parts", EVERY_PART)
def test_every_weight_is_set_by_one_function(parts):
    model = build_mae(pico(**parts), (8, 12), 3, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(7.0)
    initialise(model, 0)
    assert not any((weight == 7.0).any() for weight in model.parameters())


def test_the_encoder_begins_alike_under_every_decoder():
    narrow = build_mae(pico(decoder_width=64), (8, 12), 3, 0).encoder.state_dict()
    wide = build_mae(pico(decoder_width=128), (8, 12), 3, 0).encoder.state_dict()
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


def test_positions_are_not_stored():
    assert not [
        name for name in build_mae(pico(), (8, 12), 3, 0).state_dict() if "positions" in name
    ]
