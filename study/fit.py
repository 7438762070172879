"""Whether a study fits its data: what the study file alone cannot tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from study.checks import geometry_problems
from trainables.labelled import classes_missing
from trainables.metrics import MIOU, PSNR, metric_of, parse

if TYPE_CHECKING:
    from study.spec import StudySpec
    from trainables.data import Dataset
    from trainables.data.source import Split

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


def _label_problems(spec: StudySpec, data: DataSize) -> list[str]:
    """Of counts of labelled groups that are larger than all there are."""
    return [
        f"{setting}: given {value}, but the train split has {data.train_groups} labelled groups; "
        f"expected at most as many, or null for all of them"
        for setting, value in _label_counts(spec)
        if data.classes and isinstance(value, int) and value > data.train_groups
    ]


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
    if isinstance(metric := spec.stopping.options().get("metric"), str):
        named.append(("stopping", metric))
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
