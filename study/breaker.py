"""Whether a study had better stop: whatever it has tried so far has failed in one and the same way.

A mistake that every arm shares (a batch beyond any memory, a rate at which nothing learns, a
missing package) would else cost the whole budget.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from study.ledger import Outcome, Result
from study.resume import is_infrastructure

FIRST = 5  # trials of a driver that have to fail alike
BAD = {Outcome.DIVERGED, Outcome.OUT_OF_MEMORY, Outcome.FAILED}


def failing_alike(ended: Sequence[Result]) -> str | None:
    """How all of the first trials have failed, in words; None: they have not, or not alike.

    `ended`: in the order in which they did. What the infrastructure did to them does not count.
    """
    first = [result for result in ended if not is_infrastructure(result)][:FIRST]
    kinds = {(result.outcome, _kind(result.error)) for result in first}
    if len(first) < FIRST or len(kinds) > 1 or first[0].outcome not in BAD:
        return None
    reason = _last_line(first[0].error)
    return f"{first[0].outcome}" + (f" ({reason})" if reason else "")


def _last_line(error: str | None) -> str:
    lines = [line.strip() for line in (error or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _kind(error: str | None) -> str:
    """What is left of an error once the numbers in it are the same."""
    return re.sub(r"\d+(\.\d+)?", "0", _last_line(error))
