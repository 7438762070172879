"""Where images come from, and how trials read them.

To add a source, write a function (root, *, options) -> store.Source and add it to SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainables.data import images, smears, volumes
from trainables.data.source import Source
from trainables.data.store import Dataset, Hears, open_dataset, write
from trainables.named import Choice, named
from trainables.storage import default_cache

SOURCES: dict[str, Callable[..., Source]] = {
    "smears": smears.smears,
    "images": images.images,
    "volumes": volumes.volumes,
}

if TYPE_CHECKING:
    DataConfig = Choice
else:
    DataConfig = named(SOURCES, key="source")


def prepare(
    config: Choice, root: Path, cache: Path, decoded: Hears = lambda done, parts: None
) -> Path:
    """Decode once into `cache/<fingerprint>`; paths count from `root`, the folder of the YAML.

    `decoded` hears of every part (a file, a generated image) that is done, from any thread.
    """
    return write(SOURCES[config.name](root, **config.options()), cache, decoded)


__all__ = [
    "SOURCES",
    "DataConfig",
    "Dataset",
    "default_cache",
    "open_dataset",
    "prepare",
]
