"""What happens to a study, step by step: the next trial, its rows, its end. Knows no Ray.

Every event is written to the ledger before anybody is told of it. Thread-free: one caller.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study import breaker, population, requests
from study.best import in_short, of_study
from study.costs import Costs
from study.fit import DataSize
from study.gain import best_gain, gains
from study.ledger import (
    REPORTED,
    Answer,
    Ledger,
    Outcome,
    Result,
    Stint,
    Suggestion,
    read_answers,
    read_results,
    read_rows,
    read_stints,
    read_suggestions,
)
from study.measured import Measured, measure, rung_of
from study.optuna_study import OptunaStudy
from study.owed import ended, infrastructure_error, is_unfinished
from study.population import Order
from study.progress import Progress, arm_text, describe
from study.resume import (
    account_of,
    next_step,
    num_counted,
    num_planned,
    num_pretrainings,
    shares_pretraining,
)
from study.spec import StudySpec
from study.spending import Means, in_words
from study.steps import AskSampler, Continue, Finished, Start, Step, Wait
from study.stopping import FEWEST_FINALS, Rung, best_foreteller, goes_on, rung_at
from trainables.config import TrialConfig, arm_id, completed, trial_id
from trainables.endings import Ending
from trainables.fillings import Gain
from trainables.inheritance import inherit
from trainables.job import make_job
from trainables.metrics import PHASES, STOPPED_HERE, metric_of

POLL_SECONDS = 5.0  # between two looks at the clock of who only asks what is next


@dataclass(frozen=True)
class DataView:
    """What the driver knows of the study's data."""

    root: Path  # the folder that relative paths count from
    fingerprint: str
    is_labelled: bool
    size: DataSize | None = None  # None: budgets are in trials


