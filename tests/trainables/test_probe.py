"""The probe asks every trial the same: `pytest tests/trainables/test_probe.py`."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests import toy
from trainables import probe as probing
from trainables import torchvision_mended  # noqa: F401  (torchmetrics imports torchvision)
from trainables.config import ProbeConfig, TrialConfig
from trainables.edges import grid_of, per_axis
from trainables.errors import UserError
from trainables.fillings import FILLINGS
from trainables.mae import build_mae
from trainables.masking import pixels_hidden
from trainables.metrics import METRICS, parse
from trainables.pictures import to_intensity
from trainables.probe import (
    Judge,
    best_of,
    gains,
    measure,
    metric_names,
    native_mask,
    probe_mask,
    probe_rows,
    trivial_psnr,
)
from trainables.scores import ssim

# isort: split
# after the mending
from torchmetrics.functional.image import structural_similarity_index_measure

torch.set_num_threads(1)

PROBE = ProbeConfig(unit=16, seed=3)
ROWS = torch.tensor([5, 2, 40])


def pixels_of(probe, ratio, size, patch, rows=ROWS):
    patch = per_axis(patch, len(size), "patch")
    is_hidden_BP, hidden = probe_mask(probe, ratio, size, patch, rows)
    assert is_hidden_BP.sum(dim=1).eq(hidden).all()
    return pixels_hidden(is_hidden_BP, grid_of(size, patch), patch)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_same_pixels_are_hidden_for_every_patch_size(ratio):
    expected = pixels_of(PROBE, ratio, (64, 96), 16)
    assert expected.float().mean().item() == ratio
    for patch in (2, 4, 8, (2, 16), (8, 4)):
        assert pixels_of(PROBE, ratio, (64, 96), patch).equal(expected)


@pytest.mark.parametrize("unit", [4, (4, 4, 4), (4, 4, 8)], ids=str)
def test_the_same_voxels_are_hidden_for_every_patch(unit):
    probe, size = ProbeConfig(unit=unit, seed=3), (8, 12, 16)
    expected = pixels_of(probe, 0.5, size, (1, 1, 1))
    for patch in ((2, 4, 4), (4, 4, 2), (4, 2, 4), 4, 2):
        assert pixels_of(probe, 0.5, size, patch).equal(expected)
    # as blocks of the unit, and some of each kind
    depth, height, width = per_axis(unit, 3, "unit")
    corners = expected[:, ::depth, ::height, ::width]
    for axis, edge in enumerate((depth, height, width), start=1):
        corners = corners.repeat_interleave(edge, axis)
    assert expected.equal(corners)
    assert expected.float().mean().item() == 0.5


def test_a_probe_for_another_number_of_axes_is_refused():
    with pytest.raises(UserError, match=r"probe.unit: given \[4, 8\], 2 edges, .* 3 axes"):
        probe_mask(ProbeConfig(unit=(4, 8)), 0.5, (8, 8, 8), (2, 2, 2), ROWS)


def test_hidden_regions_are_whole_blocks_of_the_unit():
    hidden = pixels_of(PROBE, 0.5, (64, 96), 2)
    blocks = hidden.reshape(3, 4, 16, 6, 16)
    assert blocks.all(dim=(2, 4)).equal(blocks.any(dim=4).any(dim=2))


def test_an_image_has_the_same_regions_whatever_stands_beside_it():
    together = pixels_of(PROBE, 0.5, (64, 64), 8)
    for place, row in enumerate(ROWS):
        alone = pixels_of(PROBE, 0.5, (64, 64), 8, row[None])
        assert alone[0].equal(together[place])


def test_images_ratios_and_seeds_have_regions_of_their_own():
    first, second, third = pixels_of(PROBE, 0.5, (64, 64), 8)
    assert not first.equal(second) and not second.equal(third)
    other_seed = ProbeConfig(unit=16, seed=4)
    assert not pixels_of(other_seed, 0.5, (64, 64), 8)[0].equal(first)
    quarter = pixels_of(PROBE, 0.25, (64, 64), 8)
    assert (quarter & ~pixels_of(PROBE, 0.5, (64, 64), 8)).any()


def test_probed_images_are_evenly_spread():
    rows = np.array([3, 4, 8, 9, 11, 20, 21, 30])
    assert probe_rows(rows, 4).tolist() == [3, 8, 11, 21]
    assert probe_rows(rows, 3).tolist() == [3, 8, 20]
    assert probe_rows(rows, 99).tolist() == rows.tolist()


def test_the_native_mask_is_the_trials_own_at_the_end_of_its_schedule():
    config = TrialConfig.model_validate(
        {
            "model": {"patch": 4},
            "masking": {"unit": 8, "ratio": {"name": "linear", "start": 0.25, "end": 0.75}},
        }
    )
    is_hidden_BP, hidden = native_mask(config, 0, torch.zeros(3, 1, 32, 32), ROWS, None)
    assert hidden == 48 and is_hidden_BP.shape == (3, 64)
    blocks = is_hidden_BP.reshape(3, 4, 2, 4, 2)
    assert blocks.all(dim=(2, 4)).sum(dim=(1, 2)).tolist() == [12, 12, 12]


def test_intensities_are_clipped_and_per_channel():
    images = torch.tensor([-9.0, 0.0, 1.0, 9.0]).reshape(1, 1, 2, 2).expand(1, 2, 2, 2)
    found = to_intensity(images, (0.5, 0.1), (0.25, 0.5))
    torch.testing.assert_close(found[0, 0].flatten(), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(found[0, 1].flatten(), torch.tensor([0.0, 0.1, 0.6, 1.0]))


@pytest.mark.parametrize(
    "size", [(4, 4), (8, 8), (16, 16), (32, 32), (4, 8, 12), (8, 8, 8), (12, 16, 12)]
)
def test_ssim_is_one_for_the_truth_and_sees_only_hidden_pixels(size):
    truth = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
    where = torch.zeros(2, *size, dtype=torch.bool)
    where[:, : size[0] // 2] = True
    torch.testing.assert_close(ssim(truth, truth, where), torch.ones(2))
    wrong_where_visible = torch.where(where[:, None], truth, torch.zeros(()))
    torch.testing.assert_close(ssim(wrong_where_visible, truth, where), torch.ones(2))
    wrong_where_hidden = torch.where(where[:, None], truth.flip(0), truth)
    assert (ssim(wrong_where_hidden, truth, where) < 0.8).all()


def test_ssim_agrees_with_a_plain_version():
    generator = np.random.default_rng(0)
    truth = generator.random((24, 32))
    guess = np.clip(truth + 0.2 * generator.normal(size=truth.shape), 0, 1)
    is_hidden = np.zeros(truth.shape, bool)
    is_hidden[4:12, 8:24] = True

    def blur(values):
        return ndimage.gaussian_filter(values, 1.5, truncate=3.5, mode="mirror")

    a, b = truth, np.where(is_hidden, guess, truth)
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    map_HW = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    map_HW /= (mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)

    guess_BCS, truth_BCS = (torch.tensor(image[None, None]).float() for image in (guess, truth))
    found = ssim(guess_BCS, truth_BCS, torch.tensor(is_hidden[None]))
    assert found.item() == pytest.approx(map_HW[is_hidden].mean(), abs=1e-4)


@pytest.mark.parametrize("size", [(24, 32), (12, 16, 14), (6, 20, 9)])
def test_ssim_agrees_with_torchmetrics(size):
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(2, 3, *size, generator=generator)
    guess = (truth + 0.3 * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
    where = torch.rand(2, *size, generator=generator) < 0.4
    sigma = 1.5 * min(1, min(size) / 11)
    _, map_BCS = structural_similarity_index_measure(
        torch.where(where[:, None], guess, truth),
        truth,
        data_range=1.0,
        sigma=sigma,
        kernel_size=2 * int(3.5 * sigma + 0.5) + 1,
        return_full_image=True,
        reduction="none",
    )
    expected = torch.stack([m.mean(0)[w].mean() for m, w in zip(map_BCS, where, strict=True)])
    torch.testing.assert_close(ssim(guess, truth, where), expected, rtol=0, atol=1e-5)


def test_measures_by_hand():
    """A model that predicts the truth 0.1 too bright where hidden, and black where visible."""
    config = TrialConfig.model_validate({"model": {"patch": 8}, "masking": {"unit": 16}})
    mean, std = (0.5,), (0.2,)
    generator = torch.Generator().manual_seed(0)
    truth = 0.1 + 0.7 * torch.rand(3, 1, 64, 64, generator=generator)
    calls = []

    def reconstruct(images, visible_BV, hidden_BX):
        torch.testing.assert_close(images, (truth - 0.5) / 0.2)
        calls.append((visible_BV.shape[1], hidden_BX.shape[1]))
        is_hidden = torch.zeros(3, 64, dtype=torch.bool).scatter_(1, hidden_BX, True)
        guess = torch.where(pixels_hidden(is_hidden, (8, 8), (8, 8))[:, None], truth + 0.1, 0.0)
        return (guess - 0.5) / 0.2

    images = (truth - 0.5) / 0.2
    trivial = best_of(trivial_psnr(images, ROWS, PROBE, mean, std))
    found, _ = measure(reconstruct, None, images, ROWS, config, PROBE, trivial, mean, std)
    assert calls == [(48, 16), (32, 32), (16, 48), (16, 48)]
    for name in ("probe_psnr@0.25", "probe_psnr@0.75", "probe_psnr", "native_psnr_hidden"):
        torch.testing.assert_close(found[name], torch.full((3,), 20.0), atol=1e-3, rtol=0)
    # in noise nothing is better than the mean, which errs by the deviation of a uniform variable of
    # width 0.7; another pixel errs by that of the difference of two
    over_mean = 20 + 20 * math.log10(0.7 / math.sqrt(12))
    over_nearest = 20 + 20 * math.log10(0.7 / math.sqrt(6))
    for name, by_hand in [("", over_mean), ("/mean", over_mean), ("/nearest", over_nearest)]:
        gain = found[f"probe_gain{name}"]
        torch.testing.assert_close(gain, torch.full((3,), by_hand), atol=0.5, rtol=0)
    between = found["probe_gain/laplace"]
    assert (between > found["probe_gain"]).all() and (between < found["probe_gain/nearest"]).all()
    visible_error = (0.45**2 + 0.7**2 / 12) / 4
    expected = -10 * math.log10(visible_error + 0.75 * 0.01)
    torch.testing.assert_close(
        found["native_psnr_all"], torch.full((3,), expected), atol=0.3, rtol=0
    )
    assert found["probe_ssim@0.25"].lt(1).all() and found["probe_ssim@0.25"].gt(0.8).all()
    assert set(found) == set(metric_names(PROBE, config))
    assert {parse(f"pretrain/{name}").key for name in found} <= set(METRICS)


MEAN, STD = (0.5, 0.5), (0.2, 0.2)


def smooth(size):
    """Three images of two channels that rise along the last axis, with some noise; standardised."""
    rows = torch.linspace(0.1, 0.9, size[-1]).expand(3, 2, *size).clone()
    rows[:, 1] = rows[:, 1].flip(-1)
    rows[2] *= 0.5
    rows += 0.02 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    return (rows - 0.5) / 0.2


@pytest.mark.parametrize(("size", "unit"), [((48, 64), 16), ((8, 16, 24), (4, 8, 8))], ids=str)
def test_a_model_that_fills_in_as_trivially_gains_nothing(size, unit):
    """Each filling in the place of the model: 0 dB over itself, and over the best for the best."""
    patch = (4,) * len(size)
    config = TrialConfig.model_validate({"model": {"patch": patch}})
    probe, images = ProbeConfig(unit=unit, seed=3), smooth(size)
    trivial = best_of(trivial_psnr(images, ROWS, probe, MEAN, STD))
    gained = {}
    for key, filling in FILLINGS.items():

        def reconstruct(images, visible_BV, hidden_BX, filling=filling):
            is_hidden_BP = torch.zeros(3, math.prod(grid_of(size, patch)), dtype=torch.bool)
            is_hidden_BP.scatter_(1, hidden_BX, True)
            is_hidden = pixels_hidden(is_hidden_BP, grid_of(size, patch), patch).numpy()
            pairs = zip(images.numpy(), is_hidden, strict=True)
            filled = [filling.fill(image, ~hidden, hidden) for image, hidden in pairs]
            return torch.from_numpy(np.stack(filled)).float()

        found, _ = measure(reconstruct, None, images, ROWS, config, probe, trivial, MEAN, STD)
        gained[key] = found["probe_gain"].mean().item()
        torch.testing.assert_close(found[f"probe_gain/{key}"], torch.zeros(3), atol=2e-3, rtol=0)
    assert gained["laplace"] == pytest.approx(0, abs=2e-3)
    assert gained["mean"] < gained["nearest"] < -1


def test_the_best_filling_is_chosen_at_each_ratio_for_all_images_together():
    """mean, nearest, laplace at two ratios of three images, the last of which does not count."""
    nothing = math.nan
    psnr_FRB = torch.tensor(
        [
            [[20.0, 10.0, nothing], [11.0, 13.0, nothing]],
            [[12.0, 12.0, nothing], [12.0, 14.0, nothing]],
            [[14.0, 15.0, nothing], [9.0, 9.0, nothing]],
        ]
    )
    trivial = best_of(psnr_FRB)
    assert trivial.best_R.tolist() == [0, 1]  # 15 dB of the mean, 13 of the nearest
    found = gains(torch.tensor([[21.0, 21.0, 0.0], [12.0, 12.0, 0.0]]), trivial)
    assert found["probe_gain"][:2].tolist() == [0.5, 4.5]
    assert found["probe_gain/mean"][:2].tolist() == [1.0, 5.0]
    assert found["probe_gain/nearest"][:2].tolist() == [4.5, 3.5]
    assert found["probe_gain/laplace"][:2].tolist() == [5.0, 4.5]
    # of one image alone the same filling counts, though another is better on it
    assert gains(torch.tensor([[21.0], [12.0]]), trivial.of(torch.tensor([1])))[
        "probe_gain"
    ].tolist() == [4.5]


def test_trivial_fillings_are_computed_once_for_a_data_set_and_a_probe(tmp_path, monkeypatch):
    config, data = toy.trial(), toy.discs(seed=77)
    calls, usual = [], probing.trivial_psnr
    monkeypatch.setattr(probing, "trivial_psnr", lambda *a, **k: calls.append(1) or usual(*a, **k))

    def score(data, probe):
        context = toy.context(tmp_path, toy.Diary())
        before = len(calls)
        scores = Judge(config, data, probe, context).scores(
            build_mae(config, data.size, 1, 0), None
        )
        return scores, len(calls) > before

    first, is_computed = score(data, toy.PROBE)
    assert is_computed
    assert score(data, toy.PROBE) == (first, False)
    assert score(data, toy.PROBE.model_copy(update={"seed": 5}))[1]
    assert score(toy.discs(seed=78), toy.PROBE)[1]
    fewer = data.splits.copy()
    fewer[-2:] = ""
    assert score(replace(data, splits=fewer), toy.PROBE)[1]


def test_what_the_trial_hides_is_asked_of_its_teacher(tmp_path):
    """Two teachers, one model: the probe is the same, native scores and pictures are not."""
    config, data = toy.trial(masking__strategy="attmask"), toy.discs()
    signs = []
    context = toy.context(tmp_path, toy.Diary(), alive=lambda: signs.append(None))
    judge = Judge(config, data, toy.PROBE, context)
    model, *teachers = (build_mae(config, data.size, 1, seed) for seed in (0, 1, 2))
    scores, pictures = [], []
    judge.scores(model, None)  # which remembers the trivial fillings
    signs.clear()
    for teacher in teachers:
        scores.append(judge.scores(model, teacher))
        judge.draw_masks(model, teacher, 0.5)
        pictures.append((tmp_path / "pictures" / "masks-050.png").read_bytes())
    first, second = scores
    assert len(signs) == 2 * -(-toy.PROBE.images // judge.chunk)
    assert first["probe_psnr"] == second["probe_psnr"]
    assert first["native_psnr_hidden"] != second["native_psnr_hidden"]
    assert pictures[0] != pictures[1]
