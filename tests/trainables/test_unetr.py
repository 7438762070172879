"""python -m pytest tests/trainables/test_unetr.py"""

import numpy as np
import pytest
import torch
from torch import nn

from trainables.config import TrialConfig
from trainables.mae import build_mae
from trainables.metrics import split_scores
from trainables.scores import Counted, ObjectCounts, confusion
from trainables.segment import dice_cross_entropy
from trainables.unetr import _resized, build_unetr


def config(patch=8, encoder="finetune", features=8, size="pico"):
    return TrialConfig.model_validate(
        {
            "model": {"size": size, "patch": patch},
            "segment": {"encoder": encoder, "features": features},
        }
    )


@pytest.mark.parametrize("size", [(64, 64), (32, 96)], ids=str)
@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
def test_scores_have_the_size_of_the_image(patch, size):
    model = build_unetr(config(patch), size, channels=3, num_classes=5)
    assert model(torch.randn(2, 3, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize(("patch", "edge"), [(5, 40), (12, 48), (1, 12), (32, 32), (8, 8), (2, 18)])
def test_patches_and_sizes_that_halve_unevenly_work_too(patch, edge):
    model = build_unetr(config(patch), (edge, 2 * edge), channels=1, num_classes=2)
    model(torch.randn(1, 1, edge, 2 * edge)).sum().backward()


@pytest.mark.parametrize(("size", "channels"), [((16, 24), 1), ((16, 24), 3), ((16, 8, 24), 1)])
def test_norms_see_channels_first_in_half_precision_on_a_cpu(size, channels):
    model = build_unetr(config(8), size, channels=channels, num_classes=3)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, channels, *size))
    assert len(seen) == 6 and all(features.is_contiguous() for features in seen)
    assert {features.dtype for features in seen} == {torch.bfloat16}


def test_volumes_have_three_axes():
    model = build_unetr(config(8), (16, 24, 8), channels=1, num_classes=3)
    assert model(torch.randn(1, 1, 16, 24, 8)).shape == (1, 3, 16, 24, 8)


def test_weights_keep_the_names_that_checkpoints_have():
    names = build_unetr(config(8), (16, 16), channels=1, num_classes=3).state_dict()
    assert [name for name in names if name.startswith(("refine.0", "narrow.0", "head"))] == [
        "narrow.0.weight",
        "narrow.0.bias",
        "refine.0.layer.conv1.conv.weight",
        "refine.0.layer.conv2.conv.weight",
        "refine.0.layer.norm1.weight",
        "refine.0.layer.norm1.bias",
        "refine.0.layer.norm2.weight",
        "refine.0.layer.norm2.bias",
        "head.conv.conv.weight",
        "head.conv.conv.bias",
    ]
    block = [name.removeprefix("encoder.blocks.0.") for name in names if "blocks.0." in name]
    assert block == [
        f"{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize("patch", [(2, 4, 4), (1, 8, 4), (20, 2, 5)], ids=str)
def test_every_weight_is_used_with_edges_of_each_axis(patch):
    size = tuple(2 * edge for edge in patch)
    model = build_unetr(config(patch), size, channels=1, num_classes=3)
    scores = model(torch.randn(2, 1, *size))
    assert scores.shape == (2, 3, *size)
    scores.square().sum().backward()
    silent = [name for name, value in model.named_parameters() if not value.grad.any()]
    assert silent == []


def test_the_longest_edge_says_how_many_levels_there_are():
    model = build_unetr(config((2, 16, 4)), (8, 32, 16), 1, 2)
    assert model.sizes == [(8, 32, 16), (4, 16, 8), (2, 8, 4), (1, 4, 2), (1, 2, 1)]
    edges = [skip.edges for skip in model.token_skips]
    assert edges == [(1, 8, 2), (1, 4, 1), (1, 2, 1), (1, 1, 1)]


@pytest.mark.parametrize(
    ("patch", "depth_blocks", "sizes"),
    [
        (16, [3, 6, 9, 12], [64, 32, 16, 8, 4]),  # as in the UNETR paper
        (8, [4, 8, 12], [64, 32, 16, 8]),
        (4, [4, 8, 12], [64, 32, 16, 8]),  # tokens at 16 x 16 are pooled for the deepest level
        (2, [4, 8, 12], [64, 32, 16, 8]),
        (32, [2, 5, 7, 10, 12], [64, 32, 16, 8, 4, 2]),
    ],
)
def test_levels_and_blocks_follow_the_patch(patch, depth_blocks, sizes):
    model = build_unetr(config(patch, size="tiny"), (64, 64), 1, 2)
    assert model.after == depth_blocks
    assert model.sizes == [(edge, edge) for edge in sizes]


@pytest.mark.parametrize("patch", [2, 8, 32])
def test_every_parameter_gets_a_gradient(patch):
    """Otherwise DistributedDataParallel would wait for it for ever."""
    model = build_unetr(config(patch), (32, 32), 1, 3)
    model(torch.randn(2, 1, 32, 32)).square().sum().backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    assert without == []
    silent = [name for name, value in model.named_parameters() if not value.grad.any()]
    assert silent == []


def test_a_token_is_mapped_to_the_pixels_of_its_patch():
    skips = build_unetr(config(4), (16, 32), 1, 2).token_skips  # a grid of 4 x 8 patches
    tokens = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    edited = tokens.clone()
    edited[:, 10] = -tokens[:, 10]  # line 1, column 2
    for skip, lines, columns in ((skips[0], (2, 4), (4, 6)), (skips[1], (1, 2), (2, 3))):
        moved = (skip(edited) != skip(tokens)).any(dim=1)[0].nonzero()
        assert moved.amin(dim=0).tolist() == [lines[0], columns[0]]
        assert (moved.amax(dim=0) + 1).tolist() == [lines[1], columns[1]]


def test_a_token_is_mapped_to_the_voxels_of_its_patch():
    """Patches of 2 x 8 x 4 voxels are 1 x 4 x 2 at half the size: nothing is interpolated."""
    skip = build_unetr(config((2, 8, 4)), (4, 24, 16), 1, 2).token_skips[0]  # 2 x 3 x 4 patches
    tokens = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0))
    edited = tokens.clone()
    edited[:, 21] = -tokens[:, 21]  # patch (1, 2, 1)
    moved = (skip(edited) != skip(tokens)).any(dim=1)[0].nonzero()
    assert moved.amin(dim=0).tolist() == [1, 8, 2]
    assert (moved.amax(dim=0) + 1).tolist() == [2, 12, 4]