class Conductor:
    """The study's state in memory, rebuilt from the ledger at the start."""

    def __init__(
        self,
        spec: StudySpec,
        ledger: Ledger,
        data: DataView,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.asked = spec  # the study file
        self._clock, self._began = clock, clock()
        self._costs = Costs(data.size)
        self._stints = read_stints(ledger.folder)
        self._held: dict[str, float] = {}  # trial -> seconds that this driver has held it before
        self._keeping = threading.Lock()  # who shows where things stand keeps the time too
        self.answers: list[Answer] = read_answers(ledger.folder)
        self.spec = requests.grown(spec, self.answers)
        self.ledger, self.data = ledger, data
        self.suggestions: list[Suggestion] = read_suggestions(ledger.folder)
        self.results: dict[str, Result] = read_results(ledger.folder)
        self.running: dict[str, float] = {}  # trial -> when it was handed out
        self.is_exhausted = False
        self.is_full = False  # the budget has room for no untried arm, as far as is known now
        self.ended: list[tuple[str, Result]] = []  # by this driver: an arm, and how a trial ended
        self.told_to_rest: set[str] = set()  # trials whose workers have not left them yet
        self.rested: dict[str, float] = {}  # trial -> seconds that it ran before it came to rest
        self.open_rungs: set[tuple[str, int]] = set()  # at which nothing foretells the objective
        self.gave_up: str | None = None  # how all of its first trials failed
        self.on_durable: Callable[[Suggestion, Result | None], None] = lambda trial, result: None
        rows = read_rows(ledger.folder)
        self.measured: Measured = measure(rows)
        self.optuna = OptunaStudy(spec)
        self.optuna.replay(self.suggestions, self.results, self.measured)
        self.progress = Progress(
            study=spec.study,
            total=num_planned(self.spec, is_labelled=data.is_labelled),
            done=sum(not is_unfinished(result) for result in self.results.values()),
            metrics=[objective.metric for objective in spec.objectives],
            pretrainings=None if ledger.folder.remote else num_pretrainings(self.spec),
        )
        self.progress.best = self._best()
        self._finish_stopped()
        self._hand_on()
        self._stop_losers()
        self.heed_requests()
        self._tell_spent()

    def next(self) -> Suggestion | Wait | Finished:
        """The next trial to run, written down and handed out; or why there is none now."""
        self.heed_requests()
        self.keep_time(POLL_SECONDS)
        self._stop_losers()
        step = self.next_step()
        if isinstance(step, AskSampler):
            proposal = self.optuna.ask(step.number, step.fits)
            if proposal is None and step.fits is not None:
                self.is_full = True
                return self.next()
            if proposal is None:
                self.is_exhausted = True
                self.progress.say("every arm of the search space has been tried")
                return self.next()
            start = Start("search", proposal.config, step.seed, proposal.params, proposal.labels)
            return self._begin(start)
        if isinstance(step, Start):
            return self._begin(step)
        if isinstance(step, Continue):
            self.running[step.suggestion.trial] = self._clock()
            self.progress.suggested(step.suggestion, resumed=True)
            return step.suggestion
        return step

    def next_step(self) -> Step:
        """What `next` would do, without doing it."""
        if self.gave_up is not None:
            return Wait() if self.running else Finished()
        return next_step(
            self.spec,
            self.suggestions,
            self.results,
            self.running.keys(),
            self.measured,
            enqueued=requests.queue(self.answers),
            is_labelled=self.data.is_labelled,
            is_exhausted=self.is_exhausted or self.is_full,
            means=self._means,
        )

    def keep_time(self, seconds: float = 0.0) -> None:
        """Keep how long this driver has run the study; only then does it count as spent.

        Unless less than `seconds` have passed since it was last kept.
        """
        if not self.spec.budget.counts_time:
            return
        with self._keeping:
            now = self._clock()
            held = Counter(self._held)
            held.update({trial: now - since for trial, since in list(self.running.items())})
            epoch, workers = self.ledger.epoch, self.spec.resources.workers
            stint = Stint(epoch, now - self._began, workers, dict(held))
            before = next((each for each in self._stints if each.epoch == epoch), None)
            if before is not None and stint.seconds < before.seconds + seconds:
                return
            self.ledger.keep_time(stint)
            self._stints = [each for each in self._stints if each.epoch != epoch] + [stint]

    def heed_requests(self) -> None:
        """Answer what people have asked since the last look."""
        answered = {answer.request for answer in self.answers}
        for request in requests.pending(self.ledger.folder):
            if request.name not in answered:
                self._answer(request)
            requests.remove(self.ledger.folder, request)

    def job(self, suggestion: Suggestion) -> dict[str, Any]:
        """What a worker group needs for this launch of the trial."""
        job = make_job(
            trial=suggestion.trial,
            config=completed(suggestion.config),
            seed=suggestion.seed,
            probe=self.spec.probe,
            rungs=list(self.spec.rungs),
            folder=self.ledger.folder.trial(suggestion.trial),
            remote=self._remote(suggestion),
            shared=self.ledger.folder.pretrained if self._shares_pretraining else None,
            micro_batches=self.spec.resources.micro_batches,
            recomputes=self.spec.resources.activation_checkpointing,
            data=self.spec.data,
            data_root=self.data.root,
            fingerprint=self.data.fingerprint,
        )
        attempt = self.ledger.new_attempt()
        return {**job, "attempt": attempt, "serial": attempt, "decided": time.time()}

    @property
    def _shares_pretraining(self) -> bool:
        """Whether trials may differ in segmentation alone; a mirror is one node's own."""
        return shares_pretraining(self.spec) and not self.ledger.folder.remote

    @property
    def _means(self) -> Means:
        workers = self.spec.resources.workers
        return Means(self._stints, self._costs, workers, self._shares_pretraining)

    def rows(self, suggestion: Suggestion, rows: list[dict[str, Any]], attempt: str) -> bool:
        """Keep a rung's rows; True when its workers are to leave the trial there."""
        trial = suggestion.trial
        phase, progress = rows[-1]["phase"], float(rows[-1]["progress"])
        if population.is_before_birth(suggestion, phase, progress):
            return False
        values = {f"{row['phase']}/{row['metric']}": row["value"] for row in rows}
        self.optuna.report(trial, progress, values)  # and so into self.measured
        order = self._order(suggestion, phase, progress)
        stop = order is Order.STOP
        if stop:
            rows = [*rows, _decision(rows[-1])]
        self.ledger.commit(suggestion, rows, attempt)
        self.keep_time()
        self.on_durable(suggestion, None)
        shown = {o.metric: values[o.metric] for o in self.spec.objectives if o.metric in values}
        self.progress.rung(suggestion, phase, progress, shown)
        (self.told_to_rest.add if order is Order.REST else self.told_to_rest.discard)(trial)
        return order is not Order.GO_ON

    def hung(self, suggestion: Suggestion, attempt: str, worker: str, stacks: str) -> None:
        """Keep where a worker was that made no progress; its group has ended itself."""
        path = self.ledger.keep_stacks(suggestion.trial, f"{attempt}-{worker}", stacks)
        minutes = self.spec.resources.hang_minutes
        self.progress.say(
            f"{describe(suggestion)}: no progress for {minutes:g} min, its workers are started "
            f"anew; where {worker} hung: {path.relative_to(self.ledger.folder.root)}"
        )

    def done(self, suggestion: Suggestion, ending: Ending, error: str | None) -> None:
        """Keep how a trial ended; one that is lost may go on, unless it was so too often."""
        trial = suggestion.trial
        is_at_rest = trial in self.told_to_rest and ending is Ending.STOPPED
        self.told_to_rest.discard(trial)
        if is_at_rest:
            self.rested[trial] = self.rested.get(trial, 0.0) + self._let_go(trial)
            self.keep_time()
            self.progress.rests(suggestion)
            return
        before, failures = self.results.get(trial), 0
        if ending is Ending.LOST:
            failures = 1 + (before.infrastructure_failures if before else 0)
            error = infrastructure_error(failures, error or "no reason given")
        seconds = self._let_go(trial)
        reached: dict[str, float] = {}
        for metric, curve in self.measured.get(trial, {}).items():
            phase = metric.partition("/")[0]
            reached[phase] = max(reached.get(phase, 0.0), *curve)
        result = Result(
            trial=trial,
            outcome=Outcome.FAILED if failures else Outcome(ending),
            seconds=seconds + self.rested.pop(trial, 0.0),
            error=error,
            progress=reached,
            infrastructure_failures=failures,
        )
        self.keep_time()
        self.ledger.finish(result)
        self.is_full = False
        self.on_durable(suggestion, result)
        self.results[trial] = result
        self.ended.append((suggestion.arm, result))
        self.optuna.tell(result)
        self.progress.best = self._best()
        self._tell_spent()
        gain = gains({trial: self.measured.get(trial, {})}).get(trial)
        self.progress.finished(suggestion, result.outcome, error, gain)
        if self.gave_up is None:
            self.gave_up = breaker.failing_alike(self.ended)
            if self.gave_up is not None:
                self.progress.say(
                    f"gives up: the first {len(self.ended)} trials have all failed alike, "
                    f"{self.gave_up}. Mend what they share, then run the same command again: it "
                    f"goes on with other arms"
                )

    def hand_back(self, suggestion: Suggestion) -> None:
        """Its slot has lost its workers: the trial is to be given out again; nothing is counted."""
        self._let_go(suggestion.trial)
        self.progress.handed_back(suggestion)

    @property
    def num_failed(self) -> int:
        return sum(result.outcome is Outcome.FAILED for result in self.results.values())

    @property
    def best_gain(self) -> Gain | None:
        """How well the best encoder of the study fills in; None while there is none."""
        found = best_gain(gains(self.measured.copy()))
        return found and found[1]

    def _order(self, suggestion: Suggestion, phase: str, progress: float) -> Order:
        """What becomes of a trial that has come to a rung."""
        if suggestion.born is not None:
            number = rung_of(progress, self.spec.rungs)
            return population.order_of(self.spec, self._generations(), suggestion, phase, number)
        return Order.STOP if self._stops(suggestion, phase, progress) else Order.GO_ON

    def _stops(self, suggestion: Suggestion, phase: str, progress: float) -> bool:
        """Whether the stopping rule ends a trial that has come to a rung."""
        stopping = self.spec.stopping
        if stopping.name == "none":
            return False
        trial = suggestion.trial
        rung = rung_at(self.spec, self.suggestions, self.measured, trial, phase, progress)
        self._say_where_nobody_is_stopped(rung)
        return not goes_on(
            stopping,
            rung,
            suggestion,
            first_seed=self.spec.seed,
            is_labelled=self.data.is_labelled,
            spared=requests.enqueued_arms(self.answers),
        )

    def _say_where_nobody_is_stopped(self, rung: Rung) -> None:
        """Once, and again when it has changed in between."""
        if len(rung.others) < FEWEST_FINALS:
            return
        place = (rung.phase, rung.number)
        is_open = best_foreteller(rung, self.spec.stopping.options()["metric"]) is None
        if is_open and place not in self.open_rungs:
            share = self.spec.rungs[rung.number]
            self.progress.say(
                f"at {share:.0%} of {rung.phase} nobody is stopped for now: nothing that is "
                f"measured there is known to foretell {rung.objective}"
            )
        (self.open_rungs.add if is_open else self.open_rungs.discard)(place)

    def _best(self) -> str:
        """The best arm so far, and who is ahead of it, for the log."""
        firsts: dict[str, Suggestion] = {}
        for suggestion in self.suggestions:
            firsts.setdefault(suggestion.arm, suggestion)
        found = of_study(self.spec, self.suggestions, self.results, self.measured)
        return in_short(found, self.spec.objectives[0], lambda arm: arm_text(firsts[arm]))

    def _let_go(self, trial: str) -> float:
        """A trial has its workers no longer; seconds since it was handed out."""
        with self._keeping:
            began = self.running.pop(trial, None)
            seconds = 0.0 if began is None else self._clock() - began
            self._held[trial] = self._held.get(trial, 0.0) + seconds
        return seconds

    def _tell_spent(self) -> None:
        """What people are shown where nobody can say how many trials there will be."""
        budget = self.spec.budget
        if budget.is_measured:
            facts = (self.suggestions, self.results, self.running.keys(), self.measured)
            spent = account_of(*facts, self._means).spent
            self.progress.spent = in_words(budget, spent, num_counted(self.suggestions))

    def _remote(self, suggestion: Suggestion) -> str:
        folder = self.ledger.folder
        return folder.location(folder.trial(suggestion.trial)) if folder.remote else ""

    def _answer(self, request: requests.Request) -> None:
        answer = requests.answer_to(request, self.asked, self.suggestions, self.answers)
        self.ledger.answer(answer)
        self.answers.append(answer)
        self.spec = requests.grown(self.asked, self.answers)
        self.progress.total = num_planned(self.spec, is_labelled=self.data.is_labelled)
        self.is_full = False
        if answer.refused is not None:
            self.progress.say(f"refused to {answer.kind}: {answer.refused}")
        elif answer.kind == "extend":
            self.progress.say(f"extended by {requests.amount_in_words(answer.content)}")
        else:
            self.progress.say(f"enqueued arm {answer.content['arm']}")

    def _generations(self) -> list[population.Generation]:
        known = ended(self.results)
        return population.generations(self.spec, self.suggestions, known, self.measured)

    def _stop_losers(self) -> None:
        """Members of a population that rest where it was decided that they stop."""
        for suggestion in population.losers(self._generations()):
            trial = suggestion.trial
            if trial in self.running or not is_unfinished(self.results.get(trial)):
                continue
            rows = read_rows(self.ledger.folder, trial)
            last = rows.sort_values("step", kind="stable").iloc[-1].to_dict()
            row = {str(name): last[name] for name in REPORTED}
            self.ledger.commit(suggestion, [_decision(row)], last["attempt"])
            if trial not in self.progress.lines:  # an earlier driver's
                self.progress.suggested(suggestion, resumed=True)
            self.done(suggestion, Ending.STOPPED, None)

    def _hand_on(self) -> None:
        """Give trials that have not begun to train what they are to begin with.

        Their parents rest at that rung until all of its children have it. In a store of objects,
        where every node has a mirror of its own, nothing is handed on: they train it anew.
        """
        folder = self.ledger.folder
        for suggestion in self.suggestions:
            if not population.is_child(suggestion) or suggestion.trial in self.results:
                continue
            if not folder.remote and suggestion.trial not in self.running:
                assert suggestion.born is not None
                parent = folder.checkpoints(suggestion.born["parent"])
                child = folder.checkpoints(suggestion.trial)
                inherit(parent, child, PHASES[0], suggestion.born["progress"])

    def _begin(self, start: Start) -> Suggestion:
        config: TrialConfig = start.config
        suggestion = Suggestion(
            number=len(self.suggestions),
            trial=trial_id(config, start.seed, self.data.fingerprint),
            arm=arm_id(config),
            seed=start.seed,
            origin=start.origin,
            config=config.model_dump(mode="json"),
            params=start.params,
            labels=start.labels,
            born=start.born,
        )
        self.ledger.suggest(suggestion)
        self.suggestions.append(suggestion)
        self._hand_on()
        self.optuna.add(suggestion)
        self.running[suggestion.trial] = self._clock()
        self.progress.suggested(suggestion, resumed=False)
        return suggestion

    def _finish_stopped(self) -> None:
        """Trials whose stop was decided, but which a crash kept from ending."""
        for suggestion in self.suggestions:
            metrics = self.measured.get(suggestion.trial, {})
            was_stopped = any(name.endswith(f"/{STOPPED_HERE}") for name in metrics)
            if was_stopped and suggestion.trial not in self.results:
                self.progress.suggested(suggestion, resumed=True)
                self.done(suggestion, Ending.STOPPED, None)


def _decision(row: dict[str, Any]) -> dict[str, Any]:
    """The row that keeps, beside the values of a rung, that a trial was stopped there."""
    kind = metric_of(f"{row['phase']}/{STOPPED_HERE}")
    stopped = {"metric": STOPPED_HERE, "goal": kind.goal, "unit": kind.unit, "value": 1.0}
    return {**row, **stopped}
