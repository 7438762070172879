"""Settings that name a function. Run: python -m pytest tests/trainables/test_named.py"""

import json
from typing import Annotated

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from trainables.named import Choice, named


def still(progress: float, *, value: float = 0.5) -> float:
    """The same."""
    return value


def between(progress: float, *, start: Annotated[float, Field(gt=0)], turns: int = 1) -> float:
    """From start on."""
    return start * turns


TABLE = {"still": still, "between": between}
Shape = named(TABLE)
FROM_ONE = {"name": "between", "start": 1}
STILL = TypeAdapter(Shape).validate_python("still")
MISSPELT = {"name": "betwen"}


def plain(request: int) -> int:
    """Has no options."""
    return request


def guided(request: int, *, share: Shape = FROM_ONE, often: Shape | None = None) -> int:
    """Has options that name functions themselves, with a dict and nothing as defaults."""
    return request


def taught(request: int, *, share: Shape = STILL) -> int:
    """Has such an option with a choice as its default."""
    return request


class Nested(BaseModel):
    strategy: named({"plain": plain, "guided": guided, "taught": taught})


class Settings(BaseModel):
    shape: named(TABLE)


class OneChoice(BaseModel):
    shape: named({"still": still})


class Source(BaseModel):
    data: named(TABLE, key="source")


def complaint(settings, given):
    with pytest.raises(ValidationError) as caught:
        settings(**given)
    return str(caught.value)


def test_a_word_stands_for_the_name_and_its_defaults():
    shape = Settings(shape="still").shape
    assert (shape.name, shape.options()) == ("still", {"value": 0.5})
    assert OneChoice(shape="still").shape.options() == {"value": 0.5}


def test_options_reach_the_function():
    shape = Settings(shape={"name": "between", "start": 2, "turns": 3}).shape
    assert TABLE[shape.name](0.0, **shape.options()) == 6


def test_an_unknown_name_is_refused_with_the_known_ones():
    message = complaint(Settings, {"shape": "betwen"})
    assert "'betwen'" in message and "'still', 'between'" in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": "still", "valeu": 1}, "valeu"),
        ({"name": "between"}, "start"),
        ({"name": "between", "start": "soon"}, "start"),
        ({"name": "between", "start": -1}, "greater than 0"),
        ({"name": "between", "start": 1, "progress": 0.5}, "progress"),
        ({"value": 1}, "name"),
    ],
)
def test_options_must_be_those_of_the_function(given, expected):
    assert expected in complaint(Settings, {"shape": given})


def test_the_name_may_stand_under_another_key():
    data = Source(data={"source": "between", "start": 1}).data
    assert (data.name, data.options()) == ("between", {"start": 1, "turns": 1})
    assert Source(data="still").data.name == "still"
    assert "source" in complaint(Source, {"data": {"name": "still"}})


def test_a_choice_is_written_and_read_back_equal():
    for model, given in ((Settings, {"shape": "still"}), (Source, {"data": "still"})):
        first = model(**given)
        assert model.model_validate_json(first.model_dump_json(by_alias=True)) == first


def test_a_choice_never_changes():
    with pytest.raises(ValidationError, match="frozen"):
        Settings(shape="still").shape.value = 1.0


def test_an_option_may_name_a_function_itself():
    given = {"name": "guided", "share": {"name": "between", "start": 2, "turns": 3}}
    strategy = Nested(strategy=given | {"often": "still"}).strategy
    options = strategy.options()
    assert list(options) == ["share", "often"]
    assert all(isinstance(option, Choice) for option in options.values())
    share = options["share"]
    assert TABLE[share.name](0.0, **share.options()) == 6
    assert options["often"].options() == {"value": 0.5}


def test_a_nested_default_may_be_a_mapping_or_a_choice_and_becomes_a_choice():
    guided = Nested(strategy="guided").strategy
    assert isinstance(guided.share, Choice) and guided.often is None
    assert guided.share.options() == {"start": 1, "turns": 1}
    assert Nested(strategy="taught").strategy.share.options() == {"value": 0.5}


@pytest.mark.parametrize(
    "given",
    [
        "plain",
        "guided",
        "taught",
        {"name": "guided", "share": "still", "often": {"name": "between", "start": 0.5}},
        {"name": "taught", "share": {"name": "between", "start": 3, "turns": 2}},
    ],
)
def test_a_nested_choice_is_written_and_read_back_equal(given):
    first = Nested(strategy=given)
    text = first.model_dump_json(by_alias=True)
    assert Nested.model_validate_json(text, strict=True) == first
    assert Nested.model_validate_json(json.dumps(first.model_dump(mode="json"))) == first
    assert Nested(strategy=first.strategy) == first


@pytest.mark.parametrize(
    ("option", "place", "words"),
    [
        ({"share": "betwen"}, ("share",), "'betwen'"),
        ({"share": {"name": "still", "valeu": 1}}, ("share", "still", "valeu"), "not permitted"),
        ({"share": "between"}, ("share", "between", "start"), "required"),
        ({"often": {"name": "between", "start": -1}}, ("often", "between", "start"), "than 0"),
        ({"share": {"start": 1}}, ("share",), "name"),
        ({"share": 7}, ("share",), "an object"),
        ({"share": None}, ("share",), "an object"),
    ],
)
def test_a_wrong_nested_option_is_told_with_its_place(option, place, words):
    given = {"strategy": {"name": "guided"} | option}
    with pytest.raises(ValidationError) as caught:
        Nested.model_validate_json(json.dumps(given), strict=True)
    (detail,) = caught.value.errors()
    assert detail["loc"] == ("strategy", "guided", *place)
    assert words in detail["msg"]


def test_a_wrong_nested_default_is_no_default():
    def wrong(request: int, *, share: Shape = MISSPELT) -> int:
        """Misspelt."""
        return request

    with pytest.raises(ValidationError, match="'betwen'"):
        TypeAdapter(named({"wrong": wrong})).validate_python("wrong")
