"""AMLP: clusters of each image's mask units, of which one may be the lesions, are hidden first.

AMLP (Wang et al., arXiv 2309.04312) states in its abstract that unsupervised clustering finds the
patches that probably hold lesions, that these are selected for masking, and that a category
consistency loss corrects the clustering by reconstruction difficulty. All else here (features,
distances, which cluster is the lesion, how units are drawn) is interpretation; equations not
verified against the paper. Its growing ratio is the schedule `amr`, its losses are in losses.py.

Units that are padding alone are in no cluster; what they are given for features is the mean.

B batch · C channels · *S pixels per axis · U mask units · N pixels of a unit · P patches
F features · K clusters
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from trainables import losses
from trainables.late import Late
from trainables.masking.guided import predicted_difficulty
from trainables.masking.request import (
    MaskRequest,
    errors_under,
    hide_first,
    mean_of_real,
    unit_to_patch,
)
from trainables.masking.strategy import Part, PartCost, Seen, Sizes, Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch, nn = Late("torch"), Late("torch.nn")

Share = Annotated[float, Field(ge=0, le=1)]

NUM_DESCRIPTORS = 3
CATEGORY_WIDTH = 16  # of the hidden layer of the head that tells categories
# Differences between units below this share of the data set's deviation are not magnified: in a
# flat image they would be rounding
DEVIATION_FLOOR = 0.01
# Smallest score of a lesion unit, so that it still comes before units that are none
SCORE_FLOOR = 1e-30


def amlp(
    request: MaskRequest,
    *,
    features: Literal["raw", "encoder"] = "raw",
    clusters: Annotated[int, Field(ge=2)] = 2,
    iterations: Annotated[int, Field(ge=1)] = 10,
    lesion: Literal["highest_contrast", "smallest", "highest_loss"] = "highest_contrast",
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    share: Share = 0.5,
    min_visible: Annotated[int, Field(ge=0)] = 1,
    category_weight: Annotated[float, Field(ge=0)] = 0.0,
    category_reading: Literal["median", "order", "margin"] = "median",
    category_trust: Share = 0.5,
    category_reads: Literal["tokens", "descriptors"] = "tokens",
) -> Tensor:
    """Hide units that may hold lesions (AMLP, Wang et al. 2023): `share` of the hidden count.

    Stated in its abstract: clustering tells lesions from background, lesions are masked. The rest
    is interpretation; equations not verified against the paper: each image's units are clustered at
    every step by `features`, the `lesion` rule names one cluster, units of it are drawn by how much
    nearer they are to it than to others, and the rest of the count is drawn by chance. Of lesions,
    `min_visible` units stay visible, as nobody can fill in what is nowhere to be seen.

    With `category_weight` > 0 the model learns a head by `category_loss` with `category_reading`,
    and the score is the head's opinion for a share `category_trust`. The head reads the encoder's
    tokens through a small decoder of its own, as HPM's does, so that the consistency loss shapes
    the encoder too; or three numbers of a unit's pixels (`descriptors`), of which no gradient
    reaches the encoder.
    """
    assert request.images is not None
    is_padded = request.is_padding_BU is not None
    descriptors_BUF = descriptors(request.images, request.grid, is_padded=is_padded)
    features_BUF = descriptors_BUF if features == "raw" else encoder_features(request)
    assignment_BU, distances_BUK = kmeans(features_BUF, clusters, iterations, request)
    is_member_BUK = assignment_BU[..., None] == torch.arange(clusters, device=assignment_BU.device)

    lesion_B = LESIONS[lesion](request, is_member_BUK, descriptors_BUF)
    scores_BU = lesion_scores(distances_BUK, is_member_BUK, lesion_B, temperature)
    if category_weight > 0:
        assert request.model is not None and request.model.part is not None
        if category_reads == "tokens":
            logits_BP = predicted_difficulty(request.model, request.images)
            logits_BU = mean_of_real(request, logits_BP)
        else:
            logits_BU = category(request.model.part.module, descriptors_BUF)
        opinion_BU = logits_BU.sigmoid()
        scores_BU = scores_BU + category_trust * (opinion_BU - scores_BU)
    return hide_lesions(request, assignment_BU == lesion_B[:, None], scores_BU, share, min_visible)


def category(head: nn.Module, descriptors_BUF: Tensor) -> Tensor:
    """Whether each mask unit is hard to reconstruct, as a logit: (B, U)."""
    logits: Tensor = head(descriptors_BUF)
    return logits[..., 0].float()


def amlp_part(
    make_decoder: Callable[[int], nn.Module],
    *,
    category_weight: float,
    category_reading: Literal["median", "order", "margin"],
    category_reads: Literal["tokens", "descriptors"],
    **_: Any,
) -> Part | None:
    """A head that tells whether a mask unit is hard, from tokens or from a unit's descriptors."""
    if category_weight == 0:
        return None

    def loss(head: nn.Module, seen: Seen) -> Tensor:
        if category_reads == "tokens":
            logits_BX = head(
                seen.tokens, seen.visible_BV, seen.hidden_BX, seen.is_key, with_visible=False
            )[..., 0].float()
        else:
            found_BUF = descriptors(seen.images, seen.unit_grid, is_padded=seen.is_padded)
            logits_BU = category(head, found_BUF)
            logits_BP = unit_to_patch(logits_BU, seen.unit_grid, seen.patches_per_unit)
            logits_BX = logits_BP.gather(1, seen.hidden_BX)
        return losses.category_loss(
            logits_BX, seen.errors_BX, seen.weight_BX, reading=category_reading
        )

    if category_reads == "tokens":
        return Part("categories", make_decoder(1), loss, category_weight, reads_tokens=True)
    head = nn.Sequential(
        nn.Linear(NUM_DESCRIPTORS, CATEGORY_WIDTH), nn.GELU(), nn.Linear(CATEGORY_WIDTH, 1)
    )
    return Part("categories", head, loss, category_weight, reads_tokens=False)


