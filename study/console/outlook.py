"""How many trials a study will have, and whether any is left to run.

Judging a study asks its sampler, with all of its trials before it, which may take seconds; so this
is done in a thread, and until then the numbers of the file stand for the plan.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import pandas as pd

from study import requests
from study.console.index import Snapshot
from study.ledger import COLUMNS, read_stints
from study.loading import begun_by, parse_spec
from study.measured import Measured, measure
from study.state import Outlook, outlook

log = logging.getLogger(__name__)


class Outlooks:
    """The newest outlook of each study; a study is judged anew when something has changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, Outlook]] = {}  # name -> what it rests on, and it
        self._judging: set[str] = set()
        self._lock = threading.Lock()

    def of(self, found: Snapshot) -> Outlook:
        """The outlook as far as it is known; a new one is begun if the old one is stale."""
        about = (
            len(found.suggestions),
            tuple((trial, result.outcome) for trial, result in found.results.items()),
            found.is_read,
            found.is_held,
            hash(found.spec_text),
            found.asked,
        )
        with self._lock:
            before = self._known.get(found.name)
            if before is not None and before[0] == about:
                return before[1]
            if found.spec_text and found.is_read and found.name not in self._judging:
                self._judging.add(found.name)
                threading.Thread(target=self._judge, args=(found, about), daemon=True).start()
        is_over = None if before is None or found.is_held else before[1].is_finished
        if before is None:
            return Outlook(_total_of_file(found.spec), is_over)
        return before[1]._replace(is_finished=is_over)

    def _judge(self, found: Snapshot, about: object) -> None:
        try:
            judged = judge(found)
        except Exception:  # such as a file of another version: its own numbers have to do
            log.warning("%s cannot be judged", found.name, exc_info=True)
            judged = Outlook(_total_of_file(found.spec), None)
        with self._lock:
            self._known[found.name] = (about, judged)
            self._judging.discard(found.name)


def judge(found: Snapshot) -> Outlook:
    """The outlook of a study as it was seen."""

    def measured() -> Measured:
        rows = pd.concat(found.rows) if found.rows else pd.DataFrame(columns=list(COLUMNS))
        return measure(rows)

    asked = parse_spec(
        found.spec_text,
        found.folder.root,
        where=str(found.folder.spec),
        defaults=begun_by(found.environment),
    )
    answers = requests.expected(found.folder, asked)
    return outlook(
        asked,
        answers,
        found.suggestions,
        found.results,
        measured,
        found.environment,
        read_stints(found.folder),
        is_remote=bool(found.folder.remote),
    )


def _total_of_file(spec: dict[str, Any]) -> int | None:
    """As the file has it, without what has been asked for since; None: more than `trials` tells."""
    budget = spec.get("budget")
    trials = budget.get("trials") if isinstance(budget, dict) and len(budget) == 1 else None
    is_all = isinstance(trials, int) and spec.get("confirm") is None
    return trials if is_all else None
