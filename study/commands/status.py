"""`status`: where studies stand, read from their storage."""

from __future__ import annotations

import time

from rich.live import Live

from study import mirror
from study.commands.finding import find_study, storage_of
from study.commands.terminal import console, fitted, say, say_json, show
from study.ledger import is_held
from study.overview import arms_table, standing, standings, studies_table


def show_status(name: str | None, storage: str | None, *, follow: bool, as_json: bool) -> None:
    """A table of all studies of the storage, or of one study's arms; or JSON of the same."""
    if name is None:
        place = storage_of(storage)
        if as_json:
            say_json(standings(place))
            return
        table = studies_table(place)
        if table.row_count:
            show(table)
        else:
            say(f"no studies in {place}; another place: --storage DIR")
        return
    folder = find_study(name, storage)
    if as_json:
        say_json(standing(folder))
        return
    if not follow:
        show(arms_table(folder))
        return
    with Live(fitted(arms_table(folder), console), console=console, refresh_per_second=1) as live:
        while is_held(folder):
            time.sleep(2)
            mirror.pull(folder)
            live.update(fitted(arms_table(folder), console))
