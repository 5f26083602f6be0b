"""WebRTC with aiortc as the client: over loopback, against the application in this process."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import aioice.ice
import httpx
import numpy as np
import psutil
import pytest
from aiortc.rtp import RTCP_PSFB_FIR, RTCP_PSFB_PLI, RtcpPsfbPacket
from serving import app_on_a_thread
from webrtc_client import Caller, pixels

import engine
import serve.core.coding
from serve.build import make_server
from serve.core.encoders import Unit
from serve.core.messages import Chunk, Wish
from serve.core.viewers import Viewer
from serve.options import Network, Sessions
from serve.web.app import make_app
from serve.web.metrics import Metrics
from serve.web.server import Bell, Server
from serve.web.webrtc import peer, routes
from serve.web.webrtc.track import LiveTrack

CIRCLE = "a red circle moving right slowly on a gray background"
SQUARE = "a blue square moving up quickly on a white background"
CLOSE = 2.5  # mean error of decoded pixels, of 255: 1.4 as a rule, 3.6 in the wrong colours, 26 for a later frame
LEASE = 1.0
KEYS = 16  # frames between key frames that nobody asked for


def prompts(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text, "weight": 1.0} for text in texts]


@pytest.fixture(scope="module")
def server() -> Server:
    sessions = Sessions(sessions=3, waiting=0, lease=LEASE)
    return make_server(engine.load(), "sprites", Network(rate=100_000), sessions)


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    with app_on_a_thread(make_app(server)) as address:
        yield address


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


def ended(server: Server, name: str, within: float = 15.0) -> str:
    """Wait until a session has ended, with its thread; why it did."""
    session = server.house.get(name)
    assert session is not None
    assert session.join(within), session.state
    return session.reason


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
            await asyncio.sleep(0.8)  # what was due is shown
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
def test_a_client_that_vanishes_leaves_nothing_behind(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.1)  # seconds; else 5
    monkeypatch.setattr(aioice.ice, "CONSENT_FAILURES", 2)
    before = _left(server)

    async def vanish() -> str:
        caller = Caller(url, prompts=prompts(CIRCLE))
        async with caller:
            name = (await caller.message("video.start"))["session"]
            await caller.until(lambda: caller.frames)
            assert _left(server) != before
            caller.vanish()
            assert await asyncio.to_thread(ended, server, name) == "lease"
        return name

    session = server.house.get(asyncio.run(vanish()))
    assert time.monotonic() - session._watched > LEASE
    until = time.monotonic() + 10
    while (left := _left(server)) != before and time.monotonic() < until:
        time.sleep(0.05)
    assert left == before


def _left(server: Server) -> tuple[int, float | None, int]:
    """(threads of sessions, connections, UDP sockets)."""
    threads = sum(thread.name.startswith("session-") for thread in threading.enumerate())
    peers = server.metrics.registry.get_sample_value("greedy_peer_connections")
    return threads, peers, len(psutil.Process().net_connections("udp"))


@pytest.mark.slow
def test_messages_that_are_wrong_are_answered(url: str) -> None:
    garbage = ["", "garbage", "[1, 2]", "1", "[" * 20_000, b"bytes", "{}", '{"prompts": []}',
               '{"prompts": [{"text": "", "weight": 1}]}', '{"prompts": [{"text": "a", "weight": -1}]}',
               '{"transition": {"num_steps": 2}}', '{"paused": "yes"}', '{"seed": -1}', '{"speed": 1e9}',
               '{"lora_scales": [{"scale": 1}]}', '{"lora_scales": [{"path": "/etc/passwd", "scale": 1}]}',
               '{"type": "session.start"}', '{"type": "session.interaction"}']  # fmt: skip

    async def insist() -> Caller:
        async with Caller(url, prompts=prompts(CIRCLE), noise_scale=0.7, denoising_step_list=[1000, 750]) as caller:
            await caller.message("video.start")
            for number, message in enumerate(garbage, start=1):
                caller.send(message)
                await caller.until(lambda number=number: len(caller.told("error")) == number)
            for _ in range(2):
                caller.send({"noise_scale": 0.1, "manage_cache": True})
            caller.send({"transition": {"target_prompts": prompts(CIRCLE), "num_steps": 1,
                                        "temporal_interpolation_method": "slerp"}, "vace_scale": 1})  # fmt: skip
            caller.send({"type": "session.interaction", "interaction": {"event": {"speed": 2}, "event_id": "own"}})
            await caller.message("session.interaction.queued", event_id="own")
            caller.send({"type": "session.ping"})
            await caller.message("session.pong")
            await caller.until(lambda: "own" in str(caller.told("video.chunk_metadata")))
            return caller

    caller = asyncio.run(insist())
    errors = caller.told("error")
    assert {one["code"] for one in errors} == {"invalid_request"}
    assert all("got" in one["message"] and "expected" in one["message"] for one in errors)
    assert all("\n" not in one["message"] and len(one["message"]) < 400 for one in errors)
    assert "'passwd'" in errors[garbage.index('{"lora_scales": [{"path": "/etc/passwd", "scale": 1}]}')]["message"]
    noted = sorted(one["message"].split(":")[0] for one in caller.told("session.note"))
    names = ["denoising_step_list", "manage_cache", "noise_scale", "temporal_interpolation_method", "vace_scale"]
    assert noted == names


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


def test_candidates(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of multicast DNS is left out: nothing is asked on the network."""
    asked: list[Any] = []
    monkeypatch.setattr(aioice.ice, "get_or_create_mdns_protocol", asked.append)

    async def trickle() -> tuple[list[int], str]:
        caller = Caller(url)
        own = f"candidate:1 1 udp 2113937151 {'7b9f93c5-9601-4690-8920-b5f181e58451.local'} 43271 typ host"
        sdp = (await caller.offer()).replace("a=candidate:", f"a={own}\r\na=candidate:", 1)
        answer = (await caller.post(sdp=sdp, initialParameters={"prompts": prompts(CIRCLE)})).json()
        bodies = [
            {"candidates": [{"candidate": own, "sdpMid": "0", "sdpMLineIndex": 0}]},
            {"candidates": [{"candidate": "candidate:2 1 UDP 1 192.0.2.77 9 typ host", "sdpMLineIndex": 0}]},
            {"candidates": [{"candidate": "", "sdpMid": "0"}, {"candidate": None, "sdpMid": "0"}]},
            {"candidates": []},
            {"candidates": [{"candidate": "candidate:2 1 UDP x 192.0.2.77 9 typ host", "sdpMLineIndex": 0}]},
            {"candidates": [{"candidate": "candidate:2 1 UDP 1 192.0.2.77 99999 typ host", "sdpMLineIndex": 0}]},
            {"candidates": [{"candidate": "candidate:2 1 UDP 1 192.0.2.77 9 typ host"}]},
            {"candidates": [{"candidate": "nothing", "sdpMid": "0"}]},
            {"candidates": [{"candidate": ""}] * 1000},
            {"candidates": "x"},
            [],
        ]
        async with httpx.AsyncClient() as client:
            place = f"{caller.url}/{answer['sessionId']}"
            statuses = [(await client.patch(place, json=body)).status_code for body in bodies]
            statuses.append((await client.patch(f"{caller.url}/unknown", json=bodies[0])).status_code)
            statuses.append((await client.delete(place)).status_code)
            statuses.append((await client.patch(place, json=bodies[0])).status_code)
        await caller.connection.close()
        return statuses, answer["session"]

    statuses, session = asyncio.run(trickle())
    assert not asked
    assert statuses == [204] * 4 + [400] * 7 + [404, 204, 404]
    assert ended(server, session) == "stopped"


