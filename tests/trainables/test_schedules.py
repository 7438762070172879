"""Schedules by hand, and their bounds. Run: python -m pytest tests/trainables/test_schedules.py"""

import inspect
import math
import re
import typing
from statistics import NormalDist, fmean, pstdev

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from tests.drawn import drawn
from trainables import schedules
from trainables.schedules import MIDPOINTS, SCHEDULES, Schedule, parse, ratio_problem, value_at

ASKED = (0, 0.25, 0.5, 0.75, 1)
CHANCES = (0.0, 0.25, 0.5, 0.999)

BY_HAND = [
    {"name": "constant", "value": 0.6},
    {"name": "linear", "start": 0.2, "end": 0.8},
    {"name": "cosine", "start": 1, "end": 0},
    {"name": "power", "start": 0, "end": 1, "exponent": 0.5},
    {"name": "step", "values": [0, 1, 0.5], "at": [0.25, 0.75]},
    {"name": "ramp", "start": 0.999, "end": 0.9999, "until": 0.25},
    {"name": "piecewise", "values": [0, 1, 0.5]},
    {"name": "piecewise", "values": [1, 0, 1], "at": [0, 0.1, 1]},
    {"name": "amr"},
    {"name": "amr", "shape": "step", "levels": 2},
    {"name": "uniform", "low": 0, "high": 1},
    {"name": "truncated_normal"},
    {"name": "truncated_normal", "mean": 0, "deviation": 3, "low": 0, "high": 1},
]
DRAWN = [each.model_dump(mode="json") for name in SCHEDULES for each in drawn(Schedule, name, 8)]
EXAMPLES = BY_HAND + DRAWN


def over_progress(name, chance=0.5, **options):
    return [SCHEDULES[name](progress, chance, **options) for progress in ASKED]


def over_chance(name, chances, **options):
    return [SCHEDULES[name](0.5, chance, **options) for chance in chances]


def test_the_examples_are_of_every_schedule():
    assert {example["name"] for example in EXAMPLES} == SCHEDULES.keys()


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_schedule_stays_between_0_and_1(example):
    schedule = parse(example)
    for progress in [place / 97 for place in range(98)]:
        for chance in (*CHANCES, 1 - 2**-24):
            assert 0 <= value_at(schedule, progress, chance) <= 1


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_schedule_gives_the_same_answer_to_the_same_question(example):
    questions = [(progress, chance) for progress in ASKED for chance in CHANCES]
    first = {asked: value_at(parse(example), *asked) for asked in questions}
    assert {asked: value_at(parse(example), *asked) for asked in reversed(questions)} == first


@pytest.mark.parametrize("example", BY_HAND, ids=str)
def test_only_random_schedules_look_at_chance_and_only_they_ignore_progress(example):
    schedule = parse(example)
    varies = len({value_at(schedule, 0.3, chance) for chance in CHANCES}) > 1
    assert varies == (schedule.name in ("uniform", "truncated_normal"))
    moves = len({value_at(schedule, progress) for progress in ASKED}) > 1
    assert moves == (schedule.name not in ("constant", "uniform", "truncated_normal"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_option_but_progress_and_chance_is_named(name):
    parameters = list(inspect.signature(SCHEDULES[name]).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["progress", "chance"]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[2:])


def test_constant_is_the_same_throughout():
    assert over_progress("constant", value=0.6) == [0.6] * 5


def test_linear_by_hand():
    assert over_progress("linear", start=0.2, end=0.8) == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])


def test_cosine_by_hand():
    values = over_progress("cosine", start=0.2, end=0.8)
    # (1 - cos 45 deg) / 2 = 0.1464
    assert values == pytest.approx([0.2, 0.28787, 0.5, 0.71213, 0.8], abs=1e-5)


def test_power_by_hand():
    values = over_progress("power", start=0.2, end=0.6)
    assert values == pytest.approx([0.2, 0.225, 0.3, 0.425, 0.6])  # 0.2 + 0.4 * p^2
    early = over_progress("power", start=0.0, end=1.0, exponent=0.5)
    assert early == pytest.approx([0, 0.5, 0.70711, 0.86603, 1], abs=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "power"])