def amlp_part_cost(
    sizes: Sizes,
    visible: int,
    predicted: int,
    *,
    category_weight: float,
    category_reading: str,
    category_reads: str,
    **_: Any,
) -> PartCost | None:
    """The head's forward pass; descriptors ask for no gradient."""
    if category_weight == 0:
        return None
    if category_reads == "tokens":
        forward = sizes.decoder(visible, visible + predicted, predicted)
        return PartCost(forward, compares_pairs=category_reading == "order")
    first = 2 * sizes.units * NUM_DESCRIPTORS * CATEGORY_WIDTH
    forward = first + 2 * sizes.units * CATEGORY_WIDTH
    return PartCost(forward, leaf=first, compares_pairs=category_reading == "order")


def amlp_guide_flops(
    sizes: Sizes,
    hidden_patches: int,
    *,
    features: str,
    lesion: str,
    category_weight: float,
    category_reads: str,
    **_: Any,
) -> int:
    """What the options ask of the model; clustering counts little and is left out."""
    flops = 0
    if features == "encoder":
        flops += sizes.encoder(sizes.patches)
    if lesion == "highest_loss":
        flops += sizes.reconstruction(hidden_patches)
    if category_weight > 0 and category_reads == "tokens":
        flops += sizes.encoder(sizes.patches)
        flops += sizes.decoder(sizes.patches, sizes.patches, sizes.patches)
    elif category_weight > 0:
        flops += 2 * sizes.units * CATEGORY_WIDTH * (NUM_DESCRIPTORS + 1)
    return flops


def descriptors(images: Tensor, unit_grid: Sequence[int], *, is_padded: bool = False) -> Tensor:
    """(B, U, 3): each unit's mean, standard deviation and mean gradient magnitude, over channels.

    Standardised over the units of each image. Interpretation: the abstract names no features. With
    `is_padded` of real voxels only, 0 for units without any.
    """
    images = images.float()
    pixels_BUCN = _by_unit(images, unit_grid)
    if is_padded:
        steepness_BUCN = _by_unit(_gradient_magnitude_of_real(images), unit_grid)
        mean_BUC = pixels_BUCN.nanmean(dim=3)
        spread_BUC = (pixels_BUCN - mean_BUC[..., None]).square().nanmean(dim=3).sqrt()
        described = [mean_BUC, spread_BUC, steepness_BUCN.nanmean(dim=3)]
        is_padding_BU = pixels_BUCN[:, :, 0].isnan().all(dim=2)
    else:
        steepness_BUCN = _by_unit(_gradient_magnitude(images), unit_grid)
        described = [
            pixels_BUCN.mean(dim=3),
            pixels_BUCN.std(dim=3, correction=0),
            steepness_BUCN.mean(dim=3),
        ]
        is_padding_BU = None
    values_BUF = torch.stack([values_BUC.mean(dim=2) for values_BUC in described], dim=2)
    return _standardise(values_BUF, is_padding_BU)


