"""Who may speak to the console, and from where. Every request passes `Guard` before anything else.

A page of another origin reaches a local server through the user's browser in two ways: by a form or
script that posts blindly, and by a name of its own that it lets point to 127.0.0.1. Against the
first stand a header that no form can send, JSON as the only content, the Origin, and a cookie that
the browser keeps to this site; against the second the list of names under which the console is
known. There is no CORS, so no other page reads an answer. Nobody reads anything without the token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainables.errors import UserError

COOKIE = "maskstudy-console"
OWN_HEADER = "x-maskstudy"  # a form cannot send it, and a foreign script must ask first
LONGEST_BODY = 64 * 1024
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN = ("/api/login", "/static/console.css", "/static/login.js")  # without a token

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Guard:
    """Refuse with a 4xx, or pass on with `scope["state"]["is_known"]` set."""

    def __init__(self, app: ASGIApp, *, token_sha256: str, host_names: Iterable[str]) -> None:
        self._app = app
        self._token_sha256 = token_sha256
        self._host_names = {name.lower() for name in host_names}
        self._session = secrets.token_urlsafe(32)  # ends with this process

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added.setdefault(name, value)
                added.setdefault("Content-Security-Policy", NOTHING)
            await send(message)

        path = scope["path"]
        refusal = self._refusal(scope["method"], headers)
        is_known = self._is_known(headers)
        if refusal is None and not is_known and path.startswith("/api/") and path not in OPEN:
            refusal = _refuse(401, "the console's token is needed; open / and give it")
        if refusal is not None:
            return await refusal(scope, receive, send_safely)
        scope.setdefault("state", {})["is_known"] = is_known or path in OPEN
        await self._app(scope, receive, send_safely)

    def knows(self, token: str) -> bool:
        digest = hashlib.sha256(token.encode()).hexdigest()
        return hmac.compare_digest(digest, self._token_sha256)

    def let_in(self, response: Response) -> Response:
        """Set the cookie: out of reach for scripts, and sent from the console's own pages only."""
        response.set_cookie(COOKIE, self._session, path="/", httponly=True, samesite="strict")
        return response

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if host_name(host) not in self._host_names:
            return _refuse(
                400,
                "the console is not known under this name; start it with --allow-host for it, "
                "if it is yours",
            )
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return _refuse(405, "only GET and POST are understood")
        if headers.get(OWN_HEADER) != "1":
            return _refuse(403, f"a change needs the header {OWN_HEADER}: 1")
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refuse(415, "a change is sent as application/json")
        origin = headers.get("origin")
        has_cookie = "cookie" in headers
        if (origin is None and has_cookie) or (origin is not None and not _is_own(origin, host)):
            return _refuse(403, "a change comes from the console's own pages")
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return _refuse(403, "a change comes from the console's own pages")
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > LONGEST_BODY:
            return _refuse(413, f"a change has at most {LONGEST_BODY} bytes, and says how many")
        return None

    def _is_known(self, headers: Headers) -> bool:
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        if hmac.compare_digest(cookie.encode(), self._session.encode()):
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self.knows(token.strip())


def host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises where it is no number
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_exposed(host: str, environ: Mapping[str, str]) -> None:
    """Raise UserError for an address that others can reach, unless Ray's token mode is on."""
    if not is_loopback(host) and not is_token_mode(environ):
        raise UserError(
            f"--host: given {host!r}, which other machines can reach; expected 127.0.0.1 unless "
            f"the cluster asks for a token: set RAY_AUTH_MODE=token for it and for this command, "
            f"or reach the console through ssh -L 8000:127.0.0.1:8000"
        )


def is_token_mode(environ: Mapping[str, str]) -> bool:
    return environ.get("RAY_AUTH_MODE", "").strip().lower() == "token"


def ray_token(environ: Mapping[str, str]) -> str | None:
    """Ray's own token where its token mode is on, looked for as Ray does; None where it is off."""
    if not is_token_mode(environ):
        return None
    if token := environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    given = environ.get("RAY_AUTH_TOKEN_PATH")
    home = environ.get("HOME") or os.path.expanduser("~")
    path = Path(given) if given else Path(home) / ".ray" / "auth_token"
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise UserError(
            f"{path}: Ray's token cannot be read ({error.strerror}), but RAY_AUTH_MODE is token; "
            f"give RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or make one: "
            f"ray get-auth-token --generate"
        ) from error
    if not token:
        raise UserError(f"{path}: holds no token; make one: ray get-auth-token --generate")
    return token


def _is_own(origin: str, host: str) -> bool:
    parts = urlsplit(origin)
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _refuse(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)
