"""bench serve: the simulated player's arithmetic, the figures, and the whole command beside a server."""

import asyncio
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main, parse
from bench.report import page
from bench.serving import exact, load
from bench.serving.figures import figures
from bench.serving.jobs import VIDEO_SECONDS
from bench.serving.overhead import overhead
from bench.serving.playback import Arrival, Playback, played, realtime_factor
from bench.serving.process import running, started
from bench.serving.sockets import CHUNK, Socket, opened
from bench.serving.viewers import Plan, Seen


def arrivals(*times, frames=4):
    """A first chunk of one frame at 10 s, and others of four frames."""
    return [Arrival(10.0, 1), *(Arrival(at, frames) for at in times)]


# At 8 frames a second, 250 ms after the first chunk: the chunks are due at 10.25, 10.375, 10.875, 11.375.
@pytest.mark.parametrize(
    ("times", "shown", "stood"),
    [
        ((10.3, 10.8, 11.3), [10.25, 10.375, 10.875, 11.375], [0, 0, 0, 0]),
        ((10.375, 10.875, 11.375), [10.25, 10.375, 10.875, 11.375], [0, 0, 0, 0]),  # at the last moment
        ((10.3, 11.0, 11.3), [10.25, 10.375, 11.0, 11.5], [0, 0, 0.125, 0]),  # a late one moves the next
        ((10.5, 11.125, 11.875), [10.25, 10.5, 11.125, 11.875], [0, 0.125, 0.125, 0.25]),
        ((10.0, 10.0, 10.0), [10.25, 10.375, 10.875, 11.375], [0, 0, 0, 0]),  # all at once
    ],
)
def test_a_player_shows_chunks_in_time_or_stands(times, shown, stood):
    found = played(arrivals(*times), 8.0, 0.25)
    assert found.shown == shown
    assert found.stood == stood
    assert (found.deadlines, found.underruns) == (3, sum(seconds > 0 for seconds in stood))
    assert found.seconds_stood == sum(stood)


def test_a_player_of_nothing_and_of_one_chunk():
    assert played([], 8.0, 0.25) == Playback([], [])
    one = played(arrivals(), 8.0, 0.0)
    assert (one.shown, one.deadlines, one.underruns) == ([10.0], 0, 0)


def test_real_time_is_video_over_time():
    assert realtime_factor(arrivals(10.125, 10.625, 11.125), 8.0) == 1.0  # 9 frames in 1.125 s
    assert realtime_factor(arrivals(10.25, 11.25, 12.25), 8.0) == 0.5
    assert realtime_factor(arrivals(), 8.0) is None
    assert realtime_factor(arrivals(10.0), 8.0) is None


def seen(number=0, asked=9.75, transport="socket", **more):
    return Seen(Plan(number, ["a"], number, 8.0), transport, asked, **more)


def test_figures_of_viewers_by_hand():
    one = seen(arrivals=arrivals(10.375, 11.0, 11.5), spent_ms=[10.0, 20.0, 30.0, 40.0], bytes=1_000_000)
    one.sent, one.shows = {"a": 10.25, "b": 11.25}, {"a": 2}
    two = seen(1, arrivals=arrivals(10.375, 10.875, 11.375), spent_ms=[10.0] * 4, bytes=1_000_000, waited=True)
    rest = [seen(2, refused="busy"), seen(3, failed="gone"), seen(4, transport="jobs", arrivals=[Arrival(11.75, 32)])]
    found = figures([one, two, *rest], 0.25, 10.0, 14.0)
    assert (found["viewers"], found["started"], found["waited"], found["refused"]) == (5, 3, 1, 1)
    assert found["failed"] == ["gone"]
    assert found["first_chunk_ms"]["p50"] == 250.0
    assert found["first_chunk_ms"]["max"] == 250.0
    assert found["gap_ms"]["max"] == 625.0
    assert found["gap_ms"]["p50"] == 500.0
    assert found["deadlines"] == 6
    assert found["deadlines_met"] == 1 - 1 / 6  # the chunk at 11.0 was due at 10.875; the next one then at 11.5
    assert (found["underruns"], found["underrun_seconds"]) == (1, 0.125)
    assert found["switch_arrives_ms"]["p50"] == 750.0
    assert found["switch_shows_ms"]["p50"] == 750.0
    assert (found["switches"], found["switches_lost"]) == (2, 0)  # the second one is too young to count
    assert found["realtime"] == pytest.approx((0.75 + 9 / 8 / 1.375) / 2, abs=0.1)
    assert found["frames"] == 13 + 13 + 32
    assert found["fps"] == 58 / 4
    assert found["mbit_per_second"] == 4.0
    assert found["session_seconds"] == 1.75 + 1.625 + 2.0
    assert found["quartiles"]["gap_ms"]["samples"] == 6


