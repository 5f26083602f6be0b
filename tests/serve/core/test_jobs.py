"""The queue of jobs and their folder, without a web."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from engine.media.sinks import open_sink
from engine.stream import Pipeline
from serve.core import house as house_module
from serve.core import jobs as jobs_module
from serve.core.encoders import enlarged
from serve.core.house import Busy, House, Room
from serve.core.job_store import Job, Store, new_id
from serve.core.jobs import Conflict, Jobs
from serve.core.messages import Chunk, Wish
from serve.core.session import Limits
from serve.core.viewers import Viewer

RED = "a red circle moving right slowly on a gray background"
BLUE = "a blue square moving up quickly on a white background"
WITHIN = 300.0  # seconds; only a hang reaches it
FOREVER = 400  # frames; more than any test waits for


class Watched:
    """A pipeline that tells which streams do what, in order, and fails where a test wants it to."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.chunks: list[int] = []  # the seed of each chunk's stream
        self.faults: dict[int, Exception] = {}  # by seed, raised at the second chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def stream(self, prompt: Any, *, seed: int = 0, **options: Any) -> Any:
        stream = self._pipeline.stream(prompt, seed=seed, **options)
        make = stream.next_chunk

        def next_chunk() -> np.ndarray:
            self.chunks.append(seed)
            if seed in self.faults and self.chunks.count(seed) > 1:
                raise self.faults[seed]
            return make()

        stream.next_chunk = next_chunk
        return stream


@contextmanager
def opened(
    pipeline: Any, folder: Path | None = None, workers: int = 1, waiting: int = 100, keep: float = 3600.0,
    limits: Limits | None = None, on_end: Callable[[Job], None] = lambda job: None,
) -> Iterator[Jobs]:  # fmt: skip
    house = House(pipeline, Room(4), limits or Limits(), scale=4, parallel=1)
    jobs = Jobs(house, Store(folder), "sprites", workers, waiting, keep, on_end)
    try:
        yield jobs
    finally:
        jobs.close(WITHIN)
        house.close(WITHIN)


def order(frames: int = 9, seed: int = 1, prompt: str = RED, **more: Any) -> Job:
    return Job(new_id(), "sprites", 32, 32, 8.0, prompt, seed, frames, **more)


def until(holds: Callable[[], Any]) -> Any:
    """Wait for something to hold."""
    end = time.monotonic() + WITHIN
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)
    return found


def ended(jobs: Jobs, job: Job) -> Job:
    return until(lambda: (now := jobs.get(job.id)) and now.status in ("completed", "failed") and now)


def begun(jobs: Jobs, job: Job) -> None:
    """Wait until some of its frames are written."""
    until(lambda: (now := jobs.get(job.id)) and now.status == "in_progress" and jobs.progress(now) > 0)


def plain(pipeline: Pipeline, job: Job, clip: np.ndarray | None = None) -> np.ndarray:
    """The frames [T, H, W, 3] of the engine alone."""
    with pipeline.stream(job.prompt, seed=job.seed, frames=job.frames, clip=clip) as stream:
        return np.stack(list(stream))


