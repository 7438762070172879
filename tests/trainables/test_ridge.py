"""Classes of pixels in closed form: `pytest tests/trainables/test_ridge.py`."""

import itertools

import numpy as np
import pytest
import torch

from trainables import ridge
from trainables.ridge import (
    PENALTIES,
    Patches,
    Ridge,
    class_weights,
    cross_validated,
    decide,
    folds_of,
    out_of_fold,
    segmenter,
)
from trainables.scores import IGNORED, confusion, miou_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(patches=400, width=6, pixels=4, num_classes=3, seed=0, groups=20):
    """Patches whose pixels are of the class whose linear map of the values is the highest."""
    values_ND = normal(patches, width, seed=seed)
    labels_NQ = (values_ND @ normal(width, pixels * num_classes, seed=99)).view(
        patches, pixels, num_classes
    )
    fold = folds_of([str(number % groups) for number in range(patches)])
    return Patches(values_ND, labels_NQ.argmax(dim=-1).to(torch.uint8), torch.from_numpy(fold))


def score(patches, num_classes=3):
    scores_NQK = out_of_fold(patches, num_classes)
    return miou_of(cross_validated(scores_NQK, patches.labels_NQ, patches.fold_N))


def test_without_a_penalty_it_is_numpys_least_squares():
    values, targets = normal(50, 4) + 3, normal(50, 6, seed=1) - 2
    fit = Ridge(ridge._moments(values, targets))
    slope, intercept = fit.weights(0.0)
    with_one = np.column_stack([np.ones(50), values.double().numpy()])
    expected, _, _, _ = np.linalg.lstsq(with_one, targets.double().numpy(), rcond=None)
    assert torch.cat([intercept[None], slope]).numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 10.0])
def test_a_penalty_adds_rows_to_least_squares_but_none_for_the_intercept(penalty):
    values, targets = normal(50, 4) + 3, normal(50, 6, seed=1) - 2
    fit = Ridge(ridge._moments(values, targets))
    slope, intercept = fit.weights(penalty)
    x, y = values.double().numpy(), targets.double().numpy()
    centred = x - x.mean(axis=0)
    unit = np.trace(centred.T @ centred) / 4
    rows = np.vstack([centred, np.sqrt(penalty * unit) * np.eye(4)])
    expected = np.linalg.lstsq(rows, np.vstack([y - y.mean(axis=0), np.zeros((4, 6))]), rcond=None)[
        0
    ]
    assert slope.numpy() == pytest.approx(expected, abs=1e-9)
    assert intercept.numpy() == pytest.approx(y.mean(axis=0) - x.mean(axis=0) @ expected, abs=1e-9)


def test_errors_from_sums_are_those_of_the_predictions():
    fit = Ridge(ridge._moments(normal(60, 5) + 1, normal(60, 3, seed=1)))
    values, targets = normal(30, 5, seed=2) - 4, normal(30, 3, seed=3) + 2
    found = fit.errors(ridge._moments(values, targets), PENALTIES)
    for penalty, error in zip(PENALTIES, found, strict=True):
        slope, intercept = fit.weights(penalty)
        expected = (values.double() @ slope + intercept - targets.double()).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-9)


def test_groups_are_never_split_and_folds_are_about_as_large():
    groups = [f"g{number % 7}" for number in range(70)] + ["large"] * 30
    fold = folds_of(groups)
    for name in set(groups):
        assert len({int(fold[row]) for row, other in enumerate(groups) if other == name}) == 1
    assert np.bincount(fold).tolist() == [30, 20, 20, 20, 10]
    assert folds_of(["a", "b", "a"]).tolist() == [0, 1, 0]
    assert folds_of(groups).tolist() == fold.tolist()


def test_a_planted_linear_task_is_solved_and_a_shuffled_one_is_not():
    patches = planted()
    assert score(patches) > 0.85
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    shuffled = patches._replace(labels_NQ=patches.labels_NQ[order])
    assert score(shuffled) < 0.35  # one class everywhere has 1/6, chance 1/5


def test_two_classes_of_an_exactly_linear_target_are_solved_to_the_last_pixel():
    values = normal(300, 5)
    is_high = values[:, :1] > 0
    values[:, 0] = torch.where(is_high[:, 0], 1.0, -1.0)
    fold = torch.arange(300) % 5
    assert score(Patches(values, is_high.to(torch.uint8).expand(-1, 4), fold), 2) == 1.0


def test_what_is_known_of_a_group_alone_does_not_help():
    """Values name the group, and all of a group is of one class: only split groups could profit."""
    group = torch.arange(400) % 40
    values = torch.nn.functional.one_hot(group, 40).float() + 0.01 * normal(400, 40)
    label_of = (normal(40, seed=3) > 0).to(torch.uint8)
    labels = label_of[group][:, None].expand(-1, 4)
    apart = torch.from_numpy(folds_of([str(int(number)) for number in group]))
    split = torch.arange(400) // 80
    assert score(Patches(values, labels, split), 2) == 1.0
    assert score(Patches(values, labels, apart), 2) < 0.6


