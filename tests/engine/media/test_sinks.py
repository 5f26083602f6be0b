"""Every sink: what is read back is what was written; nothing half-made stands under the final name."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from limits import HANG
from PIL import Image, ImageSequence

import engine.media.sinks
from engine.media.sinks import open_sink

ROOT = Path(__file__).parents[3]
SIZE = (48, 64)
FPS = 16


def moving_square(count, size=SIZE):
    """A bright square on a dark red ground, another place in every frame; uint8 [H, W, 3] each."""
    frames = []
    for i in range(count):
        frame = np.full((*size, 3), (150, 40, 60), np.uint8)
        left = 4 * i % (size[1] - 16)
        frame[8:24, left : left + 16] = (20, 180, 230)
        frames.append(frame)
    return frames


def write(target, frames, fps=FPS, **options):
    with open_sink(target, fps, frames[0].shape[:2], **options) as sink:
        for frame in frames:
            sink.write(frame)
    return sink


def decode(path):
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)], rate


def mean_error(got, expected):
    assert len(got) == len(expected)
    assert all(a.shape == b.shape for a, b in zip(got, expected, strict=True))
    return max(np.abs(a.astype(int) - b).mean() for a, b in zip(got, expected, strict=True))


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.y4m", "CLIP.MP4"])
def test_video_files(tmp_path, name):
    frames = moving_square(20)
    sink = write(str(tmp_path / name), frames)
    got, rate = decode(tmp_path / name)
    assert mean_error(got, frames) < (1 if name.endswith("y4m") else 4)
    assert np.abs(got[-1][40, 60].astype(int) - frames[-1][40, 60]).max() <= 4  # the ground's colour
    assert rate == FPS
    assert sink.frames == 20
    assert not hidden(tmp_path)


def test_y4m_colours_and_odd_sizes(tmp_path):
    steps = np.array([0, 64, 128, 192, 255], np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(5, 25, 3)
    write(tmp_path / "colours.y4m", [colours], fps=30000 / 1001)
    got, rate = decode(tmp_path / "colours.y4m")
    assert got[0].shape == colours.shape
    assert np.abs(got[0].astype(int) - colours).max() <= 3
    assert (rate.numerator, rate.denominator) == (30000, 1001)
    luma = (tmp_path / "colours.y4m").read_bytes().split(b"FRAME\n")[1][:125]
    assert min(luma) == 16
    assert max(luma) == 235


def test_raw(tmp_path):
    frames = moving_square(3)
    write(tmp_path / "clip.rgb", frames)
    assert (tmp_path / "clip.rgb").read_bytes() == b"".join(f.tobytes() for f in frames)


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp"])
def test_animations(tmp_path, name):
    frames = moving_square(8)
    write(tmp_path / name, frames)
    with Image.open(tmp_path / name) as image:
        got, total = [], 0
        for picture in ImageSequence.Iterator(image):
            got.append(np.asarray(picture.convert("RGB")))
            total += picture.info["duration"]
    assert mean_error(got, frames) < 6
    assert abs(total - 1000 * 8 / FPS) <= 10
    assert not hidden(tmp_path)


@pytest.mark.parametrize("target", ["shots/", "empty", "shot_%03d.png"])
def test_png_sequences(tmp_path, target):
    (tmp_path / "empty").mkdir()
    frames = moving_square(3)
    write(f"{tmp_path}/{target}", frames)
    pattern = {"shots/": "shots/%05d.png", "empty": "empty/%05d.png"}.get(target, target)
    for i, frame in enumerate(frames):
        with Image.open(tmp_path / (pattern % i)) as image:
            assert np.array_equal(np.asarray(image), frame)
    assert not hidden(tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == 3


def test_counting_and_hashing():
    frames = moving_square(5)
    assert write("null", frames).frames == 5
    sink = write("checksum", [f[:, ::-1] for f in frames])  # a view with negative strides is a frame too
    flipped = b"".join(np.ascontiguousarray(f[:, ::-1]).tobytes() for f in frames)
    assert sink.digest == hashlib.sha256(flipped).hexdigest()


FILES = ["clip.mp4", "clip.y4m", "clip.rgb", "clip.gif", "clip.webp", "shots/", "shot_%03d.png"]


@pytest.mark.parametrize("target", FILES)
def test_nothing_under_the_name_until_whole_and_nothing_after_abort(tmp_path, target):
    sink = open_sink(f"{tmp_path}/{target}", FPS, SIZE)
    for frame in moving_square(3):
        sink.write(frame)
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    assert len(hidden(tmp_path)) == 1
    sink.abort()
    sink.abort()
    sink.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="after close"):
        sink.write(moving_square(1)[0])


@pytest.mark.parametrize("target", FILES)
def test_without_frames_there_is_no_file(tmp_path, target):
    open_sink(f"{tmp_path}/{target}", FPS, SIZE).close()
    assert list(tmp_path.iterdir()) == []


def write_then_raise(path, frames, error):
    with open_sink(path, FPS, SIZE) as sink:
        for frame in frames:
            sink.write(frame)
        raise error


@pytest.mark.parametrize("target", ["clip.mp4", "clip.y4m", "clip.gif"])
def test_failure_keeps_the_old_file_and_interrupt_keeps_the_new(tmp_path, target):
    path = tmp_path / target
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write_then_raise(path, moving_square(1), RuntimeError("the model failed"))
    assert path.read_bytes() == b"old"
    assert not hidden(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_then_raise(path, moving_square(4), KeyboardInterrupt())
    assert len(decode(path)[0]) == 4
    assert not hidden(tmp_path)


@pytest.mark.parametrize("target", ["clip.gif", "clip.y4m", "shots/"])
def test_failure_in_close_leaves_nothing(tmp_path, target, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    sink = open_sink(f"{tmp_path}/{target}", FPS, SIZE)
    sink.write(moving_square(1)[0])
    monkeypatch.setattr(engine.media.sinks.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        sink.close()
    assert list(tmp_path.iterdir()) == []


def test_y4m_drops_a_write_cut_short(tmp_path):
    sink = open_sink(tmp_path / "clip.y4m", FPS, SIZE)
    for frame in moving_square(3):
        sink.write(frame)
    sink.output.stream.write(b"FRAME\nhalf of a frame")  # as Ctrl-C would leave it
    sink.close()
    assert len(decode(tmp_path / "clip.y4m")[0]) == 3


WRITER = """
import sys
import numpy as np
from engine.media.sinks import OutputClosed, open_sink

