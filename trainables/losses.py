"""How the errors of an image's hidden patches become its loss, and the losses of side tasks.

To add a loss, write a function (errors_BX, truth_BXQ, weight_BX, *, options) -> loss_B and add it
to LOSSES. `errors_BX` are mean squared errors that carry a graph, `truth_BXQ` is what was to be
predicted. A patch counts as much as `weight_BX` says, its share of real voxels; None: all the same.
Each image is judged by itself, in float32; smaller errors cost less, and none at all cost nothing.

B batch · X hidden patches of an image · N next patches · Q values of one patch
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainables.late import Late

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:
    torch = Late("torch")
    functional = Late("torch.nn.functional")

Positive = Annotated[float, Field(gt=0)]

# As in HPM's formula: it bounds the loss of a pair at 13.8
RANKING_EPSILON = 1e-6
# Of a variance of errors, so that equal ones are all 0 when standardised
VARIANCE_FLOOR = 1e-6
# Instead of dividing by a weight of 0
_TINY = 2.0**-126  # the smallest normal float32


def mean(errors_BX: Tensor, truth_BXQ: Tensor, weight_BX: Tensor | None = None) -> Tensor:
    """Every hidden patch counts the same (MAE, He et al. 2022)."""
    return _mean(errors_BX.float(), weight_BX)


def arl(
    errors_BX: Tensor,
    truth_BXQ: Tensor,
    weight_BX: Tensor | None = None,
    *,
    gamma: Annotated[float, Field(ge=0)] = 1.0,
    low: Annotated[float, Field(gt=0, le=1)] = 0.1,
    high: Annotated[float, Field(ge=1)] = 10.0,
    temperature: Positive | None = None,
) -> Tensor:
    """Patches that are hard for the model count more: AMLP's attention reconstruction loss (v1).

    Stated in its abstract: the loss focuses on patches that are hard to reconstruct. All else is
    interpretation; equations not verified against the paper. Weights are (error / mean error of the
    image) ** `gamma`, or, with a `temperature`, a softmax of error / temperature scaled to a mean
    of 1; then bounded by `low` and `high`, and constants for the gradient. Gamma 0 is `mean`.
    """
    errors_BX = errors_BX.float()
    fixed_BX = errors_BX.detach()
    if temperature is None:
        mean_B1 = _mean(fixed_BX, weight_BX)[:, None]
        focus_BX = (fixed_BX / mean_B1.clamp(min=_TINY)) ** gamma
    elif weight_BX is None:
        focus_BX = (fixed_BX / temperature).softmax(dim=1) * fixed_BX.shape[1]
    else:
        power_BX = fixed_BX / temperature
        total_B1 = (power_BX + _log(weight_BX)).logsumexp(dim=1, keepdim=True)
        focus_BX = (power_BX - total_B1 + _log(weight_BX.sum(dim=1, keepdim=True))).exp()
    focus_BX = focus_BX.clamp(low, high)
    if weight_BX is not None:
        focus_BX = focus_BX * weight_BX
    return (focus_BX * errors_BX).sum(dim=1) / focus_BX.sum(dim=1).clamp(min=_TINY)


def rrl(
    errors_BX: Tensor,
    truth_BXQ: Tensor,
    weight_BX: Tensor | None = None,
    *,
    epsilon: Positive = 0.1,
    relative_to: Literal["image", "patch"] = "image",
) -> Tensor:
    """Errors relative to what there is to reconstruct: AMLP's relative reconstruction loss (v2).

    Stated in its abstract: the name, and the focus on patches that are hard to reconstruct and
    probably hold lesions. All else is interpretation; equations not verified against the paper.
    image: each error counts as its share of the image's errors, so that hard patches lead, in units
    of the mean square of the image's hidden patches + `epsilon`, so that pale images count as much
    as bright ones: sum(e^2) / sum(e) / (power + epsilon).
    patch: each error is divided by the patch's own mean square + `epsilon`. This turns away from
    bright lesions: of nuclei, patches that were 58 % of a mean predictor's loss become 11 %.
    Powers are in units of the data set's variance. On targets normalised per patch both have little
    to do.
    """
    errors_BX = errors_BX.float()
    power_BX = truth_BXQ.detach().float().square().mean(dim=2)
    if weight_BX is not None:  # padding is 0 in the truth
        power_BX = power_BX / weight_BX.clamp(min=_TINY)
    if relative_to == "patch":
        return _mean(errors_BX / (power_BX + epsilon), weight_BX)
    share_BX = errors_BX.detach() / _mean(errors_BX.detach(), weight_BX)[:, None].clamp(min=_TINY)
    return _mean(share_BX * errors_BX, weight_BX) / (_mean(power_BX, weight_BX) + epsilon)


def ranking_loss(
    predicted_BX: Tensor, errors_BX: Tensor, weight_BX: Tensor | None = None
) -> Tensor:
    """Whether predictions are in the order of the errors (Hard Patches Mining, Wang et al. 2023).

    The mean over ordered pairs of an image with t_i != t_j of
    -[t_i > t_j] log(s(p_i - p_j) + 1e-6) - [t_i < t_j] log(1 - s(p_i - p_j) + 1e-6), s the sigmoid.
    A pair has the same term in both orders, as 1 - s(x) = s(-x), so each is computed once. The
    authors' code takes the mean over the batch's pairs; here each image's own counts (ours), and a
    pair counts as the product of its patches' weights.
    """
    predicted_BX, errors_BX = predicted_BX.float(), errors_BX.detach().float()
    count = predicted_BX.shape[1]
    difference_BXN = predicted_BX[..., None] - _next_half(predicted_BX)
    order_BXN = (errors_BX[..., None] - _next_half(errors_BX)).sign()
    if count % 2 == 0:  # patches that face each other on the circle meet twice
        order_BXN[:, count // 2 :, -1] = 0
    loss_BXN = -((order_BXN * difference_BXN).sigmoid() + RANKING_EPSILON).log()
    is_pair_BXN = order_BXN != 0
    if weight_BX is None:
        num_pairs_B = is_pair_BXN.sum(dim=(1, 2))
        return (loss_BXN * is_pair_BXN).sum(dim=(1, 2)) / num_pairs_B.clamp(min=1)
    weight_BXN = is_pair_BXN * weight_BX[..., None] * _next_half(weight_BX)
    return (loss_BXN * weight_BXN).sum(dim=(1, 2)) / weight_BXN.sum(dim=(1, 2)).clamp(min=_TINY)


def absolute_loss(
    predicted_BX: Tensor, errors_BX: Tensor, weight_BX: Tensor | None = None
) -> Tensor:
    """Squared distance to the errors standardised over the image (HPM's absolute variant)."""
    errors_BX = errors_BX.detach().float()
    standardised_BX = errors_BX - _mean(errors_BX, weight_BX)[:, None]
    if weight_BX is None:
        variance_B1 = errors_BX.var(dim=1, correction=0, keepdim=True)
    else:
        variance_B1 = _mean(standardised_BX.square(), weight_BX)[:, None]
    standardised_BX = standardised_BX / (variance_B1 + VARIANCE_FLOOR).sqrt()
    return _mean((predicted_BX.float() - standardised_BX).square(), weight_BX)


def category_loss(
    logits_BX: Tensor,
    errors_BX: Tensor,
    weight_BX: Tensor | None = None,
    *,
    reading: Literal["median", "order", "margin"],
) -> Tensor:
    """Whether a head tells lesion from background as errors do: AMLP's category consistency loss.

    Stated in its abstract: it refines the categories of patches by their reconstruction difficulty,
    and strengthens the distinction of lesion and background. The readings are interpretation;
    equations not verified against the paper. Errors are constants for the gradient throughout.

    median: cross-entropy to "harder than the image's median hidden patch".
    order:  the pairwise `ranking_loss`.
    margin: the mean error of lesions, each patch counted by its probability, is to exceed that of
            the background by the image's mean error.
    """
    logits_BX, errors_BX = logits_BX.float(), errors_BX.detach().float()
    if reading == "order":
        return ranking_loss(logits_BX, errors_BX, weight_BX)
    if reading == "median":
        is_hard_BX = (errors_BX > _median(errors_BX, weight_BX)).float()
        entropy_BX = functional.binary_cross_entropy_with_logits(
            logits_BX, is_hard_BX, reduction="none"
        )
        return _mean(entropy_BX, weight_BX)
    # A softmax of log-probabilities is a share of the probability, and cannot be 0 / 0
    lesion_BX, background_BX = functional.logsigmoid(logits_BX), functional.logsigmoid(-logits_BX)
    if weight_BX is not None:
        lesion_BX, background_BX = lesion_BX + _log(weight_BX), background_BX + _log(weight_BX)
    lesion_B = (lesion_BX.softmax(dim=1) * errors_BX).sum(dim=1)
    background_B = (background_BX.softmax(dim=1) * errors_BX).sum(dim=1)
    return (_mean(errors_BX, weight_BX) + background_B - lesion_B).relu()


def _mean(values_BX: Tensor, weight_BX: Tensor | None) -> Tensor:
    """Over the patches of each image (B,); 0 where no patch has any weight."""
    if weight_BX is None:
        return values_BX.mean(dim=1)
    return (values_BX * weight_BX).sum(dim=1) / weight_BX.sum(dim=1).clamp(min=_TINY)


def _median(values_BX: Tensor, weight_BX: Tensor | None) -> Tensor:
    """Of each image (B, 1): the first value up to which there is half of the weight."""
    values_BX, order_BX = values_BX.sort(dim=1)
    if weight_BX is None:
        middle = (values_BX.shape[1] - 1) // 2
        return values_BX[:, middle : middle + 1]
    # in float64 these sums are exact, so that halves are halves
    up_to_BX = weight_BX.gather(1, order_BX).double().cumsum(dim=1)
    is_before_BX = up_to_BX < up_to_BX[:, -1:] / 2
    return values_BX.gather(1, is_before_BX.sum(dim=1, keepdim=True))


def _log(weight_BX: Tensor) -> Tensor:
    """Of weights, of which some are 0: the lowest number, which a softmax knows how to handle."""
    return weight_BX.log().clamp(min=torch.finfo(torch.float32).min)


def _next_half(values_BX: Tensor) -> Tensor:
    """For each patch the X // 2 patches after it on a circle, a view of (B, X, X // 2).

    So every pair of patches is met once; with an even X, those that face each other twice.
    """
    num_next = values_BX.shape[1] // 2
    circle = torch.cat([values_BX, values_BX[:, :num_next]], dim=1)
    return circle.unfold(1, num_next + 1, 1)[..., 1:]


LOSSES: dict[str, Callable[..., Tensor]] = {"mean": mean, "arl": arl, "rrl": rrl}
DIFFICULTY = {"ranking": ranking_loss, "absolute": absolute_loss}
