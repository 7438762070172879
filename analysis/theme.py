"""Colours and layout of every figure, for light and dark pages.

A colour in a figure is a name, `var(--blue)`; the page's script replaces it by the value of the
page's theme. Hues are Okabe and Ito's, told apart by colour-blind readers, made darker on white and
lighter on black until thin lines are legible; each series also has a symbol of its own.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import plotly.graph_objects as go

# name -> (on a light page, on a dark page)
COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#f7f7f5", "#111418"),
    "card": ("#ffffff", "#191d23"),
    "ink": ("#1a1d21", "#e9ecef"),
    "muted": ("#5c636b", "#a3abb5"),
    "rule": ("#d9dcdf", "#343b44"),
    "grid": ("#eceef0", "#2a3038"),
    "accent": ("#0067a5", "#6cbcf0"),
    "tint": ("#eaf3f9", "#1b2b38"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f5924a"),
    "green": ("#00805c", "#2bc99b"),
    "purple": ("#a64d80", "#e79fc6"),
    "amber": ("#9a7200", "#f0c341"),
    "sky": ("#2a8fc9", "#a5d8f7"),
    "grey": ("#8a929b", "#8b949e"),
    "teal": ("#3a8f93", "#7fd0cf"),
    "olive": ("#7d7f12", "#c3c552"),
}

PATCHES = ("amber", "sky", "grey", "olive", "teal")  # hues that no group of arms has
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "pentagon", "hexagon")
GROUPS = {  # who an arm is -> colour, symbol
    "best": ("blue", "circle"),
    "search": ("blue", "circle"),
    "control": ("orange", "square"),
    "random-init": ("green", "triangle-up"),
    "frozen": ("purple", "diamond"),
}
# Cividis: even in lightness, and the same to colour-blind readers
SCALE = [
    [0.0, "#00204d"],
    [0.2, "#31446b"],
    [0.4, "#666970"],
    [0.6, "#958f78"],
    [0.8, "#cab969"],
    [1.0, "#ffea46"],
]
# classes 1, 2, ... in the pictures of segmentations, as trials draw them
CLASSES = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"

_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")


def colour(name: str) -> str:
    """A colour of COLOURS, as figures and style sheets spell it."""
    assert name in COLOURS, name
    return f"var(--{name})"


def css_variables(dark: bool) -> str:
    """COLOURS as declarations for a style sheet."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())


def heat() -> str:
    """SCALE as the stops of a style sheet's gradient."""
    return ", ".join(f"{colour} {place:.0%}" for place, colour in SCALE)


def text(value: object, longest: int = 80) -> str:
    """A user's words for a figure: Plotly reads tags and entities, so these are escaped.

    Control and direction-changing characters become a space; what is too long is cut.
    """
    return plain(value, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def plain(value: object, longest: int = 80) -> str:
    """A user's words on one line of bounded length, not escaped."""
    line = _HIDDEN.sub(" ", unicodedata.normalize("NFC", str(value))).strip()
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def figure(
    traces: list[Any],
    *,
    height: int,
    x: str | None,
    y: str | None,
    legend: bool = False,
    **layout: Any,
) -> go.Figure:
    """Traces with named axes; colours and fonts come from TEMPLATE when the page draws it."""
    drawn = go.Figure(traces)
    drawn.update_layout(
        template="none",
        height=height,
        showlegend=legend,
        margin={"l": 12, "r": 16, "t": 34 if legend else 14, "b": 12},
        xaxis_title_text=x,
        yaxis_title_text=y,
    )
    drawn.update_layout(**layout)
    return drawn


_AXIS = {
    "automargin": True,
    "showline": True,
    "linecolor": colour("rule"),
    "gridcolor": colour("grid"),
    "zeroline": False,
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": colour("rule"),
    "tickfont": {"size": 12, "color": colour("muted")},
    "title": {"font": {"size": 13, "color": colour("ink")}, "standoff": 10},
}
TEMPLATE: dict[str, Any] = {
    "layout": {
        "font": {"family": FONT, "size": 12.5, "color": colour("ink")},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": colour("card"),
            "bordercolor": colour("rule"),
            "font": {"family": FONT, "size": 12.5, "color": colour("ink")},
            "align": "left",
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.0,
            "yanchor": "bottom",
            "font": {"size": 12.5, "color": colour("ink")},
            "itemsizing": "constant",
        },
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)",
            "color": colour("muted"),
            "activecolor": colour("accent"),
        },
        "annotationdefaults": {"showarrow": False, "font": {"size": 12.5, "color": colour("ink")}},
        "coloraxis": {"colorbar": {"outlinewidth": 0}},
    }
}
