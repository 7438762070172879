"""`check`: whether a study is sound, and what it will take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from study import requests
from study.commands.data import dataset_of, refuse_other_data
from study.commands.finding import begun
from study.commands.terminal import console, say
from study.fit import arms_patches, weaknesses
from study.ledger import read_spec
from study.loading import changes, load_spec
from study.loggers import check_packages
from study.reader import written
from study.spec import UNITS
from trainables.data.source import SPLITS, Split, padding_share
from trainables.edges import in_words, simplest
from trainables.metrics import metric_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from study.spec import StudySpec
    from trainables.data import Dataset

LABELLED: tuple[Split, ...] = ("train", "val", "test")
SOLVED = 0.8  # mIoU of a segmenter without an encoder from which on a warning is due


def print_resolved(path: Path) -> None:
    """The study file as it is understood: every default is spelt out."""
    content = load_spec(path).model_dump(mode="json", by_alias=True)
    for path_of_setting, item in content["search"].items():
        given = {key: value for key, value in item.items() if value is not None}
        content["search"][path_of_setting] = given
    say(written(content).rstrip())


def check_study(
    path: Path,
    forecast_seconds: float | None = None,
    write_sheet: Callable[[Dataset, str], Path] | None = None,
    detectable: Callable[[int], float | None] | None = None,
) -> None:
    """Validate, prepare the data, print the plan; with seconds to spend, whether it is enough.

    `detectable`: seeds -> smallest difference that they show in four of five studies, in standard
    deviations of the difference at one seed; None: they are too few to show any.
    """
    spec = load_spec(path)
    check_packages(spec.log)
    folder = begun(spec.study_folder())
    changed = changes(folder, spec)
    say(f"{path}: the settings are valid; now checking the data")
    dataset = dataset_of(spec)
    if read_spec(folder) is not None:
        refuse_other_data(folder, dataset)
        say(f"{path}: valid; {spec.study} is begun, and `maskstudy run` goes on with it")
        for change in changed:
            say(f"  {'changed':<22} {change}")
    else:
        say(f"{path}: valid")
    _print_pairs("data", _data_words(dataset, arms_patches(spec, len(dataset.size))))
    if dataset.is_labelled:
        _print_pairs("classes", _class_words(dataset))
    for note in dataset.about["notes"]:
        say(f"  {'note':<22} {note}")
    for line in weaknesses(spec, dataset):
        say(f"  {'warning':<22} {line}")
    if write_sheet is not None:
        say(f"  {'images with masks':<22} {write_sheet(dataset, spec.study)}")

    # these import torch, which takes seconds: what can be said without it is said before
    import torch

    from study.plan import plan
    from trainables import trivial
    from trainables.speed import measurer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dataset.is_labelled:
        patch = spec.trial.patch_edges(len(dataset.size))
        without = trivial.scores(dataset, dataset.rows("train"), patch, device, splits=["val"])
        _print_pairs("without an encoder, on val", _trivial_words(without))
    threads = max(1, int(spec.resources.cpus_per_worker))
    recomputes = spec.resources.activation_checkpointing
    measure = measurer(dataset, device, threads=threads, recomputes=recomputes)
    asked = requests.grown(spec, requests.expected(folder, spec))
    described = plan(asked, dataset, measure=measure).describe()
    if detectable is not None:
        described |= {"differences": _difference_words(asked, detectable)}
    _print_pairs("plan", described)
    for unit, amount in asked.budget.given.items():
        more = amount - spec.budget.given[unit]
        if more > 0:
            say(f"  (with {more:.10g} {UNITS[unit]} that were asked for since the study was begun)")
    say("  (by steps of these arms, timed here on one worker; evaluation at rungs comes on top)")
    if forecast_seconds is not None:
        from study.commands.forecast import print_forecast

        print_forecast(spec, dataset, device, threads, forecast_seconds)


def _difference_words(spec: StudySpec, detectable: Callable[[int], float | None]) -> str:
    """How small a difference the study can tell from chance."""
    seeds, whose = spec.seeds, "an arm's"
    if spec.confirm is not None:
        seeds, whose = spec.confirm.seeds, "a confirmed arm's"
        if spec.confirm.verdict is not None:
            seeds, whose = spec.confirm.verdict, "the best arm's"
    least = detectable(seeds)
    if least is None:
        given = "one seed shows" if seeds == 1 else f"{seeds} seeds show"
        return f"{given} none; `confirm: {{arms: 3, seeds: 2, verdict: 10}}` does"
    return (
        f"{seeds} seeds show {whose} difference from the control in four of five studies where it "
        f"is {least:.1f} times its standard deviation at one seed, or more"
    )


def _data_words(dataset: Dataset, patches: Sequence[Sequence[int]]) -> dict[str, str]:
    """The data set in a line for each of its sides."""
    volumes, rows = dataset.volumes, _word_of_rows(dataset)
    words = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint[:12],
        rows: _listed({split: len(dataset.rows(split)) for split in SPLITS}),
    }
    if volumes is not None:
        words["volumes"] = _listed({split: len(dataset.volumes_of(split)) for split in SPLITS})
        words["voxels"] = f"{_range(volumes.shapes)}, {_range(volumes.spacings)} mm each"
        edges = np.median(volumes.spacings, axis=0) * dataset.size
        words["size of a crop"] = f"{_times(dataset.size)} voxels, {_times(edges)} mm"
        of_patches = [np.median(volumes.spacings, axis=0) * patch for patch in patches]
        words["patches"] = ", ".join(
            f"{in_words(simplest(patch))} ({_times(edges)} mm)"
            for patch, edges in zip(patches, of_patches, strict=True)
        )
    else:
        words["size"] = _times(dataset.size)
    parts = volumes or dataset.tiles
    if parts is not None and dataset.is_padded:
        share = padding_share(parts.shapes.tolist(), dataset.size)
        words["padding"] = f"{share:.0%} of all {rows}"
    words["channels"] = str(dataset.channels)
    words["groups"] = f"{dataset.about['groups']:,}"
    if volumes is None:
        found = dataset.about["intensities"]
        words["intensities"] = f"{found['ends']} become 0 and 1, by {found['window_from']}"
    return words


def _class_words(dataset: Dataset) -> dict[str, str]:
    """How much of each class the labels show."""
    about, words = dataset.about, {}
    for place, name in enumerate(dataset.classes):
        words[name] = f"{about['pixel_share'][name]:.2%} of the pixels"
        objects = about["objects"].get(name)
        if place == 0 or objects is None:
            continue
        median, unit = objects["median_diameter"], "px" if dataset.volumes is None else "mm"
        size = f", {median:g} {unit} (median)" if median else ""
        words[name] += f"; objects: {_listed({s: objects[s] for s in LABELLED})}{size}"
        if dataset.volumes is None:
            shown = {s: len(dataset.rows_showing(place, dataset.rows(s))) for s in LABELLED}
            words[name] += f"; {_word_of_rows(dataset)} with it: {_listed(shown)}"
    return words


def _word_of_rows(dataset: Dataset) -> str:
    """What models see."""
    if dataset.volumes is not None:
        return "crops"
    return "tiles" if dataset.tiles is not None else "images"


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{word} {count:,}" for word, count in counts.items())


def _range(values: NDArray[Any]) -> str:
    """Shapes or spacings (N, A): one, or from the smallest to the largest along each axis."""
    low, high = values.min(axis=0), values.max(axis=0)
    return _times(low) if (low == high).all() else f"{_times(low)} to {_times(high)}"


def _times(edges: Iterable[float]) -> str:
    return " x ".join(f"{edge:.4g}" for edge in edges)


def _trivial_words(scores: Mapping[str, float]) -> dict[str, str]:
    """Segmenters without an encoder, and a warning if one of them solves the task."""
    words = {metric_of(key).title: f"{value:.3f}" for key, value in scores.items()}
    best = max(scores, key=lambda key: scores[key], default=None)
    if best is not None and scores[best] >= SOLVED:
        words["warning"] = (
            f"the {metric_of(best).title} is {scores[best]:.2f}: such data cannot tell encoders "
            f"apart; take objects that are harder to tell from their surroundings"
        )
    return words


def _print_pairs(title: str, pairs: Mapping[str, object]) -> None:
    console.print(f"\n{title}", style="bold")
    for key, value in pairs.items():
        say(f"  {key:<22} {value}")
