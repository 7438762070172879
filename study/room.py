"""What else a budget in operations or hours has room for, beside what is owed (owed.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from study.best import FRESH, VERDICT, to_confirm, to_judge
from study.ledger import Result, Suggestion
from study.measured import Measured
from study.owed import (
    confirmations,
    control_arms,
    ended_badly,
    is_unfinished,
    missing_seeds,
    searched,
    seeds_of_verdict,
    seeds_to_confirm,
    verdict,
)
from study.spending import Account, Amounts, Planned, fits, is_spent
from study.steps import Enqueued, Start
from trainables.config import TrialConfig, arm_id

if TYPE_CHECKING:
    from study.spec import StudySpec


@dataclass(frozen=True)
class Room:
    """What else a budget in operations or hours has room for."""

    spec: StudySpec
    suggestions: Sequence[Suggestion]
    results: Mapping[str, Result]
    measured: Measured
    enqueued: Sequence[Enqueued]
    account: Account
    is_labelled: bool

    @property
    def is_left(self) -> bool:
        """Whether there is any beside what is owed: seeds of begun arms, and confirmations."""
        return not is_spent(self.spec.budget, self._as_it_is)

    def is_in_time(self, start: Start) -> bool:
        """Whether a seed that an arm is to get is expected to end within the wall time.

        Whoever asks for an arm wants it all the same; of what else is limited the arm has its part.
        """
        arm, limit = arm_id(start.config), self.spec.budget.wall_hours
        if limit is None or any(arm == arm_id(each.config) for each in self.enqueued):
            return True
        return self._added(start).wall_hours <= limit

    def holds(self, start: Start) -> bool:
        """Whether there is room for one more confirmation."""
        return fits(self.spec.budget, self.account.expected(), self._added(start))

    def holds_verdict(self, starts: Sequence[Start]) -> bool:
        """Whether there is room for all of them, or this arm's have begun: a part says nothing."""
        winner = to_judge(self.spec, self.suggestions, self.results, self.measured)
        if any((each.origin, each.arm) == (VERDICT, winner) for each in self.suggestions):
            return True
        return fits(self.spec.budget, self.account.expected(), self._added(*starts))

    def _added(self, *starts: Start) -> Amounts:
        return self.account.expected([_planned(start) for start in starts])

    def holds_arm(self, config: TrialConfig) -> bool:
        """Whether there is room for all seeds of a new arm, even if it is to be confirmed."""
        arm, seed = arm_id(config), self.spec.seed
        new = [Planned(arm, config, seed + index) for index in range(self.spec.seeds)]
        added = self.account.expected([*self._owed, *new], self._to_confirm([(arm, config)]))
        return fits(self.spec.budget, self._as_it_is, added)

    def is_confirming(self, running: AbstractSet[str]) -> bool:
        """Whether the search is over for now: what has begun to be confirmed comes first."""
        confirming = [each for each in self.suggestions if each.origin in FRESH]
        if not confirming or any(each.trial in running for each in confirming):
            return bool(confirming)
        known = (self.spec, self.suggestions, self.results, self.measured)
        if any(map(self.holds, confirmations(*known))):
            return True
        judging = list(verdict(*known, self.is_labelled))
        return bool(judging) and self.holds_verdict(judging)

    @cached_property
    def _owed(self) -> list[Planned]:
        """Seeds that arms are to get: of those that were begun, unless one has ended badly."""
        known = (self.spec, self.suggestions, self.results, self.enqueued)
        return [_planned(start) for start in missing_seeds(*known, is_to_come=True)]

    @cached_property
    def _as_it_is(self) -> Amounts:
        """What will be taken if no other arm begins."""
        return self.account.expected(self._owed, self._to_confirm(()))

    def _to_confirm(self, new: Sequence[tuple[str, TrialConfig]]) -> list[Planned]:
        """The fresh seeds to come, of the dearest arms that may be among the best by then."""
        confirm = self.spec.confirm
        if confirm is None:
            return []
        arms, seeds = [*self._candidates, *new], seeds_to_confirm(self.spec)
        candidates = [self._fresh(arm, config, seeds) for arm, config in arms]
        found = sorted(candidates, key=self._flops, reverse=True)[: confirm.arms]
        if confirm.verdict is None:
            found.append(self._fresh(arm_id(self.spec.trial), self.spec.trial, seeds))
        else:
            seeds = seeds_of_verdict(self.spec)
            judged = [self._fresh(arm, config, seeds) for arm, config in arms]
            found += sorted(judged, key=self._flops, reverse=True)[:1]
            for config in control_arms(self.spec, self.is_labelled).values():
                found.append(self._fresh(arm_id(config), config, seeds))
        return [each for arm in found for each in arm]

    @cached_property
    def _candidates(self) -> list[tuple[str, TrialConfig | dict[str, Any]]]:
        """Arms that may be confirmed: the best ones so far, and those whose trials still run."""
        assert self.spec.confirm is not None
        ranked = to_confirm(self.spec, self.suggestions, self.results, self.measured)
        best = set(ranked[: self.spec.confirm.arms])
        found: list[tuple[str, TrialConfig | dict[str, Any]]] = []
        for arm, trials in searched(self.suggestions).items():
            is_open = any(is_unfinished(self.results.get(each.trial)) for each in trials)
            if arm in best or (is_open and not ended_badly(trials, self.results)):
                found.append((arm, trials[0].config))
        return found

    def _fresh(self, arm: str, config: TrialConfig | dict[str, Any], seeds: range) -> list[Planned]:
        begun = {each.seed for each in self.suggestions if each.arm == arm}
        return [Planned(arm, config, seed) for seed in seeds if seed not in begun]

    def _flops(self, planned: Sequence[Planned]) -> float:
        return self.account.expected(planned).flops


def _planned(start: Start) -> Planned:
    return Planned(arm_id(start.config), start.config, start.seed)
