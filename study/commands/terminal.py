"""Where commands print."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDEST = 10_000  # characters of a table in a file or pipe

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line as it is: nothing in it is markup."""
    console.print(text, markup=False)


def say_json(value: Any) -> None:
    """A value for programs."""
    say(json.dumps(value, indent=1, ensure_ascii=False))


def show(table: Table) -> None:
    """A table that loses nothing: in a pipe as wide as it is, on a narrow terminal row by row."""
    if console.is_terminal:
        console.print(fitted(table, console))
        return
    caption, table.caption = table.caption, None
    Console(file=console.file, width=_width(table)).print(table)
    if caption:
        console.print(caption)


def fitted(table: Table, console: Console) -> RenderableType:
    """The table, or, where it is wider than the terminal, a line for each of its values."""
    if not console.is_terminal or _width(table) <= console.width:
        return table
    lines = [Text.from_markup(str(table.title), style="bold italic")] if table.title else []
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        first, *others = zip(table.columns, cells, strict=True)
        lines.append(Text.from_markup(f"{first[0].header} {first[1]}", style="bold"))
        lines += [Text.from_markup(f"  {column.header}: {cell}") for column, cell in others if cell]
    if table.caption:
        lines.append(Text.from_markup(str(table.caption), style="dim italic"))
    return Group(*lines)


def _width(table: Table) -> int:
    """What the widest of its values take."""
    return Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
