"""A study folder as a run leaves it, with made-up numbers, written through the ledger's own API.

mIoU is best at small patches and a third hidden; PSNR prefers small ratios; noise comes from a
seeded generator, so that the same call writes the same content.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from analysis.tables import StudyTables, assemble
from study.folder import StudyFolder
from study.ledger import COLUMNS, Ledger, Outcome, Result, Suggestion
from study.reader import read_yaml
from trainables.metrics import METRICS, MIOU, PHASES, metric_of
from trainables.pictures import save_reconstruction_slices, save_segmentation_slices
from trainables.scores import SIZE_BINS

RUNGS = (0.25, 0.5, 1.0)
CLASSES = ("background", "red cell", "white cell", "platelet")
SPEC = """study: {name}
question: {question}
data: {{source: smears, size: 128}}
trial:
  model: {{size: tiny, patch: 8}}
  masking: {{strategy: random, ratio: {{name: constant, value: 0.75}}}}
search:
  model.patch: {{choices: [4, 8, 16]}}
  masking.ratio:
    choices:
      constant: {{name: constant, value: {{low: 0.1, high: 0.9}}}}
      rising:   {{name: linear, start: {{low: 0.1, high: 0.5}}, end: {{low: 0.5, high: 0.9}}}}
objectives:
  - {{metric: segment/miou, goal: maximize}}
  - {{metric: pretrain/probe_psnr, goal: maximize}}
sampler: {{name: tpe}}
stopping: {{name: halving, metric: pretrain/probe_psnr}}
seeds: 1
confirm: {{arms: 2, seeds: 5}}
budget: {{trials: {trials}}}
rungs: [0.25, 0.5, 1.0]
probe: {{ratios: [0.25, 0.5, 0.75], images: 64}}
"""
ENVIRONMENT = {
    "python": "3.11.9",
    "system": "Linux x86_64",
    "packages": {"maskstudy": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "optuna": "5.0.0"},
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "hardware": {"cpu": "Example CPU", "cores": 16, "gpus": ["Example GPU 80GB"]},
    "data": {"name": "smears", "fingerprint": "5d41402abc4b2a76", "images": 640},
}
_CONFIG: dict[str, Any] = {
    "model": {"size": "tiny", "patch": 8, "decoder": {"depth": 2, "width": 128}},
    "masking": {
        "strategy": {"name": "random"},
        "unit": None,
        "ratio": {"name": "constant", "value": 0.75},
    },
    "pretrain": {"epochs": 40, "batch": 64, "target": "pixels"},
    "segment": {"epochs": 20, "batch": 16, "encoder": "finetune"},
}


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<!--<script>",
    "]]></style><style>*{display:none}</style>",
    "<a href=javascript:alert(1)>x</a>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe\u2028\u0007",
    "$\\unicode{x}$ `<b>`",
    "=cmd|' /C calc'!A1",
    "../../etc/passwd",
    "x" * 4096,
]


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, scripts, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        self._inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)
        elif self._inside is None:
            self.text += data

    def attribute(self, tag: str, name: str) -> list[str]:
        return [str(found[name]) for kind, found in self.elements if kind == tag and name in found]


def ellipsoid(
    shape: tuple[int, int, int] = (24, 32, 20), noise: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor]:
    """A volume (1, X, Y, Z) in [0, 1] with an organ (1) and a lesion (2) at the front right."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, edge) for edge in shape], indexing="ij")
    radius = np.sqrt((x / 0.75) ** 2 + (y / 0.9) ** 2 + (z / 0.8) ** 2)
    lesion = np.sqrt((x - 0.3) ** 2 + (y - 0.4) ** 2 + (z - 0.2) ** 2) < 0.2
    tissue = 0.45 + 0.15 * np.cos(9 * radius) + 0.1 * y + 0.25 * lesion
    speckle = np.random.default_rng(3).normal(0, noise, shape)
    volume = np.where(radius < 1, tissue + speckle, 0).clip(0, 1)
    labels = np.where(lesion, 2, radius < 0.5)
    return torch.from_numpy(volume[None]).float(), torch.from_numpy(labels.astype(np.uint8))