def test_the_regression_of_a_fold_does_not_see_its_labels(monkeypatch):
    monkeypatch.setattr(ridge, "PENALTIES", (1e-2,))
    patches = planted()
    is_first = patches.fold_N == 0
    other = torch.where(is_first[:, None], 2, patches.labels_NQ.long()).to(torch.uint8)
    before = out_of_fold(patches, 3)
    after = out_of_fold(patches._replace(labels_NQ=other), 3)
    assert before[is_first].equal(after[is_first])
    assert not before[~is_first].equal(after[~is_first])


def test_unlabelled_pixels_are_scored_nowhere_and_are_told_the_mean_of_their_patch():
    labels = torch.tensor([[1, 1, 0, 255], [2, 255, 255, 255]], dtype=torch.uint8)
    targets = ridge._targets(labels, 3).view(2, 4, 2)
    assert targets[0, :, 0].tolist() == pytest.approx([1, 1, 0, 2 / 3])
    assert targets[1].tolist() == [[0, 1]] * 4
    patches = planted()
    patches.labels_NQ[::3, 1] = IGNORED
    scores_NQK = out_of_fold(patches, 3)
    pixels_KK = cross_validated(scores_NQK, patches.labels_NQ, patches.fold_N)
    assert pixels_KK.sum() == (patches.labels_NQ != IGNORED).sum()
    assert miou_of(pixels_KK) > 0.8


def test_scores_of_all_classes_add_to_one():
    assert out_of_fold(planted(), 3).sum(dim=-1).numpy() == pytest.approx(1.0, abs=1e-5)


def rare(pixels=4000, seed=0):
    """Scores of three classes that are right about how probable each is; the last two are rare."""
    chance = torch.rand(pixels, 2, generator=torch.Generator().manual_seed(seed)) ** 4 * 0.4
    scores = torch.cat([1 - chance.sum(dim=1, keepdim=True), chance], dim=1)
    drawn = torch.rand(pixels, 1, generator=torch.Generator().manual_seed(seed + 1))
    return scores, (drawn > scores.cumsum(dim=1)[:, :2]).sum(dim=1).to(torch.uint8)


def weighted_miou(scores, labels, weights):
    predicted = decide(scores, torch.as_tensor(weights))
    return miou_of(confusion(labels, predicted, len(weights)).numpy())


def test_weights_find_rare_classes_that_the_likeliest_one_never_is():
    scores, labels = rare()
    plain = weighted_miou(scores, labels, [1.0, 1.0, 1.0])
    weights = class_weights(scores, labels)
    assert weights[0] == 1 and weights[1:].min() > 1
    assert weighted_miou(scores, labels, weights) > plain + 0.1


def test_one_weight_is_the_best_of_all_that_are_tried():
    scores, labels = rare()
    scores, labels = scores[:, :2] / scores[:, :2].sum(dim=1, keepdim=True), labels.clamp(max=1)
    tried = 2.0 ** (np.arange(97) / 8 - 6)
    best = max(weighted_miou(scores, labels, [1.0, weight]) for weight in tried)
    assert weighted_miou(scores, labels, class_weights(scores, labels)) == pytest.approx(best)


def test_two_weights_are_about_the_best_pair():
    scores, labels = rare()
    tried = 2.0 ** np.arange(-1, 4, 0.5)
    best = max(
        weighted_miou(scores, labels, [1.0, *pair]) for pair in itertools.product(tried, tried)
    )
    assert weighted_miou(scores, labels, class_weights(scores, labels)) > best - 0.005


def test_where_there_is_background_alone_weights_stay_as_they_are():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    assert class_weights(scores, torch.tensor([255, 255])).tolist() == [1.0, 1.0]


def test_the_weights_of_a_fold_do_not_see_its_labels():
    scores, labels = rare()
    fold = torch.arange(40) % 4
    scores_NQK, labels_NQ = scores.view(40, 100, 3), labels.view(40, 100)
    flipped = torch.where(fold[:, None] == 0, 2 - labels_NQ, labels_NQ)
    own = fold == 0
    weights_K = class_weights(scores_NQK[~own].flatten(0, 1), labels_NQ[~own].flatten())
    expected = confusion(flipped[own], decide(scores_NQK[own], weights_K), 3)
    others = cross_validated(scores_NQK, flipped, fold)
    assert others.sum() == 4000
    whole = sum(
        confusion(
            flipped[fold == number],
            decide(
                scores_NQK[fold == number],
                class_weights(
                    scores_NQK[fold != number].flatten(0, 1), flipped[fold != number].flatten()
                ),
            ),
            3,
        )
        for number in range(1, 4)
    )
    assert (expected + whole).tolist() == others.tolist()


def test_a_fitted_segmenter_tells_patches_that_it_has_not_seen():
    fitted, fresh = segmenter(planted(seed=0), 3), planted(seed=7)
    found = confusion(fresh.labels_NQ, fitted.classes(fresh.values_ND), 3)
    assert miou_of(found.numpy()) > 0.85
