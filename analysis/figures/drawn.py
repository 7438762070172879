"""What every figure returns, and how arms of a group look and are called."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.tables import Measure
from analysis.theme import GROUPS, SYMBOLS, plain

GROUP_TITLES = {
    "best": "best arm",
    "search": "searched",
    "control": "control",
    "random-init": "random-init",
    "frozen": "frozen",
}


class Drawn(NamedTuple):
    """`says` is the caption, or why there is no figure."""

    numbers: pd.DataFrame
    figure: go.Figure | None
    title: str
    says: str


def grouped(numbers: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The lines of each group of arms, in the order in which groups are always drawn."""
    order = [*GROUPS, *sorted(set(numbers["group"]) - set(GROUPS))]
    parts = [(group, numbers[numbers["group"] == group]) for group in order]
    return [(group, part) for group, part in parts if len(part)]


def mark_of(group: str) -> tuple[str, str]:
    """Colour and symbol of a group of arms."""
    return GROUPS.get(group, ("amber", SYMBOLS[4]))


def name_of(group: str) -> str:
    return GROUP_TITLES.get(group, plain(group))


def counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def no_metric(numbers: pd.DataFrame, measure: Measure) -> str | None:
    """Why there is no figure, if no trial recorded its metric."""
    if numbers.empty:
        return f"No complete trial recorded {measure.title} ({measure.key})."
    return None


def without_nan(values: pd.DataFrame | pd.Series) -> list[Any]:
    """Numbers with None where there is none."""
    array = values.to_numpy(dtype=float)
    listed: list[Any] = np.where(np.isnan(array), np.array(None), array.astype(object)).tolist()
    return listed
