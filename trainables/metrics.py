"""What is measured: every number that a trial reports, and what may be done with it.

To add a metric, add a line to METRICS. One that is scored of a segmented split, or of the pixels
that the probe hides, names its function there (`of_split`, `of_probe`): nothing else has to know.
One that is measured of each class or size gets a figure in the report.

A metric is named `<phase>/<key>`; its value of one class or size `<phase>/<key>/<class or size>`,
against one trivial filling `<phase>/<key>/<filling>`, of one ratio `<phase>/<key>@<ratio>`. What a
whole trial has of a cost is named `<key>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainables import scores, surfaces
from trainables.scores import Counted

if TYPE_CHECKING:
    from torch import Tensor

Phase = Literal["pretrain", "segment"]
PHASES: tuple[Phase, ...] = ("pretrain", "segment")  # in the order of a trial
Goal = Literal["minimize", "maximize", "none"]
Part = Literal["class", "size", "ratio", "filling"]

GAIN = "pretrain/probe_gain"  # whether pretraining has learnt anything
PSNR, MIOU = "pretrain/probe_psnr", "segment/miou"  # by which arms are compared unless asked
STOPPED_HERE = "stopped_here"  # key of the row that keeps the decision to stop beside the values
SPEED = "images_per_second"  # key of what is shown of a trial that runs
TEST = "test_"  # before the key of a score of the test split, by which nothing may be chosen


class Metric(NamedTuple):
    """One kind of number."""

    phases: tuple[Phase, ...]
    goal: Goal
    unit: str
    title: str  # in figures and tables
    explains: str
    heading: str = ""  # of the figure of its parts, if that is not the title
    parts: Part | None = None  # it is also measured of each of these
    has_whole: bool = True  # it is measured of all of them together, too
    is_drawn: bool = True  # the report has a figure of its classes or sizes
    over_phases: Literal["sum", "max"] | None = None  # what a whole trial has of a cost
    is_objective: bool = True  # arms may be chosen by it
    is_comparable: bool = True  # it means the same for arms that differ in ratio or patch
    is_held_out: bool = False  # scored on the test split
    is_trivial: bool = False  # of a segmenter without an encoder, the same for all arms of a patch
    of_volumes: bool = False  # measured of whole volumes only
    of_background: bool = True  # if it is measured of each class, then of class 0 as well
    of_labels: bool = False  # measured in pretraining, but only where the data are labelled
    # counted over a split -> score of the whole (""), or of each class or size; NaN: there is none
    of_split: Callable[[Counted], float | Mapping[str, float]] | None = None
    # (predicted (B, C, *S), truth, which pixels are hidden (B, *S)) -> (B,); the probe's mean over
    # its ratios is the whole
    of_probe: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


class Name(NamedTuple):
    """A metric's name, taken apart."""

    phase: str  # "" of the whole trial
    key: str  # of METRICS, if there is such a metric
    part: str  # "" of the whole; else "/" or "@" and the class, size, filling or ratio

    @property
    def of(self) -> str:
        """The class, size, filling or ratio."""
        return self.part[1:]


def parse(name: str) -> Name:
    """`segment/iou/platelet` -> segment, iou, /platelet."""
    phase, _, metric = name.partition("/") if "/" in name else ("", "", name)
    key = re.split("[@/]", metric, maxsplit=1)[0]
    return Name(phase, key, metric[len(key) :])


def metric_of(name: str) -> Metric:
    """The entry of METRICS that `<phase>/<key>...` belongs to."""
    return METRICS[parse(name).key]


def known(name: str) -> Metric | None:
    """The same; None if only another version has such a metric."""
    return METRICS.get(parse(name).key)


def title_of(name: str) -> str:
    """`<phase>/<key>...` in words, also where a newer version has measured it."""
    _, key, part = parse(name)
    title = METRICS[key].title if key in METRICS else key.replace("_", " ")
    return title + (f", {part[1:]}" if part.startswith("/") else part)


def on_test(name: str) -> str:
    """The name of the same score on the test split."""
    phase, key, part = parse(name)
    return f"{phase}/{TEST}{key}{part}"


