"""`status`: where studies stand, read from their storage."""

from __future__ import annotations

import time

from rich.live import Live

from study import mirror
from study.commands.finding import find_study, storage_of
from study.commands.terminal import console
from study.ledger import is_held
from study.overview import arms_table, studies_table


def show_status(name: str | None, storage: str | None, *, follow: bool) -> None:
    """A table of all studies of the storage, or of one study's arms."""
    if name is None:
        console.print(studies_table(storage_of(storage)))
        return
    folder = find_study(name, storage)
    if not follow:
        console.print(arms_table(folder))
        return
    with Live(arms_table(folder), console=console, refresh_per_second=1) as live:
        while is_held(folder):
            time.sleep(2)
            mirror.pull(folder)
            live.update(arms_table(folder))
