"""Losses of hidden patches and of side tasks.

pytest tests/trainables/test_losses.py
"""

import math
from functools import partial

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.drawn import drawn
from trainables.config import Loss
from trainables.losses import (
    DIFFICULTY,
    LOSSES,
    absolute_loss,
    category_loss,
    ranking_loss,
)
from trainables.named import named

SIDE_TASKS = DIFFICULTY | {
    reading: partial(category_loss, reading=reading) for reading in ("median", "order", "margin")
}
EVERY_LOSS = [
    pytest.param(partial(LOSSES[name], **setting.options()), id=f"{name} {setting.options()}")
    for name in LOSSES
    for setting in drawn(Loss, name)
]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def some_errors(batch=5, hidden=7):
    generator = torch.Generator().manual_seed(3)
    errors_BX = torch.rand(batch, hidden, generator=generator) + 0.1
    return errors_BX, torch.randn(batch, hidden, 12, generator=generator)


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_every_loss_judges_each_image_by_itself(loss):
    errors_BX, truth_BXQ = some_errors()
    loss_B = loss(errors_BX, truth_BXQ)
    assert loss_B.shape == (5,) and loss_B.dtype == torch.float32
    parts = [loss(errors_BX[part], truth_BXQ[part]) for part in (slice(2), slice(2, 5))]
    assert torch.equal(loss_B, torch.cat(parts))


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_every_loss_is_computed_in_float32(loss):
    errors_BX, truth_BXQ = some_errors()
    rounded = loss(errors_BX.bfloat16(), truth_BXQ.bfloat16())
    exact = loss(errors_BX.bfloat16().float(), truth_BXQ.bfloat16().float())
    assert torch.equal(rounded, exact)


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_every_loss_falls_with_every_error(loss):
    errors_BX, truth_BXQ = some_errors()
    errors_BX.requires_grad_()
    loss(errors_BX, truth_BXQ).sum().backward()
    assert (errors_BX.grad > 0).all()


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_perfect_predictions_of_black_patches_cost_nothing(loss):
    errors_BX = torch.zeros(2, 3, requires_grad=True)
    loss_B = loss(errors_BX, torch.zeros(2, 3, 4))
    loss_B.sum().backward()
    assert loss_B.tolist() == [0, 0]
    assert errors_BX.grad.isfinite().all()


def test_mean_by_hand():
    assert LOSSES["mean"](row(1, 2, 6), torch.zeros(1, 3, 4)).tolist() == [3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # weights 1/3, 2/3, 2
        ({}, (1 / 3 + 4 / 3 + 12) / 3),
        # weights 1/9, 4/9, 4: the lower bound of 0.1 is just not reached
        ({"gamma": 2.0}, (1 / 9 + 8 / 9 + 24) / (41 / 9)),
        # 1/3 is raised to 0.5 and 2 lowered to 1.5
        ({"low": 0.5, "high": 1.5}, (0.5 + 4 / 3 + 9) / (0.5 + 2 / 3 + 1.5)),
        # shares 1/7, 2/7, 4/7 of 3; the last is lowered from 12/7 to 3/2
        (
            {"temperature": 1 / math.log(2), "high": 1.5},
            (3 / 7 * 1 + 6 / 7 * 2 + 1.5 * 3) / (3 / 7 + 6 / 7 + 1.5),
        ),
    ],
)
def test_arl_by_hand(options, expected):
    errors_BX = row(1, 2, 3) if "temperature" in options else row(1, 2, 6)
    loss_B = LOSSES["arl"](errors_BX, torch.zeros(1, 3, 4), **options)
    assert loss_B.item() == pytest.approx(expected, abs=1e-6)


def test_weights_of_arl_are_constants_for_the_gradient():
    errors_BX = row(1, 2, 6).requires_grad_()
    LOSSES["arl"](errors_BX, torch.zeros(1, 3, 4)).sum().backward()
    assert errors_BX.grad[0].tolist() == pytest.approx([1 / 9, 2 / 9, 6 / 9], abs=1e-6)


def test_arl_without_exponent_is_exactly_the_mean():
    errors_BX, truth_BXQ = some_errors(64, 147)
    both = [
        errors_BX.clone().requires_grad_(),
        errors_BX.clone().requires_grad_(),
    ]
    loss_B = LOSSES["arl"](both[0], truth_BXQ, gamma=0.0)
    mean_B = LOSSES["mean"](both[1], truth_BXQ)
    assert torch.equal(loss_B, mean_B)
    loss_B.sum().backward()
    mean_B.sum().backward()
    assert torch.equal(both[0].grad, both[1].grad)


