"""What may vary: `search` maps a dotted path into `trial` to choices or to a range.

    model.patch: {choices: [4, 8, 16]}
    masking.unit: {choices: {cube: 16, flat: [4, 16, 16]}}   # what is a list needs a label too
    masking.ratio:
      choices:                              # a label for figures -> a value or a sub-tree
        constant: {name: constant, value: {low: 0.1, high: 0.9}}
        rising:   {name: linear, start: {low: 0.1, high: 0.5}, end: {low: 0.5, high: 0.9}}
        any:      {name: piecewise, values: [{low: 0.1, high: 0.5}, {low: 0.3, high: 0.9}, 0.9]}

    model.patch: {choices: [4, 8, 16], prior: [4, 2, 1]}       # weights: where the first arms lie
    masking.ratio.value: {low: 0.1, high: 0.9, prior: 0.3}     # the likely value

Whoever decides is an `Ask` (an Optuna trial is one). Parameters are named "model.patch",
"masking.ratio" (the label), and, only asked for under that label, "masking.ratio/constant.value" or
"masking.ratio/any.values.0".
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from study.reader import Where
from trainables.config import Grown, TrialConfig, arm_id

MOST_VALUES = 1_000  # of one item that are ever counted
MOST_WEIGHT = 1e9  # of a choice in a prior, so that sums stay finite


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"given {value!r}; expected a number")
    return value


Number = Annotated[Any, AfterValidator(_number), WithJsonSchema({"type": "number"})]


class SearchItem(Grown):
    """Either `choices` or a range from `low` to `high`, both included."""

    NEWER = frozenset({"prior"})

    choices: Annotated[
        Any,
        WithJsonSchema({"anyOf": [{"type": "array"}, {"type": "object"}]}),
        Field(description="a list of plain values, or labels with what each stands for"),
    ] = None
    low: Number = None
    high: Number = None
    log: Annotated[bool, Field(description="equal factors are equally likely")] = False
    step: Annotated[Number, Field(description="distance between neighbouring values")] = None
    num: Annotated[
        Annotated[int, Field(ge=2, le=MOST_VALUES)] | None,
        Field(description="points of a grid over the range"),
    ] = None
    prior: Annotated[
        Any,
        WithJsonSchema(
            {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}
        ),
        Field(
            description="what its author believes: a weight above 0 for each choice, or the likely "
            "value of a range. It shapes where the first arms of a sampler that learns lie, its "
            "`startup`, and nothing after"
        ),
    ] = None

    @model_validator(mode="after")
    def _fits_together(self) -> SearchItem:
        if self.choices is not None:
            _check_choices(self.choices, self.model_fields_set)
            if self.prior is not None:
                _check_weights(self.prior, len(self.choices))
        else:
            _check_range(self)
            if self.prior is not None and not self.contains(self.prior):
                raise ValueError(
                    f"given prior {self.prior!r}; expected the likely value: {in_words(self)}"
                )
        return self

    @property
    def is_integer(self) -> bool:
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))

    def contains(self, value: Any) -> bool:
        """Whether a range holds this number."""
        if isinstance(value, bool) or not isinstance(
            value, int if self.is_integer else int | float
        ):
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return bool(self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8)


class Ask(Protocol):
    """Who decides; the part of an Optuna trial that a search needs."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


class Point(NamedTuple):
    """One place in the space."""

    params: dict[str, Any]  # parameter -> value
    labels: dict[str, Any]  # searched path -> what figures call its value
    overrides: dict[str, Any]  # searched path -> what stands there


class Parameter(NamedTuple):
    """One thing to decide."""

    item: SearchItem
    path: Where  # of the setting in `trial`
    where: Where  # of the item in the study file


class Searched(Protocol):
    """A study, as far as its space is concerned."""

    @property
    def trial(self) -> TrialConfig:
        """What stands where nothing is searched."""

    @property
    def search(self) -> Mapping[str, SearchItem]:
        """Dotted path into the trial -> what may stand there."""


Found = dict[str, Parameter]


def suggest(study: Searched, ask: Ask) -> Point:
    """A point of the study's space, as `ask` decides."""
    return draw(study.search, ask)


def resolve(study: Searched, overrides: Mapping[str, Any]) -> TrialConfig:
    """The study's trial with other values at the searched paths."""
    return override(study.trial, overrides)


