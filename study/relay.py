"""A Tune trial of ours, which trains nothing; its process imports this file, and little more."""

from __future__ import annotations

from typing import Any

import ray
import ray.tune


def relay(config: dict[str, Any]) -> None:
    """The Tune trial: lay the job on the slot's desk, pass on every event.

    Started again after a failure it passes on all events once more; the ledger keeps each once.
    """
    desk = ray.get_actor(config["desk"])
    ray.get(desk.place.remote(config["job"]))
    number = 0
    while True:
        event = ray.get(desk.next_event.remote(number))
        ray.tune.report({**event, "number": number})
        if "outcome" in event:
            return
        number += 1
