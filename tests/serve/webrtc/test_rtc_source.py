"""A camera over WebRTC: the client sends a video, the session follows it."""

import asyncio
from fractions import Fraction
from typing import Any

import httpx
import numpy as np
import pytest
from aiortc import RTCSessionDescription, VideoStreamTrack
from av import VideoFrame
from webrtc_client import SQUARE, Caller, ended, pixels, prompts

from serve.web.server import Server

COLOURS = (250, 20, 20), (20, 20, 250)


class Camera(VideoStreamTrack):
    """Two halves in two colours, which change places every second."""

    def __init__(self, frames: int = 10**6) -> None:
        super().__init__()
        self.left = frames

    async def recv(self) -> VideoFrame:
        pts, base = await self.next_timestamp()
        if not self.left:
            self.stop()
        self.left -= 1
        picture = np.empty((120, 160, 3), np.uint8)
        order = COLOURS if int(pts * Fraction(base)) % 2 == 0 else COLOURS[::-1]
        picture[:, :80], picture[:, 80:] = order
        frame = VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = pts, base
        return frame


class Sender(Caller):
    """A caller whose video section sends a camera's track, too."""

    def __init__(self, url: str, track: VideoStreamTrack | None, **initial: Any) -> None:
        super().__init__(url, **initial)
        (transceiver,) = self.connection.getTransceivers()
        if track is not None:
            transceiver.direction = "sendrecv"
            transceiver.sender.replaceTrack(track)


def test_the_video_follows_the_camera(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session gets the camera's own colours, and makes a chunk for each four frames at its own rate."""
    given: list[np.ndarray] = []

    async def run() -> Caller:
        async with Sender(url, Camera(), prompts=prompts(SQUARE), seed=5, source={"strength": 0.7}) as caller:
            await caller.message("video.start")
            session = server.house.get(caller.answer["session"])
            assert session is not None
            put = session.input.put
            monkeypatch.setattr(session.input, "put", lambda frame, at: (given.append(frame), put(frame, at)))
            await caller.until(lambda: len(caller.frames) >= 9)
            caller.send({"type": "session.stop"})
            await caller.message("stream_stopped")
            return caller

    caller = asyncio.run(run())
    done = caller.told("session.done")[0]
    assert done["source"]["taken"] >= 9
    assert done["source"]["dropped"] > 9  # a camera of 30 frames a second, a model of 8
    sides = {tuple((frame[8:-8, 4].mean(0) > 128).tolist()) for frame in given[8:]}
    assert sides <= {(True, False, False), (False, False, True)}
    assert given[-1].shape == (32, 32, 3)
    assert pixels(caller.frames[-1], caller.frames[-1].width // 32, "video/H264").shape == (32, 32, 3)
    assert caller.told("error") == []


def test_a_camera_that_ends_ends_the_video(url: str, server: Server) -> None:
    async def run() -> Caller:
        async with Sender(url, Camera(45), prompts=prompts(SQUARE), source={}) as caller:
            await caller.until(lambda: len(caller.frames) >= 1)
            await caller.connection.close()
            return caller

    caller = asyncio.run(run())
    assert ended(server, caller.answer["session"]) in ("finished", "lease", "no_frames")


def test_an_offer_that_sends_nothing_is_refused(url: str) -> None:
    async def run() -> httpx.Response:
        caller = Sender(url, None, prompts=prompts(SQUARE), source={})
        await caller.offer()
        response = await caller.post()
        await caller.connection.close()
        return response

    response = asyncio.run(run())
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message == "sdp: got no first video section that sends and receives, expected one (sendrecv)"


def test_a_camera_without_a_source_is_not_decoded(url: str, server: Server) -> None:
    async def run() -> None:
        async with Sender(url, Camera(), prompts=prompts(SQUARE)) as caller:
            await caller.until(lambda: len(caller.frames) >= 1)
            assert "a=sendonly" in caller.answer["sdp"]
            assert RTCSessionDescription(caller.answer["sdp"], "answer")
            caller.send({"type": "session.stop"})
            await caller.message("stream_stopped")

    asyncio.run(run())
