"""Jobs through the door: each runs on one replica, and again on another one where that is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import aiohttp
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from serve.many.fleet import SILENT, Fleet, Replica
from serve.many.ledger import Ledger, Record
from serve.many.relay import ask, lost, whole
from serve.web.jobs import POLL_MS
from serve.web.server import Refused

log = logging.getLogger("serve")
TRIES = 4  # the first one, and three more
ROUTE = "/v1/videos"


class Jobs:
    """The jobs of a door. `look` is called again and again."""

    def __init__(self, fleet: Fleet, ledger: Ledger, at_once: int = 1) -> None:
        self._fleet, self._ledger, self._at_once = fleet, ledger, at_once
        self._lock, self._began = asyncio.Lock(), time.monotonic()
        self._count()

    @property
    def records(self) -> dict[str, Record]:
        return self._ledger.records

    def record(self, name: str) -> Record:
        """A job by the name that clients know. Refused if there is none."""
        record = self.records.get(name)
        if record is None:
            raise Refused(404, "not_found", f"video: got {name[:64]!r}, expected the id of a job")
        return record

    async def submit(self, request: Request) -> Response:
        """Give a new job to the replica with the fewest. What the replica refuses is refused."""
        body, gone = await request.body(), set[str]()
        kind, key = request.headers.get("content-type", ""), request.headers.get("idempotency-key", "")
        before = next((one for one in self.records.values() if key and one.key == key), None)
        for _ in range(TRIES):
            replica = (
                self._fleet.replicas.get(before.replica) if before is not None else await self._fleet.for_job(gone)
            )
            if replica is None:  # lost since; only equal bodies are surely the same request
                assert before is not None
                if before.body == body:
                    return JSONResponse(before.about)
                raise Refused(409, "invalid_request_error", f"Idempotency-Key: got {key[:60]!r} with another request "
                              "before, expected a key of its own")  # fmt: skip
            try:
                async with await ask(self._fleet, replica, request, body) as answer:
                    data = await answer.read()
            except aiohttp.ClientError:
                await self._fleet.check(replica)
                gone.add(replica.id)
                continue
            if answer.status < 300:
                about = json.loads(data)
                if before is not None and about["id"] == before.inner:
                    return JSONResponse({**about, "id": before.id})
                record = Record(about["id"], body, kind, about, key, replica.id, about["id"])
                self._ledger.save(record)
                self._count()
            return whole(answer, data)
        raise lost()

    async def sync(self, request: Request) -> Response:
        """A job whose answer is its video. It is asked for again where its replica is lost meanwhile."""
        body, gone = await request.body(), set[str]()
        for _ in range(TRIES):
            replica, name = await self._fleet.for_job(gone), f"sync-{time.monotonic_ns()}"
            replica.jobs.add(name)
            try:
                async with await ask(self._fleet, replica, request, body) as answer:
                    data = await answer.read()
                return whole(answer, data)
            except aiohttp.ClientError:
                await self._fleet.check(replica)
                gone.add(replica.id)
            finally:
                replica.jobs.discard(name)
        raise lost()

    async def look(self) -> None:
        """Ask for the state of every job, give away those whose replica was lost, and those that wait elsewhere."""
        async with self._lock:
            self._ledger.expire(time.time())
            for record in [one for one in self.records.values() if one.unfinished]:
                try:
                    await self.refresh(record)
                    if record.unfinished and not record.replica:
                        await self._give_away(record)
                except (Refused, aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
                    log.warning("job %s: %s", record.id, error)
            await self._spread()

    async def refresh(self, record: Record) -> None:
        """Take over what a job's replica says. A job that is done brings its video here."""
        inner, replica = record.inner, self._fleet.replicas.get(record.replica)
        if not record.unfinished or not inner:
            return
        if replica is None:
            if record.replica in self._fleet.gone or time.monotonic() - self._began > SILENT:
                self._mark_lost(record)
            return  # a door that was restarted waits for the replicas to tell where they are
        status, data, _ = await self._call(replica, "GET", f"{ROUTE}/{inner}")
        about: dict[str, Any] = json.loads(data) if status < 300 else {}
        video, media_type = b"", ""
        if about.get("status") == "completed":
            status, video, media_type = await self._call(replica, "GET", f"{ROUTE}/{inner}/content")
        if record.inner != inner or record.id not in self.records or not record.unfinished:
            return  # it was given to another replica meanwhile, or deleted, or another look was faster
        if status == 404:  # a server that began anew
            self._mark_lost(record)
        elif status < 300:
            if media_type:
                self._ledger.keep_video(record, video, media_type)
            record.update(about)
            self._ledger.save(record)
        self._count()

    def file(self, record: Record) -> Path:
        """The video of a finished job."""
        return self._ledger.video(record)

    async def try_refresh(self, record: Record) -> None:
        """As `refresh`; a replica that does not answer leaves the job as it was known."""
        try:
            await self.refresh(record)
        except (aiohttp.ClientError, TimeoutError):
            if (replica := self._fleet.replicas.get(record.replica)) is not None:
                await self._fleet.check(replica)

    async def delete(self, record: Record) -> None:
        """End a job, and forget it."""
        self._ledger.remove(record)
        self._count()
        replica = self._fleet.replicas.get(record.replica)
        if replica is not None:
            await self._drop(replica, record.inner)

    # --- when a replica is lost, or has nothing to do

    def _mark_lost(self, record: Record) -> None:
        if not record.replica:
            return
        log.warning("job %s lost its replica %s", record.id, record.replica)
        record.replica, record.inner, record.lost = "", "", record.lost + 1
        record.about = {**record.about, "status": "queued", "progress": 0}
        if record.lost >= TRIES:
            message = f"the servers that made this video were lost, {record.lost} times"
            record.about |= {"status": "failed", "error": {"code": "replica_lost", "message": message}}
        self._ledger.save(record)
        self._count()

    async def _give_away(self, record: Record, to: Replica | None = None) -> None:
        """Submit a job again. A replica that is full leaves it for the next look."""
        replica = to
        if replica is None:
            if not self._fleet.replicas:
                return
            replica = await self._fleet.for_job()
        headers = {"content-type": record.content_type} if record.content_type else {}
        status, data, _ = await self._call(replica, "POST", ROUTE, record.again(), headers)
        if status in (429, 503):
            return
        if status >= 300:
            record.about |= {"status": "failed", "error": json.loads(data).get("error")}
        elif record.id not in self.records:
            await self._drop(replica, json.loads(data)["id"])
            return
        else:
            about = json.loads(data)
            record.replica, record.inner = replica.id, about["id"]
            record.update(about)
        self._ledger.save(record)
        self._count()

    async def _spread(self) -> None:
        """A replica without a job gets one that waits at another."""
        for replica in list(self._fleet.replicas.values()):
            if replica.jobs or replica.draining:
                continue
            for record in [one for one in self.records.values() if one.about.get("status") == "queued"]:
                old = self._fleet.replicas.get(record.replica)
                if old is None or len(old.jobs) <= self._at_once:
                    continue
                inner = record.inner
                await self._give_away(record, replica)
                if record.replica == replica.id:
                    await self._drop(old, inner)
                break

    def _count(self) -> None:
        """Tell the fleet which jobs are where."""
        for replica in self._fleet.replicas.values():
            replica.jobs = {name for name in replica.jobs if name.startswith("sync-")}
        for record in self.records.values():
            if record.unfinished and record.replica in self._fleet.replicas:
                self._fleet.replicas[record.replica].jobs.add(record.id)

    async def _drop(self, replica: Replica, inner: str) -> None:
        try:
            await self._call(replica, "DELETE", f"{ROUTE}/{inner}")
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("job %s stays at replica %s: %s", inner, replica.id, error)

    async def _call(
        self, replica: Replica, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, str]:
        """(status, body, media type) of a request of the door's own."""
        own = {**(headers or {}), "authorization": f"Bearer {replica.secret}"}
        async with asyncio.timeout(60.0):
            async with self._fleet.http.request(method, f"{replica.url}{path}", data=body, headers=own) as answer:
                return answer.status, await answer.read(), answer.content_type


