"""Turns, pace, encoders, fragments, rates: each alone, against values worked out by hand or read by FFmpeg."""

import errno
import io
import os
import threading
import time

import av
import numpy as np
import pytest

from serve.core.coding import Coded, Coding, Recording
from serve.core.encoders import enlarged, make_encoder, scale_for
from serve.core.fragments import Fragmenter, boxes
from serve.core.house import capacity
from serve.core.messages import Notice
from serve.core.pace import SPARE, Pace
from serve.core.prompts import check_words
from serve.core.turns import Turns
from serve.core.viewers import Viewer
from serve.web.server import Bucket
from serve.web.sessions import index


def moving(count, height=32, width=48):
    """Frames of a bright square that moves over a ramp: uint8 [count, height, width, 3]."""
    frames = np.broadcast_to(np.linspace(0, 120, width, dtype=np.uint8)[:, None], (count, height, width, 3)).copy()
    for number in range(count):
        frames[number, 8:20, number : number + 12] = (230, 60, 20)
    return frames


def test_the_earliest_deadline_goes_first():
    turns, order, ready = Turns(1), [], threading.Barrier(5)

    def want(deadline):
        ready.wait()
        with turns.turn(deadline):
            order.append(deadline)

    deadlines = [3.0, 1.0, float("inf"), 2.0]
    threads = [threading.Thread(target=want, args=(one,)) for one in deadlines]
    with turns.turn(0.0):
        for thread in threads:
            thread.start()
        ready.wait()
        while len(turns._line) < 4:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [1.0, 2.0, 3.0, float("inf")]


def test_no_more_turns_at_once_than_there_are():
    turns, inside, most = Turns(2), [], []

    def work():
        for _ in range(20):
            with turns.turn(time.monotonic()):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 2


def test_a_turn_that_fails_is_given_back():
    turns = Turns(1)
    with pytest.raises(ValueError, match="x"), turns.turn(0.0):
        raise ValueError("x")
    with turns.turn(0.0):
        pass


def test_pace_of_a_chunk_in_time_and_of_a_late_one():
    """8 fps, chunks of 4: frames 0, 1, 5, 9 are due at 0, 1/8, 5/8, 9/8 s after the first one."""
    pace = Pace(8.0)
    assert pace.due(0, 10.0) == 10.0
    assert pace.made(0, 0.05, 10.0) == (10.0, 0.0)
    assert pace.due(1, 10.0) == 10.125
    assert pace.lead(4) == pytest.approx(2 * 0.05 + SPARE)
    assert pace.made(1, 0.05, 10.1) == (10.125, 0.0)
    due, late = pace.made(5, 0.4, 10.925)  # it was due at 10.625
    assert (due, late) == (10.925, pytest.approx(0.3))
    assert pace.due(9, 11.0) == pytest.approx(11.425)  # all later ones move
    assert pace.lead(4) == 0.5  # never more than a chunk's own length
    pace.at_speed(2.0, 9, 11.0)
    assert pace.due(9, 11.0) == pytest.approx(11.425)
    assert pace.due(13, 11.0) == pytest.approx(11.675)
    pace.rebase()
    assert pace.due(13, 12.0) == 12.0


def test_a_speed_that_changes_while_no_clock_runs_makes_nothing_late():
    """Before the first chunk, in a pause, and after speed 0 the clock begins with the next chunk."""
    for first in (0.0, 1.0):
        pace = Pace(8.0, first)
        if not first:
            pace.made(0, 0.1, 5.0)
        pace.at_speed(2.0, 1, 6.0)
        assert pace.made(1, 0.4, 6.4) == (6.4, 0.0)
        assert pace.due(5, 6.5) == pytest.approx(6.65)


@pytest.mark.parametrize("speed", [0.0, 4.0, 100.0])
def test_who_plays_faster_than_real_time_goes_behind_who_does_not(speed):
    """A chunk of 4 frames at 8 fps: real time claims one turn within 0.5 s, and so does each other speed."""
    real, fast = Pace(8.0), Pace(8.0, speed)
    real.made(1, 0.1, 10.0)
    fast.made(1, 0.1, 10.0)
    asked = 10.5 - real.lead(4)
    assert real.turn_by(5, 4, asked) == 10.5
    assert fast.turn_by(5, 4, asked) == pytest.approx(asked + 0.5)
    assert fast.turn_by(5, 4, asked) > real.turn_by(5, 4, asked)
    assert Pace(8.0).turn_by(0, 4, asked) == pytest.approx(asked + 0.5)  # nor does one that begins, or begins again


def test_pace_without_a_clock():
    pace = Pace(8.0, 0.0)
    pace.made(0, 0.1, 5.0)
    assert pace.due(9, 6.0) == 6.0


def test_capacity():
    assert capacity(0.1, 4, 8.0, 1) == 3  # 0.7 * 0.5 s / 0.1 s
    assert capacity(0.1, 4, 8.0, 2) == 7
    assert capacity(3.0, 4, 8.0, 1) == 1


@pytest.mark.parametrize(("size", "scale"), [((32, 32), 4), ((16, 24), 8), ((128, 200), 1), ((480, 832), 1)])
def test_small_pictures_are_enlarged(size, scale):
    assert scale_for(*size) == scale