def test_offers_that_are_wrong(server: Server, url: str) -> None:
    good = {"prompts": prompts(CIRCLE)}

    async def insist() -> list[tuple[int, dict[str, Any]]]:
        caller = Caller(url)
        sdp = await caller.offer()
        bodies: list[Any] = [
            {"initialParameters": {}}, {"initialParameters": {"prompts": "\0"}}, {"initialParameters": {"prompts": []}},
            {"initialParameters": good | {"seed": -1}}, {"initialParameters": good | {"paused": 1}},
            {"initialParameters": good | {"lora_scales": [{"name": "none", "scale": 1}]}},
            {"initialParameters": good | {"width": 17}}, {"initialParameters": good | {"model": "other"}},
            {"initialParameters": good | {"image": "x"}}, {"initialParameters": None}, {"type": "answer"},
            *({"initialParameters": good, "sdp": text} for text in (
                "", "garbage", "v=0\r\n", "m=video", "m=video 9 X 1\r\n" * 9, "x" * 100_000,
                sdp.replace("a=ice-ufrag", "a=x"), sdp.replace("a=setup", "a=x"),
                sdp.replace("a=recvonly", "a=inactive"),
                sdp.replace("a=recvonly", "a=sendonly"), sdp.replace("H264", "H265").replace("VP8", "VP9"),
                sdp.replace("m=video", "m=audio"), "\n".join(sdp.splitlines()[::-1]),
            )),
        ]  # fmt: skip
        answers = [await caller.post(**body) for body in bodies]
        answers.append(await caller.post(session="nobody"))
        async with httpx.AsyncClient() as client:
            answers += [
                await client.post(caller.url, content=body) for body in (b"", b"{", b"[]", b"[" * 50_000, b"\xff")
            ]
        await caller.connection.close()
        return [(one.status_code, one.json()) for one in answers]

    before = _left(server)
    found = asyncio.run(insist())
    statuses = [status for status, _ in found]
    assert statuses == [400] * 24 + [404] + [400] * 5, found
    messages = [body["error"]["message"] for _, body in found]
    assert all("got" in one and "\n" not in one and len(one) < 400 for one in messages), messages
    assert _left(server)[:2] <= before[:2]


