"""What was measured, and why some numbers are not compared."""

from __future__ import annotations

from analysis.statistics import FEWEST_POOLED, FEWEST_SEEDS, POOL_MARGIN
from analysis.tables import StudyTables, parts_of
from analysis.theme import plain
from trainables.metrics import PSNR, known


def methods(tables: StudyTables) -> list[str]:
    """What was measured, and why some numbers are not compared."""
    probe = tables.spec.get("probe")
    ratios = probe.get("ratios") if isinstance(probe, dict) else None
    named = parts_of(tables, PSNR) or ratios or []
    shares = " and ".join(plain(ratio, 8) for ratio in named) or "several"
    metrics = [metric for name in tables.measured if (metric := known(name))]
    has_volumes = any(metric.of_volumes for metric in metrics)
    native = "is not ranked"
    if not all(measure.is_comparable for measure in tables.objectives):
        native = "cannot compare arms that differ in ratio or patch"
    of_volumes = [
        "Whole volumes. Dice per volume, HD95 and surface Dice are taken for each class in each "
        "volume and averaged over volumes, then over classes without background. HD95 is the 95th "
        "percentile of the distances between the true and the predicted surface, the worse of both "
        "directions; lower is better. Surface Dice is the share of both surfaces within a "
        "tolerance of the other. A class that a volume has neither truly nor by prediction is left "
        "out there; one that only one of them has scores Dice 0, surface Dice 0, and as HD95 the "
        "length of the volume's diagonal."
    ]
    of_dense = [
        "Dense probe. From the frozen encoder's tokens, all patches visible, the class of every "
        "pixel is told by ridge regression, on labelled training images that are split into folds "
        "by group; mIoU counts what each fold is told by the others. The same of the encoder at "
        "its random start and of the raw pixels of a patch says what of it pretraining has "
        "brought. k-NN: the classes of the nearest patches, by the cosine of their tokens."
    ]
    of_trivial = [
        "Without an encoder. Thresholds on the luminance of each image (Otsu), whose classes are "
        "given by the training images, and ridge regression on the raw pixels of a patch are "
        "judged as the arms are. Where they are level with the arms, the data cannot tell one "
        "encoder from another."
    ]
    of_gain = [
        "Probe gain. Without learning, hidden pixels can be filled in with the mean of the visible "
        "ones, with the nearest visible one, or by harmonic inpainting (each pixel the mean of its "
        "neighbours). Which of these has the highest mean PSNR is found for each "
        "hidden share on the probe; the gain is an encoder's PSNR above it, averaged over the "
        "shares. Below 0 dB pretraining has learnt less than such a filling uses."
    ]
    return [
        f"Probe PSNR. Each trial reconstructs the same validation images with the same regions "
        f"hidden. The regions are fixed in pixels and do not depend on the trial's own ratio, "
        f"patch size or schedule. The hidden shares are {shares}; the mean over them is reported. "
        f"Only hidden pixels count, intensities run from 0 to 1, and PSNR is taken per image and "
        f"then averaged. Higher is better.",
        *(of_gain if tables.gains else []),
        f"Native PSNR uses each trial's own ratio and patch, as papers plot it. It is in the CSV "
        f"and {native}: a smaller ratio makes the task easier, and pasting the visible "
        f"patches into the picture adds −10·log10(ratio) dB, so that going from 0.75 to 0.25 "
        f"gains 4.77 dB with no better model.",
        "Training losses are not compared. The loss is averaged over a trial's own hidden pixels, "
        "so it changes with ratio, patch size and target even for the same model.",
        *(of_dense if any(metric.of_labels for metric in metrics) else []),
        "Segmentation. The pretrained encoder is fine-tuned with a U-Net Transformer. mIoU is the "
        "mean over classes without background. Objects of whole images are matched at an IoU of "
        "0.5, and their F1 is split by size; those that the border of an image cuts off are in no "
        "size. The controls are the study file's own trial (control), the same network from "
        "random weights (random-init), and with the encoder fixed (frozen).",
        *(of_trivial if any(metric.is_trivial for metric in metrics) else []),
        *(of_volumes if has_volumes else []),
        "Intervals are 95 % Student t intervals over seeds; differences are paired by seed where "
        f"two or more seeds are common, else Welch's. Where {FEWEST_POOLED} or more arms share "
        "their seeds with the control, what a seed does to all of them alike is taken out, and an "
        f"arm's variance is {POOL_MARGIN:g} times the mean of all arms', or its own where that is "
        "larger. p values are Holm-adjusted over all arms that are tested against the control. A "
        f"difference is called shown with {FEWEST_SEEDS} or more seeds, an interval that leaves "
        "out zero, and an adjusted p below 0.05. Once an arm has fresh seeds, the trials that made "
        "it stand out no longer count for it, and arms that have none are not tested.",
        "Stopped trials are compared with others at their rung only. They have no final score, "
        "are never ranked, and are never on a Pareto front. Planned FLOPs are those of the whole "
        "budget.",
    ]
