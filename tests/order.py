"""The order of the tests: another one in every run, so that none can come to need the one before.

Files are shuffled, and the tests of each file among themselves: what a module sets up once stays
set up once. The seed is printed; `--shuffle SEED` repeats an order, `--shuffle no` is as written.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

AS_WRITTEN = "no"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("order")
    group.addoption("--shuffle", metavar="SEED", help=f"of the order; {AS_WRITTEN}: as written")


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", {}).get("shuffle") or config.option.shuffle
    config.option.shuffle = given or str(random.SystemRandom().randrange(10**6))


@pytest.hookimpl(optionalhook=True)  # of xdist, whose workers have to come to the same order
def pytest_configure_node(node: Any) -> None:
    node.workerinput["shuffle"] = node.config.option.shuffle


def pytest_report_header(config: pytest.Config) -> str:
    return f"order of the tests: --shuffle {config.option.shuffle}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    if exitstatus:
        terminalreporter.write_line(pytest_report_header(config))


@pytest.hookimpl(tryfirst=True)  # pytest then brings together what shares a parametrised fixture
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.option.shuffle
    if seed != AS_WRITTEN:
        items[:] = shuffled(items, seed)


def shuffled(items: list[pytest.Item], seed: str) -> list[pytest.Item]:
    """Files in any order, and in each its tests in any order."""
    chance = random.Random(seed)
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    paths = sorted(files)
    chance.shuffle(paths)
    return [item for path in paths for item in chance.sample(files[path], len(files[path]))]
