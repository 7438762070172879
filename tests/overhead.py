"""What it costs to run a study's trials on Ray: this project, a plain script, and no Ray at all.

    python -m tests.overhead [--trials 24] [--epochs 40]

The same trials three times, one at a time, on one worker with one thread: in one process without
Ray (alone); by a plain script of Ray Tune, OptunaSearch and TorchTrainer (plain), which is given
the quietest start of Ray there is; and by `maskstudy run` (ours). Every trial trains, evaluates
and writes its checkpoints by the same code. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from study.folder import StudyFolder
from study.ledger import Suggestion, read_suggestions

STUDY = """\
study: overhead
data: {{source: smears, size: 64, images: 48, unlabelled: 208, val: 48}}
trial:
  model: {{size: pico, patch: 8, decoder: {{depth: 1, width: 64}}}}
  masking: {{strategy: random, ratio: {{name: constant, value: 0.75}}}}
  pretrain: {{epochs: {epochs}, batch: 16}}
  segment: {{epochs: {epochs}, batch: 8, features: 8}}
search:
  model.patch: {{choices: [4, 8, 16]}}
  masking.ratio.value: {{low: 0.1, high: 0.9}}
objectives: [{{metric: segment/miou, goal: maximize}}]
stopping: {{name: none}}
controls: []
budget: {{trials: {trials}}}
resources: {{workers: 1, cpus_per_worker: 1, concurrent: 1}}
"""
FIRST_STEP = re.compile(r"first step: ([\d.]+) s in a cold worker group, ([\d.]+) s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=40, help="of each phase")
    parser.add_argument("--part", choices=["alone", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--study", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part is not None:
        print(json.dumps({"alone": alone, "plain": plain}[asked.part](asked.study)))
        return
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        study = Path(scratch) / "overhead.yaml"
        study.write_text(STUDY.format(trials=asked.trials, epochs=asked.epochs))
        print(compare(study, asked.trials))


def compare(study: Path, trials: int) -> str:
    """The three runs one after the other, as a table in words."""
    timed(study, "-m", "study", "check", str(study))  # decodes the data, for all three
    part = ["-m", "tests.overhead", "--study", str(study), "--part"]
    our_wall, told = timed(study, "-m", "study", "run", str(study), "--no-report")
    _, printed = timed(study, *part, "alone")
    each = json.loads(printed.splitlines()[-1])
    plain_wall, printed = timed(study, *part, "plain")
    waits = sorted(json.loads(printed.splitlines()[-1]))

    first_steps = FIRST_STEP.search(told)
    assert first_steps, told
    pure = sum(each)
    folder = StudyFolder(study.parent / "studies" / "overhead")
    suggestions = read_suggestions(folder)
    began = folder.suggestion(1).stat().st_mtime  # the slot is warm, the second trial decided
    warm_wall = folder.outcome(suggestions[-1].trial).stat().st_mtime - began
    ours, theirs = our_wall - pure, plain_wall - pure
    return "\n".join(
        [
            f"{trials} trials, alone in one process: {pure:.1f} s of training",
            f"plain: {plain_wall:.1f} s, {plain_wall / pure:.2f} times that; from decision to "
            f"first step {median(waits):.1f} s ({waits[0]:.1f} to {waits[-1]:.1f})",
            f"ours:  {our_wall:.1f} s, {our_wall / pure:.2f} times that; "
            f"from decision to first step {first_steps[1]} s cold, {first_steps[2]} s warm",
            f"overhead: plain {theirs:.1f} s, ours {ours:.1f} s, {ours / theirs:.2f} of it",
            f"ours once the slot is warm, trials 2 to {trials}: {warm_wall:.1f} s, "
            f"{warm_wall / sum(each[1:]):.3f} times their training alone",
        ]
    )


def timed(study: Path, *command: str) -> tuple[float, str]:
    """Seconds of a process from start to end, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=(study.parent / "errors.log").open("w"),
        text=True,
    )
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stdout + (study.parent / "errors.log").read_text()
    return seconds, done.stdout


