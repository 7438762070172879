"""Trials as runs of TensorBoard, MLflow or Weights & Biases, if the study file asks for it: `log:`.

Fed from the ledger, by a thread of its own: what is logged was durable before, a slow server keeps
nobody waiting, and what one driver could not write the next one writes. What was written is noted
in the study folder, so that nothing is written twice; and as a driver may die between the two, a
logger sees to it that a page written once more changes nothing.

To add one, write a function of a `Page` with keyword-only options that returns a handle for the
trial's later pages, and add it to LOGGERS. What it imports (inside the function) and is no
dependency of ours goes into PACKAGES as well, and into an extra of its name in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from study import mirror
from study.folder import StudyFolder
from study.ledger import Outcome, Result, Suggestion, read_rows
from trainables import durable
from trainables.errors import UserError
from trainables.named import Choice
from trainables.settings import flatten

FAREWELL_SECONDS = 60  # that loggers get at a study's end
GOOD = (Outcome.COMPLETE, Outcome.STOPPED)

News = tuple[Suggestion, Result | None]  # a trial of which something has become durable


@dataclass(frozen=True)
class Page:
    """What a logger has not been given yet of one trial."""

    study: str
    folder: StudyFolder
    trial: Suggestion
    rows: list[dict[str, Any]]
    number: int  # of rows that came before
    result: Result | None  # once it has ended
    handle: str | None  # what the page before returned; None: this is the first
    is_again: bool  # the first page was begun before, and perhaps written

    @property
    def name(self) -> str:
        return f"{self.trial.number:04d}-{self.trial.trial}"

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the trial, by dotted path."""
        own = {"arm": self.trial.arm, "seed": self.trial.seed}
        return {**flatten(self.trial.config), **own}


