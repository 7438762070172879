"""How many trials run at once, and which Ray is refused.  pytest tests/test_placement.py"""

from __future__ import annotations

import pytest

from cluster.connect import check_version
from cluster.placement import num_slots


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "cpus_each", "gpus_each", "asked", "expected"),
    [
        (2, 0, 1, 1, 0, None, 2),
        (2, 0, 2, 1, 0, None, 1),
        (16, 4, 2, 1, 1, None, 2),
        (16, 1, 1, 1, 0.25, None, 4),
        (16, 4, 1, 8, 1, None, 2),
        (16, 0, 1, 1, 0, 3, 3),
    ],
)
def test_as_many_trials_as_fit_and_no_more_than_asked(
    cpus: float,
    gpus: float,
    workers: int,
    cpus_each: float,
    gpus_each: float,
    asked: int | None,
    expected: int,
) -> None:
    found = num_slots(
        cpus=cpus,
        gpus=gpus,
        workers=workers,
        cpus_per_worker=cpus_each,
        gpus_per_worker=gpus_each,
        asked=asked,
    )
    assert found == expected


def test_a_trial_that_does_not_fit_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"needs 4 workers .* has 2 CPUs and 0 GPUs"):
        num_slots(cpus=2, gpus=0, workers=4, cpus_per_worker=1, gpus_per_worker=0, asked=None)


def test_a_ray_with_known_advisories_is_refused() -> None:
    check_version("2.55.0")
    check_version("3.0.0")
    with pytest.raises(RuntimeError, match=r"2\.54\.1 .* at least 2\.55"):
        check_version("2.54.1")
