"""Plain HTTP around live sessions: what they are, their video so far, and MJPEG for the simplest viewers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import IO, Annotated

import av
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.core.coding import Recording
from serve.core.messages import Chunk, Wish, Words, shown
from serve.core.session import Session
from serve.core.viewers import Viewer
from serve.web.server import Bell, Bucket, Refused, Server
from serve.web.wire import MOST_TEXT, words_of

_BOUNDARY = "frame"
NAMES = {"steps": "denoising_step_list"}  # of a change, as messages have them
MOST_SECONDS = 86_400.0


def router(server: Server, starts: Bucket) -> APIRouter:
    """The routes."""
    routes, copying = APIRouter(), asyncio.Lock()  # one recording at a time is in memory

    @routes.get("/v1/sessions/{name}")
    async def about(name: str) -> dict[str, object]:
        session = _session(server, name)
        return {
            "id": session.id, "state": session.state, "reason": session.reason, "seed": session.seed,
            "chunks": session.chunks, "frames": session.frames, "fps": server.pipeline.fps,
            "viewers": session.watchers, "prompt": session.prompt,
            "history": [
                {"chunk": one.chunk, "transition_chunks": one.change.transition}
                | ({"prompt": _prompt(one.change.prompt)} if one.change.prompt else {})
                | ({"adapters": dict(one.change.adapters)} if one.change.adapters else {})
                | {NAMES.get(name, name): value for name, value in one.change.settings.items()}
                for one in list(session.history)
            ],
        }  # fmt: skip

    @routes.get("/v1/sessions/{name}/video")
    async def video(name: str) -> Response:
        session = _session(server, name)
        async with copying:
            file = await asyncio.to_thread(_copied, session.recording)
        if file is None:
            raise Refused(404, "not_found", f"session: got {name[:64]!r}, which has no recording yet, expected frames")
        headers = {
            "Content-Disposition": f'attachment; filename="{session.id}.mp4"', "Content-Length": str(file.seek(0, 2)),
        }  # fmt: skip
        return StreamingResponse(_read(file), media_type="video/mp4", headers=headers)

    @routes.get("/v1/sessions/{name}/mjpeg")
    async def watch(name: str) -> StreamingResponse:
        session, bell = _session(server, name), Bell()
        viewer = Viewer("jpeg", holds=False, notify=bell.ring)
        session.watch(viewer)
        return _Mjpeg(session, viewer, bell, owns=False)

    @routes.get("/v1/mjpeg")
    async def start(
        request: Request, prompt: Annotated[str, Query(max_length=MOST_TEXT)], seed: int | None = None,
        seconds: float | None = None,
    ) -> Response:  # fmt: skip
        if seed is not None and not 0 <= seed < 2**64:
            raise Refused(400, "invalid_request_error", f"seed: got {seed}, expected 0 to 2^64 - 1")
        if seconds is not None and not 0 < seconds <= MOST_SECONDS:
            raise Refused(400, "invalid_request_error", f"seconds: got {seconds}, expected up to {MOST_SECONDS:g}")
        if wait := starts.take(request.client.host if request.client else ""):
            raise Refused(429, "busy", "got too many starts from one address", {"Retry-After": str(int(wait) + 1)})
        bell = Bell()
        viewer = Viewer("jpeg", notify=bell.ring)
        frames = None if seconds is None else max(1, round(seconds * server.pipeline.fps))
        session = server.house.open(Wish(words_of(prompt), server.seed(seed), frames), viewer)
        return _Mjpeg(session, viewer, bell, owns=True)

    return routes


def _prompt(words: Words) -> str | list[dict[str, object]]:
    """A prompt as session.start takes it."""
    return shown(words) if len(words) == 1 else [{"text": text, "weight": weight} for text, weight in words]


def _session(server: Server, name: str) -> Session:
    session = server.house.get(name)
    if session is None:
        raise Refused(404, "not_found", f"session: got {name[:64]!r}, expected one that runs or ended a while ago")
    return session


class _Mjpeg(StreamingResponse):
    """A viewer's frames as parts. Who leaves ends the session that it started, also before the first part."""

    def __init__(self, session: Session, viewer: Viewer, bell: Bell, owns: bool) -> None:
        parts = _parts(session, viewer, bell)
        super().__init__(parts, media_type=f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
        self._session, self._viewer, self._owns = session, viewer, owns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._session.leave(self._viewer)
            if self._owns:
                self._session.stop()


async def _parts(session: Session, viewer: Viewer, bell: Bell) -> AsyncIterator[bytes]:
    """Each frame as a part, when it is due."""
    loop = asyncio.get_running_loop()
    while True:
        item = viewer.take()
        if item is None:
            await bell.wait(1.0)
            continue
        if not isinstance(item, Chunk):
            if item.kind == "done":
                return
            continue
        for number, unit in enumerate(item.units):
            await asyncio.sleep(max(0.0, session.frame_due(item, number) - loop.time()))
            head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(unit.data)}\r\n\r\n"
            yield head.encode() + unit.data + b"\r\n"


def _copied(recording: Recording) -> IO[bytes] | None:
    """A recording so far as an ordinary mp4, in a file without a name; None if nothing was recorded."""
    if not (data := recording.read()):
        return None
    with contextlib.ExitStack() as undo:
        file = undo.enter_context(tempfile.TemporaryFile(prefix="greedy-serve-"))
        index(data, file)
        undo.pop_all()
    return file


def _read(file: IO[bytes]) -> Iterator[bytes]:
    """A file's bytes from its beginning; it is closed at the end, also where the client has gone."""
    with file:
        file.seek(0)
        while data := file.read(1 << 16):
            yield data


def index(data: bytes, into: IO[bytes]) -> None:
    """Write a fragmented mp4 as an ordinary one, with an index. The pictures are copied, not coded again."""
    with av.open(io.BytesIO(data), "r") as source, av.open(into, "w", format="mp4") as target:
        stream = source.streams.video[0]
        video = target.add_stream_from_template(stream, opaque=True)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = video
                target.mux(packet)