def enumerate_grid(study: Searched) -> list[Point]:
    """Every combination, the last parameter varying fastest; ranges need `num` or `step`."""
    return list(combinations(study.search, lambda parameter: grid_values(parameter.item) or []))


def params_of(study: Searched, config: TrialConfig) -> dict[str, Any] | None:
    """The parameters at which a configuration lies in the space; None if it lies outside."""
    for point in combinations(study.search, _possible(config)):
        if arm_id(resolve(study, point.overrides)) == arm_id(config):
            return point.params
    return None


def outside(study: Searched, config: TrialConfig) -> dict[str, Any]:
    """Searched path -> what stands there, where that is nothing the search could put there."""
    settings = config.model_dump(mode="json")
    found = {}
    for path, item in study.search.items():
        value = get_at(settings, path.split("."))
        if not any(
            _reads_as(config, path, point.overrides[path]) == value
            for point in combinations({path: item}, _possible(config))
        ):
            found[path] = value
    return found


def in_words(item: SearchItem) -> str:
    """What may stand at a searched path."""
    if isinstance(item.choices, dict):
        return "one of " + "; ".join(
            f"{label}: {tree_in_words(tree)}" for label, tree in item.choices.items()
        )
    if item.choices is not None:
        return "one of " + ", ".join(map(str, item.choices))
    kind = "a whole number" if item.is_integer else "a number"
    step = f" in steps of {item.step}" if item.step is not None else ""
    return f"{kind} from {item.low} to {item.high}{step}"


def tree_in_words(tree: Any) -> str:
    """What a label stands for."""
    if is_item(tree):
        return in_words(SearchItem.model_validate(tree, strict=True))
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {tree_in_words(v)}" for key, v in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(tree_in_words, tree)) + "]"
    return str(tree)


def draw(search: Mapping[str, SearchItem], ask: Ask) -> Point:
    """`suggest`, for a search that belongs to no study yet."""
    params: dict[str, Any] = {}
    overrides = {path: _draw(path, item, ask, params) for path, item in search.items()}
    return Point(params, {path: params[path] for path in search}, overrides)


def override(trial: TrialConfig, overrides: Mapping[str, Any]) -> TrialConfig:
    """`resolve`, for a trial that belongs to no study yet."""
    settings = trial.model_dump(mode="json")
    for path, value in overrides.items():
        set_at(settings, tuple(path.split(".")), value)
    return TrialConfig.model_validate_json(json.dumps(settings), strict=True)


def combinations(
    search: Mapping[str, SearchItem], values: Callable[[Parameter], Sequence[Any]]
) -> Iterator[Point]:
    """Every point whose parameters are among their `values`; none where those are empty."""
    known = parameters(search)
    of_name = cache(lambda name: values(known[name]))
    turns: list[int] = []
    while True:
        walk = _Walk(of_name, turns)
        with contextlib.suppress(_NoWay):
            yield draw(search, walk)
        turns, counts = walk.turns, walk.counts
        while turns and turns[-1] + 1 >= counts[len(turns) - 1]:
            turns.pop()
        if not turns:
            return
        turns[-1] += 1


def parameters(search: Mapping[str, SearchItem]) -> dict[str, Parameter]:
    """All parameters by name, those under a label included."""
    found: Found = {}
    for path, item in search.items():
        _collect(path, item, tuple(path.split(".")), ("search", path), found)
    return found


def nested_errors(path: str, item: SearchItem) -> Iterator[tuple[Where, Any, ValidationError]]:
    """Distributions under labels that are none: where in the study file, what is there, and why."""
    if isinstance(item.choices, dict):
        for label, tree in item.choices.items():
            yield from _tree_errors(tree, ("search", path, "choices", label))


def grid_values(item: SearchItem) -> list[Any] | None:
    """What a grid takes of an item; None for a range that does not say how many points."""
    if item.choices is not None:
        return list(item.choices)
    if item.num is not None:
        return _spread(item)
    return finite_values(item)


