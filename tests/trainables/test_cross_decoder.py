"""Decoding by cross-attention alone.

pytest tests/trainables/test_cross_decoder.py
"""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainables.config import TrialConfig
from trainables.cost import cross_block_flops, layer_mix_flops
from trainables.cross_decoder import CrossDecoder
from trainables.mae import build_mae

# grid, patch, channels, encoder's width and depth, width, depth
SHAPES = [
    ((4, 4), 4, 1, 64, 4, 64, 2),
    ((1, 5), 8, 3, 128, 6, 64, 1),
    ((3, 6), 2, 2, 64, 4, 192, 3),
    ((2, 3, 4), 2, 1, 64, 4, 128, 2),
]


def decoder(grid=(4, 4), patch=4, channels=1, wide=64, deep=4, width=64, depth=2):
    """One with random weights in all places, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(math.prod(grid), width, generator=generator)
    values = patch ** len(grid) * channels
    model = CrossDecoder(places, values, wide, deep, width, depth)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2, generator=generator)
    return model


def layers(visible=6, wide=64, deep=4, batch=2, seed=1):
    """An encoder's embedding and layers, class token first."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 1 + visible, wide, generator=generator) for _ in range(1 + deep)]


HIDDEN_BX = torch.tensor([[0, 2, 5, 7], [1, 3, 8, 15]])


@pytest.mark.parametrize(("grid", "patch", "channels", "wide", "deep", "width", "depth"), SHAPES)
def test_every_hidden_patch_gets_its_pixels(grid, patch, channels, wide, deep, width, depth):
    model = decoder(grid, patch, channels, wide, deep, width, depth)
    places_BX = torch.tensor([[0, 3, 4], [1, 2, 4]])
    predicted = model(layers(2, wide, deep), places_BX)
    assert predicted.shape == (2, 3, patch ** len(grid) * channels)


def test_a_hidden_patch_does_not_feel_the_other_hidden_ones():
    model, seen = decoder(), layers()
    together = model(seen, HIDDEN_BX)
    alone = torch.cat([model(seen, HIDDEN_BX[:, [number]]) for number in range(4)], dim=1)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    in_another_order = model(seen, HIDDEN_BX.flip(1)).flip(1)
    torch.testing.assert_close(in_another_order, together, rtol=1e-5, atol=1e-5)
    # and they are not all the same prediction
    assert (together[:, 0] - together[:, 1]).abs().max() > 0.01


def test_the_order_of_the_visible_patches_is_nothing():
    model, seen = decoder(), layers()
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])
    moved = [layer[:, order] for layer in seen]
    torch.testing.assert_close(model(moved, HIDDEN_BX), model(seen, HIDDEN_BX))
    # but that every layer has the same patch in the same place is something
    torn = [seen[0], *moved[1:]]
    assert (model(torn, HIDDEN_BX) - model(seen, HIDDEN_BX)).abs().max() > 0.01


def test_samples_do_not_mix():
    model, seen = decoder(), layers()
    first = model([layer[:1] for layer in seen], HIDDEN_BX[:1])
    torch.testing.assert_close(first, model(seen, HIDDEN_BX)[:1])


@pytest.mark.parametrize("token", [0, 3])
@pytest.mark.parametrize("layer", range(5))
def test_every_layer_and_the_class_token_are_read(layer, token):
    model, seen = decoder(), layers()
    before = model(seen, HIDDEN_BX)
    seen[layer][:, token] += 1.0 * torch.arange(64)
    assert (model(seen, HIDDEN_BX) - before).abs().max() > 1e-3


def test_gradients_reach_every_weight_and_every_layer():
    model, seen = decoder(), [layer.requires_grad_() for layer in layers()]
    model(seen, HIDDEN_BX).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    assert (model.layer_mix.grad != 0).all()
    assert all((layer.grad.abs().sum(dim=-1) > 0).all() for layer in seen)


def test_each_block_mixes_the_layers_with_weights_of_its_own():
    model, seen = decoder(), layers()
    model.layer_mix.data.zero_()
    model.layer_mix.data[0, 2], model.layer_mix.data[1, :2] = (
        1.0,
        torch.tensor([0.5, -2.0]),
    )
    read = []
    for block in model.blocks:
        block.source_norm.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model(seen, HIDDEN_BX)
    torch.testing.assert_close(read, [seen[2], 0.5 * seen[0] - 2 * seen[1]])


