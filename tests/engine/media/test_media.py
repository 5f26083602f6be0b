"""Pictures and clips as input: cropped to shape, resampled in time."""

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from engine.media.clips import read_clip
from engine.media.pictures import read_image


def gradient(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), 0 * x + 128], -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(16, 24), (48, 40), (20, 90), (7, 5), (16, 100)])
def test_pictures_are_scaled_to_cover_and_cropped_in_the_middle(tmp_path, size):
    Image.fromarray(gradient(*size)).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png", 16, 24)
    assert got.shape == (1, 16, 24, 3)
    assert got.dtype == np.uint8
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.fit(image, (24, 16), Image.Resampling.LANCZOS))
    assert np.abs(got[0].astype(int) - expected).mean() < 6  # a crop of half a pixel more or less
    if size == (16, 24):
        assert np.array_equal(got[0], gradient(*size))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(gradient(16, 24)).convert(mode).save(name)
    assert read_image(name, 16, 24).shape == (1, 16, 24, 3)


def write(path, levels, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        stream.options = {"crf": "4"}
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((16, 24, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("rate", "fps", "numbers"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (16, 8, [0, 2, 4, 6]),
        (8, 16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        (24, 16, [0, 1, 3, 4, 6, 7]),
        (30, 8, [0, 3, 7]),
    ],
)
def test_a_frame_is_shown_until_the_next_one(tmp_path, rate, fps, numbers):
    write(tmp_path / "a.mp4", [20 + 25 * i for i in range(8)], rate)
    got = read_clip(tmp_path / "a.mp4", 16, 24, fps, last=100)
    levels = [round((frame.mean() - 20) / 25) for frame in got]
    assert levels[: len(numbers)] == numbers
    assert len(levels) - len(numbers) in (0, 1)


def test_the_end_of_a_clip(tmp_path):
    write(tmp_path / "a.mp4", [20 + 25 * i for i in range(8)], 8)
    got = read_clip(tmp_path / "a.mp4", 16, 24, 8, last=3)
    assert [round((frame.mean() - 20) / 25) for frame in got] == [5, 6, 7]


def spoiled(folder, how):
    path = folder / how
    if how == "text.mp4":
        path.write_text("hello")
    elif how == "cut.mp4":
        write(path, range(0, 200, 5), 8)
        path.write_bytes(path.read_bytes()[:600])
    elif how == "empty.mp4":
        path.touch()
    elif how == "directory":
        path.mkdir()
    return path


@pytest.mark.parametrize("how", ["text.mp4", "cut.mp4", "empty.mp4", "directory", "missing.mp4"])
@pytest.mark.parametrize("read", [lambda p: read_clip(p, 16, 24, 8, 9), lambda p: read_image(p, 16, 24)], ids="vi")
def test_files_that_cannot_be_read(tmp_path, how, read):
    with pytest.raises((ValueError, FileNotFoundError), match=r"(video|image): got .*expected") as raised:
        read(spoiled(tmp_path, how))
    assert "\n" not in str(raised.value)


def test_a_sound_file_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"video: got .*expected"):
        read_clip(tmp_path / "a.wav", 16, 24, 8, 9)