def finite_values(item: SearchItem) -> list[Any] | None:
    """All values that an item can take; None if they are too many to count."""
    if item.choices is not None:
        return list(item.choices)
    if item.step is None and not item.is_integer:
        return None
    step = item.step or 1
    if (item.high - item.low) / step >= MOST_VALUES:
        return None
    count = round((item.high - item.low) / step) + 1
    values = [item.low + step * index for index in range(count)]
    return values if item.is_integer else [_tidy(value) for value in values]


def ends(parameter: Parameter) -> list[Any]:
    """Every choice, and of a range both ends."""
    item = parameter.item
    return list(item.choices) if item.choices is not None else [item.low, item.high]


def is_item(value: Any) -> bool:
    """Whether a value under a label is a distribution of its own."""
    if not isinstance(value, dict) or "name" in value:
        return False
    return value.keys() - {"prior"} == {"choices"} or bool({"low", "high"} & value.keys())


def get_at(settings: Any, path: Sequence[str | int]) -> Any:
    """What stands at a path through mappings and lists; a KeyError if there is nothing."""
    for key in path:
        settings = dict(_branches(settings))[key]
    return settings


def set_at(settings: dict[str, Any], path: Sequence[str | int], value: Any) -> None:
    get_at(settings, path[:-1])[path[-1]] = value


def _possible(config: TrialConfig) -> Callable[[Parameter], list[Any]]:
    """The values of a parameter at which a configuration may lie."""
    settings = config.model_dump(mode="json")

    def possible(parameter: Parameter) -> list[Any]:
        choices = parameter.item.choices
        if isinstance(choices, dict):
            return list(choices)
        try:
            value = get_at(settings, parameter.path)
        except KeyError:  # an option of another named thing
            return []
        if choices is not None:
            return [choice for choice in choices if _same(choice, value)]
        return [value] if parameter.item.contains(value) else []

    return possible


def _reads_as(config: TrialConfig, path: str, value: Any) -> Any:
    """A value with the defaults that a configuration adds to it; None where it does not fit."""
    with contextlib.suppress(ValidationError):
        return get_at(override(config, {path: value}).model_dump(mode="json"), path.split("."))
    return None


def _draw(name: str, item: SearchItem, ask: Ask, params: dict[str, Any]) -> Any:
    if item.choices is None:
        if item.is_integer:
            value: Any = ask.suggest_int(
                name, item.low, item.high, step=item.step or 1, log=item.log
            )
        else:
            value = ask.suggest_float(name, item.low, item.high, step=item.step, log=item.log)
        params[name] = value
        return value
    chosen = params[name] = ask.suggest_categorical(name, list(item.choices))
    if isinstance(item.choices, dict):
        return _fill(f"{name}/{chosen}", item.choices[chosen], ask, params)
    return chosen


def _fill(name: str, tree: Any, ask: Ask, params: dict[str, Any]) -> Any:
    """The tree under a label with its own distributions decided."""
    if is_item(tree):
        return _draw(name, SearchItem.model_validate(tree, strict=True), ask, params)
    filled = {key: _fill(f"{name}.{key}", value, ask, params) for key, value in _branches(tree)}
    if isinstance(tree, dict):
        return filled
    return list(filled.values()) if isinstance(tree, list) else tree


def _collect(name: str, item: SearchItem, path: Where, where: Where, found: Found) -> None:
    found[name] = Parameter(item, path, where)
    if isinstance(item.choices, dict):
        for label, tree in item.choices.items():
            _collect_tree(f"{name}/{label}", tree, path, (*where, "choices", label), found)


def _collect_tree(name: str, tree: Any, path: Where, where: Where, found: Found) -> None:
    if is_item(tree):
        _collect(name, SearchItem.model_validate(tree, strict=True), path, where, found)
        return
    for key, value in _branches(tree):
        _collect_tree(f"{name}.{key}", value, (*path, key), (*where, key), found)


def _tree_errors(tree: Any, where: Where) -> Iterator[tuple[Where, Any, ValidationError]]:
    if not is_item(tree):
        for key, value in _branches(tree):
            yield from _tree_errors(value, (*where, key))
        return
    try:
        item = SearchItem.model_validate(tree, strict=True)
    except ValidationError as error:
        yield where, tree, error
        return
    if isinstance(item.choices, dict):
        for label, branch in item.choices.items():
            yield from _tree_errors(branch, (*where, "choices", label))


