"""Clips: which frames are taken at which time, what their pixels are, and what is refused."""

import os
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import grey, numbers_of, plain, write
from PIL import Image, ImageSequence

import engine.media.clips
from engine.media.clips import read_clip
from engine.media.frames import Renderer

SIZE = 32, 48
MS = Fraction(1, 1000)


def shown_at(times, end, fps, rounded=0.0):
    """By definition: at k / fps the last frame whose time, in seconds, is not after it."""
    found = []
    while len(found) / fps < end - 1e-9:
        found.append(max(i for i, t in enumerate(times) if t - rounded <= len(found) / fps + 1e-9))
    return found


@pytest.mark.parametrize(
    ("rate", "fps"), [(8, 8), (16, 8), (8, 16), (24, 16), (30, 8), (25, 16), (30, 24), (50, 16), (12, 30)]
)
def test_a_frame_is_shown_until_the_next_one(tmp_path, rate, fps):
    write(tmp_path / "a.mp4", map(grey, range(20)), rate=rate, tick=Fraction(1, rate))
    expected = shown_at([i / rate for i in range(20)], 20 / rate, fps)
    assert numbers_of(read_clip(tmp_path / "a.mp4", *SIZE, fps, last=200)) == expected


def jittered(count, rate, seed=0):
    off = np.random.default_rng(seed).integers(-4, 5, count)
    off[0] = 0
    return [round(1000 * i / rate) + int(d) for i, d in enumerate(off)]


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.mp4", "libx264")])
def test_jittered_timestamps(tmp_path, name, codec):
    """Two seconds of 30 frames each, as a browser records them; the mean rate that a container tells may be 1000."""
    times = jittered(60, 30)
    fast = {"deadline": "realtime", "cpu-used": "8", "crf": "4"} if codec == "libvpx-vp9" else {"crf": "4"}
    frames = [grey(i % 2 + 2 * (i // 6)) for i in range(60)]
    write(tmp_path / name, frames, times, codec=codec, rate=1000, codec_options=fast, held=33)
    got = numbers_of(read_clip(tmp_path / name, *SIZE, 16, 99))
    expected = [i % 2 + 2 * (i // 6) for i in shown_at([t / 1000 for t in times], 2, 16, 0.0005)]
    assert len(got) == 32
    assert got == expected


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.webm"])
def test_milliseconds_do_not_repeat_or_skip_frames(tmp_path, name):
    """At 30 fps a container of milliseconds says 0, 33, 67: each frame is taken once all the same."""
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    write(tmp_path / name, map(grey, range(45)), codec=codec, rate=30)
    assert numbers_of(read_clip(tmp_path / name, *SIZE, 30, 99)) == list(range(45))


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.flv"])
def test_a_still_of_three_seconds_inside(tmp_path, name):
    times = [0, 100, 200, 3200, 3300]
    write(tmp_path / name, map(grey, range(5)), times, held=100)
    expected = shown_at([t / 1000 for t in times], 3.4, 16, 0.0005)
    assert expected.count(2) == 48
    assert numbers_of(read_clip(tmp_path / name, *SIZE, 16, 99)) == expected


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.webm"])
def test_the_last_frame_has_its_own_duration(tmp_path, name):
    codec, free = ("libvpx-vp9", {}) if name == "a.webm" else ("libx264", {"bf": "0", "crf": "4"})
    write(tmp_path / name, map(grey, range(3)), [0, 100, 200], codec=codec, codec_options=free, held=1800)
    got = numbers_of(read_clip(tmp_path / name, *SIZE, 10, 99))
    assert got == [0, 1] + 18 * [2]


@pytest.mark.parametrize(
    ("name", "codec", "start"),
    [("a.ts", "libx264", 0), ("a.mp4", "libx264", 5000), ("a.mkv", "libx264", 5000), ("a.avi", "mpeg4", 0),
     ("a.mp4", "libx264", -200), ("a.h264", "libx264", 0), ("a.mpg", "mpeg2video", 0)],
)  # fmt: skip
def test_time_begins_with_the_first_frame(tmp_path, name, codec, start):
    """Timestamps that begin late, or below zero behind an edit list, or are missing, as in a raw stream."""
    tick, step = (Fraction(1, 25), 1) if name in ("a.avi", "a.mpg") else (MS, 40)
    times = [start * step // 40 + step * i for i in range(20)]
    options = {"bf": "2", "crf": "4"} if codec == "libx264" else {"qscale": "1", "flags": "+qscale"}
    write(tmp_path / name, map(grey, range(20)), times, codec=codec, tick=tick, rate=25, codec_options=options)
    got = numbers_of(read_clip(tmp_path / name, *SIZE, 25, 99))
    whole = list(range(20))
    assert got in (whole, [i for i in whole if times[i] >= 0])  # an edit list hides what lies below zero
    assert got[-1] == 19


def test_a_recording_that_starts_again_goes_on(tmp_path):
    """Two transport streams in one file: the second one's clock begins anew."""
    for name, first in (("a.ts", 0), ("b.ts", 10)):
        write(tmp_path / name, [grey(first + i) for i in range(10)], rate=10)
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    assert numbers_of(read_clip(tmp_path / "c.ts", *SIZE, 10, 99)) == list(range(20))


GOPS = {
    "closed.mp4": ("libx264", {"g": "25", "bf": "2"}),
    "open.mp4": ("libx264", {"g": "25", "bf": "3", "x264-params": "open-gop=1"}),
    "open.mkv": ("libx264", {"g": "25", "bf": "3", "x264-params": "open-gop=1"}),
    "refresh.mp4": ("libx264", {"g": "25", "x264-params": "intra-refresh=1"}),
    "long.mp4": ("libx264", {"g": "9999"}),
    "h265.mp4": ("libx265", {"x265-params": "keyint=25:bframes=3:open-gop=1:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "25", "deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.mp4": ("mpeg4", {"g": "25", "bf": "2"}),
}


@pytest.mark.parametrize("name", GOPS)
@pytest.mark.parametrize("last", [1, 30])
def test_a_seek_changes_nothing(tmp_path, monkeypatch, name, last):
    codec, options = GOPS[name]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    moving = [np.ascontiguousarray(np.roll(noise, 3 * i, 1)[:64, :64]) for i in range(240)]
    write(tmp_path / name, moving, jittered(240, 20), codec=codec, rate=20, codec_options=options)
    notes, shares = [], []
    got = read_clip(tmp_path / name, *SIZE, 16, last, notes=notes, progress=shares.append)
    seeks = []
    real = engine.media.clips._starts
    monkeypatch.setattr(engine.media.clips, "_starts", lambda wanted: seeks.extend(real(wanted)) or [])
    again = []
    assert np.array_equal(got, read_clip(tmp_path / name, *SIZE, 16, last, notes=again))
    assert len(got) == last
    assert seeks
    assert notes == again
    assert re.fullmatch(rf".*: taken: the last {last} of 19[123] frames at 16 fps", notes[-1])
    assert shares[-1] == 1
    assert all(0 <= share <= 1 for share in shares)


def test_only_the_end_is_decoded(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", map(grey, range(600)), rate=20, codec_options={"g": "20", "bf": "0"})
    decoded = []
    real = engine.media.clips.Clock.at
    monkeypatch.setattr(engine.media.clips.Clock, "at", lambda *given: decoded.append(1) or real(*given))
    assert numbers_of(read_clip(tmp_path / "a.mp4", *SIZE, 20, 8)) == [i % 50 for i in range(592, 600)]
    assert len(decoded) < 60


# The display matrix as `ffmpeg` follows it (fftools/ffmpeg_filter.c), by degrees and mirroring.
AUTOROTATE = {
    (90, 0, 0): [("transpose", "cclock")], (270, 0, 0): [("transpose", "clock")],
    (180, 0, 0): [("hflip", ""), ("vflip", "")],
    (0, 1, 0): [("hflip", "")], (0, 0, 1): [("vflip", "")], (180, 1, 0): [("vflip", "")],
    (90, 1, 0): [("transpose", "clock_flip")], (90, 0, 1): [("transpose", "cclock_flip")],
}  # fmt: skip


def filtered(frame, filters):
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=MS)]
    nodes += [graph.add(name, arguments) if arguments else graph.add(name) for name, arguments in filters]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


@pytest.mark.parametrize("turn", AUTOROTATE, ids=str)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_display_matrix(tmp_path, turn, name):
    degrees, across, down = turn
    y, x = np.mgrid[0:32, 0:48]
    picture = np.stack([5 * x, 7 * y, 255 - 3 * (x + y)], -1).astype(np.uint8)

    codec, pixels = ("ffv1", "bgr0") if name == "a.mkv" else ("png", "rgb24")

    def prepare(stream):
        stream.set_display_rotation(degrees, hflip=bool(across), vflip=bool(down))

    write(tmp_path / name, [picture], codec=codec, pixels=pixels, prepare=prepare)
    expected = filtered(av.VideoFrame.from_ndarray(picture), AUTOROTATE[turn]).to_ndarray(format="rgb24")
    notes = []
    assert np.array_equal(read_clip(tmp_path / name, *expected.shape[:2], 10, 9, notes=notes)[0], expected)
    assert ["as its metadata says" in note for note in notes] == [True]


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.mov", "png")]
)
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(16, 11)])
def test_pixels_that_are_not_square(tmp_path, name, codec, aspect):
    """A disc that is a disc on the display."""
    y, x = np.mgrid[0:128, 0:128] - 63.5
    disc = np.repeat((((x * float(aspect)) ** 2 + y**2) < 30**2)[..., None] * np.uint8(255), 3, -1)

    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    write(tmp_path / name, [disc], codec=codec, pixels="rgb24" if codec == "png" else "yuv420p", prepare=prepare)
    shape = (128, round(128 * aspect))
    got = read_clip(tmp_path / name, *shape, 10, 9)[0, ..., 0] > 127
    assert got.any(0).sum() == pytest.approx(60, abs=3)
    assert got.any(1).sum() == pytest.approx(60, abs=3)


KR_KB = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "bt2020": (0.2627, 0.0593)}


def decoded(y, u, v, matrix, full, bits=8):
    """R'G'B' in [0, 255] of Y'CbCr, by the definition in BT.601, BT.709 and BT.2020."""
    kr, kb = KR_KB[matrix]
    scale = 2 ** (bits - 8)
    y = y / (2**bits - 1) if full else (y - 16 * scale) / (219 * scale)
    pb, pr = ((c - 128 * scale) / (2**bits - 1 if full else 224 * scale) for c in (u, v))
    r, b = y + 2 * (1 - kr) * pr, y + 2 * (1 - kb) * pb
    return 255 * np.clip([r, (y - kr * r - kb * b) / (1 - kr - kb), b], 0, 1)


COLOURS = [
    ("yuv420p", 2, 0, (720, 64), "bt709", False),  # untagged: by size
    ("yuv420p", 2, 0, (64, 1280), "bt709", False),
    ("yuv420p", 2, 0, (576, 720), "bt601", False),
    ("yuv420p", 1, 1, (64, 64), "bt709", False),
    ("yuv420p", 6, 1, (720, 64), "bt601", False),
    ("yuv420p", 5, 1, (720, 64), "bt601", False),
    ("yuv444p", 9, 1, (64, 64), "bt2020", False),
    ("yuv420p", 1, 2, (64, 64), "bt709", True),
    ("yuv422p10le", 1, 1, (64, 64), "bt709", False),
    ("yuv420p12le", 6, 2, (64, 64), "bt601", True),
]


@pytest.mark.parametrize(("pixels", "matrix", "span", "size", "expected", "full"), COLOURS, ids=str)
def test_matrix_and_range(tmp_path, pixels, matrix, span, size, expected, full):
    bits = av.VideoFormat(pixels).components[0].bits
    values = [value * 2 ** (bits - 8) for value in (120, 90, 180)]
    frame = plain(pixels, *values, height=size[0], width=size[1])

    def prepare(stream):
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, span

    def retag(frame):
        frame.colorspace, frame.color_range = matrix, span

    write(tmp_path / "a.mkv", [frame], codec="ffv1", pixels=pixels, prepare=prepare, retag=retag)
    got = read_clip(tmp_path / "a.mkv", 16, 16, 10, 9)[0]
    want = decoded(*values, expected, full, bits)
    assert np.abs(got - want).max() <= 2
    others = [decoded(*values, other, flag, bits) for other in KR_KB for flag in (False, True)]
    assert sum(np.abs(other - want).max() <= 4 for other in others) == 1  # the others would be seen


EVERY = [
    "yuv420p", "yuv411p", "yuv410p", "nv12", "p010le", "yuv444p16le", "gray", "gray16le", "rgb24", "rgb48le",
    "gbrp12le", "yuyv422",
]  # fmt: skip


@pytest.mark.parametrize("pixels", EVERY)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (2, 400), (400, 2), (36, 52)])
@pytest.mark.parametrize("aspect", [None, Fraction(100), Fraction(1, 100)])
def test_every_format_and_shape(pixels, size, aspect):
    frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 150, np.uint8)).reformat(format=pixels, threads=1)
    frame.pts, frame.time_base = 0, MS
    got = Renderer(*SIZE, aspect, "a", [])(frame)
    assert got.shape == (*SIZE, 3)
    assert np.abs(got.astype(int) - 150).max() <= 1


