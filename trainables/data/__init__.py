"""Where images come from, and how trials read them.

To add a source, write a file with a function (root, looked_at, *, options) -> Source, and with an
`example` on which its contract is tried, and add both to SOURCES, as a SourceKind. Every file that
is read lies below a place that an option names, and is among its `files`. Whatever decides a
decoded byte and stands in no other field of the source goes into its `identity`: hashes of what was
read, options. Whatever is wrong with a file is a UserError that names it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainables.data import images, smears, textures, unchanged, volumes
from trainables.data.entries import paths_read
from trainables.data.source import Hears, SourceKind, unheard
from trainables.data.store import Dataset, open_dataset, write
from trainables.named import Choice, named
from trainables.storage import default_cache

SOURCES = {
    "smears": SourceKind(smears.smears, smears.example),
    "textures": SourceKind(textures.textures, textures.example),
    "images": SourceKind(images.images, images.example, paths_read),
    "volumes": SourceKind(
        volumes.volumes, volumes.example, partial(paths_read, separator=volumes.SEPARATOR)
    ),
}

if TYPE_CHECKING:
    DataConfig = Choice
else:
    DataConfig = named({name: kind.make for name, kind in SOURCES.items()}, key="source")


def prepare(
    config: Choice,
    root: Path,
    cache: Path,
    decoded: Hears = unheard,
    looked_at: Hears = unheard,
) -> Path:
    """Decode once into `cache/<fingerprint>`; paths count from `root`, the folder of the YAML.

    `looked_at` hears of every file that was checked and `decoded` of every part (a file, a
    generated image) that was decoded, from any thread. Files that are as they were when they were
    last prepared are not read again.
    """
    kind, options = SOURCES[config.name], config.options()
    if kind.files is None:
        return write(kind.make(root, looked_at, **options), cache, decoded)
    given = [config.name, config.model_dump(mode="json"), str(root.absolute())]
    state = unchanged.stamp(kind.files(root, options))
    known = unchanged.recall(cache, given, state) if state else None
    if known is None:
        known = write(kind.make(root, looked_at, **options), cache, decoded)
        if state:
            unchanged.remember(cache, given, state, known)
    return known


__all__ = [
    "SOURCES",
    "DataConfig",
    "Dataset",
    "default_cache",
    "open_dataset",
    "prepare",
]
