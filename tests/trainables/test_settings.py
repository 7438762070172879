"""Settings as plain data.  pytest tests/trainables/test_settings.py"""

from __future__ import annotations

from trainables.settings import flatten, short


def test_every_setting_has_its_dotted_path_in_the_order_given() -> None:
    settings = {"model": {"patch": 8, "decoder": {"depth": 2}}, "seed": None}
    flat = {"model.patch": 8, "model.decoder.depth": 2, "seed": None}
    assert flatten(settings) == flat and list(flatten(settings)) == list(flat)
    assert list(flatten(settings, "search:")) == [f"search:{path}" for path in flat]


def test_lists_and_empty_mappings_are_values() -> None:
    settings = {"betas": [0.9, {"a": 1}], "options": {"none": {}}}
    assert flatten(settings) == {"betas": [0.9, {"a": 1}], "options.none": {}}


def test_fractions_are_told_with_three_digits() -> None:
    assert [short(value) for value in (0.123456, 1e-5, 8, "tpe", None)] == [
        "0.123",
        "1e-05",
        "8",
        "tpe",
        "None",
    ]
