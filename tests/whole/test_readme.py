"""The README keeps its promises.  pytest tests/whole/test_readme.py"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from study.__main__ import app
from study.loading import load_spec
from trainables.masking import MASKING

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PACKAGES = ("study", "trainables", "analysis", "cluster")
EXAMPLES = sorted((ROOT / "study" / "examples").glob("*.yaml"))


def test_the_first_command_stands_before_line_20_and_all_before_line_150() -> None:
    lines = README.splitlines()
    assert lines.index("```") < 19
    assert len(lines) < 150


def test_every_link_and_picture_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert links
    assert not missing


def test_every_command_exists() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    used = set(re.findall(r"^maskstudy (\w+)", README, re.MULTILINE))
    assert used
    assert used <= known


def test_the_file_tree_names_every_module() -> None:
    modules = {
        path.stem
        for package in PACKAGES
        for path in (ROOT / package).glob("*.py")
        if not path.stem.startswith("__")
    }
    in_blocks = "\n".join(README.split("```")[1::2])
    missing = [name for name in sorted(modules) if not re.search(rf"\b{name}\b", in_blocks)]
    assert not missing


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_sound_and_listed(path: Path) -> None:
    load_spec(path)
    assert path.name in README


def test_every_strategy_has_its_row_among_the_methods() -> None:
    methods = (ROOT / "docs" / "masking.md").read_text()
    assert [name for name in MASKING if f"| `{name}` |" not in methods] == []


def test_nothing_is_left_to_do_later() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX)\b")
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert not [path for path in sources if words.search(path.read_text())]
