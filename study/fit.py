"""Whether a study fits its data: what the study file alone cannot tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from study.checks import geometry_problems
from trainables.metrics import MIOU, PSNR, metric_of, parse

if TYPE_CHECKING:
    from study.spec import StudySpec
    from trainables.data import Dataset


@dataclass(frozen=True)
class DataSize:
    """What checks and plans need to know of the data."""

    size: tuple[int, ...]
    channels: int
    pretrain_images: int
    train_images: int
    classes: tuple[str, ...]  # empty without labels


def data_size(dataset: Dataset) -> DataSize:
    """The numbers of a prepared data set."""
    return DataSize(
        size=tuple(dataset.size),
        channels=dataset.channels,
        pretrain_images=len(dataset.rows("pretrain")),
        train_images=len(dataset.rows("train")),
        classes=tuple(dataset.classes) if dataset.is_labelled else (),
    )


def data_problems(spec: StudySpec, data: DataSize) -> list[str]:
    """Why the study cannot run on these data, which the study file alone could not tell."""
    problems = geometry_problems(spec, data.size)
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
    return problems