def test_schedules_may_fall(name):
    values = over_progress(name, start=0.9, end=0.1)
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.9 and values[-1] == pytest.approx(0.1)


def test_a_step_holds_from_its_turning_point_on():
    options = {"values": [0.3, 0.6, 0.9], "at": [0.25, 0.75]}
    values = [SCHEDULES["step"](p, 0.5, **options) for p in (0, 0.24, 0.25, 0.74, 0.75)]
    assert values == [0.3, 0.3, 0.6, 0.6, 0.9]


def test_a_ramp_is_flat_after_its_end():
    values = over_progress("ramp", start=0.5, end=0.9, until=0.5)
    assert values == pytest.approx([0.5, 0.7, 0.9, 0.9, 0.9])


def test_the_momentum_of_anatomask_by_hand():
    # 1000 epochs: 0.999 + epoch / 250 * 0.0009 below epoch 250, then 0.9999
    momentum = parse({"name": "ramp", "start": 0.999, "end": 0.9999, "until": 0.25})
    for epoch, expected in (
        (0, 0.999),
        (50, 0.99918),
        (125, 0.99945),
        (250, 0.9999),
        (999, 0.9999),
    ):
        assert value_at(momentum, epoch / 1000) == pytest.approx(expected, abs=1e-12)


def test_piecewise_by_hand():
    spread = over_progress("piecewise", values=[0.2, 0.6, 0.9])
    assert spread == pytest.approx([0.2, 0.4, 0.6, 0.75, 0.9])
    placed = over_progress("piecewise", values=[0.2, 0.8, 0.4], at=[0.25, 0.5, 0.9])
    assert placed == pytest.approx([0.2, 0.2, 0.8, 0.55, 0.4])  # 0.75 is 5/8 of the way down
    assert over_progress("piecewise", values=[0.2, 0.8]) == pytest.approx(
        over_progress("linear", start=0.2, end=0.8)
    )


@pytest.mark.parametrize(
    "shape, expected",
    [
        ({}, [0.25, 0.375, 0.5, 0.625, 0.75]),
        ({"shape": "cosine"}, [0.25, 0.32322, 0.5, 0.67678, 0.75]),
        ({"shape": "power"}, [0.25, 0.28125, 0.375, 0.53125, 0.75]),
        ({"shape": "power", "exponent": 1.0}, [0.25, 0.375, 0.5, 0.625, 0.75]),
        ({"shape": "step"}, [0.25, 0.25, 0.5, 0.75, 0.75]),
        ({"shape": "step", "levels": 2}, [0.25, 0.25, 0.75, 0.75, 0.75]),
        ({"start": 0.1, "end": 0.9}, [0.1, 0.3, 0.5, 0.7, 0.9]),
    ],
)
def test_amr_by_hand(shape, expected):
    assert over_progress("amr", **shape) == pytest.approx(expected, abs=1e-5)


def test_amr_says_that_it_is_an_interpretation():
    assert "interpretation" in SCHEDULES["amr"].__doc__


def test_uniform_by_hand():
    assert over_chance("uniform", CHANCES[:3], low=0.5, high=0.9) == pytest.approx([0.5, 0.6, 0.7])
    assert over_chance("uniform", CHANCES, low=0.4, high=0.4) == [0.4] * 4


def test_truncated_normal_by_hand():
    # around its middle a normal cut at one deviation on either side: the 25 % quantile is that of
    # 0.15866 + 0.25 * 0.68269 = 0.32933 of the whole, -0.44177 deviations
    options = {"mean": 0.5, "deviation": 0.2, "low": 0.3, "high": 0.7}
    values = over_chance("truncated_normal", (0, 0.25, 0.5, 0.75), **options)
    assert values == pytest.approx([0.3, 0.41165, 0.5, 0.58835], abs=1e-5)


