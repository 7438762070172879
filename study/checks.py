"""What a study file must fulfil beyond the types of its settings.

A setting that is None is wrong in itself, and told; the others are looked at all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from study import population, space
from study.mistakes import Problems, explain, listed, message, near
from study.population import MOST_RUNGS
from study.reader import Document, Where
from study.samplers import LEARNING, OF_NUMBERS, ONE_OBJECTIVE, POPULATIONS, SAMPLERS
from study.space import SearchItem
from trainables.config import ProbeConfig, TrialConfig, conflicts, geometry_misfits
from trainables.edges import Edges, fits, grid_of, in_words, per_axis, simplest
from trainables.fillings import FILLINGS
from trainables.metrics import METRICS, PHASES, PSNR, metric_of, objective_names, parse
from trainables.named import Choice
from trainables.scores import SIZE_BINS

if TYPE_CHECKING:
    from study.spec import Budget, Objective, Resources, StudySpec

Search = Mapping[str, SearchItem]  # dotted path of a setting of the trial -> what it may be

MOST_COMBINATIONS = 2_000  # that are looked at one by one
MOST_ARMS = 10_000  # of a grid


def check_metrics(
    objectives: Sequence[Objective] | None,
    stopping: Choice | None,
    sampler: Choice | None,
    probe: ProbeConfig | None,
    problems: Problems,
) -> None:
    given: list[tuple[Where, str, str | None]] = [
        (("objectives", index), objective.metric, objective.goal)
        for index, objective in enumerate(objectives or [])
    ]
    for setting, chosen in (("stopping", stopping), ("sampler", sampler)):
        metric = chosen.options().get("metric") if chosen is not None else None
        if metric is not None:
            given.append(((setting,), metric, None))
    for path, name, goal in given:
        problem = _metric_problem(name, probe)
        if problem:
            problems.add((*path, "metric"), problem)
            continue
        best = metric_of(name).goal
        if goal is not None and goal != best:
            problems.add((*path, "goal"), f"given {goal!r}; expected {best!r} for {name}")
    names = [objective.metric for objective in objectives or []]
    for index, name in enumerate(names):
        if name in names[:index]:
            problems.add(("objectives", index, "metric"), f"given {name!r} twice; expected once")


def _metric_problem(name: str, probe: ProbeConfig | None) -> str | None:
    """Why this cannot be an objective; None if it can."""
    phase, key, part = parse(name)
    metric = METRICS.get(key)
    if metric is not None and metric.is_held_out:
        return f"given {name!r}; expected no test score, as nothing may be chosen by it"
    if metric is None or metric.goal == "none" or phase not in metric.phases:
        known = objective_names()
        of_phase = [other for other in known if other.startswith(f"{phase}/")] or known
        same = [other for other in known if other.endswith(f"/{name.rpartition('/')[2]}")]
        hint = f" (did you mean {same[0]!r}?)" if same else near(name, known)
        return f"given {name!r}; expected one of {listed(of_phase)}{hint}"
    if not metric.is_objective:
        return (
            f"given {name!r}; expected a metric that compares arms, such as {PSNR}: "
            f"{metric.explains}"
        )
    mark = {"class": "/", "size": "/", "filling": "/", "ratio": "@", None: ""}[metric.parts]
    whole, one = f"{phase}/{key}", f"{phase}/{key}{mark}<{metric.parts}>"
    if part and part[0] != mark:
        kind = "ratio" if part[0] == "@" else "class"
        return f"given {name!r}; expected {whole!r}, which is not measured per {kind}"
    if not part and metric.has_whole:
        return None
    if len(part) < 2:
        return f"given {name!r}; expected {f'{whole} or {one}' if metric.has_whole else one}"
    known_parts: list[str] = []
    if metric.parts == "size":
        known_parts = list(SIZE_BINS)
    elif metric.parts == "filling":
        known_parts = list(FILLINGS)
    elif metric.parts == "ratio" and probe is not None:
        known_parts = [f"{ratio:g}" for ratio in probe.ratios]
    if known_parts and part[1:] not in known_parts:
        return f"given {name!r}; expected one of its {metric.parts}s: {listed(known_parts)}"
    return None


def check_sampler(
    sampler: Choice | None,
    objectives: Sequence[Objective] | None,
    search: Search | None,
    problems: Problems,
) -> None:
    """A sampler of one objective gets one, and one of numbers has numbers."""
    if sampler is None:
        return
    several = [name for name in SAMPLERS if name not in ONE_OBJECTIVE]
    if sampler.name in ONE_OBJECTIVE and objectives is not None and len(objectives) > 1:
        problems.add(
            ("sampler",),
            f"given {sampler.name} with {len(objectives)} objectives; expected one objective, or "
            f"one of {', '.join(several)}",
        )
    is_number = [item.choices is None for item in (search or {}).values()]
    if sampler.name in OF_NUMBERS and is_number and not any(is_number):
        problems.add(
            ("sampler",),
            f"given {sampler.name} where no range is searched but under labels; expected a range "
            f"that all arms have, or sampler tpe",
        )


def check_search(
    trial: TrialConfig, search: Search, sampler: Choice | None, problems: Problems
) -> None:
    """Every searched path is a setting of the trial, and every option of it makes a valid one."""
    known = list(_paths(trial.model_dump(mode="json")))
    before = len(problems.found)
    for path, item in search.items():
        if path not in known:
            hint = near(path.removeprefix("trial."), known) or _same_end(path, known)
            what = f"expected the dotted path of a setting of `trial`{hint}"
            problems.add(("search", path), f"`trial` has no such setting; {what}")
            continue
        for other in search:
            if path.startswith(f"{other}."):
                problem = f"lies within {other}, which is searched too; expected one of them"
                problems.add(("search", path), problem)
        nested = list(space.nested_errors(path, item))
        for around, given, error in nested:
            for detail in error.errors():
                problem = message(detail, SearchItem, given)
                problems.add((*around, *detail["loc"]), problem)
        if not nested:
            _check_options(trial, path, item, problems)
            if sampler is not None:
                _check_points(sampler.name, space.parameters({path: item}).values(), problems)
    if len(problems.found) == before:
        _check_siblings(trial, search, problems)
    if not problems.found and sampler is not None and sampler.name == "grid":
        arms = space.combinations(search, lambda parameter: space.grid_values(parameter.item) or [])
        if next(islice(arms, MOST_ARMS, None), None) is not None:
            problems.add(("search",), f"given a grid of more than {MOST_ARMS:,} arms")


def _check_options(trial: TrialConfig, path: str, item: SearchItem, problems: Problems) -> None:
    """Every option alone, ranges at both ends, must make a trial that is valid."""
    search = {path: item}
    known = space.parameters(search)
    parts = path.split(".")
    for count, point in enumerate(space.combinations(search, space.ends)):
        if count == MOST_COMBINATIONS:
            problems.add(("search", path), "given too many ranges within labels; expected fewer")
            return
        settings = trial.model_dump(mode="json")
        space.set_at(settings, parts, point.overrides[path])
        for where, problem in _trial_problems(settings)[0]:
            # within the setting, or around it where it does not go together with its neighbours
            if all(one == other for one, other in zip(where, parts, strict=False)):
                problems.add(_blamed(path, item, point.params[path], where), problem)
        for name in point.params:
            parameter = known[name]
            if parameter.item.choices is None and parameter.item.is_integer:
                _check_whole(settings, parameter, problems)


def _check_siblings(trial: TrialConfig, search: Search, problems: Problems) -> None:
    """Options of one thing that are searched each by itself must go together at all their ends."""
    families: dict[str, dict[str, SearchItem]] = {}
    for path, item in search.items():
        families.setdefault(path.rpartition(".")[0], {})[path] = item
    for family in families.values():
        if len(family) == 1:
            continue
        for point in islice(space.combinations(family, space.ends), MOST_COMBINATIONS):
            settings = trial.model_dump(mode="json")
            for path, value in point.overrides.items():
                space.set_at(settings, path.split("."), value)
            for _, problem in _trial_problems(settings)[0]:
                problems.add(("search", list(family)[-1]), problem)


def _check_whole(settings: dict[str, Any], parameter: space.Parameter, problems: Problems) -> None:
    """A range of whole numbers for a setting that takes fractions is a slip of the pen."""
    settings = json.loads(json.dumps(settings))
    space.set_at(settings, parameter.path, space.get_at(settings, parameter.path) + 0.5)
    _, config = _trial_problems(settings)
    item = parameter.item
    if config is not None and item.step is None and item.num is None:
        problems.add(
            parameter.where,
            f"given whole numbers from {item.low} to {item.high} for a setting that takes "
            f"fractions; expected {float(item.low)} and {float(item.high)}, or step: 1",
        )


def _trial_problems(
    settings: dict[str, Any],
) -> tuple[list[tuple[Where, str]], TrialConfig | None]:
    try:
        return [], TrialConfig.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        return explain(error, TrialConfig, settings), None


def _blamed(path: str, item: SearchItem, chosen: Any, where: Where) -> Where:
    """The place in the study file of what an option put at `where` of the trial."""
    inside = where[len(path.split(".")) :]
    if item.choices is None:
        return ("search", path)
    if isinstance(item.choices, dict):
        return ("search", path, "choices", chosen, *inside)
    return ("search", path, "choices", item.choices.index(chosen))


def _check_points(sampler: str, parameters: Iterable[space.Parameter], problems: Problems) -> None:
    for parameter in parameters:
        item = parameter.item
        if sampler != "grid" and item.num is not None:
            problem = f"given num with sampler {sampler}; expected it with grid only"
            problems.add((*parameter.where, "num"), problem)
        if item.prior is not None and sampler not in LEARNING:
            problem = (
                f"given a prior with sampler {sampler}, which has no first arms to shape; leave it "
                f"out, or take one of {', '.join(LEARNING)}"
            )
            problems.add((*parameter.where, "prior"), problem)
        if sampler == "grid" and space.grid_values(item) is None:
            problem = "given a range without points; expected `num` or `step` for sampler grid"
            problems.add(parameter.where, problem)


def geometry_problems(spec: StudySpec, size: tuple[int, ...]) -> list[str]:
    """What does not fit on images of this size, for data whose size the study file does not say."""
    problems = Problems(spec.study, Document())
    trial, search, unit = spec.trial, spec.search, spec.probe.unit
    configs = [config for config, _ in variants_of(trial, search, ("model.patch", "masking.unit"))]
    _check_geometry(search, configs, size, unit, problems, is_unit_given=unit is not None)
    return [f"{'.'.join(map(str, path))}: {problem}" for _, path, problem in problems.found]


def check_together(
    trial: TrialConfig,
    search: Search,
    data: Choice | None,
    resources: Resources | None,
    probe: ProbeConfig | None,
    problems: Problems,
) -> Edges | None:
    """Patches, units, probe and batches of every arm; the probe's unit, as far as there is one."""
    if resources is not None:
        for config, _ in variants_of(trial, search, ("pretrain.batch", "segment.batch")):
            for phase in PHASES:
                batch = getattr(config, phase).batch
                if batch % resources.workers:
                    problems.add(
                        source_of(search, phase, "batch"),
                        f"given {batch}; expected a multiple of resources.workers: "
                        f"{resources.workers}",
                    )
    _check_conflicts(trial, search, problems)
    variants = list(variants_of(trial, search, ("model.patch", "masking.unit")))
    if len(variants) > MOST_COMBINATIONS:
        problems.add(("search",), "given too many patches and units to check; expected fewer")
        return None
    if probe is None:
        return None
    configs = [config for config, _ in variants]
    size, is_given = image_size(data), probe.unit is not None
    unit = probe.unit or _largest_patch(search, configs, problems)
    if size is not None:
        _check_geometry(search, configs, size, unit, problems, is_unit_given=is_given)
    return unit


