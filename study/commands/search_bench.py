"""`bench --search`: what ways to search find on recorded and made-up landscapes, for how much."""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path

from rich.table import Table

from study.commands.terminal import console, say, show
from study.contest import (
    LOOKS,
    REFERENCE,
    Curve,
    all_landscapes,
    contest,
    difference,
    is_installed,
    searcher_of,
)
from study.mistakes import listed, near
from study.rivals import RIVALS
from trainables import durable
from trainables.errors import UserError

CONTENDERS = (*RIVALS, "random+none", "tpe+none", "tpe+halving", "tpe+hyperband")


def bench_search(
    contenders: str, landscapes: str, *, studies: int, workers: int, output: Path | None
) -> None:
    """Print a table for each landscape; with `output` write all curves there as JSON."""
    names = _chosen(landscapes, all_landscapes())
    everybody = tuple(filter(is_installed, CONTENDERS))
    asked = everybody if contenders == "all" else _split(contenders)
    ways = tuple(dict.fromkeys([REFERENCE, *asked]))
    for way in ways:
        searcher_of(way)  # a mistake is told before anything is played
    logging.getLogger("ray").setLevel(logging.ERROR)
    found: list[Curve] = []
    with warnings.catch_warnings(), console.status("playing studies") as status:
        warnings.simplefilter("ignore")
        for name in names:
            of_place = list(
                contest(ways, [name], studies=studies, workers=workers, hears=status.update)
            )
            show(landscape_table(of_place, workers))
            found += of_place
    say(
        f"regret: 0 the best arm, 1 a random one; after the compute of so many full trials; "
        f"difference to {REFERENCE}: mean and 95 % interval over {studies} paired studies"
    )
    if output is not None:
        curves = [
            {
                "landscape": each.landscape,
                "contender": each.contender,
                "workers": workers,
                "spent": each.spent,
                "regrets": each.regrets.round(4).tolist(),
            }
            for each in found
        ]
        with durable.replacing(output) as aside:
            aside.write_text(json.dumps(curves) + "\n")
        say(f"wrote {output}")


def landscape_table(curves: list[Curve], workers: int) -> Table:
    """Regrets, and what each contender takes to find what the reference has after 20 trials."""
    reference = curves[0]
    at_once = f"{workers} trials at once" if workers > 1 else "one trial at a time"
    table = Table(title=f"{reference.landscape}, {at_once}, {len(reference.regrets)} studies")
    table.add_column("way to search")
    for runs in LOOKS:
        table.add_column(f"regret at {runs:g}", justify="right")
    table.add_column(f"at 20, less {reference.contender}'s", justify="right")
    table.add_column(f"has {reference.contender}'s at", justify="right")
    goal = float(reference.at(20.0).mean())
    for curve in curves:
        mean, low, high = difference(curve, reference, 20.0)
        interval = "" if curve is reference or math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]"
        reached = curve.reaches(goal)
        table.add_row(
            curve.contender,
            *(f"{curve.at(runs).mean():.3f}" for runs in LOOKS),
            "" if curve is reference else f"{mean:+.3f}{interval}",
            "never" if reached is None else f"{reached:g}",
        )
    return table


def _chosen(text: str, known: list[str]) -> list[str]:
    names = known if text == "all" else _split(text)
    for name in names:
        if name not in known:
            raise UserError(
                f"--landscapes: given {name!r}; expected all, or some of {listed(known)}"
                f"{near(name, known)}"
            )
    return names


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
