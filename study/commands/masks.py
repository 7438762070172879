"""`masks`: what each masking of a study hides, as a page."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from study.atlas import draw_atlas
from study.commands.data import dataset_of
from study.commands.terminal import say
from study.loading import load_spec


def show_masks(
    path: Path,
    output: Path,
    *,
    images: int,
    steps: int,
    every: bool,
    write_page: Callable[[Path, Path], Path],
) -> None:
    """Draw what each masking of a study hides, in this process, and write the page about it."""
    spec = load_spec(path)
    dataset = dataset_of(spec)
    with tempfile.TemporaryDirectory(prefix="maskstudy-masks-") as folder:
        draw_atlas(
            spec,
            dataset,
            Path(folder),
            images=images,
            steps=steps,
            every=every,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            say=say,
        )
        page = write_page(Path(folder), output)
    say(f"masks: {page}")
