"""What may be the next thing to do in a study: what resume.py decides, and the driver does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from study.ledger import Suggestion
from trainables.config import TrialConfig


@dataclass(frozen=True)
class Continue:
    """Run this trial (on): it was suggested and has not ended."""

    suggestion: Suggestion


@dataclass(frozen=True)
class Start:
    """Suggest and run a trial whose configuration is known."""

    origin: str
    config: TrialConfig
    seed: int
    params: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    born: dict[str, Any] | None = None  # into a population; see Suggestion


@dataclass(frozen=True)
class Enqueued:
    """An arm that a person asked for; `spec.budget` has room for its seeds."""

    config: TrialConfig
    params: dict[str, Any]
    labels: dict[str, Any]


@dataclass(frozen=True)
class AskSampler:
    """Suggest and run a new arm with this seed. `number` is what Optuna is to be asked with.

    `fits`: whether the budget has room for an arm; None: for any.
    """

    number: int
    seed: int
    fits: Callable[[TrialConfig], bool] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Wait:
    """Nothing can be started before a running trial ends."""


@dataclass(frozen=True)
class Finished:
    """Nothing is left."""


Step = Continue | Start | AskSampler | Wait | Finished
