"""Who may import whom.  pytest tests/whole/test_layers.py"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "analysis": {"analysis", "study", "trainables"},
    "study": {"study", "trainables", "cluster"},
    "trainables": {"trainables"},
    "cluster": {"cluster"},
}
REACHES_ACROSS = ("study/__main__.py", "study/console/")
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if name.startswith(REACHES_ACROSS):
        return
    ours = {module.split(".")[0] for module in imported(path)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[name.split("/")[0]]


def test_no_file_is_part_of_a_circle_of_imports() -> None:
    """Not even through what only type checkers import, or functions when they are called."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {name: named_in(path, set(files)) - {name} for name, path in files.items()}
    # whoever imports nobody that is left, or is imported by nobody, is part of no circle
    while free := [
        name
        for name, uses in graph.items()
        if not uses & graph.keys() or not any(name in others for others in graph.values())
    ]:
        for name in free:
            del graph[name]
    assert {name: sorted(uses & graph.keys()) for name, uses in graph.items()} == {}


def named_in(path: Path, modules: set[str]) -> set[str]:
    """The files that a file imports; of `from package import file` the file, not the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {whole if whole in modules else node.module} & modules
    return found


@pytest.mark.parametrize(
    ("module", "only"),
    [
        # a relay's process imports little else; a rival is played beside ours
        ("ray.tune", {"study/tune.py", "study/relay.py", "study/rivals.py"}),
        ("ray.train", {"trainables/slot.py"}),
    ],
)
def test_few_files_know_a_library_that_changes_often(module: str, only: set[str]) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(name == module or name.startswith(f"{module}.") for name in imported(path))
    }
    assert users == only


def test_commands_put_off_only_imports_that_their_first_line_would_wait_for() -> None:
    """`__main__` puts off the rest: it imports a command's file when the command is called."""

    def puts_off(path: Path) -> bool:
        functions = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef)
        ]
        inside = [node for function in functions for node in ast.walk(function)]
        return any(isinstance(node, ast.Import | ast.ImportFrom) for node in inside)

    files = (ROOT / "study" / "commands").glob("*.py")
    assert {path.name for path in files if puts_off(path)} == {"check.py", "init.py", "run.py"}


def test_one_file_reads_yaml() -> None:
    """Two would sooner or later differ in what `on` or `010` means."""
    users = {path.relative_to(ROOT).as_posix() for path in FILES if "yaml" in imported(path)}
    assert users == {"study/reader.py"}


@pytest.mark.parametrize("library", ["timm", "torchvision", "monai"])
def test_one_file_imports_what_we_compare_with(library: str) -> None:
    """At a call of `bench`: they cost seconds, and a user may not have them."""
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if library in {name.split(".")[0] for name in imported(path)}
    }
    assert users <= {"trainables/peers.py"}


OF_OS = {"fsync", "fdatasync", "rename", "renames", "replace"}
SYNC_OR_RENAME = {
    "cluster/doctor.py",  # tries on purpose what a storage can do
    "trainables/durable.py",
}


def syncs_or_renames(node: ast.AST) -> bool:
    """With `os` or with pathlib, whose `replace` takes one argument, where that of a text has two.

    A `rename` of pandas has a keyword.
    """
    match node:
        case ast.ImportFrom(module="os", names=found):
            return bool(OF_OS & {alias.name for alias in found})
        case ast.Attribute(value=ast.Name(id="os"), attr=name):
            return name in OF_OS
        case ast.Call(func=ast.Attribute(attr="rename" | "replace"), args=[_], keywords=[]):
            return True
    return False


def test_one_file_knows_how_a_write_survives_a_power_cut() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(map(syncs_or_renames, ast.walk(ast.parse(path.read_text()))))
    }
    assert found == SYNC_OR_RENAME


def test_a_file_of_the_ledger_imports_only_from_those_before_it() -> None:
    order = ["records", "files", "parts", "holding", "reading", "writing"]
    found = {path.stem: path for path in (ROOT / "study/ledger").glob("*.py")}
    assert found.keys() == {"__init__", *order}
    for number, name in enumerate(order):
        ours = {module.split(".")[2] for module in imported(found[name]) if "ledger." in module}
        assert ours <= set(order[:number]), name


def test_one_file_of_the_tests_imports_timm() -> None:
    users = [
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if "timm" in {name.split(".")[0] for name in imported(path)}
    ]
    assert users == ["timm_models.py"]


def test_a_worker_imports_nothing_that_it_does_not_train_with() -> None:
    """Each of these would cost every worker process from a tenth of a second to two seconds."""
    code = (
        "import sys, trainables.job; unused = ('ray', 'optuna', 'pandas', 'pyarrow', 'plotly',"
        "'timm', 'torchvision', 'monai', 'scipy.spatial', 'scipy.stats', 'sympy', 'torch._dynamo');"
        "print([name for name in unused if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_a_study_needs_neither_torch_nor_ray_nor_optuna() -> None:
    code = (
        "import sys, analysis.report, study.ledger;"
        "print([m for m in ('torch', 'ray', 'optuna', 'timm', 'monai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
