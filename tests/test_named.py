"""Settings that name a function. Run: python -m pytest tests/test_named.py"""

from typing import Annotated

import pytest
from pydantic import BaseModel, Field, ValidationError

from trainables.named import named


def still(progress: float, *, value: float = 0.5) -> float:
    """The same."""
    return value


def between(progress: float, *, start: Annotated[float, Field(gt=0)], turns: int = 1) -> float:
    """From start on."""
    return start * turns


TABLE = {"still": still, "between": between}


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
