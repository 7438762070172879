"""What surrounds a trial: device, folder, workers, and whom to tell.

Nothing in it changes the numbers, but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.storage import store

if TYPE_CHECKING:
    import torch

# keys: phase, step, epoch, progress, metric, value, goal, unit, seconds
Row = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """Where a trial runs. `report`, `heartbeat` and `saved` are called on rank 0 only."""

    device: torch.device
    folder: Path  # the trial's own
    attempt: str  # a word no other start of this trial has
    rungs: tuple[float, ...]  # rising shares of a phase's planned budget; the last is 1
    report: Callable[[list[Row]], bool]  # rows are durable when it returns; True: stop here
    heartbeat: Callable[[str, float, float], None]  # (phase, progress, images per second); cheap
    rank: int = 0
    world_size: int = 1
    checkpoint_seconds: float = 30.0
    saved: Callable[[float], None] = lambda seconds: None  # a checkpoint took so long; cheap
    alive: Callable[[], None] = lambda: None  # work goes on that is no step; any rank, cheap
    # (phase, steps done), asked on every rank after every step: save, and end with LEAVING; cheap
    is_leaving: Callable[[str, int], bool] = lambda phase, step: False
    remote: str = ""  # the URI in a store of objects that `folder` mirrors
    micro_batches: int = 1  # in which a batch is learnt from, one after the other, for memory
    recomputes: bool = False  # blocks keep their inputs alone, for memory
    shared: Path | None = None  # where finished pretrainings of the study lie; None: nowhere

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def keep(self, folder: str) -> None:
        """Have the store, if there is one, hold the files of a folder of the trial's."""
        if self.remote:
            place = self.folder / folder
            # what tells of the others comes last: encoder.json after encoder.safetensors
            for path in sorted(place.iterdir(), key=lambda path: (path.suffix == ".json", path)):
                if path.is_file() and not path.name.startswith("."):
                    store(self.remote).upload(f"{folder}/{path.name}", path)