def test_first_chunks_and_gaps_are_of_one_transport():
    """A frame of a track is not a chunk of a socket, and a job's video comes at once."""
    track = [Arrival(10.0 + number / 8, 1) for number in range(9)]
    all_kinds = [seen(arrivals=arrivals(10.375)), seen(1, arrivals=track, transport="webrtc"),
                 seen(2, arrivals=[Arrival(11.75, 32)], transport="jobs")]  # fmt: skip
    gaps, first = {"socket": 375.0, "webrtc": 125.0, "jobs": None}, {"socket": 250.0, "webrtc": 250.0, "jobs": 2000.0}
    for transport, gap in gaps.items():
        found = figures(all_kinds, 0.25, 10.0, 14.0, transport)
        assert found["first_chunk_ms"]["max"] == first[transport]
        assert (found["gap_ms"] and found["gap_ms"]["max"]) == gap
        assert (found["deadlines"], found["deadlines_met"], found["mbit_per_second"]) == (9, 1.0, None)


def test_a_switch_that_never_shows_is_lost():
    one = seen(arrivals=arrivals(*np.arange(10.5, 20.5, 0.5)), sent={"old": 10.5, "new": 19.0})
    found = figures([one], 0.1, 10.0, 20.0)
    assert (found["switches"], found["switches_lost"], found["switch_shows_ms"]) == (2, 1, None)


def test_numbers_of_viewers():
    assert load.numbers(None, 1) == [1, 3]
    assert load.numbers(None, 6) == [1, 2, 4, 6, 8]
    assert load.numbers(None, 16) == [1, 2, 4, 8, 16, 18]
    assert load.numbers("3,1", 9) == [3, 1]
    for text in ("", "0", "1,x", "1,-2", "1001"):
        with pytest.raises(ValueError, match="expected numbers such as 1,2,4"):
            load.numbers(text, 1)


