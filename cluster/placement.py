"""How many trials have room, counted node by node. Knows no Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MOST = 1000  # trials at once


@dataclass(frozen=True)
class Room:
    """What a node has, or has free."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of one trial: placed together or not at all, each of them whole on one node."""

    workers: int
    cpus: float  # of each worker
    gpus: float

    def __str__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        each = " each" if self.workers > 1 else ""
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return f"{workers} with {self.cpus:g} CPUs{gpus}{each}"


def worker_group(
    workers: int, cpus: float, gpus: float | None, rooms: Iterable[Room]
) -> WorkerGroup:
    """The group that was asked for; `gpus` None: one for each worker if these nodes hold that."""
    if gpus is not None:
        return WorkerGroup(workers, cpus, gpus)
    on_gpus = WorkerGroup(workers, cpus, 1.0)
    return on_gpus if num_groups(rooms, on_gpus) else WorkerGroup(workers, cpus, 0.0)


def num_groups(rooms: Iterable[Room], group: WorkerGroup) -> int:
    """Groups that fit side by side; the workers of one may lie on several nodes."""
    return sum(num_workers(room, group) for room in rooms) // group.workers


def num_workers(room: Room, group: WorkerGroup) -> int:
    """Workers that fit on one node."""
    fits = float(MOST * group.workers)
    if group.cpus:
        fits = min(fits, _times(group.cpus, room.cpus))
    if group.gpus >= 1:
        fits = min(fits, _times(group.gpus, room.gpus))
    elif group.gpus:
        # Ray never makes one worker's share of pieces of two GPUs
        fits = min(fits, _times(group.gpus, 1) * int(room.gpus) + _times(group.gpus, room.gpus % 1))
    return int(fits)


def refusal(rooms: Iterable[Room], group: WorkerGroup) -> str | None:
    """Why these nodes, with nothing else on them, cannot hold one group; None: they can."""
    rooms = list(rooms)
    if num_groups(rooms, group) >= 1:
        return None
    way_out = (
        "lower `resources:` in the study, add nodes, or set resources.autoscale where nodes come "
        "when they are asked for"
    )
    places = sum(num_workers(room, group) for room in rooms)
    if places:
        return f"a trial needs {group}, but all nodes together hold {places} of them; {way_out}"
    largest = max(rooms, key=lambda room: (room.gpus if group.gpus else 0, room.cpus))
    return (
        f"a trial needs {group}, and each must fit on one node, but the largest of "
        f"{len(rooms)} nodes, {largest.name}, has {largest.cpus:g} CPUs and {largest.gpus:g} GPUs; "
        f"{way_out}"
    )


def in_words(rooms: Iterable[Room]) -> str:
    """All CPUs and GPUs of these nodes."""
    rooms = list(rooms)
    gpus = sum(room.gpus for room in rooms)
    return f"{sum(room.cpus for room in rooms):g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")


def _times(part: float, whole: float) -> int:
    """How often a part goes into a whole, to the ten-thousandth, as Ray counts."""
    return round(whole * 10_000) // round(part * 10_000)
