"""Several servers behind one door, in a real Ray cluster on this machine: spread, sticky, and what follows a loss."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from clients import OTHER, PROMPT, connected, started
from serving import free_port
from webrtc_client import Caller

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
ray_serve = pytest.importorskip("ray.serve", reason="the extra [ray] is not installed")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
TOKEN = "a-token-of-tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
QUERY = f"?token={TOKEN}"
HANG = 180.0  # seconds; a replica that starts again takes 30 on a busy machine
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # writes nothing to the home folder, asks nobody


@pytest.fixture(scope="module")
def url():
    """The door to two replicas of the embedded model, two sessions each."""
    from serve.ray_app import build

    environment, handlers = dict(os.environ), {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    os.environ |= QUIET
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # names of sockets are short
    port = free_port()
    try:
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=folder, log_to_driver=False
        )
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"replicas": 2, "cores": 1, "sessions": 2, "lease": 10, "token": TOKEN, "jobs_dir": f"{folder}/jobs"}
        ray_serve.run(build(options), name="streams")
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.clear()
        os.environ |= environment
        for number, handler in handlers.items():  # Ray has set its own
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def quiet(request):
    """Every test of the cluster begins with two replicas that do nothing."""
    if "url" not in request.fixturenames:
        return
    url = request.getfixturevalue("url")
    wait_for(lambda: (health(url)["replicas"], health(url)["sessions"]) == (2, 0), "two idle replicas")


def wait_for(true, what):
    until = time.monotonic() + HANG
    while not (found := true()):
        assert time.monotonic() < until, f"no {what} within {HANG} s"
        time.sleep(0.1)
    return found


def get(url, path, **more):
    return httpx.get(url + path, headers=HEADERS, timeout=30, **more)


def health(url):
    return httpx.get(url + "/health", timeout=30).json()


def sessions(url):
    """Sessions that run, by the name of their replica."""
    found = re.findall(r'^greedy_sessions\{replica="(\w+)"\} ([\d.]+)$', get(url, "/metrics").text, re.MULTILINE)
    return {name: int(float(count)) for name, count in found}


def process_of(replica):
    actor = ray.get_actor(f"SERVE_REPLICA::streams#Streams#{replica}", namespace="serve")
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def busy_replica(url):
    return next(name for name, count in sessions(url).items() if count)


@pytest.fixture(scope="module")
def pipeline():
    import engine

    return engine.load(threads=1)


def frames_of(pipeline, count, seed, changes=()):
    """The engine's own frames, chunk by chunk; changes: (chunk, prompt)."""
    made, changes = [], dict(changes)
    with pipeline.stream(PROMPT, seed=seed) as stream:
        for number in range(count):
            if number in changes:
                stream.set_prompt(changes[number])
            made.append(stream.next_chunk())
    return made


def same(chunks, expected):
    for chunk in chunks:
        want = expected[chunk["generation_chunk_index"]]
        np.testing.assert_array_equal(np.frombuffer(chunk["data"], np.uint8).reshape(want.shape), want)


@pytest.mark.thorough
def test_new_sessions_go_to_the_freest_replica_and_stay_there(url):
    async def run():
        async with contextlib.AsyncExitStack() as stack:
            clients, names = [], []
            for _ in range(4):
                client = await stack.enter_async_context(started(url, query=QUERY, speed=1))
                clients.append(client)
                names.append((await client.until("video.start"))["session"])
                await client.until("video.chunk_metadata")
            spread = await asyncio.to_thread(sessions, url)
            assert sorted(spread.values()) == [2, 2]
            assert len(set(names)) == 4
            for name in names:
                about = (await asyncio.to_thread(get, url, f"/v1/sessions/{name}")).json()
                assert (about["id"], about["seed"], about["state"]) == (name, 3, "playing")
            async with connected(url, QUERY) as looker:
                await looker.send("session.watch", session=names[1], format="m4s")
                assert (await looker.until("video.start"))["session"] == names[1]
                assert (await looker.until("video.chunk_metadata"))["data"][4:8] == b"ftyp"
            video = await asyncio.to_thread(get, url, f"/v1/sessions/{names[1]}/video")
            assert (video.status_code, video.headers["content-type"]) == (200, "video/mp4")
            async with started(url, query=QUERY, speed=1) as fifth:
                assert (await fifth.until("session.waiting"))["place"] == 1
            deadline = time.monotonic() + HANG
            while await asyncio.to_thread(health, url) != {
                "status": "ok", "sessions": 4, "capacity": 4, "waiting": 0, "replicas": 2
            }:  # fmt: skip
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            for client in clients:
                await client.send("session.stop")

    asyncio.run(run())


