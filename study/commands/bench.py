"""`bench`: what each masking strategy costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter
from rich.table import Table

from study.commands.data import dataset_of
from study.commands.terminal import console, say, show
from study.environment import environment
from study.loading import load_spec
from study.mistakes import listed, near
from trainables.config import TrialConfig
from trainables.data import DataConfig, Dataset, default_cache, open_dataset, prepare
from trainables.edges import in_words
from trainables.errors import UserError
from trainables.masking import MASKING
from trainables.speed import REFERENCE, StepTime, step_times


class _Subject(NamedTuple):
    """What is timed."""

    config: TrialConfig
    dataset: Dataset
    workers: int
    threads: int


def bench_strategies(path: Path | None, names: str, seconds: float, threads: int | None) -> None:
    """Print step times under each masking strategy, relative to random masking."""
    chosen = _strategies(names)
    config, dataset, workers, default_threads = _subject(path)
    threads = threads or default_threads
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"timing {len(chosen)} strategies"):
        found = step_times(
            config, chosen, dataset, device, workers=workers, threads=threads, seconds=seconds
        )
    size = "x".join(map(str, dataset.size))
    model, batch = config.model, config.pretrain.batch // workers
    title = f"a training step: {model.size}/{in_words(model.patch)}, {batch} images of {size}"
    show(steps_table(title, found))
    cpu = environment()["hardware"]["cpu"]
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({cpu})"
    say(f"{chip}, {threads} threads, torch {torch.__version__}")


def steps_table(title: str, found: Sequence[StepTime]) -> Table:
    table = Table(title=title)
    table.add_column("strategy")
    for column in ("ms per step", f"ratio to {REFERENCE}", "lowest .. highest", "images/s"):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(
            each.strategy,
            f"{each.milliseconds:.1f}",
            f"{each.ratio:.2f}",
            f"{each.lowest:.2f} .. {each.highest:.2f}",
            f"{each.images_per_second:,.0f}",
        )
    return table


def _strategies(names: str) -> list[str]:
    known = list(MASKING)
    chosen = known if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise UserError(
                f"--strategies: given {name!r}; expected all, or some of {listed(known)}"
                f"{near(name, known)}"
            )
    return chosen


def _subject(path: Path | None) -> _Subject:
    """A study's trial on its own data; without a study, the default trial on a few smears."""
    if path is not None:
        spec = load_spec(path)
        threads = max(1, int(spec.resources.cpus_per_worker))
        return _Subject(spec.trial, dataset_of(spec), spec.resources.workers, threads)
    config = TrialConfig()
    cells = {"source": "smears", "size": 64, "images": config.pretrain.batch, "val": 1}
    data = TypeAdapter(DataConfig).validate_python(cells)
    dataset = open_dataset(prepare(data, Path(), default_cache()))
    return _Subject(config, dataset, 1, torch.get_num_threads())
