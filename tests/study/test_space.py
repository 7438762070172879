"""The search space: names of parameters, what stands where, the grid. Points are made by hand."""

import json
import re
from pathlib import Path

import optuna
import pytest

from study import space
from study.loading import parse_spec
from trainables.config import arm_id

HEAD = """\
study: s
data: {source: smears, size: 64}
trial: {model: {size: pico, patch: 8}, masking: {ratio: {name: constant, value: 0.75}}}
objectives: [{metric: pretrain/probe_psnr, goal: maximize}]
budget: {trials: 100}
search:
"""
SEARCH = """\
  model.patch: {choices: [4, 8, 16]}
  masking.ratio:
    choices:
      constant: {name: constant, value: {low: 0.1, high: 0.9}}
      rising: {name: linear, start: {low: 0.1, high: 0.5}, end: {low: 0.5, high: 0.9}}
"""


def study(search=SEARCH, rest=""):
    return parse_spec(HEAD + search + rest, Path(), where="s.yaml")


def test_a_parameter_under_a_label_is_asked_for_under_that_label_only():
    fixed = {"model.patch": 4, "masking.ratio": "constant", "masking.ratio/constant.value": 0.25}
    point = space.suggest(study(), optuna.trial.FixedTrial(fixed))
    assert point.params == fixed
    assert point.labels == {"model.patch": 4, "masking.ratio": "constant"}
    assert point.overrides["masking.ratio"] == {"name": "constant", "value": 0.25}

    fixed = {
        "model.patch": 16,
        "masking.ratio": "rising",
        "masking.ratio/rising.start": 0.2,
        "masking.ratio/rising.end": 0.8,
    }
    point = space.suggest(study(), optuna.trial.FixedTrial(fixed))
    config = space.resolve(study(), point.overrides)
    assert (config.model.patch, config.model.size) == (16, "pico")
    assert config.masking.ratio.options() == {"start": 0.2, "end": 0.8}


def test_edges_of_each_axis_are_searched_under_labels():
    choices = "{flat: [4, 16], cube: [8, 8], any: [{low: 2, high: 4, step: 2}, 8]}"
    spec = study(f"  model.patch: {{choices: {choices}}}\n", "sampler: grid\n")
    points = space.enumerate_grid(spec)
    patches = [space.resolve(spec, point.overrides).model.patch for point in points]
    assert patches == [(4, 16), (8, 8), (2, 8), (4, 8)]
    assert points[0].labels == {"model.patch": "flat"}
    assert points[3].params == {"model.patch": "any", "model.patch/any.0": 4}
    # the trial's 8 is the same as a list of nothing else
    assert space.params_of(spec, spec.trial) == {"model.patch": "cube"}
    assert space.params_of(spec, space.resolve(spec, points[3].overrides)) == points[3].params


def test_what_is_not_searched_stays_as_in_the_trial():
    config = space.resolve(study(), {"model.patch": 4})
    expected = study().trial.model_dump() | {
        "model": {**study().trial.model.model_dump(), "patch": 4}
    }
    assert config.model_dump() == expected
    assert space.resolve(study(), {}) == study().trial


def test_ranges_are_asked_for_with_their_scale_and_type():
    asked = []

    class Ask:
        def suggest_int(self, *given, **options):
            asked.append(("int", *given, options))
            return given[1]

        def suggest_float(self, *given, **options):
            asked.append(("float", *given, options))
            return given[1]

    search = (
        "  pretrain.epochs: {low: 4, high: 12, step: 4}\n"
        "  segment.epochs: {low: 1, high: 64, log: true}\n"
        "  pretrain.optimizer.base_lr: {low: 1e-5, high: 1e-3, log: true}\n"
    )
    space.suggest(study(search), Ask())
    assert asked == [
        ("int", "pretrain.epochs", 4, 12, {"step": 4, "log": False}),
        ("int", "segment.epochs", 1, 64, {"step": 1, "log": True}),
        ("float", "pretrain.optimizer.base_lr", 1e-5, 1e-3, {"step": None, "log": True}),
    ]