def _branches(tree: Any) -> Iterable[tuple[str | int, Any]]:
    """The keys and values of a mapping, the places and items of a list; of all else nothing."""
    if isinstance(tree, dict):
        return tree.items()
    return enumerate(tree) if isinstance(tree, list) else ()


class _NoWay(Exception):
    pass


class _Walk:
    """Decides by numbered turns; further on it takes the first turn, and remembers all of them."""

    def __init__(self, values: Callable[[str], Sequence[Any]], turns: Sequence[int]) -> None:
        self.values = values
        self.planned = list(turns)
        self.turns: list[int] = []
        self.counts: list[int] = []

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.turn(name)

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return int(self.turn(name))

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return float(self.turn(name))

    def turn(self, name: str) -> Any:
        values = self.values(name)
        if not values:
            raise _NoWay
        index = self.planned[len(self.turns)] if len(self.turns) < len(self.planned) else 0
        self.turns.append(index)
        self.counts.append(len(values))
        return values[index]


def _check_choices(choices: Any, given: set[str]) -> None:
    if given - {"choices", "prior"}:
        raise ValueError("given `choices` and a range; expected one of them")
    if not isinstance(choices, list | dict) or not choices:
        raise ValueError("expected `choices`: a list of values, or labels with values")
    if len(choices) > MOST_VALUES:
        raise ValueError(f"given {len(choices):,} choices; expected at most {MOST_VALUES:,}")
    if isinstance(choices, dict):
        for label in choices:
            if not label.strip() or not label.isprintable() or {".", "/"} & set(label):
                raise ValueError(f"given the label {label!r}; expected a word without '.' and '/'")
            if len(label) > 64:
                raise ValueError(f"given the label {label[:20]!r}...; expected at most 64 letters")
        return
    for value in choices:
        if isinstance(value, list | dict):
            raise ValueError(
                f"given {value!r} without a label; expected `choices: {{label: value, ...}}`"
            )
    seen: dict[Any, Any] = {}
    for value in choices:
        if value in seen:
            raise ValueError(f"given {seen[value]!r} and {value!r}; expected choices that differ")
        seen[value] = value


def _check_weights(weights: Any, count: int) -> None:
    expected = f"expected a weight above 0, up to {MOST_WEIGHT:g}, for each of the {count} choices"
    if not isinstance(weights, list):
        raise ValueError(f"given prior {weights!r}; {expected}, as a list in their order")
    if len(weights) != count:
        raise ValueError(f"given a prior of {len(weights)} weights; {expected}")
    for weight in weights:
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight <= MOST_WEIGHT:
            raise ValueError(f"given the weight {weight!r} in prior; {expected}")


def _check_range(item: SearchItem) -> None:
    if item.low is None or item.high is None:
        raise ValueError("expected `choices`, or both `low` and `high`")
    if not item.low < item.high:
        raise ValueError(f"given low {item.low} and high {item.high}; expected low < high")
    if item.log and item.low <= 0:
        raise ValueError(f"given low {item.low} with log; expected low > 0")
    if item.log and item.step is not None:
        raise ValueError("given both log and step; expected one of them")
    if item.step is not None:
        if item.step <= 0 or not item.contains(item.high):
            raise ValueError(
                f"given step {item.step}; expected one that leads from {item.low} to {item.high}"
            )
        if item.num is not None:
            raise ValueError("given both num and step; expected one of them")
    if item.num is not None and item.is_integer and len(_spread(item)) < item.num:
        raise ValueError(
            f"given num {item.num}; there are fewer whole numbers from {item.low} to {item.high}"
        )


def _spread(item: SearchItem) -> list[int] | list[float]:
    """`num` values from low to high: equal distances, or equal factors with `log`."""
    assert item.num is not None
    shares = [index / (item.num - 1) for index in range(item.num)]
    if item.log:
        values = [item.low * math.pow(item.high / item.low, share) for share in shares]
    else:
        values = [item.low + (item.high - item.low) * share for share in shares]
    if item.is_integer:
        return sorted({round(value) for value in values})
    return [_tidy(value) for value in values]


def _tidy(value: float) -> float:
    """0.3, not 0.30000000000000004."""
    return float(f"{value:.12g}")


def _same(one: Any, other: Any) -> bool:
    return bool(one == other and isinstance(one, bool) == isinstance(other, bool))