def encoder_features(request: MaskRequest) -> Tensor:
    """(B, U, F): the encoder's tokens of the whole image, the mean over the patches of each unit.

    Standardised over the units of each image. Interpretation: the abstract names no features.
    """
    assert request.model is not None and request.images is not None
    tokens_BPF = request.model.whole(request.images).tokens[:, 1:].float()
    averaged_BFU = mean_of_real(request, tokens_BPF.transpose(1, 2))
    return _standardise(averaged_BFU.transpose(1, 2), request.is_padding_BU)


def kmeans(
    features_BUF: Tensor, clusters: int, iterations: int, request: MaskRequest
) -> tuple[Tensor, Tensor]:
    """(assignment_BU, distances_BUK): k-means of each image's units by itself.

    First centres by k-means++, then `iterations` rounds of Lloyd's algorithm, in which a centre
    that no unit is nearest to stays. Distances are Euclidean.
    Interpretation: the abstract says "unsupervised clustering". Padding is assigned to -1.
    """

    def nearest(distances_BUK: Tensor) -> Tensor:
        assignment_BU = distances_BUK.argmin(dim=2)
        if request.is_padding_BU is not None:
            assignment_BU = assignment_BU.masked_fill(request.is_padding_BU, -1)
        return assignment_BU

    centres_BKF = first_centres(features_BUF, clusters, request)
    for _ in range(iterations):
        assignment_BU = nearest(_distances(features_BUF, centres_BKF))
        centres_BKF = torch.stack(
            [
                _mean_of(features_BUF, assignment_BU == number, centres_BKF[:, number])
                for number in range(clusters)
            ],
            dim=1,
        )
    distances_BUK = _distances(features_BUF, centres_BKF)
    return nearest(distances_BUK), distances_BUK


def first_centres(features_BUF: Tensor, clusters: int, request: MaskRequest) -> Tensor:
    """(B, K, F): units drawn with chances as their squared distances to the nearest drawn before.

    The rule of k-means++ (Arthur & Vassilvitskii 2007); the first is drawn by chance alone.
    """

    def drawn(chances_BU: Tensor) -> Tensor:
        if request.is_padding_BU is not None:
            chances_BU = chances_BU.masked_fill(request.is_padding_BU, -math.inf)
        return _pick(features_BUF, chances_BU.argmax(dim=1))

    centres_BKF = drawn(request.noise("kmeans-0"))
    for number in range(1, clusters):
        nearest_BU = _distances(features_BUF, centres_BKF).amin(dim=2)
        # Where all units are centres already, all logarithms are minus infinity: the first again
        chances_BU = 2 * nearest_BU.log() + gumbel(request.noise(f"kmeans-{number}"))
        centres_BKF = torch.cat([centres_BKF, drawn(chances_BU)], dim=1)
    return centres_BKF


def smallest(request: MaskRequest, is_member_BUK: Tensor, descriptors_BUF: Tensor) -> Tensor:
    """The cluster of each image with the fewest units, but not none: (B,).

    Interpretation: lesions are scarce.
    """
    sizes_BK = is_member_BUK.sum(dim=1)
    return sizes_BK.masked_fill(sizes_BK == 0, request.num_units + 1).argmin(dim=1)