def test_frames_are_compared_with_the_engine(monkeypatch):
    """A viewer with other frames anywhere is found out, also where the longest video is right."""
    sums = {1: "a", 5: "b", 9: "c", 13: "d"}
    asked = []
    monkeypatch.setattr(exact, "checksum", lambda model, prompt, seed, frames: asked.append(frames) or sums[frames])

    def viewer(**wrong):
        digests = {frames: wrong.get(f"at{frames}", one) for frames, one in sums.items() if frames <= wrong["most"]}
        return seen(arrivals=[Arrival(0.0, 1), *[Arrival(1.0, 4)] * (len(digests) - 1)], digests=digests)

    longest, right, late, early = viewer(most=13), viewer(most=9), viewer(most=9, at9="x"), viewer(most=9, at1="x")
    short = viewer(most=1)
    found = exact.compared([], {"1": right, "2": longest, "3": late, "4": early, "5": short})
    assert [one.passed for one in found] == [True, True, False, False, False]
    assert "expected at least 5" in found[4].detail
    assert asked == [13]
    assert not any(one.passed for one in exact.compared([], {"1": right, "2": viewer(most=13, at13="x")}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "expected up to 3600 seconds"),
        (["--frames", "1"], "at least 5 frames"),
        (["--attempts", "0"], "--attempts: got 0"),
        (["--url", "http://127.0.0.1:1", "--chaos"], "--chaos: got --url as well"),
        (["--url", "127.0.0.1:1"], "expected http://HOST:PORT"),
        (["--url", "http://127.0.0.1:1"], "refused"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert len(said.err.splitlines()) == 1
    assert message in said.err


@pytest.fixture(scope="module")
def address(pipeline):
    """A server of the tiny pipeline: two live sessions, one may wait."""
    from serving import app_on_a_thread

    from serve.build import make_server
    from serve.options import Network, Sessions
    from serve.web.app import make_app

    made = make_server(pipeline, "tiny", Network(rate=100_000), Sessions(sessions=2, waiting=1, lease=10.0))
    with app_on_a_thread(make_app(made)) as url:
        yield url


@pytest.mark.slow
def test_viewers_of_a_server(address, model_dir, tmp_path, capsys):
    """Two viewers hold their rate; of four, one waits and one is refused. Frames are the engine's."""
    command = ["serve", "--url", address, "--model", str(model_dir), "--viewers", "2,4", "--seconds", "5"]
    assert main([*command, "--switch", "1", "--save", "--results", str(tmp_path)]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert all(check["passed"] for check in report["checks"])
    assert [check["name"] for check in report["checks"] if "engine" in check["name"]] == [
        "frames under 2 viewers are the engine's", "frames under 4 viewers are the engine's",
    ]  # fmt: skip
    few, many = report["points"]
    for point in report["points"]:
        assert point["started"] == 2
        assert point["frames"] >= 2 * 13
        assert 0 < point["first_chunk_ms"]["p50"] < 5000
        assert 100 < point["gap_ms"]["p50"] < 1500  # four frames at 8 a second
        assert 0 <= point["deadlines_met"] <= 1
        assert point["deadlines"] >= 6
        assert (point["underruns"] == 0) == (point["underrun_seconds"] == 0) == (point["deadlines_met"] == 1)
        assert 0.3 < point["realtime_slowest"] <= point["realtime"] < 1.5
        assert 0 < point["cpu_per_session_second"] < 10
        assert point["memory_mb"]["most"] >= point["memory_mb"]["before"] > 50
        assert 3 < point["fps"] < 24  # 16, and a chunk more of each at the end of five seconds
    assert (few["waited"], few["refused"], many["waited"], many["refused"]) == (0, 0, 1, 1)
    assert few["switches"] >= 1
    assert 0 < few["switch_arrives_ms"]["p50"] <= few["switch_shows_ms"]["p50"] < 5000
    assert (report["server"]["id"], report["server"]["capacity"], report["server"]["fps"]) == ("tiny", 2, 8.0)
    assert "2 viewers, gap_ms" in report["timings"]
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("serve-cpu-")
    assert json.loads(file.read_text()) == report
    assert parse(report["arguments"].split())[1].viewers == "2,4"
    text = page.page(tmp_path, {})
    assert "## Serving over a socket" in text
    assert "The server of `tiny` (24x16, 8 fps, 4 frames a chunk) holds 2 live sessions here." in text
    assert "\n| 2 | socket | 2 | 0 | 0 |" in text
    assert "\n| 4 | socket | 2 | 1 | 1 |" in text


@pytest.mark.slow
def test_a_viewer_gets_the_frames_of_the_pipeline(address, pipeline):
    """The sum of what a viewer got is that of the pipeline's own stream, frame by frame."""
    server = running(address, "")
    found = load.alone(server, load.Load(1.5, 0, 0.1, "a red circle", 5, "socket"))
    assert found.frames >= 5
    with pipeline.stream("a red circle", seed=5) as stream:
        made, hashed = 0, hashlib.sha256()
        while made < found.frames:
            frames = stream.next_chunk()
            made += len(frames)
            hashed.update(np.ascontiguousarray(frames).tobytes())
            assert found.digests[made] == hashed.hexdigest()
    assert server.empty()


@pytest.mark.slow
def test_viewers_over_every_transport(address):
    """A socket with raw frames, WebRTC, and a job, at once."""
    pytest.importorskip("aiortc")
    found, checks, raw = load.point(running(address, ""), load.Load(8, 1, 0.1, "a red circle", 0, "mixed"), 3)
    assert not [check.detail for check in checks if not check.passed]
    assert (found["started"], found["refused"]) == (3, 0)
    assert found["frames"] >= raw.frames + 4 + 8 * VIDEO_SECONDS  # of the track a few, of the job all
    assert found["switches"] >= 1  # the WebRTC viewer's: raw frames keep their prompt, a job has one
    assert 0 < found["switch_arrives_ms"]["p50"] < 8000
    assert found["deadlines"] >= len(raw.arrivals) - 1 + 4


@pytest.mark.thorough
def test_serving_beside_the_plain_loop():
    """Every figure is there. A busy machine says nothing about the ratio; a copy of each frame more would not hide."""
    found = overhead([], "a red circle moving right slowly on a gray background", 3, 81, 2)
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows) == ["plain", "rgb", "m4s"]
    for row in rows.values():
        assert row["cpu_ms"]["cpu"] > 0
        assert row["cpu_ms"]["video"] <= row["cpu_ms"]["cpu"] + 20 / 21
    for name in ("rgb", "m4s"):
        assert 0.5 < rows[name]["ratio"]["median"] < 2
        assert rows[name]["cpu_ms"]["video"] > 0.5 * rows["plain"]["cpu_ms"]["cpu"]
        assert 0 < rows[name]["beside"] < 0.2  # of one process, so other programs matter less
    assert rows["rgb"]["beside"] < rows["m4s"]["beside"]


@pytest.mark.thorough
def test_a_server_of_its_own(capsys):
    """The whole command: it starts a server, ends it, and leaves no process."""
    command = ["serve", "--viewers", "1", "--sessions", "1", "--seconds", "2", "--rounds", "0", "--json"]
    assert main(command) == 0, capsys.readouterr()
    report = json.loads(capsys.readouterr().out)
    assert report["points"][0]["started"] == 1
    assert report["server"]["id"] == "sprites"
    with started(["--port", "0", "--sessions", "1"]) as server:
        process = server.process
        assert asyncio.run(extensions(server)) == []  # no deflate: video is compressed already
        with pytest.raises(ValueError, match="expected a free address"), started(["--port", server.url.split(":")[-1]]):
            pass
    time.sleep(0.1)
    assert not process.is_running()


async def extensions(server):
    async with opened(server) as socket:
        return socket.connection.protocol.extensions


def test_the_page_names_each_transport():
    text = Path(page.__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in (*load.TRANSPORTS, "mixed"))


class Slow:
    """A connection whose messages come one by one from a queue."""

    def __init__(self):
        self.queue = asyncio.Queue()

    async def recv(self):
        return await self.queue.get()


def test_a_call_that_ends_between_a_chunks_message_and_its_bytes_loses_neither():
    """A viewer leaves at any moment, and then waits for the session's last message."""

    async def scene():
        slow = Slow()
        socket = Socket(slow)
        slow.queue.put_nowait(json.dumps({"type": CHUNK, "byte_length": 3}))
        with pytest.raises(TimeoutError):
            await socket.until("session.done", within=0.05)
        slow.queue.put_nowait(b"abc")
        slow.queue.put_nowait(json.dumps({"type": "session.done"}))
        first, last = await socket.receive(), await socket.receive()
        slow.queue.put_nowait(b"abc")
        with pytest.raises(RuntimeError, match="got 3 bytes without a message before them"):
            await socket.receive()
        return first, last

    assert asyncio.run(scene()) == (({"type": CHUNK, "byte_length": 3}, b"abc"), ({"type": "session.done"}, b""))
