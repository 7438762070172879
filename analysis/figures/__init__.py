"""The report's figures, each a pair in a file: `<name>_numbers` (tested), then `<name>` (ink).

To add one, write the pair, both with the same arguments, and a line in FIGURES; it stands in the
section named there, behind the figures above it. A figure without data is `Drawn(numbers, None,
title, says)`, whose last says in one sentence why; words of the user go through `theme.text`. What
several figures draw alike is in drawn.py and rows.py.
A metric of METRICS that is measured of each class or size has its figure by that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from analysis.figures import (
    classes,
    cost,
    curves,
    differences,
    labels,
    pareto,
    probes,
    ranking,
    ratio_patch,
    schedules,
)
from analysis.figures.drawn import Drawn
from analysis.tables import StudyTables
from trainables.metrics import GAIN, METRICS, MIOU, PSNR


class Section(NamedTuple):
    """Of the report: the word in its menu, its title, and what stands above its figures."""

    word: str
    title: str
    lead: str = ""


class Figure(NamedTuple):
    """How it is drawn, and where it stands."""

    draw: Callable[[StudyTables], Drawn]
    section: str = "more"  # a key of SECTIONS
    needs_volumes: bool = False  # where images are flat it is left out, without a sentence


# in the order of the report; one without a figure is left out
SECTIONS: dict[str, Section] = {
    "ranking": Section("Arms", "The arms, ranked"),
    "ratio-patch": Section("Ratio × patch", "Mask ratio and patch size"),
    "schedules": Section("Schedules", "Masking schedules"),
    "curves": Section("Curves", "Learning curves"),
    "trade-offs": Section("Trade-offs", "Trade-offs"),
    "cost": Section("Cost", "What the arms cost", "Means over the complete trials of an arm."),
    "control": Section("Control", "Against the control"),
    "probes": Section("Probes", "What probes of pretraining foretell"),
    "segmentation": Section("Segmentation", "Segmentation in detail"),
    "more": Section("More", "More figures"),
}

FIGURES: dict[str, Figure] = {
    "ranking": Figure(ranking.ranking, "ranking"),
    "ratio_patch_psnr": Figure(partial(ratio_patch.ratio_patch, metric=PSNR), "ratio-patch"),
    "ratio_patch_miou": Figure(partial(ratio_patch.ratio_patch, metric=MIOU), "ratio-patch"),
    "schedules_psnr": Figure(partial(schedules.schedules, metric=PSNR), "schedules"),
    "schedules_miou": Figure(partial(schedules.schedules, metric=MIOU), "schedules"),
    "curves_gain": Figure(partial(curves.curves, metric=GAIN), "curves"),
    "curves_psnr": Figure(partial(curves.curves, metric=PSNR), "curves"),
    "curves_miou": Figure(partial(curves.curves, metric=MIOU), "curves"),
    "pareto_quality": Figure(partial(pareto.pareto, x=PSNR, y=MIOU), "trade-offs"),
    "pareto_cost": Figure(partial(pareto.pareto, x="planned_flops", y=MIOU), "trade-offs"),
    "cost_flops": Figure(partial(cost.cost, metric="planned_flops"), "cost"),
    "cost_seconds": Figure(partial(cost.cost, metric="device_seconds"), "cost"),
    "cost_memory": Figure(partial(cost.cost, metric="peak_memory"), "cost"),
    "cost_speed": Figure(partial(cost.cost, metric="images_per_second"), "cost"),
    "differences": Figure(differences.differences, "control"),
    "labels": Figure(labels.labels, "control"),
    "probes": Figure(probes.probes, "probes"),
    **{
        key if metric.parts == "size" else f"class_{key}": Figure(
            partial(classes.classes, metric=f"segment/{key}"),
            "segmentation",
            needs_volumes=metric.of_volumes,
        )
        for key, metric in METRICS.items()
        if metric.parts in classes.WORDS and metric.is_drawn and not metric.is_held_out
    },
}