def test_features_are_averaged_down_and_interpolated_up():
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., 0, 0] = 16.0
    assert _resized(corner, (2, 2)).flatten().tolist() == [4, 0, 0, 0]
    assert _resized(corner, (1, 1)).item() == 1
    ramp = torch.tensor([0.0, 4.0]).view(1, 1, 2)
    assert _resized(ramp, (4,)).flatten().tolist() == [0, 1, 3, 4]


def test_axes_may_go_different_ways():
    lines = torch.tensor([[0.0, 4.0], [8.0, 12.0], [2.0, 2.0], [2.0, 2.0]]).view(1, 1, 4, 2)
    # all four lines are averaged, then columns interpolated
    assert _resized(lines, (1, 4)).flatten().tolist() == [3, 3.5, 4.5, 5]


def test_the_image_and_every_level_matter():
    model = build_unetr(config(8), (32, 32), 1, 2).eval()
    images = torch.randn(1, 1, 32, 32)
    scores = model(images)
    for part in [model.image_skip, *(skip.map for skip in model.token_skips)]:
        kept = part.weight.detach().clone()
        torch.nn.init.zeros_(part.weight)
        assert not torch.equal(model(images), scores)
        part.weight.data.copy_(kept)
    assert torch.equal(model(images), scores)


def test_a_frozen_encoder_has_no_gradient_and_stays_in_evaluation_mode():
    model = build_unetr(config(encoder="frozen"), (32, 32), 1, 2).train()
    assert not any(value.requires_grad for value in model.encoder.parameters())
    assert not any(module.training for module in model.encoder.modules())
    assert model.refine.training
    assert all(value.requires_grad for value in model.refine.parameters())
    assert build_unetr(config(), (32, 32), 1, 2).train().encoder.training


def test_weights_follow_from_the_seed_alone():
    first, again, other = (build_unetr(config(), (32, 32), 1, 2, seed) for seed in (3, 3, 4))
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    build_unetr(config(), (32, 32), 1, 2, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.head.conv.conv.weight, other.head.conv.conv.weight)
    assert not torch.equal(first.encoder.embed.weight, other.encoder.embed.weight)


def test_a_pretrained_encoder_fits():
    mae = build_mae(config(), (32, 32), 1, seed=0)
    model = build_unetr(config(), (32, 32), 1, 2, seed=5)
    model.encoder.load_state_dict(mae.encoder.state_dict())
    assert torch.equal(model.encoder.embed.weight, mae.encoder.embed.weight)


def test_one_image_is_learnt_by_heart():
    """Without the residual paths in the decoder this takes several times as many steps."""
    model = build_unetr(config(8), (32, 32), 1, 3)
    truth = torch.zeros(1, 32, 32, dtype=torch.long)
    truth[:, 3:7, 4:9], truth[:, 20:23, 15:28] = 1, 2
    generator = torch.Generator().manual_seed(0)
    images = truth[:, None].float() + 0.3 * torch.randn(1, 1, 32, 32, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = dice_cross_entropy(model(images), truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pixels = confusion(truth, model(images).argmax(1), 3).numpy()
    objects = ObjectCounts(np.zeros((4, 4), int), np.zeros((3, 2), int))
    scores = split_scores(Counted(["a", "b", "c"], pixels, objects))
    assert scores["miou"] > 0.9
