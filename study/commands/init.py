"""`init`: a first study file for a folder of images."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import TypeAdapter

from study.commands.terminal import say
from study.draft import STEPS, Machine, affordable, draft, first_size, needs_resizing
from study.loading import parse_spec
from study.spec import StudySpec
from study.survey import Survey, survey
from trainables import durable
from trainables.data import DataConfig, Dataset, default_cache, open_dataset, prepare
from trainables.errors import UserError


def init_study(folder: Path, output: Path) -> None:
    """Look at the folder and write a study file that fits it. UserError: it cannot be read so."""
    if output.exists():
        raise UserError(f"{output}: is there already; give another name: -o OTHER.yaml")
    if not output.parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent}; expected one that is there")
    say(f"{folder}: looking at its files, then at how fast this machine is")
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
    name = (re.sub(r"[^a-z0-9]+", "-", output.stem.lower()).strip("-") or "study")[:64]
    text = _affordable(name, found, dataset, machine, output)
    durable.write_new(output, text.encode())
    say(text)
    for note in dataset.about["notes"]:
        say(f"note: {note}")
    say(f"{output}: written; now: maskstudy check {output}")


def _affordable(name: str, found: Survey, dataset: Dataset, machine: Machine, output: Path) -> str:
    """A study file with as many steps of pretraining as this machine, measured, can take."""
    import torch  # takes seconds, which mistakes in the folder need not wait for

    from study.plan import plan
    from trainables.speed import measurer

    def parsed(steps: int) -> StudySpec:
        text = draft(name, found, dataset, machine, steps=steps)
        return parse_spec(text, output.parent, where=str(output))

    spec = parsed(STEPS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = max(1, int(spec.resources.cpus_per_worker))
    measure = measurer(dataset, device, threads=threads)
    steps = affordable(plan(spec, dataset, measure=measure).hours_of)
    hours = plan(parsed(steps), dataset, measure=measure).hours
    return draft(name, found, dataset, machine, steps=steps, hours=hours)


def _prepared(source: str, options: dict[str, object]) -> Dataset:
    config = TypeAdapter(DataConfig).validate_python({"source": source, **options})
    return open_dataset(prepare(config, Path(), default_cache()))
