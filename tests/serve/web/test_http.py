"""Plain HTTP: who may ask, errors in one shape, sessions and their downloads, MJPEG, figures."""

import asyncio
import io
import re

import av
import httpx
import pytest
from clients import OTHER, PROMPT, connected, play, started
from serving import app_on_a_thread

from serve.build import make_server
from serve.options import Network, Sessions
from serve.web.app import make_app


@pytest.fixture(scope="module")
def locked(pipeline):
    """The address of a server with a token, that takes 1 MB."""
    made = make_server(pipeline, "tiny", Network(token="let me in!", upload_mb=1), Sessions(sessions=2))
    with app_on_a_thread(make_app(made), ws_max_size=1 << 20) as address:
        yield address


def error_of(answer):
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert "\n" not in error["message"]
    return answer.status_code, error["type"], error["message"]


def test_health_and_models(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "sessions": 0, "capacity": 3, "waiting": 0}
    listed = httpx.get(f"{url}/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    about = {"id": "tiny", "object": "model", "width": 24, "height": 16, "fps": 8.0, "preset": "greedy", "scale": 8,
             "chunk_frames": 4, "adapters": [], "capacity": 3}  # fmt: skip
    assert about.items() <= model.items()
    assert httpx.get(f"{url}/v1/models/tiny").json() == model


MISSING = (
    "/nothing", "/v1/sessions/x", "/v1/sessions/x/video", "/v1/models/gpt", "/page/x.js", "/page/..%2f..%2fsetup.py",
    "/page/../build.py", "/v1/sessions/..%2f..%2fetc/video",
)  # fmt: skip
GUARDED = ("/v1/models", "/metrics", "/v1/sessions/x", "/v1/mjpeg?prompt=a", "/docs", "/openapi.json")


@pytest.mark.parametrize("path", MISSING)
def test_what_is_not_there(url, path):
    assert error_of(httpx.get(url + path))[:2] == (404, "not_found")


def test_another_method(url):
    assert error_of(httpx.delete(f"{url}/health"))[0] == 405


def test_the_page_and_its_modules(url):
    answer = httpx.get(url + "/")
    assert answer.headers["content-type"].startswith("text/html")
    for name in re.findall(r'(?:src|href)="(/page/[^"]+)"', answer.text):
        assert httpx.get(url + name).status_code == 200, name


@pytest.mark.parametrize("path", GUARDED)
def test_a_token_is_wanted(locked, path):
    assert error_of(httpx.get(locked + path))[:2] == (401, "unauthorized")
    wrong = httpx.get(locked + path, headers={"Authorization": "Bearer let me in"})
    assert "got a wrong token" in error_of(wrong)[2]
    assert httpx.get(f"{locked}/v1/models", headers={"Authorization": "Bearer let me in!"}).status_code == 200
    assert httpx.get(f"{locked}/v1/models", params={"token": "let me in!"}).status_code == 200
    assert httpx.get(f"{locked}/health").status_code == 200


def test_a_socket_wants_the_token_too(locked):
    async def run(query, headers=None):
        async with connected(locked, query, additional_headers=headers or {}) as client:
            await client.send("session.start", prompt=PROMPT, num_frames=1, format="rgb", speed=0)
            return [message["type"] for message in await client.rest()], client.seen[0]

    seen, error = asyncio.run(run(""))
    assert (seen, error["code"]) == (["error"], "unauthorized")
    assert asyncio.run(run("?token=let%20me%20in!"))[0][-1] == "session.done"
    assert asyncio.run(run("", {"Authorization": "Bearer let me in!"}))[0][-1] == "session.done"


def test_one_address_starts_so_many_and_no_more(pipeline):
    """Three a minute."""
    with app_on_a_thread(make_app(make_server(pipeline, "tiny", Network(rate=3), Sessions(sessions=2)))) as address:
        seen = [play(address, num_frames=1).seen for _ in range(4)]
    assert [messages[-1]["type"] for messages in seen] == ["session.done"] * 3 + ["error"]
    assert seen[3][-1]["message"].startswith("got too many starts from one address")


def test_pages_of_other_sites_may_not_ask(url):
    """A page elsewhere could use the server of whoever looks at it."""
    assert error_of(httpx.get(f"{url}/v1/models", headers={"Origin": "https://example.org"}))[:2] == (403, "forbidden")
    assert httpx.get(f"{url}/v1/models", headers={"Origin": url}).status_code == 200

    async def run():
        async with connected(url, origin="https://example.org") as client:
            return await client.rest()

    assert [message["code"] for message in asyncio.run(run())] == ["forbidden"]


