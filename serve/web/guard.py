"""Who may ask, and how much: token, origin and size of every request, before any handler sees it."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from serve.web.wire import close_reason, error_body

OPEN = ("/", "/health", "/favicon.ico")  # without a token: the page asks for it
POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


class Guard:
    """ASGI middleware. A refused socket is accepted first, so that a browser's script learns why.

    `local`: the server listens on this machine alone, so it has no other name than localhost and those of `origins`.
    """

    def __init__(self, app: ASGIApp, token: str, origins: Iterable[str], most_bytes: int, local: bool = False) -> None:
        self.app, self.token, self.most, self.local = app, token, most_bytes, local
        self.origins = {origin.rstrip("/").lower() for origin in origins}
        self.names = {"localhost", *(_site(origin) for origin in self.origins)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope["path"], scope["query_string"].decode("latin-1"), headers)
        if refused is None and scope["type"] == "http":
            refused = self._too_large(headers)
        if refused is not None:
            status, kind, message = refused
            if scope["type"] == "websocket":
                socket = WebSocket(scope, receive, send)
                await socket.accept()
                await socket.send_json({"type": "error", "code": kind, "message": message})
                await socket.close(POLICY_VIOLATION, close_reason(message))
            else:
                await JSONResponse(error_body(kind, message), status)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive) if scope["type"] == "http" else receive, send)

    def _refused(self, path: str, query: str, headers: dict[str, str]) -> tuple[int, str, str] | None:
        host, origin = headers.get("host", "").lower(), _origin(headers)
        if origin and _site(origin) != host and origin not in self.origins and not self._lets_embed(headers, path):
            got = f"origin: got a request from {origin[:100]!a}"
            return 403, "forbidden", f"{got}, expected this server's own page (--allow-origin lets others in)"
        if self.local and not self.token and not self._own(host):
            # A site whose name was changed to this machine's address (DNS rebinding) is of one origin with us.
            got = f"host: got {host[:100]!a}"
            return 403, "forbidden", f"{got}, expected localhost or an address (--allow-origin lets other names in)"
        if not self.token or path in OPEN or path.startswith("/page/"):
            return None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else (parse_qs(query).get("token") or [""])[0]
        if hmac.compare_digest(given.encode(), self.token.encode()):
            return None
        got = "a wrong token" if given else "no token"
        return 401, "unauthorized", f"token: got {got}, expected the server's (Authorization: Bearer TOKEN, or ?token=)"

    def _lets_embed(self, headers: dict[str, str], path: str) -> bool:
        """Whether an <img> or a link elsewhere, which sends no origin, may ask: with a token, or for the page."""
        return "origin" not in headers and (bool(self.token) or path in OPEN)

    def _own(self, host: str) -> bool:
        """Whether a Host is an address, or a name that this server has."""
        if not host or host in self.names:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return name in self.names or name.endswith(".localhost")

    def _too_large(self, headers: dict[str, str]) -> tuple[int, str, str] | None:
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) <= self.most:
            return None
        return 413, "invalid_request_error", f"body: got {length} bytes, expected at most {self.most}"

    def _counted(self, receive: Receive) -> Receive:
        """A body without a length is refused where it grows too large; the application answers."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.most:
                # FastAPI, which reads the body, lets no other exception through.
                raise HTTPException(413, f"body: got more than {self.most} bytes, expected at most that")
            return message

        return counted


def _origin(headers: dict[str, str]) -> str:
    """Where a request comes from; empty for this server's own pages, and for what is no browser's."""
    if "origin" in headers:
        return headers["origin"].lower()
    if headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return ""
    referer = headers.get("referer", "").lower()  # an <img> or a link sends no origin
    return "/".join(referer.split("/")[:3]) or "another site"


def _site(origin: str) -> str:
    """Host and port of an origin; empty if it has none."""
    with suppress(ValueError):
        return urlsplit(origin).netloc
    return ""