def router(jobs: Jobs) -> APIRouter:
    """The routes of jobs."""
    routes = APIRouter()

    @routes.post(ROUTE)
    async def submit(request: Request) -> Response:
        return await jobs.submit(request)

    @routes.post(f"{ROUTE}/sync")
    async def sync(request: Request) -> Response:
        return await jobs.sync(request)

    @routes.get(ROUTE)
    async def listed(
        limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:  # fmt: skip
        found = sorted(jobs.records.values(), key=lambda record: record.about.get("created_at") or 0)
        found = found if order == "asc" else found[::-1]
        if after is not None:
            place = next((number for number, record in enumerate(found, start=1) if record.id == after), None)
            if place is None:
                raise Refused(400, "invalid_request_error", f"after: got {after[:64]!r}, expected the id of a video")
            found = found[place:]
        data = [record.about for record in found[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, **ends, "has_more": len(found) > limit}

    @routes.get(f"{ROUTE}/{{name}}")
    async def about(name: str) -> JSONResponse:
        record = jobs.record(name)
        await jobs.try_refresh(record)
        return JSONResponse(record.about, headers={"openai-poll-after-ms": str(POLL_MS)})

    @routes.api_route(f"{ROUTE}/{{name}}/content", methods=["GET", "HEAD"])
    async def content(name: str, variant: str = "video") -> FileResponse:
        if variant != "video":
            raise Refused(400, "invalid_request_error", f"variant: got {variant[:60]!r}, expected 'video'")
        record = jobs.record(name)
        await jobs.try_refresh(record)
        if not record.media_type:
            got = f"video: got one that is {record.about.get('status')}"
            raise Refused(404, "not_found", f"{got}, expected completed")
        return FileResponse(jobs.file(record), media_type=record.media_type, filename=f"{record.id}.mp4")

    @routes.delete(f"{ROUTE}/{{name}}")
    async def delete(name: str) -> dict[str, Any]:
        record = jobs.record(name)
        await jobs.delete(record)
        return {"id": record.id, "object": "video.deleted", "deleted": True}

    return routes