@pytest.mark.parametrize("origin", ["null", "http://[", "http://", "https://example.org\u00e9" * 9])
def test_an_origin_that_is_none_is_refused(url, origin):
    answer = httpx.get(f"{url}/v1/models", headers={"Origin": origin.encode("latin-1")})
    assert error_of(answer)[:2] == (403, "forbidden")

    async def run():
        async with connected(url, additional_headers={"Origin": origin}) as client:
            await client.rest()
            return [message["code"] for message in client.seen], client.socket.close_code

    assert asyncio.run(run()) == (["forbidden"], 1008)


ELSEWHERE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image", "Referer": "https://example.org/page"}


@pytest.mark.parametrize(
    "headers", [ELSEWHERE, ELSEWHERE | {"Referer": ""}, ELSEWHERE | {"Sec-Fetch-Site": "same-site"}]
)
def test_an_img_on_another_site_starts_nothing(url, server, headers):
    """It sends no Origin. A link to the page itself works."""
    before = server.house.running
    answer = httpx.get(f"{url}/v1/mjpeg", params={"prompt": PROMPT, "seconds": 1}, headers=headers)
    assert error_of(answer)[:2] == (403, "forbidden")
    assert server.house.running == before
    assert httpx.get(url + "/", headers=headers).status_code == 200
    own = headers | {"Sec-Fetch-Site": "same-origin", "Referer": url + "/"}
    assert httpx.get(f"{url}/v1/models", headers=own).status_code == 200


def test_an_img_with_the_token_or_on_a_site_that_is_let_in_works(locked, local):
    answer = httpx.get(f"{locked}/v1/models", params={"token": "let me in!"}, headers=ELSEWHERE)
    assert answer.status_code == 200
    assert httpx.get(f"{local}/v1/models", headers=ELSEWHERE).status_code == 200
    assert httpx.get(f"{local}/v1/models", headers={"Host": "example.org"}).status_code == 200


HOSTS = {
    "localhost:8000": 200, "LOCALHOST": 200, "127.0.0.1:1": 200, "[::1]:8000": 200, "a.localhost": 200,
    "rebound.example:8000": 403, "localhost.example": 403, "127.0.0.1.example": 403, "[::1": 403,
}  # fmt: skip


@pytest.fixture(scope="module")
def local(pipeline):
    """The address of a server for this machine alone; pages of one site may ask."""
    made = make_server(pipeline, "tiny", Network(allow_origin=("https://example.org",)), Sessions(sessions=1))
    with app_on_a_thread(make_app(made, made.network.local)) as address:
        yield address


@pytest.mark.parametrize("host", HOSTS)
def test_a_name_that_was_bound_to_this_machine_is_not_ours(local, host):
    """DNS rebinding: the site's Origin and Host are the same, and lead here."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert httpx.get(f"{local}/v1/models", headers=headers).status_code == HOSTS[host]


def test_a_server_for_others_has_any_name(pipeline, locked):
    headers = {"Host": "video.example", "Authorization": "Bearer let me in!"}
    assert httpx.get(f"{locked}/v1/models", headers=headers).status_code == 200
    made = make_server(pipeline, "tiny", Network(host="0.0.0.0"), Sessions(sessions=1))
    with app_on_a_thread(make_app(made, made.network.local)) as url:
        assert httpx.get(f"{url}/v1/models", headers={"Host": "video.example"}).status_code == 200


def test_a_failure_of_the_server_has_the_shape_of_all_errors(server, url, monkeypatch):
    def fails():
        raise RuntimeError("with a /path")

    monkeypatch.setattr(server, "model", fails)
    status, kind, message = error_of(httpx.get(f"{url}/v1/models"))
    assert (status, kind) == (500, "server_error")
    assert "/path" not in message


def test_a_viewer_of_mjpeg_who_leaves_before_the_first_byte_is_gone(server, url):
    """The response is cancelled while its head waits to be sent: nothing of its body has run."""
    from serve.core.viewers import Viewer
    from serve.web.server import Bell
    from serve.web.sessions import _Mjpeg

    async def run():
        async with started(url, speed=1) as client:
            start = await client.until("video.start")
            session, bell = server.house.get(start["session"]), Bell()
            viewer = Viewer("jpeg", holds=False, notify=bell.ring)
            session.watch(viewer)
            assert session.watchers == 2

            async def stuck(message):
                await asyncio.Event().wait()

            scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await _Mjpeg(session, viewer, bell, owns=False)(scope, None, stuck)
            assert session.watchers == 1
            await client.send("session.stop")

    asyncio.run(run())


def test_a_site_that_is_let_in_may_ask_like_a_page_of_the_server(pipeline):
    """Its browser asks first (CORS), without a token; another site's gets no leave."""
    network = Network(token="let me in!", allow_origin=("https://example.org/",))
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with app_on_a_thread(make_app(make_server(pipeline, "tiny", network, Sessions(sessions=1)))) as url:
        leave = httpx.options(f"{url}/v1/videos", headers=asks | {"Origin": "https://example.org"})
        refused = httpx.options(f"{url}/v1/videos", headers=asks | {"Origin": "https://example.com"})
        headers = {"Origin": "https://example.org", "Authorization": "Bearer let me in!"}
        answer = httpx.get(f"{url}/v1/models", headers=headers)
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "https://example.org"
    assert "authorization" in leave.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-origin" not in refused.headers
    assert answer.json()["data"][0]["id"] == "tiny"
    assert answer.headers["access-control-allow-origin"] == "https://example.org"


