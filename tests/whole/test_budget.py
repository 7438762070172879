"""The suite measures itself, and runs in any order.  pytest tests/whole/test_budget.py"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from tests import budget

pytest_plugins = ("pytester",)

BUDGETS = """\
default = 10
yardstick = 1000
[fast]
"tests/test_a.py" = 30
"tests/test_b.py" = 20
[ray]
"tests/test_a.py" = 100
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with other tests, to which the plugins of this one are given."""
    monkeypatch.setenv("PYTHONPATH", str(budget.BUDGETS.parent.parent))
    monkeypatch.delenv(budget.FACTOR, raising=False)
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\nmarkers = ['ray: starts something']")
    return pytester


@pytest.fixture
def budgets(tmp_path: Path) -> Path:
    path = tmp_path / "budgets.toml"
    path.write_text(BUDGETS)
    return path


def test_a_file_may_take_twice_its_budget_and_no_more(budgets: Path) -> None:
    costs = {
        "fast": {"tests/test_a.py": 60.0, "tests/test_b.py": 40.1, "tests/test_c.py": 20.0},
        "ray": {"tests/test_a.py": 199.0, "tests/test_b.py": 20.1},
    }
    assert budget.exceeded(costs, budgets, 1) == [
        "tests/test_b.py (fast): 40 s, of at most 2 x 20 s",
        "tests/test_b.py (ray): 20 s, of at most 2 x 10 s",
    ]
    assert budget.exceeded(costs, budgets, 1.1) == []


def test_a_machine_that_is_busier_still_may_have_more_and_the_line_says_by_how_much(
    budgets: Path,
) -> None:
    costs = {"fast": {"tests/test_a.py": 180.1, "tests/test_b.py": 119.9}}
    assert budget.exceeded(costs, budgets, 3) == [
        "tests/test_a.py (fast): 180 s, of at most 2 x 30 s x 3"
    ]


def test_a_slower_machine_has_as_much_more_and_a_faster_one_no_less(
    budgets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, slower in ((2500.0, 2.5), (400.0, 1.0)):
        monkeypatch.setattr(budget, "yardstick", lambda seconds=seconds: seconds)
        assert budget.slowness(budgets) == slower


def test_rewritten_budgets_are_what_was_measured_and_what_was_not_measured_stays(
    budgets: Path,
) -> None:
    costs = {"fast": {"tests/test_a.py": 31.0, "tests/test_c.py": 10.1, "tests/test_d.py": 9.9}}
    rewritten = tomllib.loads(budget.rewritten(budgets, costs))
    assert 0.001 < rewritten.pop("yardstick") < 10
    assert rewritten == {
        "default": 10,
        "fast": {"tests/test_a.py": 35, "tests/test_b.py": 20, "tests/test_c.py": 15},
        "ray": {"tests/test_a.py": 100},
        "chaos": {},
    }


def test_the_budgets_of_this_suite_name_files_that_are_there() -> None:
    given = tomllib.loads(budget.BUDGETS.read_text())
    del given["default"], given["yardstick"]
    files = {name for tier in given.values() for name in tier}
    assert files
    assert not [name for name in files if not (budget.BUDGETS.parent.parent / name).is_file()]


TESTS = {
    "test_slow": """
        import time, pytest

        @pytest.fixture(scope="session")
        def shared():
            time.sleep(0.5)

        def test_waits():
            time.sleep(0.3)

        def test_is_given_what_took_long(shared):
            pass

        @pytest.mark.ray
        def test_starts_something():
            time.sleep(0.1)
    """,
    "test_quick": "def test_does_nothing(): pass",
}


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "loadfile")])
def test_a_run_keeps_what_it_cost_and_fails_where_that_is_too_much(
    project: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    project.makepyfile(**TESTS)
    limits = project.path / "limits.toml"
    limits.write_text('default = 60\nyardstick = 1000\n[fast]\n"test_slow.py" = 0.1')
    options = ("-p", "tests.budget", f"--budgets={limits}", *workers)
    run = project.runpytest_subprocess if workers else project.runpytest_inprocess
    failed = run(*options)
    assert failed.ret == pytest.ExitCode.TESTS_FAILED
    failed.assert_outcomes(passed=4)
    printed = failed.stdout.str()
    assert "test_slow.py (fast): 0 s, of at most 2 x 0.1 s" in printed
    assert "test_quick.py" not in printed.partition("slower than their budget")[2]
    assert "test_slow.py (ray)" not in printed
    assert f"{budget.FACTOR}=3" in printed

    kept = json.loads((project.path / "build" / "durations.json").read_text())
    assert kept["fast"]["test_slow.py::test_waits"] >= 0.3
    assert kept["fast"]["test_slow.py::test_is_given_what_took_long"] < kept["shared"]["shared"]
    assert kept["shared"]["shared"] >= 0.5
    assert kept["ray"]["test_slow.py::test_starts_something"] >= 0.1

    assert run(*options, "--budget-factor=100", "-k", "waits or nothing").ret == 0
    later = json.loads((project.path / "build" / "durations.json").read_text())
    assert later["ray"], "what other runs have measured was forgotten"


def with_many_tests(project: pytest.Pytester) -> None:
    for name in "abcdef":
        tests = "\n".join(f"def test_{number}(): pass" for number in range(6))
        project.makepyfile(**{f"test_{name}": tests})


def test_files_and_the_tests_in_them_come_in_an_order_that_the_seed_repeats(
    project: pytest.Pytester,
) -> None:
    with_many_tests(project)

    def order(*options: str) -> list[str]:
        told = project.runpytest_inprocess("-p", "tests.order", "--collect-only", "-q", *options)
        return [line for line in told.outlines if "::" in line]

    first, again, other = order("--shuffle", "1"), order("--shuffle", "1"), order("--shuffle", "2")
    assert first == again
    assert first != other
    written = order("--shuffle", "no")
    assert sorted(first) == sorted(other) == sorted(written) == written
    files = [test.partition("::")[0] for test in first]
    assert [file for number, file in enumerate(files) if file != files[number - 1]] == list(
        dict.fromkeys(files)
    ), "a file is left and come back to"
    assert list(dict.fromkeys(files)) != sorted(files)


def test_workers_that_run_the_tests_together_have_them_in_one_order(
    project: pytest.Pytester,
) -> None:
    with_many_tests(project)
    run = project.runpytest_subprocess("-p", "tests.order", "-n", "2", "--dist", "loadfile")
    run.assert_outcomes(passed=36)


def test_an_order_that_nobody_asked_for_is_told_and_again_where_a_test_has_failed(
    project: pytest.Pytester,
) -> None:
    project.makepyfile("def test_fails(): assert False")
    told = project.runpytest_inprocess("-p", "tests.order").stdout.str()
    seeds = re.findall(r"^order of the tests: --shuffle (\d+)$", told, re.MULTILINE)
    assert len(seeds) == 2
    assert seeds[0] == seeds[1]