def alone(study: Path) -> list[float]:
    """Seconds of each trial of the study, one after the other in this process."""
    import torch

    torch.set_num_threads(1)
    seconds = []
    with tempfile.TemporaryDirectory(prefix="alone-") as scratch:
        for suggestion in drawn(study):
            began = time.perf_counter()
            train(study, suggestion, Path(scratch), lambda: None)
            seconds.append(time.perf_counter() - began)
    return seconds


def plain(study: Path) -> list[float]:
    """The same trials by a plain script; seconds from each one's decision to its first step."""
    import ray
    import ray.train.torch
    import ray.tune
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.search.optuna import OptunaSearch

    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    scratch = Path(tempfile.mkdtemp(prefix="plain-", dir=study.parent))
    by_params = {key(suggestion.params): suggestion for suggestion in drawn(study)}

    def worker(config: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(1)
        waited: list[float] = []

        def on_step() -> None:
            if not waited:
                waited.append(time.time() - config["decided"])

        suggestion = by_params[key(config["params"])]
        miou = train(study, suggestion, scratch, on_step)
        ray.train.report({"segment/miou": miou, "waited": waited[0]}, checkpoint=None)

    def trial(config: dict[str, Any]) -> None:
        ray.train.torch.TorchTrainer(
            worker,
            train_loop_config=config,
            torch_config=ray.train.torch.TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name=f"trial-{time.time_ns()}",
                storage_path=str(scratch),
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    class Search(OptunaSearch):
        """OptunaSearch that notes when it decided."""

        def suggest(self, trial_id: str) -> dict[str, Any] | None:
            params = super().suggest(trial_id)
            return params and {"params": params, "decided": time.time()}

    search = Search(
        {
            "model.patch": CategoricalDistribution([4, 8, 16]),
            "masking.ratio.value": FloatDistribution(0.1, 0.9),
        },
        metric="segment/miou",
        mode="max",
        points_to_evaluate=[suggestion.params for suggestion in by_params.values()],
    )
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": 0.01}),
        tune_config=ray.tune.TuneConfig(
            search_alg=search, num_samples=len(by_params), max_concurrent_trials=1
        ),
        run_config=ray.tune.RunConfig(name="tune", storage_path=str(scratch), verbose=0),
    )
    results = tuner.fit()
    assert not results.num_errors and len(results) == len(by_params)
    return [float(result.metrics["waited"]) for result in results if result.metrics]


def train(study: Path, suggestion: Suggestion, scratch: Path, on_step: Callable[[], None]) -> float:
    """Run a trial as a worker group of one would; its last mIoU."""
    import torch

    from study.ledger import read_environment
    from study.loading import load_spec
    from trainables.job import make_job, run_job

    spec = load_spec(study)
    folder = StudyFolder(study.parent / "studies" / "overhead")
    job = make_job(
        trial=suggestion.trial,
        config=suggestion.config,
        seed=suggestion.seed,
        probe=spec.probe,
        rungs=list(spec.rungs),
        folder=scratch / suggestion.trial,
        remote="",
        shared=None,
        micro_batches=spec.resources.micro_batches,
        recomputes=spec.resources.activation_checkpointing,
        data=spec.data,
        data_root=spec.folder_of_yaml,
        fingerprint=read_environment(folder)["data_fingerprint"],
    )
    last: dict[str, float] = {}

    def report(rows: list[dict[str, Any]]) -> bool:
        last.update({row["metric"]: row["value"] for row in rows})
        return False

    outcome = run_job(
        job,
        device=torch.device("cpu"),
        rank=0,
        world_size=1,
        attempt="1",
        report=report,
        heartbeat=lambda *_: on_step(),
        saved=lambda _: None,
        alive=lambda: None,
        is_leaving=lambda phase, step: False,
        tell=lambda _: None,
    )
    assert outcome == "complete"
    return last["miou"]


def drawn(study: Path) -> list[Suggestion]:
    return read_suggestions(StudyFolder(study.parent / "studies" / "overhead"))


def key(params: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(params.items()))


if __name__ == "__main__":
    main()
