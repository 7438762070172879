"""A study's ledger as tables for statistics, figures and the report.

Reads through `study.ledger` only, takes no lock, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.theme import plain
from study.best import VERDICT, Final, Stage, Standing, group_of, of_file
from study.folder import StudyFolder
from study.gain import OF_GAIN, gains
from study.ledger import (
    Result,
    Suggestion,
    read_environment,
    read_results,
    read_rows,
    read_spec,
    read_suggestions,
)
from study.measured import measure
from study.owed import is_unfinished
from study.reader import describe, read_document
from trainables.edges import in_words, simplest
from trainables.errors import StorageError, UserError
from trainables.fillings import Gain
from trainables.metrics import METRICS, MIOU, PHASES, PSNR, known, parse, title_of
from trainables.schedules import MIDPOINTS, SCHEDULES
from trainables.settings import flatten, short

LONGEST_WORD = 60
MOST_WRITTEN_OUT = 1e5  # from here on values are told in powers of ten
ABSENT = "–"
NO_UNIT = ("", "1", "none", "None", "nan")

OUTCOMES = {  # how a trial ended: what that means
    "complete": "spent the whole budget",
    "stopped": "ended at a rung by the stopping rule",
    "diverged": "the loss was not finite",
    "out-of-memory": "did not fit into memory",
    "failed": "ended by an error",
}


class Measure(NamedTuple):
    """A metric as figures name it. `key` is phase/metric."""

    key: str
    title: str
    unit: str
    maximize: bool

    @property
    def axis(self) -> str:
        about = [self.unit] if self.unit else []
        about += [] if self.maximize else ["lower is better"]
        return f"{self.title} ({', '.join(about)})" if about else self.title

    @property
    def heading(self) -> str:
        """What a figure about it is called."""
        metric = known(self.key)
        words = (metric.heading if metric else "") or self.title
        return capitalised(words)

    @property
    def is_comparable(self) -> bool:
        """Whether arms that differ in ratio or patch may be compared by it."""
        metric = known(self.key)
        return metric is None or metric.is_comparable

    def show(self, value: float | None, signed: bool = False) -> str:
        """The value with its unit."""
        number = self.number(value, signed)
        return f"{number} {self.unit}" if self.unit and number != ABSENT else number

    def number(self, value: float | None, signed: bool = False) -> str:
        """The value with as many digits as mean something."""
        if value is None or not np.isfinite(value):
            return ABSENT
        digits = 2 if self.unit in ("dB", "mm") else 3 if abs(value) < 10 else 1
        form = ".4g" if abs(value) >= MOST_WRITTEN_OUT else f".{digits}f"
        number = f"{value:+{form}}" if signed else f"{value:{form}}"
        return number.replace("-", "\N{MINUS SIGN}")


def measure_of(name: str, goal: object = None, unit: object = None) -> Measure:
    """As METRICS has it; `goal` and `unit` count for a metric that only another version has."""
    metric = known(name)
    if metric is not None:
        goal, unit = metric.goal, metric.unit
    has_unit = unit is not None and str(unit) not in NO_UNIT
    return Measure(name, title_of(name), str(unit) if has_unit else "", goal != "minimize")


def capitalised(words: str) -> str:
    """With a capital first; abbreviations stay as they are."""
    return words[:1].upper() + words[1:]


@dataclass(frozen=True, eq=False)
class StudyTables:
    """What a study's folder says.

    suggestions: number, trial, arm, seed, origin. arms (index arm): origin, group ("search",
    "control", "random-init", "frozen"), label, patch, unit (8, or "4x8x8" where axes differ),
    schedule, ratio (mean over training), settings (flattened). results (index trial): outcome,
    seconds, error, whether it is to be run again, and how far each phase came.
    """

    folder: StudyFolder
    name: str
    spec: dict[str, Any]
    spec_text: str
    environment: dict[str, Any]
    suggestions: pd.DataFrame
    arms: pd.DataFrame
    rows: pd.DataFrame
    results: pd.DataFrame

    def label(self, arm: str) -> str:
        return str(self.arms.at[arm, "label"])

    def arm_of(self, trial: str) -> str:
        drawn = self.suggestions
        return str(drawn.loc[drawn["trial"] == trial, "arm"].iloc[0])

    def measure(self, name: str) -> Measure:
        """As METRICS has it, or else as its rows state."""
        return measure_of(name, *self.measured.get(name, ()))

    @cached_property
    def measured(self) -> dict[str, tuple[object, object]]:
        """`phase/metric` of all rows, with the goal and the unit that they state."""
        first = self.rows.drop_duplicates(["phase", "metric"])
        return {f"{line.phase}/{line.metric}": (line.goal, line.unit) for line in lines_of(first)}

    @cached_property
    def objectives(self) -> list[Measure]:
        """What the study asked for, in its order, as far as there are rows of it."""
        asked = [one for one in objectives_of(self.spec) if one.key in self.measured]
        found = [self.measure(one.key)._replace(maximize=one.maximize) for one in asked]
        return found or [measure_of(name) for name in (MIOU, PSNR) if name in self.measured]

    @property
    def classes(self) -> list[str]:
        """Names of the data's classes, background first; empty where nothing is labelled."""
        named = _child(self.environment, "data").get("classes")
        return [str(name) for name in named] if isinstance(named, list) else []

    @cached_property
    def gains(self) -> dict[str, Gain]:
        """Trial -> how much better its encoder fills in hidden pixels than trivial fillings."""
        return gains(measure(self.rows[self.rows["metric"].isin(OF_GAIN)]))

    @property
    def last_stage(self) -> Stage:
        """Of the study file: what is said of an arm rests on the seeds that it gets there."""
        confirm = _child(self.spec, "confirm")
        if confirm.get("verdict"):
            return Stage.VERDICT
        return Stage.CONFIRM if confirm else Stage.SEARCH

    @cached_property
    def verdicts_over(self) -> set[str]:
        """Arms of whose verdict every trial has ended; none before the control's has."""
        ended = self.results.index[~self.results["is_unfinished"].astype(bool)]
        is_over = (self.suggestions["origin"] == VERDICT) & self.suggestions["trial"].isin(ended)
        numbers = self.suggestions.loc[is_over, "arm"].value_counts()
        planned = _child(self.spec, "confirm").get("verdict")
        over = {str(arm) for arm, number in numbers.items() if number == planned}
        controls = self.arms.index[self.arms["group"] == "control"]
        return over if set(map(str, controls)) <= over else set()

    def standings(self, measure: Measure, finals: pd.DataFrame | None = None) -> list[Standing]:
        """The arms by a metric, best first; `finals`: other columns than those of `final`."""
        found = final(self) if finals is None else finals
        values = found[measure.key].to_dict() if measure.key in found else {}
        trials = [
            Final(str(line.arm), str(line.origin), int(line.seed), _finite(values.get(line.trial)))
            for line in lines_of(self.suggestions.sort_values("number"))
        ]
        return of_file(trials, "maximize" if measure.maximize else "minimize", self.spec)