def test_choices_may_be_nested_in_labels_and_labels_may_name_plain_values():
    search = (
        "  model.decoder:\n    choices:\n      small: {width: 64, depth: {choices: [1, 2]}}\n"
        "      large: {depth: 8}\n"
        "  masking.ratio.value: {choices: {low: 0.25, any: {low: 0.5, high: 0.9}}}\n"
    )
    spec = study(search)
    assert list(space.parameters(spec.search)) == [
        "model.decoder",
        "model.decoder/small.depth",
        "masking.ratio.value",
        "masking.ratio.value/any",
    ]
    fixed = {"model.decoder": "small", "model.decoder/small.depth": 1, "masking.ratio.value": "low"}
    config = space.resolve(spec, space.suggest(spec, optuna.trial.FixedTrial(fixed)).overrides)
    assert (config.model.decoder.depth, config.model.decoder.width) == (1, 64)
    assert config.masking.ratio.value == 0.25


GRID = "sampler: grid\n"


def test_the_grid_is_every_combination_with_the_last_parameter_fastest():
    search = (
        "  model.patch: {choices: [4, 16]}\n  masking.ratio.value: {low: 0.1, high: 0.9, num: 3}\n"
    )
    points = space.enumerate_grid(study(search, GRID))
    assert [tuple(point.params.values()) for point in points] == [
        (4, 0.1), (4, 0.5), (4, 0.9), (16, 0.1), (16, 0.5), (16, 0.9),
    ]  # fmt: skip


def test_the_grid_goes_into_labels():
    search = (
        "  masking.ratio:\n    choices:\n"
        "      constant: {name: constant, value: {low: 0.25, high: 0.75, num: 2}}\n"
        "      rising: {name: linear, start: 0.1, end: {choices: [0.5, 0.9]}}\n"
        "  segment.epochs: {low: 1, high: 3}\n"
    )
    points = space.enumerate_grid(study(search, GRID))
    assert len(points) == (2 + 2) * 3
    spec = study(search, GRID)
    assert len({arm_id(space.resolve(spec, point.overrides)) for point in points}) == 12


