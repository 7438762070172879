"""What a person sees while a study runs: a live table on a terminal, lines in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import fmean, median

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from study.best import FRESH
from study.gain import in_words
from study.ledger import Outcome, Suggestion
from trainables.fillings import Gain
from trainables.settings import short

MOMENT_SECONDS = 0.5  # that nobody needs to be told what they wait for
REMIND_SECONDS = 5.0  # between two lines of a log about the same


@dataclass
class Line:
    """One trial of this run, as the display knows it."""

    suggestion: Suggestion
    began: float
    phase: str = "starting"
    progress: float = 0.0
    images_per_second: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    outcome: Outcome | None = None
    seconds: float = 0.0
    pretraining: float = 0.0  # seconds of them until its encoder was pretrained
    reminded: float = 0.0  # when a log last said what it waits for


class Patience(AbstractContextManager["Patience"]):
    """Shows what takes long before there is a study to show: on a terminal in place, else in lines.

    A log gets a first line when it has taken a moment, and the newest state every few seconds.
    """

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._text, self._began = console, what, time.monotonic()
        self._status = console.status(what) if console.is_terminal else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._remind, name="patience", daemon=True)

    def say(self, text: str) -> None:
        """What is done now; cheap, from any thread."""
        self._text = text

    def __enter__(self) -> Patience:
        if self._status is not None:
            self._status.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._status is not None:
            self._status.stop()

    def _remind(self) -> None:
        wait = MOMENT_SECONDS
        while not self._ended.wait(wait):
            if self._status is not None:
                self._status.update(self._text)
                continue
            seconds = time.monotonic() - self._began
            self._console.print(f"{self._text} ({seconds:.0f} s)", markup=False, soft_wrap=True)
            wait = REMIND_SECONDS


class Progress:
    """Collects events; `start` and `stop` bracket the live table."""

    def __init__(
        self,
        *,
        study: str,
        total: int | None,
        done: int,
        metrics: list[str],
        pretrainings: int | None = None,
    ):
        self.study, self.total, self.done_before = study, total, done
        self.metrics = metrics
        self.pretrainings = pretrainings  # of all trials, one for a seed; None: of each its own
        self.spent = ""  # which part of a budget that is not in trials alone
        self.best = ""  # the best arm so far, in a few words
        self.lines: dict[str, Line] = {}
        self.began = time.monotonic()
        self.slots = 1
        self.console = Console(highlight=False)
        self._live: Live | None = None
        # seconds from decision to first step, of trials in cold and in warm worker groups
        self._first_steps: dict[str, list[float]] = {"cold": [], "warm": []}

    def start(self) -> None:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One plain line, with the seconds since the start."""
        stamp = f"[{time.monotonic() - self.began:5.0f} s] "
        self.console.print(stamp + text, markup=False, soft_wrap=True)

    def suggested(self, suggestion: Suggestion, *, resumed: bool) -> None:
        self.lines[suggestion.trial] = Line(suggestion, time.monotonic())
        verb = "resumes" if resumed else "starts"
        self._event(f"{verb} {describe(suggestion)}")

    def waiting(self, trial: str, text: str) -> None:
        """What is done for a trial before it trains; a log hears of changes, and now and then."""
        line = self.lines.get(trial)
        if line is None or line.outcome is not None:
            return
        now = time.monotonic()
        if now - line.began < MOMENT_SECONDS:
            return
        if text != line.phase or now - line.reminded > REMIND_SECONDS:
            line.phase, line.reminded = text, now
            self._event(f"{describe(line.suggestion)}: {text} ({now - line.began:.0f} s)")

    def beat(self, trial: str, phase: str, progress: float, images_per_second: float) -> None:
        line = self.lines.get(trial)
        if line is None or line.outcome is not None:
            return
        if phase != line.phase or progress > line.progress:  # a rung may have overtaken it
            line.phase, line.progress = phase, progress
        line.images_per_second = images_per_second

    def rung(
        self, suggestion: Suggestion, phase: str, progress: float, values: dict[str, float]
    ) -> None:
        line = self.lines[suggestion.trial]
        line.phase, line.progress = phase, progress
        if phase == "pretrain" and progress >= 1:
            line.pretraining = time.monotonic() - line.began
        line.values.update(values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._event(
            f"{describe(suggestion)}: {phase} {progress:.0%}" + (f", {shown}" if shown else "")
        )

    def finished(
        self,
        suggestion: Suggestion,
        outcome: Outcome,
        error: str | None,
        gain: Gain | None = None,
    ) -> None:
        line = self.lines[suggestion.trial]
        line.outcome, line.seconds = outcome, time.monotonic() - line.began
        why = f" ({error.strip().splitlines()[-1]})" if error else ""
        learnt = f" · probe gain {in_words(gain)}" if gain else ""
        self._event(
            f"{outcome.value}: {describe(suggestion)}{why}{learnt} "
            f"· {self._done_text()}{self._best_text()}{self._left_text()}"
        )

    def handed_back(self, suggestion: Suggestion) -> None:
        self.lines[suggestion.trial].phase = "waiting"
        self._event(f"handed back: {describe(suggestion)}; it resumes where there is room")

    def rests(self, suggestion: Suggestion) -> None:
        """It is at a rung of a population, to go on once all others have come there."""
        line = self.lines[suggestion.trial]
        line.phase = "resting"

    def first_step(self, seconds: float | None, *, is_warm: bool) -> None:
        """How long a trial waited for its first step; `is_warm`: not the first of its slot."""
        if seconds is not None:
            self._first_steps["warm" if is_warm else "cold"].append(seconds)

    def say_first_steps(self) -> None:
        cold, warm = self._first_steps["cold"], self._first_steps["warm"]
        if cold and warm:
            self.say(
                f"from decision to first step: {max(cold):.1f} s in a cold worker group, "
                f"{median(warm):.2f} s (median of {len(warm)}; longest {max(warm):.2f} s) in a warm"
            )

    @property
    def num_done(self) -> int:
        return self.done_before + sum(line.outcome is not None for line in self.lines.values())

    def seconds_left(self) -> float | None:
        """Remaining trials at the mean duration of those that finished in this run.

        None while nobody can say how many there will be.
        Where pretraining is shared, the first of each seed has the one that it takes.
        """
        finished = [line for line in self.lines.values() if line.outcome is not None]
        if not finished or self.total is None:
            return None
        running = [line for line in self.lines.values() if line.outcome is None]
        waiting = max(0, self.total - self.num_done - len(running))
        is_shared = self.pretrainings is not None
        newest_first = reversed(self.lines.values())
        firsts = {line.suggestion.seed: line for line in newest_first} if is_shared else {}
        paid = [line.pretraining for line in firsts.values() if line.pretraining]
        extra = fmean(paid) if paid else 0.0
        lacking = max(0, (self.pretrainings or 0) - len(firsts))
        mean = fmean(line.seconds - is_shared * line.pretraining for line in finished)
        now, started = time.monotonic(), 0.0
        for line in running:
            is_first = firsts.get(line.suggestion.seed) is line
            started += max(0.0, mean + is_first * extra - (now - line.began))
        return (waiting * mean + lacking * extra + started) / self.slots

    def table(self) -> Group:
        """The live view: what runs, the latest that finished, best so far, time left."""
        table = Table(title=None, expand=False, pad_edge=False, box=None)
        for column in ("trial", "arm", "phase", "progress", "img/s", *self.metrics, "outcome"):
            table.add_column(column, no_wrap=column != "arm")
        for line in self._latest():
            shown = [f"{line.values[m]:.4g}" if m in line.values else "" for m in self.metrics]
            table.add_row(
                line.suggestion.trial[:6],
                arm_text(line.suggestion),
                line.phase,
                _bar(line.progress),
                f"{line.images_per_second:.0f}" if line.images_per_second else "",
                *shown,
                line.outcome.value if line.outcome else "running",
            )
        head = Text(f"{self.study}: {self._done_text()}{self._best_text()}{self._left_text()}")
        return Group(head, table)

    def _latest(self) -> Iterable[Line]:
        lines = list(self.lines.values())
        running = [line for line in lines if line.outcome is None]
        finished = [line for line in lines if line.outcome is not None]
        return finished[-8:] + running

    def _done_text(self) -> str:
        if self.total is None:
            return f"{self.num_done} trials" + (f", {self.spent}" if self.spent else "")
        return f"{self.num_done}/{self.total} trials"

    def _best_text(self) -> str:
        return f" · {self.best}" if self.best else ""

    def _left_text(self) -> str:
        left = self.seconds_left()
        return "" if left is None else f" · about {duration(left)} left"

    def _event(self, text: str) -> None:
        if self._live is None:
            self.say(text)


def describe(suggestion: Suggestion) -> str:
    return f"trial {suggestion.trial[:6]} [{arm_text(suggestion)}]"


def arm_text(suggestion: Suggestion) -> str:
    """The arm in a few words: what it is, or what was searched and found for it."""
    if suggestion.origin.startswith("control"):
        return suggestion.origin
    if suggestion.origin in FRESH and not suggestion.params:  # a control, on fresh seeds
        encoder = suggestion.config["segment"]["encoder"]
        return "control" if encoder == "finetune" else f"control:{encoder}"
    born = suggestion.born
    since = f" from {short(born['progress'])} on" if born and born["parent"] else ""
    settings = [
        f"{path.split('.')[-1]} {short(value)}{since}" for path, value in suggestion.params.items()
    ]
    return ", ".join(settings) or suggestion.arm


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _bar(share: float, width: int = 10) -> str:
    full = round(share * width)
    return "█" * full + "░" * (width - full) + f" {share:4.0%}"
