"""The door to several servers, without a cluster: what it remembers of a video and of jobs, and how it sums figures."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from clients import PROMPT
from fastapi import FastAPI, Request, Response
from prometheus_client.parser import text_string_to_metric_families
from serving import app_on_a_thread

from serve.many.door import Door
from serve.many.figures import merged
from serve.many.fleet import Fleet, Replica
from serve.many.ledger import Ledger, Record, with_seed
from serve.many.past import Past
from serve.options import Network
from serve.web.server import Refused

START = {"type": "session.start", "prompt": PROMPT, "num_frames": 40, "adapters": {"a": 0.5}, "image": "x" * 1000}


def interaction(event_id="e", transition=None, **event):
    about = {"event": event} | ({"event_id": event_id} if event_id else {})
    about |= {} if transition is None else {"transition_chunks": transition}
    return {"type": "session.interaction", "interaction": about}


def chunk(number, *started):
    return {"type": "video.chunk_metadata", "generation_chunk_index": number, "started_event_ids": list(started)}


def begun(**fields):
    past = Past(START | fields)
    past.told({"type": "video.start", "session": "s", "config": {"seed": 7}})
    return past


@pytest.mark.parametrize(
    ("asked", "shown", "expected"),
    [
        ([], [0, 1], {"chunk": 2, "history": [], "seed": 7, "prompt": PROMPT, "adapters": {"a": 0.5}}),
        ([interaction(prompt="b", transition=3)], [0, (1, "e")],
         {"chunk": 2, "history": [{"chunk": 1, "transition_chunks": 3, "prompt": "b"}], "pending": []}),
        ([interaction(adapters={"a": 1})], [(0, "e")],
         {"history": [{"chunk": 0, "transition_chunks": 0, "adapters": {"a": 1}}]}),
        ([interaction(speed=2.0), interaction("f", paused=True)], [(0, "e", "f")],
         {"speed": 2.0, "paused": True, "history": []}),
        ([interaction(prompt="b"), interaction("f", seed=9)], [0, (1, "e"), (0, "f")],
         {"chunk": 1, "seed": 9, "prompt": "b", "history": []}),
        ([interaction(prompt="b"), interaction("f", reset=True, prompt="c", adapters={"b": 2})], [(0, "e"), (0, "f")],
         {"seed": 7, "prompt": "c", "adapters": {"a": 0.5, "b": 2}, "history": []}),
        ([interaction(seed=9, reset=False), interaction("f", denoising_step_list=[1000.0], window=2)],
         [0, (1, "e"), (2, "f")],
         {"seed": 7, "history": [{"chunk": 1, "transition_chunks": 0, "seed": 9},
                                 {"chunk": 2, "transition_chunks": 0, "denoising_step_list": [1000.0], "window": 2}]}),
        ([interaction(seed=9, reset_cache=False), interaction("f", window=2), interaction("g", reset_cache=True)],
         [0, (1, "e"), (2, "f"), (0, "g")],
         {"seed": 9, "history": [{"chunk": 0, "transition_chunks": 0, "window": 2}]}),
        ([interaction(prompt="b")], [0],
         {"chunk": 1, "history": [], "pending": [interaction(prompt="b")["interaction"]]}),
    ],
)  # fmt: skip
def test_a_past_holds_what_makes_the_video_again(asked, shown, expected):
    past = begun()
    for message in asked:
        assert past.asked(json.loads(json.dumps(message))) is False  # it had an id
    for one in shown:
        past.shown(chunk(one) if isinstance(one, int) else chunk(*one))
    resume = past.resume()
    assert {name: resume[name] for name in expected} == expected
    assert resume["session"] == "s"
    assert resume["num_frames"] == 40
    assert "image" not in resume  # the client has it


def test_a_past_gives_ids_and_forgets_what_was_refused():
    past = begun()
    message = interaction(None, prompt="b")
    assert past.asked(message)
    past.shown(chunk(0, message["interaction"]["event_id"]))
    past.asked(interaction("bad", prompt="c"))
    past.told({"type": "error", "code": "interaction_failed", "event_id": "bad"})
    past.asked(interaction("old", prompt="d", speed=3.0))
    past.told({"type": "session.note", "event_id": "old"})  # a newer prompt came before it showed
    past.asked(message)  # again: acts once
    for nothing in (None, [], {"type": "session.ping"}, {"type": "session.interaction", "interaction": 3}):
        assert past.asked(nothing) is False
    resume = past.resume()
    assert (resume["pending"], resume["speed"], len(resume["history"])) == ([], 3.0, 1)


def test_a_past_begins_with_the_one_that_it_goes_on_from():
    history = [{"chunk": 2, "prompt": "b"}]
    past = begun(resume={"chunk": 5, "history": history})
    assert (past.resume()["chunk"], past.resume()["history"]) == (5, history)
    past.asked(interaction(reset=True))
    past.shown(chunk(0, "e"))
    assert (past.resume()["prompt"], past.resume()["history"]) == ("b", [])


@pytest.mark.parametrize("resume", [3, [], {"history": "abc"}, {"history": [1, None]}, {"chunk": "x", "history": {}}])
def test_a_past_of_a_wrong_start_is_left_to_the_server(resume):
    assert begun(resume=resume).resume()["history"] == []


def test_figures_of_replicas_keep_their_kind_and_get_a_name():
    page = "# HELP frames_total n\n# TYPE frames_total counter\nframes_total {}\n# TYPE s histogram\n"
    page += 's_bucket{{le="1.0"}} {}\ns_bucket{{le="+Inf"}} 4\ns_sum 2\ns_count 4\n'
    found = {one.name: one for one in text_string_to_metric_families(
        merged({"a": page.format(1, 2), "b": page.format(5, 3), "c": ""}).decode())}  # fmt: skip
    assert found["frames"].type == "counter"
    assert {s.labels["replica"]: s.value for s in found["frames"].samples} == {"a": 1, "b": 5}
    buckets = [s for s in found["s"].samples if s.labels.get("le") == "1.0"]
    assert {s.labels["replica"]: s.value for s in buckets} == {"a": 2, "b": 3}


def test_the_freest_replica_counts_sessions_that_are_on_their_way():
    async def run():
        fleet = Fleet()
        fleet.replicas = {n: Replica(n, "", "", sessions=k, capacity=4) for n, k in (("a", 2), ("b", 1), ("c", 0))}
        fleet.replicas["c"].draining = True
        assert (await fleet.freest()).id == "b"
        with fleet.starting(fleet.replicas["b"]), fleet.starting(fleet.replicas["b"]):
            assert (await fleet.freest()).id == "a"
        assert (await fleet.freest()).id == "b"
        assert (await fleet.freest({"b"})).id == "a"
        fleet.remember("s", fleet.replicas["a"])
        assert [one.id for one in fleet.home("s")] == ["a"]
        assert len(fleet.home("unknown")) == 3
        fleet.lost(fleet.replicas["a"])
        with pytest.raises(Refused, match="whose replica was lost"):
            fleet.home("s")

    asyncio.run(run())


@pytest.mark.parametrize(
    "request_",
    [
        httpx.Request("POST", "http://x", json={"prompt": "p"}),
        httpx.Request("POST", "http://x", data={"prompt": "p"}, files={"input_reference": b"\0\r\n--picture--"}),
        httpx.Request("POST", "http://x", data={"prompt": "p"}),
    ],
)
def test_a_body_gets_the_seed_of_its_first_try(request_):
    async def fields(body):
        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [(b"content-type", kind.encode())]
        request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
        if kind == "application/json":
            return await request.json()
        async with request.form() as form:
            return {name: await v.read() if hasattr(v, "read") else v for name, v in form.items()}

    body, kind = request_.read(), request_.headers["content-type"]
    before, after = asyncio.run(fields(body)), asyncio.run(fields(with_seed(body, kind, 2**40)))
    assert {name: str(value) if name == "seed" else value for name, value in after.items()} == before | {
        "seed": str(2**40)
    }
    assert with_seed(with_seed(body, kind, 5), kind, 6) == with_seed(body, kind, 5)


def test_the_ledger_outlives_its_process(tmp_path):
    ledger = Ledger(tmp_path)
    record = Record("video_1", b"\0body", "application/json", {"status": "queued", "expires_at": None}, "key", "r", "i")
    ledger.save(record)
    ledger.keep_video(record, b"mp4", "video/mp4")
    again = Ledger(tmp_path).records["video_1"]
    assert vars(again) == vars(record)
    assert ledger.video(again).read_bytes() == b"mp4"
    again.about = {"status": "completed", "expires_at": 5}
    ledger = Ledger(tmp_path)
    ledger.save(again)
    ledger.expire(4)
    assert len(ledger.records) == 1
    ledger.expire(6)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected letters"):
        ledger.save(Record("../x", b"", "", {}))


def replica_app(state):
    """A server whose jobs stay queued, one in progress, until the test says otherwise."""
    app = FastAPI()

    @app.get("/health")
    def health():
        return {"sessions": 0, "waiting": 0, "capacity": 2}

    @app.middleware("http")
    async def note(request: Request, following):
        state.origins.add(request.headers.get("origin"))
        return await following(request)

    @app.post("/v1/videos")
    async def create(request: Request):
        body = await request.json()
        if "prompt" not in body:
            return Response('{"error": {"message": "prompt: got nothing"}}', 400, media_type="application/json")
        key = request.headers.get("idempotency-key")
        if key in state.keys:
            return state.jobs[state.keys[key]]
        state.bodies.append(body)
        name = f"video_{state.name}{len(state.bodies)}"
        state.jobs[name] = {"id": name, "object": "video", "status": "queued", "created_at": 3, "seed": 11}
        if key:
            state.keys[key] = name
        return state.jobs[name]

    @app.get("/v1/videos/{name}")
    def about(name: str):
        return state.jobs[name] if name in state.jobs else Response("{}", 404)

    @app.get("/v1/videos/{name}/content")
    def content(name: str):
        return Response(f"made by {name}".encode(), media_type="video/mp4")

    @app.delete("/v1/videos/{name}")
    def delete(name: str):
        return state.jobs.pop(name)

    return app


def on_a_thread(name):
    state = SimpleNamespace(name=name, bodies=[], jobs={}, keys={}, origins=set())
    context = app_on_a_thread(replica_app(state))
    state.url = context.__enter__()
    state.end = lambda: context.__exit__(None, None, None)
    return state


def test_other_sites_that_are_let_in_are_answered_once(tmp_path):
    async def run():
        one = on_a_thread("a")
        door = Door(Network(allow_origin=("https://example.org",)), "", tmp_path, 1)
        await door.fleet.register("a", one.url, "s")
        http = httpx.AsyncClient(transport=httpx.ASGITransport(door.app), base_url="http://door")
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        before = await http.options("/v1/videos", headers={"origin": "https://example.org", **asks})
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, "https://example.org")
        for path in ("/health", "/v1/sessions/none", "/other"):
            answer = await http.get(path, headers={"origin": "https://example.org"})
            assert answer.headers.get_list("access-control-allow-origin") == ["https://example.org"]
            refused = await http.get(path, headers={"origin": "https://example.com"})
            assert refused.status_code == 403
        assert one.origins == {None}
        one.end()
        await door.close()

    asyncio.run(run())


def test_jobs_move_from_lost_replicas_and_keep_their_names(tmp_path):
    async def run():
        one, two = on_a_thread("a"), on_a_thread("b")
        door = Door(Network(), "", tmp_path, 1)
        await door.fleet.register("a", one.url, "s")
        await door.fleet.register("b", two.url, "s")
        http = httpx.AsyncClient(transport=httpx.ASGITransport(door.app), base_url="http://door")
        names = [(await http.post("/v1/videos", json={"prompt": str(n)})).json()["id"] for n in range(4)]
        assert (len(one.jobs), len(two.jobs)) == (2, 2)
        refused = await http.post("/v1/videos", json={})
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, "prompt: got nothing")
        key = {"idempotency-key": "k"}
        twice = [(await http.post("/v1/videos", json={"prompt": "k"}, headers=key)).json()["id"] for _ in range(2)]
        assert twice[0] == twice[1]
        assert len(one.jobs) + len(two.jobs) == 5
        await http.delete(f"/v1/videos/{twice[0]}")
        assert (len(one.jobs), len(two.jobs)) == (2, 2)

        moved = list(one.jobs)
        one.end()  # lost
        await door.fleet.look()
        await door.jobs.look()
        assert list(door.fleet.replicas) == ["b"]
        assert len(two.jobs) == 4
        assert [body.get("seed") for body in two.bodies[-2:]] == [11, 11]
        listed = (await http.get("/v1/videos", params={"order": "asc"})).json()
        assert sorted(job["id"] for job in listed["data"]) == sorted(names)
        page = (await http.get("/v1/videos", params={"limit": 2})).json()
        rest = (await http.get("/v1/videos", params={"limit": 2, "after": page["last_id"]})).json()
        assert (page["has_more"], rest["has_more"]) == (True, False)
        assert sorted(job["id"] for job in page["data"] + rest["data"]) == sorted(names)

        record = door.jobs.record(moved[0])
        two.jobs[record.inner] |= {"status": "completed"}
        about = (await http.get(f"/v1/videos/{moved[0]}")).json()
        assert (about["id"], about["status"]) == (moved[0], "completed")

        third = on_a_thread("c")  # a replica that starts takes a job that waits
        await door.fleet.register("c", third.url, "s")
        await door.jobs.look()
        assert (len(third.jobs), len(two.jobs)) == (1, 3)

        two.end()
        await door.fleet.look()
        content = await http.get(f"/v1/videos/{moved[0]}/content")  # it was brought to the door in time
        assert (content.status_code, content.content) == (200, f"made by {record.inner}".encode())
        await door.jobs.look()
        assert len(third.jobs) == 3
        for _ in range(4):  # a server that forgets its jobs is as bad as one that is lost
            third.jobs.clear()
            await door.jobs.look()
        left = [(await http.get(f"/v1/videos/{name}")).json() for name in names if name != moved[0]]
        assert {(job["status"], job["error"]["code"]) for job in left} == {("failed", "replica_lost")}
        assert (await http.delete(f"/v1/videos/{names[0]}")).json()["deleted"]
        assert (await http.get(f"/v1/videos/{names[0]}")).status_code == 404
        third.end()
        await door.close()

    asyncio.run(run())
