"""Where images come from, and how trials read them.

To add a source, write a file with a function (root, *, options) -> Source, and with an `example` on
which its contract is tried, and add both to SOURCES, as a SourceKind. Every file that is read lies
below a place that an option names. Whatever decides a decoded byte and stands in no other field of
the source goes into its `identity`: hashes of what was read, options. Whatever is wrong with a file
is a UserError that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainables.data import images, smears, textures, volumes
from trainables.data.source import SourceKind
from trainables.data.store import Dataset, Hears, open_dataset, write
from trainables.named import Choice, named
from trainables.storage import default_cache

SOURCES = {
    "smears": SourceKind(smears.smears, smears.example),
    "textures": SourceKind(textures.textures, textures.example),
    "images": SourceKind(images.images, images.example),
    "volumes": SourceKind(volumes.volumes, volumes.example),
}

if TYPE_CHECKING:
    DataConfig = Choice
else:
    DataConfig = named({name: kind.make for name, kind in SOURCES.items()}, key="source")


def prepare(
    config: Choice, root: Path, cache: Path, decoded: Hears = lambda done, parts: None
) -> Path:
    """Decode once into `cache/<fingerprint>`; paths count from `root`, the folder of the YAML.

    `decoded` hears of every part (a file, a generated image) that is done, from any thread.
    """
    return write(SOURCES[config.name].make(root, **config.options()), cache, decoded)


__all__ = [
    "SOURCES",
    "DataConfig",
    "Dataset",
    "default_cache",
    "open_dataset",
    "prepare",
]
