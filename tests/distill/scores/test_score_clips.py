"""VBench's dimensions by optical flow, on clips whose motion and brightness are known in advance."""

import math
import weakref
from functools import cache

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="needs OpenCV (extra evaluate)")

from distill.scores import clips  # noqa: E402
from distill.scores.clips import DYNAMIC, STATIC, ClipScorer  # noqa: E402

MARGIN = 32  # pixels of a texture around the picture, so that what moves in is new


@cache
def texture(height, width, seed=0):
    """Smooth noise, float [height + 2 MARGIN, width + 2 MARGIN], far from black and white."""
    noise = np.random.default_rng(seed).standard_normal((height + 2 * MARGIN, width + 2 * MARGIN))
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return np.clip(128 + 40 * smooth / smooth.std(), 20, 235)


def moved(picture, dx, dy):
    """A texture moved by any part of a pixel: a phase in its spectrum, and so exact. uint8 [height, width, 3]."""
    down, across = np.fft.fftfreq(picture.shape[0])[:, None], np.fft.fftfreq(picture.shape[1])
    shifted = np.fft.ifft2(np.fft.fft2(picture) * np.exp(-2j * np.pi * (across * dx + down * dy))).real
    inside = np.clip(np.rint(shifted[MARGIN:-MARGIN, MARGIN:-MARGIN]), 0, 255).astype(np.uint8)
    return np.repeat(inside[..., None], 3, 2)


def clip_at(places, height=64, width=96):
    return [moved(texture(height, width), *place) for place in places]


def line(count, dx, dy):
    return [(dx * number, dy * number) for number in range(count)]


@pytest.fixture(scope="module")
def score():
    return ClipScorer()