def test_the_truncated_normal_of_mage_has_its_mean_and_deviation():
    values = over_chance("truncated_normal", [chance for _, chance in MIDPOINTS])
    normal = NormalDist()
    low, high = (0.5 - 0.55) / 0.25, (1.0 - 0.55) / 0.25
    weight = normal.cdf(high) - normal.cdf(low)
    shift = (normal.pdf(low) - normal.pdf(high)) / weight
    spread = 1 + (low * normal.pdf(low) - high * normal.pdf(high)) / weight - shift**2
    assert fmean(values) == pytest.approx(0.55 + 0.25 * shift, abs=1e-5)
    assert pstdev(values) == pytest.approx(0.25 * math.sqrt(spread), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": 0.0, "deviation": 0.02, "low": 0.2, "high": 0.9},  # 10 deviations above the mean
        {"mean": 1.0, "deviation": 0.02, "low": 0.1, "high": 0.8},  # and below it
        {"mean": 0.5, "deviation": 9.0, "low": 0.2, "high": 0.3},
    ],
)
def test_chance_is_the_share_below_even_in_a_far_tail(options):
    settings = {"mean": 0.55, "deviation": 0.25, "low": 0.5, "high": 1.0} | options
    side = 1 if settings["low"] > settings["mean"] else -1

    def beyond(value):  # the smaller of the two tails, exact where 1 - cdf is not
        return math.erfc(side * (value - settings["mean"]) / settings["deviation"] / math.sqrt(2))

    low, high = beyond(settings["low"]), beyond(settings["high"])
    for chance in (0.1, 0.5, 0.9, 0.999):
        value = SCHEDULES["truncated_normal"](0.5, chance, **options)
        assert settings["low"] < value < settings["high"]
        assert (beyond(value) - low) / (high - low) == pytest.approx(chance, rel=1e-9)


def test_an_end_of_a_truncated_normal_may_lie_where_nothing_is_left():
    options = {"mean": 0.5, "deviation": 0.001, "low": 0.0, "high": 1.0}
    values = over_chance("truncated_normal", (0, 0.5, 1 - 2**-24), **options)
    # 5.29 deviations lie above all but 2^-24
    assert values == pytest.approx([0, 0.5, 0.5053], abs=1e-4)


CONTRADICTIONS = [
    ({"name": "step", "values": [0.1, 0.5, 0.9], "at": [0.5]}, "turning points, got [0.1, 0.5"),
    ({"name": "step", "values": [0.1, 0.5, 0.9], "at": [0.7, 0.2]}, "rising turning points"),
    ({"name": "step", "values": [0.1, 0.5, 0.9], "at": [0.5, 0.5]}, "rising turning points"),
    ({"name": "piecewise", "values": [0.1, 0.5], "at": [0, 0.5, 1]}, "as many rising places as"),
    ({"name": "piecewise", "values": [0.1, 0.5], "at": [0.5, 0.5]}, "got [0.1, 0.5] at [0.5, 0.5]"),
    ({"name": "piecewise", "values": [0.1, 0.5], "at": [1, 0]}, "rising places"),
    ({"name": "amr", "start": 0.8}, "start <= end, got start 0.8 and end 0.75"),
    ({"name": "amr", "exponent": 3}, "exponent with shape power only, got shape linear"),
    ({"name": "amr", "shape": "power", "levels": 3}, "levels with shape step only, got shape pow"),
    ({"name": "uniform", "low": 0.8, "high": 0.2}, "low <= high, got low 0.8 and high 0.2"),
    ({"name": "truncated_normal", "low": 1.0}, "low < high, got low 1.0 and high 1.0"),
    (
        {"name": "truncated_normal", "mean": 0.1, "deviation": 0.001},
        "reaches from low to high, got mean 0.1 and deviation 0.001, nothing of which lies",
    ),
]


@pytest.mark.parametrize("given, words", CONTRADICTIONS, ids=str)
def test_options_that_contradict_each_other_are_refused_at_any_progress(given, words):
    options = {key: value for key, value in given.items() if key != "name"}
    for progress in ASKED:
        for chance in CHANCES:
            with pytest.raises(ValueError, match=re.escape(words)):
                SCHEDULES[given["name"]](progress, chance, **options)


@pytest.mark.parametrize("given, words", CONTRADICTIONS, ids=str)
def test_a_setting_that_contradicts_itself_is_refused_with_its_place(given, words):
    class Settings(BaseModel):
        guided: Schedule

    with pytest.raises(ValidationError) as caught:
        Settings(guided=given)
    (detail,) = caught.value.errors()
    assert detail["loc"] == ("guided",) and words in detail["msg"]