def test_large_bodies_are_refused_before_they_are_read(locked):
    headers = {"Authorization": "Bearer let me in!"}
    answer = httpx.post(f"{locked}/v1/models", content=b"x" * (2 << 20), headers=headers)
    assert error_of(answer) == (413, "invalid_request_error", f"body: got {2 << 20} bytes, expected at most {1 << 20}")


def test_a_session_can_be_looked_at_and_downloaded(url):
    client = play(url, format="m4s", num_frames=21, resume={"chunk": 0, "history": [{"chunk": 2, "prompt": OTHER}]})
    name = client.seen[0]["session"]
    about = httpx.get(f"{url}/v1/sessions/{name}").json()
    expected = {"state": "ended", "reason": "finished", "seed": 3, "chunks": 6, "frames": 21, "fps": 8.0, "viewers": 0,
                "history": [{"chunk": 2, "transition_chunks": 0, "prompt": OTHER}]}  # fmt: skip
    assert expected.items() <= about.items()
    video = httpx.get(f"{url}/v1/sessions/{name}/video")
    assert video.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(video.content)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 21
        assert container.duration == pytest.approx(21 / 8 * 1e6, abs=2)


def test_raw_sessions_have_no_download(url):
    client = play(url, num_frames=1)
    answer = httpx.get(f"{url}/v1/sessions/{client.seen[0]['session']}/video")
    assert error_of(answer)[:2] == (404, "not_found")


def test_mjpeg(url):
    with httpx.stream("GET", f"{url}/v1/mjpeg", params={"prompt": PROMPT, "seconds": 1, "seed": 3}) as answer:
        assert answer.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
        data = b"".join(answer.iter_bytes())
    assert data.count(b"--frame\r\nContent-Type: image/jpeg\r\n") == 8
    assert data.count(b"\xff\xd8\xff") == 8


def test_mjpeg_of_a_running_session(url):
    async def run():
        async with started(url, speed=4) as client, httpx.AsyncClient() as http:
            start = await client.until("video.start")
            count = 0
            async with http.stream("GET", f"{url}/v1/sessions/{start['session']}/mjpeg") as answer:
                async for data in answer.aiter_bytes():
                    count += data.count(b"--frame")
                    if count > 8:
                        break
            await client.send("session.stop")
            return count

    assert asyncio.run(run()) > 8


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, "prompt: got None, expected: Field required"),
        ({"prompt": " "}, "prompt: got an empty text, expected words"),
        ({"prompt": "a" * 20_001}, "prompt: got 'aaa"),
        ({"prompt": "a", "seed": "x"}, "seed: got 'x', expected"),
        ({"prompt": "a", "seed": "-1"}, "seed: got -1, expected 0 to 2^64 - 1"),
        ({"prompt": "a", "seconds": "nan"}, "seconds: got nan, expected up to 86400"),
        ({"prompt": "a", "seconds": "0"}, "seconds: got 0.0, expected up to 86400"),
    ],
)  # fmt: skip
def test_bad_questions(url, query, expected):
    status, kind, message = error_of(httpx.get(f"{url}/v1/mjpeg", params=query))
    assert (status, kind) == (400, "invalid_request_error")
    assert message.startswith(expected), message


def test_figures_for_a_monitor(url):
    def figures():
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = figures()
    play(url, num_frames=9)
    after = figures()
    assert after["greedy_frames_total"] - before["greedy_frames_total"] == 9
    assert after["greedy_chunks_total"] - before["greedy_chunks_total"] == 3
    assert after["greedy_chunk_seconds_count"] - before["greedy_chunk_seconds_count"] == 3
    assert after["greedy_first_chunk_seconds_count"] - before["greedy_first_chunk_seconds_count"] == 1
    assert after['greedy_sessions_ended_total{reason="finished"}'] >= 1
    assert after["greedy_capacity"] == 3
    assert after["greedy_memory_bytes"] > 1e8
