"""How many trials have room on which nodes, and which Ray is refused.

pytest tests/cluster/test_placement.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from cluster.connect import _join, check_version
from cluster.errors import ClusterError
from cluster.placement import Room, WorkerGroup, in_words, num_groups, refusal, worker_group


def rooms(*sizes: tuple[float, float]) -> list[Room]:
    return [Room(f"node-{number}", cpus, gpus) for number, (cpus, gpus) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("nodes", "group", "expected"),
    [
        ([(2, 0)], WorkerGroup(1, 1, 0), 2),
        ([(2, 0)], WorkerGroup(2, 1, 0), 1),
        ([(16, 4)], WorkerGroup(2, 1, 1), 2),
        ([(16, 1)], WorkerGroup(1, 1, 0.25), 4),
        ([(16, 4)], WorkerGroup(1, 8, 1), 2),
        ([(16, 4)], WorkerGroup(1, 1, 0.6), 4),  # two of 0.6 on one GPU are more than it
        ([(16, 0.7)], WorkerGroup(1, 1, 0.6), 1),  # free beside somebody else
        ([(16, 4)], WorkerGroup(1, 1, 2), 2),
        ([(3, 0), (3, 0)], WorkerGroup(1, 2, 0), 2),  # 6 CPUs, but no third worker of 2
        ([(1, 0), (1, 0), (1, 0)], WorkerGroup(2, 1, 0), 1),  # over two nodes
        ([(8, 0), (1, 4)], WorkerGroup(1, 4, 1), 0),  # CPUs here, GPUs there
        ([(0, 0), (4, 0)], WorkerGroup(2, 0.1, 0), 20),  # tenths, counted exactly
        ([(2000, 0)], WorkerGroup(1, 1, 0), 1000),
    ],
)
def test_trials_are_counted_by_workers_that_are_whole_on_a_node(
    nodes: list[tuple[float, float]], group: WorkerGroup, expected: int
) -> None:
    assert num_groups(rooms(*nodes), group) == expected
    assert (refusal(rooms(*nodes), group) is None) == (expected > 0)


def test_gpus_that_are_there_are_used_where_they_are_enough() -> None:
    mixed = [Room("a", 8, 0), Room("b", 8, 1), Room("c", 8, 1)]
    assert worker_group(2, 1, None, mixed) == WorkerGroup(2, 1, 1.0)
    assert worker_group(3, 1, None, mixed) == WorkerGroup(3, 1, 0.0)
    assert worker_group(1, 1, None, []) == WorkerGroup(1, 1, 0.0)
    assert worker_group(1, 1, 0.5, mixed[:1]) == WorkerGroup(1, 1, 0.5)


def test_a_worker_that_fits_on_no_node_is_refused_with_the_largest() -> None:
    told = refusal(rooms((3, 0), (4, 0), (2, 0)), WorkerGroup(2, 6, 0))
    assert told is not None
    assert "2 workers with 6 CPUs each" in told
    assert "the largest of 3 nodes, node-1, has 4 CPUs" in told
    assert "resources.autoscale" in told


def test_a_gang_of_which_a_part_fits_is_refused_with_that_part() -> None:
    told = refusal(rooms((2, 0), (1, 0)), WorkerGroup(4, 1, 0))
    assert told is not None
    assert "all nodes together hold 3 of them" in told


def test_what_nodes_have_is_told_without_gpus_that_are_not_there() -> None:
    assert in_words(rooms((2, 0), (1.5, 0))) == "3.5 CPUs"
    assert in_words(rooms((2, 1), (1, 0))) == "3 CPUs, 1 GPUs"


def test_a_ray_with_known_advisories_is_refused() -> None:
    check_version("2.55.0")
    check_version("3.0.0")
    with pytest.raises(ClusterError, match=r"2\.54\.1 .* at least 2\.55"):
        check_version("2.54.1")


@pytest.mark.parametrize("told", [ConnectionError("no head"), RuntimeError("another Ray")])
def test_a_head_that_cannot_be_joined_is_told_and_a_defect_is_not(
    told: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(error: Exception, **_: Any) -> None:
        raise error

    monkeypatch.setattr("ray.init", partial(init, told))
    with pytest.raises(ClusterError, match=f"Ray at 10.0.0.9:6379: {told}; expected a head"):
        _join("10.0.0.9:6379", {})
    monkeypatch.setattr("ray.init", partial(init, TypeError("ours")))
    with pytest.raises(TypeError, match="ours"):
        _join("10.0.0.9:6379", {})
