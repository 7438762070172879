"""The slots of a study: they come as room does, and go with it.

A slot begins where its whole group has room now, and Ray places its workers together or not at all:
studies that share a cluster wait for each other, and none holds half of what it needs. A slot whose
workers are gone and find no room hands its trial back, for another slot or for later. A slot that
nothing is left for goes home, so that others have its room.

The thread that watches calls `tick`; the one that runs the study takes and frees slots.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from cluster.connect import Nodes, draining, nodes
from cluster.placement import MOST, in_words, num_groups, refusal, worker_group
from study.conductor import Conductor
from trainables.errors import UserError
from trainables.job import measure_peak, run_job
from trainables.slot import Slot

SURVEY_SECONDS = 2  # between looks at the nodes
PATIENCE_SECONDS = 30  # that a lost worker group gets to come back before its trial is handed on
FIRST_PATIENCE_SECONDS = 120  # that a new one gets to come
HANDOVER_SECONDS = 5  # that both get while another slot has nothing to do
COMING_SECONDS = 600  # that workers get which Ray has started, and which import or wait for peers


@dataclass
class _Watched:
    """A slot, and what is known of it."""

    slot: Slot
    absent_since: float | None  # its workers; None: they are there
    serial: str | None = None  # of the job on its desk
    trial: str = ""  # of that job
    is_taken: bool = False
    is_parked: bool = False  # gets no trial before its workers are back
    is_warm: bool = False  # has ended a trial
    vitals: dict[str, Any] = field(default_factory=dict)


class Fleet:
    """All slots of a running study."""

    def __init__(self, conductor: Conductor, scratch: Path, *, is_one_machine: bool) -> None:
        self._conductor, self._scratch = conductor, scratch
        # a worker group takes two cores to start: side by side, none would be ready soon
        self._at_once = max(1, (os.cpu_count() or 1) // 2) if is_one_machine else MOST
        self._resources = each = conductor.spec.resources
        self.group = worker_group(
            each.workers, each.cpus_per_worker, each.gpus_per_worker, nodes().total
        )
        self._watched: dict[str, _Watched] = {}
        self._homeward: list[_Watched] = []
        self._asked: list[PlacementGroup] = []  # of an autoscaling cluster
        self._lock = threading.RLock()
        self._num_begun = 0
        self._surveyed = 0.0
        self._told = ""
        self._seen: Nodes | None = None  # at the newest survey
        self._is_short = False  # of room, for workers that Ray was asked for

    def begin(self) -> None:
        """The first slots. UserError: the cluster can never hold one."""
        seen = nodes()
        problem = refusal(seen.total, self.group)
        if problem is not None and not self._resources.autoscale:
            raise UserError(f"resources: {problem}")
        self._grow(seen)

    def take(self) -> str | None:
        """The name of a slot that can be given a trial, workers that are there first."""
        with self._lock:
            free = [
                name
                for name, one in self._watched.items()
                if not one.is_taken and not one.is_parked
            ]
            free.sort(key=lambda name: self._watched[name].absent_since is not None)
            if free:
                self._watched[free[0]].is_taken = True
            return free[0] if free else None

    def place(self, name: str, job: dict[str, Any]) -> None:
        """Lay a job on a slot's desk."""
        with self._lock:
            one = self._watched[name]
            one.serial, one.trial = job["serial"], job["trial"]
        one.slot.desk.place.remote(job)

    def decide(self, name: str, event: int, stop: bool) -> None:
        """Answer the rows that a slot has handed in."""
        self._watched[name].slot.desk.decide.remote(event, stop)

    def free(self, name: str, *, has_ended: bool) -> bool:
        """The slot's trial is no longer there; returns whether an earlier one has ended there."""
        with self._lock:
            one = self._watched[name]
            was_warm = one.is_warm
            one.is_taken, one.serial, one.is_warm = False, None, was_warm or has_ended
            return was_warm

    @property
    def is_idle(self) -> bool:
        """Whether no slot has a trial."""
        with self._lock:
            return not any(one.is_taken for one in self._watched.values())

    def desk_name(self, name: str) -> str:
        """By which Ray knows the slot's desk."""
        return self._watched[name].slot.desk_name

    def lost(self) -> Slot | None:
        """A slot that has ended by an error, which nothing mends."""
        with self._lock:
            slots = [one.slot for one in self._watched.values()]
        return next((slot for slot in slots if slot.error is not None), None)

    def vitals(self) -> list[dict[str, Any]]:
        """The newest vitals of every slot that has told any, those that went home among them."""
        with self._lock:
            watched = [*self._homeward, *self._watched.values()]
            return [one.vitals for one in watched if one.vitals]

    def waiting(self) -> list[tuple[str, str]]:
        """(trial, what is done for it) of the trials that are not training yet."""
        with self._lock:
            return [
                (one.trial, self._reason(one))
                for one in self._watched.values()
                if one.serial is not None and one.vitals and not self._trains(one)
            ]

    def _trains(self, one: _Watched) -> bool:
        beat = one.vitals["beat"]
        return one.absent_since is None and bool(beat) and beat["trial"] == one.trial

    def _reason(self, one: _Watched) -> str:
        """What a trial on that slot waits for."""
        if one.vitals["told"]:
            return str(one.vitals["told"])
        if one.absent_since is None:
            return "its workers are about to start"
        if self._is_short and self._seen is not None:
            rooms = f"{in_words(self._seen.free)} of {in_words(self._seen.total)} are free"
            return f"waiting for room: its workers need {self.group}; {rooms}"
        return "Ray is starting its workers"

    def tick(self) -> None:
        """Look after the slots: who is there, who is not, and whether there are too many."""
        with self._lock:
            watched = list(self._watched.values())
        for one in watched:
            # a desk answers as long as the driver lives; at its end nobody looks any more
            with suppress(ray.exceptions.RayError):
                one.vitals = ray.get(one.slot.desk.vitals.remote(), timeout=5)
                self._note(one)
        if time.monotonic() - self._surveyed > SURVEY_SECONDS:
            try:
                seen, leaving, self._is_short = nodes(), draining(), self._has_pending()
            except Exception:  # whatever Ray throws while its head is away: no slot can begin
                return
            self._evacuate(watched, leaving)
            with self._lock:
                self._shrink()
                self._grow(seen)
            self._surveyed = time.monotonic()

    def close(self, timeout: float) -> None:
        """Send everybody home, and wait together for those that are there."""
        with self._lock:
            self._ask(0)
            self._homeward += self._watched.values()
            self._watched.clear()
        for one in self._homeward:
            one.slot.close()
        deadline = time.monotonic() + timeout
        for one in self._homeward:
            if one.absent_since is None:
                one.slot.close(max(0.0, deadline - time.monotonic()))

    def leave(self, timeout: float) -> None:
        """Before Ray's end: let go of slots that did not go home, so that no thread uses Ray."""
        slots = [one.slot for one in [*self._homeward, *self._watched.values()]]
        for slot in slots:
            slot.leave()
        deadline = time.monotonic() + timeout
        for slot in slots:
            slot.join(max(0.0, deadline - time.monotonic()))

    def _note(self, one: _Watched) -> None:
        """Whether a slot's workers are there; a trial that waits for them too long goes back."""
        now = time.monotonic()
        with self._lock:
            if one.vitals["nodes"]:
                if one.absent_since is not None:
                    self._surveyed = 0.0  # the next slot may begin
                one.absent_since, one.is_parked = None, False
                return
            if one.absent_since is None:
                one.absent_since = now
            heirs = [other for other in self._watched.values() if other.absent_since is None]
            patience = PATIENCE_SECONDS if one.vitals["entered"] else FIRST_PATIENCE_SECONDS
            if one.vitals["told"]:
                patience = COMING_SECONDS
            if not all(heir.is_taken for heir in heirs):
                patience = HANDOVER_SECONDS
            if not one.is_parked and now - one.absent_since > patience:
                one.is_parked = True
                self._say(f"{one.slot.name} gets no trial for now: {self._reason(one)}")
            if one.is_parked and one.serial is not None and heirs:
                one.slot.desk.withdraw.remote(one.serial)

    def _evacuate(self, watched: list[_Watched], leaving: set[str]) -> None:
        """Have the workers on nodes that are to be taken away save, and go on elsewhere."""
        for one in watched:
            if leaving.intersection(one.vitals.get("nodes", ())):
                one.slot.desk.leave.remote(one.vitals["ticket"])
                self._say(f"{one.slot.name} is leaving a node that is about to be taken away")

    def _num_wanted(self) -> int:
        """Slots for all that is left to do, within what the user allows."""
        progress = self._conductor.progress
        left = MOST if progress.total is None else max(1, progress.total - progress.num_done)
        return min(left, self._resources.concurrent or MOST, MOST)

    def _grow(self, seen: Nodes) -> None:
        """Begin slots for which there is room, and ask for room where that helps."""
        self._seen = seen
        num_before, wanted = len(self._watched), self._num_wanted()
        idle = [b for b in self._watched.values() if not b.is_taken and not b.is_parked]
        lacking = 0 if idle else wanted - num_before
        room = self._room(seen)
        for _ in range(min(lacking, room, self._at_once - self._num_coming())):
            self._start_slot()
        asked = min(wanted, self._resources.autoscale or 0) - len(self._watched)
        has_nothing_to_do = any(one.absent_since is None for one in idle)
        self._ask(0 if has_nothing_to_do else max(0, asked))
        self._tell(seen, num_before, min(lacking, room))

    def _room(self, seen: Nodes) -> int:
        """Slots that can begin now. What was asked for and given is free for them from here on."""
        given = [pg for pg in self._asked if placement_group_table(pg)["state"] == "CREATED"]
        for group in given:
            self._asked.remove(group)
            remove_placement_group(group)
        # those that have not come yet will take what seems free
        return num_groups(seen.free, self.group) + len(given) - self._num_coming()

    def _num_coming(self) -> int:
        return sum(one.absent_since is not None for one in self._watched.values())

    def _has_pending(self) -> bool:
        """Whether workers of a slot wait in Ray's queue, for want of room."""
        pending = [
            group
            for group in placement_group_table().values()
            if group["state"] == "PENDING" and list(group["bundles"].values()) == self._bundles()
        ]
        return len(pending) > len(self._asked)

    def _bundles(self) -> list[dict[str, float]]:
        each = {"CPU": self.group.cpus} | ({"GPU": self.group.gpus} if self.group.gpus else {})
        return [each] * self.group.workers

    def _shrink(self) -> None:
        """Send home slots that nothing is left for."""
        # a trial whose workers are not there may yet be handed to a slot that has nothing to do
        waiting = sum(
            one.is_taken and one.absent_since is not None for one in self._watched.values()
        )
        surplus = len(self._watched) - self._num_wanted() - waiting
        idle = [name for name, one in self._watched.items() if not one.is_taken]
        idle.sort(key=lambda name: self._watched[name].absent_since is None)  # the absent first
        for name in idle[: max(0, surplus)]:
            self._homeward.append(self._watched.pop(name))
            self._homeward[-1].slot.close()

    def _ask(self, count: int) -> None:
        """Have so many groups of workers wait in Ray's queue, which autoscalers look at."""
        while len(self._asked) > count:
            remove_placement_group(self._asked.pop())
        while len(self._asked) < count:
            self._asked.append(placement_group(self._bundles()))

    def _start_slot(self) -> None:
        conductor, resources = self._conductor, self._resources
        name = f"{conductor.spec.study}-{conductor.ledger.epoch}-slot-{self._num_begun}"
        self._num_begun += 1
        slot = Slot(
            name,
            run_job,
            workers=self.group.workers,
            cpus_per_worker=self.group.cpus,
            gpus_per_worker=self.group.gpus,
            storage=self._scratch,
            measure_peak=None if resources.peak_flops else measure_peak,
            hang_seconds=60 * resources.hang_minutes,
        )
        self._watched[name] = _Watched(slot, absent_since=time.monotonic())

    def _tell(self, seen: Nodes, num_before: int, fitting: int) -> None:
        """One line whenever something has changed. `fitting`: slots that could have begun."""
        count = len(self._watched)
        self._conductor.progress.slots = max(
            1, sum(not one.is_parked for one in self._watched.values())
        )
        if count > num_before:
            verb = "starting" if num_before == 0 else "room for more; starting"
            more = "; the others follow" if num_before + fitting > count else ""
            self._say(
                f"{num_before + fitting} trial(s) at once on {in_words(seen.total)}; "
                f"{verb} {count - num_before} x {self.group.workers} workers{more}"
            )
        elif count == 0:
            asked = ", asked of the autoscaler" if self._asked else ""
            self._say(
                f"waiting for room: a trial needs {self.group}{asked}; "
                f"{in_words(seen.free)} of {in_words(seen.total)} are free"
            )

    def _say(self, text: str) -> None:
        if text != self._told:
            self._conductor.progress.say(text)
        self._told = text
