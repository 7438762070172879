"""What a trial of an arm will take, in steps and operations: exactly, and without torch.

So a driver may decide by it, and `status` say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from study.fit import DataSize
from study.mistakes import Problems
from study.reader import read_document
from trainables import cost
from trainables.config import TrialConfig, completed, content_of
from trainables.settings import digest

if TYPE_CHECKING:
    from study.spec import StudySpec


class Work(NamedTuple):
    """Of one trial, if nobody stops it."""

    pretrain_steps: int
    segment_steps: int
    pretrain_flops: float
    segment_flops: float


def work_of(config: TrialConfig, data: DataSize) -> Work:
    """Random weights are not pretrained; without labels nothing is segmented."""
    pretrain_steps, pretrain_flops, segment_steps, segment_flops = 0, 0.0, 0, 0.0
    if config.segment.encoder != "random-init":
        about = (data.size, data.channels)
        pretrain_steps = cost.pretrain_steps(config, *about, data.pretrain_images)
        pretrain_flops = cost.pretrain_flops(config, *about, pretrain_steps)
    if data.classes:
        sizes = (data.size, data.channels, len(data.classes))
        segment_steps = cost.segment_steps(config, *sizes, data.train_images)
        segment_flops = cost.segment_flops(config, *sizes, segment_steps)[-1]
    return Work(pretrain_steps, segment_steps, pretrain_flops, segment_flops)


class Costs:
    """The work of each arm, counted once; nothing where the sizes of the data are not known."""

    def __init__(self, data: DataSize | None) -> None:
        self.data = data
        self._work: dict[str, Work] = {}
        self._pretraining: dict[str, str] = {}

    def work(self, arm: str, config: TrialConfig | Mapping[str, Any]) -> Work:
        if arm not in self._work:
            nothing = Work(0, 0, 0.0, 0.0)
            found = nothing if self.data is None else work_of(_typed(config), self.data)
            self._work[arm] = found
        return self._work[arm]

    def pretraining(self, arm: str, config: TrialConfig | Mapping[str, Any]) -> str:
        """Equal for arms that pretrain alike; random weights have none that others could share."""
        if arm not in self._pretraining:
            typed = _typed(config)
            content = content_of(typed)
            del content["segment"]
            is_random = typed.segment.encoder == "random-init"
            self._pretraining[arm] = f"none of {arm}" if is_random else digest(content)
        return self._pretraining[arm]


def budget_problems(spec: StudySpec, data: DataSize) -> list[str]:
    """A budget in operations that the controls alone exceed."""
    limit = spec.budget.flops
    if limit is None:
        return []
    control = work_of(spec.trial, data)
    least = control.pretrain_flops + control.segment_flops
    for encoder in spec.controls if data.classes else ():
        twin = spec.twin(encoder)  # which shares the control's pretraining
        least += work_of(twin, data).segment_flops
    least *= spec.seeds
    if limit >= least:
        return []
    problems = Problems(spec.where, read_document(spec.text))
    problems.add(
        ("budget", "flops"),
        f"given {limit:g}; expected at least {least:.3g}, which the control arm and its twins "
        f"take, {spec.seeds} seed(s) each",
    )
    return problems.lines()


def size_by_environment(environment: Mapping[str, Any]) -> DataSize | None:
    """What environment.json says of the data, as far as costs go by it; None if it does not."""
    data = environment.get("data")
    if not isinstance(data, dict) or not {"size", "channels", "classes"} <= data.keys():
        return None
    images = data.get("images")
    if not isinstance(images, dict) or not {"pretrain", "train"} <= images.keys():
        return None
    return DataSize(
        size=tuple(data["size"]),
        channels=data["channels"],
        pretrain_images=images["pretrain"],
        train_images=images["train"],
        train_groups=0,
        classes=tuple(data["classes"]) if images["train"] else (),
        shown={},
    )


def _typed(config: TrialConfig | Mapping[str, Any]) -> TrialConfig:
    if isinstance(config, TrialConfig):
        return config
    return TrialConfig.model_validate(completed(dict(config)))