@pytest.mark.slow
def test_limits(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy houses and too many connections are 429; who never connects leaves; the end of the server is told."""
    monkeypatch.setattr(peer, "CONNECT_WITHIN", 1.0)
    monkeypatch.setattr(routes, "SPARE_PEERS", -1)
    other = make_server(server.pipeline, "small", replace(server.network, token="password"),
                        Sessions(sessions=1, waiting=0, lease=1.0))  # fmt: skip
    good = {"prompts": prompts(CIRCLE)}

    async def fill(url: str) -> tuple[int, str, Caller]:
        async with httpx.AsyncClient() as client:
            unknown = (await client.post(f"{url}/api/v1/webrtc/offer", json={})).status_code
        idle = Caller(url)
        idle.url += "?token=password"
        await idle.offer()
        answer = (await idle.post(initialParameters=good)).json()
        crowd = await idle.post(initialParameters=good)
        assert crowd.status_code == 429
        assert "1 WebRTC connections" in crowd.json()["error"]["message"]
        assert crowd.headers["retry-after"]
        assert await asyncio.to_thread(ended, other, answer["session"]) == "lease"
        await idle.connection.close()
        caller = Caller(url, **good)
        caller.url += "?token=password"
        await caller.__aenter__()
        await caller.message("video.chunk_metadata")
        return unknown, answer["session"], caller

    async def run() -> tuple[int, Caller]:
        stop = threading.Event()
        address: list[str] = []
        up = threading.Event()

        def serve_until() -> None:
            with app_on_a_thread(make_app(other)) as url:
                address.append(url)
                up.set()
                stop.wait(60)

        thread = threading.Thread(target=serve_until)
        thread.start()
        await asyncio.to_thread(up.wait)
        try:
            unknown, _, caller = await fill(address[0])
        finally:
            stop.set()
        await caller.message("stream_stopped", error_message="the video ended: shutdown")
        await caller.until(lambda: caller.connection.connectionState == "closed")
        await asyncio.to_thread(thread.join)
        return unknown, caller

    unknown, caller = asyncio.run(run())
    assert unknown == 401
    assert caller.told("session.done")[0]["reason"] == "shutdown"
    assert other.metrics.registry.get_sample_value("greedy_peer_connections") == 0


def test_busy_houses_refuse(server: Server, url: str) -> None:
    """Every place is taken: 429 before an answer."""

    async def crowd() -> int:
        names = []
        caller = Caller(url)
        await caller.offer()
        for _ in range(3):
            names.append((await caller.post(initialParameters={"prompts": prompts(CIRCLE)})).json()["sessionId"])
        status = (await caller.post(initialParameters={"prompts": prompts(CIRCLE)})).status_code
        async with httpx.AsyncClient() as client:
            for name in names:
                await client.delete(f"{caller.url}/{name}")
        await caller.connection.close()
        return status

    assert asyncio.run(crowd()) == 429


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), []),
        (("stun:stun.example.org:3478",), [{"urls": "stun:stun.example.org:3478"}]),
        (
            ("turn:me:p:a@ss@10.0.0.1:3478?transport=tcp", "stun:host"),
            [
                {"urls": "turn:10.0.0.1:3478?transport=tcp", "username": "me", "credential": "p:a@ss"},
                {"urls": "stun:host"},
            ],
        ),
    ],
)
def test_ice_servers(server: Server, texts: tuple[str, ...], expected: list[dict[str, str]]) -> None:
    network = Network(ice_server=texts)
    app = make_app(replace(server, network=network, metrics=Metrics()))

    async def ask() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return (await client.get("/api/v1/webrtc/ice-servers")).json()

    assert asyncio.run(ask()) == {"iceServers": expected}
    own = routes._configuration(SimpleNamespace(network=network)).iceServers
    assert [one.urls for one in own] == [one["urls"] for one in expected]
    assert own is not None  # aiortc would ask a public server


@pytest.mark.parametrize(
    "text",
    ["", "stun", "stun:", "stun:host:0", "stun:host:70000", "stun:host:x", "http://host:1", "turn:host:3478",
     "turn:user@host:3478", "turn:user:@host:1", "stun:user:secret@host:1", "stun:host:1?transport=udp",
     "turn:user:secret@host name:1", "stun:host:1 "],
)  # fmt: skip
def test_ice_servers_that_are_wrong(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--ice-server: got .*, expected stun:HOST:PORT or turn:") as caught:
        Network(ice_server=("stun:host:1", text))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def chunk(position: int, take: int, key: bool, due: float, frames: int = 2) -> Chunk:
    units = tuple(Unit(bytes([take, position + i]), position + i, key and not i) for i in range(frames))
    pictures = np.zeros((frames, 2, 2, 3), np.uint8)
    return Chunk(0, take, position, pictures, units, CIRCLE, (), (), (), 0.0, due, 0.0)


def test_frames_of_an_earlier_take_are_dropped() -> None:
    """Also those that the track has taken already, and waits to show."""

    async def play() -> list[tuple[bytes, int]]:
        bell, now = Bell(), time.monotonic()
        session: Any = SimpleNamespace(take=0, frame_time=lambda number: 0.05 * number, wake=lambda: None)
        viewer = Viewer("h264", watches=False, notify=bell.ring)
        told: list[Any] = []
        track = LiveTrack(session, viewer, bell, told.append)
        viewer.put(chunk(0, 0, True, now - 9))  # before it connected
        first = asyncio.ensure_future(track.recv())
        await asyncio.sleep(0.01)
        assert viewer.watches
        assert not told
        viewer.put(chunk(2, 0, True, time.monotonic()))
        packets = [await first]
        viewer.put(chunk(4, 0, False, time.monotonic() + 30))
        waiting = asyncio.ensure_future(track.recv())
        await asyncio.sleep(0.01)
        session.take = 1
        viewer.put(chunk(6, 1, True, time.monotonic()))
        packets += [await asyncio.wait_for(waiting, 5), await asyncio.wait_for(track.recv(), 5)]
        assert [one.position for one in told] == [2, 4, 6]
        return [(bytes(packet), packet.pts) for packet in packets]

    (first, start), (second, later), (third, last) = asyncio.run(play())
    assert [first, second, third] == [b"\0\2", b"\1\6", b"\1\7"]
    assert start == 0
    assert later > 0
    assert last - later == pytest.approx(0.05 * 90_000, abs=0.02 * 90_000)


def test_a_lost_picture_is_remembered_until_a_key_frame() -> None:
    viewer = Viewer("h264")
    viewer.put(chunk(0, 0, True, 0.0))
    assert not viewer.wants_key
    viewer.wants_key = True  # while the next chunk is coded
    viewer.put(chunk(2, 0, False, 0.0))
    assert viewer.wants_key
    viewer.put(chunk(4, 0, True, 0.0))
    assert not viewer.wants_key


def test_who_takes_nothing_asks_for_no_key_frames(server: Server) -> None:
    """A viewer without room would get them in every chunk of all other viewers."""
    stalled, viewer = Viewer("h264", holds=False), Viewer("h264", room=100)
    session = server.house.job(Wish((((CIRCLE), 1.0),), frames=65, speed=0.0), viewer)
    session.watch(stalled)
    assert session.join(60)
    taken = [item for item in iter(viewer.take, None) if isinstance(item, Chunk)]
    keys = [unit.position for item in taken for unit in item.units if unit.key]
    assert sum(len(item.frames) for item in taken) == 65
    assert len(keys) <= 1 + 65 // KEYS + 3