def frames_in(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def house_of(jobs: Jobs) -> House:
    return jobs._house


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """The frames that sinks are given, by the name of their job."""
    found: dict[str, list[np.ndarray]] = {}

    def opening(target: Path, *about: Any) -> Any:
        sink = open_sink(target, *about)
        write = sink.write

        def spied(frame: np.ndarray) -> None:
            found.setdefault(target.parent.name, []).append(frame.copy())
            write(frame)

        sink.write = spied  # type: ignore[method-assign]
        return sink

    monkeypatch.setattr(jobs_module, "open_sink", opening)
    return found


# --- frames


@pytest.mark.parametrize("frames", [1, 4, 5, 12])
def test_frames_of_a_job_are_those_of_a_plain_stream(
    sprites: Pipeline, written: dict[str, list[np.ndarray]], frames: int
) -> None:
    with opened(sprites) as jobs:
        job = ended(jobs, jobs.submit(order(frames, seed=2**64 - 1 - frames)))
        assert (job.status, job.error, jobs.progress(job)) == ("completed", "", 100)
        assert np.array_equal(np.stack(written[job.id]), plain(sprites, job))
        shown = frames_in(jobs.video(job))
        assert shown.shape == (frames, 32, 32, 3)


def test_a_job_that_starts_from_a_picture(sprites: Pipeline, written: dict[str, list[np.ndarray]]) -> None:
    clip = plain(sprites, order(1, seed=5, prompt=BLUE))
    with opened(sprites) as jobs:
        job = ended(jobs, jobs.submit(order(9), clip))
        assert np.array_equal(np.stack(written[job.id]), plain(sprites, job, clip))
    assert not np.array_equal(plain(sprites, job, clip), plain(sprites, job))


def test_an_enlarged_video_repeats_pixels(sprites: Pipeline) -> None:
    with opened(sprites) as jobs:
        job = ended(jobs, jobs.submit(order(5, scale=4)))
        shown, truth = frames_in(jobs.video(job)), plain(sprites, job)
    assert shown.shape == (5, 128, 128, 3)
    error = np.abs(shown[:, 1::4, 1::4].astype(int) - truth).mean()
    assert error < 4, error


def test_several_jobs_at_once_do_not_mix(sprites: Pipeline, written: dict[str, list[np.ndarray]]) -> None:
    with opened(sprites, workers=3) as jobs:
        made = [jobs.submit(order(9, seed=seed, prompt=prompt)) for seed in (1, 2) for prompt in (RED, BLUE)]
        for job in [ended(jobs, job) for job in made]:
            assert np.array_equal(np.stack(written[job.id]), plain(sprites, job))


def test_progress_grows(sprites: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spied(frames: np.ndarray, scale: int) -> np.ndarray:
        seen.append(jobs.progress(jobs.all()[0]))  # before each chunk is written
        return enlarged(frames, scale)

    monkeypatch.setattr(jobs_module, "enlarged", spied)
    with opened(sprites) as jobs:
        assert jobs.progress(ended(jobs, jobs.submit(order(25)))) == 100
    assert seen == [0, 4, 20, 36, 52, 68, 84]


@pytest.mark.slow
def test_live_sessions_keep_their_frames_and_jobs_too(sprites: Pipeline, written: dict[str, list[np.ndarray]]) -> None:
    with opened(sprites, workers=2) as jobs:
        made = [jobs.submit(order(17, seed=seed)) for seed in (1, 2)]
        viewers = [Viewer(None), Viewer(None)]
        for seed, viewer in enumerate(viewers):
            house_of(jobs).open(Wish(((BLUE, 1.0),), seed, 13, speed=0.0), viewer)
        shown = [np.concatenate(list(chunks_of(viewer))) for viewer in viewers]
        made = [ended(jobs, job) for job in made]
    for seed, frames in enumerate(shown):
        assert np.array_equal(frames, plain(sprites, order(13, seed, BLUE)))
    for job in made:
        assert np.array_equal(np.stack(written[job.id]), plain(sprites, job))


def chunks_of(viewer: Viewer) -> Iterator[np.ndarray]:
    while (item := viewer.take(WITHIN)) is not None:
        if isinstance(item, Chunk):
            yield item.frames
        elif item.kind == "done":
            return
    pytest.fail("the session did not end")


def test_live_sessions_go_first(sprites: Pipeline) -> None:
    """A job waits longer than a live session, and still computes after it."""
    pipeline = Watched(sprites)
    with opened(pipeline) as jobs:
        house, viewer = house_of(jobs), Viewer(None)
        waiting = house.turns._line
        with house.turns.turn(0.0):  # somebody computes meanwhile
            jobs.submit(order(5, seed=1))
            until(lambda: len(waiting) == 1)
            house.open(Wish(((BLUE, 1.0),), 2, 1, speed=0.0), viewer)
            until(lambda: len(waiting) == 2)
            order_of_turns = [deadline for deadline, _ in sorted(waiting)]
        assert order_of_turns[0] < float("inf") == order_of_turns[1]
        until(lambda: 2 in pipeline.chunks)
        list(chunks_of(viewer))


def test_limits_of_live_sessions_do_not_end_a_job(sprites: Pipeline) -> None:
    short = Limits(idle=1e-6, lifetime=1e-6, lease=1e-6, stall=1e-6)
    with opened(sprites, limits=short) as jobs:
        assert ended(jobs, jobs.submit(order(17))).status == "completed"


def test_a_job_has_a_lifetime_of_its_own(sprites: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house_module, "JOB", replace(house_module.JOB, lifetime=2.0))
    with opened(sprites) as jobs:
        job = ended(jobs, jobs.submit(order(10 * FOREVER)))
        assert (job.status, job.error_code) == ("failed", "lifetime")
        assert ended(jobs, jobs.submit(order(1))).status == "completed"


def test_jobs_push_no_live_session_out_of_what_is_kept(sprites: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house_module, "MOST_KEPT", 1)
    with opened(sprites) as jobs:
        viewer = Viewer(None)
        session = house_of(jobs).open(Wish(((RED, 1.0),), 0, 1, speed=0.0), viewer)
        list(chunks_of(viewer))
        for seed in (1, 2):
            ended(jobs, jobs.submit(order(1, seed)))
        assert house_of(jobs).get(session.id) is session
        assert jobs.running == 0
        assert not house_of(jobs)._jobs


# --- order, ends


def test_a_full_queue_refuses(sprites: Pipeline) -> None:
    with opened(sprites, waiting=2) as jobs:
        made = [jobs.submit(order(FOREVER)) for _ in range(3)]
        with pytest.raises(Busy, match=r"^\d jobs run and \d wait: try again later$"):
            jobs.submit(order())
        begun(jobs, made[0])
        assert (jobs.running, jobs.queued) == (1, 2)
        assert jobs.delete(made[2].id)
        jobs.submit(order())


def test_no_place_to_wait_still_lets_one_run(sprites: Pipeline) -> None:
    with opened(sprites, waiting=0) as jobs:
        first = jobs.submit(order(FOREVER))
        with pytest.raises(Busy):
            jobs.submit(order())
        jobs.delete(first.id)
        until(lambda: not jobs.running)
        assert ended(jobs, jobs.submit(order(1))).status == "completed"


def test_deleting_a_running_job_ends_it_within_a_chunk(sprites: Pipeline, tmp_path: Path) -> None:
    pipeline = Watched(sprites)
    with opened(pipeline, tmp_path) as jobs:
        job = jobs.submit(order(FOREVER, seed=7))
        begun(jobs, job)
        assert jobs.delete(job.id)
        made = len(pipeline.chunks)
        assert jobs.get(job.id) is None
        until(lambda: not jobs.running)
        assert len(pipeline.chunks) <= made + 1
        assert not house_of(jobs)._jobs
        assert sorted(file.name for file in tmp_path.iterdir()) == ["lock"]
        assert not jobs.delete(job.id)
        assert ended(jobs, jobs.submit(order(1))).status == "completed"


def test_a_job_is_no_session_that_others_can_join(sprites: Pipeline) -> None:
    with opened(sprites) as jobs:
        job = jobs.submit(order(FOREVER))
        begun(jobs, job)
        house = house_of(jobs)
        (session,) = house._jobs
        assert house.get(session.id) is None
        assert (house.live(), house.running, house.waiting) == ([], 0, 0)


def test_deleting_jobs_that_wait_or_are_done_removes_their_files(sprites: Pipeline, tmp_path: Path) -> None:
    with opened(sprites, tmp_path) as jobs:
        done = ended(jobs, jobs.submit(order(1)))
        jobs.submit(order(FOREVER))
        waiting = jobs.submit(order(1, seed=3))
        assert jobs.video(done).is_file()
        assert jobs.delete(waiting.id)
        assert jobs.delete(done.id)
        assert not jobs.delete("video_" + "0" * 24)
        assert len(list(tmp_path.glob("video_*"))) == len(jobs.all()) == 1


def test_what_has_expired_is_removed(sprites: Pipeline, tmp_path: Path) -> None:
    pipeline = Watched(sprites)
    pipeline.faults[1] = ValueError("a fault")
    told: list[Job] = []
    with opened(pipeline, tmp_path, keep=0.3, on_end=told.append) as jobs:
        good, bad = jobs.submit(order(5, seed=0)), jobs.submit(order(5, seed=1))
        job = until(lambda: told and told[0])
        assert (job.id, job.status) == (good.id, "completed")
        assert job.expires is not None
        assert job.ended is not None
        assert abs(job.expires - job.ended - 0.3) < 1e-3
        until(lambda: jobs.get(good.id) is None)
        ended_or_gone = until(lambda: (now := jobs.get(bad.id)) is None or now.status == "failed")
        assert ended_or_gone
        until(lambda: jobs.all() == [])
        assert sorted(file.name for file in tmp_path.iterdir()) == ["lock"]


# --- failures


class Failing:
    """A sink that fails at one of its calls."""

    def __init__(self, sink: Any, call: str, error: BaseException) -> None:
        self._sink, self._call, self._error = sink, call, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    def write(self, frame: np.ndarray) -> None:
        if self._call == "write" and self._sink.frames >= 2:
            raise self._error
        self._sink.write(frame)

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and self._call == "close":
            self._sink.abort(self._error)
            raise self._error
        self._sink.__exit__(kind, error, trace)


@pytest.mark.parametrize(
    ("call", "error", "code"),
    [
        ("write", OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        ("close", OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        ("write", OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        ("write", OSError(errno.EIO, "Input/output error"), "failed"),
        ("write", MemoryError(), "out_of_memory"),
        ("open", PermissionError(errno.EACCES, "Permission denied", "/secret/place"), "failed"),
    ],
)
def test_a_video_that_cannot_be_written_fails_alone(
    sprites: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception, code: str
) -> None:
    opens = []

    def opening(*about: Any) -> Any:
        opens.append(about)
        if len(opens) > 1:
            return open_sink(*about)
        if call == "open":
            raise error
        return Failing(open_sink(*about), call, error)

    monkeypatch.setattr(jobs_module, "open_sink", opening)
    with opened(sprites, tmp_path) as jobs:
        first, second = jobs.submit(order(9)), jobs.submit(order(5))
        job = ended(jobs, first)
        assert (job.status, job.error_code) == ("failed", code)
        assert job.error
        assert "\n" not in job.error
        assert str(tmp_path) not in job.error
        assert "secret" not in job.error
        assert sorted(file.name for file in (tmp_path / job.id).iterdir()) == ["job.json"]
        assert ended(jobs, second).status == "completed"
        until(lambda: not jobs.running)
        assert not house_of(jobs)._jobs, "a session goes on for nobody"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (ValueError("chunk 1: got NaN\nsecond line"), "failed"),
        (RuntimeError("a fault"), "failed"),
    ],
)
def test_a_stream_that_fails_fails_its_job_alone(sprites: Pipeline, error: Exception, code: str) -> None:
    pipeline = Watched(sprites)
    pipeline.faults[13] = error
    told: list[tuple[str, str]] = []
    with opened(pipeline, on_end=lambda job: told.append((job.id, job.status))) as jobs:
        first, second = jobs.submit(order(9, seed=13)), jobs.submit(order(9, seed=14))
        job = ended(jobs, first)
        assert (job.status, job.error_code) == ("failed", code)
        assert "\n" not in job.error
        assert (str(error).splitlines() or [""])[0] in job.error
        assert ended(jobs, second).status == "completed"
    assert told == [(first.id, "failed"), (second.id, "completed")]


def test_a_disk_that_takes_no_job_keeps_none(
    sprites: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(sprites, tmp_path) as jobs:
        monkeypatch.setattr(Store, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            jobs.submit(order())
        monkeypatch.undo()
        assert jobs.all() == []
        assert sorted(file.name for file in tmp_path.iterdir()) == ["lock"]
        assert ended(jobs, jobs.submit(order(1))).status == "completed"


# --- a restart


@pytest.mark.slow
def test_jobs_outlive_their_server(sprites: Pipeline, tmp_path: Path, written: dict[str, list[np.ndarray]]) -> None:
    with opened(sprites, tmp_path) as jobs:
        done = ended(jobs, jobs.submit(order(5)))
        video = jobs.video(done).read_bytes()
        running, clip = jobs.submit(order(33, seed=2)), plain(sprites, order(1))
        waiting = jobs.submit(order(5, seed=3, key="a key", notes=("a note",)), clip)
        begun(jobs, running)
    kept = json.loads((tmp_path / running.id / "job.json").read_text())
    assert (kept["status"], kept["tries"]) == ("queued", 0)  # it did not fail: it was told to stop
    assert sorted(file.name for file in (tmp_path / running.id).iterdir()) == ["job.json"]
    written.clear()
    with opened(sprites, tmp_path) as jobs:
        assert [job.id for job in jobs.all()] == [done.id, running.id, waiting.id]
        assert jobs.get(done.id) == done
        assert jobs.video(done).read_bytes() == video
        for job, start in ((running, None), (waiting, clip)):
            again = ended(jobs, job)
            assert again.status == "completed"
            assert np.array_equal(np.stack(written[job.id]), plain(sprites, job, start))
        assert again.notes == ("a note",)
        assert jobs.submit(order(5, seed=3, key="a key")).id == waiting.id
        assert done.id not in written


def killed(folder: Path, *jobs: Job) -> None:
    """Leave a folder as a server that was killed leaves it."""
    store = Store(folder)
    for number, job in enumerate(jobs):
        store.add(replace(job, created=float(number + 1)), None)
    store.close()


def test_what_a_killed_server_left_is_made_again(sprites: Pipeline, tmp_path: Path) -> None:
    begun_once = order(5, status="in_progress", tries=1)
    too_often = order(5, status="in_progress", tries=3)
    other_model = replace(order(5), model="another")
    other_size = replace(order(5), width=64)
    lost = order(5, status="completed", ended=1.0, expires=time.time() + 3600)
    old = order(5, status="completed", ended=1.0, expires=2.0)
    fleeting = order(5, fleeting=True)
    killed(tmp_path, begun_once, too_often, other_model, other_size, lost, old, fleeting)
    (tmp_path / begun_once.id / ".video.mp4.12345678.part").write_bytes(b"half")
    half = tmp_path / new_id()
    half.mkdir()
    (half / "start.npy").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("somebody's own")
    (tmp_path / "video_other").mkdir()
    with opened(sprites, tmp_path) as jobs:
        assert ended(jobs, begun_once).status == "completed"
        assert (tmp_path / begun_once.id / "video.mp4").is_file()
        assert not list((tmp_path / begun_once.id).glob(".*"))
        found = {job.id: (job.error_code, job.error) for job in jobs.all() if job.status == "failed"}
    assert found == {
        too_often.id: ("failed", "the server ended 3 times while it made this video"),
        other_model.id: (
            "model_changed",
            "model: got a job for another at 32x32, 8 fps, expected one for sprites at 32x32, 8 fps",
        ),
        other_size.id: (
            "model_changed",
            "model: got a job for sprites at 64x32, 8 fps, expected one for sprites at 32x32, 8 fps",
        ),
        lost.id: ("failed", "the video's file is gone"),
    }
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"lock", "notes.txt", "video_other", begun_once.id, *found}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 1}', '{"later": 1}', "\xff\xfe"])
def test_a_damaged_job_is_left_out_and_left_alone(
    sprites: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    good, bad = order(1), order(1)
    killed(tmp_path, good, bad)
    file = tmp_path / bad.id / "job.json"
    file.write_bytes(content.encode("latin-1"))
    with opened(sprites, tmp_path) as jobs:
        assert [job.id for job in jobs.all()] == [good.id]
        assert ended(jobs, good).status == "completed"
    assert file.read_bytes() == content.encode("latin-1")
    assert bad.id in caplog.text


def test_a_job_under_another_name_is_left_out(tmp_path: Path) -> None:
    job = order(1)
    killed(tmp_path, job)
    os.rename(tmp_path / job.id, tmp_path / new_id())
    store = Store(tmp_path)
    assert store.load() == []
    store.close()


def test_one_server_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    first = Store(tmp_path / "new" / "jobs")
    with pytest.raises(ValueError, match=r"^--jobs-dir: got .*jobs, which another server uses, expected a folder of"):
        Store(tmp_path / "new" / "jobs")
    first.close()
    Store(tmp_path / "new" / "jobs").close()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "jobs"):
        with pytest.raises(NotADirectoryError, match=r"^--jobs-dir: got .*, expected a folder that can be written"):
            Store(place)


def test_without_a_folder_nothing_stays(sprites: Pipeline) -> None:
    with opened(sprites) as jobs:
        job = ended(jobs, jobs.submit(order(1)))
        file = jobs.video(job)
        assert file.is_file()
    assert not file.parent.parent.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../lock", "video_../../x", "video_" + "0" * 23, "/etc", "a\0b"])
def test_no_text_of_a_client_is_part_of_a_path(sprites: Pipeline, name: str) -> None:
    with opened(sprites) as jobs:
        assert jobs.get(name) is None
        assert not jobs.delete(name)
        with pytest.raises(ValueError, match=r"^job: got"):
            jobs._store.video(name)


def test_a_closed_queue_takes_nothing(sprites: Pipeline) -> None:
    with opened(sprites) as jobs:
        jobs.close()
        with pytest.raises(Busy, match=r"^the server is shutting down$"):
            jobs.submit(order())


def test_a_house_that_closes_first_ends_the_queue(sprites: Pipeline, tmp_path: Path) -> None:
    with opened(sprites, tmp_path) as jobs:
        job = jobs.submit(order(FOREVER))
        begun(jobs, job)
        house_of(jobs).close(WITHIN)
        until(lambda: not any(thread.is_alive() for thread in jobs._threads))
        assert json.loads((tmp_path / job.id / "job.json").read_text())["status"] == "queued"


# --- keys


def test_a_key_names_one_request(sprites: Pipeline) -> None:
    with opened(sprites) as jobs:
        first = jobs.submit(order(1, key="k", digest="one"))
        assert jobs.submit(order(1, key="k", digest="one")).id == first.id
        with pytest.raises(Conflict, match=r"^Idempotency-Key: got 'k' with another request before, expected"):
            jobs.submit(order(1, key="k", digest="two"))
        assert jobs.submit(order(1, key="other", digest="two")).id != first.id
        assert len({jobs.submit(order(1)).id for _ in range(2)}) == 2
        ended(jobs, first)
        jobs.delete(first.id)
        assert jobs.submit(order(1, key="k", digest="two")).id != first.id


def test_many_at_once_with_one_key_make_one_job(sprites: Pipeline) -> None:
    with opened(sprites) as jobs:
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda: found.append(jobs.submit(order(1, key="k", digest="d")).id))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 16
        assert len(set(found)) == len(jobs.all()) == 1
