"""Settings that name a function: `{name: cosine, start: 0.2, end: 0.8}`.

A table (a plain dict of functions) becomes a pydantic type: the name must be a key of the table,
and the options must be the keyword-only parameters of the function that stands there, with their
types and defaults. So a function added to a table can be named in a study file at once.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model


class Choice(BaseModel):
    """A key of a table together with the options of the function that stands there."""

    # an option may name a function itself; its default is then a Choice, or a dict to make one of
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    name: str

    def options(self) -> dict[str, Any]:
        """The keyword arguments for the named function; one that names a function is a Choice."""
        return {key: getattr(self, key) for key in type(self).model_fields if key != "name"}


def named(table: Mapping[str, Callable[..., Any]], *, key: str = "name") -> Any:
    """The pydantic type of a setting that names a function of `table`.

    A bare string stands for the name alone. `key` is the word that carries the name in the study
    file (`name`, or `source` for data).
    """
    models = [_options_model(name, function, key) for name, function in table.items()]
    choice = reduce(or_, models)
    union = choice if len(models) == 1 else Annotated[choice, Field(discriminator="name")]

    def spell_out(value: Any) -> Any:
        if isinstance(value, str):
            return {key: value}
        return value

    return Annotated[union, BeforeValidator(spell_out)]


def _options_model(name: str, function: Callable[..., Any], key: str) -> type[Choice]:
    options = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    # those of the options alone: others may name types of libraries that are not imported yet
    written = types.SimpleNamespace(
        __annotations__={each.name: each.annotation for each in options}
    )
    hints = typing.get_type_hints(written, function.__globals__, include_extras=True)
    fields: dict[str, Any] = {"name": (Literal[name], Field(alias=key))}
    for option in options:
        default = ... if option.default is inspect.Parameter.empty else option.default
        hint = hints[option.name]
        if _holds_tuple(hint):  # files hold lists, and study files are read strictly
            hint = Annotated[hint, BeforeValidator(_as_tuple)]
        fields[option.name] = (hint, default)
    return create_model(
        f"{function.__name__}_options", __base__=Choice, __doc__=function.__doc__, **fields
    )


def _holds_tuple(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType, Annotated):
        return any(_holds_tuple(member) for member in typing.get_args(hint))
    return typing.get_origin(hint) is tuple


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