def _largest_patch(
    search: Search, configs: Sequence[TrialConfig], problems: Problems
) -> Edges | None:
    """The longest edge of all patches along every axis; None where they differ in their axes."""
    patches = {config.model.patch for config in configs}
    counts = {len(patch) for patch in patches if isinstance(patch, tuple)}
    if not counts:
        return max(patch for patch in patches if isinstance(patch, int))
    if len(counts) > 1:
        problems.add(
            source_of(search, "model", "patch"),
            f"given lists of {' and '.join(map(str, sorted(counts)))} edges; expected as many in "
            f"each as the images have axes",
        )
        return None
    (axes,) = counts
    edges = [per_axis(patch, axes, "model.patch") for patch in patches]
    return tuple(map(max, zip(*edges, strict=True)))


def _check_conflicts(trial: TrialConfig, search: Search, problems: Problems) -> None:
    """Settings that exclude each other, in the control or in what the search may put together."""
    paths = ("model.decoder.attention", "model.decoder.predicted", "pretrain.visible_weight")
    for config, _ in variants_of(trial, search, paths):
        for name, problem in conflicts(config).items():
            problems.add(source_of(search, *name.split(".")), f"given {problem}")


def image_size(data: Choice | None) -> tuple[int, ...] | None:
    """The size of images that a data setting asks for; None if only the data can tell."""
    size = getattr(data, "size", None)
    if isinstance(size, int):
        return (size, size)
    return tuple(size) if size is not None else None