def objectives_of(spec: Mapping[str, Any]) -> list[Measure]:
    """What a study file asks for, in its order."""
    asked = spec.get("objectives")
    return [
        measure_of(item["metric"], item.get("goal"))
        for item in (asked if isinstance(asked, list) else [])
        if isinstance(item, dict) and isinstance(item.get("metric"), str)
    ]


def load(folder: Path | StudyFolder) -> StudyTables:
    """Read a study's folder. Unreadable parts are named in a StorageError, never skipped."""
    place = folder if isinstance(folder, StudyFolder) else StudyFolder(Path(folder))
    spec, spec_text = spec_of(place)
    return assemble(
        place,
        spec,
        spec_text,
        read_environment(place),
        read_suggestions(place),
        read_results(place),
        read_rows(place),
    )


def spec_of(folder: StudyFolder) -> tuple[dict[str, Any], str]:
    """The frozen study file, as settings and as text, whichever version wrote it."""
    text = read_spec(folder)
    if text is None:
        raise UserError(
            f"{folder.root}: no study lies here ({folder.spec.name} is missing); give the folder "
            f"of a study, <storage>/<study>"
        )
    document = read_document(text)
    if document.problems:
        first = describe(str(folder.spec), *document.problems[0])
        raise StorageError(
            f"{first}. This was not frozen by a version of maskstudy that is known here; bring it "
            f"back from a copy, or take the version that wrote it"
        )
    return document.data, text


def assemble(
    folder: StudyFolder,
    spec: dict[str, Any],
    spec_text: str,
    environment: dict[str, Any],
    suggestions: Iterable[Suggestion],
    results: Mapping[str, Result],
    rows: pd.DataFrame,
) -> StudyTables:
    """Tables from what the ledger's readers return."""
    drawn = sorted(suggestions, key=lambda suggestion: suggestion.number)
    return StudyTables(
        folder=folder,
        name=plain(spec.get("study") or folder.root.name),
        spec=spec,
        spec_text=spec_text,
        environment=environment,
        suggestions=pd.DataFrame(
            [[s.number, s.trial, s.arm, s.seed, s.origin] for s in drawn],
            columns=["number", "trial", "arm", "seed", "origin"],
        ),
        arms=_arms(drawn, rows),
        rows=rows,
        results=_results(results),
    )


def lines_of(frame: pd.DataFrame) -> Iterator[Any]:
    """The lines of a table, its columns as attributes; `Index` is the index."""
    yield from frame.itertuples()