def draw_slices(folder: StudyFolder, shape: tuple[int, int, int] = (24, 32, 20)) -> None:
    """Sheets of a volume for every trial of a study that has pictures, as a trial leaves them."""
    volume, labels = ellipsoid(shape)
    parts = [torch.linspace(0, -(-edge // 8) - 1, edge).round().long() for edge in shape]
    hidden = torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.6
    is_hidden = hidden.repeat(*[-(-edge // 48) for edge in shape])[np.ix_(*parts)]
    for shift, trial in enumerate(sorted(path.name for path in folder.trials.iterdir())):
        pictures = folder.pictures(trial)
        if not pictures.is_dir():
            continue
        spacing = (1.0, 1.0, 1.5)
        if (pictures / "reconstruction.png").is_file():
            blurred = torch.nn.functional.avg_pool3d(volume, 3 + 2 * (shift % 3), 1, 1 + shift % 3)
            path = pictures / "reconstruction-slices.png"
            save_reconstruction_slices(path, volume[None], is_hidden[None], blurred[None], spacing)
        guess = labels.roll(shift % 4, 1)
        save_segmentation_slices(
            pictures / "segmentation-slices.png", volume, labels, guess, spacing
        )


class Run(NamedTuple):
    suggestion: Suggestion
    rows: list[dict[str, Any]]
    result: Result


def write_study(
    root: Path,
    *,
    question: str = "Do small masks help the smallest cells?",
    name: str = "platelets",
    environment: dict[str, Any] | None = None,
    pictures: bool = True,
    **options: Any,
) -> StudyFolder:
    """Write the study of `runs(**options)` under `root`."""
    folder = StudyFolder(root)
    done = runs(**options)
    with Ledger.open(folder, {"command": "test"}) as ledger:
        spec = spec_text(name, question, len(done), options.get("label", "rising"))
        ledger.freeze(spec, _described(environment or ENVIRONMENT, options.get("classes", CLASSES)))
        for suggestion, rows, result in done:
            ledger.suggest(suggestion)
            ledger.commit(suggestion, rows, ledger.new_attempt())
            if pictures and result.outcome is Outcome.COMPLETE:
                _draw(folder.pictures(suggestion.trial), "pretrain" in result.progress, suggestion)
            ledger.finish(result)
        ledger.compact()
    return folder


def refreeze(folder: StudyFolder, old: str, new: str) -> str:
    """As if a study had been begun with another study file; returns what that says."""
    text = folder.spec.read_text()
    assert old in text
    with Ledger.open(folder, {"command": "test"}) as ledger:
        ledger.freeze(text.replace(old, new), ENVIRONMENT, extends=True)
    return folder.spec.read_text()


def study_tables(root: Path, **options: Any) -> StudyTables:
    """The tables of the same study, without a disk."""
    done = runs(**options)
    rows = [
        {"study": "platelets", "trial": s.trial, "arm": s.arm, "seed": s.seed, **row, "attempt": ""}
        for s, reported, _ in done
        for row in reported
    ]
    text = spec_text("platelets", "?", len(done), "rising")
    return assemble(
        StudyFolder(root),
        read_yaml(text, "study.yaml")[0],
        text,
        _described(ENVIRONMENT, options.get("classes", CLASSES)),
        [suggestion for suggestion, _, _ in done],
        {result.trial: result for _, _, result in done},
        pd.DataFrame(rows, columns=list(COLUMNS)),
    )


def _described(environment: dict[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """With the classes of the data."""
    return environment | {"data": environment["data"] | {"classes": list(classes)}}


def hand_made(*trials: dict[str, Any], **spec: Any) -> StudyTables:
    """Tables of trials given as {arm, seed, patch, ratio, miou, psnr, gain, flops, origin, ...}.

    Any other metric by its name, as "segment/threshold_miou". `spec`: what else the file says.
    """
    suggestions, results, rows = [], {}, []
    for number, given in enumerate(trials):
        trial = {"seed": 0, "patch": 8, "ratio": 0.5, "origin": "search", "miou": None}
        trial |= {"outcome": "complete", "psnr": None, "gain": None, "flops": None} | given
        schedule = trial["ratio"]
        if not isinstance(schedule, dict):
            schedule = {"name": "constant", "value": schedule}
        config = {"model": {"patch": trial["patch"]}, "masking": {"ratio": schedule}}
        config |= trial.get("config", {})
        name = f"t{number}"
        seed, origin, labels = trial["seed"], trial["origin"], trial.get("labels", {})
        suggestions.append(Suggestion(number, name, trial["arm"], seed, origin, config, {}, labels))
        outcome = Outcome(trial["outcome"])
        reached, failures = {"pretrain": 1.0, "segment": 1.0}, trial.get("failures", 0)
        results[name] = Result(name, outcome, 1.0, None, reached, failures)
        progress = 1.0 if outcome is Outcome.COMPLETE else 0.5
        for phase, metric, value in (
            ("pretrain", "probe_psnr", trial["psnr"]),
            ("pretrain", "probe_gain", trial["gain"]),
            ("pretrain", "probe_gain/nearest", trial["gain"]),
            ("segment", "miou", trial["miou"]),
            ("pretrain", "planned_flops", trial["flops"]),
            *((*name.split("/", 1), value) for name, value in given.items() if "/" in name),
        ):
            if value is not None:
                about = ["study", name, trial["arm"], seed, phase, 10, 1.0, progress, metric]
                known = metric_of(f"{phase}/{metric}")
                rows.append([*about, value, known.goal, known.unit, 1.0, "a"])
    return assemble(
        StudyFolder(Path("study")),
        {"study": "study", "objectives": [{"metric": MIOU, "goal": "maximize"}]} | spec,
        SPEC,
        {},
        suggestions,
        results,
        pd.DataFrame(rows, columns=list(COLUMNS)),
    )


def hostile_study(root: Path) -> StudyFolder:
    words = " ".join(HOSTILE[:-1])
    return write_study(
        root,
        question=words,
        name=HOSTILE[0],
        label=words,
        classes=("background", *HOSTILE[:6]),
        error="\n".join(HOSTILE),
        environment=ENVIRONMENT | {HOSTILE[1]: HOSTILE, "data": {HOSTILE[0]: HOSTILE[2]}},
        confirm_seeds=2,
    )


def spec_text(name: str, question: str, trials: int, label: str) -> str:
    text = SPEC.format(name=json.dumps(name), question=json.dumps(question), trials=trials)
    return text.replace("      rising: ", f"      {json.dumps(label)}: ")


def runs(
    *,
    trials: int = 14,
    confirm_seeds: int = 0,
    gain: float = 1.0,
    noise: float = 0.008,
    label: str = "rising",
    classes: tuple[str, ...] = CLASSES,
    error: str = "RuntimeError: the worker was lost",
    patches: tuple[int, ...] = (4, 8, 16),
    test_split: bool = True,
    trivial: float = 22.0,
    seed: int = 7,
) -> list[Run]:
    """Control, random-init and frozen, then searched arms, then confirmation.

    Of each seven searched trials two are stopped at a rung; one of all fails. `gain` scales how far
    settings move mIoU, `trivial` is the PSNR of harmonic inpainting, the best trivial filling.
    `label` is what the study calls its second schedule.
    """
    rng = np.random.default_rng(seed)
    drawn = _suggestions(trials, rng, label, patches)
    if confirm_seeds:
        searched = [s for s in drawn if s.origin == "search" and _ending(s)[1] is None]
        best = sorted(searched, key=lambda s: -_true_miou(s.config, gain))[:2]
        for first in [drawn[0], drawn[1], *best]:
            for fresh in range(1, confirm_seeds + 1):
                again = (len(drawn), first.config, fresh, "confirm", first.labels)
                drawn.append(_suggestion(*again))
    return [_run(one, rng, gain, noise, classes, error, test_split, trivial) for one in drawn]


def _suggestions(
    trials: int, rng: np.random.Generator, label: str, patches: tuple[int, ...]
) -> list[Suggestion]:
    drawn = []
    for number in range(trials):
        config = json.loads(json.dumps(_CONFIG))
        labels: dict[str, Any] = {"model.patch": 8, "masking.ratio": "constant"}
        origin = ["control", "control:random-init", "control:frozen", "search"][min(number, 3)]
        if number in (1, 2):
            config["segment"]["encoder"] = origin.partition(":")[2]
        if number >= 3:
            patch = patches[number % len(patches)]
            config["model"]["patch"] = patch
            labels = {"model.patch": patch, "masking.ratio": "constant"}
            if number % 2:
                share = round(float(rng.uniform(0.1, 0.9)), 7)
                config["masking"]["ratio"] = {"name": "constant", "value": share}
            else:
                start, end = float(rng.uniform(0.1, 0.5)), float(rng.uniform(0.5, 0.9))
                ratio = {"name": "linear", "start": round(start, 7), "end": round(end, 7)}
                config["masking"]["ratio"] = ratio
                labels["masking.ratio"] = label
        drawn.append(_suggestion(number, config, 0, origin, labels))
    return drawn


def _suggestion(
    number: int, config: dict[str, Any], seed: int, origin: str, labels: dict[str, Any]
) -> Suggestion:
    text = json.dumps(config, sort_keys=True)
    arm = hashlib.sha256(text.encode()).hexdigest()[:8]
    trial = hashlib.sha256(f"{text} {seed}".encode()).hexdigest()[:12]
    return Suggestion(number, trial, arm, seed, origin, config, {}, labels)


def _run(
    suggestion: Suggestion,
    rng: np.random.Generator,
    gain: float,
    noise: float,
    classes: tuple[str, ...],
    error: str,
    test_split: bool,
    trivial: float,
) -> Run:
    outcome, phase_of_end, end = _ending(suggestion)
    luck = float(rng.normal(0, noise))
    rows: list[dict[str, Any]] = []
    progress = {}
    for phase in PHASES:
        if phase == "pretrain" and suggestion.config["segment"]["encoder"] == "random-init":
            continue
        reached = [rung for rung in RUNGS if phase != phase_of_end or rung <= end]
        for rung in reached:
            values = (
                _pretrain_values(suggestion.config, rung, luck, trivial)
                if phase == "pretrain"
                else _segment_values(suggestion.config, rung, luck, gain, classes, test_split)
            )
            rows += [_row(phase, rung, metric, value) for metric, value in values.items()]
        progress[phase] = reached[-1]
        if phase == phase_of_end:
            break
    message = error if outcome is Outcome.FAILED else None
    seconds = 300.0 + suggestion.number
    return Run(suggestion, rows, Result(suggestion.trial, outcome, seconds, message, progress))


def _ending(suggestion: Suggestion) -> tuple[Outcome, str | None, float]:
    """How a trial ends: outcome, phase and the last rung of it."""
    if suggestion.origin != "search":
        return Outcome.COMPLETE, None, 1.0
    if suggestion.number == 9:
        return Outcome.FAILED, "segment", 0.25
    if suggestion.number % 7 in (3, 6):
        return Outcome.STOPPED, "pretrain", 0.25 if suggestion.number % 2 else 0.5
    return Outcome.COMPLETE, None, 1.0


def _share(config: dict[str, Any]) -> float:
    ratio = config["masking"]["ratio"]
    return float(ratio["value"] if "value" in ratio else (ratio["start"] + ratio["end"]) / 2)


def _true_miou(config: dict[str, Any], gain: float) -> float:
    patch, share = config["model"]["patch"], _share(config)
    rising = 0.012 if config["masking"]["ratio"]["name"] == "linear" else 0.0
    moved = -0.045 * math.log2(patch / 8) - 0.35 * (share - 0.4) ** 2 + rising
    return float(
        0.55
        + gain * moved
        - {"random-init": 0.06, "frozen": 0.09}.get(config["segment"]["encoder"], 0.0)
    )


def _pretrain_values(
    config: dict[str, Any], rung: float, luck: float, trivial: float
) -> dict[str, float]:
    patch, share = config["model"]["patch"], _share(config)
    full = 27 - 1.1 * math.log2(patch / 4) - 5 * (share - 0.45) ** 2 + 30 * luck
    psnr = full - 4.5 * math.exp(-3 * rung)
    tokens = (128 / patch) ** 2
    flops = 4e11 * tokens * (1.3 - share) * 40
    values = {"loss": 0.4 * math.exp(-2 * rung), "probe_psnr": psnr}
    for probe, shift in ((0.25, 1.6), (0.5, 0.0), (0.75, -1.9)):
        values[f"probe_psnr@{probe}"] = psnr + shift
    for name, less in [("", 0.0), ("/laplace", 0.0), ("/nearest", 1.0), ("/mean", 2.5)]:
        values[f"probe_gain{name}"] = psnr - trivial + less
    return values | {
        "probe_ssim": 0.5 + psnr / 80,
        "dense_miou": psnr / 50,
        "dense_knn_miou": 0.4 - psnr / 200,
        "dense_miou_random": 0.42,
        "dense_miou_pixels": 0.36,
        "native_psnr_hidden": psnr - 3 * (share - 0.5),
        "native_psnr_all": psnr - 3 * (share - 0.5) - 10 * math.log10(share),
        "ratio": share,
        "images_per_second": 9e4 / tokens**0.8,
        "device_seconds": rung * tokens * (1.3 - share) * 1.2,
        "flops": rung * flops,
        "planned_flops": flops,
        "peak_memory": 6e6 * tokens * (1.2 - share) + 4e8,
    }


def _segment_values(
    config: dict[str, Any],
    rung: float,
    luck: float,
    gain: float,
    classes: tuple[str, ...],
    test_split: bool,
) -> dict[str, float]:
    miou = _true_miou(config, gain) + luck - 0.25 * math.exp(-4 * rung)
    tokens = (128 / config["model"]["patch"]) ** 2
    ious = {name: miou + 0.12 - 0.12 * index for index, name in enumerate(classes[1:])}
    values = {"loss": 0.9 * math.exp(-rung), "miou": miou, "miou_with_background": miou + 0.08}
    values |= {f"iou/{classes[0]}": 0.93} | {f"iou/{name}": value for name, value in ious.items()}
    values |= {"dice": miou + 0.1, "object_f1": miou + 0.05}
    for size, shift in (("small", -0.15), ("medium", 0.06), ("large", 0.14)):
        values[f"object_f1/{size}"] = miou + shift
    for name, value in [("", miou), *((f"/{name}", value) for name, value in ious.items())]:
        values[f"case_dice{name}"] = value + 0.05
        values[f"hd95{name}"] = 20 * (1 - value)
        values[f"nsd{name}"] = value + 0.1
    values |= {
        "images_per_second": 5e3 / tokens**0.6,
        "device_seconds": rung * tokens * 0.4,
        "flops": rung * 2e11 * tokens * 20,
        "planned_flops": 2e11 * tokens * 20,
        "peak_memory": 9e6 * tokens + 7e8,
    }
    if rung == 1:
        values |= {"threshold_miou": 0.31, "ridge_pixels_miou": 0.28}
    if rung == 1 and test_split:
        values |= {"test_miou": miou - 0.012, "test_threshold_miou": 0.3}
    return dict.fromkeys(_scores(classes), miou) | values


def _scores(classes: tuple[str, ...]) -> Iterator[str]:
    """Every score of the validation split that METRICS has."""
    for key, metric in METRICS.items():
        if metric.of_split is None or metric.is_held_out:
            continue
        if metric.has_whole:
            yield key
        of_classes = classes if metric.of_background else classes[1:]
        parts = {"class": of_classes, "size": SIZE_BINS}.get(metric.parts or "", ())
        yield from (f"{key}/{part}" for part in parts)


def _row(phase: str, rung: float, metric: str, value: float) -> dict[str, Any]:
    known = metric_of(f"{phase}/{metric}")
    return {
        "phase": phase,
        "step": round(400 * rung),
        "epoch": 40 * rung,
        "progress": rung,
        "metric": metric,
        "value": value,
        "goal": known.goal,
        "unit": known.unit,
        "seconds": 300 * rung,
    }


def _draw(folder: Path, reconstructs: bool, suggestion: Suggestion) -> None:
    """Four lines of three tiles, 128 pixels each with gaps, as a trial draws them."""
    rng = np.random.default_rng(11)  # every trial shows the same images
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:128, :128]
    for name in ["reconstruction"] * reconstructs + ["segmentation"]:
        grid = np.full((4 * 132 - 4, 3 * 132 - 4, 3), 255, np.uint8)
        for line in range(4):
            image = np.full((128, 128, 3), (236, 226, 216), np.uint8)
            truth = image.copy()
            guess = image.copy()
            for kind in range(12):
                y, x = rng.uniform(0, 128, 2)
                radius = (17, 17, 17, 5, 24)[kind % 5]
                distance = np.hypot(rows - y, columns - x)
                cell = distance < radius
                shade = np.clip(1.15 - 0.3 * distance[cell] / radius, 0, 1)[:, None]
                image[cell] = shade * np.array([(205, 110, 110), (120, 90, 160)][radius == 24])
                mark = {17: (230, 159, 0), 5: (0, 158, 115), 24: (86, 180, 233)}[radius]
                truth[cell] = mark
                guess[np.hypot(rows - y - 1, columns - x + 1) < radius * 0.95] = mark
            hidden = image.copy()
            edge = min(20 + suggestion.number, 64)
            small = Image.fromarray(image).resize((edge, edge), Image.Resampling.BOX)
            blurred = np.asarray(small.resize((128, 128)))
            is_hidden = np.kron(rng.random((16, 16)) < 0.5, np.ones((8, 8), bool))
            hidden[is_hidden] = 128
            tiles = (
                [image, hidden, np.where(is_hidden[..., None], blurred, image)]
                if name == "reconstruction"
                else [image, truth, guess]
            )
            for column, tile in enumerate(tiles):
                grid[132 * line : 132 * line + 128, 132 * column : 132 * column + 128] = tile
        Image.fromarray(grid).save(folder / f"{name}.png")