@pytest.mark.parametrize("level", [0, 1, 12, 40])
def test_flickering_is_the_known_difference_of_frames(score, level):
    """Every second frame differs from the others by `level`, up or down, in a known half of the pixels."""
    still = moved(texture(48, 64), 0, 0).clip(40, 215)
    signs = np.random.default_rng(1).permutation([-1, 0, 0, 1] * (still.size // 4)).reshape(still.shape)
    other = (still + level * signs).astype(np.uint8)
    found = score([still, other] * 4, 8)
    assert found["temporal_flickering"] == pytest.approx(1 - level / 2 / 255, abs=1e-12)


@pytest.mark.parametrize("level", [0, 3, 20])
def test_smoothness_is_the_known_error_of_frames_between_equal_ones(score, level):
    still = moved(texture(48, 64), 0, 0)
    found = score([still, still + np.uint8(level)] * 3 + [still], 8)
    assert found["motion_smoothness"] == pytest.approx(1 - level / 255, abs=1e-12)


@pytest.mark.parametrize(("fps", "step"), [(8, 1), (16, 2), (24, 3), (30, 4), (5, 1)])
@pytest.mark.parametrize("pace", [(1.0, 0.5), (-0.4, 0.9)])
def test_flow_is_the_known_motion(score, fps, step, pace):
    """Over the frames that are sampled, at about 8 per second."""
    found = score(clip_at(line(9, *pace)), fps)
    assert found["flow"] == pytest.approx(step * math.hypot(*pace), rel=0.06)


@pytest.mark.parametrize("pace", [(1.0, 0.5), (-2.5, 1.5), (4.0, -3.0)])
def test_flow_points_where_the_picture_goes(pace):
    """And as far, in the median: to a few hundredths of a pixel, and by the faster preset to a quarter."""
    before, after = clip_at([(0, 0), pace])
    found = np.median(clips.dis_flow("MEDIUM")(before, after), (0, 1))
    assert found == pytest.approx(pace, abs=0.03)
    assert np.median(clips.dis_flow("FAST")(before, after), (0, 1)) == pytest.approx(pace, abs=0.25)


@pytest.mark.parametrize(("size", "pace", "fps", "moves"), [
    ((64, 96), 1.2, 8, 0), ((64, 96), 1.8, 8, 1),  # 6 * 64 / 256 = 1.5 pixels
    ((96, 64), 1.2, 8, 0), ((96, 64), 1.8, 8, 1),
    ((128, 128), 1.8, 8, 0), ((128, 128), 1.8, 16, 1),  # 3 pixels; every second frame
])  # fmt: skip
def test_a_clip_is_dynamic_beyond_a_threshold_that_grows_with_its_size(score, size, pace, fps, moves):
    found = score(clip_at(line(9, pace, 0), *size), fps)
    assert found["flow_threshold"] == 6 * min(size) / 256
    assert found["dynamic_degree"] == moves


@pytest.mark.parametrize(("frames", "moving", "expected"), [
    (16, 3, 0), (16, 4, 1), (33, 7, 0), (33, 8, 1), (6, 1, 0), (6, 2, 1), (3, 0, 0), (3, 1, 1),
    (2, 0, math.nan), (2, 1, math.nan),
])  # fmt: skip
def test_as_many_pairs_have_to_move_as_in_vbench(frames, moving, expected):
    """round(4 * frames / 16)."""
    moves = [10.0] * moving + [0.0] * (frames - 1 - moving)
    assert clips.dynamic_degree(moves, 256) == pytest.approx(expected, nan_ok=True)


def test_the_fastest_pixels_are_those_of_a_sorted_row():
    flow = np.random.default_rng(0).standard_normal((37, 53, 2)).astype(np.float32)
    lengths = np.sort(np.hypot(flow[..., 0], flow[..., 1]).ravel())[::-1]
    for rule in (DYNAMIC, STATIC):
        assert clips.largest(flow, rule.share) == pytest.approx(lengths[: int(37 * 53 * rule.share)].mean())


@pytest.mark.parametrize(("pace", "expected"), [(0.0, 1), (0.1, 1), (0.35, 0), (1.5, 0)])
def test_static_clips_stand_still_from_frame_to_frame_and_from_end_to_end(score, pace, expected):
    """Of 17 frames at a short side of 64: 2 pairs may exceed 0.75 pixels, and the ends lie 3 pixels apart at most."""
    assert score(clip_at(line(17, pace, 0), 64, 64), 8)["static"] == expected


def test_a_few_jumps_leave_a_clip_static():
    """round(2 * 16 / 16) pairs."""
    for jumps, expected in ((2, True), (3, False)):
        assert clips.is_static([9.0] * jumps + [0.0] * (15 - jumps), [0.0, 0.0], 256) is expected
    assert not clips.is_static([0.0] * 15, [0.0, 12.1], 256)  # 2 * 2 * 3


@pytest.fixture(scope="module")
def smooth(score):
    return score(clip_at(line(11, 2.0, 1.0)), 8)["motion_smoothness"]


def test_linear_motion_is_smooth(smooth):
    assert smooth > 0.995


@pytest.mark.parametrize("seed", [0, 1])
def test_jitter_costs_smoothness_the_more_the_stronger(score, smooth, seed):
    jitter = np.random.default_rng(seed).uniform(-1, 1, (11, 2))
    values = [
        score(clip_at(np.array(line(11, 2.0, 1.0)) + size * jitter), 8)["motion_smoothness"]
        for size in (0.25, 0.5, 1.0, 2.0)
    ]
    assert [smooth, *values] == sorted([smooth, *values], reverse=True)
    assert values[-1] < smooth - 0.03


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("fault", ["dropped", "repeated"])
def test_a_dropped_or_repeated_frame_costs_smoothness(score, smooth, fault, at):
    places = line(12, 2.0, 1.0)
    places = places[:at] + (places[at + 1 :] if fault == "dropped" else places[at - 1 : 10])
    assert len(places) == 11
    assert score(clip_at(places), 8)["motion_smoothness"] < smooth - 0.003


def test_an_object_that_moves_before_a_still_background_is_smooth(score):
    """Edges, where the flow breaks off, are interpolated too."""

    def drawn(x):
        frame = np.full((64, 64, 3), 60, np.uint8)
        frame[20:42, round(x) : round(x) + 22] = (220, 40, 90)
        return frame

    even, uneven = ([drawn(8 + 2 * n + (n % 4 == 1) * late) for n in range(11)] for late in (0, 1))
    even, uneven = score(even, 8)["motion_smoothness"], score(uneven, 8)["motion_smoothness"]
    assert even > 0.999
    assert uneven < even - 0.001


def test_few_frames_are_held(score):
    alive, most = weakref.WeakSet(), 0

    def frames():
        nonlocal most
        for place in line(60, 0.2, 0.1):
            frame = moved(texture(16, 16), *place)
            alive.add(Held(frame))
            yield frame
            most = max(most, len(alive))

    class Held:
        def __init__(self, frame):
            weakref.finalize(frame, alive.discard, self)

    score(frames(), 60)
    assert 0 < most <= 6


@pytest.mark.parametrize(("frames", "words"), [
    ([], "got 0 frames"), ([(0, 0)], "got 1 frame,"), ([(0, 0), (1, 0)], "got 2 frames"),
])  # fmt: skip
def test_a_short_clip_is_refused(score, frames, words):
    with pytest.raises(ValueError, match=f"{words}.*expected at least 3"):
        score(clip_at(frames, 16, 16), 8)


@pytest.mark.parametrize("size", [(11, 64), (64, 11), (2, 2)])
def test_a_small_clip_is_refused(score, size):
    with pytest.raises(ValueError, match=f"got {size[1]}x{size[0]} pixels, expected at least 12 each way"):
        score(clip_at(line(3, 1, 0), *size), 8)


@pytest.mark.parametrize("size", [(12, 12), (12, 90), (13, 17), (91, 12)])
def test_the_smallest_clips_are_scored(score, size):
    found = score(clip_at([(0, 0)] * 5, *size), 8)
    assert [found[name] for name in ("temporal_flickering", "motion_smoothness", "dynamic_degree")] == [1, 1, 0]