target, count = sys.argv[1], int(sys.argv[2])
options = {"format": sys.argv[3]} if len(sys.argv) > 3 else {}
sink = open_sink(target, 16, (48, 64), **options)
try:
    for i in range(count):
        sink.write(np.full((48, 64, 3), 10 * i % 256, np.uint8))
        print(i, file=sys.stderr, flush=True)
    sink.close()
except OutputClosed:
    sink.abort()
    print("closed", file=sys.stderr)
"""


def start(*arguments, **pipes):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, **pipes)


@pytest.mark.slow
def test_a_killed_mp4_is_playable(tmp_path):
    process = start(tmp_path / "clip.mp4", 1_000_000)
    for line in process.stderr:
        if int(line) == 40:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [p.name for p in tmp_path.iterdir()] == [".clip.mp4.part"]
    got, _ = decode(tmp_path / ".clip.mp4.part")
    assert len(got) >= 40
    assert all(abs(int(frame[20, 20, 0]) - 10 * i % 256) <= 4 for i, frame in enumerate(got[:40]))
    # a later run is not disturbed by what is left
    write(tmp_path / "clip.mp4", moving_square(2))
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["y4m"], ["mp4"], ["rgb"]])
def test_stdout(tmp_path, options):
    process = start("-", 7, *options, stdout=subprocess.PIPE)
    data, log = process.communicate(timeout=HANG)
    assert process.returncode == 0, log
    kind = options[0] if options else "y4m"
    if kind == "rgb":
        assert data == b"".join(bytes([10 * i]) * (48 * 64 * 3) for i in range(7))
        return
    (tmp_path / f"piped.{kind}").write_bytes(data)
    got, _ = decode(tmp_path / f"piped.{kind}")
    assert len(got) == 7
    assert abs(int(got[6][0, 0, 0]) - 60) <= 3


def test_a_terminal_gets_no_bytes(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(ValueError, match=r"got .*expected"):
        open_sink("-", FPS, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["y4m", "mp4"])
def test_stdout_whose_reader_leaves(kind):
    process = start("-", 100_000, kind, stdout=subprocess.PIPE)
    assert process.stdout.read(20)
    process.stdout.close()
    log = process.stderr.read().decode()
    assert process.wait(timeout=HANG) == 0
    assert log.endswith("closed\n")
    assert "Traceback" not in log
    assert "Exception" not in log


@pytest.mark.parametrize(
    ("target", "size", "error"),
    [
        ("clip.avi", SIZE, ValueError),
        ("clip", SIZE, ValueError),
        ("clip.png", SIZE, ValueError),
        ("%d_%d.png", SIZE, ValueError),
        ("clip.mp4", (33, 64), ValueError),
        ("clip.mp4", (0, 64), ValueError),
        ("missing/clip.mp4", SIZE, FileNotFoundError),
        ("missing/shots/", SIZE, FileNotFoundError),
        ("file.txt/clip.mp4", SIZE, NotADirectoryError),
        ("full/", SIZE, ValueError),
        ("pipe.y4m", SIZE, ValueError),
    ],
)
def test_bad_targets(tmp_path, target, size, error):
    (tmp_path / "file.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.png").touch()
    os.mkfifo(tmp_path / "pipe.y4m")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=r"got .*expected") as raised:
        open_sink(f"{tmp_path}/{target}", FPS, size)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_options(tmp_path, monkeypatch):
    nan, inf = float("nan"), float("inf")
    wrong = [("clip.mp4", fps, None) for fps in (0, -1, 1e-9, nan, inf)]
    for target, fps, format in (*wrong, ("clip.mp4", FPS, "mp4"), ("-", FPS, "gif")):
        with pytest.raises(ValueError, match=r"got .*expected"):
            open_sink(target if target == "-" else tmp_path / target, fps, SIZE, format)
    monkeypatch.setattr(engine.media.sinks.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"got .*expected"):
        open_sink(tmp_path / "clip.mp4", FPS, SIZE)
    assert list(tmp_path.iterdir()) == []


def test_bad_frames(tmp_path):
    good = moving_square(2)
    with open_sink(tmp_path / "clip.y4m", FPS, SIZE) as sink:
        sink.write(good[0])
        for bad in (good[0].astype(np.float32), good[0][:-2], good[0][..., :1], good[0][None]):
            with pytest.raises(ValueError, match=r"got .*expected"):
                sink.write(bad)
        sink.write(good[1])
    assert len(decode(tmp_path / "clip.y4m")[0]) == 2


def test_long_animations_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.media.sinks, "HELD_LIMIT", 3 * 48 * 64 * 3)
    with pytest.raises(ValueError, match="more than 3 frames"):
        write(tmp_path / "clip.gif", moving_square(4))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for target, package in (("clip.mp4", "av"), ("clip.gif", "pillow"), ("shots/", "pillow")):
        with pytest.raises(ImportError, match=f"got no package {package}.*video"):
            open_sink(f"{tmp_path}/{target}", FPS, SIZE)
    write(tmp_path / "clip.y4m", moving_square(2))
    assert [p.name for p in tmp_path.iterdir()] == ["clip.y4m"]