def test_a_jpeg_track_has_full_range(tmp_path):
    write(tmp_path / "a.avi", [np.full((32, 48, 3), level, np.uint8) for level in (5, 250)], codec="mjpeg",
          pixels="yuvj420p", tick=Fraction(1, 10))  # fmt: skip
    got = read_clip(tmp_path / "a.avi", *SIZE, 10, 9)
    assert [round(float(frame.mean())) for frame in got] == pytest.approx([5, 250], abs=2)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("a.webm", "libvpx-vp9", "yuva420p"), ("a.webm", "libvpx", "yuva420p"), ("a.mov", "prores_ks", "yuva444p10le"),
     ("a.mov", "png", "rgba"), ("a.mov", "qtrle", "argb"), ("a.mkv", "ffv1", "bgra")],
)  # fmt: skip
def test_alpha_lies_over_black(tmp_path, name, codec, pixels):
    picture = np.full((32, 48, 4), (200, 120, 60, 255), np.uint8)
    picture[:, 16:32, 3], picture[:, 32:, 3] = 128, 0
    options = {"auto-alt-ref": "0"} if codec.startswith("libvpx") else {}
    write(tmp_path / name, [picture] * 3, codec=codec, pixels=pixels, codec_options=options)
    notes = []
    got = read_clip(tmp_path / name, *SIZE, 10, 9, notes=notes)[1].astype(int)
    for columns, alpha in ((slice(2, 14), 1), (slice(18, 30), 128 / 255), (slice(34, 46), 0)):
        middle = got[4:28, columns].reshape(-1, 3).mean(0)
        assert middle == pytest.approx(np.array([200, 120, 60]) * alpha, abs=5)
    assert [f"{name}: alpha laid over black"] == notes


