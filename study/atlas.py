"""What every masking that a study can try hides of the study's own images, before it is run.

00/masks-000.png ... 00/masks-100.png    of the first section, at 0 to 100 % of pretraining
00/masks.json                            their numbers
atlas.json                               the sections in order, and what was left out
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from study import space
from study.rehearsal import planned_steps, rehearse
from trainables.atlas import draw_masks, masks_name
from trainables.config import TrialConfig, geometry_misfits
from trainables.data import Dataset
from trainables.data.batches import to_device
from trainables.errors import UserError
from trainables.masking import MASKING
from trainables.pretrain import num_pretrain
from trainables.probe import probe_rows
from trainables.settings import canonical_json, short

if TYPE_CHECKING:
    from study.spec import StudySpec

PROGRESS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_SECTIONS = 24
MOST_WALKED = 2_000  # combinations that are looked at


class Section(NamedTuple):
    """One masking, and where in the study it comes from."""

    why: str
    config: TrialConfig


class Subjects(NamedTuple):
    """The images that are shown."""

    images: Tensor
    labels: Tensor | None
    rows_B: Tensor


def draw_atlas(
    spec: StudySpec,
    dataset: Dataset,
    folder: Path,
    *,
    images: int,
    steps: int,
    every: bool,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Draw every section into `folder`; strategies that ask a model get one of `steps` steps."""
    num_pretrain(dataset)
    found, left_out = sections(spec, dataset.size, every=every)
    rows = probe_rows(dataset.rows("val"), images)
    shown, labels = to_device(dataset, rows, device).batch(torch.arange(len(rows)))
    subjects = Subjects(shown, labels, torch.as_tensor(rows, device=device))
    lines = []
    for number, section in enumerate(found):
        say(f"{number + 1} of {len(found)}: {section.config.masking.strategy.name}, {section.why}")
        name = f"{number:02d}"
        trained, problem = 0, None
        try:
            trained = _draw(section.config, spec.seed, dataset, subjects, folder / name, steps)
        except UserError as error:
            problem = str(error)
        masking = section.config.masking.model_dump(mode="json", by_alias=True)
        lines.append(
            {
                "folder": name,
                "why": section.why,
                "patch": section.config.model.patch,
                "masking": masking | {"unit": section.config.unit},
                "trained": trained,
                "planned": planned_steps(section.config, dataset),
                "problem": problem,
            }
        )
    about = {
        "study": spec.study,
        "question": spec.question,
        "data": {"name": dataset.name, "size": list(dataset.size)},
        "images": [dataset.names[row] for row in rows],
        "classes": dataset.classes if labels is not None else [],
        "left_out": left_out,
        "sections": lines,
    }
    (folder / "atlas.json").write_text(json.dumps(about, indent=1))


def sections(
    spec: StudySpec, size: tuple[int, ...], *, every: bool
) -> tuple[list[Section], list[str]]:
    """Each masking once, the control's first; and what was left out, with why."""
    found: dict[str, Section] = {}
    left_out = []
    for why, overrides in _candidates(spec, every):
        try:
            config = space.resolve(spec, overrides)
        except ValidationError as error:
            left_out.append(f"{why}: {error.errors()[0]['msg']}")
            continue
        misfits = geometry_misfits(config, size, None)
        key = canonical_json([config.model.patch, config.masking.model_dump(mode="json")])
        if key in found:
            continue
        if misfits:
            left_out.append(
                f"{why}: " + "; ".join(f"{path} {each.text}" for path, each in misfits.items())
            )
        elif len(found) == MOST_SECTIONS:
            left_out.append(f"{why}: more than {MOST_SECTIONS} maskings")
        else:
            found[key] = Section(why, config)
    return list(found.values()), left_out


def _candidates(spec: StudySpec, every: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a masking comes from, and what it changes in the study's trial."""
    yield "the study's own trial", {}
    search = {
        path: item
        for path, item in spec.search.items()
        if path.split(".")[0] == "masking" or path in ("model", "model.patch")
    }
    if search:
        for point in islice(space.combinations(search, _some), MOST_WALKED):
            labels = (f"{path}: {short(value)}" for path, value in point.labels.items())
            yield ", ".join(labels), point.overrides
    if every:
        for name in MASKING:
            yield f"strategy {name}, not searched", {"masking.strategy": {"name": name}}


def _some(parameter: space.Parameter) -> list[Any]:
    item = parameter.item
    return list(item.choices) if item.choices is not None else [middle(item)]


def middle(item: space.SearchItem) -> int | float:
    """Of a range: half-way, by factors if it is searched so, on a step if it has steps."""
    value = math.sqrt(item.low * item.high) if item.log else (item.low + item.high) / 2
    if item.step is not None:
        value = item.low + round((value - item.low) / item.step) * item.step
    return round(value) if item.is_integer else float(f"{value:.12g}")


def _draw(
    config: TrialConfig,
    seed: int,
    dataset: Dataset,
    subjects: Subjects,
    folder: Path,
    steps: int,
) -> int:
    """Draw one masking at every PROGRESS; how many steps the model was trained that it asks."""

    def draw(progress: float, model: Any) -> None:
        draw_masks(
            folder / masks_name(progress),
            subjects.images,
            subjects.rows_B,
            config,
            progress,
            seed,
            model,
            dataset.mean,
            dataset.std,
            labels=subjects.labels,
            classes=dataset.classes,
            is_padded=dataset.is_padded,
        )

    def draw_asked(progress: float, model: Any, teacher: Any) -> None:
        draw(progress, teacher or model)

    try:
        for progress in PROGRESS:
            draw(progress, _Nobody())
    except _Asked:
        device = subjects.images.device
        rehearse(config, seed, dataset, steps, device, PROGRESS, draw_asked)
        return steps
    return 0


class _Asked(Exception):
    """A strategy asked its model for something."""


class _Nobody:
    """A model that tells whether a strategy asks one at all."""

    def __getattr__(self, name: str) -> Any:
        raise _Asked
