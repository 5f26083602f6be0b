"""WebRTC with aiortc as the client: what viewers see, over loopback, against the application in this process."""

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from aiortc.rtp import RTCP_PSFB_FIR, RTCP_PSFB_PLI, RtcpPsfbPacket
from webrtc_client import CIRCLE, SQUARE, Caller, ended, pixels, prompts

import serve.core.coding
from serve.core.encoders import Unit
from serve.core.messages import Chunk
from serve.web.server import Server
from serve.web.webrtc.track import LiveTrack

CLOSE = 2.5  # mean error of decoded pixels, of 255: 1.4 as a rule, 3.6 in the wrong colours, 26 for a later frame
KEYS = 16  # frames between key frames that nobody asked for


@dataclass
class Sent:
    """A frame as a track gave it to its connection."""

    track: LiveTrack
    chunk: Chunk
    unit: Unit
    pts: int
    at: float


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """All frames that tracks give, as they give them."""
    frames: list[Sent] = []
    given = LiveTrack._packet

    def packet(self, frame, late):
        made = given(self, frame, late)
        assert bytes(made) == frame.unit.data
        frames.append(Sent(self, frame.chunk, frame.unit, made.pts, time.monotonic()))
        return made

    monkeypatch.setattr(LiveTrack, "_packet", packet)
    return frames


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The codec of each encoder, and of each chunk that one codes: ["make h264", "h264", "h264", ...]."""
    calls: list[str] = []
    make = serve.core.coding.make_encoder

    def counted(codec, *format):
        encoder = make(codec, *format)
        calls.append(f"make {codec}")

        def encode(frames, position, key):
            calls.append(codec)
            return encoder.encode(frames, position, key)

        return SimpleNamespace(encode=encode)

    monkeypatch.setattr(serve.core.coding, "make_encoder", counted)
    return calls


def by_frame(caller: Caller, sent: list[Sent]) -> list[tuple[Sent, np.ndarray]]:
    """What was sent beside what the client decoded of it, by the timestamps: [H, W, 3]."""
    scale = caller.frames[0].width // 32
    ticks = {one.pts: one for one in sent}
    # The client counts from the first frame that it got, which may not be the first one sent.
    for start in sorted(ticks):
        found = [ticks.get(start + frame.pts - caller.frames[0].pts) for frame in caller.frames]
        if all(found):
            mime = caller.told("video.start")[0]["mime"]
            return [(one, pixels(frame, scale, mime)) for one, frame in zip(found, caller.frames, strict=True)]
    raise AssertionError(f"got timestamps {[f.pts for f in caller.frames]}, expected some of {sorted(ticks)}")


def error(picture: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(picture.astype(float) - reference.astype(float)).mean())


def reference(server: Server, prompt: str, seed: int, chunks: int, then: dict[int, str] | None = None) -> np.ndarray:
    """The engine's own frames [T, H, W, 3]; `then`: prompts from a chunk on."""
    frames = []
    with server.pipeline.stream(prompt, seed=seed) as stream:
        for number in range(chunks):
            if then and number in then:
                stream.set_prompt(then[number])
            frames.append(stream.next_chunk())
    return np.concatenate(frames)


@pytest.mark.slow
@pytest.mark.parametrize(("codecs", "mime"), [((), "video/H264"), (("video/VP8",), "video/VP8")])
def test_frames_are_the_engines(server: Server, url: str, sent: list[Sent], codecs: tuple[str, ...], mime: str) -> None:
    async def watch() -> tuple[Caller, dict[str, Any]]:
        async with Caller(url, codecs=codecs, prompts=prompts(CIRCLE), seed=3, num_frames=21, speed=2) as caller:
            start = await caller.message("video.start", seed=3, mime=mime)
            await caller.message("stream_stopped", error_message=None)
            return caller, start

    caller, start = asyncio.run(watch())
    chunks = caller.told("video.chunk_metadata")
    assert [one["first_frame"] for one in chunks] == [0, 1, 5, 9, 13, 17]
    assert caller.told("session.done")[0] | {"frames": 21, "reason": "finished"} == caller.told("session.done")[0]
    assert [one.unit.position for one in sent] == list(range(21))
    assert sum(one["byte_length"] for one in chunks) == sum(len(one.unit.data) for one in sent)
    own = reference(server, CIRCLE, 3, 6)
    shown = by_frame(caller, sent)
    assert len(shown) >= 18  # the client may not be ready for the first ones; it waits for one after the last
    errors = [error(picture, own[one.unit.position]) for one, picture in shown]
    assert max(errors) < CLOSE, errors
    assert error(shown[0][1], own[20]) > CLOSE  # the check tells frames apart
    assert server.house.get(start["session"]).reason == "finished"


