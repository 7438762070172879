"""Our blocks compute what timm's and MONAI's do.

pytest tests/trainables/test_blocks.py
"""

import weakref
from functools import partial

import pytest
import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock
from torch import nn

from tests import timm_models
from trainables.blocks import (
    CONVOLUTION,
    Attention,
    Block,
    ResidualBlock,
    attention,
    nested,
    recompute,
)
from trainables.cross_decoder import CrossBlock

torch.set_num_threads(1)


def seeded(build):
    """The module as it comes out of the same state of torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def results(block, values, *arguments):
    """Output, gradient of the input, then of every weight."""
    values = values.clone().requires_grad_()
    # times 1, as the block may overwrite only what is its own
    output = block(values * 1, *arguments)
    output.float().square().sum().backward()
    return [output, values.grad, *(parameter.grad for parameter in block.parameters())]


def assert_same_weights(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


# --- transformer blocks ---


def timm_block(width, heads):
    norm = partial(nn.LayerNorm, eps=1e-6)
    return timm_models.Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (192, 3), (24, 4)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_transformer_block_is_timms_bit_for_bit(width, heads, is_masked):
    ours, theirs = seeded(lambda: Block(width, heads)), seeded(lambda: timm_block(width, heads))
    assert_same_weights(ours, theirs)
    is_key = None
    if is_masked:
        is_key = torch.ones(3, 1, 1, 11, dtype=torch.bool)
        is_key[0, ..., 4:], is_key[1, ..., 1::2] = False, False
    assert_same(*(results(block, noise(3, 11, width), is_key) for block in (ours, theirs)))


def test_attention_to_equal_scores_is_the_mean_of_the_values_attended_to():
    attention = Attention(2, heads=2)
    with torch.no_grad():
        attention.qkv.weight.zero_()  # question and key of every token: 0
        attention.qkv.bias.zero_()
        attention.qkv.weight[4, 0] = attention.qkv.weight[5, 1] = 1.0  # value: the token
        attention.proj.weight.copy_(torch.eye(2))
        attention.proj.bias.copy_(torch.tensor([0.0, 10.0]))
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [8.0, 1.0]]])
    torch.testing.assert_close(attention(tokens), torch.tensor([[[4.0, 13.0]] * 3]))
    is_key = torch.tensor([True, True, False])[None, None, None]
    torch.testing.assert_close(attention(tokens, is_key), torch.tensor([[[2.0, 14.0]] * 3]))


def test_a_block_without_weights_passes_its_input_through():
    block = Block(8, 2)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(block(noise(2, 3, 8)), noise(2, 3, 8))


# --- convolutions ---


@pytest.mark.parametrize("size", [(13,), (1,), (6, 9), (1, 1), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("width", [8, 6, 3])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_residual_block_is_monais_bit_for_bit(size, width, is_bf16):
    axes = len(size)
    norm = ("group", {"num_groups": {8: 4, 6: 2, 3: 1}[width]})
    theirs = seeded(
        lambda: UnetrBasicBlock(axes, width, width, 3, stride=1, norm_name=norm, res_block=True)
    )
    ours = seeded(lambda: nested("layer", ResidualBlock(axes, width)))
    assert_same_weights(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        assert_same(*(results(block, noise(2, width, *size)) for block in (ours, theirs)))


@pytest.mark.parametrize("size", [(13,), (6, 9), (3, 4, 5)], ids=str)
def test_a_head_is_monais_bit_for_bit(size):
    axes = len(size)
    theirs = seeded(lambda: UnetOutBlock(axes, 8, 3))
    ours = seeded(lambda: nested("conv", nested("conv", CONVOLUTION[axes](8, 3, kernel_size=1))))
    assert_same_weights(ours, theirs)
    assert_same(*(results(block, noise(2, 8, *size)) for block in (ours, theirs)))


def test_a_residual_block_whose_norm_gives_0_rectifies_its_input():
    block = ResidualBlock(2, 4)
    nn.init.zeros_(block.norm2.weight)
    features = torch.tensor([-2.0, 0.0, 3.0, 100.0]).reshape(1, 4, 1, 1).expand(2, -1, -1, -1)
    expected = torch.tensor([-0.02, 0.0, 3.0, 100.0])
    torch.testing.assert_close(block(features)[1].flatten(), expected)


def test_a_residual_block_leaves_its_input_as_it_was():
    features = noise(2, 4, 5, 5)
    ResidualBlock(2, 4)(features)
    assert torch.equal(features, noise(2, 4, 5, 5))


@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_in_half_precision_is_that_of_float32(is_masked):
    query, key, value = (noise(3, 2, 5, 64, 16)[number].requires_grad_() for number in range(3))
    is_key = (torch.arange(64) % 3 > 0).expand(2, 1, 1, 64) if is_masked else None

    def found(dtype):
        ready = [given.detach().to(dtype).requires_grad_() for given in (query, key, value)]
        output = attention(*ready, is_key)
        output.float().square().sum().backward()
        return [output.float(), *(given.grad.float() for given in ready)]

    for half, exact in zip(found(torch.bfloat16), found(torch.float32), strict=True):
        assert (half - exact).abs().mean() < 0.02 * exact.abs().mean()


# --- blocks that keep their inputs alone ---

RECOMPUTABLE = {
    "self-attention": (lambda: Block(24, 4), [noise(3, 11, 24)], "mlp"),
    "cross-attention": (lambda: CrossBlock(16, 64), [noise(3, 5, 64), noise(3, 9, 16)], "mlp"),
    "convolutions": (lambda: ResidualBlock(2, 8), [noise(2, 8, 6, 4)], "norm2"),
}


@pytest.mark.parametrize("kind", RECOMPUTABLE)
def test_a_block_that_recomputes_learns_the_same_bit_for_bit(kind):
    build, inputs, _ = RECOMPUTABLE[kind]
    plain, sparing = seeded(build), seeded(build)
    recompute(sparing)
    assert_same(*(results(block, *inputs) for block in (plain, sparing)))


@pytest.mark.parametrize("kind", RECOMPUTABLE)
def test_a_block_that_recomputes_keeps_nothing_of_what_is_inside(kind):
    build, inputs, inside = RECOMPUTABLE[kind]

    def is_kept(block):
        made = []
        block.get_submodule(inside).register_forward_pre_hook(
            lambda module, given: made.append(weakref.ref(given[0].untyped_storage()))
        )
        output = block(*(each.clone().requires_grad_() for each in inputs))
        return output.requires_grad and made[0]() is not None

    block = seeded(build)
    assert is_kept(block)
    recompute(block)
    assert not is_kept(block)
