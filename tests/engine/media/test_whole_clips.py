"""Whole clips frame by frame: the frames of `read_clip`, in constant memory, and nothing of a file that is cut off."""

import tracemalloc

import numpy as np
import pytest
from clip_files import grey, numbers_of, write
from PIL import Image

from engine.media.clips import frames_at, read_clip

SIZE = 24, 40


def noisy(count, height=32, width=48):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return [np.ascontiguousarray(np.roll(noise, 2 * i, 1)) for i in range(count)]


def animation(path, **options):
    pictures = [Image.fromarray(grey(i)) for i in range(7)]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=[100, 250, 400, 50, 200, 90, 30], **options
    )


@pytest.mark.parametrize("fps", [5, 10, 23.976])
@pytest.mark.parametrize(
    "name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.avi", "a.ts", "jitter.mp4", "a.gif", "a.webp"]
)
def test_the_frames_of_the_other_reader(tmp_path, name, fps):
    path = tmp_path / name
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    if name == "jitter.mp4":
        write(path, noisy(9), [0, 90, 210, 300, 390, 800, 810, 1300, 1310], held=500)
    elif path.suffix in (".gif", ".webp"):
        animation(path)
    else:
        write(path, noisy(9), codec=codec)
    frames = list(frames_at(path, *SIZE, fps))
    assert np.array_equal(np.stack(frames), read_clip(path, *SIZE, fps, 10**6))


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.fromarray(grey(3)).save(tmp_path / name)
        (frame,) = frames_at(tmp_path / name, *SIZE, 10)
        assert frame.shape == (*SIZE, 3)
        assert numbers_of([frame]) == [3]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_stretched_frames_keep_the_edges(tmp_path, name):
    """Three columns of colour: a square crop loses the outer ones, a stretch makes them a third each."""
    picture = np.zeros((32, 96, 3), np.uint8)
    for column, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250)]):
        picture[:, 32 * column : 32 * column + 32] = colour
    path = tmp_path / name
    if path.suffix == ".mp4":
        write(path, [picture] * 3, pixels="yuv444p")
    else:
        pictures = [Image.fromarray(np.roll(picture, step, 0)) for step in (0, 1)]
        pictures[0].save(path, **({"save_all": True, "append_images": pictures} if name == "a.gif" else {}))
    seen = {
        crop: next(frames_at(path, 48, 48, 10, crop=crop))[24, [8, 24, 40]].argmax(1).tolist() for crop in (True, False)
    }
    assert seen == {True: [1, 1, 1], False: [0, 1, 2]}


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_memory_does_not_grow_with_the_length(tmp_path, name):
    path, frames = tmp_path / name, noisy(80, 32, 32)
    if name == "a.mp4":
        write(path, frames)
    else:
        pictures = [Image.fromarray(frame) for frame in frames]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    next(frames_at(path, 32, 32, 10))  # imports
    tracemalloc.start()
    try:
        assert sum(1 for _ in frames_at(path, 32, 32, 10)) == 80
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30 * frames[0].nbytes


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".gif":
        pictures = [Image.fromarray(frame) for frame in noisy(9, 64, 96)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    else:
        write(path, noisy(60, 64, 96), muxer={"movflags": "faststart"} if path.suffix == ".mp4" else {})
    assert len(list(frames_at(path, *SIZE, 10))) > 8
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    with pytest.raises(ValueError, match=rf"video: got .*{name}, "):
        list(frames_at(path, *SIZE, 10))


def test_damage_on_the_way_comes_after_the_frames_before_it(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, noisy(80, 64, 96), codec_options={"g": "20", "bf": "0", "crf": "20"}, muxer={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 9000] = np.random.default_rng(1).bytes(9000)
    path.write_bytes(data)
    seen = []
    with pytest.raises(ValueError, match=r"damaged after [34]\.\d s, expected a whole file"):
        seen.extend(frames_at(path, *SIZE, 10))
    assert 30 < len(seen) < 50
