"""Recorded tables: every arm of a real study, at every rung and with several seeds.

A table is what `maskstudy run textures.yaml` leaves, made small by

    python -m study.tables STUDY_FOLDER study/tables/textures.parquet

It has a row for each trial and rung: the arm's parameters as samplers name them, `seed`, `phase`,
`progress`, then one column for each of METRICS that the phase measures, others are empty.
replay.py makes a landscape of it.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from study.folder import StudyFolder
from study.ledger import Outcome, read_results, read_rows, read_suggestions

HERE = Path(__file__).parent
METRICS = (
    "probe_psnr",
    "probe_ssim",
    "probe_gain",
    "dense_miou",
    "dense_knn_miou",
    "loss",
    "miou",
    "object_f1",
    "device_seconds",
    "flops",
)
INDEX = ["seed", "phase", "progress"]


def names() -> list[str]:
    """The tables that come with the package."""
    return sorted(path.stem for path in HERE.glob("*.parquet"))


def study_file(name: str) -> Path:
    """The study that a table was recorded by."""
    return HERE / f"{name}.yaml"


def table(name: str) -> pd.DataFrame:
    return pd.read_parquet(HERE / f"{name}.parquet")


def recorded(folder: StudyFolder) -> pd.DataFrame:
    """The table of a study: its complete trials that lie in the space."""
    results = read_results(folder)
    trials = {
        each.trial: each
        for each in read_suggestions(folder)
        if each.params and each.trial in results and results[each.trial].outcome is Outcome.COMPLETE
    }
    rows = read_rows(folder)
    rows = rows[rows.trial.isin(trials) & rows.metric.isin(METRICS)]
    wide = rows.pivot_table(
        index=["trial", "seed", "phase", "progress"], columns="metric", values="value"
    ).reset_index()
    params = pd.DataFrame([trials[trial].params for trial in wide.trial], index=wide.index)
    of_metrics = [metric for metric in METRICS if metric in wide]
    found = pd.concat([params, wide[INDEX], wide[of_metrics].astype("float32")], axis=1)
    return found.sort_values([*params, *INDEX], ignore_index=True)
