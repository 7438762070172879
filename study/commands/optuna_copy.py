"""`export --optuna`: the trials of a study, out to Optuna's own tools."""

from __future__ import annotations

import time

from study.commands.finding import find_study
from study.commands.terminal import say
from study.ledger import is_held, read_results, read_rows, read_suggestions
from study.loading import spec_of
from study.measured import measure
from study.optuna_copy import bring_up_to_date

FOLLOW_SECONDS = 5


def copy_trials(name: str, where: str, storage: str | None, *, follow: bool) -> None:
    """Bring a copy of the trials in one of Optuna's storages up to date; or keep it so."""
    while True:
        folder = find_study(name, storage)
        is_running = is_held(folder)
        found = (read_suggestions(folder), read_results(folder), measure(read_rows(folder)))
        number = bring_up_to_date(where, spec_of(folder), *found)
        if number:
            say(f"{where}: {number} of {len(found[0])} trials were new or had news")
        if not (follow and is_running):
            break
        time.sleep(FOLLOW_SECONDS)
    say(f"{where}: up to date; to look at it: optuna-dashboard {where}")
