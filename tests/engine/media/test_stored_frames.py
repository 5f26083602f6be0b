"""Every frame of a file once, in its own size, whatever its time."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from clip_files import grey, numbers_of, write
from PIL import Image

from engine.media.clips import rate_of, stored_frames


@pytest.mark.parametrize(("name", "codec"), [
    ("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.ts", "libx264"),
])  # fmt: skip
def test_each_frame_comes_once(tmp_path, name, codec):
    options = {"codec_options": {"qmin": "1", "qmax": "1"}, "tick": Fraction(1, 10)} if codec == "mpeg4" else {}
    write(tmp_path / name, [grey(i) for i in range(11)], codec=codec, **options)
    frames = list(stored_frames(tmp_path / name))
    assert numbers_of(frames) == list(range(11))
    assert {frame.shape for frame in frames} == {(32, 48, 3)}
    assert rate_of(tmp_path / name) == pytest.approx(10, rel=0.02)


def test_a_rate_that_cannot_be_is_not_believed(tmp_path):
    """An AVI whose clock counts thousandths claims 1000 frames per second."""
    write(tmp_path / "a.avi", [grey(i) for i in range(5)], codec="mpeg4")
    assert rate_of(tmp_path / "a.avi") == 25


def test_uneven_times_repeat_and_drop_nothing(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, [grey(i) for i in range(7)], [0, 90, 210, 300, 800, 810, 1300])
    assert numbers_of(stored_frames(path)) == list(range(7))


@pytest.mark.parametrize(("sideways", "aspect", "shape"), [
    (False, Fraction(1), (32, 48)), (True, Fraction(1), (48, 32)), (False, Fraction(2), (32, 96)),
    (True, Fraction(2), (96, 32)), (False, Fraction(1, 2), (32, 24)),
])  # fmt: skip
def test_the_size_is_that_of_the_display(tmp_path, sideways, aspect, shape):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = aspect
        if sideways:
            stream.set_display_rotation(90)

    write(tmp_path / "a.mp4", [grey(i) for i in range(3)], prepare=prepare)
    assert [frame.shape for frame in stored_frames(tmp_path / "a.mp4")] == [(*shape, 3)] * 3


def save(path, durations, numbers=None):
    pictures = [Image.fromarray(grey(i)) for i in numbers or range(len(durations))]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, **options)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
@pytest.mark.parametrize(("durations", "counts", "fps"), [
    ([100] * 5, [1] * 5, 10),
    ([60, 70, 60, 60], [1] * 4, 16),  # in ticks of 10 ms
    ([100, 300, 100, 1000], [1, 3, 1, 10], 10),
    ([60, 120, 70, 190], [1, 2, 1, 3], 16),
])  # fmt: skip
def test_longer_frames_of_an_animation_come_more_often(tmp_path, name, durations, counts, fps):
    save(tmp_path / name, durations)
    expected = [number for number, count in enumerate(counts) for _ in range(count)]
    frames = list(stored_frames(tmp_path / name))
    assert numbers_of(frames) == expected
    assert frames[0].shape == (32, 48, 3)
    assert rate_of(tmp_path / name) == pytest.approx(fps, rel=0.05)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_equal_frames_that_the_encoder_joined_come_apart(tmp_path, name):
    numbers = [0, 1, 1, 1, 2, 3, 3]
    save(tmp_path / name, [80] * 7, numbers)
    assert numbers_of(stored_frames(tmp_path / name)) == numbers


def test_a_long_animation_is_read_as_it_goes(tmp_path):
    save(tmp_path / "a.gif", [20, 60_000, 20])
    first = list(itertools.islice(stored_frames(tmp_path / "a.gif"), 100))
    assert first[2] is first[50]


@pytest.mark.parametrize("read", [rate_of, lambda path: next(stored_frames(path))])
@pytest.mark.parametrize("kind", ["picture", "text", "nothing", "folder"])
def test_what_is_no_video_is_refused(tmp_path, read, kind):
    path = tmp_path / f"a.{'png' if kind == 'picture' else 'mp4'}"
    if kind == "picture":
        Image.fromarray(grey(0)).save(path)
    elif kind == "text":
        path.write_text("no video\n" * 50)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"^video: got .*, expected ") as refused:
        read(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name):
    noise = np.random.default_rng(0)
    options = {"muxer": {"movflags": "faststart"}} if name == "a.mp4" else {}
    write(tmp_path / name, [noise.integers(0, 255, (32, 48, 3), np.uint8) for _ in range(20)], **options)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match="cut off"):
        list(stored_frames(tmp_path / name))
