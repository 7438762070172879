"""`check --forecast`: whether the planned steps are enough to learn anything."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from study.commands.terminal import console, say
from study.forecast import CONFIDENCE, ESCAPED, Forecast, Point, Verdict, forecast, rehearsals
from study.rehearsal import planned_steps, rehearse
from trainables.config import unit_of_length
from trainables.context import Context
from trainables.errors import UserError
from trainables.probe import Judge

if TYPE_CHECKING:
    from study.spec import StudySpec
    from trainables.config import TrialConfig
    from trainables.data import Dataset


def print_forecast(
    spec: StudySpec, dataset: Dataset, device: torch.device, threads: int, seconds: float
) -> None:
    """Rehearse the study's own trial for about so long, and say what follows."""
    torch.set_num_threads(threads)
    console.print("\nforecast", style="bold")
    context = Context(device, Path(), "forecast", (1.0,), lambda _: False, lambda *_: None)
    judge = Judge(spec.trial, dataset, spec.probe, context)

    def gain_after(steps: int) -> Point:
        scores: dict[str, float] = {}
        try:
            rehearse(
                spec.trial,
                spec.seed,
                dataset,
                steps,
                device,
                (1.0,),
                lambda _, model, teacher: scores.update(judge.scores(model, teacher)),
            )
        except UserError as error:
            raise UserError(
                f"forecast: a rehearsal of {steps} steps: {error}; lower "
                f"pretrain.optimizer.base_lr, or leave --forecast out"
            ) from error
        if "probe_gain" not in scores:
            raise UserError(
                "forecast: no image of the probe has both something to fill in and something to "
                "see; set other probe.ratios or a smaller probe.unit, or leave --forecast out"
            )
        point = Point(steps, scores["probe_gain"], scores["probe_gain/mean"])
        told = f"{point.decibels:+.2f} dB".replace("-", "\N{MINUS SIGN}")
        say(f"  {f'pretrained {steps} steps':<22} probe gain {told}")
        return point

    planned = planned_steps(spec.trial, dataset)
    found = forecast(rehearsals(gain_after, planned, seconds, time.monotonic))
    for line in in_words(found, planned, spec.trial):
        say(f"  {line}")


def in_words(found: Forecast, planned: int, trial: TrialConfig) -> list[str]:
    """What the forecast says to the plan, and the way out if there is one."""
    plan = f"this study plans {planned:,}"
    longest = found.points[-1]
    if found.steps is not None:
        end = "" if found.high is None else f" to {found.high:,}"
        reach = f"{found.low:,}{end}" if end else f"{found.low:,} or more"
        line = (
            f"the probe gain crosses zero after about {found.steps:,} steps "
            f"({CONFIDENCE:.0%} interval {reach}); {plan}"
        )
    else:
        line = f"the probe gain needs more than {found.low:,} steps to cross zero; {plan}"
    verdict = found.verdict(planned)
    if verdict is Verdict.ENOUGH:
        return [f"{line}: enough"]
    if verdict is Verdict.OPEN:
        return [f"{line}: it may be enough or not"]
    if verdict is Verdict.TOO_FEW:
        lines = [f"warning: {line}: too few to learn more than trivial fillings know"]
        if found.steps is not None:
            unit = unit_of_length(trial.pretrain)
            now = getattr(trial.pretrain, unit)
            more = math.ceil(now * found.steps / planned)
            lines.append(f"set pretrain.{unit} to {more:.15g} or more (now {now:.15g})")
        return lines
    return [
        f"how many steps it takes cannot be told from {longest.steps:,} ({plan}): "
        f"{_why_unknown(found)}"
    ]


def _why_unknown(found: Forecast) -> str:
    if found.points[-1].over_mean <= ESCAPED:
        return (
            "the encoder is not yet beyond the mean of the visible pixels; give --forecast more "
            "seconds, or raise pretrain.optimizer.base_lr"
        )
    return "give --forecast more seconds"
