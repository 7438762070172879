"""What self-contained pages are made of: scripts, the policy that names them, figures as JSON."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis import theme
from trainables import durable
from trainables.errors import UserError
from trainables.settings import canonical_json


def write_page(path: Path, page: str) -> Path:
    """No half page is ever seen; not synced, as it can be made again. Returns where it lies.

    A link to a page stays one. UserError: something that is no page is there.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise UserError(f"{path}: is {kind}; expected the name of a file, such as {path.name}.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path, synced=False) as aside:
        aside.write_bytes(page.encode("utf-8"))
    return path


def report_scripts() -> tuple[str, str]:
    """The two scripts of every report."""
    return get_plotlyjs(), with_common(resource("report.js"))


def with_common(script: str) -> str:
    """A page's script behind what the pages share."""
    return resource("common.js") + script


def slices_style() -> str:
    """How sheets of slices and their sliders look."""
    return resource("slices.css")


def policy(scripts: Iterable[str]) -> str:
    """Nothing is loaded, and only these inline scripts run.

    Plotly sets styles from script, so styles stay open; with nothing to load they cannot leak.
    """
    known = " ".join(map(fingerprint, scripts))
    return (
        f"default-src 'none'; script-src {known}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def still_page(name: str, styled: Mapping[str, Any], **values: Any) -> str:
    """A page without script that loads nothing, from NAME.html and NAME.css.

    Its policy allows the one style sheet that it names by hash. Values are escaped.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(resource)
    )
    shared = {
        "light": Markup(theme.css_variables(dark=False)),
        "dark": Markup(theme.css_variables(dark=True)),
        "font": Markup(theme.FONT),
        "classes": list(enumerate(theme.CLASSES, start=1)),
    }
    style = "".join(
        environment.get_template(file).render({**shared, **styled})
        for file in ("still.css", f"{name}.css")
    )
    allowed = (
        f"default-src 'none'; style-src {fingerprint(style)}; img-src data:; base-uri 'none'; "
        f"form-action 'none'"
    )
    return environment.get_template(f"{name}.html").render(
        policy=allowed, style=Markup(style), **values
    )


def fingerprint(text: str) -> str:
    """How a policy names an inline script or style."""
    return f"'sha256-{base64_of(hashlib.sha256(text.encode()).digest())}'"


def plain_figure(figure: go.Figure) -> dict[str, Any]:
    """Data and layout for Plotly, without a template: the page has one for all."""
    content = figure.to_plotly_json()
    content["layout"].pop("template", None)
    return {"data": content["data"], "layout": content["layout"]}


def as_json(content: Any) -> str:
    """JSON for a script element: six digits, no NaN, and nothing that could end the element."""
    written = canonical_json(_finite(content))
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def resource(name: str) -> str:
    """A file beside this one, as text."""
    return resources.files("analysis").joinpath(name).read_text(encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
