"""Clients that misbehave, beside a witness whose frames stay the same; and a server that is killed."""

import json
import random
from dataclasses import replace

import psutil
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from bench.chaos import garbage
from bench.chaos.attacks import ATTACKS
from bench.chaos.misbehaviour import MORE, OWN, Outcome, Size, all_of_it, judged, misbehaviour
from bench.instruments.models import PROMPT
from bench.serving.process import Counts, started
from serve.core.house import Busy
from serve.core.messages import Wish
from serve.core.viewers import Viewer
from serve.web.guard import Guard

HELD = Counts(0, 7, 15, 400.0)
SEEN = {1: "a", 5: "b", 9: "c"}
GOOD = Outcome("test", [], 1.0, HELD, HELD, 410.0, SEEN, 0)


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (GOOD, ""),
        (replace(GOOD, after=Counts(0, 9, 17, 464.0)), ""),
        (replace(GOOD, recorded=3, after=Counts(0, 7, 20, 400.0)), ""),
        (replace(GOOD, faults=["it broke"]), "it broke"),
        (replace(GOOD, digests=SEEN | {5: "x"}), "first 5 frames differ"),
        (replace(GOOD, digests=SEEN | {13: "d"}), "first 13 frames differ"),
        (replace(GOOD, digests={1: "a"}), "expected two chunks or more"),
        (replace(GOOD, digests={}), "got 0 frames"),
        (replace(GOOD, after=Counts(1, 7, 15, 400.0)), "sessions: got 1 afterwards"),
        (replace(GOOD, after=Counts(0, 10, 15, 400.0)), "threads: got 10 afterwards"),
        (replace(GOOD, after=Counts(0, 7, 18, 400.0)), "files: got 18 afterwards"),
        (replace(GOOD, after=Counts(0, 7, 15, 465.0)), "memory_mb: got 465 afterwards"),
        (replace(GOOD, peak_mb=600.0), "memory: got 600 MB meanwhile"),
    ],
)
def test_what_a_server_does_not_give_back_is_found(outcome, word):
    found = judged(outcome, SEEN)
    assert found.passed == (not word)
    assert word in found.detail


def test_garbage_is_the_same_for_a_seed_and_has_every_kind():
    for kind in (garbage.first, garbage.later, garbage.requests):
        draw, again = random.Random(1), random.Random(1)
        made = [kind(draw) for _ in range(60)]
        assert made == [kind(again) for _ in range(60)]
        assert len(set(made)) > 7
    made = [garbage.first(random.Random(n)) for n in range(300)]
    for name in garbage.FIELDS:
        assert any(isinstance(one, str) and f'"{name}": ' in one[:200] for one in made), name
    assert any(isinstance(one, bytes) for one in made)
    assert any(len(one) > 100_000 for one in made)


def test_a_body_without_a_length_is_refused_where_it_grows_too_large():
    app = FastAPI()
    app.add_middleware(Guard, token="", origins=(), most_bytes=1000)

    @app.post("/json")
    async def take(body: dict) -> dict:
        return body

    @app.post("/form")
    async def form(request: Request) -> int:
        return len(await request.form())

    parts = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"a" * 1000 + b"\r\n--x--\r\n"
    kinds = {"/json": ("application/json", json.dumps({"a": "a" * 1000}).encode()),
             "/form": ("multipart/form-data; boundary=x", parts)}  # fmt: skip
    with TestClient(app) as client:
        for path, (kind, body) in kinds.items():
            pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
            answer = client.post(path, content=iter(pieces), headers={"Content-Type": kind})
            assert answer.status_code == 413, path
            assert "got more than 1000 bytes" in answer.text
            assert client.post(path, content=body, headers={"Content-Type": kind}).status_code == 413
        head = {"Content-Type": "application/json"}
        assert client.post("/json", content=iter([b'{"a"', b": 1}"]), headers=head).json() == {"a": 1}


def test_a_refused_session_leaves_nothing_open(server):
    """More starts than places: those that are refused hold no file."""
    viewers = [Viewer(None) for _ in range(5)]
    opened = [server.house.open(Wish((("a", 1.0),)), viewer) for viewer in viewers]
    try:
        files = psutil.Process().num_fds()
        for _ in range(50):
            with pytest.raises(Busy):
                server.house.open(Wish((("a", 1.0),)), Viewer("h264"))
        assert psutil.Process().num_fds() <= files + 2
    finally:
        for session in opened:
            session.stop()
        for session in opened:
            assert session.join(30)


@pytest.mark.slow
@pytest.mark.thorough
def test_others_do_not_notice_and_a_killed_server_is_continued():
    rows, checks = all_of_it([], PROMPT, Size(attempts=30, seconds=3.0, megabytes=40))
    assert [row["misbehaviour"] for row in rows] == list(ATTACKS)
    assert [check.name for check in checks] == [*ATTACKS, "the server's log", "killed server"]
    assert not [f"{check.name}: {check.detail}" for check in checks if not check.passed]


@pytest.mark.thorough
def test_a_thousand_connections_and_200_mb():
    with started(["--port", "0", *OWN]) as server:
        _, checks = misbehaviour(server, PROMPT, Size())
    assert not [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    assert MORE.sessions == 0