@pytest.mark.slow
def test_parameters_change_the_video(server: Server, url: str, sent: list[Sent]) -> None:
    async def direct() -> Caller:
        async with Caller(url, prompts=prompts(CIRCLE), seed=7, speed=2) as caller:
            await caller.message("video.chunk_metadata", generation_chunk_index=2)
            caller.send({"prompts": prompts(SQUARE), "event_id": "square"})
            await caller.message("session.interaction.queued", event_id="square")
            await caller.message("video.chunk_metadata", started_event_ids=["square"])
            caller.send({"transition": {"target_prompts": prompts(CIRCLE), "num_steps": 3,
                                        "temporal_interpolation_method": "linear"}, "event_id": "back"})  # fmt: skip
            await caller.message("video.chunk_metadata", completed_event_ids=["back"])
            caller.send({"paused": True, "event_id": "pause"})
            await caller.message("session.interaction.queued", event_id="pause")
            await asyncio.sleep(2)  # what was due is shown
            before = len(sent)
            await asyncio.sleep(0.5)
            assert len(sent) == before
            caller.send({"paused": False})
            await caller.until(lambda: len(sent) > before + 4)
            caller.send({"reset_cache": True, "event_id": "reset"})
            await caller.message("video.chunk_metadata", take=1, started_event_ids=["reset"])
            await caller.until(lambda: sum(one.chunk.take == 1 for one in sent) >= 10)
            caller.send({"type": "session.stop"})
            await caller.message("stream_stopped")
            return caller

    caller = asyncio.run(direct())
    chunks = caller.told("video.chunk_metadata")
    square = next(one for one in chunks if "square" in one["started_event_ids"])
    assert square["prompt"] == SQUARE
    back = [one for one in chunks if "back" in one["active_event_ids"]]
    assert [one["started_event_ids"] for one in back] == [["back"], [], []]
    assert [one["completed_event_ids"] for one in back] == [[], [], ["back"]]

    # After the reset only frames of the new take, from a key frame on; their pictures are those of the first take.
    takes = [one.chunk.take for one in sent]
    assert takes == sorted(takes)
    first = takes.index(1)
    assert sent[first].unit.key
    assert sent[first].chunk.number == 0

    # Timestamps go with the time, also across the pause and the reset.
    assert all(b.pts > a.pts for a, b in pairwise(sent))
    drift = [(one.pts - sent[0].pts) / 90_000 - (one.at - sent[0].at) for one in sent]
    assert max(map(abs, drift)) < 0.25, drift

    shown = by_frame(caller, sent)
    switch = square["generation_chunk_index"]
    last = back[0]["generation_chunk_index"]  # the transition's pictures are the core's matter
    own = reference(server, CIRCLE, 7, last, {switch: SQUARE})
    early = [(one, picture) for one, picture in shown if one.chunk.take == 0 and one.chunk.number < last]
    errors = [error(picture, own[one.unit.position]) for one, picture in early]
    assert max(errors) < CLOSE, errors
    plain = reference(server, CIRCLE, 7, last)
    changed = [error(p, plain[one.unit.position]) for one, p in early if one.chunk.number >= switch]
    assert changed
    assert min(changed) > 4 * CLOSE
    late = [(one, picture) for one, picture in shown if one.chunk.take == 1]
    assert len(late) >= 8
    begin = sent[first].unit.position
    own = reference(server, CIRCLE, 7, 1 + max(one.chunk.number for one, _ in late))
    assert max(error(picture, own[one.unit.position - begin]) for one, picture in late) < CLOSE


