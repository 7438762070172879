"""`doctor`: whether a machine or a cluster is sound and safe for studies."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from cluster.doctor import Level, Verdict, cluster_verdicts, machine_verdicts
from study.commands.finding import storage_of
from study.commands.terminal import show
from study.ledger import damage
from study.overview import studies
from trainables.data import default_cache

_COLOURS = {Level.OK: "", Level.WARNING: "yellow", Level.PROBLEM: "red"}  # the words say it too


def show_verdicts(address: str | None, storage: str | None) -> int:
    """A table of verdicts on a cluster or on this machine; 1 if there is a problem."""
    place = storage_of(storage)
    if address:
        given = str(place.absolute()) if storage is not None else None
        verdicts = cluster_verdicts(address, given)
    else:
        verdicts = machine_verdicts(place.remote or place.folder, default_cache())
        is_there = all(verdict.level is not Level.PROBLEM for verdict in verdicts)
        for folder in studies(place) if is_there or not place.remote else []:
            for error in damage(folder):
                name = f"study {folder.root.name}"
                verdicts.append(Verdict(name, Level.PROBLEM, str(error), "as it says"))
    table = Table(title=f"{address or 'this machine'}", show_lines=True)
    for column in ("question", "verdict", "found", "way out"):
        table.add_column(column)
    for verdict in verdicts:
        table.add_row(*map(escape, verdict), style=_COLOURS[verdict.level])
    show(table)
    return int(any(verdict.level is Level.PROBLEM for verdict in verdicts))