def highest_contrast(
    request: MaskRequest, is_member_BUK: Tensor, descriptors_BUF: Tensor
) -> Tensor:
    """The cluster whose mean intensity is furthest from that of the image's median unit: (B,).

    Interpretation: lesions are brighter or darker than most of the image.
    """
    intensity_BU = descriptors_BUF[..., 0]
    if request.is_padding_BU is None:
        median_B1 = intensity_BU.sort(dim=1).values[:, (request.num_units - 1) // 2, None]
    else:
        sorted_BU = intensity_BU.masked_fill(request.is_padding_BU, math.inf).sort(dim=1).values
        median_B1 = sorted_BU.gather(1, (request.num_real_B1 - 1).clamp(min=0) // 2)
    mean_BK = _mean_per_cluster(intensity_BU, is_member_BUK)
    contrast_BK = (mean_BK - median_B1).abs()
    return contrast_BK.nan_to_num(nan=-1.0).argmax(dim=1)


def highest_loss(request: MaskRequest, is_member_BUK: Tensor, descriptors_BUF: Tensor) -> Tensor:
    """The cluster with the highest mean error of the model under one random mask: (B,).

    Stated in AMLP's abstract: lesions are likely among the patches that are hard to reconstruct.
    Interpretation: that this chooses the cluster. Only hidden units count.
    """
    is_hidden_BU = hide_first(request, request.noise("lesion-probe"))
    errors_BU = errors_under(request, is_hidden_BU, request.hidden, normalised=False)
    mean_BK = _mean_per_cluster(errors_BU, is_member_BUK & is_hidden_BU[..., None])
    return mean_BK.nan_to_num(nan=-1.0).argmax(dim=1)


def lesion_scores(
    distances_BUK: Tensor, is_member_BUK: Tensor, lesion_B: Tensor, temperature: float
) -> Tensor:
    """(B, U) in [0, 1]: how much nearer a unit is to the lesion cluster than to any other.

    Interpretation: sigmoid(-(distance to lesions - distance to the nearest other) / temperature).
    A cluster without units is not a cluster; if there is no other, every unit scores 1.
    """
    clusters = torch.arange(distances_BUK.shape[2], device=lesion_B.device)
    is_lesion_BK = clusters == lesion_B[:, None]
    is_no_other_BK = is_lesion_BK | ~is_member_BUK.any(dim=1)
    to_lesion_BU = distances_BUK.masked_fill(~is_lesion_BK[:, None], math.inf).amin(dim=2)
    to_other_BU = distances_BUK.masked_fill(is_no_other_BK[:, None], math.inf).amin(dim=2)
    return ((to_other_BU - to_lesion_BU) / temperature).sigmoid()


def hide_lesions(
    request: MaskRequest, is_lesion_BU: Tensor, scores_BU: Tensor, share: float, min_visible: int
) -> Tensor:
    """is_hidden_BU: lesion units for `share` of the hidden count, rounded down, others by chance.

    Lesion units are drawn one after the other with chances as their scores, at most so many that
    `min_visible` are left; the next so many are then hidden only when nothing else is left. Chance
    may hide further lesion units. Interpretation throughout.
    """
    drawn_BU = scores_BU.clamp(min=SCORE_FLOOR).log() + gumbel(request.noise("lesion"))
    place_BU = _places(drawn_BU.masked_fill(~is_lesion_BU, -math.inf))
    num_lesions_B1 = is_lesion_BU.sum(dim=1, keepdim=True)
    num_drawn_B1 = (num_lesions_B1 - min_visible).clamp(min=0)
    num_drawn_B1 = num_drawn_B1.clamp(max=request.of_real(int(share * request.hidden)))
    is_drawn_BU = place_BU < num_drawn_B1
    is_kept_BU = is_lesion_BU & ~is_drawn_BU & (place_BU < num_drawn_B1 + min_visible)
    # Noise is in [0, 1): drawn units come before all others, kept ones after
    return hide_first(request, request.noise() - 2.0 * is_drawn_BU + 2.0 * is_kept_BU)


def gumbel(noise: Tensor) -> Tensor:
    """Standard Gumbel numbers: the largest of log(weight) + gumbel is drawn with that weight."""
    return -(-noise.clamp(min=2.0**-25).log()).log()  # uniform numbers have 24 bits, and may be 0


def _by_unit(images: Tensor, unit_grid: Sequence[int]) -> Tensor:
    """(B, C, *S) -> (B, U, C, N), units row-major."""
    batch, channels, *size = images.shape
    axes = len(size)
    cut = [
        edge
        for units, pixels in zip(unit_grid, size, strict=True)
        for edge in (units, pixels // units)
    ]
    order = (0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
    by_unit = images.reshape(batch, channels, *cut).permute(*order)
    return by_unit.reshape(batch, math.prod(unit_grid), channels, -1)


def _gradient_magnitude(images: Tensor) -> Tensor:
    """Of each channel, by differences of neighbours, one-sided at the border; shape as given."""
    axes = [axis for axis in range(2, images.ndim) if images.shape[axis] > 1]
    squares = [torch.gradient(images, dim=axis)[0].square() for axis in axes]
    return sum(squares, torch.zeros_like(images)).sqrt()


def _gradient_magnitude_of_real(images: Tensor) -> Tensor:
    """The same where padding (NaN) begins beyond the border; padding stays what it is."""
    squares = []
    for axis in range(2, images.ndim):
        step = images.diff(dim=axis)
        nothing = torch.full_like(images.narrow(axis, 0, 1), math.nan)
        sides = [torch.cat(pair, dim=axis) for pair in ((step, nothing), (nothing, step))]
        # Central differences are the mean of both sides; of an edge of one voxel there is no side
        squares.append(torch.stack(sides).nanmean(dim=0).nan_to_num(nan=0.0).square())
    return torch.stack(squares).sum(dim=0).sqrt().masked_fill(images.isnan(), math.nan)


def _standardise(values_BUF: Tensor, is_padding_BU: Tensor | None = None) -> Tensor:
    """Over the units of each image that are not padding; 0 for those that are."""
    if is_padding_BU is None:
        deviation_B1F = values_BUF.std(dim=1, correction=0, keepdim=True)
        mean_B1F = values_BUF.mean(dim=1, keepdim=True)
        return (values_BUF - mean_B1F) / deviation_B1F.clamp(min=DEVIATION_FLOOR)
    values_BUF = values_BUF.masked_fill(is_padding_BU[..., None], math.nan)
    values_BUF = values_BUF - values_BUF.nanmean(dim=1, keepdim=True)
    deviation_B1F = values_BUF.square().nanmean(dim=1, keepdim=True).sqrt()
    standard_BUF = values_BUF / deviation_B1F.clamp(min=DEVIATION_FLOOR)
    return standard_BUF.masked_fill(is_padding_BU[..., None], 0.0)


def _distances(features_BUF: Tensor, centres_BKF: Tensor) -> Tensor:
    """Euclidean, (B, U, K); not by products, which lose small ones and run in lower precision."""
    return torch.cdist(features_BUF, centres_BKF, compute_mode="donot_use_mm_for_euclid_dist")


def _pick(features_BUF: Tensor, number_B: Tensor) -> Tensor:
    """The features of one unit of each image, (B, 1, F)."""
    return features_BUF.take_along_dim(number_B[:, None, None], dim=1)


def _mean_of(features_BUF: Tensor, is_in_BU: Tensor, otherwise_BF: Tensor) -> Tensor:
    """The mean over units that are in, (B, F); `otherwise` where none is."""
    # A masked sum, as adding by index is in no fixed order on GPUs
    total_BF = features_BUF.masked_fill(~is_in_BU[..., None], 0.0).sum(dim=1)
    count_B1 = is_in_BU.sum(dim=1, keepdim=True)
    return torch.where(count_B1 > 0, total_BF / count_B1, otherwise_BF)


def _mean_per_cluster(values_BU: Tensor, is_member_BUK: Tensor) -> Tensor:
    """(B, K); not a number for a cluster without units."""
    total_BK = values_BU[..., None].masked_fill(~is_member_BUK, 0.0).sum(dim=1)
    return total_BK / is_member_BUK.sum(dim=1)


def _places(values_BU: Tensor) -> Tensor:
    """The place of each value in its row, 0 for the largest."""
    return values_BU.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


LESIONS: dict[str, Callable[..., Tensor]] = {
    "smallest": smallest,
    "highest_contrast": highest_contrast,
    "highest_loss": highest_loss,
}

STRATEGIES = {
    "amlp": Strategy(amlp, guide_flops=amlp_guide_flops, part=amlp_part, part_cost=amlp_part_cost)
}