def variants_of(
    trial: TrialConfig, search: Search, paths: Sequence[str]
) -> Iterator[tuple[TrialConfig, space.Point | None]]:
    """The control, and it with every combination of what the search may put at these paths."""
    yield trial, None
    parts = [tuple(path.split(".")) for path in paths]

    def values(parameter: space.Parameter) -> list[Any]:
        item = parameter.item
        first = list(item.choices)[:1] if item.choices is not None else [item.low]
        is_wanted = any(parameter.path == part[: len(parameter.path)] for part in parts)
        return (space.finite_values(item) or [item.low, item.high]) if is_wanted else first

    relevant = {
        path: item
        for path, item in search.items()
        if any(part[: path.count(".") + 1] == tuple(path.split(".")) for part in parts)
    }
    if relevant:
        for point in islice(space.combinations(relevant, values), MOST_COMBINATIONS):
            yield space.override(trial, point.overrides), point


def _check_geometry(
    search: Search,
    configs: Sequence[TrialConfig],
    size: tuple[int, ...],
    unit: Edges | None,
    problems: Problems,
    *,
    is_unit_given: bool,
) -> None:
    axes, shape, divisors = len(size), in_words(size), _divisors(size)
    per_patch = [config.patch_edges(axes) for config in configs if fits(config.model.patch, axes)]
    multiple = simplest([math.lcm(*edges) for edges in zip(*per_patch, strict=True)])
    such_as = multiple if isinstance(multiple, int) else list(multiple)
    is_misfit = False
    if isinstance(unit, tuple) and not fits(unit, axes):
        if is_unit_given:  # else the patches are at fault, and told
            problems.add(
                ("probe", "unit"),
                f"the probe's unit {in_words(unit)} has {len(unit)} edges, but an image of {shape} "
                f"has {axes} axes; expected one edge for each axis, or one number for all",
            )
        unit = None
    if unit is not None:
        is_misfit = not _divides(unit, size)
        if is_misfit and is_unit_given:
            problems.add(
                ("probe", "unit"),
                f"the probe's unit {in_words(unit)} does not divide the image size {shape} into at "
                f"least two; expected {divisors}",
            )
    for config in configs:
        for path, misfit in geometry_misfits(config, size, unit).items():
            if path == "masking.unit" and config.masking.unit is None:
                continue  # the patch itself is at fault, and told
            if misfit.to == "probe" and is_misfit:
                continue  # so is the patch that the probe's unit follows
            way_out = {
                "axes": "expected one edge for each axis, or one number for all",
                "probe": f"set probe.unit to a multiple of every patch, such as {such_as}",
                "patch": "leave masking.unit out, so that it follows the patch, or take a multiple "
                f"of every patch, such as {such_as}",
                "image": f"take {divisors}",
            }[misfit.to]
            problems.add(source_of(search, *path.split(".")), f"{misfit.text}; {way_out}")
        if not fits(config.unit, axes):
            continue
        units = math.prod(grid_of(size, config.unit_edges(axes)))
        if units < 2:
            section, key = ("masking", "unit") if config.masking.unit else ("model", "patch")
            problems.add(
                source_of(search, section, key),
                f"{in_words(config.unit)} makes {units} mask units of an image of {shape}; "
                f"expected at least 2, so that one can be hidden; take a smaller one or a larger "
                f"data.size",
            )