def test_rrl_by_hand():
    truth_BXQ = torch.tensor([[[1.0, -1.0], [0.0, 2.0]]])  # mean squares 1 and 2
    to_patch_B = LOSSES["rrl"](row(1, 2), truth_BXQ, epsilon=0.5, relative_to="patch")
    assert to_patch_B.item() == pytest.approx((1 / 1.5 + 2 / 2.5) / 2, abs=1e-6)
    # shares 2/3 and 4/3 of the mean error, mean power 1.5
    loss_B = LOSSES["rrl"](row(1, 2), truth_BXQ, epsilon=0.5)
    assert loss_B.item() == pytest.approx((1 * 2 / 3 + 2 * 4 / 3) / 2 / 2, abs=1e-6)


def test_rrl_turns_to_bright_lesions_and_not_away_from_them():
    """Who predicts the mean everywhere errs by the patch's power; one of ten patches is bright."""
    truth_BXQ = torch.full((1, 10, 4), 0.5)
    truth_BXQ[:, 0] = 3.0

    def share_of_lesion(**options):
        predicted_BXQ = torch.zeros_like(truth_BXQ, requires_grad=True)
        errors_BX = (predicted_BXQ - truth_BXQ).square().mean(dim=2)
        LOSSES[options.pop("name", "rrl")](errors_BX, truth_BXQ, **options).sum().backward()
        pull_BX = predicted_BXQ.grad.abs().sum(dim=2)
        return (pull_BX[0, 0] / pull_BX.sum()).item()

    plain = share_of_lesion(name="mean")
    assert share_of_lesion(relative_to="patch") < 0.5 * plain < 0.5 * share_of_lesion()
    # pale images count as much as bright ones
    losses = [
        LOSSES["rrl"](4 * scale**2 * row(1, 2), 2 * scale * torch.ones(1, 2, 3), epsilon=1e-9)
        for scale in (1.0, 0.1)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "arl", "gamma": -0.1},
        {"name": "arl", "low": 0.0},
        {"name": "arl", "low": 1.1},
        {"name": "arl", "high": 0.9},
        {"name": "arl", "temperature": 0.0},
        {"name": "rrl", "epsilon": 0.0},
        {"name": "mean", "gamma": 1.0},
    ],
)
def test_options_out_of_bounds_are_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(named(LOSSES)).validate_python(settings)


def test_a_loss_is_named_in_a_study_by_its_name_alone():
    choice = TypeAdapter(named(LOSSES)).validate_python("arl")
    assert choice.options() == {"gamma": 1.0, "low": 0.1, "high": 10.0, "temperature": None}


def test_ranking_loss_of_three_patches_by_hand():
    # harder than: the first than both others, the third than the second
    loss_B = ranking_loss(row(0.5, 0.0, -1.0), row(3, 1, 2))
    pairs = [0.5 - 0.0, 0.5 - -1.0, -1.0 - 0.0]
    expected = -sum(math.log(sigmoid(pair) + 1e-6) for pair in pairs) / 3
    assert loss_B.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 7, 8])
def test_ranking_loss_is_the_published_sum_over_ordered_pairs(hidden):
    generator = torch.Generator().manual_seed(hidden)
    predicted_BX = torch.randn(6, hidden, generator=generator)
    errors_BX = torch.randint(4, (6, hidden), generator=generator).float()  # with ties
    loss_B = ranking_loss(predicted_BX, errors_BX)
    for loss, p, t in zip(loss_B.tolist(), predicted_BX.tolist(), errors_BX.tolist(), strict=True):
        terms = [
            -math.log(sigmoid(p[i] - p[j]) + 1e-6)
            if t[i] > t[j]
            else -math.log(1 - sigmoid(p[i] - p[j]) + 1e-6)
            for i in range(hidden)
            for j in range(hidden)
            if t[i] != t[j]
        ]
        assert loss == pytest.approx(sum(terms) / max(len(terms), 1), abs=1e-6)


def test_ties_are_left_out_of_the_ranking_loss():
    loss_B = ranking_loss(row(1.0, 0.0, 5.0), row(2, 1, 1))
    expected = -(math.log(sigmoid(1.0) + 1e-6) + math.log(sigmoid(-4.0) + 1e-6)) / 2
    assert loss_B.item() == pytest.approx(expected, abs=1e-6)
    assert ranking_loss(row(1.0, 0.0, 5.0), row(2, 2, 2)).item() == 0