@pytest.mark.thorough
def test_the_door_asks_for_the_token_and_tells_of_all_replicas(url):
    for path in ("/v1/models", "/metrics", "/v1/sessions/x", "/v1/videos"):
        refused = httpx.get(url + path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
    model = get(url, "/v1/models").json()["data"][0]
    assert (model["id"], model["capacity"], model["width"]) == ("sprites", 4, 32)
    assert len(sessions(url)) == 2
    assert get(url, "/v1/sessions/nothing").status_code == 404
    assert httpx.get(url + "/").status_code == 200

    async def socket():
        async with connected(url) as client:
            refused = await client.rest()
            return refused[0]["code"], client.socket.close_code

    assert asyncio.run(socket()) == ("unauthorized", 1008)


@pytest.mark.thorough
def test_mjpeg_flows_and_ends_with_its_reader(url):
    with httpx.stream("GET", url + "/v1/mjpeg", params={"prompt": PROMPT, "seed": 1}, headers=HEADERS) as answer:
        assert answer.headers["content-type"].startswith("multipart/x-mixed-replace")
        data, running = b"", 0
        for part in answer.iter_raw():
            data += part
            if data.count(b"\xff\xd8\xff") > 5:
                running = sum(sessions(url).values())
                break  # closes the connection
        assert running == 1
    wait_for(lambda: sum(sessions(url).values()) == 0, "end of the session")


@pytest.mark.thorough
def test_webrtc_is_agreed_upon_through_the_door_and_flows_from_the_replica(url):
    async def run():
        caller = Caller(url, prompts=[{"text": PROMPT, "weight": 1.0}], seed=2)
        caller.url += QUERY
        async with caller:
            start = await caller.message("video.start")
            await caller.until(lambda: len(caller.frames) > 2)
            assert sorted((await asyncio.to_thread(sessions, url)).values()) == [0, 1]
            about = await asyncio.to_thread(get, url, f"/v1/sessions/{start['session']}")
            assert (about.status_code, about.json()["seed"]) == (200, 2)
            place = f"{url}/api/v1/webrtc/offer/{caller.answer['sessionId']}"
            trickled = await asyncio.to_thread(httpx.patch, place, json={"candidates": []}, headers=HEADERS)
            ended = await asyncio.to_thread(httpx.delete, place, headers=HEADERS)
            again = await asyncio.to_thread(httpx.delete, place, headers=HEADERS)
            assert [one.status_code for one in (trickled, ended, again)] == [204, 204, 404]

    asyncio.run(run())
    assert get(url, "/api/v1/webrtc/ice-servers").json() == {"iceServers": []}


@pytest.mark.thorough
def test_a_killed_replica_is_told_and_its_video_goes_on_elsewhere(url, pipeline):
    async def run():
        async with started(url, query=QUERY, seed=None, speed=2) as client:
            start = await client.until("video.start")
            await client.until("video.chunk_metadata", generation_chunk_index=1)
            await client.interact(prompt=OTHER)
            while not (await client.until("video.chunk_metadata"))["started_event_ids"]:
                pass
        async with connected(url, QUERY) as second:  # the connection was lost: the session is taken over
            await second.send("session.watch", session=start["session"], key=start["key"], format="rgb")
            await second.until("video.chunk_metadata")
            await second.interact("last", paused=True)
            await second.until("session.interaction.queued")
            lost = await asyncio.to_thread(busy_replica, url)
            os.kill(await asyncio.to_thread(process_of, lost), signal.SIGKILL)
            error = await second.until("error")
            assert await second.get() is None
            assert second.socket.close_code == 1012
        shown = client.chunks + second.chunks
        turned = next(chunk["generation_chunk_index"] for chunk in shown if chunk["started_event_ids"])
        resume = error["resume"]
        assert error["code"] == "replica_lost"
        assert resume["seed"] == start["config"]["seed"]
        assert resume["chunk"] == shown[-1]["generation_chunk_index"] + 1
        assert resume["history"] == [{"chunk": turned, "transition_chunks": 0, "prompt": OTHER}]
        assert resume["session"] == start["session"]
        assert [one["event"] for one in resume["pending"]] == [{"paused": True}]
        again = {"prompt": resume["prompt"], "seed": resume["seed"], "resume": resume}
        async with started(url, query=QUERY, **again, num_frames=4 * resume["chunk"] + 9) as other:
            await other.until("session.done")
            assert lost not in await asyncio.to_thread(sessions, url)
        assert [chunk["generation_chunk_index"] for chunk in other.chunks] == [resume["chunk"] + n for n in range(3)]
        expected = frames_of(pipeline, resume["chunk"] + 3, resume["seed"], [(turned, OTHER)])
        same(shown + other.chunks, expected)
        gone = await asyncio.to_thread(get, url, f"/v1/sessions/{start['session']}")
        assert (gone.status_code, gone.json()["error"]["type"]) == (404, "not_found")

    asyncio.run(run())


@pytest.mark.thorough
def test_jobs_of_a_killed_replica_are_made_elsewhere(url):
    lengths = ["30", "30", "1", "1"]  # the first two last until one of their replicas is killed
    asked = [{"prompt": (PROMPT, OTHER)[n % 2], "seconds": length, "seed": n} for n, length in enumerate(lengths)]
    names = [httpx.post(url + "/v1/videos", json=one, headers=HEADERS).json()["id"] for one in asked]

    def running():
        text = get(url, "/metrics").text
        return [n for n, c in re.findall(r'^greedy_jobs\{replica="(\w+)"\} ([\d.]+)$', text, re.MULTILINE) if float(c)]

    def states():
        return [get(url, f"/v1/videos/{name}").json() for name in names]

    busy = wait_for(lambda: len(found := running()) == 2 and found, "job on each replica")
    os.kill(process_of(busy[0]), signal.SIGKILL)
    assert {job["status"] for job in states()} & {"queued", "in_progress"}
    wait_for(lambda: not {job["status"] for job in states()} & {"queued", "in_progress"}, "end of all jobs")
    assert [(job["error"], job["id"], job["seed"], job["prompt"]) for job in states()] == [
        (None, name, one["seed"], one["prompt"]) for name, one in zip(names, asked, strict=True)
    ]
    assert sorted(job["id"] for job in get(url, "/v1/videos").json()["data"]) == sorted(names)
    for name, one in list(zip(names, asked, strict=True))[1:]:
        video = get(url, f"/v1/videos/{name}/content")
        once = httpx.post(url + "/v1/videos/sync", json=one, headers=HEADERS, timeout=HANG)
        assert video.headers["content-type"] == once.headers["content-type"] == "video/mp4"
        assert video.content == once.content


@pytest.mark.thorough
def test_a_killed_door_loses_neither_sessions_nor_jobs(url):
    async def run():
        async with started(url, query=QUERY, speed=1, seed=4, format="m4s") as client:
            start = await client.until("video.start")
            await client.until("video.chunk_metadata", generation_chunk_index=2)
            asked = {"prompt": PROMPT, "seconds": "8", "seed": 1}
            job = (await asyncio.to_thread(httpx.post, url + "/v1/videos", json=asked, headers=HEADERS)).json()["id"]
            os.kill(await asyncio.to_thread(door_process), signal.SIGKILL)
            await client.rest()
        return start, job, len(client.chunks)

    start, job, seen = asyncio.run(run())
    assert seen > 2
    assert start["session"]
    wait_for(lambda: alive(url), "door")
    wait_for(lambda: get(url, f"/v1/videos/{job}").json().get("status") == "completed", "end of the job")
    assert get(url, f"/v1/videos/{job}/content").content[4:8] == b"ftyp"
    # Its video can be downloaded: the new door asks both replicas for it.
    assert get(url, f"/v1/sessions/{start['session']}/video").status_code == 200


def door_process():
    actors = ray.util.list_named_actors(all_namespaces=True)
    name = next(one["name"] for one in actors if "SERVE_REPLICA::streams#Door" in one["name"])
    return ray.get(ray.get_actor(name, namespace="serve").__ray_call__.remote(lambda self: os.getpid()))


def alive(url):
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
        return health(url)["replicas"] == 2
    return False


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"port": 9000}, "port: got 9000, expected none: Ray Serve listens"),
        ({"host": "0.0.0.0"}, "host: got '0.0.0.0', expected none"),
        ({"replicas": 0}, "replicas: got 0, expected 1 to 1000"),
        ({"replicas": "two"}, "argument --replicas"),
        ({"replicas": 3, "max_replicas": 2}, r"max_replicas: got 2, expected 3 \(replicas\) to 1000"),
        ({"cores": 0}, "cores: got 0, expected a positive number"),
        ({"gpus": -1}, "gpus: got -1, expected 0 to 1000"),
        ({"sessions": 0}, "--sessions: got 0, expected 1 to 1000"),
        ({"nonsense": 1}, "unrecognized arguments: --nonsense=1"),
        ({"token": "short"}, "--token: got a text that is short"),
    ],
)
def test_arguments_that_are_wrong(args, message):
    from serve.ray_app import build

    with pytest.raises(ValueError, match=message) as error:
        build(args)
    assert "\n" not in str(error.value)


@pytest.mark.thorough
def test_the_command_line_starts_and_ends(tmp_path):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 8000), 1):
        pytest.skip("port 8000 is taken, and `serve run` has no option for another one")
    options, folder = ["replicas=1", "cores=1", "sessions=3", "name=mine"], tempfile.mkdtemp(prefix="r-", dir="/tmp")
    told = QUIET | {"RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            [Path(sys.executable).parent / "serve", "run", "serve.ray_app:build", *options],
            cwd=tmp_path, env=os.environ | told, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        address = "http://127.0.0.1:8000"

        def ready():
            assert running.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(httpx.HTTPError, ValueError):
                return health(address).get("status") == "ok"

        wait_for(ready, "answer")
        assert httpx.get(address + "/v1/models").json()["data"][0]["id"] == "mine"
        assert health(address)["capacity"] == 3
        running.send_signal(signal.SIGINT)
        assert running.wait(HANG) == 0
    finally:
        if running.poll() is None:
            running.kill()
        shutil.rmtree(folder, ignore_errors=True)