@pytest.mark.slow
def test_two_viewers_share_what_is_coded_once(server: Server, url: str, sent: list[Sent], encoded: list[str]) -> None:
    async def watch() -> tuple[str, Caller]:
        async with Caller(url, prompts=prompts(CIRCLE), seed=1, speed=2) as owner:
            name = (await owner.message("video.start"))["session"]
            await owner.message("video.chunk_metadata", generation_chunk_index=1)
            async with Caller(url, session=name) as other:
                await other.message("video.chunk_metadata")
                for refused in ({"paused": True}, {"reset_cache": True}, {"prompts": prompts(SQUARE)}):
                    other.send(refused)
                await other.until(lambda: len(other.told("error")) == 3)
                assert {one["code"] for one in other.told("error")} == {"invalid_request"}
                await other.until(lambda: len(other.frames) >= 12)
                other.send({"type": "session.stop"})  # leaves
                await other.until(lambda: other.connection.connectionState == "closed")
            shown = len(owner.frames)
            await owner.until(lambda: len(owner.frames) > shown + 4)
            for fmt in (RTCP_PSFB_PLI, RTCP_PSFB_FIR):
                seen = len(sent)
                await owner.until(lambda seen=seen: any(one.unit.key for one in sent[seen:]))
                await _ask(owner, fmt)
                await owner.until(lambda seen=seen: sum(one.unit.key for one in sent[seen:]) >= 2)
            owner.send({"type": "session.stop"})
            await owner.message("session.done")
            return name, other

    name, other = asyncio.run(watch())
    session = server.house.get(name)
    assert ended(server, name) == "stopped"
    assert encoded.count("make h264") == 1
    assert encoded.count("h264") == session.chunks == len(encoded) - 1
    first, second = (list(tracks) for tracks in _tracks(sent))
    units = {one.unit.position: one.unit for one in first}
    assert len(second) >= 12
    assert second[0].unit.key
    assert all(one.unit is units[one.unit.position] for one in second)
    assert not other.told("session.interaction.queued")
    assert [one.unit.position for one in first] == list(range(session.frames))  # paused, reset or changed by nobody
    keys = [one.unit.position for one in first if one.unit.key]
    gaps = [b - a for a, b in pairwise(keys)]
    assert sum(gap < KEYS for gap in gaps) >= 3  # for the second viewer, a lost picture, and a whole one


def _tracks(sent: list[Sent]) -> list[list[Sent]]:
    """The frames of each track, in the order of their first ones."""
    tracks: dict[int, list[Sent]] = {}
    for one in sent:
        tracks.setdefault(id(one.track), []).append(one)
    return list(tracks.values())


async def _ask(caller: Caller, fmt: int) -> None:
    """Ask for a whole picture by RTCP."""
    receiver = caller.receiver
    ssrc = next(iter(receiver._RTCRtpReceiver__remote_streams))
    own = receiver._RTCRtpReceiver__rtcp_ssrc
    await receiver._send_rtcp(RtcpPsfbPacket(fmt=fmt, ssrc=own, media_ssrc=ssrc, fci=bytes(8)))


@pytest.mark.slow
def test_a_video_needs_no_channel(url: str, sent: list[Sent]) -> None:
    async def watch() -> None:
        async with Caller(url, channel=False, prompts=prompts(CIRCLE), speed=2) as caller:
            await caller.until(lambda: len(caller.frames) >= 6)
            async with httpx.AsyncClient() as client:
                assert (await client.delete(f"{caller.url}/{caller.answer['sessionId']}")).status_code == 204
                assert (await client.delete(f"{caller.url}/{caller.answer['sessionId']}")).status_code == 404
            await caller.until(lambda: caller.connection.connectionState == "closed")

    asyncio.run(watch())
    assert sent[0].unit.key
    assert sent[0].unit.position == 0


@pytest.mark.slow
def test_messages_wait_for_a_late_channel(url: str) -> None:
    async def watch() -> Caller:
        caller = Caller(url, channel=False, prompts=prompts(CIRCLE), seed=5, speed=2, paused=False)
        caller.connection.createDataChannel("other")
        async with caller:
            await caller.until(lambda: len(caller.frames) >= 6)
            channel = caller.connection.createDataChannel("parameters")
            channel.on("message", caller._heard)
            await caller.until(lambda: len(caller.told("video.chunk_metadata")) >= 4)
        return caller

    caller = asyncio.run(watch())
    assert caller.messages[0]["type"] == "video.start"
    chunks = caller.told("video.chunk_metadata")
    assert [one["transport_chunk_index"] for one in chunks] == list(range(len(chunks)))


@pytest.mark.slow
def test_a_page_that_lost_its_connection_resumes(server: Server, url: str, sent: list[Sent]) -> None:
    """The video goes on with the chunk after the last one that was shown, and its changes are made again."""
    past = [{"chunk": 2, "prompt": SQUARE}]

    async def resume() -> Caller:
        async with Caller(url, prompts=prompts(CIRCLE), seed=9, num_frames=21, paused=True,
                          resume={"chunk": 4, "history": past}) as caller:  # fmt: skip
            await caller.message("video.start")
            await asyncio.sleep(0.3)
            assert not sent
            caller.send({"paused": False, "speed": 4})
            await caller.message("stream_stopped", error_message=None)
            return caller

    caller = asyncio.run(resume())
    assert [one["generation_chunk_index"] for one in caller.told("video.chunk_metadata")] == [4, 5]
    own = reference(server, CIRCLE, 9, 6, {2: SQUARE})[13:]
    shown = by_frame(caller, sent)
    assert len(shown) >= 5
    assert max(error(picture, own[one.unit.position]) for one, picture in shown) < CLOSE