def place_of(phase: str) -> int:
    """Where a phase comes in a trial; one of a newer version comes last."""
    return next((place for place, ours in enumerate(PHASES) if ours == phase), len(PHASES))


def sign(goal: str) -> float:
    """What a value is multiplied with so that more is better."""
    return -1.0 if goal == "minimize" else 1.0


def objective_names() -> list[str]:
    """Names of the metrics by which arms may be chosen, without their parts."""
    return sorted(
        f"{phase}/{key}"
        for key, metric in METRICS.items()
        for phase in metric.phases
        if metric.is_objective and metric.has_whole
    )


def split_scores(counted: Counted) -> dict[str, float]:
    """Every score of a segmented split that exists: key, or key/class, or key/size -> value."""
    found: dict[str, float] = {}
    for key, metric in METRICS.items():
        if metric.of_split is None or metric.is_held_out:
            continue
        values = metric.of_split(counted)
        for part, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            if not math.isnan(value):
                found[f"{key}/{part}" if part else key] = value
    return found


def rows(
    values: Mapping[str, float],
    *,
    phase: Phase,
    step: int,
    epoch: float,
    progress: float,
    seconds: float,
) -> list[dict[str, Any]]:
    """One row per value, with goal and unit; values that do not exist (NaN) are left out."""
    return [
        {
            "phase": phase,
            "step": step,
            "epoch": epoch,
            "progress": progress,
            "metric": name,
            "value": float(value),
            "goal": metric_of(f"{phase}/{name}").goal,
            "unit": metric_of(f"{phase}/{name}").unit,
            "seconds": seconds,
        }
        for name, value in values.items()
        if not math.isnan(value)
    ]


_pretrain = partial(Metric, ("pretrain",))
_segment = partial(Metric, ("segment",))
_both = partial(Metric, PHASES)
_volumes = partial(_segment, parts="class", of_volumes=True, of_background=False)
_trivial = partial(_segment, "maximize", "", is_objective=False, is_trivial=True)
_dense = partial(_pretrain, "maximize", "", of_labels=True)


def _case(name: str) -> Callable[[Counted], Mapping[str, float]]:
    return partial(surfaces.case_score, name=name)