def test_one_block_by_hand():
    """One question to two patches and the class token, two heads of 64, written out."""
    model = decoder((2, 1), 1, 1, wide=64, deep=1, width=128, depth=1)
    seen = layers(visible=2, deep=1, batch=1)
    block, mix = model.blocks[0], model.layer_mix[0]

    def normed(values, layer):
        spread = (values.var(dim=-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return (values - values.mean(dim=-1, keepdim=True)) / spread * layer.weight + layer.bias

    source = normed(mix[0] * seen[0][0] + mix[1] * seen[1][0], block.source_norm)
    key_value = source @ block.key_value.weight.T + block.key_value.bias
    key, value = key_value[:, :128], key_value[:, 128:]
    token = model.mask_token[0, 0] + model.positions[1]
    question = block.question(normed(token, block.question_norm))
    found = []
    for head in (slice(0, 64), slice(64, 128)):
        scores = key[:, head] @ question[head] / 8
        found.append(scores.exp() / scores.exp().sum() @ value[:, head])
    token = token + block.project(torch.cat(found))
    inner = block.mlp[0](normed(token, block.mlp_norm))
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    token = token + block.mlp[2](gelu)
    expected = model.head(normed(token, model.norm))

    predicted = model(seen, torch.tensor([[1]]))[0, 0]
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)


def test_a_model_starts_with_every_layer_in_the_mixture_and_trains_all_it_has():
    shape = {"depth": 3, "width": 64, "attention": "cross"}
    model = {"size": "pico", "patch": 4, "decoder": shape}
    mae = build_mae(TrialConfig.model_validate({"model": model}), (16, 16), 1, seed=0)
    # Xavier's bound for 5 inputs (4 blocks and the embedding) and 3 outputs
    largest = mae.decoder.layer_mix.abs().max().item()
    assert 0.5 * math.sqrt(6 / 8) < largest <= math.sqrt(6 / 8)
    numbers = torch.arange(16)[None]
    mae(torch.randn(1, 1, 16, 16), numbers[:, :4], numbers[:, 4:]).backward()
    # several workers wait for the gradient of every trained weight
    assert not [n for n, w in mae.named_parameters() if w.requires_grad and w.grad is None]


def test_positions_are_no_part_of_a_checkpoint():
    assert "positions" not in decoder().state_dict()


@pytest.mark.parametrize(("grid", "patch", "channels", "wide", "deep", "width", "depth"), SHAPES)
def test_the_formulas_equal_the_counter_to_the_digit(
    grid, patch, channels, wide, deep, width, depth
):
    hidden, tokens = 3, 1 + math.prod(grid) - 3
    values = patch ** len(grid) * channels
    with torch.device("meta"):
        places = torch.empty(math.prod(grid), width)
        model = CrossDecoder(places, values, wide, deep, width, depth)
        seen = [torch.empty(1, tokens, wide, requires_grad=True) for _ in range(1 + deep)]
        places_BX = torch.zeros(1, hidden, dtype=torch.int64)
    # Fused attention on the CPU is not in the counter's table
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predicted = model(seen, places_BX)
        forward = counter.get_total_flops()
        predicted.sum().backward()
    blocks = depth * cross_block_flops(hidden, tokens, wide, width)
    head = 2 * hidden * width * values
    expected = blocks + layer_mix_flops(tokens, wide, deep, depth) + head
    assert forward == expected
    assert counter.get_total_flops() == 3 * expected


def test_flops_of_a_block_by_hand():
    # widths as they are: 3 questions to 2 tokens; 20 = 2 (question) + 2 (projection) + 16 (MLP)
    assert cross_block_flops(3, 2, 10, 10) == 20 * 3 * 100 + 4 * 2 * 100 + 4 * 3 * 2 * 10
    assert cross_block_flops(3, 2, 5, 10) == 20 * 3 * 100 + 4 * 2 * 50 + 4 * 3 * 2 * 10
    # 2 blocks, 4 layers and the embedding, 7 tokens of 10
    assert layer_mix_flops(7, 10, 4, 2) == 2 * 2 * 5 * 70