@pytest.mark.parametrize(
    "given",
    [
        {"name": "constant", "value": 1.01},
        {"name": "constant", "value": -0.01},
        {"name": "linear", "start": 0, "end": 2},
        {"name": "power", "start": 0, "end": 1, "exponent": 0},
        {"name": "step", "values": [0.1, 1.2], "at": [0.5]},
        {"name": "step", "values": [0.1, 0.2], "at": [1]},
        {"name": "ramp", "start": 0, "end": 1, "until": 0},
        {"name": "piecewise", "values": [0.5]},
        {"name": "piecewise", "values": [0.5, 0.6], "at": [0, 1.5]},
        {"name": "amr", "shape": "spiral"},
        {"name": "amr", "shape": "step", "levels": 1},
        {"name": "truncated_normal", "deviation": 0},
        {"name": "truncated_normal", "mean": 2},
    ],
    ids=str,
)
def test_an_option_out_of_its_bounds_is_refused(given):
    with pytest.raises(ValidationError):
        parse(given)


def test_the_bounds_themselves_are_allowed():
    for value in (0, 1):
        assert value_at(parse({"name": "constant", "value": value}), 0.5) == value
    assert parse({"name": "ramp", "start": 0, "end": 1, "until": 1}).until == 1


def test_a_schedule_is_named_by_a_word_or_a_mapping_and_read_back_equal():
    adapter = TypeAdapter(Schedule)
    assert parse("amr") == parse({"name": "amr", "start": 0.25, "end": 0.75})
    for example in EXAMPLES:
        schedule = parse(example)
        text = adapter.dump_json(schedule)
        assert adapter.validate_json(text, strict=True) == schedule


def test_the_value_of_a_named_schedule_takes_chance_if_given():
    schedule = parse({"name": "uniform", "low": 0.2, "high": 0.6})
    assert value_at(schedule, 0.9) == pytest.approx(0.4)
    assert value_at(schedule, 0.9, 0.25) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"name": "constant", "value": 1}, "given 1.0 at progress 0"),
        ({"name": "constant", "value": 0}, "given 0.0 at progress 0"),
        ({"name": "linear", "start": 0.5, "end": 1}, "given 1.0 at progress 1"),
        ({"name": "piecewise", "values": [0.5, 0, 0.5]}, "given 0.0 at progress 0.5"),
        ({"name": "step", "values": [0.5, 1, 0.5], "at": [0.7, 0.8]}, "given 1.0 at progress 0.75"),
        ({"name": "uniform", "low": 0, "high": 0.5}, "given 0.0 at progress 0"),
        ({"name": "uniform", "low": 1, "high": 1}, "given 1.0 at progress 0"),
    ],
    ids=str,
)
def test_a_ratio_that_hides_nothing_or_everything_is_no_ratio(given, told):
    assert ratio_problem(parse(given)) == f"{told}; expected a ratio above 0 and below 1"


def test_a_ratio_drawn_below_its_upper_end_may_have_1_as_that_end():
    for given in (
        {"name": "uniform", "low": 0.5, "high": 1},
        "truncated_normal",
        "constant",
        "amr",
        {"name": "power", "start": 0.1, "end": 0.9},
    ):
        assert ratio_problem(parse(given)) is None


def test_midpoints_take_each_value_of_both_once():
    once = sorted((place + 0.5) / 200 for place in range(200))
    assert [progress for progress, _ in MIDPOINTS] == once
    assert sorted(chance for _, chance in MIDPOINTS) == once
    # and depend on each other so little that a product's mean is the product of the means
    assert fmean(progress * chance for progress, chance in MIDPOINTS) == pytest.approx(
        0.25, abs=1e-3
    )


def test_every_shape_of_amr_is_one_that_it_knows():
    hint = typing.get_type_hints(schedules.amr)["shape"]
    values = {shape: tuple(over_progress("amr", shape=shape)) for shape in typing.get_args(hint)}
    assert len(set(values.values())) == len(values) == 4
