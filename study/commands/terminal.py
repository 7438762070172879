"""Where commands print."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line as it is: nothing in it is markup."""
    console.print(text, markup=False)