def _divides(unit: Edges, size: tuple[int, ...]) -> bool:
    """Into two or more whole ones."""
    edges = per_axis(unit, len(size), "probe.unit")
    is_even = not any(pixels % edge for pixels, edge in zip(size, edges, strict=True))
    return is_even and math.prod(grid_of(size, edges)) >= 2


def _divisors(size: tuple[int, ...]) -> str:
    """What patches and units may be, in words."""
    common = [d for d in range(2, min(size)) if not any(edge % d for edge in size)]
    ways = [f"one of {listed(common)}"] if common else []
    if len(set(size)) > 1:
        ways.append(f"a list with a divisor of each of {listed(size)}")
    return ", or ".join(ways) or "1"


def source_of(search: Search, *keys: str) -> Where:
    """Where the study file decides a setting: under `search` if it is searched."""
    for length in range(len(keys), 0, -1):
        path = ".".join(keys[:length])
        if path in search:
            return ("search", path)
    return ("trial", *keys)


def check_budget(
    budget: Budget | None, controls: Sequence[str] | None, seeds: int | None, problems: Problems
) -> None:
    if budget is None or controls is None or seeds is None:
        return
    least = (1 + len(controls)) * seeds
    if budget.trials is not None and budget.trials < least:
        problems.add(
            ("budget", "trials"),
            f"given {budget.trials}; expected at least {least}: the control arm and "
            f"{len(controls)} of `controls`, {seeds} seed(s) each",
        )


