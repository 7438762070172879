"""A first study file for a folder of images: sound as it stands, with what was guessed, and why."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from study.reader import in_one_line
from study.survey import Survey
from trainables.data import Dataset
from trainables.data.labels import axes_without_side, two_sides
from trainables.edges import even

if TYPE_CHECKING:
    from study.plan import Phases

STEPS = 1500  # of pretraining, from which on small encoders have learnt something
FEWEST_STEPS = 300
HOURS = 2.0  # that a first study should take at most
SEGMENTATION_STEPS = 300
RATE, SEGMENTATION_RATE = 1e-3, 1.875e-3  # at the peak, of encoders as small as these
RATIOS = [0.25, 0.5, 0.75]
SEEDS = 3
MOST_TOKENS = {False: 256, True: 1024}  # of a tile, without and with a GPU
TILE = {False: 64, True: 128}
CROP = {False: 48, True: 96}
LARGEST_OBJECT = 0.75  # of a tile's edge: larger ones are not seen whole


@dataclass(frozen=True)
class Machine:
    """What a study may cost."""

    has_gpu: bool

    @staticmethod
    def this() -> Machine:
        return Machine(shutil.which("nvidia-smi") is not None)


def first_size(found: Survey, machine: Machine) -> tuple[int | list[int], str]:
    """(tile or crop that fits into all images, why), before the sizes of objects are known."""
    smallest = found.smallest
    if found.source == "volumes":
        most = CROP[machine.has_gpu]
        size = [max(8, min(most, edge) // 8 * 8) for edge in smallest]
        return size, f"nearly all volumes that were looked at are {_times(smallest)} or more"
    edge = min(TILE[machine.has_gpu], *smallest)
    why = f"nearly all images that were looked at are {_times(smallest)} or more"
    return max(8, edge // 16 * 16), why


def needs_resizing(found: Survey, dataset: Dataset) -> bool:
    """Whether most objects of some class are larger than a tile shows."""
    largest = max(_diameters(dataset).values(), default=0.0)
    return found.source == "images" and largest > LARGEST_OBJECT * min(dataset.size)


def patches_of(dataset: Dataset, machine: Machine, spacing: Sequence[float] | None) -> list[Any]:
    """Patches that divide the tile, that the machine can bear, the smallest classes first."""
    size, volume = dataset.size, math.prod(dataset.size)
    found = []
    for patch in (2, 4, 8, 16, 32):
        edges = even(patch, spacing or [1.0] * len(size))
        if any(edge % part or part > edge for edge, part in zip(size, edges, strict=True)):
            continue
        if 4 <= volume // math.prod(edges) <= MOST_TOKENS[machine.has_gpu]:
            found.append(edges[0] if len(set(edges)) == 1 else edges)
    smallest = min(_diameters(dataset).values(), default=math.inf)
    resolving = [patch for patch in found if min(_edges(patch)) <= smallest]
    return (resolving[:3] if len(resolving) > 1 else found[:2]) or [8]


def affordable(hours: Phases | None) -> int:
    """Steps of pretraining with which a study that takes so long with STEPS takes HOURS."""
    if hours is None or sum(hours) <= HOURS:
        return STEPS
    return max(FEWEST_STEPS, round((HOURS - hours.segment) / hours.pretrain * STEPS))


def draft(
    name: str,
    found: Survey,
    dataset: Dataset,
    machine: Machine,
    *,
    steps: int,
    hours: float | None = None,
) -> str:
    """The text of a study file with so many steps of pretraining, which takes so long here."""
    spacing = found.seen[0].spacing if found.source == "volumes" else None
    patches = patches_of(dataset, machine, spacing)
    every_edge = zip(*(_edges(patch, len(dataset.size)) for patch in patches), strict=True)
    unit = [max(edges) for edges in every_edge]
    diameters = _diameters(dataset)
    arms = len(patches) * len(RATIOS)
    controls = SEEDS if dataset.is_labelled else 0
    takes = f"# About {hours:.1f} hours here, with {steps:,} steps of pretraining." if hours else ""
    lines = [
        f"# Written by `maskstudy init` from {found.images:,} images, {found.masks:,} with a mask.",
        "# Every guess has its reason beside it. `maskstudy check` says what the study will take.",
        *filter(None, [takes]),
        f"study: {in_one_line(name)}",
        f"question: {_question(diameters, dataset)}",
        "data:",
        f"  source: {found.source}",
        *(_setting(key, value, found.why.get(key)) for key, value in found.data.items()),
        "trial:",
        *(
            f"  {section}: {in_one_line(settings)}"
            for section, settings in _trial(found, dataset, machine, patches[0], steps).items()
        ),
        "search:",
        f"  model.patch: {{choices: {in_one_line(_choices(patches))}}}"
        f"  # {_why_patches(diameters, dataset)}",
        f"  masking.ratio.value: {{choices: {in_one_line(RATIOS)}}}",
        "objectives:",
        *(f"  - {in_one_line(metric)}" for metric in _objectives(dataset, diameters)),
        f"sampler: grid  # {arms} arms, each with {SEEDS} seeds"
        + ", and random weights beside them" * bool(controls),
        f"seeds: {SEEDS}",
        "rungs: [0.5, 1.0]",
        f"probe: {{unit: {in_one_line(unit[0] if len(set(unit)) == 1 else unit)}}}"
        f"  # hides the same pixels for every patch",
        f"budget: {{trials: {arms * SEEDS + controls}}}",
    ]
    return "\n".join(lines) + "\n"


def _trial(
    found: Survey, dataset: Dataset, machine: Machine, patch: int | list[int], steps: int
) -> dict[str, Any]:
    """The control: an encoder and a budget that suit the machine."""
    batch, batch_of_segmentation = (8, 2) if found.source == "volumes" else (32, 8)
    pretrain, train = len(dataset.rows("pretrain")), len(dataset.rows("train"))
    size, decoder = ("tiny", (2, 128)) if machine.has_gpu else ("nano", (1, 64))
    trial: dict[str, Any] = {
        "model": {
            "size": size,
            "patch": patch,
            "decoder": dict(zip(("depth", "width"), decoder, strict=True)),
        },
        "masking": {"strategy": "random", "ratio": {"name": "constant", "value": 0.5}},
        "pretrain": {
            "epochs": _epochs(steps, batch, pretrain),
            "batch": batch,
            "optimizer": {"name": "adamw", "base_lr": RATE * 256 / batch},
        },
        "segment": {
            "epochs": _epochs(SEGMENTATION_STEPS, batch_of_segmentation, train),
            "batch": batch_of_segmentation,
            "features": 8,
            "optimizer": {
                "name": "adamw",
                "base_lr": SEGMENTATION_RATE * 256 / batch_of_segmentation,
            },
        },
    }
    if two_sides(dataset.classes):
        axes = axes_without_side(len(dataset.size))
        trial["segment"]["augment"] = {"name": "crops", "scale": [0.5, 1.0], "flip_axes": axes}
    if not dataset.is_labelled:
        del trial["segment"]
    return trial


def _objectives(dataset: Dataset, diameters: dict[str, float]) -> list[str]:
    """The smallest class that can be judged, and what pretraining has learnt."""
    if not dataset.is_labelled:
        return ["pretrain/probe_gain"]
    places = dataset.classes_shown(dataset.rows("val"))
    shown = [dataset.classes[place] for place in sorted(places)]
    small = min(shown, key=lambda key: diameters.get(key, math.inf), default=None)
    metric = f"segment/iou/{small}" if small is not None and len(shown) > 1 else "segment/miou"
    return [metric, "pretrain/probe_gain"]


def _question(diameters: dict[str, float], dataset: Dataset) -> str:
    if not dataset.is_labelled:
        return "Which mask ratio and patch size reconstruct these images best?"
    what = "the objects in these images"
    if len(diameters) > 1:
        what = f"{min(diameters, key=lambda key: diameters[key])!r}, the smallest class"
    return json.dumps(
        f"Which mask ratio and patch size help to segment {what}?", ensure_ascii=False
    )


def _why_patches(diameters: dict[str, float], dataset: Dataset) -> str:
    tile = f"divide {_times(dataset.size)}"
    if not diameters:
        return tile
    sizes = ", ".join(f"{name} {size:g}" for name, size in diameters.items())
    return f"{tile}; diameters in {'px' if len(dataset.size) == 2 else 'mm'}: {sizes}"


def _diameters(dataset: Dataset) -> dict[str, float]:
    """The median diameter of each class that has whole objects."""
    return {
        name: about["median_diameter"]
        for name, about in dataset.about["objects"].items()
        if about["median_diameter"]
    }


def _epochs(steps: int, batch: int, images: int) -> int:
    return max(1, round(steps * batch / max(1, images)))


def _choices(patches: list[Any]) -> Any:
    """Patches as a search has them: with labels where they are not numbers."""
    if all(isinstance(patch, int) for patch in patches):
        return patches
    edges = (patch if isinstance(patch, list) else [patch] * 3 for patch in patches)
    return {"x".join(map(str, each)): each for each in edges}


def _edges(patch: int | list[int], axes: int = 1) -> list[int]:
    return patch if isinstance(patch, list) else [patch] * axes


def _setting(key: str, value: Any, why: str | None) -> str:
    return f"  {key}: {in_one_line(value)}" + (f"  # guessed: {why}" if why else "")


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
