"""SIGKILL at any moment: what was made plays or waits under a name, and an older file stays as it was."""

import os
import random
import signal
import time

import numpy as np
import pytest
from harness import FRAME, ended, frames_in, grown, names, start

import engine.media.base
import engine.media.containers
from engine.files import left_over
from engine.media.sinks import open_sink

pytestmark = [pytest.mark.slow]
COUNT = 12
MOMENTS = {
    "in the encoder's end": (engine.media.containers.VideoSink, "_mux", COUNT + 1),
    "before the copy": (engine.media.containers.VideoSink, "_copy", 1),
    "between copy and deletion": (engine.media.containers.Part, "drop", 1),
    "before the rename": (engine.media.containers, "publish", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_an_mp4_is_finished(tmp_path, moment):
    """In the end phase, at each step."""
    (tmp_path / "clip.mp4").write_bytes(b"old")
    child = os.fork()
    if child == 0:
        owner, name, call = MOMENTS[moment]
        real, calls = getattr(owner, name), []

        def method(*args):
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(owner, name, method)
        with open_sink(tmp_path / "clip.mp4", 16, (32, 32)) as sink:
            for i in range(COUNT):
                sink.write(np.full((32, 32, 3), 10 * i, np.uint8))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "clip.mp4").read_bytes() == b"old"
    parts = left_over(tmp_path / "clip.mp4")
    assert max(frames_in(part) for part in parts if part.stat().st_size) >= COUNT - (moment == "in the encoder's end")
    with open_sink(tmp_path / "clip.mp4", 16, (32, 32)) as sink:
        sink.write(np.zeros((32, 32, 3), np.uint8))
        told = " ".join(sink.notes)
        assert all(str(part) in told for part in parts if part.exists())
        assert "left" in told
    assert frames_in(tmp_path / "clip.mp4") == 1


def killed(program, build, folder, draw, latest):
    """Kill a run at a random moment of its start or, with latest None, once its file has grown."""
    earlier = names(folder)
    process = start(program, build, folder, "--out", "clip.rgb")
    if latest is None:
        grown(process, folder, "clip.rgb", draw.randrange(1, 60) * FRAME[program], earlier)
    else:
        time.sleep(draw.uniform(0, latest))
    process.kill()
    ended(process)


def check_kills(program, build, folder, moments, seed):
    (folder / "clip.rgb").write_bytes(b"old")
    draw = random.Random(seed)
    for latest in moments:
        killed(program, build, folder, draw, latest)
        assert (folder / "clip.rgb").read_bytes() == b"old"
    parts = [part for part in left_over(folder / "clip.rgb") if part.stat().st_size]
    assert len(parts) >= moments.count(None)
    assert len(parts) + 1 >= len(names(folder)) - len(moments)
    process = start(program, build, folder, "--frames", "2", "--out", "clip.rgb")
    assert ended(process) == (0, "")
    assert names(folder) == sorted([*(part.name for part in parts), "clip.rgb"])
    whole = (folder / "clip.rgb").read_bytes()
    assert len(whole) == 2 * FRAME[program]
    for part in parts:  # frames up to the kill, the last one may be cut
        assert part.read_bytes()[: len(whole)] == whole[: part.stat().st_size]


@pytest.mark.parametrize(
    ("program", "moments"), [("host", [0.01, 0.03, None, 0.1, None, 0.3, None, 1.0]), ("run", [None])]
)
def test_killed_at_any_moment(native_build, tmp_path, program, moments):
    check_kills(program, native_build, tmp_path, moments, 1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("program", "moments"), [("host", [0.05, None, 0.2] * 12), ("run", [0.5, None, 3.0, None, 5.0, None])]
)
def test_killed_at_many_moments(native_build, tmp_path, program, moments):
    check_kills(program, native_build, tmp_path, moments, 2)
