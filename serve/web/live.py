"""WS /v1/realtime/video: a live session over a socket, in the messages of vLLM-Omni."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from serve.core.house import Busy
from serve.core.messages import Chunk, Notice
from serve.core.viewers import Viewer
from serve.web.desk import Desk
from serve.web.frames import Intake, picture_of_bytes
from serve.web.server import Bell, Bucket, Refused, Server
from serve.web.wire import FORMATS, Invalid, Start, Watch, close_reason, message_of, parsed, payload_of

START_WITHIN = 10.0  # seconds
CLOSE_WITHIN = 5.0  # for what is left to send when a session has ended
MESSAGES = 1200.0  # a minute, of one socket


def router(server: Server, starts: Bucket) -> APIRouter:
    """The route of the socket."""
    routes = APIRouter()

    @routes.websocket("/v1/realtime/video")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        await _Connection(server, socket, starts).run()

    return routes


class _Connection:
    """One socket. One task receives; another one sends all there is to send, so that pairs stay together."""

    def __init__(self, server: Server, socket: WebSocket, starts: Bucket) -> None:
        self._server, self._socket, self._starts = server, socket, starts
        self._request = f"video_stream-{uuid.uuid4()}"
        self._sent = 0
        self._format = "m4s"

    async def run(self) -> None:
        try:
            async with asyncio.timeout(START_WITHIN):
                first = await self._receive()
        except TimeoutError:
            await self._refuse("invalid_request", f"got no session.start within {START_WITHIN:g} s, expected one")
            return
        except (WebSocketDisconnect, RuntimeError):
            return
        except Invalid as error:
            await self._refuse("invalid_request", str(error))
            return
        bell = Bell()
        try:
            desk = await self._open(first, bell)
        except Invalid as error:
            await self._refuse("invalid_request", str(error))
        except Busy as error:
            await self._refuse("busy", str(error))
        except Refused as error:
            await self._refuse(error.kind, error.message)
        else:
            await self._serve(desk, bell)

    async def _open(self, first: Any, bell: Bell) -> Desk:
        """The desk of a session that is started or joined by the first message."""
        watch = isinstance(first, dict) and first.get("type") == "session.watch"
        if not watch and not (isinstance(first, dict) and first.get("type") == "session.start"):
            got = first.get("type") if isinstance(first, dict) else type(first).__name__
            raise Invalid(f"type: got {str(got)[:60]!r}, expected session.start or session.watch first")
        message = parsed(Watch if watch else Start, first, "session.watch" if watch else "session.start")
        self._format = message.format
        viewer = Viewer(FORMATS[message.format], holds=not watch, notify=bell.ring)
        desk = Desk(self._server, viewer)
        if watch:
            desk.watch(message.session, message.key)
            return desk
        address = self._socket.client.host if self._socket.client else ""
        if wait := self._starts.take(address):
            raise Busy(f"got too many starts from one address, expected one in {wait:.1f} s")
        await asyncio.to_thread(desk.start, message)  # it may read a picture
        return desk

    async def _serve(self, desk: Desk, bell: Bell) -> None:
        session = desk.session
        assert session is not None
        sending = asyncio.create_task(self._send_all(desk, bell))
        frames = None
        if desk.owns and session.input is not None:
            size = self._server.pipeline.height, self._server.pipeline.width
            frames = Intake(desk, session, partial(picture_of_bytes, height=size[0], width=size[1]))
        decoding = asyncio.create_task(frames.run() if frames else asyncio.sleep(0))
        receiving = asyncio.create_task(self._take_orders(desk, frames))
        try:
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done() and session.state == "ended":
                await asyncio.wait({sending}, timeout=CLOSE_WITHIN)
        finally:
            session.leave(desk.viewer)
            if desk.owns and session.state == "waiting":
                session.stop()
            for task in (sending, receiving, decoding):
                task.cancel()
            done = await asyncio.gather(sending, receiving, decoding, return_exceptions=True)
            with suppress(Exception):  # the other side may have gone
                await self._socket.close()
        for result in done:
            gone = (asyncio.CancelledError, WebSocketDisconnect, RuntimeError)
            if isinstance(result, BaseException) and not isinstance(result, gone):
                raise result

    async def _send_all(self, desk: Desk, bell: Bell) -> None:
        """Send what the viewer gets, until the session is done."""
        session = desk.session
        assert session is not None
        while True:
            item = desk.viewer.take()
            if item is None:
                await bell.wait(CLOSE_WITHIN)
                continue
            message = message_of(item, self._request)
            if isinstance(item, Chunk):
                payload = payload_of(item, self._format, self._sent == 0)
                message |= {"transport_chunk_index": self._sent, "byte_length": len(payload)}
                await self._socket.send_json(message)
                await self._socket.send_bytes(payload)
                self._sent += 1
                continue
            if isinstance(item, Notice) and item.kind == "start":
                message |= self._server.start_message(session, item, desk.owns) | {"format": self._format}
            await self._socket.send_json(message)
            if item.kind == "done":
                return

    async def _take_orders(self, desk: Desk, frames: Intake | None) -> None:
        """Act on what the client sends, until it leaves or stops. `frames`: where its pictures go."""
        session, orders = desk.session, Bucket(MESSAGES)
        assert session is not None
        while True:
            try:
                message = await self._receive(frames)
            except WebSocketDisconnect:
                return
            except Invalid as error:
                desk.error("invalid_request", str(error))
                continue
            if message is None:
                continue
            if orders.take(""):
                desk.error("busy", f"got more than {MESSAGES:g} messages a minute, expected fewer")
                continue
            kind = message.get("type") if isinstance(message, dict) else None
            if kind == "session.ping":
                desk.viewer.put(Notice("pong", {}))
            elif kind == "session.stop":
                if not desk.owns:
                    return
                session.stop()
            elif kind == "session.interaction":
                desk.interact(message.get("interaction"))
            elif kind != "session.playback":  # of clients that steer buffers; ours are paced
                known = "session.interaction, session.ping or session.stop"
                desk.error("invalid_request", f"type: got {str(kind)[:60]!r}, expected {known}")

    async def _receive(self, frames: Intake | None = None) -> Any:
        """The next message's JSON; None for a picture, which goes to `frames`. Invalid if it is neither."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        text = message.get("text")
        if text is None and frames is not None:
            frames.put(message.get("bytes") or b"")
            return None
        if text is None:
            raise Invalid(f"message: got {len(message.get('bytes') or b'')} bytes, expected text in JSON")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise Invalid(f"message: got {text[:60]!r}, expected JSON") from None

    async def _refuse(self, code: str, message: str) -> None:
        """Say why there is no session, and close."""
        self._server.metrics.error(code)
        with suppress(Exception):
            about = {"type": "error", "code": code, "message": message, "request_id": self._request}
            await self._socket.send_json(about)
            await self._socket.close(1013 if code == "busy" else 1008, close_reason(message))
