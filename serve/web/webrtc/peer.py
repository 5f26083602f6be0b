"""One WebRTC connection: its life, and its data channel "parameters"."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from aiortc import InvalidStateError, RTCDataChannel, RTCIceCandidate, RTCPeerConnection, RTCRtpTransceiver
from aiortc.mediastreams import MediaStreamError

from engine.media.frames import Renderer
from serve.core.messages import Chunk, Item, Notice
from serve.core.session import Session
from serve.web.desk import Desk
from serve.web.frames import Intake
from serve.web.live import MESSAGES
from serve.web.server import Bell, Bucket
from serve.web.webrtc.track import LiveTrack
from serve.web.webrtc.wire import MOST_CANDIDATES, interaction_of
from serve.web.wire import Invalid, message_of

CHANNEL = "parameters"
CONNECT_WITHIN = 15.0  # seconds
CLOSE_WITHIN = 5.0  # for the client to close, once the video has ended
MOST_WAITING = 500  # messages while there is no channel
MOST_BUFFERED = 1 << 20  # bytes of a channel that is not read
MOST_MESSAGE = 60_000  # bytes; peers take at least 64 KiB
MOST_NOTES = 100
MIME = {"h264": "video/H264", "vp8": "video/VP8"}

log = logging.getLogger("serve")


class Peer:
    """A viewer over WebRTC. All methods belong to the event loop."""

    def __init__(
        self, connection: RTCPeerConnection, transceiver: RTCRtpTransceiver, desk: Desk, session: Session, bell: Bell
    ) -> None:
        self.id, self.session = secrets.token_urlsafe(9), session
        self._connection, self._desk = connection, desk
        self._channel: RTCDataChannel | None = None
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)  # for a channel
        self._noted: set[str] = set()
        self._orders = Bucket(MESSAGES)
        self._sent = self._candidates = 0
        self._error: str | None = None  # the last one that the session told
        self._connected, self._told, self._gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._camera = transceiver.receiver.track if session.input is not None else None
        sender = transceiver.sender
        sender.replaceTrack(LiveTrack(session, desk.viewer, bell, self._tell))
        # aiortc calls this when the browser has lost a picture (PLI) or asks for a whole one (FIR).
        sender._send_keyframe = self._want_key  # type: ignore[method-assign]
        connection.on("connectionstatechange", self._changed)
        connection.on("datachannel", self._opened)

    async def run(self) -> None:
        """See the connection through, from the answer until it is closed."""
        following = asyncio.create_task(self._follow())
        try:
            await _first(CONNECT_WITHIN, self._connected, self._gone)
            if self._connected.is_set():
                await _first(None, self._told, self._gone)
                await _first(CLOSE_WITHIN, self._gone)
        finally:
            following.cancel()
            await self.close()

    async def _follow(self) -> None:
        """Give the session what the browser's camera shows, until its track ends."""
        if self._camera is None or self.session.input is None:
            return
        pipeline = self._desk.server.pipeline
        decode = Renderer(pipeline.height, pipeline.width, None, "camera", [])
        frames = Intake(self._desk, self.session, decode)
        decoding = asyncio.create_task(frames.run())
        try:
            while True:
                frames.put(await self._camera.recv())
        except MediaStreamError:
            if self._desk.owns:
                self.session.input.close()
                self.session.wake()
        finally:
            decoding.cancel()

    async def add_candidate(self, candidate: RTCIceCandidate | None) -> None:
        """Add a browser's candidate. Invalid for one that cannot be, or one too many."""
        if candidate is None:
            return  # a later one may come; failure shows by CONNECT_WITHIN
        self._candidates += 1
        if self._candidates > MOST_CANDIDATES:
            raise Invalid(f"candidates: got more than {MOST_CANDIDATES}, expected fewer")
        try:
            await self._connection.addIceCandidate(candidate)
        except (ValueError, InvalidStateError) as error:
            raise Invalid(f"candidate: got {candidate.ip} {candidate.port} ({error}), expected one to reach") from None

    async def hang_up(self) -> None:
        """The client ends it; the session that it started ends too."""
        if self._desk.owns:
            self.session.stop()
        await self.close()

    async def close(self) -> None:
        """Leave the session, which waits for its lease, and close the connection. May be called again."""
        self._gone.set()
        self.session.leave(self._desk.viewer)
        if self._desk.owns and self.session.state == "waiting":
            self.session.stop()
        try:
            async with asyncio.timeout(CLOSE_WITHIN):
                await self._connection.close()
        except Exception:
            log.exception("connection %s did not close", self.id)

    async def told(self) -> None:
        """Wait until the client has been told of the end, and a moment for the last packets."""
        await _first(None, self._told, self._gone)
        await asyncio.sleep(0.1)

    def note_unknown(self, names: Iterable[str]) -> None:
        """Tell once of each parameter that has no effect here."""
        for name in names:
            if name not in self._noted and len(self._noted) < MOST_NOTES:
                self._noted.add(name)
                self._desk.note(f"{name[:60]}: got a parameter that has no effect here")

    # --- events of the connection

    def _changed(self) -> None:
        state = self._connection.connectionState
        if state == "connected":
            self._connected.set()
        elif state in ("failed", "closed"):
            self._gone.set()

    def _opened(self, channel: RTCDataChannel) -> None:
        if channel.label != CHANNEL:
            return
        self._channel = channel
        channel.on("message", self._receive)
        while self._waiting:
            self._send(self._waiting.popleft())

    def _want_key(self) -> None:
        self._desk.viewer.wants_key = True  # acts with the next chunk

    # --- messages to the client

    def _tell(self, item: Item) -> None:
        """Send an item of the session as its message."""
        message = message_of(item, self.id)
        if isinstance(item, Chunk):
            size = sum(len(unit.data) for unit in item.units)
            self._put(message | {"transport_chunk_index": self._sent, "byte_length": size})
            self._sent += 1
            return
        if item.kind == "start":
            codec = self._desk.viewer.codec or ""
            start = self._desk.server.start_message(self.session, item, self._desk.owns)
            message |= start | {"format": "webrtc", "mime": MIME[codec]}
        elif item.kind == "error" and item.about["code"] in ("failed", "out_of_memory"):
            self._error = str(item.about["message"])
        self._put(message)
        if item.kind == "done":
            reason = item.about["reason"]
            wanted = reason in ("finished", "stopped")
            error = None if wanted else self._error or f"the video ended: {reason}"
            self._put({"type": "stream_stopped", "error_message": error})
            self._told.set()

    def _put(self, message: Mapping[str, Any]) -> None:
        text = json.dumps(message)
        if len(text) > MOST_MESSAGE:  # only prompts are as long
            text = json.dumps({"type": message["type"], "request_id": self.id, "message": "got too long to be told"})
        if self._channel is None or self._channel.readyState == "connecting":
            if len(self._waiting) < MOST_WAITING or message["type"] != "video.chunk_metadata":
                self._waiting.append(text)
        else:
            self._send(text)

    def _send(self, text: str) -> None:
        """Send a text on the channel, unless nobody reads it."""
        channel = self._channel
        if channel is None or channel.bufferedAmount > MOST_BUFFERED:
            return
        with suppress(InvalidStateError, ValueError):  # closed; a peer that takes less than MOST_MESSAGE
            channel.send(text)

    # --- messages of the client

    def _receive(self, data: str | bytes) -> None:
        """Act on a message. What is wrong with it is told, and the session goes on."""
        desk = self._desk
        if self._orders.take(""):
            desk.error("busy", f"got more than {MESSAGES:g} messages a minute, expected fewer")
            return
        try:
            self._act(_object(data))
        except Invalid as error:
            desk.error("invalid_request", str(error))

    def _act(self, message: Mapping[str, Any]) -> None:
        kind = message.get("type")
        if kind == "session.interaction":
            self._desk.interact(message.get("interaction"))
        elif kind == "session.ping":
            self._desk.viewer.put(Notice("pong", {}))
        elif kind == "session.stop":
            if self._desk.owns:
                self.session.stop()
            else:
                self._gone.set()
        elif isinstance(kind, str) and kind.startswith("session."):
            known = "session.interaction, session.ping or session.stop"
            raise Invalid(f"type: got {kind[:60]!r}, expected {known}, or parameters without a type")
        else:
            interaction, unknown = interaction_of(message)
            self.note_unknown(unknown)
            if interaction is not None:
                self._desk.interact(interaction)


def _object(data: str | bytes) -> dict[str, Any]:
    """A message's JSON object. Invalid if it is none."""
    if isinstance(data, bytes):
        raise Invalid(f"message: got {len(data)} bytes, expected text in JSON")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise Invalid(f"message: got {data[:60]!r}, expected JSON") from None
    if not isinstance(value, dict):
        raise Invalid(f"message: got {type(value).__name__}, expected an object")
    return value


async def _first(timeout: float | None, *events: asyncio.Event) -> None:
    """Wait for one of the events, or until `timeout` seconds have passed."""
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
