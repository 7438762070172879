"""`init`: a first study file for a folder of images."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import TypeAdapter

from study.commands.terminal import say
from study.draft import Machine, affordable, draft, first_size, needs_resizing
from study.loading import parse_spec
from study.survey import survey
from trainables import durable
from trainables.data import DataConfig, Dataset, default_cache, open_dataset, prepare
from trainables.errors import UserError


def init_study(folder: Path, output: Path) -> None:
    """Look at the folder and write a study file that fits it. UserError: it cannot be read so."""
    if output.exists():
        raise UserError(f"{output}: is there already; give another name: -o OTHER.yaml")
    machine, found = Machine.this(), survey(folder)
    size, why = first_size(found, machine)
    found.guess("size", size, why)
    dataset = _prepared(found.source, found.data)
    if needs_resizing(found, dataset):
        found.guess("fit", "resize", f"objects are larger than a tile of {size}")
        dataset = _prepared(found.source, found.data)
    for key in ("folder", "manifest"):
        if key in found.data:
            found.data[key] = os.path.relpath(found.data[key], output.parent)
    name = re.sub(r"[^a-z0-9]+", "-", output.stem.lower()).strip("-") or "study"
    text = draft(name[:64], found, dataset, machine)
    steps = affordable(_hours(text, output, dataset))
    text = draft(name[:64], found, dataset, machine, steps=steps)
    hours = _hours(text, output, dataset)
    text = draft(name[:64], found, dataset, machine, steps=steps, hours=hours)
    durable.write_new(output, text.encode())
    say(text)
    for note in dataset.about["notes"]:
        say(f"note: {note}")
    say(f"{output}: written; now: maskstudy check {output}")


def _hours(text: str, output: Path, dataset: Dataset) -> float | None:
    """What the study takes on this machine, measured."""
    import torch  # takes seconds, which mistakes in the folder need not wait for

    from study.plan import plan
    from trainables.speed import flops_per_second

    spec = parse_spec(text, output.parent, where=str(output))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = max(1, int(spec.resources.cpus_per_worker))
    speed = flops_per_second(spec.trial, dataset, device, threads=threads)
    return plan(spec, dataset, flops_per_second=speed).hours


def _prepared(source: str, options: dict[str, object]) -> Dataset:
    config = TypeAdapter(DataConfig).validate_python({"source": source, **options})
    return open_dataset(prepare(config, Path(), default_cache()))
