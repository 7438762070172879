"""A study as Ray Tune sees it. Only this file and its relay import ray.tune.

Ray Tune executes: it asks for trials through a `Searcher` and passes results to a `TrialScheduler`.
Both are thin adapters of the `Conductor`, who decides, with the ledger as the only state. A Tune
trial is a relay: it lays a job on the desk of a warm slot and passes on what comes back. Nothing of
Tune's own state is ever read back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cluster.placement import MOST
from study.conductor import Conductor
from study.fleet import Fleet
from study.ledger import Suggestion
from study.relay import relay
from study.steps import Finished, Wait
from trainables.endings import Ending
from trainables.errors import StorageError


def tuner(
    conductor: Conductor, fleet: Fleet, errors: list[Exception], scratch: Path
) -> ray.tune.Tuner:
    """What runs the study. `errors` gets those of ours, before Tune makes text of them."""
    # Tune wants a resource, and the slots have the CPUs; beside the driver, where no node is lost
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    place = ray.tune.PlacementGroupFactory([{"memory": 1 << 20}], bundle_label_selector=[here])
    return ray.tune.Tuner(
        ray.tune.with_resources(relay, place),
        tune_config=ray.tune.TuneConfig(
            search_alg=_Searcher(conductor, fleet, errors),
            scheduler=_Scheduler(conductor, fleet, errors),
            num_samples=-1,
            max_concurrent_trials=MOST,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=3),  # a relay picks up its thread
        ),
    )


class _Adapter:
    """What both adapters know. Tune pickles them at its start; their state is the ledger."""

    def __init__(self, conductor: Conductor, fleet: Fleet, errors: list[Exception]) -> None:
        super().__init__()
        self.conductor, self.fleet, self.errors = conductor, fleet, errors

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Keep an error as it was: Tune raises a text in its place."""
        try:
            yield
        except Exception as error:
            self.errors.append(error)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_Adapter, Searcher):  # type: ignore[misc]
    """Tune asks for trials here, and says when one has ended."""

    def __init__(self, conductor: Conductor, fleet: Fleet, errors: list[Exception]) -> None:
        super().__init__(conductor, fleet, errors)
        self._taken: dict[str, tuple[str, Suggestion]] = {}  # by Tune's id
        self._lost: dict[str, int] = {}  # trial -> worker groups it had lost when handed back

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        slot = self.fleet.take()
        with self.keeping_errors():
            if self.errors:
                raise self.errors[0]
            if slot is None:
                is_over = self.fleet.is_idle and isinstance(self.conductor.next_step(), Finished)
                return str(Searcher.FINISHED) if is_over else None
            step = self.conductor.next()
            if isinstance(step, Finished | Wait):
                self.fleet.free(slot, has_ended=False)
                return str(Searcher.FINISHED) if isinstance(step, Finished) else None
            job = {**self.conductor.job(step), "lost": self._lost.get(step.trial, 0)}
        self._taken[trial_id] = (slot, step)
        # the workers need not wait until Tune has started the relay, which places the same job
        self.fleet.place(slot, job)
        desk = self.fleet.desk_name(slot)
        return {"slot": slot, "desk": desk, "job": job, "number": step.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        slot, suggestion = self._taken.pop(trial_id)
        if error or result is None or "outcome" not in result:
            result = {"outcome": Ending.LOST, "error": "its relay in Ray Tune died"}
        ending = Ending(result["outcome"])
        is_warm = self.fleet.free(slot, has_ended=ending is not Ending.WITHDRAWN)
        # Tune would log a storage that fails and go on; it learns of it when it next asks
        with suppress(StorageError), self.keeping_errors():
            if ending is Ending.WITHDRAWN:
                self._lost[suggestion.trial] = result["lost"]
                self.conductor.hand_back(suggestion)
                return
            waited = result.get("first_step_seconds")
            self.conductor.progress.first_step(waited, is_warm=is_warm)
            self.conductor.done(suggestion, ending, result.get("error"))

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a study is resumed from its ledger, not from Tune's state")


class _Scheduler(_Adapter, FIFOScheduler):  # type: ignore[misc]
    """Tune passes rows here. Stopping is a request to the workers; Tune itself stops nothing."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "rows" in result:
            suggestion = self.conductor.suggestions[trial.config["number"]]
            with self.keeping_errors():
                stop = self.conductor.rows(suggestion, result["rows"], result["attempt"])
            self.fleet.decide(trial.config["slot"], result["number"], stop)
        elif "stacks" in result:
            suggestion = self.conductor.suggestions[trial.config["number"]]
            attempt = f"{trial.config['job']['attempt']}.{result['group']}"
            with self.keeping_errors():
                self.conductor.hung(suggestion, attempt, result["worker"], result["stacks"])
        return str(self.CONTINUE)
