"""How many trials a study will have, and whether any is left to run.

Judging a study asks its sampler, with all of its trials before it, which may take seconds; so this
is done in a thread, and until then the numbers of the file stand for the plan.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, NamedTuple

import pandas as pd

from study import requests
from study.console.index import Snapshot
from study.ledger import COLUMNS
from study.resume import AskSampler, Finished, Step, next_step, num_planned
from study.samplers import Brain
from study.spec import parse_spec
from study.stopping import collect

log = logging.getLogger(__name__)


class Outlook(NamedTuple):
    total: int
    is_finished: bool | None  # None: not known yet


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
        return Outlook(before[1].total if before else _total_of_file(found.spec), is_over)

    def _judge(self, found: Snapshot, about: object) -> None:
        try:
            outlook = judge(found)
        except Exception:  # such as a file of another version: its own numbers have to do
            log.warning("%s cannot be judged", found.name, exc_info=True)
            outlook = Outlook(_total_of_file(found.spec), None)
        with self._lock:
            self._known[found.name] = (about, outlook)
            self._judging.discard(found.name)


def judge(found: Snapshot) -> Outlook:
    """Decided as the driver decides, from the ledger alone."""
    asked = parse_spec(found.spec_text, found.folder.root, where=str(found.folder.spec))
    answers = requests.expected(found.folder, asked)
    spec = requests.grown(asked, answers)
    rows = pd.concat(found.rows) if found.rows else pd.DataFrame(columns=list(COLUMNS))
    records = rows[["trial", "phase", "metric", "progress", "value"]].to_dict("records")
    measured = collect({str(key): value for key, value in record.items()} for record in records)

    def step(is_exhausted: bool) -> Step:
        return next_step(
            spec,
            found.suggestions,
            found.results,
            set(),
            measured,
            enqueued=requests.queue(answers),
            is_labelled=_is_labelled(found.environment),
            is_exhausted=is_exhausted,
        )

    left = step(is_exhausted=False)
    if isinstance(left, AskSampler) and not found.is_held:
        brain = Brain(spec)
        brain.replay(found.suggestions, found.results, measured)
        if brain.ask(left.number) is None:
            left = step(is_exhausted=True)
    is_finished = isinstance(left, Finished)
    return Outlook(len(found.suggestions) if is_finished else num_planned(spec), is_finished)


def _is_labelled(environment: dict[str, Any]) -> bool:
    data = environment.get("data")
    images = data.get("images") if isinstance(data, dict) else None
    return not isinstance(images, dict) or images.get("train") != 0


def _total_of_file(spec: dict[str, Any]) -> int:
    """As the file has it, without what has been asked for since."""

    def number(settings: object, key: str) -> int:
        value = settings.get(key) if isinstance(settings, dict) else None
        return value if isinstance(value, int) and 0 <= value < 10**6 else 0

    confirm = spec.get("confirm")
    confirmed = (number(confirm, "arms") + 1) * number(confirm, "seeds")
    return number(spec.get("budget"), "trials") + (confirmed if confirm else 0)
