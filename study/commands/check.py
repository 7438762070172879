"""`check`: whether a study is sound, and what it will take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from study import requests
from study.commands.data import dataset_of
from study.commands.finding import begun
from study.commands.terminal import console, say
from study.fit import classes_without_labels
from study.loading import load_spec
from study.reader import written
from trainables.metrics import metric_of

if TYPE_CHECKING:
    from trainables.data import Dataset

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
) -> None:
    """Validate, prepare the data, print the plan; with seconds to spend, whether it is enough."""
    spec = load_spec(path)
    say(f"{path}: the settings are valid; now checking the data")
    folder = begun(spec.study_folder())
    dataset = dataset_of(spec)
    say(f"{path}: valid")
    described = dataset.describe()
    notes = described.pop("notes")
    _print_pairs("data", described)
    for note in notes:
        say(f"  {'note':<22} {note}")
    for line in classes_without_labels(spec, dataset) if dataset.is_labelled else ():
        say(f"  {'warning':<22} {line}")
    if write_sheet is not None:
        say(f"  {'images with masks':<22} {write_sheet(dataset, spec.study)}")

    # these import torch, which takes seconds: what can be said without it is said before
    import torch

    from study.plan import plan
    from trainables import trivial
    from trainables.speed import flops_per_second

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dataset.is_labelled:
        patch = spec.trial.patch_edges(len(dataset.size))
        without = trivial.scores(dataset, dataset.rows("train"), patch, device, splits=["val"])
        _print_pairs("without an encoder, on val", _trivial_words(without))
    threads = max(1, int(spec.resources.cpus_per_worker))
    speed = flops_per_second(spec.trial, dataset, device, threads=threads)
    asked = requests.grown(spec, requests.expected(folder, spec))
    _print_pairs("plan", plan(asked, dataset, flops_per_second=speed).describe())
    if asked.budget.trials > spec.budget.trials:
        more = asked.budget.trials - spec.budget.trials
        say(f"  (with {more} trials that were asked for since the study was begun)")
    say(f"  (at {speed:.2e} FLOP/s, measured here on one worker of the control arm)")
    if forecast_seconds is not None:
        from study.commands.forecast import print_forecast

        print_forecast(spec, dataset, device, threads, forecast_seconds)


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
