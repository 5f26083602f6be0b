"""Every sink: what is read back is what was written; bad targets and options are refused."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from limits import BARE, HANG
from PIL import Image, ImageSequence
from videos import decode, files_in, moving_square

import engine.media.base
import engine.media.sequences
from engine.media.sinks import Encoding, open_sink

ROOT = Path(__file__).parents[3]
SIZE = (48, 64)
FPS = 16


def write(target, frames, fps=FPS, format=None, **encoding):
    with open_sink(target, fps, frames[0].shape[:2], format, Encoding(**encoding)) as sink:
        for frame in frames:
            sink.write(frame)
    return sink


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


@pytest.mark.parametrize(("pix_fmt", "decoded"), [("yuv420p", "yuv420p"), ("yuv422p", "yuv422p"), (None, "yuv444p")])
def test_y4m_chroma(tmp_path, pix_fmt, decoded):
    """Chroma of blocks as large as a sample survives, and FFmpeg reads the layout from the header."""
    blocks = np.random.default_rng(0).integers(40, 216, (24, 32, 3), np.uint8)
    frame = np.kron(blocks, np.ones((2, 2, 1), np.uint8))
    write(tmp_path / "clip.y4m", [frame, frame], pix_fmt=pix_fmt)
    with av.open(str(tmp_path / "clip.y4m")) as container:
        pictures = list(container.decode(video=0))
    assert [picture.format.name for picture in pictures] == [decoded] * 2
    wanted = av.VideoFrame.from_ndarray(blocks, format="rgb24").reformat(format="yuv444p").to_ndarray()  # FFmpeg's own
    got = pictures[1].reformat(format="yuv444p", interpolation="POINT").to_ndarray()
    for plane in range(3):  # [H, W] each
        assert np.abs(got[plane][::2, ::2].astype(int) - wanted[plane]).max() <= 2, plane


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
    command = [sys.executable, "-c", BARE + WRITER, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["y4m"], ["mp4"], ["mkv"], ["webm"], ["rgb"]])
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
@pytest.mark.parametrize("kind", ["y4m", "mp4", "mkv"])
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
        ("pipe.mp4/", SIZE, ValueError),
        ("folder.mp4", SIZE, ValueError),
        ("file.txt/", SIZE, NotADirectoryError),
        ("clip.mp4.", SIZE, ValueError),
        (".mp4", SIZE, ValueError),
        ("a\nb", SIZE, ValueError),
        ("no\nwhere/clip.mp4", SIZE, FileNotFoundError),
        ("\udcff/clip.mp4", SIZE, FileNotFoundError),
        ("a%.png", SIZE, ValueError),
        ("x" * 252 + ".mp4", SIZE, ValueError),
        ("x" * 252 + "/clip.mp4", SIZE, FileNotFoundError),
        ("x/" * 2100 + "clip.mp4", SIZE, ValueError),
        ("circle.mp4", SIZE, ValueError),
        ("old_%03d.png", SIZE, ValueError),
        ("old_%d.png", SIZE, ValueError),
    ],
)
def test_bad_targets(tmp_path, target, size, error):
    (tmp_path / "file.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.png").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "old_007.png").touch()
    (tmp_path / "old_12.png").touch()
    os.mkfifo(tmp_path / "pipe.y4m")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "circle.mp4").symlink_to(tmp_path / "circle.mp4")
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
    monkeypatch.setattr(engine.media.base.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"got .*expected"):
        open_sink(tmp_path / "clip.mp4", FPS, SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "format", "encoding", "said"),
    [
        ("clip.y4m", None, {"crf": 20}, "crf: got 20 for y4m"),
        ("clip.rgb", None, {"pix_fmt": "yuv420p"}, "pix-fmt: got yuv420p for rgb"),
        ("clip.gif", None, {"codec": "h264"}, "codec: got h264 for gif"),
        ("shots/", None, {"crf": 20}, "crf: got 20 for png"),
        ("null", None, {"crf": 20}, "crf: got 20 for null"),
        ("clip.webm", None, {"codec": "h264"}, "codec: got h264 for webm, expected vp9 or av1"),
        ("clip.mov", None, {"codec": "vp9"}, "codec: got vp9 for mov, expected h264 or hevc"),
        ("clip.mp4", None, {"codec": "theora"}, "codec: got theora for mp4, expected h264 or hevc or av1 or vp9"),
        ("clip.mp4", None, {"crf": 52}, "crf: got 52 for h264, expected 0"),
        ("clip.webm", None, {"crf": -1}, "crf: got -1 for vp9, expected 0"),
        ("clip.mp4", None, {"pix_fmt": "rgb24"}, "pix-fmt: got rgb24 for mp4, expected yuv420p or"),
        ("clip.webm", None, {"pix_fmt": "yuv420p10le"}, "pix-fmt: got yuv420p10le for webm"),
        ("clip.y4m", None, {"pix_fmt": "yuv420p10le"}, "pix-fmt: got yuv420p10le for y4m"),
        ("odd.y4m", None, {"pix_fmt": "yuv420p"}, "got 63x47 pixels in yuv420p, expected even numbers"),
        ("odd.y4m", None, {"pix_fmt": "yuv422p"}, "got 63x47 pixels in yuv422p, expected an even width"),
        ("odd.mkv", None, {}, "got 63x47 pixels in yuv420p, expected even numbers"),
        ("-", "mov", {}, "format: got mov, expected one of"),
        ("-", "webm", {"codec": "hevc"}, "codec: got hevc for webm"),
        ("tiny.mp4", None, {"codec": "hevc"}, "libx265: got 2x2 pixels"),
    ],
)
def test_choices_that_do_not_go_together(tmp_path, target, format, encoding, said):
    size = {"odd": (47, 63), "tiny": (2, 2)}.get(target.partition(".")[0], SIZE)
    place = target if target in ("-", "null") else f"{tmp_path}/{target}"
    with pytest.raises(ValueError, match=r"got .*expected") as raised:
        open_sink(place, FPS, size, format, Encoding(**encoding))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


NAMES = [
    "-clip.mp4",
    "100%.mp4",
    "%05d.mp4",
    "a b.mp4",
    "a\nb.mp4",
    "clip..mp4",
    "\udcff.mp4",
    "x" * 251 + ".mp4",
    "ü.mp4",
]


@pytest.mark.parametrize("name", [*NAMES, "%d\n.png"])
def test_odd_names_are_names(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(name, moving_square(3))
    made = name % 2 if name.endswith("png") else name
    assert np.abs(decode(made)[0][-1][40, 60].astype(int) - (150, 40, 60)).max() <= 4
    assert len(os.listdir(tmp_path)) == (3 if name.endswith("png") else 1)


def test_links_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    for link, file in (("new.mp4", "new.mp4"), ("old.mp4", "old.mp4"), ("shots", "shots")):
        (tmp_path / link).symlink_to(tmp_path / "far" / file)
    (tmp_path / "far" / "old.mp4").write_bytes(b"old")
    (tmp_path / "far" / "shots").mkdir()
    for name in ("new.mp4", "old.mp4", "shots"):
        write(tmp_path / name, moving_square(2))
        assert (tmp_path / name).is_symlink()
    assert files_in(tmp_path / "far") == ["new.mp4", "old.mp4", "shots/00000.png", "shots/00001.png"]
    assert len(decode(tmp_path / "far" / "old.mp4")[0]) == 2


def test_a_protected_file_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"mine")
    real = os.access
    monkeypatch.setattr(engine.media.base.os, "access", lambda path, mode: real(path, mode) and path.name != "clip.mp4")
    with pytest.raises(PermissionError, match=r"write-protected, expected"):
        open_sink(tmp_path / "clip.mp4", FPS, SIZE)
    assert files_in(tmp_path) == ["clip.mp4"]


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
    monkeypatch.setattr(engine.media.sequences, "HELD_LIMIT", 3 * 48 * 64 * 3)
    with pytest.raises(ValueError, match="more than 3 frames"):
        write(tmp_path / "clip.gif", moving_square(4))
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 3


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for target, package in (("clip.mp4", "av"), ("clip.gif", "pillow"), ("shots/", "pillow")):
        with pytest.raises(ImportError, match=f"got no package {package}, expected it installed"):
            open_sink(f"{tmp_path}/{target}", FPS, SIZE)
    write(tmp_path / "clip.y4m", moving_square(2))
    assert [p.name for p in tmp_path.iterdir()] == ["clip.y4m"]