def test_ranking_loss_of_a_hopeless_pair_is_bounded():
    predicted_BX = row(-300.0, 300.0).requires_grad_()
    loss_B = ranking_loss(predicted_BX, row(2, 1))
    loss_B.sum().backward()
    assert loss_B.item() == pytest.approx(-math.log(1e-6), abs=1e-5)
    assert predicted_BX.grad.isfinite().all()


def test_absolute_loss_by_hand():
    # errors 1 and 3 are -1 and 1 when standardised
    assert absolute_loss(row(0.5, 0.0), row(1, 3)).item() == pytest.approx((2.25 + 1) / 2, abs=1e-5)
    assert absolute_loss(row(0.5, 0.0), row(2, 2)).item() == pytest.approx(0.125, abs=1e-6)


def test_category_loss_to_the_median_by_hand():
    # the two upper errors are hard; of an odd number, the middle one is not
    logits_BX = row(0.0, 0.0, math.log(3), -math.log(3))
    loss_B = category_loss(logits_BX, row(1, 2, 5, 7), reading="median")
    expected = -(2 * math.log(0.5) + math.log(0.75) + math.log(0.25)) / 4
    assert loss_B.item() == pytest.approx(expected, abs=1e-6)
    loss_B = category_loss(row(0.0, math.log(3), 0.0), row(1, 2, 5), reading="median")
    assert loss_B.item() == pytest.approx(-(2 * math.log(0.5) + math.log(0.25)) / 3, abs=1e-6)


def test_category_loss_by_order_is_the_ranking_loss():
    errors_BX, _ = some_errors()
    logits_BX = errors_BX.flip(1)
    expected = ranking_loss(logits_BX, errors_BX)
    assert torch.equal(category_loss(logits_BX, errors_BX, reading="order"), expected)


def test_category_loss_by_margin_by_hand():
    # probabilities 1/4 and 3/4: mean errors 1/4 + 9/4 of lesions, 3/4 + 3/4 of background
    logits_BX = row(-math.log(3), math.log(3))
    loss_B = category_loss(logits_BX, row(1, 3), reading="margin")
    assert loss_B.item() == pytest.approx(2 + 1.5 - 2.5, abs=1e-6)
    # a head that is right and sure: 4 against 0, and a mean of 1
    loss_B = category_loss(row(-20.0, -20.0, -20.0, 20.0), row(0, 0, 0, 4), reading="margin")
    assert loss_B.item() == 0
    # one that calls everything background
    loss_B = category_loss(row(-200.0, -200.0), row(1, 3), reading="margin")
    assert loss_B.item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("name", SIDE_TASKS)
def test_side_tasks_teach_the_head_and_not_the_reconstruction(name):
    errors_BX, _ = some_errors()
    values_BX = torch.zeros_like(errors_BX, requires_grad=True)
    errors_BX.requires_grad_()
    loss_B = SIDE_TASKS[name](values_BX, errors_BX)
    loss_B.sum().backward()
    assert loss_B.shape == (5,) and loss_B.dtype == torch.float32
    assert errors_BX.grad is None
    # harder patches are to be told apart: the gradient pulls the hardest up and the easiest down
    hardest, easiest = errors_BX.argmax(1, keepdim=True), errors_BX.argmin(1, keepdim=True)
    assert (values_BX.grad.gather(1, hardest) < 0).all()
    assert (values_BX.grad.gather(1, easiest) > 0).all()


@pytest.mark.parametrize("name", SIDE_TASKS)
def test_side_tasks_judge_each_image_by_itself_in_float32(name):
    task, (errors_BX, _) = SIDE_TASKS[name], some_errors()
    values_BX = errors_BX.flip(1)
    parts = [task(values_BX[part], errors_BX[part]) for part in (slice(2), slice(2, 5))]
    assert torch.equal(task(values_BX, errors_BX), torch.cat(parts))
    rounded = values_BX.bfloat16(), errors_BX.bfloat16()
    assert torch.equal(task(*rounded), task(rounded[0].float(), rounded[1].float()))


@pytest.mark.parametrize("name", SIDE_TASKS)
def test_side_tasks_of_a_single_hidden_patch_are_finite(name):
    values_BX = torch.zeros(2, 1, requires_grad=True)
    loss_B = SIDE_TASKS[name](values_BX, torch.ones(2, 1))
    loss_B.sum().backward()
    assert loss_B.isfinite().all() and values_BX.grad.isfinite().all()
