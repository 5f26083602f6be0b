"""/v1/videos: jobs in the shape of OpenAI's Videos API, so that its clients and gateways work."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.types import Receive, Scope, Send

from serve.core.job_store import ENDED, Job
from serve.core.jobs import Conflict
from serve.web.orders import fields_of, order_of
from serve.web.server import Bucket, Refused, Server

POLL_MS = 500  # for OpenAI's client, which otherwise asks once a second
LOOK = 0.1  # seconds between two looks at a job for which a client waits


def router(server: Server, starts: Bucket) -> APIRouter:
    """The routes."""
    routes, jobs = APIRouter(), server.jobs
    server.metrics.gauge("greedy_jobs", "jobs that run", lambda: jobs.running)
    server.metrics.gauge("greedy_jobs_waiting", "jobs that wait", lambda: jobs.queued)

    async def queued(request: Request, key: str = "", fleeting: bool = False) -> Job:
        """The job that a request asks for, in the queue."""
        if wait := starts.take(request.client.host if request.client else ""):
            raise Refused(429, "busy", "got too many starts from one address", {"Retry-After": str(int(wait) + 1)})
        fields = await fields_of(request, server.network.upload_mb << 20)
        job, start = await asyncio.to_thread(order_of, fields, server, key)
        try:
            return await asyncio.to_thread(jobs.submit, replace(job, fleeting=fleeting), start)
        except Conflict as error:
            raise Refused(409, "invalid_request_error", str(error)) from None
        except OSError as error:
            message = f"jobs: got {error.strerror}, expected room on the server's disk"
            raise Refused(507, "server_error", message) from None

    @routes.post("/v1/videos")
    async def create(request: Request) -> dict[str, Any]:
        return told(await queued(request, request.headers.get("idempotency-key", "")), server)

    @routes.post("/v1/videos/sync")
    async def make(request: Request) -> Response:
        job = await queued(request, fleeting=True)
        try:
            while (now := await asyncio.to_thread(jobs.get, job.id)) is not None and now.status not in ENDED:
                if await request.is_disconnected():
                    break
                await asyncio.sleep(LOOK)
            if now is None or now.status not in ENDED:
                raise Refused(410, "not_found", "video: got one that was deleted, expected it to be made")
            if now.status == "failed":
                raise Refused(500, "server_error", now.error)
        except BaseException:  # also where the server cancels it
            jobs.delete(job.id)
            raise
        return _Once(server, now)

    @routes.get("/v1/videos")
    def listed(
        limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:  # fmt: skip
        found = [job for job in jobs.all() if not job.fleeting]
        if order == "desc":
            found.reverse()
        if after is not None:
            place = next((n for n, job in enumerate(found) if job.id == after), None)
            if place is None:
                raise Refused(400, "invalid_request_error", f"after: got {after[:64]!r}, expected the id of a video")
            found = found[place + 1 :]
        page = found[:limit]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return {
            "object": "list", "data": [told(job, server) for job in page], "first_id": first, "last_id": last,
            "has_more": len(found) > limit,
        }  # fmt: skip

    @routes.get("/v1/videos/{name}")
    def about(name: str) -> JSONResponse:
        return JSONResponse(told(_job(server, name), server), headers={"openai-poll-after-ms": str(POLL_MS)})

    @routes.api_route("/v1/videos/{name}/content", methods=["GET", "HEAD"])
    def content(name: str, variant: str = "video") -> FileResponse:
        if variant != "video":
            raise Refused(400, "invalid_request_error", f"variant: got {variant[:60]!r}, expected 'video'")
        job = _job(server, name)
        file = jobs.video(job)
        if job.status != "completed" or not file.is_file():
            raise Refused(404, "not_found", f"video: got one that is {job.status}, expected completed")
        return FileResponse(file, media_type="video/mp4", filename=f"{job.id}.mp4")

    @routes.delete("/v1/videos/{name}")
    def delete(name: str) -> dict[str, Any]:
        if not jobs.delete(name):
            raise _unknown(name)
        return {"id": name, "object": "video.deleted", "deleted": True}

    return routes


def told(job: Job, server: Server) -> dict[str, Any]:
    """A job as OpenAI's clients read it, and `seed`, `num_frames`, `fps`, `adapters` and `notes`."""
    height, width = job.size
    return {
        "id": job.id, "object": "video", "created_at": int(job.created), "completed_at": _time(job.ended),
        "expires_at": _time(job.expires), "status": job.status, "progress": server.jobs.progress(job),
        "model": job.model, "seconds": f"{job.seconds:.10g}", "size": f"{width}x{height}", "prompt": job.prompt,
        "error": {"code": job.error_code, "message": job.error} if job.status == "failed" else None,
        "remixed_from_video_id": None, "seed": job.seed, "num_frames": job.frames, "fps": job.fps,
        "adapters": job.adapters, "notes": list(job.notes),
    }  # fmt: skip


class _Once(FileResponse):
    """The video of a job that is forgotten when it was sent, or when the client has left."""

    def __init__(self, server: Server, job: Job) -> None:
        super().__init__(server.jobs.video(job), media_type="video/mp4", filename=f"{job.id}.mp4")
        self._forget = lambda: server.jobs.delete(job.id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.to_thread(self._forget)


def _job(server: Server, name: str) -> Job:
    job = server.jobs.get(name)
    if job is None:
        raise _unknown(name)
    return job


def _unknown(name: str) -> Refused:
    return Refused(404, "not_found", f"video: got {name[:64]!r}, expected the id of a video")


def _time(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