def test_interlaced_frames_give_their_upper_field(tmp_path):
    rows = np.zeros((32, 48, 3), np.uint8)
    rows[::2] = 200  # the lower field is black
    write(
        tmp_path / "a.mkv",
        [rows] * 3,
        pixels="yuv444p",
        codec_options={"flags": "+ildct+ilme", "x264-params": "tff=1", "crf": "1"},
    )
    notes = []
    got = read_clip(tmp_path / "a.mkv", *SIZE, 10, 9, notes=notes)
    assert np.abs(got.astype(int) - 200).max() <= 4
    assert notes == ["a.mkv: interlaced, only the upper field is used"]


@pytest.mark.parametrize(("kind", "options"), [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_animations(tmp_path, kind, options):
    lengths = [100, 250, 400, 50, 200]
    pictures = [Image.fromarray(grey(10 * i)) for i in range(5)]
    path = tmp_path / f"a.{kind}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=lengths, **options)
    times = np.cumsum([0, *lengths]) / 1000
    with Image.open(path) as image:
        levels = [float(np.asarray(frame.convert("RGB")).mean()) for frame in ImageSequence.Iterator(image)]
    expected = [levels[i] for i in shown_at(times[:-1], times[-1], 20)]
    assert [float(frame.mean()) for frame in read_clip(path, *SIZE, 20, 99)] == pytest.approx(expected, abs=0.01)
    assert len(read_clip(path, *SIZE, 20, 7)) == 7


def spoiled(folder, how):
    """A file that cannot be read, and the words that must stand in the error."""
    path = folder / how
    if how == "fifo":
        os.mkfifo(path)
    elif how == "directory":
        path.mkdir()
    elif how == "empty.mp4":
        path.touch()
    elif how in ("text.mp4", "text.txt"):
        path.write_text("hello\n" * 1000)
    elif how == "list.m3u8":
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n")
    elif how == "list.mp4":
        path.write_text("ffconcat version 1.0\nfile other.mp4\n")
    elif how == "huge.y4m":
        path.write_bytes(b"YUV4MPEG2 W10000 H10000 F10:1 C420\nFRAME\n" + bytes(100))
    elif how in ("picture.png", "picture.jpg", "picture.webp", "picture.gif", "picture.tif", "picture.mp4"):
        Image.fromarray(grey(9)).save(path, format="PNG" if how == "picture.mp4" else None)
    elif how == "locked.mp4":
        scheme = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "7" * 32, "encryption_kid": "a" * 32}
        write(path, map(grey, range(5)), muxer=scheme)
    elif how == "codec.mp4":
        write(path, map(grey, range(5)))
        path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    elif how == "sound.wav":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
    elif how == "cut.mp4":
        write(path, map(grey, range(40)))
        path.write_bytes(path.read_bytes()[:600])
    return path


REFUSED = {
    "fifo": "a pipe, expected a file", "directory": "a directory, expected a file", "empty.mp4": "an empty file",
    "text.mp4": "expected a video", "text.txt": "text, expected a video", "list.m3u8": "a playlist, expected",
    "list.mp4": "a playlist, expected", "huge.y4m": "10000x10000 pixels, expected at most 67 megapixels",
    "picture.png": "pass it as --image", "picture.jpg": "pass it as --image", "picture.webp": "pass it as --image",
    "picture.gif": "pass it as --image", "picture.tif": "pass it as --image", "picture.mp4": "pass it as --image",
    "locked.mp4": "an encrypted video, expected", "codec.mp4": "a codec that FFmpeg does not know, expected",
    "sound.wav": "only sound, expected a video track", "cut.mp4": "expected a video", "missing.mp4": "an existing file",
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_refused(tmp_path, how):
    path = spoiled(tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(REFUSED[how])) as raised:
        read_clip(path, *SIZE, 8, 9)
    assert str(raised.value).startswith(f"video: got {path}, ")
    assert "\n" not in str(raised.value)
    assert "Errno" not in str(raised.value)


NO_FILE = {"-": "save standard input", "https://host/a.mp4": "a URL", "rtsp://host/a": "a URL", "/dev/zero": "a device"}


@pytest.mark.parametrize("given", NO_FILE)
def test_what_is_no_file(given):
    with pytest.raises(ValueError, match=r"video: got .*expected a file") as raised:
        read_clip(Path(given), *SIZE, 8, 9)
    assert NO_FILE[given] in str(raised.value)


def long_clip(path, codec="libx264"):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    frames = [np.ascontiguousarray(np.roll(noise, 2 * i, 1)) for i in range(80)]
    muxer = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    write(path, frames, codec=codec, codec_options={"g": "20", "bf": "0", "crf": "20"}, muxer=muxer)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_file_that_is_cut_off_gives_what_is_left(tmp_path, name):
    long_clip(tmp_path / name)
    whole = read_clip(tmp_path / name, *SIZE, 10, 99)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(0.6 * len(data))])
    notes = []
    got = read_clip(tmp_path / name, *SIZE, 10, 99, notes=notes)
    assert 30 < len(got) < 60
    assert np.array_equal(got, whole[: len(got)])
    assert notes[0] == f"{name}: cut off, what is left ends after {len(got) / 10:.1f} s"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_damage_before_the_end_is_an_error(tmp_path, name):
    long_clip(tmp_path / name)
    data = bytearray((tmp_path / name).read_bytes())
    middle = int(0.5 * len(data))
    data[middle : middle + 9000] = np.random.default_rng(1).bytes(9000)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"video: got .*a.m.*, damaged after [34]\.\d s, expected a whole file"):
        read_clip(tmp_path / name, *SIZE, 10, 99)


def test_names_that_are_unusual(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4", map(grey, range(3)))
    for name in ("-x.mp4", "http:x.mp4", "a%03d.mp4", os.fsdecode(b"caf\xe9.mp4"), "pipe:0"):
        os.replace("a.mp4", name)
        assert numbers_of(read_clip(Path(name), *SIZE, 10, 9)) == [0, 1, 2]
        os.replace(name, "a.mp4")


def test_progress_grows(tmp_path):
    shares = []
    write(tmp_path / "a.avi", map(grey, range(40)), codec="mpeg4", tick=Fraction(1, 10))
    read_clip(tmp_path / "a.avi", *SIZE, 10, 99, progress=shares.append)
    assert all(a <= b for a, b in pairwise(shares))
    assert len(set(shares)) > 20
