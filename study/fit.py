"""Whether a study fits its data: what the study file alone cannot tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from operator import mul
from typing import TYPE_CHECKING, Any

import numpy as np

from study.checks import MOST_COMBINATIONS, geometry_problems, source_of, variants_of
from study.mistakes import Problems
from study.reader import in_one_line, read_document
from trainables.config import unit_of_length
from trainables.cost import pretrain_flops, segment_flops, segment_steps
from trainables.data.labels import axes_without_side, two_sides
from trainables.edges import even, in_words, simplest
from trainables.labelled import classes_missing
from trainables.metrics import MIOU, PHASES, PSNR, metric_of, parse

if TYPE_CHECKING:
    from study.spec import StudySpec
    from trainables.data import Dataset
    from trainables.data.source import Split

FEW_OBJECTS = 5  # in validation, of which each one decides too much
FEW_SIGHTS = 100  # of a class in all of segmentation, after which little is learnt of it
RARE = 1e-3  # share of the pixels
MOST_STEPS = 1e7  # that operations may buy; more are a slip of the exponent
UNEVEN = 2.5  # longest to shortest edge of a patch in mm
JUDGED: tuple[Split, ...] = ("train", "val")  # splits whose labels decide


@dataclass(frozen=True)
class DataSize:
    """What checks and plans need to know of the data."""

    size: tuple[int, ...]
    channels: int
    pretrain_images: int
    train_images: int
    train_groups: int
    classes: tuple[str, ...]  # empty without labels
    shown: Mapping[Split, frozenset[str]]  # the classes, but for the background, of labelled images


def data_size(dataset: Dataset) -> DataSize:
    """The numbers of a prepared data set."""
    train = dataset.rows("train")
    return DataSize(
        size=tuple(dataset.size),
        channels=dataset.channels,
        pretrain_images=len(dataset.rows("pretrain")),
        train_images=len(train),
        train_groups=len({dataset.groups[row] for row in train}),
        classes=tuple(dataset.classes) if dataset.is_labelled else (),
        shown={split: _shown(dataset, split) for split in JUDGED} if dataset.is_labelled else {},
    )


def _shown(dataset: Dataset, split: Split) -> frozenset[str]:
    places = dataset.classes_shown(dataset.rows(split))
    return frozenset(dataset.classes[place] for place in places)


def data_problems(spec: StudySpec, data: DataSize) -> list[str]:
    """Why the study cannot run on these data, which the study file alone could not tell."""
    problems = [*geometry_problems(spec, data.size), *_probe_problems(spec, data)]
    problems += _label_problems(spec, data)
    problems += _flip_problems(spec, data)
    problems += _length_problems(spec, data) if not problems else []
    for objective in spec.objectives:
        name, metric = parse(objective.metric), metric_of(objective.metric)
        if name.phase == "segment" and not data.classes:
            problems.append(
                f"objectives: given {objective.metric!r}, but the data have no labels; expected a "
                f"pretrain metric such as {PSNR}, or data with masks"
            )
            continue
        if metric.of_volumes and len(data.size) == 2:
            problems.append(
                f"objectives: given {objective.metric!r}, which is measured of volumes, but the "
                f"images have 2 axes; expected another metric such as {MIOU}"
            )
        scored = data.classes if metric.of_background else data.classes[1:]
        if metric.parts == "class" and name.of and name.of not in scored:
            problems.append(
                f"objectives: given {objective.metric!r}; expected a class of the data: "
                f"{', '.join(scored)}"
            )
        elif name.phase == "segment" and not data.shown["train"]:
            problems.append(
                f"objectives: given {objective.metric!r}, but no training mask shows anything but "
                f"{data.classes[0]}; expected masks with objects"
            )
        elif name.phase == "segment" and not data.shown["val"]:
            problems.append(
                f"objectives: given {objective.metric!r}, but no validation mask shows anything "
                f"but {data.classes[0]}; expected masks with objects in val, by a column split or "
                f"another data.split.seed"
            )
        elif metric.parts == "class" and name.of in set(data.classes[1:]) - data.shown["val"]:
            problems.append(
                f"objectives: given {objective.metric!r}, but no validation mask shows {name.of}; "
                f"expected images with it in val, by a column split or another data.split.seed, or "
                f"a class that is there: {', '.join(sorted(data.shown['val']))}"
            )
    return problems


def classes_without_labels(spec: StudySpec, dataset: Dataset) -> list[str]:
    """Of few labels, which seeds draw none of some class: one line for each count."""
    lines = []
    for setting, value in _label_counts(spec):
        settings = spec.trial.segment.model_copy(update={"labels": value})
        seeds_of: dict[str, list[str]] = {}
        for seed in range(spec.seed, spec.seed + spec.seeds):
            for name in classes_missing(settings, dataset, seed):
                seeds_of.setdefault(name, []).append(str(seed))
        if seeds_of:
            what = "; ".join(f"{name} (seed {', '.join(of)})" for name, of in seeds_of.items())
            lines.append(
                f"{setting}: with {value} there is no label of {what}; take more labels, or judge "
                f"by other classes"
            )
    return lines


def weaknesses(spec: StudySpec, dataset: Dataset) -> list[str]:
    """What these data cannot show in this study, though it can run: each with what to do."""
    if not dataset.is_labelled:
        return _uneven_patches(spec, dataset)
    lines = classes_without_labels(spec, dataset) + _uneven_patches(spec, dataset)
    objects: dict[str, dict[str, Any]] = dataset.about["objects"]
    patches = arms_patches(spec, len(dataset.size))
    spacing = _spacing(dataset)
    unit = "px" if spacing is None else "mm"
    smallest = min(patches, key=math.prod)
    edge = math.prod(map(mul, smallest, spacing or [1.0] * len(smallest))) ** (1 / len(smallest))
    in_mm = " x ".join(
        f"{edge * step:.3g}" for edge, step in zip(smallest, spacing or smallest, strict=True)
    )
    of_patch = f" ({in_mm} mm)" if spacing is not None else ""
    train = dataset.rows("train")
    sizes = (dataset.size, dataset.channels, len(dataset.classes))
    seen = segment_steps(spec.trial, *sizes, len(train)) * spec.trial.segment.batch
    for place, name in enumerate(dataset.classes[1:], start=1):
        about, share = objects.get(name), dataset.about["pixel_share"].get(name, 0.0)
        if about is None or not about["train"]:
            continue
        diameter = about["median_diameter"]
        if diameter and diameter < edge:
            lines.append(
                f"{name}: objects of {diameter:g} {unit} (median) are smaller than the smallest "
                f"patch, {in_words(simplest(smallest))}{of_patch}; search smaller ones in "
                f"model.patch"
            )
        if 0 < about["val"] < FEW_OBJECTS:
            lines.append(
                f"{name}: validation shows {about['val']} of it, which decide its scores; give "
                f"more images to val"
            )
        shown = len(dataset.rows_showing(place, train)) / len(train)
        if dataset.volumes is None and seen * shown < FEW_SIGHTS:
            lines.append(
                f"{name}: {shown:.1%} of the training tiles show it, so that segmentation sees it "
                f"{seen * shown:.0f} times; raise segment.{unit_of_length(spec.trial.segment)}"
            )
        if share < RARE:
            lines.append(
                f"{name}: {share:.3%} of the pixels; whoever finds none of it is right on all "
                f"others, and short training ends there: look at its IoU before all is run"
            )
    return lines


def arms_patches(spec: StudySpec, axes: int) -> list[tuple[int, ...]]:
    """The edges of every patch that an arm may have."""
    variants = variants_of(spec.trial, spec.search, ("model.patch",))
    return list(dict.fromkeys(config.patch_edges(axes) for config, _ in variants))


def _spacing(dataset: Dataset) -> list[float] | None:
    """mm between voxels as most volumes have it; None of pictures."""
    if dataset.volumes is None:
        return None
    median: list[float] = np.median(dataset.volumes.spacings, axis=0).tolist()
    return median


def _uneven_patches(spec: StudySpec, dataset: Dataset) -> list[str]:
    """Patches that are much longer in mm along one axis than along another."""
    spacing = _spacing(dataset)
    if spacing is None:
        return []
    lines = []
    for patch in arms_patches(spec, len(dataset.size)):
        edges = list(map(mul, patch, spacing))
        better = even(max(patch), spacing)
        if max(edges) / min(edges) > UNEVEN and better != list(patch):
            lines.append(
                f"model.patch: {in_words(simplest(patch))} is "
                f"{' x '.join(f'{edge:.3g}' for edge in edges)} mm, as voxels are "
                f"{' x '.join(f'{step:.3g}' for step in spacing)} mm; {better} would be about as "
                f"long along every axis, or resample by data.spacing"
            )
    return lines


def _label_problems(spec: StudySpec, data: DataSize) -> list[str]:
    """Of counts of labelled groups that are larger than all there are."""
    return [
        f"{setting}: given {value}, but the train split has {data.train_groups} labelled groups; "
        f"expected at most as many, or null for all of them"
        for setting, value in _label_counts(spec)
        if data.classes and isinstance(value, int) and value > data.train_groups
    ]


def _flip_problems(spec: StudySpec, data: DataSize) -> list[str]:
    """Of axes that are turned around: they must be there, and no class may change its side."""
    problems = []
    axes, allowed = len(data.size), axes_without_side(len(data.size))
    for phase in PHASES:
        augment = getattr(spec.trial, phase).augment
        flipped = augment.options().get("flip_axes", ())
        if flipped is not None and max(flipped, default=0) >= axes:
            problems.append(
                f"trial.{phase}.augment.flip_axes: given {list(flipped)}; expected axes of the "
                f"images, 0 to {axes - 1}"
            )
        elif phase == "segment" and (flipped is None or not set(flipped) <= set(allowed)):
            pair = two_sides(data.classes)
            given = {**augment.model_dump(mode="json", by_alias=True), "flip_axes": allowed}
            if pair:
                problems.append(
                    f"trial.segment.augment: turns images around from left to right, but "
                    f"{pair[0]!r} and {pair[1]!r} are classes, of which one would be called the "
                    f"other; expected `augment: {in_one_line(given)}`"
                )
    return problems


def _length_problems(spec: StudySpec, data: DataSize) -> list[str]:
    """Of operations that buy less than a step."""
    problems = Problems(spec.where, read_document(spec.text))
    for config, _ in islice(
        variants_of(spec.trial, spec.search, [*spec.search]), MOST_COMBINATIONS
    ):
        trained = {"pretrain": config.pretrain.flops, "segment": config.segment.flops}
        for phase, flops in trained.items():
            if flops is None or (phase == "segment" and not data.classes):
                continue
            if phase == "pretrain":
                one = pretrain_flops(config, data.size, data.channels, 1)
            else:
                about = (data.size, data.channels, len(data.classes))
                one = segment_flops(config, *about, 1)[-1]
            if flops > MOST_STEPS * one:
                problems.add(
                    source_of(spec.search, phase, "flops"),
                    f"given {flops:g}, which is {flops / one:.3g} steps of patch "
                    f"{in_words(config.model.patch)}; expected at most {MOST_STEPS:g} of them",
                )
            if flops < one:
                problems.add(
                    source_of(spec.search, phase, "flops"),
                    f"given {flops:g}, but a step of patch {in_words(config.model.patch)} takes "
                    f"{one:.3g} operations; expected as many at least, or a smaller {phase}.batch",
                )
    return problems.lines()


def _label_counts(spec: StudySpec) -> list[tuple[str, int | float | None]]:
    """(setting, `segment.labels`) of the control and of what is searched."""
    given = [("trial.segment.labels", spec.trial.segment.labels)]
    item = spec.search.get("segment.labels")
    if item is not None:
        choices = item.choices if item.choices is not None else [item.high]
        values = choices.values() if isinstance(choices, dict) else choices
        given += [("search.segment.labels", value) for value in values]
    return given


def _probe_problems(spec: StudySpec, data: DataSize) -> list[str]:
    """Of what is measured in pretraining by labels."""
    named = [("objectives", objective.metric) for objective in spec.objectives]
    for setting, chosen in (("stopping", spec.stopping), ("sampler", spec.sampler)):
        if isinstance(metric := chosen.options().get("metric"), str):
            named.append((setting, metric))
    given = [f"{setting}: given {name!r}" for setting, name in named if metric_of(name).of_labels]
    if not data.classes:
        way_out = f"expected another metric such as {PSNR}, or data with masks"
        return [f"{one}, but the data have no labels; {way_out}" for one in given]
    if data.train_groups < 2:
        way_out = f"expected another metric such as {PSNR}, or two groups or more"
        return [
            f"{one}, which is cross-validated over the groups of the train split, of which there "
            f"is {data.train_groups}; {way_out}"
            for one in given
        ]
    return []