_ON_VAL: dict[str, Metric] = {
    "loss": _both(
        "minimize",
        "",
        "loss",
        "training loss, mean since the rung before; losses differ with ratio, patch and target",
        is_objective=False,
        is_comparable=False,
    ),
    "probe_psnr": _pretrain(
        "maximize",
        "dB",
        "probe PSNR",
        "PSNR of the probe's hidden pixels, alike for all trials",
        parts="ratio",
        of_probe=scores.psnr,
    ),
    "probe_ssim": _pretrain(
        "maximize",
        "",
        "probe SSIM",
        "SSIM around the probe's hidden pixels",
        parts="ratio",
        of_probe=scores.ssim,
    ),
    "probe_gain": _pretrain(
        "maximize",
        "dB",
        "probe gain",
        "probe PSNR above the best trivial filling of hidden pixels (the mean of the visible ones, "
        "the nearest, harmonic inpainting), or above one of them; below 0 nothing is learnt yet",
        parts="filling",
    ),
    "dense_miou": _dense(
        title="dense probe",
        explains="mIoU told by a linear map from the frozen encoder's tokens, cross-validated",
    ),
    "dense_knn_miou": _dense(
        title="dense k-NN probe",
        explains="mIoU told by the patches whose tokens of the frozen encoder are nearest",
    ),
    "dense_miou_random": _dense(
        title="dense probe, random start",
        explains="the dense probe of the same encoder before it has learnt anything",
        is_objective=False,
    ),
    "dense_miou_pixels": _dense(
        title="dense probe, raw pixels",
        explains="the dense probe of the raw pixels of a patch instead of a token",
        is_objective=False,
    ),
    "native_psnr_hidden": _pretrain(
        "maximize",
        "dB",
        "native PSNR, hidden pixels",
        "PSNR of hidden pixels at the trial's own ratio",
        is_comparable=False,
    ),
    "native_psnr_all": _pretrain(
        "maximize",
        "dB",
        "native PSNR, all pixels",
        "PSNR of all pixels at the trial's own ratio",
        is_comparable=False,
    ),
    "ratio": _pretrain(
        "none", "", "ratio", "share of mask units that are hidden", is_objective=False
    ),
    "miou": _segment(
        "maximize",
        "",
        "mIoU",
        "mean IoU of the classes without background",
        of_split=scores.miou,
    ),
    "threshold_miou": _trivial(
        title="mIoU of a threshold",
        explains="mIoU of thresholds on the luminance of each image, without any training",
    ),
    "ridge_pixels_miou": _trivial(
        title="mIoU of raw pixels",
        explains="mIoU of a linear map from the raw pixels of a patch, without an encoder",
    ),
    "miou_with_background": _segment(
        "maximize",
        "",
        "mIoU with background",
        "mean IoU of all classes",
        of_split=scores.miou_with_background,
    ),
    "iou": _segment(
        "maximize",
        "",
        "IoU",
        "intersection over union of one class, pooled over pixels",
        parts="class",
        has_whole=False,
        of_split=scores.iou,
    ),
    "dice": _segment(
        "maximize",
        "",
        "Dice",
        "Dice, mean of the classes without background, or of one class",
        parts="class",
        is_drawn=False,  # of one class it is 2 IoU / (1 + IoU)
        of_split=scores.dice,
    ),
    "object_f1": _segment(
        "maximize",
        "",
        "object F1",
        "F1 of whole images' objects matched at IoU 0.5, over all or by size; objects that the "
        "border of an image cuts off count over all but in no size, as theirs is unknown",
        parts="size",
        of_split=scores.object_f1,
    ),
    "detection": _segment(
        "maximize",
        "",
        "detection",
        "share of true objects of whose pixels at least half are predicted as their class, over "
        "all or by size; all are if everything is, so it stands beside F1 and says nothing alone",
        parts="size",
        of_split=scores.detection,
        is_objective=False,
    ),
    "count_error": _segment(
        "minimize",
        "",
        "count error",
        "error of the number of objects in an image, relative to the true number, of one class or "
        "over all; touching objects that are predicted as one count as one",
        parts="class",
        of_background=False,
        of_split=scores.count_error,
    ),
    "case_dice": _volumes(
        "maximize",
        "",
        "Dice per volume",
        "Dice of a volume, mean over the volumes that truly have or are predicted to have a class; "
        "mean of the classes without background, or of one class",
        of_split=_case("case_dice"),
    ),
    "hd95": _volumes(
        "minimize",
        "mm",
        "HD95",
        "95th percentile of the distances between true and predicted surface, means as of "
        "case_dice; the volume's diagonal where only one of them has the class",
        heading="surface distance",
        of_split=_case("hd95"),
    ),
    "nsd": _volumes(
        "maximize",
        "",
        "surface Dice",
        "share of the true and predicted surface within a tolerance of the other, means as of "
        "case_dice; 0 where only one of them has the class",
        of_split=_case("nsd"),
    ),
    "images_per_second": _both(
        "maximize", "images/s", "throughput", "images per second in training, all workers together"
    ),
    "device_seconds": _both(
        "minimize",
        "s",
        "device time",
        "measured time in training steps, without evaluation; comparable only on one kind of "
        "hardware",
        over_phases="sum",
    ),
    "flops": _both(
        "minimize",
        "FLOP",
        "FLOPs",
        "operations of the training done so far, computed",
        over_phases="sum",
    ),
    "planned_flops": _both(
        "minimize",
        "FLOP",
        "planned FLOPs",
        "a multiply-add counts as two; of the whole planned budget",
        over_phases="sum",
    ),
    "peak_memory": _both(
        "minimize",
        "bytes",
        "peak memory",
        "largest memory held on the device",
        over_phases="max",
    ),
    STOPPED_HERE: _both(
        "none", "", "stopped here", "the stopping rule ended the trial here", is_objective=False
    ),
}


def _on_test(metric: Metric) -> Metric:
    return metric._replace(
        title=f"test {metric.title}",
        explains=f"on the test split: {metric.explains}",
        is_objective=False,
        is_held_out=True,
    )


METRICS: dict[str, Metric] = _ON_VAL | {
    f"{TEST}{key}": _on_test(metric)
    for key, metric in _ON_VAL.items()
    if metric.of_split is not None or metric.is_trivial
}
