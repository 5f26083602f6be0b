"""Connections of WebRTC that go wrong: bad offers and messages, lost clients, full servers, and their ICE servers."""

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import aioice.ice
import httpx
import psutil
import pytest
from serving import app_on_a_thread
from webrtc_client import CIRCLE, LEASE, Caller, ended, prompts

from serve.build import make_server
from serve.options import Network, Sessions
from serve.web.app import make_app
from serve.web.metrics import Metrics
from serve.web.server import Server
from serve.web.webrtc import peer, routes


@pytest.mark.slow
def test_a_client_that_vanishes_leaves_nothing_behind(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.1)  # seconds; else 5
    monkeypatch.setattr(aioice.ice, "CONSENT_FAILURES", 1000)  # a client that is slow stays
    before = _left(server)

    async def vanish() -> str:
        caller = Caller(url, prompts=prompts(CIRCLE))
        async with caller:
            name = (await caller.message("video.start"))["session"]
            await caller.until(lambda: caller.frames)
            assert _left(server) != before
            monkeypatch.setattr(aioice.ice, "CONSENT_FAILURES", 2)
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
    return threads, _connections(server), len(psutil.Process().net_connections("udp"))


def _connections(server: Server) -> float | None:
    return server.metrics.registry.get_sample_value("greedy_peer_connections")


@pytest.mark.slow
def test_messages_that_are_wrong_are_answered(url: str) -> None:
    garbage = ["", "garbage", "[1, 2]", "1", "[" * 20_000, b"bytes", "{}", '{"prompts": []}',
               '{"prompts": [{"text": "", "weight": 1}]}', '{"prompts": [{"text": "a", "weight": -1}]}',
               '{"transition": {"num_steps": 2}}', '{"paused": "yes"}', '{"seed": -1}', '{"speed": 1e9}',
               '{"denoising_step_list": [1]}',
               '{"denoising_step_list": "1000"}', '{"window": 0}', '{"window": "3"}', '{"reset_cache": 1}',
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
            caller.send({"type": "session.stop"})
            await caller.message("stream_stopped")
            return caller

    caller = asyncio.run(insist())
    errors = caller.told("error")
    assert {one["code"] for one in errors} == {"invalid_request"}
    assert all("got" in one["message"] and "expected" in one["message"] for one in errors)
    assert all("\n" not in one["message"] and len(one["message"]) < 400 for one in errors)
    assert "'passwd'" in errors[garbage.index('{"lora_scales": [{"path": "/etc/passwd", "scale": 1}]}')]["message"]
    noted = sorted(one["message"].split(":")[0] for one in caller.told("session.note"))
    names = ["manage_cache", "noise_scale", "temporal_interpolation_method", "vace_scale"]
    assert noted == names


def test_settings_change_without_a_restart(server: Server, url: str) -> None:
    """In scope's names; a wrong one is answered with its event id."""

    async def direct() -> tuple[Caller, dict[str, Any]]:
        async with Caller(url, prompts=prompts(CIRCLE), seed=7, denoising_step_list=[1000, 500]) as caller:
            start = await caller.message("video.start")
            await caller.message("video.chunk_metadata", generation_chunk_index=1)
            caller.send({"denoising_step_list": [50], "event_id": "wrong"})
            await caller.message("error", event_id="wrong")
            caller.send({"window": 1000, "event_id": "too large"})
            await caller.message("error", event_id="too large")
            asked = {"denoising_step_list": [1000, 400], "window": 2, "seed": 9, "reset_cache": False}
            caller.send(asked | {"event_id": "settings"})
            await caller.message("video.chunk_metadata", take=0, started_event_ids=["settings"])
            caller.send({"reset_cache": True, "event_id": "reset"})
            await caller.message("video.chunk_metadata", take=1, started_event_ids=["reset"])
            caller.send({"type": "session.stop"})
            await caller.message("stream_stopped")
            return caller, start

    caller, start = asyncio.run(direct())
    session = server.house.get(start["session"])
    assert session is not None
    assert session.seed == 9
    kept = {"steps": [1000.0, 400.0], "window": 2}
    assert [past.change.settings for past in session.history] == [kept]
    codes = {one["event_id"]: one["code"] for one in caller.told("error")}
    assert codes == {"wrong": "invalid_request", "too large": "interaction_failed"}


def test_candidates(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of multicast DNS is left out: nothing is asked on the network."""
    asked: list[Any] = []
    monkeypatch.setattr(aioice.ice, "get_or_create_mdns_protocol", asked.append)

    async def trickle() -> tuple[list[int], str]:
        caller = Caller(url)
        own = "candidate:1 1 udp 2113937151 7b9f93c5-9601-4690-8920-b5f181e58451.local 43271 typ host"
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
    monkeypatch.setattr(peer, "CONNECT_WITHIN", LEASE + 1)
    monkeypatch.setattr(routes, "SPARE_PEERS", -1)
    other = make_server(server.pipeline, "small", replace(server.network, token="password"),
                        Sessions(sessions=1, waiting=0, lease=LEASE))  # fmt: skip
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
        await idle.until(lambda: not _connections(other))
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
    assert _connections(other) == 0


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
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
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
