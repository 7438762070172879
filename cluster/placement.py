"""How many trials run at once."""

from __future__ import annotations

import math


def num_slots(
    *,
    cpus: float,
    gpus: float,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    asked: int | None,
) -> int:
    """Trials that fit side by side; `asked` is the user's upper limit.

    Raises ValueError when not even one fits.
    """
    fits = math.inf
    if cpus_per_worker:
        fits = min(fits, cpus // (workers * cpus_per_worker))
    if gpus_per_worker:
        fits = min(fits, gpus / (workers * gpus_per_worker))
    if fits < 1:
        raise ValueError(
            f"a trial needs {workers} workers with {cpus_per_worker:g} CPUs and "
            f"{gpus_per_worker:g} GPUs each, but the cluster has {cpus:g} CPUs and {gpus:g} GPUs; "
            f"lower `resources:` in the study, or add nodes"
        )
    return int(min(fits, asked or math.inf, 1000))
