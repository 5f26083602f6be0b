"""Frames of a live source: on the stream's grid of times, dropped and repeated by one rule, and counted."""

import threading
import time

import numpy as np
import pytest
from limits import HANG

from engine.media.live import LiveFrames, camera, device_of


def picture(number):
    return np.full((2, 2, 3), number, np.uint8)


def given(live, seconds):
    for number, when in enumerate(seconds):
        live.put(picture(number), 100 + when)


def taken(live):
    live.close()
    return [int(frame[0, 0, 0]) for frame in live]


@pytest.mark.parametrize(
    ("rate", "expected", "dropped", "repeated"),
    [
        (10, list(range(20)), 0, 0),
        (20, list(range(0, 40, 2)), 20, 0),  # twice as fast: every other frame
        (5, [number // 2 for number in range(39)], 0, 19),  # half as fast: each one twice
        (30, list(range(0, 60, 3)), 40, 0),
    ],
)
def test_the_grid_of_times(rate, expected, dropped, repeated):
    live = LiveFrames(10, room=1000)
    given(live, [number / rate for number in range(20 * rate // 10 if rate >= 10 else 20)])
    assert live.waiting == len(expected)
    assert taken(live) == expected
    # The last frame may still be shown later.
    assert dropped - 1 <= live.dropped <= dropped
    assert live.repeated == repeated


def test_jitter_keeps_the_newest_frame_of_each_time():
    live = LiveFrames(10, room=1000)
    given(live, [0, 0.08, 0.11, 0.19, 0.31, 0.32, 0.4])
    # at 0: 0; at .1: 1 (of .08); at .2: 3 (of .19); at .3: 3 again; at .4: 6
    assert taken(live) == [0, 1, 3, 3, 6]
    assert (live.dropped, live.repeated) == (3, 1)


def test_a_slow_stream_gets_the_newest_frames():
    live = LiveFrames(10, room=4)
    given(live, [number / 10 for number in range(20)])
    assert (live.waiting, live.dropped) == (4, 16)
    assert taken(live) == [16, 17, 18, 19]
    assert live.taken == 4
    assert live.told() == "source: dropped 16, repeated 0 frames"


def test_after_a_long_pause_only_its_end_counts():
    live = LiveFrames(10, room=4)
    given(live, [0, 0.1])
    assert [int(next(live)[0, 0, 0]) for _ in range(2)] == [0, 1]
    live.put(picture(7), 100 + 60)
    assert taken(live) == [1, 1, 1, 7]
    assert (live.repeated, live.dropped) == (4, 1)


def test_a_fast_stream_waits_and_an_end_wakes_it():
    live, got = LiveFrames(10, room=4), []
    thread = threading.Thread(target=lambda: got.extend(live))
    thread.start()
    live.put(picture(3), 1.0)
    until = time.monotonic() + HANG
    while not got and time.monotonic() < until:
        time.sleep(0.01)
    assert thread.is_alive()
    live.close()
    thread.join(HANG)
    assert [int(frame[0, 0, 0]) for frame in got] == [3]


def test_an_error_comes_once_behind_the_frames():
    live = LiveFrames(10, room=4)
    live.put(picture(3), 1.0)
    live.fail(ValueError("unplugged"))
    next(live)
    with pytest.raises(ValueError, match="unplugged"):
        next(live)
    with pytest.raises(StopIteration):
        next(live)


def test_a_camera_is_scaled_and_cropped():
    """FFmpeg's test picture in the place of a device: four colours over the width, 30 a second."""
    source = "smptehdbars=size=96x48:rate=30:duration=1,realtime"
    live = camera(source, 24, 24, 10, room=100, driver="lavfi")
    frames = list(live)
    assert 9 <= len(frames) <= 11
    assert frames[0].shape == (24, 24, 3)
    assert np.ptp(frames[0], axis=1).max() > 100
    assert live.dropped >= 15


@pytest.mark.parametrize("name", ["camera:77", "/dev/video77"])
def test_a_camera_that_is_not_there(name):
    with pytest.raises(ValueError, match=rf"source: got {name}, expected a camera at /dev/video77 \("):
        device_of(name)


def test_a_device_that_is_no_camera():
    with pytest.raises(ValueError, match=r"source: got /dev/null, expected a camera that opens \("):
        camera("/dev/null", 24, 24, 10, room=4)