@pytest.mark.parametrize(("codec", "scale"), [("h264", 4), ("h264", 3), ("h264", 1), ("vp8", 4), ("jpeg", 2)])
def test_each_codec_gives_each_frame_at_once(codec, scale):
    """FFmpeg's decoder gives the same pictures, and needs nothing before a key frame that was asked for."""
    frames = moving(13)
    encoder = make_encoder(codec, 32, 48, 8.0, scale)
    units = [unit for at in range(1, 13, 4) for unit in encoder.encode(frames[at : at + 4], at, key=at in (1, 9))]
    assert [unit.position for unit in units] == list(range(1, 13))
    assert units[0].key
    assert units[8].key
    decoder = av.CodecContext.create({"h264": "h264", "vp8": "vp8", "jpeg": "mjpeg"}[codec], "r")
    for unit in units[8:]:
        decoder.decode(av.Packet(unit.data))
    decoder = av.CodecContext.create({"h264": "h264", "vp8": "vp8", "jpeg": "mjpeg"}[codec], "r")
    pictures = [picture for unit in units for picture in decoder.decode(av.Packet(unit.data))] + decoder.decode(None)
    assert len(pictures) == 12
    got = np.stack([picture.to_ndarray(format="rgb24") for picture in pictures]).astype(int)
    wrong = np.abs(got - enlarged(frames[1:], scale))
    assert wrong.mean() < 4


def test_fragments_have_absolute_times_and_numbers():
    frames, coding = moving(13), Coding(32, 48, 8.0, 4)
    made = [coding.code(frames[at : at + 4], at, {"h264": at == 1})["h264"] for at in (1, 5, 9)]
    assert [name for name, _ in boxes(made[0].init)] == [b"ftyp", b"moov"]
    assert {one.init for one in made} == {made[0].init}
    assert [[name for name, _ in boxes(one.fragment)] for one in made] == [[b"moof", b"mdat"]] * 3
    with av.open(io.BytesIO(made[0].init + b"".join(one.fragment for one in made))) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert times == [n / 8 for n in range(1, 13)]


def test_the_recording_is_a_video_and_stops_when_it_is_full():
    frames, coding = moving(37), Coding(32, 48, 8.0, 4)
    made = [coding.code(frames[at : at + 4], at, {"h264": at == 1})["h264"] for at in range(1, 37, 4)]
    recording = Recording(len(made[0].init) + sum(len(one.fragment) for one in made[:6]) + 10)
    assert recording.read() == b""
    for one in made:
        recording.add(one)
    assert recording.full
    whole = io.BytesIO()
    index(recording.read(), whole)
    whole.seek(0)
    with av.open(whole) as container:
        assert container.format.name.startswith("mov")
        assert sum(1 for _ in container.decode(video=0)) == 24
        assert container.duration == pytest.approx(24 / 8 * 1e6, abs=2)
    recording.close()
    assert recording.read() == b""


def test_an_encoder_that_nobody_wants_ends():
    frames, coding = moving(12), Coding(32, 48, 8.0, 4)
    assert set(coding.code(frames[:4], 0, {"h264": True, "vp8": True})) == {"h264", "vp8"}
    assert set(coding.code(frames[4:8], 4, {"h264": False})) == {"h264"}
    assert coding.code(frames[8:], 8, {"h264": False, "vp8": False})["vp8"].units[0].key


def test_a_fragmenter_wants_a_key_frame_first():
    encoder = make_encoder("h264", 32, 48, 8.0, 4)
    units = encoder.encode(moving(8), 0, True)
    with pytest.raises(av.error.FFmpegError):
        Fragmenter(8.0).fragment(units[2:4])


def test_a_bucket_fills_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("serve.web.server.time.monotonic", lambda: now[0])
    bucket = Bucket(2.0)
    assert [bucket.take("a") for _ in range(3)] == [0.0, 0.0, 30.0]
    assert bucket.take("b") == 0.0
    now[0] += 30.0
    assert bucket.take("a") == 0.0
    assert bucket.take("a") == 30.0


def test_a_session_that_records_nothing_has_no_file():
    """Also one that was refused, as the house was full."""
    before = len(os.listdir("/proc/self/fd"))
    kept = [Recording(1 << 20) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    kept[0].add(Coded((), b"fragment", b"init"))
    assert kept[0].read() == b"initfragment"
    kept[0].close()
    assert kept[0].read() == b""
    kept[0].add(Coded((), b"late"))
    assert kept[0].full
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("taken", [3, OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_ends_a_recording_and_no_session(taken, monkeypatch):
    recording, pwrite = Recording(1 << 20), os.pwrite
    recording.add(Coded((), b"fragment", b"init"))

    def full(handle, data, at):
        if isinstance(taken, OSError):
            raise taken
        return pwrite(handle, data[:taken], at)

    monkeypatch.setattr(os, "pwrite", full)
    recording.add(Coded((), b"second"))
    monkeypatch.undo()
    assert recording.full
    recording.add(Coded((), b"third"))
    assert recording.read() == b"initfragment"
    recording.close()


def test_the_end_is_told_to_who_takes_nothing():
    viewer = Viewer(None)
    for _ in range(2000):
        viewer.put(Notice("pong", {}))
    viewer.put(Notice("done", {}))
    assert [item.kind for item in iter(viewer.take, None)][-1] == "done"


@pytest.mark.parametrize("weights", [(1e308, 1e308), (float("nan"),), (float("inf"), 1.0), (0.0, 0.0), (-1.0, 2.0)])
def test_weights_that_have_no_mean(weights):
    with pytest.raises(ValueError, match="expected them >= 0, and a finite sum above 0"):
        check_words(tuple(("a", weight) for weight in weights))
