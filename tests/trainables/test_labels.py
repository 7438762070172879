"""How values of masks become classes. python -m pytest tests/trainables/test_labels.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainables.data import labels as labels_module
from trainables.data.labels import labels_of
from trainables.errors import UserError


def made(encoding: Any = "index", ignore: Any = None, classes: Any = None, **options: Any) -> Any:
    given = {"small_classes": [], "threshold": None} | options
    return labels_of(encoding, ignore, classes, **given)


def read(values: Any, *args: Any, dtype: Any = np.uint8, **options: Any) -> list[list[int]]:
    found = made(*args, **options).of(np.array(values, dtype))
    assert found.dtype == np.uint8
    return found.tolist()


def refusal(values: Any, *args: Any, dtype: Any = np.uint8, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(values, *args, dtype=dtype, **options)
    return str(caught.value)


def test_values_are_classes_unless_something_else_is_said() -> None:
    assert read([[0, 1], [2, 2]]) == [[0, 1], [2, 2]]
    assert read([[0, 1], [2, 2]], dtype=np.float32) == [[0, 1], [2, 2]]
    assert read([[0, 255]], "binary") == read([[0, 1]], "binary") == [[0, 1]]
    assert "expected 0 and 255 (or 0 and 1)" in refusal([[0, 7]], "binary")
    assert read([[0, 7, 255]], "nonzero") == [[0, 1, 1]]
    assert read([[0, 3, 9]], "instances") == [[0, 1, 1]]
    assert read([[0.2, 0.5, 0.9]], "threshold", threshold=0.5, dtype=np.float32) == [[0, 1, 1]]


def test_a_map_of_values_may_have_gaps_and_some_values_mean_not_labelled() -> None:
    classes = {0: "background", 1: "core", 4: "enhancing"}
    assert read([[0, 4, 1]], classes=classes) == [[0, 2, 1]]
    assert read([[0, 4, -1]], ignore=-1, classes=classes, dtype=np.int16) == [[0, 2, 255]]
    assert read([[9, 4, -1]], ignore=[-1, 9], classes=classes, dtype=np.int16) == [[255, 2, 255]]
    assert made(classes=classes).names == ["background", "core", "enhancing"]
    text = refusal([[0, 2]], classes=classes)
    assert "has the values 2; expected class values 0 (background), 1 (core), 4 (enhanc" in text


def test_a_map_that_counts_up_is_a_list() -> None:
    """So that it makes the same data as before maps could be written."""
    mapped, listed = made(classes={"0": "a", "1": "b"}), made(classes=["a", "b"])
    assert mapped == listed and mapped.identity() == {"mask_encoding": "index", "ignore": None}
    assert made(classes={0: "a", 2: "b"}).identity() != listed.identity()
    assert made(ignore=7).identity() == made(ignore=[7]).identity()


def test_colours_are_classes() -> None:
    classes = {"#000000": "background", "#FF0000": "red", "#00ff7f": "green"}
    mask = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 127]]).T[:, None]
    assert read(mask, "colours", classes=classes) == [[0, 1, 2]]
    text = refusal(
        mask + np.array([[[0, 0, 1]], [[0, 0, 0]], [[0, 0, 0]]]), "colours", classes=classes
    )
    assert "has the colours #01ff7f, which classes does not name" in text
    assert "or set ignore: 0x01ff7f if that" in text
    ignored = read(mask, "colours", 0xFF0000, {"#000000": "background", "#00ff7f": "green"})
    assert ignored == [[0, 255, 1]]


def test_what_rounding_made_of_a_label_is_that_label() -> None:
    assert read([[0, 0.996, 2.04]], dtype=np.float32) == [[0, 1, 2]]
    assert "has 1 values that are no class index, such as 0.5" in refusal([[0, 0.5]], dtype=float)


def test_labels_beyond_all_reason_are_refused() -> None:
    """As a float image given for a mask, or an overflow."""
    assert "expected labels up to 1,000,000,000" in refusal([[0, 3e9]], "nonzero", dtype=float)
    assert "expected labels up to" in refusal([[0, 2**40]], "instances", dtype=np.int64)


def test_values_far_apart_are_sorted_instead_of_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([0, 3, 70_000], (40, 50))
    before = read(values, "instances", dtype=np.int64)
    monkeypatch.setattr(labels_module, "COUNTED", 2)
    assert read(values, "instances", dtype=np.int64) == before == (values > 0).tolist()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"encoding": "colours"}, "which colour is which class"),
        ({"encoding": "colours", "classes": {"red": "a"}}, "'red' is no colour"),
        ({"classes": {"#000000": "a"}}, "'#000000'; expected whole numbers, or mask_encoding"),
        ({"classes": {1: "a", 2: "b"}}, "expected the background, 0, first"),
        ({"classes": {}}, "names nothing"),
        ({"encoding": "nonzero", "classes": {0: "a", 1: "b"}}, "have no values to map"),
        ({"encoding": "instances", "classes": ["a"]}, "instances masks have 2 classes"),
        ({"encoding": "threshold"}, "go together"),
        ({"threshold": 3.0}, "go together"),
    ],
)
def test_names_that_do_not_fit_the_encoding_are_refused(given: Any, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        made(**given)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("values", "way_out"),
    [
        ([[0, 255]], "set mask_encoding: binary if 255 is the object, or set ignore: 255"),
        (
            [[0, 4]],
            "map them, as in `classes: {0: background, 4: core}`, or set mask_encoding: ins",
        ),
        ([[0, -1]], "set ignore: -1 if that means not labelled"),
    ],
)
def test_a_refusal_names_the_ways_out(values: Any, way_out: str) -> None:
    assert way_out in refusal(values, classes=["background", "cell"], dtype=np.int16)
