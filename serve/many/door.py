"""The application in front of all replicas: the routes of one server, each at the replica that has what it is about."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import FastAPI, Request, Response, WebSocket

from serve.many import jobs as job_routes
from serve.many.figures import merged
from serve.many.fleet import ANSWER_WITHIN, PERIOD, Fleet, Hold, Replica
from serve.many.jobs import Jobs
from serve.many.ledger import Ledger
from serve.many.live import Relay
from serve.many.relay import ask, forward, json_of, lost, passed_on, whole
from serve.options import Network
from serve.web.app import add_errors, add_guard

log = logging.getLogger("serve")
_ALL = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_WEBRTC = "/api/v1/webrtc/offer"


@dataclass
class Door:
    """What the routes share."""

    network: Network
    token: str
    folder: Path  # of jobs
    jobs_at_once: int
    hold: Hold | None = None

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.hold)
        self.jobs = Jobs(self.fleet, Ledger(self.folder), self.jobs_at_once)
        self.app = _make_app(self)
        self._looking: asyncio.Task[None] | None = None

    async def register(self, name: str, url: str, secret: str) -> None:
        """A replica says where it serves."""
        await self.fleet.register(name, url, secret)
        if self._looking is None:
            # In a context of its own: what it asks for is no part of the request that this is.
            self._looking = asyncio.create_task(self._look(), context=contextvars.Context())

    async def _look(self) -> None:
        """Watch replicas and jobs."""
        while True:
            try:
                await self.fleet.look()
                await self.jobs.look()
            except Exception:
                log.exception("a look at the replicas failed")
            await asyncio.sleep(PERIOD)

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        await self.fleet.close()


def _make_app(door: Door) -> FastAPI:
    """All routes, behind the guard of a server."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await door.close()

    app = FastAPI(title="greedy-stream", lifespan=lifespan)
    add_guard(app, door.network, door.token)
    add_errors(app)
    _sums(app, door.fleet)
    app.include_router(job_routes.router(door.jobs))
    _sessions(app, door.fleet)
    return app


def _sums(app: FastAPI, fleet: Fleet) -> None:
    """What is told of all replicas together."""

    @app.get("/health")
    async def health() -> dict[str, Any]:
        replicas = list(fleet.replicas.values())
        numbers = {name: sum(getattr(one, name) for one in replicas) for name in ("sessions", "capacity", "waiting")}
        return {"status": "ok" if replicas else "starting", **numbers, "replicas": len(replicas)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        answer = await json_of(fleet, await fleet.freest(), "/v1/models")
        capacity = sum(one.capacity for one in fleet.replicas.values())
        # Pictures of a viewer are not passed on.
        return answer | {"data": [model | {"capacity": capacity, "source": None} for model in answer["data"]]}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        async def page(replica: Replica) -> str:
            headers = {"authorization": f"Bearer {replica.secret}"}
            try:
                async with (
                    asyncio.timeout(ANSWER_WITHIN),
                    fleet.http.get(f"{replica.url}/metrics", headers=headers) as answer,
                ):
                    return await answer.text() if answer.status == 200 else ""
            except (aiohttp.ClientError, TimeoutError):
                return ""

        replicas = list(fleet.replicas.values())
        pages = await asyncio.gather(*map(page, replicas))
        text = merged({replica.id: one for replica, one in zip(replicas, pages, strict=True)})
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _sessions(app: FastAPI, fleet: Fleet) -> None:
    """Live sessions, and everything else: any replica answers that."""

    @app.websocket("/v1/realtime/video")
    async def live(socket: WebSocket) -> None:
        await Relay(fleet, socket).run()

    @app.api_route("/v1/sessions/{name}", methods=_ALL)
    @app.api_route("/v1/sessions/{name}/{rest:path}", methods=_ALL)
    @app.api_route(f"{_WEBRTC}/{{name}}", methods=_ALL)
    async def session(name: str, request: Request) -> Response:
        return await forward(fleet, fleet.home(name), request, lambda replica, _: fleet.remember(name, replica))

    @app.get("/v1/mjpeg")
    async def mjpeg(request: Request) -> Response:
        return await _start(fleet, request)

    @app.post(_WEBRTC)
    async def offer(request: Request) -> Response:
        with contextlib.suppress(ValueError):
            wanted = json.loads(await request.body())
            if isinstance(wanted, dict) and isinstance(wanted.get("session"), str):
                return await _opened(fleet, fleet.home(wanted["session"]), request)
        return await _start(fleet, request)

    @app.api_route("/{path:path}", methods=_ALL, include_in_schema=False)
    async def other(request: Request) -> Response:
        return await forward(fleet, [await fleet.freest()], request)


async def _start(fleet: Fleet, request: Request) -> Response:
    """A request that starts a session, at the replica with most free places."""
    replica = await fleet.freest()
    with fleet.starting(replica) as start:
        answer = await _opened(fleet, [replica], request)
        start.opened = asyncio.get_running_loop().time()
        return answer


async def _opened(fleet: Fleet, replicas: list[Replica], request: Request) -> Response:
    """Pass on a request that opens a session or joins one, and note which replica has the id that it answers."""
    body = await request.body()
    for replica in replicas:
        try:
            answer = await ask(fleet, replica, request, body)
        except aiohttp.ClientError:
            await fleet.check(replica)
            continue
        if answer.status == 404 and replica is not replicas[-1]:
            answer.close()
            continue
        if answer.content_type != "application/json":
            return passed_on(answer)
        async with answer:
            data = await answer.read()
        with contextlib.suppress(ValueError, AttributeError):
            about = json.loads(data)
            for name in ("sessionId", "session"):  # of the connection, and of the video
                if about.get(name):
                    fleet.remember(str(about[name]), replica)
        return whole(answer, data)
    raise lost()


opened: Door  # of this process
