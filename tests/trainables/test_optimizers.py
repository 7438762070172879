"""Optimisers, parameter groups and learning rate.

pytest tests/trainables/test_optimizers.py
"""

from functools import partial

import pytest
import torch
from torch import nn

from tests.drawn import drawn
from trainables.checkpoint import pack, unpack
from trainables.config import Optimizer, TrialConfig
from trainables.mae import build_mae
from trainables.optimizers import (
    OPTIMIZERS,
    adamw,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)


@pytest.fixture(scope="module")
def model():
    shape = {"size": "pico", "patch": 4, "decoder": {"depth": 1, "width": 64}}
    return build_mae(TrialConfig.model_validate({"model": shape}), (8, 8), 1, 0)


def by_name(model, groups):
    """name -> its group"""
    owner = {id(weight): group for group in groups for weight in group["params"]}
    return {
        name: owner[id(weight)] for name, weight in model.named_parameters() if id(weight) in owner
    }


def test_every_parameter_stands_in_one_group(model):
    for layer_decay in (None, 0.5):
        groups = parameter_groups(model, layer_decay)
        listed = [id(weight) for group in groups for weight in group["params"]]
        assert sorted(listed) == sorted(id(weight) for weight in model.parameters())


def test_biases_norms_and_tokens_do_not_decay(model):
    groups = by_name(model, parameter_groups(model, None))
    free = {name for name, group in groups.items() if group.get("weight_decay") == 0.0}
    expected = {
        name
        for name in groups
        if name.endswith(".bias") or ".norm" in name or name.endswith("_token")
    }
    assert free == expected
    assert {"encoder.class_token", "decoder.mask_token", "encoder.blocks.0.norm1.weight"} < free
    assert "encoder.blocks.0.attn.qkv.weight" not in free


def test_learned_positions_do_not_decay():
    model = nn.Module()
    model.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
    model.positions = nn.Parameter(torch.zeros(4, 8))
    (group,) = parameter_groups(model, None)
    assert group["weight_decay"] == 0.0


def test_the_rate_falls_from_the_last_block_to_the_embedding(model):
    groups = by_name(model, parameter_groups(model, 0.5))
    scale = {name: group["lr_scale"] for name, group in groups.items()}
    assert scale["encoder.embed.weight"] == scale["encoder.class_token"] == 0.5**5
    rates = [scale[f"encoder.blocks.{block}.mlp.fc1.weight"] for block in range(4)]
    assert rates == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scale["encoder.norm.weight"] == scale["decoder.head.weight"] == 1.0
    assert scale["decoder.blocks.0.mlp.fc1.weight"] == scale["decoder.embed.weight"] == 1.0


def test_wrapping_the_model_changes_nothing(model):
    wrapped = nn.ModuleDict({"module": model})
    plain = [group["lr_scale"] for group in parameter_groups(model, 0.5)]
    assert [group["lr_scale"] for group in parameter_groups(wrapped, 0.5)] == plain


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, None)
    assert sum(weight.numel() for group in groups for weight in group["params"]) == 6


EVERY_OPTIMIZER = [
    pytest.param(partial(OPTIMIZERS[name], **setting.options()), id=f"{name} {setting.options()}")
    for name in OPTIMIZERS
    for setting in drawn(Optimizer, name)
]


def small_model():
    """A model with two groups, the second of which does not decay."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, [
        {"params": [model.weight], "lr_scale": 0.5},
        {"params": [model.bias], "lr_scale": 1.0, "weight_decay": 0.0},
    ]


def step(model, optimizer, multiplier=1.0):
    set_learning_rate(optimizer, multiplier)
    optimizer.zero_grad()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_an_optimizer_honours_scales_and_takes_a_step(make):
    model, groups = small_model()
    optimizer = make(groups, 512)
    scaled, full = (group["lr"] for group in optimizer.param_groups)
    assert scaled == pytest.approx(full / 2)
    double = make(groups, 1024).param_groups[1]["lr"]
    assert double == pytest.approx(2 * full)
    before = model.weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_an_optimizer_follows_the_shape_of_the_rate(make):
    model, groups = small_model()
    optimizer = make(groups, 512)
    full = [group["lr"] for group in optimizer.param_groups]
    step(model, optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 4 for rate in full]
    before = [weight.detach().clone() for weight in model.parameters()]
    step(model, optimizer, 0.0)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_what_has_no_gradient_and_no_decay_stays_as_it_is(make):
    model, groups = small_model()
    optimizer, before = make(groups, 512), model.bias.detach().clone()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(before, model.bias)


@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
def test_an_optimizer_goes_on_from_a_checkpoint_bit_for_bit(make):
    model, groups = small_model()
    optimizer = make(groups, 512)
    for _ in range(3):
        step(model, optimizer)
    kept = {name: value.detach().clone() for name, value in pack(model, optimizer).items()}
    other, other_groups = small_model()
    again = make(other_groups, 512)
    unpack(other, again, kept)
    for _ in range(3):
        step(model, optimizer)
        step(other, again)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_adamw_by_hand():
    weight = nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [weight], "lr_scale": 1.0}]
    optimizer = adamw(groups, 64, base_lr=0.4, weight_decay=0.1)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.1, (0.9, 0.95))
    weight.grad = torch.full((2, 2), 3.0)
    optimizer.step()
    # decay by 0.1 * 0.1, then a first step of the learning rate itself
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.99 - 0.1))
    assert "lr" not in groups[0]


def test_the_multiplier_acts_on_every_groups_own_rate():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [w], "lr_scale": s} for w, s in zip(weights, (1.0, 0.25), strict=True)]
    optimizer = adamw(groups, 256, base_lr=0.8)
    for _ in range(2):
        set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]


def test_the_learning_rate_by_hand():
    rates = [learning_rate(seen, 100, 20) for seen in (0, 10, 20, 40, 60, 100)]
    assert rates == pytest.approx([0, 0.5, 1, 0.853553, 0.5, 0], abs=1e-6)
    assert learning_rate(0, 100, 0) == 1.0
    assert learning_rate(120, 100, 0) == 0.0
    assert learning_rate(50, 50, 50) == 1.0
