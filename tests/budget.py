"""What each test file may cost: measured in every run, kept, and held to tests/budgets.toml.

    python -m tests.budget build/durations.json     rewrites the budgets from what was measured

A run fails when the tests of one file take more than twice what is budgeted for them. Budgets are
seconds on two quiet cores; where it is less quiet, MASKSTUDY_BUDGET_FACTOR=3 (or --budget-factor 3)
allows for it, and a machine that is slower than theirs has as much more. Fixtures of the whole
session are counted apart: which file comes to set them up is chance. Tests that start Ray and the
long ones have budgets of their own, as they are run apart; of each of the long ones the mark says
how many minutes it takes, and so does a run of it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

BUDGETS = Path(__file__).with_name("budgets.toml")
TOLERANCE = 2
FACTOR = "MASKSTUDY_BUDGET_FACTOR"
ROUNDED_TO = 5  # seconds
TIERS = ("chaos", "ray")  # by the marker; what has none of them is fast

Costs = Mapping[str, Mapping[str, float]]  # tier -> file -> seconds

HEAD = """\
# Seconds that the tests of a file may take on two quiet cores; twice as many fail the run.
# Rewritten from a run of all tests by: python -m tests.budget build/durations.json
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("budget")
    factor = float(os.environ.get(FACTOR, "1"))
    group.addoption("--budget-factor", type=float, default=factor, help="for a busy machine: 3")
    group.addoption("--budgets", type=Path, default=BUDGETS, help="seconds by test file")
    group.addoption(
        "--durations-file", type=Path, default=None, help="default: build/durations.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Meter(config), "meter")


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    marks = [(item.get_closest_marker("chaos"), item.nodeid) for item in items]
    return [f"takes about {mark.args[0]} min: {name}" for mark, name in marks if mark]


class Meter:
    """Adds up what tests cost. In a worker of xdist it only says which time was shared."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.is_worker = hasattr(config, "workerinput")
        self.file = config.option.durations_file or config.rootpath / "build" / "durations.json"
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.shared: dict[str, float] = defaultdict(float)
        self.begun: dict[str, float] = {}  # session fixtures that the present phase has set up
        self.is_last = False
        self.excess: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        began = time.perf_counter()
        try:
            return (yield)
        finally:
            if fixturedef.scope == "session":
                self.begun[fixturedef.argname] = time.perf_counter() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, nextitem: pytest.Item | None) -> Iterator[None]:
        self.is_last = nextitem is None
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        report.shared, self.begun = self.begun, {}  # goes to xdist's controller with the report
        if call.when == "teardown" and self.is_last:  # whatever was left is shut down
            report.shared = {"the end": report.duration}
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        shared = getattr(report, "shared", {})  # none of a worker that has died
        tier = next((name for name in TIERS if name in report.keywords), "fast")
        self.seconds[tier][report.nodeid] += max(0.0, report.duration - sum(shared.values()))
        for name, seconds in shared.items():
            self.shared[name] += seconds

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.is_worker or not self.seconds:
            return
        keep(self.file, self.seconds, self.shared)
        factor = self.config.option.budget_factor * slowness(self.config.option.budgets)
        self.excess = exceeded(by_file(self.seconds), self.config.option.budgets, factor)
        if self.excess and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.excess:
            terminalreporter.section("slower than their budget", red=True)
            terminalreporter.write_line("\n".join(self.excess))
            terminalreporter.write_line(
                f"A machine that is busy or slow may have more: {FACTOR}=3. If that is what the "
                f"tests cost now, run all and then: python -m tests.budget {self.file}"
            )


def by_file(seconds: Costs) -> dict[str, dict[str, float]]:
    """Seconds of all tests of a file, from those of each test."""
    found: dict[str, dict[str, float]] = {}
    for tier, tests in seconds.items():
        files = found.setdefault(tier, defaultdict(float))
        for test, each in tests.items():
            files[test.partition("::")[0]] += each
    return found


def slowness(budgets: Path) -> float:
    """How many times slower this machine is than that of the budgets; 1: not at all."""
    return max(1.0, yardstick() / tomllib.loads(budgets.read_text())["yardstick"])


def yardstick() -> float:
    """Seconds of a fixed piece of Python, the shortest of several: load is another matter."""
    spent = []
    for _ in range(5):
        began, total = time.perf_counter(), 0
        for number in range(10**6):
            total += number % 7
        spent.append(time.perf_counter() - began)
    return min(spent)


def exceeded(costs: Costs, budgets: Path, factor: float) -> list[str]:
    """A line for every file that took more than twice its budget."""
    given = tomllib.loads(budgets.read_text())
    found = []
    for tier, files in costs.items():
        for name, seconds in sorted(files.items()):
            budget = given.get(tier, {}).get(name, given["default"])
            if seconds > TOLERANCE * factor * budget:
                limit = f"{TOLERANCE} x {budget} s" + (f" x {factor:.2g}" if factor != 1 else "")
                found.append(f"{name} ({tier}): {seconds:.0f} s, of at most {limit}")
    return found


def keep(file: Path, seconds: Costs, shared: Mapping[str, float]) -> None:
    """Write down what this run cost, beside what other runs have written of other tests."""
    known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    for tier, tests in {**seconds, "shared": shared}.items():
        costs = {**known.get(tier, {}), **{test: round(each, 2) for test, each in tests.items()}}
        known[tier] = dict(sorted(costs.items(), key=lambda item: -item[1]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known, indent=1) + "\n")


def rewritten(budgets: Path, costs: Costs) -> str:
    """The budgets after a measurement; files and tiers that it does not know keep theirs."""
    given = tomllib.loads(budgets.read_text())
    default, _ = given.pop("default"), given.pop("yardstick")
    for tier, files in costs.items():
        known = {name: each for name, each in given.get(tier, {}).items() if name not in files}
        measured = {name: rounded(each) for name, each in files.items() if each > default}
        given[tier] = {**known, **measured}
    lines = [
        f"{HEAD}default = {default} # of a file that is not named",
        f"yardstick = {yardstick():.3f} # seconds of a fixed piece of work on that machine",
    ]
    for tier in ("fast", "ray", "chaos"):
        lines += ["", f"[{tier}]"]
        lines += [f'"{name}" = {each}' for name, each in sorted(given.get(tier, {}).items())]
    return "\n".join(lines) + "\n"


def rounded(seconds: float) -> int:
    return ROUNDED_TO * math.ceil(seconds / ROUNDED_TO)


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text())
    del measured["shared"]
    BUDGETS.write_text(rewritten(BUDGETS, by_file(measured)))
