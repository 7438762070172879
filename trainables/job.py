"""A job: what the driver sends to a worker group, as plain JSON, and how a worker runs it.

The driver, and Ray Train's controller too, know the functions of this file; only workers call those
that train, and import what that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from trainables.config import ProbeConfig, TrialConfig
from trainables.context import Context, Row
from trainables.data import DataConfig, Dataset, default_cache, open_dataset, prepare
from trainables.data.source import Hears
from trainables.data.store import damage
from trainables.endings import Ending
from trainables.errors import UserError
from trainables.storage import mirror_of

if TYPE_CHECKING:
    import torch


def make_job(
    *,
    trial: str,
    config: dict[str, Any],
    seed: int,
    probe: ProbeConfig,
    rungs: list[float],
    folder: Path,
    remote: str,
    shared: Path | None,
    micro_batches: int,
    recomputes: bool,
    data: Any,
    data_root: Path,
    fingerprint: str,
) -> dict[str, Any]:
    """Everything a worker has to know of a trial; paths in it are never stored.

    `remote`: where the trial lies in a store of objects, if it does. `shared`: where pretrainings
    lie that trials of the study may share.
    """
    return {
        "trial": trial,
        "config": config,
        "seed": seed,
        "probe": probe.model_dump(mode="json"),
        "rungs": rungs,
        "folder": str(folder.resolve()),  # workers have working directories of their own
        "remote": remote,
        "shared": None if shared is None else str(shared.resolve()),
        "micro_batches": micro_batches,
        "recomputes": recomputes,
        "data": data.model_dump(mode="json", by_alias=True),
        "data_root": str(data_root.resolve()),
        "fingerprint": fingerprint,
    }


def run_job(
    job: dict[str, Any],
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    attempt: str,
    report: Callable[[list[Row]], bool],
    heartbeat: Callable[[str, float, float], None],
    saved: Callable[[float], None],
    alive: Callable[[], None],
    is_leaving: Callable[[str, int], bool],
    tell: Callable[[str], None],
) -> Ending:
    """Train the job's trial; see `run_trial` for what comes back.

    `tell` hears what goes on before it trains, for people.
    """
    from trainables.trial import run_trial

    context = Context(
        device=device,
        # of a store, every node has a mirror of its own
        folder=mirror_of(job["remote"]) if job["remote"] else Path(job["folder"]),
        remote=job["remote"],
        attempt=attempt,
        rungs=tuple(job["rungs"]),
        report=report,
        heartbeat=heartbeat,
        saved=saved,
        alive=alive,
        is_leaving=is_leaving,
        rank=rank,
        world_size=world_size,
        shared=None if job["shared"] is None else Path(job["shared"]),
        micro_batches=job["micro_batches"],
        recomputes=job["recomputes"],
    )

    def decoded(done: int, parts: int) -> None:
        alive()
        tell(f"its workers are decoding images: {done:,} of {parts:,} parts")

    dataset = _dataset_on_this_node(job, decoded)
    config = TrialConfig.model_validate(job["config"])
    probe = ProbeConfig.model_validate(job["probe"])
    return run_trial(config, job["seed"], dataset, probe, context)


def measure_peak(device: torch.device) -> float:
    """Operations per second that a worker could do; see `peak_flops`."""
    from trainables.speed import peak_flops

    return peak_flops(device)


def _dataset_on_this_node(job: dict[str, Any], decoded: Hears) -> Dataset:
    """The decoded data, from this node's cache or decoded here for all trials to come."""
    folder = default_cache() / job["fingerprint"]
    if damage(folder) is not None:
        config = TypeAdapter(DataConfig).validate_python(job["data"])
        folder = prepare(config, Path(job["data_root"]), default_cache(), decoded)
        if folder.name != job["fingerprint"]:
            raise UserError(
                f"{job['data_root']}: the data on this node differs from the driver's "
                f"({folder.name[:12]} instead of {job['fingerprint'][:12]}); every node must see "
                f"the same files"
            )
    return _open_once(folder)


@lru_cache(maxsize=2)
def _open_once(folder: Path) -> Dataset:
    return open_dataset(folder)