@pytest.mark.parametrize(
    "item, values",
    [
        ({"low": 1, "high": 5}, [1, 2, 3, 4, 5]),
        ({"low": 1, "high": 5, "step": 2}, [1, 3, 5]),
        ({"low": 1, "high": 5, "num": 3}, [1, 3, 5]),
        ({"low": 1, "high": 100, "num": 3, "log": True}, [1, 10, 100]),
        ({"low": 0.1, "high": 0.3, "step": 0.1}, [0.1, 0.2, 0.3]),
        ({"low": 0.1, "high": 0.9, "num": 5}, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ({"low": 1e-4, "high": 1e-2, "num": 3, "log": True}, [1e-4, 1e-3, 1e-2]),
        ({"low": 0.1, "high": 0.9}, None),
        ({"low": 1, "high": 10**18}, None),
        ({"low": 0.0, "high": 1.0, "step": 0.0005}, None),
        ({"choices": ["a", None, True]}, ["a", None, True]),
    ],
)
def test_the_values_of_a_grid_by_hand(item, values):
    assert space.grid_values(space.SearchItem(**item)) == values


def test_the_trial_is_found_in_its_space_with_its_parameters():
    assert space.params_of(study(), study().trial) == {
        "model.patch": 8,
        "masking.ratio": "constant",
        "masking.ratio/constant.value": 0.75,
    }
    for search in (
        "  model.patch: {choices: [4, 16]}\n",
        "  masking.ratio: {choices: {a: {name: constant, value: {low: 0.1, high: 0.7}}}}\n",
        "  masking.ratio: {choices: {a: {name: linear, start: 0.75, end: 0.76}}}\n",
        "  pretrain.epochs: {low: 2, high: 41, step: 13}\n",
    ):
        assert space.params_of(study(search), study(search).trial) is None
    labels = "  masking.ratio: {choices: {low: {name: constant, value: 0.5}, as is: constant}}\n"
    assert space.params_of(study(labels), study().trial) == {"masking.ratio": "as is"}
    assert space.params_of(study("  segment.epochs: {low: 10, high: 30}\n"), study().trial) == {
        "segment.epochs": 20
    }


def test_params_survive_json_and_lie_in_optunas_space():
    spec = study()
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    point = space.suggest(spec, trial)
    assert json.loads(json.dumps(point.params)) == point.params == trial.params
    config = space.resolve(spec, point.overrides)
    assert space.params_of(spec, config) == point.params


LISTS = """\
  masking.ratio:
    choices:
      constant: {name: constant, value: {low: 0.1, high: 0.9}}
      rising:
        name: piecewise
        values:
          - {low: 0.1, high: 0.5}
          - {low: 0.3, high: 0.9}
          - 0.9
      turning:
        name: step
        values: [0.2, {choices: [0.5, 0.6]}, {choices: {low: 0.7, any: {low: 0.8, high: 0.95}}}]
        at: [{low: 0.1, high: 0.4}, 0.5]
"""


def test_a_parameter_in_a_list_under_a_label_is_named_by_its_place():
    spec = study(LISTS)
    known = space.parameters(spec.search)
    assert list(known) == [
        "masking.ratio",
        "masking.ratio/constant.value",
        "masking.ratio/rising.values.0",
        "masking.ratio/rising.values.1",
        "masking.ratio/turning.values.1",
        "masking.ratio/turning.values.2",
        "masking.ratio/turning.values.2/any",
        "masking.ratio/turning.at.0",
    ]
    second = known["masking.ratio/rising.values.1"]
    assert (second.item.low, second.item.high) == (0.3, 0.9)
    assert second.path == ("masking", "ratio", "values", 1)
    assert second.where == ("search", "masking.ratio", "choices", "rising", "values", 1)


@pytest.mark.parametrize(
    "label, chosen, options",
    [
        (
            "rising",
            {"rising.values.0": 0.25, "rising.values.1": 0.75},
            {"values": [0.25, 0.75, 0.9], "at": None},
        ),
        (
            "turning",
            {"turning.values.1": 0.6, "turning.values.2": "low", "turning.at.0": 0.125},
            {"values": [0.2, 0.6, 0.7], "at": [0.125, 0.5]},
        ),
        (
            "turning",
            {
                "turning.values.1": 0.5,
                "turning.values.2": "any",
                "turning.values.2/any": 0.875,
                "turning.at.0": 0.25,
            },
            {"values": [0.2, 0.5, 0.875], "at": [0.25, 0.5]},
        ),
    ],
)
def test_a_list_is_filled_with_what_is_decided_and_found_again(label, chosen, options):
    spec = study(LISTS)
    params = {"masking.ratio": label} | {f"masking.ratio/{name}": chosen[name] for name in chosen}
    point = space.suggest(spec, optuna.trial.FixedTrial(params))
    assert point.params == params
    assert point.labels == {"masking.ratio": label}
    config = space.resolve(spec, point.overrides)
    assert config.masking.ratio.options() == options
    assert space.params_of(spec, config) == params


def test_a_list_that_is_none_of_the_labels_is_not_in_the_space():
    spec = study(LISTS)
    for ratio in (
        {"name": "piecewise", "values": [0.3, 0.9]},  # a value too few
        {"name": "piecewise", "values": [0.3, 0.5, 0.8]},  # not the fixed one
        {"name": "piecewise", "values": [0.6, 0.5, 0.9]},  # out of range
        {"name": "piecewise", "values": [0.3, 0.5, 0.9], "at": [0, 0.4, 1]},
        {"name": "uniform", "low": 0.3, "high": 0.9},
    ):
        config = space.resolve(spec, {"masking.ratio": ratio})
        assert space.params_of(spec, config) is None


def test_the_grid_goes_into_lists():
    search = (
        "  masking.ratio:\n    choices:\n"
        "      rising: {name: piecewise, values: [{low: 0.1, high: 0.5, num: 3}, 0.6, "
        "{choices: [0.7, 0.9]}]}\n"
        "      constant: {name: constant, value: 0.75}\n"
    )
    spec = study(search, GRID)
    points = space.enumerate_grid(spec)
    assert [point.overrides["masking.ratio"].get("values") for point in points] == [
        [0.1, 0.6, 0.7], [0.1, 0.6, 0.9], [0.3, 0.6, 0.7], [0.3, 0.6, 0.9],
        [0.5, 0.6, 0.7], [0.5, 0.6, 0.9], None,
    ]  # fmt: skip
    assert space.params_of(spec, spec.trial) == {"masking.ratio": "constant"}


def test_random_draws_from_a_list_are_valid_and_found_again():
    spec = study(LISTS)
    known = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    labels = set()
    for _ in range(12):
        trial = known.ask()
        point = space.suggest(spec, trial)
        assert json.loads(json.dumps(point.params)) == point.params == trial.params
        assert space.params_of(spec, space.resolve(spec, point.overrides)) == point.params
        labels.add(point.params["masking.ratio"])
    assert labels == {"constant", "rising", "turning"}


def test_a_place_is_read_and_written_through_mappings_and_lists():
    settings = {"a": [1, {"b": [2, 3]}], "c": None}
    assert space.get_at(settings, ("a", 1, "b", 0)) == 2
    space.set_at(settings, ("a", 1, "b", 0), 5)
    assert settings == {"a": [1, {"b": [5, 3]}], "c": None}
    for path in (("a", 2), ("a", "1"), ("a", -1), ("c", "d"), ("c", 0), ("a", 0, 0), ("d",)):
        with pytest.raises(KeyError):
            space.get_at(settings, path)


# --- what the author believes ---

BELIEVED = """\
  model.patch: {choices: [4, 8, 16], prior: [4, 2, 1]}
  masking.ratio:
    choices:
      constant: {name: constant, value: {low: 0.1, high: 0.9, prior: 0.3}}
      rising: {name: linear, start: 0.1, end: {choices: [0.5, 0.9], prior: [1, 3]}}
    prior: [2, 1]
"""


def test_a_prior_changes_nothing_but_what_is_believed():
    with_it = study(BELIEVED)
    without = study(
        BELIEVED.replace(", prior: [4, 2, 1]", "")
        .replace(", prior: 0.3", "")
        .replace(", prior: [1, 3]", "")
        .replace("    prior: [2, 1]\n", "")
    )
    known = space.parameters(with_it.search)
    assert {name: each.item.prior for name, each in known.items()} == {
        "model.patch": [4, 2, 1],
        "masking.ratio": [2, 1],
        "masking.ratio/constant.value": 0.3,
        "masking.ratio/rising.end": [1, 3],
    }
    assert list(known) == list(space.parameters(without.search))
    fixed = {"model.patch": 4, "masking.ratio": "rising", "masking.ratio/rising.end": 0.9}
    for spec in (with_it, without):
        config = space.resolve(spec, space.suggest(spec, optuna.trial.FixedTrial(fixed)).overrides)
        assert config.masking.ratio.options() == {"start": 0.1, "end": 0.9}
        assert space.params_of(spec, config) == fixed
    assert with_it.digest != without.digest


def test_an_item_without_a_prior_is_written_as_before_there_were_any():
    keys = ["choices", "low", "high", "log", "step", "num"]
    assert list(space.SearchItem(choices=[4, 8]).model_dump()) == keys
    believed = space.SearchItem(choices=[4, 8], prior=[1, 2]).model_dump(mode="json")
    assert believed["prior"] == [1, 2]


@pytest.mark.parametrize(
    "item, words",
    [
        ({"choices": [4, 8], "prior": [1]}, "given a prior of 1 weights; expected a weight"),
        ({"choices": [4, 8], "prior": 4}, "given prior 4; expected a weight above 0"),
        ({"choices": [4, 8], "prior": {4: 1, 8: 2}}, "as a list in their order"),
        ({"choices": [4, 8], "prior": [1, 0]}, "given the weight 0 in prior"),
        ({"choices": [4, 8], "prior": [1, True]}, "given the weight True in prior"),
        ({"choices": [4, 8], "prior": [1, float("nan")]}, "given the weight nan in prior"),
        ({"choices": [4, 8], "prior": [1, 1e308]}, "up to 1e+09, for each of the 2 choices"),
        ({"low": 0.1, "high": 0.9, "prior": 0.95}, "the likely value: a number from 0.1 to 0.9"),
        ({"low": 0.1, "high": 0.9, "prior": [1]}, "given prior [1]; expected the likely value"),
        ({"low": 1, "high": 4, "prior": 2.5}, "a whole number from 1 to 4"),
        ({"low": 0.25, "high": 0.75, "step": 0.25, "prior": 0.3}, "in steps of 0.25"),
    ],
)
def test_a_prior_that_says_nothing_of_its_item_is_refused(item, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        space.SearchItem.model_validate(item)
