"""Cost before it is paid. Run: python -m pytest tests/trainables/test_cost.py"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainables.config import TrialConfig
from trainables.cost import (
    activation_bytes,
    mae_flops,
    planned_flops,
    pretrain_steps,
    segment_flops,
    segment_steps,
)
from trainables.mae import MAE
from trainables.masking import MASKING, MaskRequest
from trainables.pretrain import choose_patches
from trainables.unetr import build_unetr

# model, image size, channels, hidden patches, weight of visible pixels
CASES = [
    ({"size": "pico", "patch": 4, "decoder": {"depth": 1, "width": 64}}, (16, 16), 1, 12, 0),
    ({"size": "pico", "patch": 4, "decoder": {"depth": 3, "width": 128}}, (8, 20), 3, 5, 0),
    ({"size": "nano", "patch": 8, "decoder": {"depth": 2, "width": 64}}, (32, 16), 2, 3, 0.5),
    ({"size": "tiny", "patch": 16, "decoder": {"depth": 2, "width": 192}}, (64, 48), 3, 9, 0),
    ({"size": "pico", "patch": 2, "decoder": {"depth": 1, "width": 64}}, (4, 6, 8), 1, 18, 1),
    ({"size": "pico", "patch": [2, 4, 3], "decoder": {"depth": 1}}, (8, 12, 6), 2, 18, 0.5),
    ({"size": "pico", "patch": [8, 2], "decoder": {"attention": "cross"}}, (16, 6), 1, 4, 0),
]


def trial(model, *, visible_weight=0.0, **masking):
    pretrain = {"visible_weight": visible_weight, "epochs": 2, "batch": 4}
    return TrialConfig.model_validate({"model": model, "pretrain": pretrain, "masking": masking})


def counted(config, size, channels, hidden):
    """Forward, and forward and backward, of one image as PyTorch counts them."""
    with torch.device("meta"):
        model = MAE(config, size, channels)
        image = torch.empty(1, channels, *size)
        numbers = torch.arange(model.encoder.positions.shape[0])[None]
    visible_BV, hidden_BX = numbers[:, hidden:], numbers[:, :hidden]
    # Fused attention on the CPU is not in the counter's table
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(image, visible_BV, hidden_BX)
        forward = counter.get_total_flops()
        loss.backward()
    return {"forward": forward, "guide": 0, "step": counter.get_total_flops()}


@pytest.mark.parametrize(("model", "size", "channels", "hidden", "visible_weight"), CASES)
def test_the_formula_equals_the_counter_to_the_digit(model, size, channels, hidden, visible_weight):
    config = trial(model, visible_weight=visible_weight)
    assert mae_flops(config, size, channels, hidden) == counted(config, size, channels, hidden)


UNIFORM = '{"name": "uniform", "low": 0.2, "high": 0.6}'
ALWAYS = {"name": "constant", "value": 0.5}
GUIDED = {name: {"name": name} for name in MASKING if MASKING[name].guide_flops} | {
    "random": {"name": "random"},
    "complementary": {"name": "anatomask", "complementary": True},
    "amlp with a head": {"name": "amlp", "category_weight": 0.1},
    "amlp with a small head": {
        "name": "amlp",
        "category_weight": 0.1,
        "category_reads": "descriptors",
    },
    "amlp that asks": {"name": "amlp", "features": "encoder", "lesion": "highest_loss"},
}


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("name", GUIDED)
def test_a_whole_step_costs_what_the_counter_says(name, attention):
    """Where to hide, the loss, and backward: 15 units of 2 x 2 patches, of which 9 are hidden."""
    decoder = {"depth": 2, "width": 64, "attention": attention}
    if attention == "cross":
        decoder["predicted"] = 0.5
    model = {"size": "pico", "patch": 4, "decoder": decoder}
    config = trial(model, strategy=GUIDED[name], unit=8, ratio=ALWAYS)
    with torch.device("meta"):
        mae = MAE(config, (24, 40), 2)
        image, place = torch.empty(1, 2, 24, 40), torch.zeros(1, dtype=torch.int64)
        request = MaskRequest((3, 5), 9, 0.5, 0, 0, place, image, mae, (2, 2))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                masks = choose_patches(config, request)
            guide = counter.get_total_flops()
            mae(image, *masks).backward()
    found = mae_flops(config, (24, 40), 2, 36)
    assert (found["guide"], found["step"]) == (guide, counter.get_total_flops())


def test_a_whole_step_with_edges_of_each_axis_costs_what_the_counter_says():
    """3 x 5 x 1 units of 2 x 1 x 3 patches of 2 x 8 x 1 pixels, of which 9 units are hidden."""
    model = {"size": "pico", "patch": [2, 8, 1], "decoder": {"depth": 2, "width": 64}}
    size = (12, 40, 3)
    for strategy in GUIDED.values():
        config = trial(model, strategy=strategy, unit=[4, 8, 3], ratio=ALWAYS)
        with torch.device("meta"):
            mae = MAE(config, size, 2)
            image, place = torch.empty(1, 2, *size), torch.zeros(1, dtype=torch.int64)
            request = MaskRequest(mae.unit_grid, 9, 0.5, 0, 0, place, image, mae, (2, 1, 3))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                with torch.no_grad():
                    masks = choose_patches(config, request)
                mae(image, *masks).backward()
        assert mae.patches_per_unit == (2, 1, 3)
        assert mae_flops(config, size, 2, 54)["step"] == counter.get_total_flops()


def test_one_block_by_hand():
    # without hidden patches' share: 2 visible + class = 3 tokens, 4 + class = 5 in the decoder
    config = trial({"size": "pico", "patch": 1, "decoder": {"depth": 1, "width": 64}})
    encoder = 4 * (24 * 3 * 64**2 + 4 * 3**2 * 64)
    decoder = 24 * 5 * 64**2 + 4 * 5**2 * 64
    ends = 2 * 2 * 64 + 2 * 3 * 64 * 64 + 2 * 2 * 64
    assert mae_flops(config, (2, 2), 1, 2)["forward"] == encoder + decoder + ends


def test_the_planned_cost_follows_the_schedule():
    model = {"size": "pico", "patch": 4, "decoder": {"depth": 1, "width": 64}}
    ratio = {"name": "step", "values": [0.25, 0.75], "at": [0.5]}
    config = trial(model, unit=8, ratio=ratio)
    # 10 images, 2 epochs, batches of 4: 5 steps at progress 0 .2 .4 .6 .8; 4 units of 4 patches
    early = mae_flops(config, (16, 16), 1, hidden_patches=4)["step"]
    late = mae_flops(config, (16, 16), 1, hidden_patches=12)["step"]
    assert planned_flops(config, (16, 16), 1, num_images=10) == 4 * (3 * early + 2 * late)


def test_less_than_a_batch_is_still_one_step():
    config = trial({"size": "pico", "patch": 8})
    one = mae_flops(config, (16, 16), 1, hidden_patches=3)["step"]
    assert planned_flops(config, (16, 16), 1, num_images=1) == 4 * one


def equal(patch, flops, **ratio):
    settings = {
        "model": {"size": "pico", "patch": patch, "decoder": {"depth": 1, "width": 64}},
        "masking": {"ratio": ratio or {"name": "linear", "start": 0.2, "end": 0.8}},
        "pretrain": {"flops": flops, "batch": 4},
        "segment": {"flops": flops, "batch": 2},
    }
    return TrialConfig.model_validate(settings)


@pytest.mark.parametrize("ratio", [{}, {"name": "uniform", "low": 0.1, "high": 0.9}, ALWAYS])
def test_equal_operations_are_as_many_steps_as_they_buy(ratio):
    steps = []
    for patch in (4, 16):
        config = equal(patch, 2e11, **ratio)
        found = pretrain_steps(config, (64, 64), 1, num_images=10)
        assert found == pretrain_steps(config, (64, 64), 1, num_images=99)
        one = 2e11 / found
        assert abs(planned_flops(config, (64, 64), 1, 10) - 2e11) < 0.75 * one
        steps.append(found)
        learnt = segment_steps(config, (64, 64), 1, 2, num_images=10)
        assert abs(segment_flops(config, (64, 64), 1, 2, learnt)[-1] - 2e11) < 0.75 * 2e11 / learnt
    assert steps[1] > 5 * steps[0] > 100


def test_steps_by_hand():
    one = 4 * mae_flops(equal(16, 1, **ALWAYS), (64, 64), 1, 8)["step"]
    for asked, expected in [(0.1, 1), (1, 1), (6.4, 6), (6.6, 7)]:
        config = equal(16, asked * one, **ALWAYS)
        assert pretrain_steps(config, (64, 64), 1, num_images=10) == expected
    images = TrialConfig.model_validate({"pretrain": {"images": 250, "batch": 64}})
    assert pretrain_steps(images, (64, 64), 1, num_images=10) == 4
    images = TrialConfig.model_validate({"segment": {"images": 40, "batch": 16}})
    assert segment_steps(images, (64, 64), 1, 2, num_images=10) == 2


@pytest.mark.parametrize("encoder", ["finetune", "frozen"])
@pytest.mark.parametrize(
    ("patch", "size", "more"),
    [
        (4, (16, 8), {}),
        ([4, 2], (16, 8), {"features": 4}),
        (1, (5, 7), {"image_skip": False}),
        (20, (40, 60), {"features": 12}),
        (32, (64, 32), {}),
        ([2, 4, 3], (8, 12, 6), {"features": 8}),
    ],
)
def test_segmenting_costs_what_a_real_model_does(patch, size, more, encoder):
    model = {"size": "pico", "patch": patch}
    segment = {"encoder": encoder, "decoder_first": 0.0, "batch": 4, **more}
    config = TrialConfig.model_validate({"model": model, "segment": segment})
    images = torch.zeros(2, 3, *size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_unetr(config, size, 3, 4)(images).sum().backward()
    one = counter.get_total_flops() * 2
    assert segment_flops(config, size, 3, 4, 3) == [0, one, 2 * one, 3 * one]


def test_a_held_encoder_costs_what_a_frozen_one_does():
    def flops(**segment):
        config = TrialConfig.model_validate({"model": {"size": "pico"}, "segment": segment})
        return np.diff(segment_flops(config, (16, 8), 3, 4, 10))

    whole, frozen = flops(decoder_first=0.0), flops(encoder="frozen")
    held = flops(decoder_first=0.3)
    assert (held == [*frozen[:3], *whole[3:]]).all() and frozen[0] < whole[0]
    assert (flops(decoder_first=0.3, encoder="random-init") == whole).all()


def test_memory_grows_with_batch_and_visible_share():
    def needed(value=0.75, **pretrain):
        ratio = {"name": "constant", "value": value}
        settings = {"pretrain": {"batch": 8, **pretrain}, "masking": {"ratio": ratio}}
        return activation_bytes(TrialConfig.model_validate(settings), (64, 64), 3)

    assert needed(batch=16) == 2 * needed(batch=8)
    assert needed(value=0.25) > needed(value=0.75)
    assert needed(precision="fp32") > needed(precision="bf16") == needed(precision="fast")
    # 64 patches, 17 tokens through 12 blocks of 192, 65 through 2 of 128, 12 288 values
    assert needed() == 8 * (12 * 17 * 192 * 34 + 2 * 65 * 128 * 34 + 12_288 * 16)


def test_blocks_that_keep_their_inputs_alone_need_one_blocks_memory_and_their_inputs():
    config = TrialConfig.model_validate({"pretrain": {"batch": 8}})
    needed = activation_bytes(config, (64, 64), 3, recomputes=True)
    inputs = 12 * 17 * 192 + 2 * 65 * 128
    assert needed == 8 * (inputs * 4 + 65 * 128 * 34 + 12_288 * 16)


def test_plans_ask_for_no_torch():
    code = """
import sys
from trainables.config import TrialConfig
from trainables.cost import planned_flops, segment_flops
config = TrialConfig.model_validate({"masking": {"strategy": "amlp", "ratio": "uniform"}})
assert planned_flops(config, (64, 64), 3, 100) > 0 and segment_flops(config, (64, 64), 3, 2, 5)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code.replace('"uniform"', UNIFORM)], check=True)
