"""`status`: for people on any terminal, in a pipe, and for programs."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, Group
from rich.table import Table

from study.commands.terminal import fitted
from study.ledger import read_results, read_suggestions
from tests.synthetic import write_study
from tests.terminal import call

Capture = pytest.CaptureFixture[str]


def test_json_says_what_the_table_says(tmp_path: Path, capsys: Capture) -> None:
    folder = write_study(tmp_path / "platelets")
    write_study(tmp_path / "damaged", trials=3).suggestion(1).write_text("")
    assert call("status", "--json", "--storage", tmp_path) == 0
    damaged, sound = json.loads(capsys.readouterr().out)
    assert damaged["state"] == "damaged" and "000001.json" in damaged["problem"]
    assert (sound["study"], sound["begun"], sound["total"]) == ("platelets", 14, 29)
    assert sum(sound["outcomes"].values()) == len(read_results(folder))
    assert call("status", "platelets", "--json", "--storage", tmp_path) == 0
    one = json.loads(capsys.readouterr().out)
    assert (one["state"], one["begun"], one["total"]) == ("interrupted", 14, 29)
    assert [trial["trial"] for trial in one["trials"]] == [
        suggestion.trial for suggestion in read_suggestions(folder)
    ]
    first = one["trials"][0]
    assert first["outcome"] == "complete" and 0 < first["objectives"]["segment/miou"] < 1
    assert call("status", "platelets", "--json", "--follow", "--storage", tmp_path) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_a_table_in_a_pipe_is_as_wide_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    write_study(tmp_path / "platelets")
    assert call("status", "platelets", "--storage", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    head = next(line for line in printed.splitlines() if "trial " in line and "arm" in line)
    assert "segment/miou" in head and "settings" in head and "outcome" in head


def table() -> Table:
    table = Table(title="studies [b]here[/b]")
    for head in ("study", "settings", "segment/iou/platelet"):
        table.add_column(head)
    table.add_row("first", "masking.ratio.value=0.25, model.patch=4", "0.4538")
    table.add_row("second", "", "0.5317")
    return table


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_narrow_terminal_has_a_line_for_each_value(width: int) -> None:
    terminal = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    found = fitted(table(), terminal)
    terminal.print(found)
    printed = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(found, Group) == (width < 80)
    for word in ("segment/iou/platelet", "0.4538", "second", "model.patch=4", "studies here"):
        assert word in " ".join(printed.split())
    if width < 80:
        assert "settings: \n" not in printed  # of the second, which has none