def complete_trials(tables: StudyTables) -> set[str]:
    """Trials that spent their whole budget."""
    outcomes = tables.results["outcome"]
    return set(outcomes.index[outcomes == "complete"])


@lru_cache(maxsize=4)  # nearly every figure asks for it
def final(tables: StudyTables) -> pd.DataFrame:
    """One line per complete trial: arm, seed, origin, then `phase/metric` at progress 1."""
    rows = tables.rows
    done = rows[(rows["progress"] >= 1 - 1e-9) & rows["trial"].isin(complete_trials(tables))]
    keys = done["phase"] + "/" + done["metric"]
    wide = done.assign(key=keys).pivot(index="trial", columns="key", values="value")
    drawn = tables.suggestions.drop_duplicates("trial").set_index("trial")
    return drawn.join(wide, how="inner").sort_values("number").drop(columns="number")


def arm_scores(tables: StudyTables, key: str, finals: pd.DataFrame | None = None) -> pd.DataFrame:
    """arm, seed, trial, value of one metric: the values that may speak for an arm.

    Which these are says study/best.py: the trials that made an arm stand out are left out once it
    has fresh seeds.
    """
    finals = final(tables) if finals is None else finals
    if key not in finals:
        return pd.DataFrame(columns=["arm", "seed", "trial", "value"])
    found = finals[["arm", "seed", key]].dropna(subset=[key]).reset_index()
    ranked = tables.standings(tables.measure(key), finals)
    speaking = {(one.arm, seed) for one in ranked for seed in one.values}
    is_speaking = [pair in speaking for pair in zip(found["arm"], found["seed"], strict=True)]
    found = found.loc[is_speaking].rename(columns={key: "value"})
    return found[["arm", "seed", "trial", "value"]].reset_index(drop=True)


def trivial_scores(tables: StudyTables) -> list[tuple[Measure, float]]:
    """Segmenters without an encoder, the best first; where one depends on the patch, its best."""
    found = []
    for key, metric in METRICS.items():
        if metric.is_trivial and not metric.is_held_out:
            name = f"segment/{key}"
            means = arm_scores(tables, name).groupby("arm")["value"].mean()
            if len(means):
                found.append((tables.measure(name), float(means.max())))
    return sorted(found, key=lambda one: -one[1])


def parts_of(tables: StudyTables, metric: str) -> list[str]:
    """The classes, sizes or ratios that a metric was measured of, in the order of its rows."""
    phase, key, _ = parse(metric)
    names = map(parse, tables.measured)
    return [name.of for name in names if name[:2] == (phase, key) and name.part]


def mean_ratio(schedule: Mapping[str, Any]) -> float | None:
    """The hidden share averaged over progress and chance; None for a schedule unknown here."""
    function: Any = SCHEDULES.get(str(schedule.get("name")))
    options = {key: value for key, value in schedule.items() if key != "name"}
    if function is None:
        return None
    try:
        return float(np.mean([function(*point, **options) for point in MIDPOINTS]))
    except (TypeError, ValueError):
        return None


def by_size(patches: pd.Series[Any]) -> pd.Series[Any]:
    """Edges of patches as categories in the order of their size: 8 lies between 4x8x8 and 16x8x8.

    The size is the geometric mean of the edges.
    """

    def size(patch: Any) -> tuple[float, str]:
        edges = [float(edge) for edge in str(patch).split("x") if edge.isdigit()]
        return round(float(np.prod(edges) ** (1 / max(1, len(edges)))), 9), str(patch)

    known = sorted(patches.dropna().unique(), key=size)
    return patches.astype(pd.CategoricalDtype(known, ordered=True))


def _results(results: Mapping[str, Result]) -> pd.DataFrame:
    lines = [
        [
            trial,
            str(result.outcome),
            result.seconds,
            result.error,
            is_unfinished(result),
            *map(result.progress.get, PHASES),
        ]
        for trial, result in sorted(results.items())
    ]
    columns = ["trial", "outcome", "seconds", "error", "is_unfinished", *PHASES]
    return pd.DataFrame(lines, columns=columns).set_index("trial")


def _arms(suggestions: list[Suggestion], rows: pd.DataFrame) -> pd.DataFrame:
    first: dict[str, Suggestion] = {}
    for suggestion in suggestions:
        first.setdefault(suggestion.arm, suggestion)
    lines = []
    for arm, suggestion in first.items():
        config = suggestion.config
        masking = _child(config, "masking")
        ratio = _child(masking, "ratio")
        patch = _edges(_child(config, "model").get("patch"))
        mean = mean_ratio(ratio)
        lines.append(
            {
                "arm": arm,
                "origin": suggestion.origin,
                "group": group_of(suggestion.origin),
                "label": arm_label(suggestion),
                "patch": patch,
                "unit": _edges(masking.get("unit")) or patch,
                "schedule": _schedule(suggestion),
                "ratio": _measured_ratio(rows, arm) if mean is None else mean,
                "settings": flatten(config),
            }
        )
    columns = ["arm", "origin", "group", "label", "patch", "unit", "schedule", "ratio", "settings"]
    arms = pd.DataFrame(lines, columns=columns).set_index("arm")
    shared = arms["label"].duplicated(keep=False)
    arms.loc[shared, "label"] += " [" + arms.index[shared].astype(str) + "]"
    return arms


