"""The console as a web application: pages without data, and data as JSON.

Pages hold nothing of a study; their script asks for it and shows it as text, so that no name from
a disk is ever read as markup. The report is the exception: it is made by a template that escapes,
and is shown in a sandbox, without access to the console it comes from.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from analysis import theme
from analysis.page import as_json, policy, report_scripts, slices_style, with_common
from analysis.report import render
from analysis.tables import load
from cluster.errors import ClusterError
from study.console import views
from study.console.actions import ACTIONS, Drivers
from study.console.guard import LONGEST_BODY, NOTHING, Guard
from study.console.index import Index, NotFound, Snapshot, without_root
from study.console.outlook import Outlooks
from study.folder import Storage
from trainables.errors import StorageError, UserError

KEPT_REPORTS = 4  # each of some megabytes
KEPT_FIGURES = 32
PATIENCE = 10  # times as long as they took to draw, figures may be old
STATIC = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "login.js": "text/javascript; charset=utf-8",
    "plotly.js": "text/javascript; charset=utf-8",
}


@dataclass(frozen=True)
class Settings:
    """What a console is started with. It holds a digest of the token, never the token."""

    storage: Storage
    token_sha256: str
    host_names: tuple[str, ...]
    address: str | None = None  # of the cluster's dashboard
    allow_changes: bool = False
    takes_ray_token: bool = False


def build_app(settings: Settings) -> ASGIApp:
    """The application behind its guard."""
    console = _Console(settings)
    routes = [
        Route("/", console.page),
        Route("/study/{study}", console.page),
        Route("/study/{study}/trial/{trial}", console.page),
        Route("/report/{study}", console.report),
        Route("/static/{name}", console.static),
        Route("/api/login", console.login, methods=["POST"]),
        Route("/api/studies", console.studies),
        Route("/api/studies/{study}", console.study),
        Route("/api/studies/{study}/trials", console.trials),
        Route("/api/studies/{study}/trials/{trial}", console.trial),
        Route("/api/studies/{study}/trials/{trial}/{picture}.png", console.picture),
        Route("/api/studies/{study}/figures", console.figures),
        Route("/api/studies/{study}/log", console.log),
        Route("/api/studies/{study}/{action}", console.act, methods=["POST"]),
    ]
    handlers: Any = {
        NotFound: _told(404),
        UserError: _told(409),
        ClusterError: _told(409),
        StorageError: _told(503),
        HTTPException: _http_error,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    # around everything: as Starlette's own middleware it would not see the answers to errors
    console.guard = Guard(app, token_sha256=settings.token_sha256, host_names=settings.host_names)
    return console.guard


class _Console:
    """The routes and what they share."""

    guard: Guard

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.index = Index(settings.storage)
        self.drivers = Drivers(settings.address, self.index.storage)
        self.outlooks = Outlooks()
        self._figures = _Kept(KEPT_FIGURES)
        self._reports = _Kept(KEPT_REPORTS)
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        self._templates = {
            name: environment.from_string(_resource(f"{name}.html"))
            for name in ("console", "login")
        }
        style = environment.from_string(_resource("console.css")).render(
            light=Markup(theme.css_variables(dark=False)),
            dark=Markup(theme.css_variables(dark=True)),
            font=Markup(theme.FONT),
        )
        self._static = {
            "console.css": style + slices_style(),
            "console.js": with_common(_resource("console.js")),
            "login.js": _resource("login.js"),
            "plotly.js": get_plotlyjs(),
        }

    # -- pages --

    def page(self, request: Request) -> Response:
        if not request.state.is_known:
            page = self._templates["login"].render(
                ray=self.settings.takes_ray_token, nonce=(n := _nonce())
            )
            return _html(page, n, 401)
        nonce = _nonce()
        start = {
            "changes": self.settings.allow_changes,
            "cluster": self.settings.address,
            "storage": str(self.index.storage),
            "template": theme.TEMPLATE,
            "page": views.PAGE,
        }
        page = self._templates["console"].render(start=Markup(as_json(start)), nonce=nonce)
        return _html(page, nonce, 200)

    def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise NotFound("no such file")
        if not request.state.is_known:
            raise HTTPException(401, "the console's token is needed")
        response = Response(self._static[name], media_type=STATIC[name])
        response.headers["Cache-Control"] = "no-cache"
        return response

    def report(self, request: Request) -> Response:
        """The report of what the ledger holds now, made anew when that has changed."""
        if not request.state.is_known:
            return self.page(request)
        found = self.index.look(request.path_params["study"])
        key = (found.name, found.revision, found.is_read)
        try:
            page = self._reports.get(key, lambda: render(load(found.folder)).encode())
        except (StorageError, UserError) as error:
            told = without_root(str(error), found.folder)
            return PlainTextResponse(f"There is no report of {found.name}: {told}", 503)
        response = Response(page, media_type="text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = (
            f"{policy(report_scripts())}; frame-ancestors 'none'; "
            f"sandbox allow-scripts allow-downloads"
        )
        return response

    async def login(self, request: Request) -> Response:
        asked = await _body(request)
        if not self.guard.knows(str(asked.get("token", ""))[:4096]):
            return JSONResponse({"error": "this is not the console's token"}, 403)
        return self.guard.let_in(JSONResponse({"ok": True}))

    # -- data --

    def studies(self, request: Request) -> Response:
        names, strange = self.index.names()
        found = self.index.look_at(names)
        return _json({"studies": [self._summary(each) for each in found], "strange": strange})

    def study(self, request: Request) -> Response:
        found = self._found(request)
        return _json(views.study(found, self.outlooks.of(found), self.drivers.job(found.folder)))

    def trials(self, request: Request) -> Response:
        asked = request.query_params
        return _json(
            views.trials(
                self._found(request),
                offset=_integer(asked.get("offset"), 0),
                limit=_integer(asked.get("limit"), views.PAGE),
                order=asked.get("order", "number"),
                falling=asked.get("falling") == "1",
                outcome=asked.get("outcome", ""),
                words=asked.get("words", "")[:200],
            )
        )

    def trial(self, request: Request) -> Response:
        return _json(views.trial(self._found(request), request.path_params["trial"]))

    def picture(self, request: Request) -> Response:
        trial, name = request.path_params["trial"], request.path_params["picture"]
        return Response(views.picture(self._found(request), trial, name), media_type="image/png")

    def figures(self, request: Request) -> Response:
        found = self._found(request)
        drawn = self._figures.get(
            (found.name, found.revision),
            lambda: as_json({"revision": found.revision, "figures": views.figures(found)}).encode(),
            patience=PATIENCE,
        )
        return Response(drawn, media_type="application/json")

    def log(self, request: Request) -> Response:
        folder = self.index.folder(request.path_params["study"])
        source, lines = self.drivers.log(folder)
        return _json({"source": source, "lines": lines})

    # -- changes --

    async def act(self, request: Request) -> Response:
        action = ACTIONS.get(request.path_params["action"])
        if action is None:
            raise NotFound("no such action")
        if not self.settings.allow_changes:
            raise HTTPException(403, "this console only shows; start it with --allow-changes")
        folder = self.index.folder(request.path_params["study"])
        asked = await _body(request)
        return _json({"said": await run_in_threadpool(action, self.drivers, folder, asked)})

    def _found(self, request: Request) -> Snapshot:
        return self.index.look(request.path_params["study"])

    def _summary(self, found: Snapshot) -> dict[str, Any]:
        return views.summary(found, self.outlooks.of(found), self.drivers.job(found.folder))


class _Made(NamedTuple):
    key: tuple[Any, ...]
    content: bytes
    good_until: float


class _Kept:
    """A few results by key; one that is being made is waited for, not made twice."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[str, _Made] = OrderedDict()
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], make: Callable[[], bytes], patience: float = 0) -> bytes:
        """`key` begins with the study's name; of each study the newest is kept.

        An older one will do for `patience` times as long as it took to make.
        """
        name = key[0]
        with self._lock:
            turn = self._locks.setdefault(name, threading.Lock())
        with turn:
            before = self._made.get(name)
            if before is not None and (before.key == key or time.monotonic() < before.good_until):
                return before.content
            began = time.monotonic()
            content = make()
            ended = time.monotonic()
            with self._lock:
                self._made[name] = _Made(key, content, ended + patience * (ended - began))
                self._made.move_to_end(name)
                if len(self._made) > self._most:
                    self._made.popitem(last=False)
            return content


def _told(status: int) -> Callable[[Request, Exception], Response]:
    def tell(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status)

    return tell


def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _body(request: Request) -> dict[str, Any]:
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > LONGEST_BODY:
            raise HTTPException(413, f"at most {LONGEST_BODY} bytes")
    try:
        asked = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "this is no JSON") from error
    if not isinstance(asked, dict):
        raise HTTPException(400, "an object is expected")
    return asked


def _html(page: str, nonce: str, status: int) -> Response:
    """Only scripts with the page's nonce run; Plotly sets styles from script, so these are open."""
    response = Response(page, status, media_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = (
        f"{NOTHING}; script-src 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
        f"img-src 'self' data: blob:; connect-src 'self'"
    )
    return response


def _json(content: Any) -> Response:
    return Response(as_json(content), media_type="application/json")


def _integer(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 9 else otherwise


def _nonce() -> str:
    return secrets.token_urlsafe(16)


def _resource(name: str) -> str:
    return resources.files("study.console").joinpath(name).read_text(encoding="utf-8")