def tensorboard(page: Page) -> str:
    """Event files in the study folder: `tensorboard --logdir STORAGE/NAME/tensorboard`."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter

    now = time.time()
    events = [Event(wall_time=now, file_version="optuna_study.Event:2")]
    if page.handle is None:
        plain = {path: _plain(value) for path, value in page.settings.items()}
        events.append(Event(wall_time=now, summary=hparams_pb(plain, page.trial.trial)))
        origin = text_pb("origin", page.trial.origin)
        events.append(Event(wall_time=now, summary=origin))
    for row in page.rows:
        tag = f"{row['phase']}/{row['metric']}"
        value = Summary.Value(tag=tag, simple_value=row["value"])
        events.append(Event(wall_time=now, step=row["step"], summary=Summary(value=[value])))
    if page.result is not None:
        events.append(Event(wall_time=now, summary=text_pb("outcome", _outcome(page.result))))

    # a file of its own for each page, read in the order of names: written again, it is replaced
    place = page.folder.root / "tensorboard" / page.name
    place.mkdir(parents=True, exist_ok=True)
    has_rows = int(bool(page.rows))  # those of a second try follow the first one's end
    path = place / f"events.out.tfevents.{page.number:08d}.{has_rows}"
    with durable.replacing(path, only_writer=True) as aside, aside.open("wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
    mirror.send(page.folder, path)
    return "written"


def mlflow(page: Page, *, tracking_uri: str | None = None, experiment: str | None = None) -> str:
    """Runs of one experiment, at MLFLOW_TRACKING_URI or in `mlflow.db` of the study folder."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    beside = f"sqlite:///{(page.folder.root / 'mlflow.db').absolute()}"
    client = MlflowClient(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or beside)
    handle = page.handle
    if handle is None:
        title = experiment or page.study
        found = client.get_experiment_by_name(title)
        number = found.experiment_id if found else client.create_experiment(title)
        mark = {"maskstudy.study": page.study, "maskstudy.trial": page.trial.trial}
        where = " and ".join(f"tags.`{key}` = '{value}'" for key, value in mark.items())
        begun = client.search_runs([number], where, max_results=1) if page.is_again else []
        tags = {**mark, "maskstudy.origin": page.trial.origin}
        run = begun[0] if begun else client.create_run(number, tags=tags, run_name=page.name)
        handle = str(run.info.run_id)
        settings = [Param(path, str(value)) for path, value in page.settings.items()]
        for start in range(0, len(settings), 100):  # as many as a request may hold
            client.log_batch(handle, params=settings[start : start + 100])
    # MLflow keeps equal metrics of equal times once
    started = client.get_run(handle).info.start_time
    metrics = [
        Metric(
            key=re.sub(r"[^\w\-. :/]", ":", f"{row['phase']}/{row['metric']}"),
            value=row["value"],
            timestamp=started + round(1000 * row["seconds"]),
            step=row["step"],
        )
        for row in page.rows
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(handle, metrics[start : start + 1000])
    if page.result is not None:
        client.set_tag(handle, "maskstudy.outcome", _outcome(page.result))
        client.set_terminated(handle, "FINISHED" if page.result.outcome in GOOD else "FAILED")
    return handle


def wandb(
    page: Page,
    *,
    project: str | None = None,
    entity: str | None = None,
    mode: Literal["online", "offline"] = "online",
) -> str:
    """Runs of a project named like the study; the key comes from `wandb login` or WANDB_API_KEY."""
    import wandb as client

    run = client.init(
        project=project or page.study,
        entity=entity,
        mode=mode,
        id=page.trial.trial,
        resume="allow",
        name=page.name,
        group=page.trial.arm,
        config=page.settings,
        dir=page.folder.root,
    )
    # steps of ours start anew with each phase; W&B ignores what stands before its newest step
    for index, row in enumerate(page.rows, start=page.number):
        run.log({f"{row['phase']}/{row['metric']}": row["value"]}, step=index)
    if page.result is not None:
        run.summary["outcome"] = _outcome(page.result)
    is_failed = page.result is not None and page.result.outcome not in GOOD
    run.finish(exit_code=int(is_failed))
    return page.trial.trial


class Journal:
    """Keeps the loggers of a study up to date with its ledger, beside whoever drives it."""

    def __init__(
        self,
        study: str,
        folder: StudyFolder,
        log: Sequence[Choice],
        backlog: Sequence[News],
        say: Callable[[str], None],
    ) -> None:
        """`backlog`: all trials so far, as an earlier driver may not have written all of them."""
        self.study, self.folder, self._say = study, folder, say
        self._loggers = {each.name: partial(LOGGERS[each.name], **each.options()) for each in log}
        self._failed: set[str] = set()
        self._news: queue.Queue[News | None] = queue.Queue()
        for news in backlog:
            self._news.put(news)
        self._thread = threading.Thread(target=self._write, name="loggers", daemon=True)
        if self._loggers:
            self._thread.start()

    def notice(self, trial: Suggestion, result: Result | None) -> None:
        """Rows of this trial, or its end, have become durable."""
        if self._loggers:
            self._news.put((trial, result))

    def close(self, timeout: float = FAREWELL_SECONDS) -> None:
        """Write what is left, as far as the time allows."""
        if not self._loggers:
            return
        self._news.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive() or self._failed:
            names = ", ".join(sorted(self._failed or self._loggers))
            self._say(f"log: {names} lacks some of the study; running it again adds what it lacks")

    def _write(self) -> None:
        while (news := self._news.get()) is not None:
            for name in self._loggers:
                try:
                    self._bring_up_to_date(name, *news)
                except Exception as error:  # costs a page of a log, never any training
                    if name not in self._failed:
                        self._say(f"log: {name}: {error}; the study goes on")
                    self._failed.add(name)

    def _bring_up_to_date(self, name: str, trial: Suggestion, result: Result | None) -> None:
        path = self.folder.logged(name, trial.trial)
        note = json.loads(path.read_text()) if path.exists() else None
        number, handle = (note["rows"], note["handle"]) if note else (0, None)
        rows = read_rows(self.folder, trial.trial).to_dict("records")
        outcome = note["outcome"] if note else None
        if len(rows) == number and (result is None or result.outcome == outcome):
            return
        if note is None:
            _keep(self.folder, path, {"rows": 0, "outcome": None, "handle": None})
        page = Page(
            study=self.study,
            folder=self.folder,
            trial=trial,
            rows=[{str(key): value for key, value in row.items()} for row in rows[number:]],
            number=number,
            result=result,
            handle=handle,
            is_again=note is not None and handle is None,
        )
        handle = self._loggers[name](page)
        outcome = result.outcome if result else outcome
        _keep(self.folder, path, {"rows": len(rows), "outcome": outcome, "handle": handle})


def check_packages(log: Sequence[Choice]) -> None:
    """Refuse a logger that cannot be imported here."""
    needed = {each.name: PACKAGES[each.name] for each in log if each.name in PACKAGES}
    missing = [name for name, package in needed.items() if not importlib.util.find_spec(package)]
    if missing:
        raise UserError(
            f"log: {' and '.join(missing)} not installed here; "
            f"pip install 'maskstudy[{','.join(missing)}]', or leave it out of the study's log"
        )


def _outcome(result: Result) -> str:
    lines = (result.error or "").strip().splitlines()
    return result.outcome.value + (f": {lines[-1]}" if lines else "")


def _plain(value: Any) -> Any:
    """What TensorBoard takes for a setting."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _keep(folder: StudyFolder, path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path, only_writer=True) as aside:
        aside.write_text(json.dumps(content))
    mirror.send(folder, path)


LOGGERS: dict[str, Callable[..., str]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
}
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}  # to be imported
