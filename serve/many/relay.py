"""Passes an HTTP request on to a replica, and its answer back while it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any
from urllib.parse import quote

import aiohttp
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import HTTPConnection
from yarl import URL

from serve.many.fleet import Fleet, Replica
from serve.web.server import Refused

# RFC 9110, 7.6.1, and what the next connection decides for itself.
_OWN = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "content-length"}  # fmt: skip
# The door has checked the origin, and tells browsers what it allows.
_REPLACED = {"authorization", "origin", "x-forwarded-for", "x-forwarded-proto", "forwarded"}
_DEFAULTS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")  # of the client library


def headers_for(replica: Replica, request: HTTPConnection) -> dict[str, str]:
    """A request's headers with the replica's token, and the address of who asked: replicas limit each address."""
    kept = {name: value for name, value in request.headers.items() if name not in _OWN | _REPLACED}
    kept = {name: value for name, value in kept.items() if not name.startswith("sec-websocket-")}
    kept["authorization"] = f"Bearer {replica.secret}"
    kept["x-forwarded-for"] = request.client.host if request.client else ""
    return kept


def url_for(replica: Replica, request: HTTPConnection) -> URL:
    """The same path and query at the replica."""
    query = request.scope["query_string"].decode("latin-1")
    return URL(f"{replica.url}{quote(request.scope['path'])}{'?' if query else ''}{query}", encoded=True)


async def ask(fleet: Fleet, replica: Replica, request: Request, body: bytes) -> aiohttp.ClientResponse:
    """Send a request to a replica; returns when the answer's headers are there. aiohttp.ClientError."""
    return await fleet.http.request(
        request.method, url_for(replica, request), headers=headers_for(replica, request), data=body or None,
        allow_redirects=False, skip_auto_headers=_DEFAULTS,
    )  # fmt: skip


def passed_on(answer: aiohttp.ClientResponse) -> Response:
    """An answer as it comes. A client that leaves ends the connection to the replica."""

    async def parts() -> AsyncIterator[bytes]:
        try:
            async for part in answer.content.iter_any():
                yield part
        finally:
            answer.close()

    made = StreamingResponse(parts(), answer.status)
    made.raw_headers = [(n.lower(), v) for n, v in answer.raw_headers if n.lower().decode("latin-1") not in _OWN]
    length = answer.headers.get("content-length")
    if length is not None and "transfer-encoding" not in answer.headers:
        made.raw_headers.append((b"content-length", length.encode()))
    return made


def whole(answer: aiohttp.ClientResponse, data: bytes) -> Response:
    """An answer that was read."""
    made = Response(data, answer.status)
    made.raw_headers += [(n.lower(), v) for n, v in answer.raw_headers if n.lower().decode("latin-1") not in _OWN]
    return made


async def forward(
    fleet: Fleet, replicas: Iterable[Replica], request: Request,
    seen: Callable[[Replica, aiohttp.ClientResponse], None] = lambda replica, answer: None,
) -> Response:  # fmt: skip
    """Pass a request on to the first replica that does not answer 404; `seen` learns whose answer it was."""
    body, answer = await request.body(), None
    for replica in replicas:
        try:
            following = await ask(fleet, replica, request, body)
        except aiohttp.ClientError as error:
            await fleet.check(replica)
            if answer is None and request.method not in ("GET", "HEAD"):
                raise lost(error) from None
            continue
        if answer is not None:
            answer.close()
        answer = following
        if answer.status != 404:
            seen(replica, answer)
            break
    if answer is None:
        raise lost()
    return passed_on(answer)


def lost(error: Exception | None = None) -> Refused:
    """The error of a request whose replica went away."""
    return Refused(503, "server_error", "replica: got no answer, because it was lost; try again", {"Retry-After": "2"})


async def json_of(fleet: Fleet, replica: Replica, path: str) -> dict[str, Any]:
    """JSON of a replica's own. aiohttp.ClientError, ValueError."""
    async with fleet.http.get(f"{replica.url}{path}", headers={"authorization": f"Bearer {replica.secret}"}) as answer:
        answer.raise_for_status()
        found = await answer.json()
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}, expected an object")
    return found
