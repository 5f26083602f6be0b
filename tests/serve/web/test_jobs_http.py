"""/v1/videos over HTTP: OpenAI's own client, plain requests, bad ones, and a server that is killed."""

import base64
import io
import itertools
import json
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image
from serving import Served, app_on_a_thread, start_server

from engine.stream import Pipeline
from serve.__main__ import main
from serve.build import make_server
from serve.core.house import House
from serve.core.job_store import Store
from serve.core.jobs import Jobs
from serve.options import Network, Sessions
from serve.web.app import make_app
from serve.web.metrics import Metrics
from serve.web.server import Server

RED = "a red circle moving right slowly on a gray background"
WITHIN = 300.0  # seconds; only a hang reaches it
MB = 1 << 20
NETWORK = Network(rate=100_000, upload_mb=4)


@pytest.fixture(scope="module")
def host(sprites: Pipeline) -> Server:
    return make_server(sprites, "sprites", NETWORK, Sessions(sessions=4, job_queue=5, job_seconds=60))


@pytest.fixture(scope="module")
def url(host: Server) -> Iterator[str]:
    with app_on_a_thread(make_app(host)) as url:
        yield url


@pytest.fixture
def http(url: str, host: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=WITHIN) as client:
        yield client
    for job in host.jobs.all():
        host.jobs.delete(job.id)
    until(lambda: not host.jobs.running)


@pytest.fixture
def client(url: str, http: httpx.Client) -> Iterator[openai.OpenAI]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenAI's own service ends
        yield openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)


def until(holds: Callable[[], Any]) -> Any:
    end = time.monotonic() + WITHIN
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.03)
    return found


def plain(pipeline: Pipeline, seed: int, frames: int, clip: np.ndarray | None = None, prompt: str = RED) -> np.ndarray:
    with pipeline.stream(prompt, seed=seed, frames=frames, clip=clip) as stream:
        return np.stack(list(stream))


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_shows(data: bytes, truth: np.ndarray, scale: int) -> None:
    """The video [T, scale H, scale W, 3] in an mp4 is `truth` [T, H, W, 3], up to what coding loses."""
    shown = decoded(data)
    count, height, width, _ = truth.shape
    assert shown.shape == (count, height * scale, width * scale, 3)
    error = np.abs(shown[:, scale // 2 :: scale, scale // 2 :: scale].astype(int) - truth).mean(axis=(1, 2, 3))
    assert error.max() < 5, error


def png(seed: int, size: int = 32) -> bytes:
    made = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)).save(made, "png")
    return made.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[None]