def _edges(value: Any) -> Any:
    """A patch or unit as figures call it: 8, or 4x8x8 where the axes differ."""
    if not isinstance(value, list | tuple) or not value:
        return value
    found = simplest(value)
    return found if isinstance(found, int) else in_words(found)


def _measured_ratio(rows: pd.DataFrame, arm: str) -> float | None:
    """For a schedule of a newer version: the mean of what was realised."""
    found = rows[(rows["arm"] == arm) & (rows["phase"] == "pretrain") & (rows["metric"] == "ratio")]
    return float(found["value"].mean()) if len(found) else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def _schedule(suggestion: Suggestion) -> str:
    named = suggestion.labels.get("masking.ratio")
    if isinstance(named, str):
        return plain(named, LONGEST_WORD)
    return plain(_shape(_child(_child(suggestion.config, "masking"), "ratio")), LONGEST_WORD)


def _shape(ratio: Mapping[str, Any]) -> str:
    """A schedule's name, and of one that comes in several shapes which."""
    name, shape = ratio.get("name", "unknown"), ratio.get("shape")
    return str(name) if shape in (None, "linear") else f"{name} {shape}"


def arm_label(suggestion: Suggestion) -> str:
    """An arm in words: patch, ratio, then whatever else was searched."""
    config = suggestion.config
    masking = _child(config, "masking")
    patch, unit = _edges(_child(config, "model").get("patch")), _edges(masking.get("unit"))
    words = [f"patch {patch}", _ratio_words(_child(masking, "ratio"), suggestion)]
    if (unit or patch) != patch:
        words.insert(1, f"unit {unit}")
    strategy = _child(masking, "strategy").get("name", "random")
    named = suggestion.labels.get("masking.strategy", suggestion.labels.get("masking"))
    if named is not None or strategy != "random":
        words.append(str(named or strategy))
    told = ("model.patch", "masking", "masking.unit", "masking.strategy")
    for path, value in suggestion.labels.items():
        is_told = path in told or f"{path}.".startswith("masking.ratio.")
        if not is_told:
            words.append(f"{path.rpartition('.')[2]} {_short(value)}")
    prefix = {"control": "control: ", "search": ""}.get(group := group_of(suggestion.origin))
    words = [plain(word, LONGEST_WORD) for word in words]
    return (f"{group}: " if prefix is None else prefix) + ", ".join(words)


def _ratio_words(ratio: dict[str, Any], suggestion: Suggestion) -> str:
    name, known = str(ratio.get("name", "?")), set(ratio)
    told = known
    if name == "constant":
        words = f"ratio {_short(ratio.get('value'))}"
    elif {"start", "end"} <= known:
        words = f"ratio {_short(ratio['start'])}→{_short(ratio['end'])} {_shape(ratio)}"
        told = {"name", "start", "end", "shape"}
    elif {"low", "high"} <= known:
        words = f"ratio {_short(ratio['low'])}-{_short(ratio['high'])} "
        words += {"uniform": "random", "truncated_normal": "normal"}.get(name, name)
        told = {"name", "low", "high"}
        if {"mean", "deviation"} <= known:
            words += f" {_short(ratio['mean'])}±{_short(ratio['deviation'])}"
            told |= {"mean", "deviation"}
    elif "values" in known:
        words = f"ratio {_brief(ratio['values'])} {name}"
        told = {"name", "values"}
    else:
        options = " ".join(_short(value) for key, value in ratio.items() if key != "name")
        words = f"ratio {name} {options}".strip()
    words += _options(ratio, known - told)
    label = suggestion.labels.get("masking.ratio")
    if isinstance(label, str) and label not in (name, "constant"):
        words += f" {label}"
    return words


def _options(settings: Mapping[str, Any], names: set[str]) -> str:
    """Those of the named options that are set."""
    given = [name for name in settings if name in names and settings[name] is not None]
    return "".join(f" {name} {_brief(settings[name])}" for name in given)


def _brief(value: Any) -> str:
    """Numbers with three digits, those of a list between slashes."""
    if isinstance(value, list | tuple):
        return "/".join(map(_brief, value))
    return short(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= abs(value) < 10 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "/".join(_short(item) for item in value)
    return str(value)


def _child(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = settings.get(key)
    if isinstance(value, str):
        return {"name": value}
    return dict(value) if isinstance(value, Mapping) else {}
