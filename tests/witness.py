"""A study whose workers write down, beside the ledger, what they do: the oracle of tests that kill.

python -m tests.witness LOG run study.yaml    every step of pretraining, every row that was taken
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from study.__main__ import main
from trainables import phase
from trainables.job import run_job

Row = tuple[str, str, int, str]  # trial, phase, step, metric


@dataclass
class Testimony:
    """What the log says."""

    steps: Counter[tuple[str, int]] = field(default_factory=Counter)  # how often each was done
    jumps: list[tuple[str, int, int]] = field(default_factory=list)  # trial, last step, next one
    rows: dict[Row, set[float]] = field(default_factory=dict)  # the values taken for each


def witnessed(log: str, job: dict[str, Any], **given: Any) -> str:
    """`run_job`, and every line is in the log before anything else is done."""
    update, report_to = phase.update, given["report"]

    def write(entry: dict[str, Any]) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, json.dumps({"trial": job["trial"], **entry}).encode() + b"\n")
        os.close(descriptor)

    def witnessed_update(learner: Any, loss: Any, plan: phase.Plan, step: int) -> Any:
        learnt = update(learner, loss, plan, step)
        if given["rank"] == 0 and plan.phase == "pretrain":
            write({"step": step})
        return learnt

    def report(rows: list[dict[str, Any]]) -> bool:
        answer = bool(report_to(rows))
        write({"rows": [(row["phase"], row["step"], row["metric"], row["value"]) for row in rows]})
        return answer

    phase.update = witnessed_update
    try:
        return run_job(job, **{**given, "report": report})
    finally:
        phase.update = update


def read(log: Path) -> Testimony:
    """What was written by now; the last line may be half of one."""
    told = Testimony()
    last: dict[str, int] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "step" in entry:
            trial, step = entry["trial"], entry["step"]
            told.steps[trial, step] += 1
            if step != last.get(trial, -1) + 1:
                told.jumps.append((trial, last.get(trial, -1), step))
            last[trial] = step
        for *place, value in entry.get("rows", []):
            told.rows.setdefault((entry["trial"], *place), set()).add(value)
    return told


if __name__ == "__main__":
    import study.fleet
    from tests import witness  # workers find it by this name

    study.fleet.run_job = partial(witness.witnessed, sys.argv[1])
    main(sys.argv[2:])
