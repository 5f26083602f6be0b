"""The application: every route of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.core.house import Busy
from serve.options import Network
from serve.web import jobs, live, sessions
from serve.web.guard import Guard
from serve.web.server import Bucket, Refused, Server
from serve.web.webrtc import routes as webrtc
from serve.web.wire import Invalid, error_body

PAGE = Path(__file__).parent.parent / "page"
RETRY = 5  # seconds after which a client that was refused may ask again


def make_app(server: Server, local: bool = False) -> FastAPI:
    """All routes of a server, behind its guard. Its server closes with the application.

    `local`: only this machine reaches the address on which it is served (`Guard`).
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    app = FastAPI(title="greedy-stream", lifespan=lifespan)
    network, starts = server.network, Bucket(server.network.rate)
    add_guard(app, network, network.secret, local)
    add_errors(app, server.metrics.error)
    _basics(app, server)
    app.include_router(live.router(server, starts))
    app.include_router(sessions.router(server, starts))
    app.include_router(jobs.router(server, starts))
    app.include_router(webrtc.router(server, starts))
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def add_guard(app: FastAPI, network: Network, token: str, local: bool = False) -> None:
    """Who may use an application, and how much. Sites that are let in may ask as a browser does.

    local: it listens on this machine alone.
    """
    app.add_middleware(
        Guard, token=token, origins=network.allow_origin, most_bytes=network.upload_mb << 20, local=local
    )  # fmt: skip
    if network.allow_origin:  # a browser asks before it lets another site's page send JSON or a token
        origins = [origin.rstrip("/").lower() for origin in network.allow_origin]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])


def _basics(app: FastAPI, server: Server) -> None:
    house = server.house
    server.metrics.gauge("greedy_sessions", "live sessions that run", lambda: house.running)
    server.metrics.gauge("greedy_sessions_waiting", "sessions that wait for a place", lambda: house.waiting)
    server.metrics.gauge("greedy_capacity", "live sessions that may run at once", lambda: house.room.sessions)
    server.metrics.gauge("greedy_viewers", "viewers of all sessions", lambda: sum(s.watchers for s in house.live()))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/health")
    async def health() -> dict[str, object]:
        room = house.room.sessions
        return {"status": "ok", "sessions": house.running, "capacity": room, "waiting": house.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, object]:
        if name != server.name:
            raise Refused(404, "not_found", f"model: got {name[:100]!r}, expected {server.name!r}")
        return server.model()

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        text = await asyncio.to_thread(server.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def add_errors(app: FastAPI, count: Callable[[str], None] = lambda kind: None) -> None:
    """Every error in OpenAI's shape; `count` gets its kind."""

    def answer(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        count(kind)
        return JSONResponse(error_body(kind, message), status, headers)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return answer(error.status, error.kind, error.message, error.headers)

    @app.exception_handler(Invalid)
    async def invalid(request: Request, error: Invalid) -> JSONResponse:
        return answer(400, "invalid_request_error", str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return answer(429, "busy", str(error), {"Retry-After": str(RETRY)})

    @app.exception_handler(ClientDisconnect)
    async def cut(request: Request, error: ClientDisconnect) -> JSONResponse:
        return answer(400, "invalid_request_error", "body: got its end early, expected a whole request")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "server_error", f"{request.method} {request.url.path}: the server failed; its log says why")

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        got = repr(first.get("input"))[:60]
        return answer(400, "invalid_request_error", f"{where}: got {got}, expected: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = "not_found" if error.status_code == 404 else "invalid_request_error"
        where = "" if error.status_code == 413 else f"{request.method} {request.url.path}: "
        return answer(error.status_code, kind, f"{where}{error.detail}", error.headers)
