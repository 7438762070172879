"""The study file: what it may say. How it is read and checked is in loading.py."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    model_validator,
)

from study.folder import Storage, StudyFolder, is_study_name
from study.loggers import LOGGERS
from study.reader import show
from study.samplers import POPULATIONS, SAMPLERS
from study.space import SearchItem
from study.stopping import STOPPERS
from trainables.config import Grown, Positive, ProbeConfig, Strict, TrialConfig
from trainables.data import DataConfig
from trainables.metrics import METRICS, parse
from trainables.named import Choice, named
from trainables.settings import digest
from trainables.storage import check_uri, is_uri

if TYPE_CHECKING:
    Sampler: TypeAlias = Choice
    Stopper: TypeAlias = Choice
    Logger: TypeAlias = Choice
else:
    Sampler = named(SAMPLERS)
    Stopper = named(STOPPERS)
    Logger = named(LOGGERS)

# Of a budget, in words
UNITS = {
    "trials": "trials",
    "device_hours": "device-hours",
    "wall_hours": "hours of wall time",
    "flops": "FLOP",
}
DEFAULT_OBJECTIVES: list[Any] = ["segment/miou", "pretrain/probe_gain"]
EIGHTHS = [each / 8 for each in range(1, 9)]
EARLY_RUNGS = [0.0625, 0.125, 0.25, 0.5, 1.0]
DEVICE_NAME = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]")  # Windows makes no such folders
RAY_COPY = re.compile(r"/session_[^/]+/runtime_resources/")


def _name(value: str) -> str:
    if not is_study_name(value) or DEVICE_NAME.fullmatch(value):
        raise ValueError(
            f"given {show(value)}; expected a word of a-z, 0-9, - and _ that starts with a letter "
            f"or digit and has at most 64 of them"
        )
    return value


def _rungs(values: list[float]) -> list[float]:
    if not values or values[-1] != 1 or values[0] <= 0 or values != sorted(set(values)):
        raise ValueError(f"given {values}; expected rising shares above 0, the last of them 1")
    return values


def _storage(value: str) -> str:
    if is_uri(value):
        check_uri(value)
    elif not value.strip() or "\0" in value:
        raise ValueError(
            f"given {show(value)}; expected a folder that every node sees, or a URI such as "
            f"s3://bucket/prefix"
        )
    return value


def _unlike(values: list[Any]) -> list[Any]:
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ValueError(f"given {show(values)}; expected each once")
    return values


def _one_each(values: list[Any]) -> list[Any]:
    names = [value.name for value in values]
    if len(set(names)) < len(names):
        raise ValueError(f"given {show(names)}; expected each once")
    return values


def _one_gpu(value: float) -> float:
    if value > 1:
        raise ValueError(
            f"given {value:g}, but a worker trains on one GPU; for a trial on several set "
            f"resources.workers to their number, and this to 1"
        )
    return value


class Objective(Strict):
    metric: str
    goal: Annotated[
        Literal["maximize", "minimize"], Field(description="follows from the metric")
    ] = "maximize"

    @model_validator(mode="before")
    @classmethod
    def _goal_of_metric(cls, given: Any) -> Any:
        """`segment/miou` is as good as `{metric: segment/miou, goal: maximize}`."""
        whole = {"metric": given} if isinstance(given, str) else given
        if (
            not isinstance(whole, dict)
            or "goal" in whole
            or not isinstance(whole.get("metric"), str)
        ):
            return whole
        metric = METRICS.get(parse(whole["metric"]).key)
        return whole if metric is None or metric.goal == "none" else whole | {"goal": metric.goal}


class Confirm(Grown):
    """Afterwards: the best arms again with fresh seeds, then the best of them once more."""

    NEWER = frozenset({"verdict"})

    arms: Positive
    seeds: Annotated[int, Field(ge=1, le=1000)]
    verdict: Annotated[
        Positive | None,
        Field(
            description="fresh seeds of the best of those arms, of the control and of its twins: "
            "what is said of it rests on these alone. null, or left out: there is no such "
            "stage, and the control runs beside the arms"
        ),
    ] = None


Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Budget(Grown):
    """What a study may take, in one unit or several: it ends at whichever is reached first."""

    NEWER = frozenset(UNITS)

    trials: Annotated[
        Positive | None,
        Field(
            description="controls and searched arms, each seed; confirmations extra. A member of a "
            "population and those that take its place are one: together they train as much"
        ),
    ] = None
    device_hours: Annotated[
        Above | None,
        Field(description="hours of each worker that a trial holds, summed; confirmations count"),
    ] = None
    wall_hours: Annotated[
        Above | None,
        Field(
            description="hours in which the study is driven, those of all drivers summed; nothing "
            "is begun that is not expected to end in time; confirmations count"
        ),
    ] = None
    flops: Annotated[
        Above | None, Field(description="operations of training; confirmations count")
    ] = None

    @model_validator(mode="after")
    def _is_some(self) -> Budget:
        if not self.given:
            raise ValueError(f"given none; expected one or several of {', '.join(UNITS)}")
        return self

    @property
    def given(self) -> dict[str, float]:
        """Unit -> amount."""
        amounts = {unit: getattr(self, unit) for unit in UNITS}
        return {unit: amount for unit, amount in amounts.items() if amount is not None}

    @property
    def is_measured(self) -> bool:
        """Whether anything but trials is counted."""
        return bool(self.given.keys() - {"trials"})

    @property
    def counts_time(self) -> bool:
        return bool(self.given.keys() & {"device_hours", "wall_hours"})


class Resources(Strict):
    """What one trial takes; nothing in it changes the numbers."""

    workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[
        Annotated[float, Field(ge=0), AfterValidator(_one_gpu)] | None,
        Field(
            description="at most 1, which a worker trains on; a fraction: so much of its memory. "
            "null: one if the cluster has as many at the start, else none",
        ),
    ] = None
    micro_batches: Annotated[
        Positive,
        Field(
            description="parts in which a worker learns from its share of a batch, one after the "
            "other: more take less memory, and give the same but for rounding"
        ),
    ] = 1
    activation_checkpointing: Annotated[
        bool,
        Field(
            description="blocks keep their inputs alone, and compute the rest again when they "
            "learn: a fraction of the memory, about a third more time, and the same numbers"
        ),
    ] = False
    concurrent: Annotated[
        Positive | None, Field(description="trials at once; null: as many as fit")
    ] = None
    autoscale: Annotated[
        Positive | None,
        Field(description="trials at once to ask an autoscaling cluster for; null: ask for none"),
    ] = None
    peak_flops: Annotated[
        float | None,
        Field(gt=0, description="operations per second of one worker; null: measured"),
    ] = None
    hang_minutes: Annotated[
        float,
        Field(gt=0, description="without progress, after which workers are started anew"),
    ] = 30.0


class StudySpec(Strict):
    """A study: a complete trial, what may vary in it, and by what it is judged."""

    study: Annotated[str, AfterValidator(_name)]
    question: str | None = None
    data: DataConfig
    trial: TrialConfig = TrialConfig()
    search: Annotated[
        dict[str, SearchItem],
        Field(
            description="dotted path of a setting of the trial: what it may be; without a trial "
            "the mask ratio from 0.1 to 0.9"
        ),
    ] = Field({})
    objectives: Annotated[list[Objective], Field(min_length=1, max_length=3)] = Field(
        DEFAULT_OBJECTIVES, validate_default=True
    )
    sampler: Sampler = Field({"name": "tpe"}, validate_default=True)
    stopping: Stopper = Field({"name": "none"}, validate_default=True)
    seeds: Positive = 1
    confirm: Confirm | None = None
    budget: Budget
    controls: Annotated[list[Literal["random-init", "frozen"]], AfterValidator(_unlike)] = Field(
        ["random-init"]
    )
    rungs: Annotated[list[float], AfterValidator(_rungs)] = Field(
        [0.25, 0.5, 1.0],
        description="shares of a phase at which trials are judged; with a stopping rule from a "
        "sixteenth on by default, with sampler pbt every eighth",
    )
    probe: ProbeConfig = ProbeConfig()
    resources: Resources = Resources()
    log: Annotated[list[Logger], AfterValidator(_one_each)] = Field([])
    storage: Annotated[str, AfterValidator(_storage)] = "studies/"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _rungs_to_stop_at(self) -> StudySpec:
        """Whoever is stopped early is cheap, so a stopping rule has rungs from early on.

        A population meets at rungs, so it has many, evenly spaced.
        """
        if "rungs" not in self.model_fields_set and self.stopping.name != "none":
            self.__dict__["rungs"] = list(EARLY_RUNGS)
        if "rungs" not in self.model_fields_set and self.sampler.name in POPULATIONS:
            self.__dict__["rungs"] = list(EIGHTHS)
        return self

    def twin(self, encoder: str) -> TrialConfig:
        """The control arm with another encoder: `random-init` or `frozen`."""
        segment = self.trial.segment.model_copy(update={"encoder": encoder})
        return self.trial.model_copy(update={"segment": segment})

    _folder: Path = PrivateAttr(Path())
    _text: str = PrivateAttr("")
    _where: str = PrivateAttr("")

    @property
    def folder_of_yaml(self) -> Path:
        return self._folder

    @property
    def text(self) -> str:
        """The file as it was written."""
        return self._text

    @property
    def where(self) -> str:
        """What messages call the file."""
        return self._where or self.study

    @property
    def digest(self) -> str:
        """SHA-256 of the meaning: comments, order of keys and spelt-out defaults do not count."""
        return digest(self.model_dump(mode="json", by_alias=True))

    def place(self) -> Storage:
        """Where all studies lie; this one in `study_folder()`."""
        own = Storage.of(self.storage)
        if own.remote or own.folder.is_absolute():
            return own
        if self._is_in_job():
            around = Storage.of(os.environ.get("MASKSTUDY_STORAGE") or "~/maskstudy")
            return around.within(self.storage)
        return Storage(self._folder / own.folder)

    def study_folder(self) -> StudyFolder:
        return self.place().study(self.study)

    @property
    def storage_note(self) -> str | None:
        """What to tell the user when a relative storage does not lie beside the study file."""
        own = Storage.of(self.storage)
        if own.remote or own.folder.is_absolute() or not self._is_in_job():
            return None
        return (
            f"storage: {self.storage!r} means {self.place()} here, because a job's "
            f"folder is a copy that Ray deletes; set MASKSTUDY_STORAGE for another place"
        )

    def _is_in_job(self) -> bool:
        is_told = "MASKSTUDY_STORAGE" in os.environ or "RAY_JOB_ID" in os.environ
        return is_told or bool(RAY_COPY.search(f"{self._folder.absolute().as_posix()}/"))


def schema() -> dict[str, Any]:
    """JSON Schema of study files, for editors."""
    result = StudySpec.model_json_schema()
    _allow_bare_names(result, result.get("$defs", {}))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def _allow_bare_names(node: Any, definitions: Mapping[str, Any]) -> None:
    """`sampler: tpe` is as good as `sampler: {name: tpe}`."""
    if isinstance(node, list):
        for value in node:
            _allow_bare_names(value, definitions)
    if not isinstance(node, dict):
        return
    members = node["oneOf"] if "discriminator" in node else [node] if "$ref" in node else []
    names = []
    for member in members:
        fields = definitions[member["$ref"].rpartition("/")[2]].get("properties", {})
        names += [
            fields[key]["const"] for key in ("name", "source") if "const" in fields.get(key, {})
        ]
    if names:
        whole = {key: node.pop(key) for key in ("oneOf", "discriminator", "$ref") if key in node}
        node["anyOf"] = [whole, {"enum": names}]
    else:
        for value in node.values():
            _allow_bare_names(value, definitions)