def done(http: httpx.Client, name: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found = http.get(f"/v1/videos/{name}").json()
        return found if found["status"] in ("completed", "failed") else None

    return until(look)


def error_of(answer: httpx.Response, status: int) -> str:
    """The message of an error in OpenAI's shape, which has one line."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "code", "param"}
    assert "\n" not in error["message"]
    return str(error["message"])


# --- OpenAI's client


def test_openai_creates_polls_and_downloads(client: openai.OpenAI, sprites: Pipeline) -> None:
    video = client.videos.create_and_poll(prompt=RED, model="sprites", seconds="2", size="128x128",  # type: ignore[arg-type]
                                          extra_body={"seed": 11, "fps": 8})  # fmt: skip
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.object, video.model, video.seconds, video.size, video.prompt) == (
        "video", "sprites", "2", "128x128", RED,
    )  # fmt: skip
    assert video.completed_at is not None
    assert video.expires_at is not None
    assert abs(video.created_at - time.time()) < WITHIN
    assert video.expires_at - video.completed_at == 24 * 3600
    told = video.model_extra or {}
    assert (told["seed"], told["num_frames"], told["fps"], told["notes"]) == (11, 16, 8.0, [])
    data = client.videos.download_content(video.id).read()
    assert_shows(data, plain(sprites, 11, 16), 4)
    boxes = data.find(b"moov"), data.find(b"mdat")
    assert 0 < boxes[0] < boxes[1], "the index does not stand in front"
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].average_rate == 8
        assert container.duration == 2 * av.time_base


def test_openai_starts_from_a_picture(client: openai.OpenAI, sprites: Pipeline) -> None:
    picture = png(1)
    truth = plain(sprites, 3, 5, pixels(picture))
    address = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    sent: list[dict[str, Any]] = [
        {"input_reference": ("start.png", picture, "image/png")},
        {"input_reference": io.BytesIO(picture)},
        {"extra_body": {"input_reference": {"image_url": address}}},
    ]  # fmt: skip
    for one in sent:
        extra = {"seed": 3, "num_frames": 5, **one.pop("extra_body", {})}
        video = client.videos.create_and_poll(prompt=RED, poll_interval_ms=50, extra_body=extra, **one)
        assert video.status == "completed", video
        # Noise is hard to code: its average colours tell enough, and what follows is compared to the plain stream.
        shown = decoded(client.videos.download_content(video.id).read())[:, 2::4, 2::4]
        assert np.abs(shown.mean(axis=(1, 2)) - truth.mean(axis=(1, 2))).max() < 4
    assert np.abs(truth.astype(int) - plain(sprites, 3, 5)).mean() > 10


def test_openai_pages_through_a_list(client: openai.OpenAI, http: httpx.Client) -> None:
    made = [client.videos.create(prompt=RED, extra_body={"num_frames": 1, "seed": n}).id for n in range(5)]
    assert [video.id for video in client.videos.list(limit=2)] == made[::-1]  # the client asks for each page
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == made
    page = client.videos.list(limit=2, order="asc", after=made[0])
    assert [video.id for video in page.data] == made[1:3]
    raw = http.get("/v1/videos?limit=3").json()
    assert (raw["object"], raw["first_id"], raw["last_id"], raw["has_more"]) == ("list", made[4], made[2], True)
    assert http.get(f"/v1/videos?after={made[0]}").json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nothing"):
        name = query.split("=")[0]
        assert error_of(http.get(f"/v1/videos?{query}"), 400).startswith(f"{name}: got ")


def test_openai_deletes(client: openai.OpenAI, http: httpx.Client) -> None:
    video = client.videos.create_and_poll(prompt=RED, poll_interval_ms=50, extra_body={"num_frames": 1})
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError, match="expected the id of a video"):
            call(video.id)  # type: ignore[operator]


def test_openai_retries_what_is_busy(
    client: openai.OpenAI, host: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.web.app.RETRY", 1)
    for _ in range(6):
        client.videos.create(prompt=RED, extra_body={"num_frames": 480})
    with pytest.raises(openai.RateLimitError, match=r"^Error code: 429.*(1 jobs run and 5 wait|0 jobs run and 6 wait)"):
        client.videos.create(prompt=RED)
    answer = http.post("/v1/videos", json={"prompt": RED})
    assert error_of(answer, 429).endswith("try again later")
    assert answer.headers["retry-after"] == "1"
    threading.Timer(0.3, lambda: [host.jobs.delete(job.id) for job in host.jobs.all()]).start()
    patient = client.with_options(max_retries=3)
    assert patient.videos.create_and_poll(prompt=RED, extra_body={"num_frames": 1}).status == "completed"


# --- plain requests


@pytest.mark.parametrize("kind", ["json", "multipart", "urlencoded"])
def test_every_field_in_every_kind_of_body(http: httpx.Client, sprites: Pipeline, kind: str) -> None:
    fields = {
        "prompt": RED,
        "model": "sprites",
        "num_frames": 6,
        "seed": 2**64 - 1,
        "fps": 8,
        "width": 32,
        "height": 32,
    }
    if kind == "json":
        answer = http.post("/v1/videos", json=fields)
    elif kind == "urlencoded":
        answer = http.post("/v1/videos", data=fields)
    else:
        answer = http.post("/v1/videos", files={name: (None, str(value)) for name, value in fields.items()})
    assert answer.status_code == 200, answer.text
    video = done(http, answer.json()["id"])
    assert (video["seed"], video["num_frames"], video["size"], video["seconds"]) == (2**64 - 1, 6, "32x32", "0.75")
    content = http.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert decoded(content.content).shape == (6, 32, 32, 3)


@pytest.mark.parametrize(
    ("given", "frames"),
    [({}, 32), ({"seconds": 1}, 8), ({"seconds": "1.5"}, 12), ({"seconds": 0.01}, 1), ({"num_frames": "3"}, 3)],
)
def test_length(http: httpx.Client, given: dict[str, Any], frames: int) -> None:
    video = http.post("/v1/videos", json={"prompt": RED, **given}).json()
    assert (video["num_frames"], float(video["seconds"]), video["notes"]) == (frames, frames / 8, [])


def test_a_seed_is_drawn_and_told(http: httpx.Client) -> None:
    seeds = {http.post("/v1/videos", json={"prompt": RED, "num_frames": 1}).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_what_changes_nothing_is_told(http: httpx.Client) -> None:
    asked = {
        "prompt": RED, "num_frames": 1, "seconds": 4, "num_inference_steps": 40, "guidance_scale": 5.5,
        "negative_prompt": "ugly", "flow_shift": 3, "user": "me",
    }  # fmt: skip
    video = http.post("/v1/videos", json=asked).json()
    assert video["notes"] == [
        "num_inference_steps: got 40, ignored: the model takes 4 steps",
        "guidance_scale: got 5.5, ignored: the model was distilled with its own",
        "negative_prompt: got a text, ignored: a distilled model has no negative prompt",
        "ignored, as this server does not know it: 'flow_shift', 'user'",
        "seconds: got 4, ignored: num_frames is 1",
    ]
    same = {"prompt": RED, "num_frames": 8, "seconds": "1", "num_inference_steps": 4, "guidance_scale": 1.0,
            "negative_prompt": ""}  # fmt: skip
    assert http.post("/v1/videos", json=same).json()["notes"] == []


def test_a_prompt_that_is_too_long_is_told(http: httpx.Client) -> None:
    video = http.post("/v1/videos", json={"prompt": f"{RED} " * 300, "num_frames": 1}).json()
    assert any("tokens" in note for note in done(http, video["id"])["notes"])


BAD = [
    ({"prompt": None}, "prompt: got None, expected: "),
    ({"prompt": 7}, "prompt: got 7, expected: "),
    ({"prompt": ["a"]}, "prompt: got ['a'], expected: "),
    ({"prompt": " "}, "prompt: got an empty text, expected words"),
    ({"prompt": "a\0"}, "prompt: got a NUL character, expected text"),
    ({"prompt": "x" * 20_001}, "prompt: got 'xxx"),
    ({"model": "sora-2"}, "model: got 'sora-2', expected 'sprites'"),
    ({"model": 3}, "model: got 3, expected: "),
    ({"seconds": "long"}, "seconds: got 'long', expected: "),
    ({"seconds": 0}, "seconds: got 0, expected: "),
    ({"seconds": "-1"}, "seconds: got '-1', expected: "),
    ({"seconds": 61, "num_frames": None}, "seconds: got 61, expected at most 60"),
    ({"seconds": "1e400"}, "seconds: got '1e400', expected: "),
    ({"seconds": True}, "seconds: got True, expected: "),
    ({"seconds": [1]}, "seconds: got [1], expected: "),
    ({"size": "1280x720"}, "size: got '1280x720', expected 32x32 or 128x128: the model is loaded for one size"),
    ({"size": "32"}, "size: got '32', expected 32x32 or 128x128"),
    ({"size": "32X32"}, "size: got '32X32', expected 32x32 or 128x128"),
    ({"size": "32x128"}, "size: got '32x128', expected 32x32 or 128x128"),
    ({"size": 32}, "size: got 32, expected: "),
    ({"width": 33}, "size: got 33xany, expected 32x32 or 128x128"),
    ({"width": 32, "height": 128}, "size: got 32x128, expected 32x32 or 128x128"),
    ({"size": "32x32", "height": 128}, "size: got '32x32' and anyx128, expected 32x32 or 128x128"),
    ({"fps": 24}, "fps: got 24, expected 8, the model's own"),
    ({"fps": "fast"}, "fps: got 'fast', expected: "),
    ({"num_frames": 0}, "num_frames: got 0, expected: "),
    ({"num_frames": 1.5}, "num_frames: got 1.5, expected: "),
    ({"num_frames": 481}, "num_frames: got 481, expected at most 480"),
    ({"num_frames": 2**60}, "num_frames: got 1152921504606846976, expected: "),
    ({"seed": -1}, "seed: got -1, expected: "),
    ({"seed": 2**64}, "seed: got 18446744073709551616, expected: "),
    ({"seed": "one"}, "seed: got 'one', expected: "),
    ({"seed": False}, "seed: got False, expected: "),
    ({"adapters": {"style": 1}}, "adapters: got the name 'style', expected none: this model has no adapters"),
    ({"adapters": "style"}, "adapters: got 'style', expected: "),
    ({"adapters": {"style": "much"}}, "adapters.style: got 'much', expected: "),
    ({"num_inference_steps": 0}, "num_inference_steps: got 0, expected: "),
    ({"num_inference_steps": "many"}, "num_inference_steps: got 'many', expected: "),
    ({"guidance_scale": "high"}, "guidance_scale: got 'high', expected: "),
    ({"negative_prompt": 5}, "negative_prompt: got 5, expected: "),
    ({"input_reference": "https://example.org/a.png"}, "input_reference: got an address, expected a file or "),
    ({"input_reference": "not base64!"}, "input_reference: got text that is no base64, expected "),
    ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference: got a file, expected a readable picture"),
    ({"input_reference": {"file_id": "file-1"}}, "input_reference: got 'file_id', expected image_url with a data URL"),
    ({"input_reference": {"a\nb": 1}}, "input_reference: got 'a\\nb', expected image_url with a data URL"),
    ({"adapters": {"a" * 5000: "much"}}, f"adapters.{'a' * 60}: got 'much', expected: "),
    ({"input_reference": {"image_url": 1}}, "input_reference: got 'image_url', expected image_url with a data URL"),
    ({"input_reference": 5}, "input_reference: got int, expected a file, a data URL or an object"),
    ({"image": "data:image/png;base64,AAAA"}, "image: got it, expected a start picture as input_reference"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[f"{next(iter(f))}-{n}" for n, (f, _) in enumerate(BAD)])
def test_bad_fields(http: httpx.Client, host: Server, fields: dict[str, Any], message: str) -> None:
    told = error_of(http.post("/v1/videos", json={"prompt": RED, "num_frames": 1} | fields), 400)
    assert told.removeprefix("video: ").startswith(message), told
    assert "expected" in told
    assert "\n" not in told
    assert host.jobs.all() == []


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"", "application/json", 400, "body: got no JSON, expected an object"),
        (b"{", "application/json", 400, "body: got no JSON, expected an object"),
        (b"[]", "application/json", 400, "body: got list, expected an object"),
        (b"[" * 100_000, "application/json", 400, "body: got no JSON, expected an object"),
        (b'{"seed": ' + b"1" * 10_000 + b"}", "application/json", 400, "body: got no JSON, expected an object"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "video: prompt: got '\\ud800', expected: "),
        (b'{"prompt": "a", "seconds": NaN}', "application/json", 400, "video: seconds: got nan, expected: "),
        (b"\xff\xfe", "application/json", 400, "body: got no JSON, expected an object"),
        (b"{}", "application/json", 400, "video: prompt: got nothing, expected: "),
        (b"prompt=a", "text/plain", 415, "content-type: got 'text/plain', expected application/json or multipart"),
        (b"prompt=a", "", 415, "content-type: got '', expected application/json or multipart"),
        (b"junk", "multipart/form-data", 400, "POST /v1/videos: Missing boundary in multipart."),
        (b"junk", "multipart/form-data; boundary=x", 400, ""),
    ],
)  # fmt: skip
def test_bad_bodies(http: httpx.Client, body: bytes, kind: str, status: int, message: str) -> None:
    told = error_of(http.post("/v1/videos", content=body, headers={"content-type": kind}), status)
    assert told.startswith(message), told


def test_bad_files(http: httpx.Client, host: Server) -> None:
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + png(1)[24:29]
    bomb = png(1)[:12] + header + struct.pack(">I", zlib.crc32(header)) + png(1)[33:]
    for content, message in [
        (b"no picture", "input_reference: got a file, expected a readable picture (it is no picture)"),
        (png(1)[:60], "input_reference: got a file, expected a readable picture ("),
        (bomb, "input_reference: got a file of 400 megapixels, expected at most 179 megapixels"),
    ]:
        files = {"input_reference": ("../../etc/passwd", content, "image/png")}
        told = error_of(http.post("/v1/videos", data={"prompt": RED}, files=files), 400)
        assert told.startswith(message), told
    empty = http.post("/v1/videos", data={"prompt": RED, "num_frames": "1"}, files={"input_reference": ("", b"")})
    assert empty.status_code == 200, empty.text  # a browser's form without a file


def test_objects_in_forms(http: httpx.Client) -> None:
    for name, value in (("adapters[style]", "0.5"), ("adapters", '{"style": 0.5}')):
        told = error_of(http.post("/v1/videos", data={"prompt": RED, name: value}), 400)
        assert told == "adapters: got the name 'style', expected none: this model has no adapters"


def test_figures(http: httpx.Client) -> None:
    done(http, http.post("/v1/videos", json={"prompt": RED, "num_frames": 1}).json()["id"])
    figures = http.get("/metrics").text.splitlines()
    assert {"greedy_jobs 0.0", "greedy_jobs_waiting 0.0", "greedy_viewers 0.0"} <= set(figures)
    (ended,) = [line for line in figures if line.startswith('greedy_jobs_ended_total{status="completed"}')]
    assert float(ended.split()[-1]) >= 1


# --- content


def test_ranges(http: httpx.Client) -> None:
    name = done(http, http.post("/v1/videos", json={"prompt": RED, "num_frames": 5}).json()["id"])["id"]
    place = f"/v1/videos/{name}/content"
    whole = http.get(place)
    data, size = whole.content, len(whole.content)
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-disposition"] == f'attachment; filename="{name}.mp4"'
    for asked, expected in [("bytes=0-0", data[:1]), ("bytes=10-19", data[10:20]), (f"bytes={size - 5}-", data[-5:]),
                            ("bytes=-7", data[-7:]), (f"bytes=3-{size * 2}", data[3:])]:  # fmt: skip
        part = http.get(place, headers={"range": asked})
        assert (part.status_code, part.content) == (206, expected), asked
        assert part.headers["content-range"].endswith(f"/{size}")
    assert http.get(place, headers={"range": f"bytes={size}-"}).status_code == 416
    head = http.head(place)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")
    assert error_of(http.get(f"{place}?variant=thumbnail"), 400).startswith("variant: got 'thumbnail', expected ")


def test_there_is_no_content_before_the_end(http: httpx.Client) -> None:
    name = http.post("/v1/videos", json={"prompt": RED, "num_frames": 480}).json()["id"]
    told = error_of(http.get(f"/v1/videos/{name}/content"), 404)
    assert told in {f"video: got one that is {status}, expected completed" for status in ("queued", "in_progress")}
    for place in ("/v1/videos/..%2flock", "/v1/videos/%2e%2e", "/v1/videos/video_x/content"):
        assert http.get(place).status_code == 404


def test_deleting_cancels_within_a_chunk(http: httpx.Client, host: Server) -> None:
    name = http.post("/v1/videos", json={"prompt": RED, "num_frames": 480}).json()["id"]
    until(lambda: http.get(f"/v1/videos/{name}").json().get("progress", 0) > 0)
    (session,) = host.house._jobs
    assert http.delete(f"/v1/videos/{name}").json() == {"id": name, "object": "video.deleted", "deleted": True}
    made = session.chunks
    until(lambda: not host.jobs.running and not host.house._jobs)
    assert session.reason == "stopped"
    assert session.chunks <= made + 1


# --- sync


def test_sync_answers_with_the_video_and_forgets_it(http: httpx.Client, sprites: Pipeline, host: Server) -> None:
    answer = http.post("/v1/videos/sync", json={"prompt": RED, "seed": 4, "num_frames": 9})
    assert answer.headers["content-type"] == "video/mp4"
    assert_shows(answer.content, plain(sprites, 4, 9), 4)
    until(lambda: host.jobs.all() == [])
    told = error_of(http.post("/v1/videos/sync", json={"prompt": RED, "size": "1x1"}), 400)
    assert told.startswith("size: got '1x1', expected ")


def test_sync_ends_when_its_client_leaves(http: httpx.Client, host: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/videos/sync", json={"prompt": RED, "num_frames": 480}, timeout=0.5)
    until(lambda: host.jobs.all() == [] and not host.jobs.running and not host.house._jobs)


def test_sync_tells_of_a_failure(http: httpx.Client, host: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/a/path")

    monkeypatch.setattr("serve.core.jobs.open_sink", full)
    told = error_of(http.post("/v1/videos/sync", json={"prompt": RED, "num_frames": 1}), 500)
    assert told == "the video was not written: No space left on device"
    until(lambda: host.jobs.all() == [])


def test_a_failed_job_tells_why(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.core.jobs.open_sink", lambda *_: (_ for _ in ()).throw(MemoryError()))
    video = done(http, http.post("/v1/videos", json={"prompt": RED, "num_frames": 1}).json()["id"])
    assert video["status"] == "failed"
    assert video["error"] == {
        "code": "out_of_memory",
        "message": "the video stopped: the server has too little memory for it",
    }
    told = error_of(http.get(f"/v1/videos/{video['id']}/content"), 404)
    assert told == "video: got one that is failed, expected completed"


def test_a_full_disk_takes_no_job(http: httpx.Client, host: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "save", full)
    told = error_of(http.post("/v1/videos", json={"prompt": RED, "num_frames": 1}), 507)
    assert told == "jobs: got No space left on device, expected room on the server's disk"
    assert host.jobs.all() == []


# --- keys, sizes, tokens


def test_idempotency_keys(http: httpx.Client) -> None:
    body, picture = {"prompt": RED, "num_frames": 1}, png(2)
    first = http.post("/v1/videos", json=body, headers={"Idempotency-Key": "k1"}).json()
    again = http.post("/v1/videos", json=body, headers={"Idempotency-Key": "k1"}).json()
    form = http.post("/v1/videos", data=body, headers={"Idempotency-Key": "k1"}).json()
    assert first["id"] == again["id"] == form["id"]
    assert first["seed"] == again["seed"]
    for other in ({"prompt": RED, "num_frames": 2}, body | {"seed": first["seed"]}):
        told = error_of(http.post("/v1/videos", json=other, headers={"Idempotency-Key": "k1"}), 409)
        assert told.startswith("Idempotency-Key: got 'k1' with another request before, expected ")
    sent = [
        http.post("/v1/videos", data=body, files={"input_reference": ("a", one)}, headers={"Idempotency-Key": "k2"})
        for one in (picture, picture, png(3))
    ]
    assert [answer.status_code for answer in sent] == [200, 200, 409]
    assert len({answer.json()["id"] for answer in sent[:2]} | {first["id"]}) == 2
    long = http.post("/v1/videos", json=body, headers={"Idempotency-Key": "x" * 256})
    assert error_of(long, 400) == "Idempotency-Key: got 256 characters, expected at most 255"


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_an_upload_that_is_too_large_is_refused_and_not_kept(http: httpx.Client, length: bool, kind: str) -> None:
    piece = b" " * MB
    head = b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
    process, sizes = psutil.Process(), []

    def sent() -> Iterator[bytes]:
        yield head if "multipart" in kind else b"{"
        for _ in range(200):
            sizes.append(process.memory_info().rss)
            yield piece

    total = 200 * MB + (len(head) if "multipart" in kind else 1)
    headers = {"content-type": kind} | ({"content-length": str(total)} if length else {})
    told = error_of(http.post("/v1/videos", content=sent(), headers=headers), 413)
    assert told.startswith("body: got ")
    assert max(sizes) - sizes[0] < 40 * MB
    assert http.get("/health").status_code == 200


def test_a_token_guards_every_route_and_a_rate_the_starts(host: Server) -> None:
    with app_on_a_thread(make_app(with_network(host, token="a long token", rate=2))) as url:
        for method, place in itertools.product(("GET", "DELETE"), ("", "/x", "/x/content")):
            assert httpx.request(method, f"{url}/v1/videos{place}").status_code == 401
        for place in ("", "/sync"):
            assert httpx.post(f"{url}/v1/videos{place}", json={}).status_code == 401
        assert openai.OpenAI(api_key="a long token", base_url=f"{url}/v1").videos.list().data == []
        headers = {"authorization": "Bearer a long token"}
        answers = [httpx.post(f"{url}/v1/videos", json={}, headers=headers) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [400, 400, 429]
        assert error_of(answers[2], 429) == "got too many starts from one address"


def with_network(host: Server, **changed: Any) -> Server:
    """A server with another network, and jobs and sessions of its own: they end with it."""
    house = House(host.pipeline, host.house.room, host.house.limits, host.house.scale, 1)
    jobs = Jobs(house, Store(None), host.name, 1, 1, 3600.0)
    return replace(host, house=house, jobs=jobs, network=replace(host.network, **changed), metrics=Metrics())


# --- a server that is killed


def start(folder: Path, log: Path) -> Served:
    return start_server("--jobs-dir", folder, "--sessions", 2, "--rate", 1000, log=log)


@pytest.mark.slow
def test_a_server_that_is_killed_loses_no_job(sprites: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    asked = {"done": (1, 5), "running": (2, 49), "waiting": (3, 9)}  # seed, frames
    first = start(folder, tmp_path / "log1")
    try:
        with httpx.Client(base_url=first.url, timeout=WITHIN) as http:
            names = {
                what: http.post("/v1/videos", json={"prompt": RED, "seed": seed, "num_frames": frames}).json()["id"]
                for what, (seed, frames) in asked.items()
            }
            done(http, names["done"])
            before = http.get(f"/v1/videos/{names['done']}").json()
            video = http.get(f"/v1/videos/{names['done']}/content").content
            until(lambda: http.get(f"/v1/videos/{names['running']}").json()["progress"] > 0)
    finally:
        first.kill()
    left = {what: json.loads((folder / name / "job.json").read_text()) for what, name in names.items()}
    states = {what: (job["status"], job["tries"]) for what, job in left.items()}
    assert states == {"done": ("completed", 1), "running": ("in_progress", 1), "waiting": ("queued", 0)}
    second = start(folder, tmp_path / "log2")
    try:
        with httpx.Client(base_url=second.url, timeout=WITHIN) as http:
            listed = http.get("/v1/videos?order=asc").json()["data"]
            assert [job["id"] for job in listed] == list(names.values())
            assert http.get(f"/v1/videos/{names['done']}").json() == before
            assert http.get(f"/v1/videos/{names['done']}/content").content == video
            for what in ("running", "waiting"):
                seed, frames = asked[what]
                assert done(http, names[what])["status"] == "completed"
                content = http.get(f"/v1/videos/{names[what]}/content").content
                assert_shows(content, plain(sprites, seed, frames), 4)
            last = http.post("/v1/videos", json={"prompt": RED, "num_frames": 800}).json()["id"]
            until(lambda: http.get(f"/v1/videos/{last}").json()["progress"] > 0)
    finally:
        second.stop()
    assert not [file for file in folder.rglob("*") if ".part" in file.name]
    kept = json.loads((folder / last / "job.json").read_text())
    assert (kept["status"], kept["tries"]) == ("queued", 0)  # a signal is no failure


def test_two_servers_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Store(tmp_path)
    try:
        assert main(["--port", "0", "--jobs-dir", str(tmp_path)]) == 2
    finally:
        held.close()
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        f"error: --jobs-dir: got {tmp_path}, which another server uses, expected a folder of this server's own"
    ]
