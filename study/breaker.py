"""Whether a study had better stop: whatever it has tried so far has failed in one and the same way.

A mistake that every arm shares (a batch beyond any memory, a rate at which nothing learns, a
missing package) would else cost the whole budget.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from study.ledger import Outcome, Result
from study.owed import is_infrastructure

FIRST, ARMS = 5, 3  # trials of a driver that have to fail alike, and arms that they are of
BAD = {Outcome.DIVERGED, Outcome.OUT_OF_MEMORY, Outcome.FAILED}


def failing_alike(ended: Sequence[tuple[str, Result]]) -> str | None:
    """How all trials so far have failed, in words; None: they have not, not alike, or are few.

    `ended`: arms, and how their trials did. What the infrastructure did to them does not count.
    """
    ours = [(arm, result) for arm, result in ended if not is_infrastructure(result)]
    kinds = {(result.outcome, _kind(result.error)) for _, result in ours}
    if len(ours) < FIRST or len({arm for arm, _ in ours}) < ARMS or len(kinds) > 1:
        return None
    _, first = ours[0]
    reason = _last_line(first.error)
    words = f"{first.outcome} ({reason})" if reason else str(first.outcome)
    return words if first.outcome in BAD else None


def _last_line(error: str | None) -> str:
    lines = [line.strip() for line in (error or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _kind(error: str | None) -> str:
    """What is left of an error once the numbers in it are the same."""
    return re.sub(r"\d+(\.\d+)?", "0", _last_line(error))
