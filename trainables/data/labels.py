"""How the values of masks become classes, as people have them: `Labels.of`.

    index      each value is a class: 0, 1, 2, …, or as `classes` maps them, {0: ground, 4: core}
    binary     0 and 255 (or 0 and 1), and nothing else
    nonzero    whatever is not 0 is the object
    instances  each value but 0 numbers an object (Cellpose, StarDist): all are of one class, and
               told apart where they touch
    threshold  from `threshold` on a value is the object, as in maps of probabilities
    colours    each colour is a class, {"#000000": ground, "#ff0000": core}

Letters: *S pixels along every axis, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from trainables.data.source import NOT_LABELLED
from trainables.errors import UserError

Array = npt.NDArray[Any]

Encoding = Literal["index", "binary", "nonzero", "instances", "threshold", "colours"]

# Options that every source of files has
MaskEncoding = Annotated[
    Encoding, Field(description="what the values of masks mean: see trainables/data/labels.py")
]
Classes = Annotated[
    list[str] | dict[int | str, str] | None,
    Field(
        description="names of the values 0, 1, 2, …, or value: name, or of colours '#rrggbb': name;"
        " the background comes first"
    ),
]
Ignored = Annotated[
    int | list[int] | None, Field(description="mask value, or values, that mean not labelled")
]
Threshold = Annotated[
    float | None, Field(description="mask_encoding threshold: the least value of the object")
]

MAX_CLASSES = 64
COUNTED = 2**17  # values apart up to which counting them is faster than sorting
LARGEST = 10**9  # label
NEAR = 0.05  # of a whole number: what rounding made of a label
TWO_CLASSES = ("binary", "nonzero", "instances", "threshold")
COLOUR = re.compile("#[0-9a-fA-F]{6}")
WHOLE = re.compile("-?[0-9]{1,9}")
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l", "lh": "rh", "rh": "lh"}
SIDES = re.compile(r"(?<![a-z])(left|right|lh|rh|l|r)(?![a-z])")


@dataclass(frozen=True)
class Labels:
    """How the values of a mask are read; made by `labels_of`."""

    encoding: Encoding
    ignore: tuple[int, ...]  # the values that mean not labelled
    names: list[str] | None  # of the classes
    values: tuple[int, ...] | None = None  # of the classes in masks, or colours; None: 0, 1, 2, …
    threshold: float | None = None

    def identity(self) -> dict[str, Any]:
        """What of it decides the decoded bytes."""
        facts: dict[str, Any] = {"mask_encoding": self.encoding, "ignore": None}
        if self.ignore:
            facts["ignore"] = self.ignore[0] if len(self.ignore) == 1 else list(self.ignore)
        if self.values is not None:
            facts["values"] = list(self.values)
        if self.threshold is not None:
            facts["threshold"] = self.threshold
        return facts

    def of(self, mask: Array) -> npt.NDArray[np.uint8]:
        """Classes (*S), 255 where nothing is labelled, of a mask (*S); of colours (3, *S)."""
        if self.encoding == "colours":
            values = as_numbers(mask)
        elif self.encoding == "threshold":
            assert self.threshold is not None
            is_object: npt.NDArray[np.uint8] = (mask >= self.threshold).astype(np.uint8)
            is_object[np.isin(mask, self.ignore)] = NOT_LABELLED
            return is_object
        else:
            values = whole(mask)
        low, high = int(values.min()), int(values.max())
        if high - low > COUNTED:  # few values that lie far apart, as numbers of colours do
            present, places = np.unique(values, return_inverse=True)
            return self._classes_of(present)[places].reshape(values.shape)
        values -= low
        there = np.flatnonzero(np.bincount(values.ravel()))
        classes = np.zeros(high - low + 1, np.uint8)
        classes[there] = self._classes_of(there + low)
        return classes[values]

    def _classes_of(self, present: Array) -> npt.NDArray[np.uint8]:
        """The class of each value that a mask has, 255 of those that mean not labelled."""
        classes = np.full(len(present), NOT_LABELLED, np.uint8)
        is_known = ~np.isin(present, self.ignore)
        known = present[is_known]
        self._check(set(known.tolist()))
        if self.encoding in TWO_CLASSES:
            classes[is_known] = known != 0
        elif self.values is None:
            classes[is_known] = known
        else:
            place = {value: index for index, value in enumerate(self.values)}
            classes[is_known] = [place[value] for value in known.tolist()]
        return classes

    def _check(self, present: set[int]) -> None:
        """Refuse values that this encoding does not have."""
        if self.encoding == "binary":
            if not present <= {0, 1} and not present <= {0, 255}:
                raise UserError(
                    f"has the values {some(present)}; expected 0 and 255 (or 0 and 1); set "
                    f"mask_encoding: instances if they number objects, nonzero if all but 0 is "
                    f"the object"
                )
        elif self.encoding == "colours":
            assert self.values is not None and self.names is not None
            unknown = present - set(self.values)
            if unknown:
                raise UserError(
                    f"has the colours {colours(unknown)}, which classes does not name; it names "
                    f"{colours(self.values)}; name them too, or set ignore: 0x{min(unknown):06x} "
                    f"if that means not labelled"
                )
        elif self.encoding == "instances":
            if min(present, default=0) < 0:
                raise UserError(f"has the value {min(present)}; expected numbers of objects")
        elif self.encoding == "index":
            self._check_indices(present)

    def _check_indices(self, present: set[int]) -> None:
        limit = len(self.names) if self.names else MAX_CLASSES
        allowed = set(self.values) if self.values is not None else set(range(limit))
        wrong = present - allowed
        if not wrong:
            return
        ways = []
        if 255 in wrong and present <= {0, 255}:
            ways.append("set mask_encoding: binary if 255 is the object")
        elif self.values is None and self.names and min(wrong) >= 0:
            ways.append("map them, as in `classes: {0: background, 4: core}`")
            ways.append("set mask_encoding: instances if they number objects")
        odd = [value for value in sorted(wrong) if value < 0 or value == 255]
        if odd:
            ways.append(f"set ignore: {odd[0]} if that means not labelled")
        raise UserError(
            f"has the values {some(wrong)}; expected {self._expected()}"
            + "".join(f"; {way}" for way in [", or ".join(ways)] if way)
        )

    def _expected(self) -> str:
        if self.values is not None and self.names:
            pairs = zip(self.values, self.names, strict=True)
            return "class values " + ", ".join(f"{value} ({name})" for value, name in pairs)
        limit = len(self.names) if self.names else MAX_CLASSES
        names = f" ({', '.join(self.names)})" if self.names else ""
        return f"class indices 0 to {limit - 1}{names}"


def labels_of(
    encoding: Encoding,
    ignore: int | list[int] | None,
    classes: list[str] | dict[int | str, str] | None,
    small_classes: Sequence[str],
    threshold: float | None,
) -> Labels:
    """How masks are read. UserError: names that exclude each other, or the encoding."""
    values = None
    if isinstance(classes, dict):
        values, classes = _mapped(encoding, classes)
    elif encoding == "colours":
        raise UserError(
            "data.classes: mask_encoding: colours has to know which colour is which class; "
            'expected `classes: {"#000000": background, "#ff0000": core}`'
        )
    if (encoding == "threshold") != (threshold is not None):
        raise UserError(
            "data.threshold: mask_encoding: threshold and a `threshold` go together; give both or "
            "neither"
        )
    ignored = tuple(ignore) if isinstance(ignore, list) else () if ignore is None else (ignore,)
    if classes is None:
        if small_classes:
            raise UserError(
                "data.small_classes: name the classes as well: classes: [background, …]"
            )
        return Labels(encoding, ignored, None, None, threshold)
    if not 1 <= len(set(classes)) == len(classes) <= MAX_CLASSES:
        shown = ", ".join(map(repr, classes[:8])) + ", …" * (len(classes) > 8)
        raise UserError(
            f"data.classes: {len(classes)} are given, {shown}; expected 1 to {MAX_CLASSES} "
            f"different names"
        )
    if encoding in TWO_CLASSES and len(classes) != 2:
        raise UserError(f"data.classes: {encoding} masks have 2 classes, {len(classes)} are named")
    unknown = [name for name in small_classes if name not in classes[1:]]
    if unknown:
        raise UserError(f"data.small_classes: {unknown} are not among {classes[1:]}")
    return Labels(encoding, ignored, classes, values, threshold)


def _mapped(
    encoding: Encoding, classes: dict[int | str, str]
) -> tuple[tuple[int, ...] | None, list[str]]:
    """(values, None if they are 0, 1, 2, …; names) of a map from values, or colours, to names."""
    if not classes:
        raise UserError("data.classes: names nothing; expected `{0: background, 1: core}`")
    names = list(classes.values())
    if encoding == "colours":
        wrong = [key for key in classes if not COLOUR.fullmatch(str(key))]
        if wrong:
            raise UserError(
                f"data.classes: {wrong[0]!r} is no colour; expected '#rrggbb' in quotes"
            )
        return tuple(int(str(key)[1:], 16) for key in classes), names
    wrong = [key for key in classes if not WHOLE.fullmatch(str(key))]
    if wrong or encoding != "index":
        raise UserError(
            f"data.classes: maps {wrong[0]!r}; expected whole numbers, or mask_encoding: colours"
            if wrong
            else f"data.classes: {encoding} masks have no values to map; expected a list of names"
        )
    values = tuple(int(key) for key in classes)
    if values[0] != 0:
        raise UserError(
            f"data.classes: begins with the value {values[0]}; expected the background, 0, first"
        )
    return (None if values == tuple(range(len(values))) else values), names


def whole(values: Array) -> npt.NDArray[np.int32]:
    """Mask values as whole numbers, which some programs store as floats, or scale and round."""
    low, high = values.min(), values.max()
    if not -LARGEST <= low <= high <= LARGEST:
        raise UserError(f"has values from {low:g} to {high:g}; expected labels up to {LARGEST:,}")
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int32)
    nearest = np.rint(values)
    is_wrong = np.abs(values - nearest) > NEAR
    if is_wrong.any():
        raise UserError(
            f"has {int(is_wrong.sum()):,} values that are no class index, such as "
            f"{some(np.unique(values[is_wrong])[:8].tolist())}; expected whole numbers, or "
            f"mask_encoding: threshold"
        )
    return nearest.astype(np.int32)


def as_numbers(colours_3S: Array) -> npt.NDArray[np.int32]:
    """Colours of 8 bits as 0xRRGGBB."""
    red, green, blue = colours_3S.astype(np.int32)
    return np.asarray(red << 16 | green << 8 | blue)


def colours(values: Iterable[int]) -> str:
    """Some colours for people: #rrggbb."""
    shown = sorted(values)
    return ", ".join(f"#{value:06x}" for value in shown[:8]) + ", …" * (len(shown) > 8)


def some(values: Iterable[float]) -> str:
    """The first of some values for people."""
    first = sorted(values)
    return ", ".join(map(str, first[:8])) + (", …" if len(first) > 8 else "")


def axes_without_side(num_axes: int) -> list[int]:
    """All but the one from left to right: the second of a picture, the first of a volume."""
    return [axis for axis in range(num_axes) if axis != (1 if num_axes == 2 else 0)]


def two_sides(classes: Sequence[str]) -> tuple[str, str] | None:
    """Two classes whose names differ in left and right alone."""
    known = {name.lower(): name for name in classes}
    for name in classes:
        words = SIDES.split(name.lower())
        other = "".join(OTHER_SIDE.get(word, word) for word in words)
        if other != name.lower() and other in known:
            return name, known[other]
    return None