def check_population(spec: Any, problems: Problems) -> None:
    """What a sampler that finds schedules while training asks of the study around it.

    `spec`: a StudySpec, or one with None for the settings that are wrong.
    """
    if spec.sampler is None or spec.sampler.name not in POPULATIONS:
        return
    name, options = spec.sampler.name, spec.sampler.options()
    if spec.search is not None and not spec.search:
        problems.add(("search",), f"given nothing; sampler {name} expects a schedule's value")
    if spec.trial is not None:
        for path, item in (spec.search or {}).items():
            if problem := population.schedule_problem(spec.trial, path, item):
                problems.add(("search", path), f"given with sampler {name}; {problem}")
    if spec.stopping is not None and spec.stopping.name != "none":
        problem = f"given {spec.stopping.name}; expected none, as sampler {name} stops the worst"
        problems.add(("stopping",), problem)
    if spec.seeds is not None and spec.seeds != 1:
        problems.add(
            ("seeds",),
            f"given {spec.seeds}; expected 1 with sampler {name}, whose members share a seed; "
            f"`confirm` trains what it found with others",
        )
    if spec.rungs is not None and not 2 <= len(spec.rungs) <= MOST_RUNGS:
        problems.add(
            ("rungs",),
            f"given {len(spec.rungs)}; expected 2 to {MOST_RUNGS} with sampler {name}, as a "
            f"schedule may change at each but the last",
        )
    if parse(options["metric"]).phase != PHASES[0]:
        problem = f"given {options['metric']!r}; expected one of pretraining, such as {PSNR}"
        problems.add(("sampler", "metric"), problem)
    if spec.budget is not None and spec.controls is not None and spec.seeds == 1:
        size, num_controls = options["population"], 1 + len(spec.controls)
        if spec.budget.is_measured:
            given = " and ".join(spec.budget.given)
            problem = f"given {given}; expected trials alone with sampler {name}"
            problems.add(("budget",), problem)
        elif spec.budget.trials != num_controls + size:
            problems.add(
                ("budget", "trials"),
                f"given {spec.budget.trials}; expected {num_controls + size}: the control arm, "
                f"{len(spec.controls)} of `controls`, and a population of {size}",
            )


def _same_end(path: str, known: Sequence[str]) -> str:
    """The setting of that name somewhere else in the trial."""
    end = path.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == end]
    return f" (did you mean {same[0]!r}?)" if same else ""


def _paths(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
