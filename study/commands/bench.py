"""`bench`: what a training step costs here, under each masking strategy and in other libraries."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter
from rich.table import Table

from study.commands.data import dataset_of
from study.commands.terminal import console, say, show
from study.environment import environment
from study.loading import load_spec
from study.mistakes import listed, near
from trainables import durable
from trainables.bench import DRAWN, REFERENCE, Cell, bench_cell
from trainables.config import SIZES, TrialConfig, geometry_misfits
from trainables.data import DataConfig, Dataset, default_cache, open_dataset, prepare
from trainables.edges import in_words
from trainables.errors import UserError
from trainables.masking import MASKING
from trainables.peers import PEERS

PRECISIONS = ("fast", "fp32", "bf16")
Value = TypeVar("Value")


class Grid(NamedTuple):
    """What is timed, each with each, as given; empty: what the trial has."""

    sizes: str = ""
    patches: str = ""
    ratios: str = ""
    precisions: str = ""


class _Subject(NamedTuple):
    """Whose steps are timed."""

    config: TrialConfig
    dataset: Dataset
    workers: int
    threads: int


def bench(
    path: Path | None,
    *,
    names: str,
    grid: Grid,
    beside: str,
    seconds: float,
    threads: int | None,
    output: Path | None,
) -> None:
    """Print a table for each cell of the grid; with `output` write all of them there as JSON."""
    strategies = list(MASKING) if names == "all" else _named(names, MASKING, "--strategies", "all")
    peers = _named(beside, PEERS, "--beside")
    config, dataset, workers, default_threads = _subject(path)
    threads = threads or default_threads
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = environment()["hardware"]["cpu"]
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({cpu})"
    cells = []
    for one in _cells(config, grid, dataset):
        with console.status(f"timing {len(strategies) + len(peers)} kinds of step"):
            cell = bench_cell(
                one,
                strategies,
                peers,
                dataset,
                device,
                workers=workers,
                threads=threads,
                seconds=seconds,
            )
        show(cell_table(cell))
        for name, why in cell.failed.items():
            say(f"{name} cannot take such a step: {why}")
        cells.append(cell)
    say(f"{chip}, {threads} threads, torch {torch.__version__}")
    if output is not None:
        found = {
            "chip": chip,
            "threads": threads,
            "torch": torch.__version__,
            "cells": [asdict(cell) for cell in cells],
        }
        with durable.replacing(output) as aside:
            aside.write_text(json.dumps(found, indent=1) + "\n")
        say(f"wrote {output}")


def cell_table(cell: Cell) -> Table:
    size = "x".join(map(str, cell.image))
    title = (
        f"a training step: {cell.size}/{in_words(cell.patch)}, {cell.batch} images of {size}, "
        f"{cell.ratio:.0%} hidden, {cell.precision}; peak {cell.peak_flops / 1e9:,.0f} GFLOP/s"
    )
    table = Table(title=title)
    table.add_column("step")
    has_losses = any(each.loss is not None for each in cell.steps)
    has_memory = any(each.step_bytes is not None for each in cell.steps)
    columns = ["ms", f"ratio to {REFERENCE}", "lowest .. highest", "images/s", "of peak"]
    columns += ["first s", "parameters"] + ["MiB"] * has_memory + ["loss"] * has_losses
    for column in columns:
        table.add_column(column, justify="right")
    for each in cell.steps:
        cells = [
            each.name,
            f"{each.milliseconds:.1f}",
            f"{each.ratio:.2f}",
            f"{each.lowest:.2f} .. {each.highest:.2f}",
            f"{each.images_per_second:,.0f}",
            "" if each.utilization is None else f"{each.utilization:.0%}",
            f"{each.first_seconds:.1f}",
            f"{each.parameters:,}",
        ]
        if has_memory:
            cells.append("" if each.step_bytes is None else f"{each.step_bytes / 2**20:,.0f}")
        if has_losses:
            cells.append("" if each.loss is None else f"{each.loss:.3f}")
        table.add_row(*cells)
    if any(each.name == DRAWN for each in cell.steps):
        drawn = next(each for each in cell.steps if each.name == DRAWN)
        table.caption = f"loader off / on: {1 / drawn.ratio:.2f}"
    return table


def _cells(config: TrialConfig, grid: Grid, dataset: Dataset) -> list[TrialConfig]:
    """The trial with each combination, all of which fit the images."""
    sizes = _named(grid.sizes, SIZES, "--sizes") or [config.model.size]
    patches: list[Any] = _read(grid.patches, int, "--patches", "whole numbers")
    patches = patches or [config.model.patch]
    ratios: list[Any] = _read(grid.ratios, float, "--ratios", "numbers between 0 and 1") or [None]
    precisions = _named(grid.precisions, PRECISIONS, "--precisions") or [config.pretrain.precision]
    found = []
    for size, patch, ratio, precision in itertools.product(sizes, patches, ratios, precisions):
        settings: dict[str, Any] = config.model_dump(mode="json")
        settings["model"] |= {"size": size, "patch": patch}
        settings["pretrain"]["precision"] = precision
        if ratio is not None:
            if not 0 < ratio < 1:
                raise UserError(f"--ratios: given {ratio:g}; expected numbers between 0 and 1")
            settings["masking"]["ratio"] = {"name": "constant", "value": ratio}
        one = TrialConfig.model_validate(settings)
        for setting, misfit in geometry_misfits(one, dataset.size, None).items():
            raise UserError(f"--patches: {setting}: {misfit.text}")
        found.append(one)
    return found


def _read(text: str, kind: Callable[[str], Value], option: str, expected: str) -> list[Value]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option}: given {text!r}; expected {expected}, with commas") from None


def _named(text: str, known: Sequence[str] | Any, option: str, also: str = "") -> list[str]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            first = f"{also}, or " if also else ""
            raise UserError(
                f"{option}: given {name!r}; expected {first}some of {listed(list(known))}"
                f"{near(name, list(known))}"
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
