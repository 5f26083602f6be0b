"""A WebRTC client as a browser is one: it offers to receive a video, and has the channel "parameters"."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, Self

import httpx
import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from av import VideoFrame
from av.video.reformatter import ColorRange, Colorspace

import engine
from serve.build import make_server
from serve.options import Network, Sessions
from serve.web.server import Server

CIRCLE = "a red circle moving right slowly on a gray background"
SQUARE = "a blue square moving up quickly on a white background"
LEASE = 5.0  # seconds; connecting takes one on a busy machine
WITHIN = 30.0  # seconds; all that tests wait for comes much sooner


class Caller:
    """Connects when it is entered: `async with Caller(url, prompts=[...]) as caller`. `codecs`: MIME types it takes."""

    def __init__(
        self,
        url: str,
        *,
        codecs: tuple[str, ...] = (),
        channel: bool = True,
        session: str | None = None,
        **initial: Any,
    ) -> None:
        self.url = url + "/api/v1/webrtc/offer"
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.messages: list[dict[str, Any]] = []
        self.frames: list[VideoFrame] = []  # decoded; pts: 1/90000 s since the first one
        self.answer: dict[str, str] = {}
        self._wish = {"initialParameters": initial} | ({"session": session} if session else {})
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        video = self.connection.addTransceiver("video", direction="recvonly")
        if codecs:
            known = RTCRtpReceiver.getCapabilities("video").codecs
            video.setCodecPreferences([codec for codec in known if codec.mimeType in (*codecs, "video/rtx")])
        self.receiver = video.receiver
        self.channel = self.connection.createDataChannel("parameters") if channel else None
        if self.channel is not None:
            self.channel.on("message", self._heard)
        self.connection.on("track", lambda track: self._tasks.append(asyncio.ensure_future(self._watch(track))))

    async def __aenter__(self) -> Self:
        await self.offer()
        response = await self.post()
        assert response.status_code == 200, response.text
        self.answer = response.json()
        await self.connection.setRemoteDescription(RTCSessionDescription(self.answer["sdp"], self.answer["type"]))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.connection.close()
        for task in self._tasks:
            task.cancel()

    async def offer(self) -> str:
        """The SDP of the offer."""
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return self.connection.localDescription.sdp

    async def post(self, **fields: Any) -> httpx.Response:
        async with httpx.AsyncClient(timeout=WITHIN) as client:
            body = {"sdp": self.connection.localDescription.sdp, "type": "offer"} | self._wish | fields
            return await client.post(self.url, json=body)

    def send(self, message: Any) -> None:
        assert self.channel is not None
        self.channel.send(message if isinstance(message, str | bytes) else json.dumps(message))

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Messages of one type."""
        return [message for message in self.messages if message["type"] == kind]

    async def until(self, what: Callable[[], Any]) -> Any:
        """Wait until `what()` is true, or something else that counts; that."""
        end = time.monotonic() + WITHIN
        while not (found := what()):
            assert time.monotonic() < end, f"got {[m['type'] for m in self.messages]}, {len(self.frames)} frames"
            try:
                await asyncio.wait_for(self._news.wait(), 0.1)
            except TimeoutError:
                continue
            self._news.clear()
        return found

    async def message(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The first message of a type with these fields."""
        return await self.until(
            lambda: next((m for m in self.told(kind) if all(m.get(k) == v for k, v in fields.items())), None)
        )

    def vanish(self) -> None:
        """Lose the network without a word."""
        for protocol in self.receiver.transport.transport._connection._protocols:
            protocol.transport.abort()

    def _heard(self, text: str) -> None:
        self.messages.append(json.loads(text))
        self._news.set()

    async def _watch(self, track: Any) -> None:
        try:
            while True:
                self.frames.append(await track.recv())
                self._news.set()
        except MediaStreamError:
            pass


def pixels(frame: VideoFrame, scale: int, mime: str) -> np.ndarray:
    """A frame that was enlarged `scale` times as uint8 [H, W, 3]: the middle of each of its squares.

    Colours as browsers take them: those of H.264 are named in its headers, those of VP8 are BT.601.
    """
    matrix = Colorspace.ITU601 if mime == "video/VP8" else Colorspace(frame.colorspace)
    rgb = frame.reformat(format="rgb24", src_colorspace=matrix, src_color_range=ColorRange.MPEG)
    return rgb.to_ndarray()[scale // 2 :: scale, scale // 2 :: scale]


def prompts(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text, "weight": 1.0} for text in texts]


def ended(server: Server, name: str, within: float = 15.0) -> str:
    """Wait until a session has ended, with its thread; why it did."""
    session = server.house.get(name)
    assert session is not None
    assert session.join(within), session.state
    return session.reason


def sprites() -> Server:
    """A server of the embedded model, in this process: three live sessions, and none may wait."""
    sessions = Sessions(sessions=3, waiting=0, lease=LEASE)
    return make_server(engine.load(), "sprites", Network(rate=100_000), sessions)
