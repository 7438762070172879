"""Dotted paths of nested settings.  pytest tests/test_nested.py"""

from __future__ import annotations

from trainables.nested import flatten


def test_every_setting_has_its_dotted_path_in_the_order_given() -> None:
    settings = {"model": {"patch": 8, "decoder": {"depth": 2}}, "seed": None}
    flat = {"model.patch": 8, "model.decoder.depth": 2, "seed": None}
    assert flatten(settings) == flat and list(flatten(settings)) == list(flat)
    assert list(flatten(settings, "search:")) == [f"search:{path}" for path in flat]


def test_lists_and_empty_mappings_are_values() -> None:
    settings = {"betas": [0.9, {"a": 1}], "options": {"none": {}}}
    assert flatten(settings) == {"betas": [0.9, {"a": 1}], "options.none": {}}
