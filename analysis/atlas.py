"""One self-contained page of what every masking of a study hides, from the folder it was drawn in.

Every word that comes from the study is escaped by the template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from analysis import theme
from analysis.gallery import CHANGING, UNREADABLE, Hidden, Shot, data_uri, shots, size, unreadable
from analysis.page import still_page, write_page
from analysis.theme import plain
from trainables.edges import in_words

WIDEST_BAR = 0.25  # enrichment that fills half of a bar; more is cut


class Tile(NamedTuple):
    """What a masking hides at some point, as one picture."""

    when: str
    columns: list[str]
    uri: str | None
    says: str


class Section(NamedTuple):
    number: int
    name: str
    why: str
    facts: list[tuple[str, str]]
    patch: str
    ratio: str
    model: str
    problem: str
    shots: list[Shot]
    tiles: list[Tile]
    last: dict[str, Hidden]  # class -> numbers at the end


class Subjects(NamedTuple):
    """The images and their classes, shown once and repeated by the style sheet."""

    uri: str
    columns: list[str]
    size: tuple[int, int]
    share: float  # of the width of a tile's picture


def build_atlas(folder: Path, output: Path) -> Path:
    """Write the page about a folder that holds atlas.json; returns where it lies."""
    return write_page(output, render(folder))


def render(folder: Path) -> str:
    """The page as text."""
    about = json.loads((folder / "atlas.json").read_text(encoding="utf-8"))
    sections = [
        _section(folder, number, line) for number, line in enumerate(about["sections"], start=1)
    ]
    subjects = _subjects(sections)
    classes = [plain(name) for name in about["classes"]]
    return still_page(
        "atlas",
        {"heat": Markup(theme.heat()), "subjects": subjects},
        study=plain(about["study"]),
        question=plain(about["question"] or "", 400),
        data=plain(about["data"]["name"]),
        extent=" x ".join(str(edge) for edge in about["data"]["size"]),
        is_volume=len(about["data"]["size"]) == 3,
        num_images=len(about["images"]),
        images=", ".join(plain(name) for name in about["images"]),
        classes=classes,
        sections=sections,
        subjects=subjects,
        left_out=[plain(reason, 300) for reason in about["left_out"]],
        bar=_bar,
        points=_points,
        is_beyond_chance=is_beyond_chance,
    )


def is_beyond_chance(hidden: Hidden) -> bool:
    return abs(hidden.enrichment) > hidden.chance


def _section(folder: Path, number: int, about: dict[str, Any]) -> Section:
    masking = dict(about["masking"])
    strategy = dict(masking.pop("strategy"))
    name = plain(strategy.pop("name"))
    ratio = masking.pop("ratio")
    patch, unit = in_words(about["patch"]), in_words(masking.pop("unit"))
    facts = [("options", _settings(strategy))] if strategy else []
    facts += [("ratio", _words(ratio)), ("patch", f"{patch} px"), ("mask unit", f"{unit} px")]
    facts += [(key, _words(value)) for key, value in masking.items() if value]
    trained, planned = about["trained"], about["planned"]
    model = "none asked"
    if trained:
        model = f"{trained} of the trial's {planned} steps"
    found = shots(folder / about["folder"])
    return Section(
        number=number,
        name=name,
        why=plain(about["why"], 300),
        facts=[*facts, ("model", model)],
        patch=patch if patch == unit else f"{patch} (unit {unit})",
        ratio=_first_to_last([shot.ratio for shot in found if shot.ratio is not None]),
        model=model,
        problem=plain(about["problem"] or "", 600),
        shots=found,
        tiles=[_tile(shot) for shot in found],
        last=found[-1].classes if found else {},
    )


def _tile(shot: Shot) -> Tile:
    names = shot.columns
    cut = slice(-CHANGING, None) if len(names) > CHANGING else slice(None)
    try:
        return Tile(shot.when, names[cut], data_uri(shot.path, len(names), cut), "")
    except UNREADABLE as error:
        return Tile(shot.when, [], None, unreadable(shot.path, error))


def _subjects(sections: list[Section]) -> Subjects | None:
    """What stands left of the columns that change, of the first picture that can be read."""
    for shot in (shot for section in sections for shot in section.shots):
        names = shot.columns
        if len(names) <= CHANGING:
            continue
        cut = slice(0, len(names) - CHANGING)
        try:
            uri, extent = data_uri(shot.path, len(names), cut), size(shot.path, len(names), cut)
        except UNREADABLE:
            continue
        width = size(shot.path, len(names), slice(-CHANGING, None))[0]
        return Subjects(uri, names[cut], extent, extent[0] / width)
    return None


def _first_to_last(ratios: list[float]) -> str:
    first, last = (f"{100 * ratio:.0f}" for ratio in (ratios[0], ratios[-1])) if ratios else "––"
    return f"{first} %" if first == last else f"{first} → {last} %"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{plain(key)} {_words(value)}" for key, value in settings.items())


def _words(value: Any) -> str:
    """A setting as a person would say it: `linear (start 0.2, end 0.8)`."""
    if isinstance(value, dict):
        options = {key: item for key, item in value.items() if key != "name" and item is not None}
        name = plain(value.get("name", ""))
        return f"{name} ({_settings(options)})" if options and name else name or _settings(options)
    if isinstance(value, list):
        return "/".join(_words(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def _points(value: float) -> str:
    """A difference of shares in points of a hundred."""
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _bar(hidden: Hidden) -> dict[str, str]:
    """Places of an enrichment and of its chance in a picture 100 wide with zero in the middle."""
    reach = min(abs(hidden.enrichment), WIDEST_BAR) / WIDEST_BAR * 50
    band = min(hidden.chance, WIDEST_BAR) / WIDEST_BAR * 50
    return {
        "x": f"{50 - (reach if hidden.enrichment < 0 else 0):.2f}",
        "width": f"{max(reach, 0.5):.2f}",
        "band_x": f"{50 - band:.2f}",
        "band_width": f"{2 * band:.2f}",
    }
