"""Coded video: the parts of the file, colours, timing, and what happens where a copy or an encoder fails."""

import errno
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from videos import box, boxes, decode, grey_steps, is_grey_steps, is_ordinary_mp4, moving_square, packets

import engine.media.containers
from engine.files import left_over
from engine.media.sinks import Encoding, open_sink

SIZE = (48, 64)
ALL = [
    ("clip.mp4", "h264", "h264"), ("clip.mp4", "hevc", "hevc"), ("clip.mp4", "av1", "av1"), ("clip.mp4", "vp9", "vp9"),
    ("clip.mov", None, "h264"), ("clip.mov", "hevc", "hevc"), ("clip.mkv", None, "h264"), ("clip.mkv", "av1", "av1"),
    ("clip.webm", None, "vp9"), ("clip.webm", "av1", "av1"),
]  # fmt: skip


def write(path, frames, fps=16, **encoding):
    with open_sink(path, fps, frames[0].shape[:2], encoding=Encoding(**encoding)) as sink:
        for frame in frames:
            sink.write(frame)
    return sink


def part_of(path):
    (part,) = path.parent.glob(f".{path.name}.*.part")
    return part


@pytest.mark.parametrize(("name", "codec", "made"), ALL)
def test_frames_come_back(tmp_path, name, codec, made):
    frames = moving_square(21, (64, 96))
    sink = write(tmp_path / name, frames, codec=codec)
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.codec.canonical_name, stream.average_rate) == (made, 16)
        assert float(container.duration / 1e6) == pytest.approx(21 / 16, abs=0.002)
    got, _ = decode(tmp_path / name)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(got, frames, strict=True)) < 5
    exact = name.endswith((".mp4", ".mov"))  # the others count milliseconds
    for i, (pts, key, _) in enumerate(packets(tmp_path / name)):
        assert pts == Fraction(i, 16) if exact else abs(pts - Fraction(i, 16)) <= Fraction(1, 1000)
        assert key or i
    assert os.listdir(tmp_path) == [name]
    assert sink.notes == []


@pytest.mark.parametrize(("name", "codec", "made"), ALL[:6])
def test_a_finished_mp4_is_an_ordinary_one(tmp_path, name, codec, made):
    """One moov ahead of the pictures, with length, time table, key frames and colours; the packets as recorded."""
    path = tmp_path / name
    sink = open_sink(path, 24000 / 1001, SIZE, encoding=Encoding(codec=codec))
    for frame in moving_square(60):
        sink.write(frame)
    sink.container.close()
    recorded = packets(part_of(path))
    assert "moof" in [place for place, _ in boxes(part_of(path).read_bytes())]
    assert [len(recorded), recorded[0][1]] == [60, True]
    sink.container = type("Closed", (), {"close": lambda self: None, "mux": lambda self, packet: None})()
    sink.close()
    assert packets(path) == recorded
    assert is_ordinary_mp4(path)
    scale, length = struct.unpack(">II", box(path, "moov/mvhd")[12:20])
    assert length / scale == pytest.approx(60 * 1001 / 24000, abs=1 / scale)
    times = box(path, "stbl/stts")
    entries = [struct.unpack_from(">II", times, 8 + 8 * i) for i in range(struct.unpack_from(">I", times, 4)[0])]
    assert sum(count for count, _ in entries) == 60
    assert len({delta for _, delta in entries}) == 1
    keys = box(path, "stbl/stss")
    numbers = struct.unpack(f">{(len(keys) - 8) // 4}I", keys[8:])
    assert list(numbers) == [i + 1 for i, (_, key, _) in enumerate(recorded) if key]
    assert {1, 25, 49} <= set(numbers)  # one a second
    colours = box(path, "/colr")
    assert struct.unpack(">HHH", colours[4:10]) == (1, 1, 1)  # primaries, transfer, matrix: BT.709
    if name.endswith("mp4"):
        assert colours[:4] + colours[10:] == b"nclx\0"  # limited range


COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (255, 255, 0),
    (0, 255, 255),
    (255, 0, 255),
]


@pytest.mark.parametrize("size", [(48, 64), (480, 832), (720, 1280), (1088, 1920)])
@pytest.mark.parametrize(("name", "codec", "made"), [ALL[0], ALL[1], ALL[2], ALL[3], ALL[4], ALL[6], ALL[8]])
def test_pure_colours(tmp_path, name, codec, made, size):
    if size[0] > 720 and codec:
        pytest.skip("shown by the other sizes")
    write(tmp_path / name, [np.full((*size, 3), colour, np.uint8) for colour in COLOURS], codec=codec)
    with av.open(str(tmp_path / name)) as container:
        for picture, colour in zip(container.decode(video=0), COLOURS, strict=True):
            tags = picture.colorspace, picture.color_primaries, picture.color_trc, picture.color_range
            assert tags == (1, 1, 1, 1)
            got = picture.to_ndarray(format="rgb24")[::7, ::7].astype(int)
            assert np.abs(got - colour).max() <= (4 if made == "vp9" else 3), colour
            luma = np.dot([0.2126, 0.7152, 0.0722], colour) * 219 / 255 + 16  # ITU-R BT.709-6, section 3
            assert abs(int(picture.to_ndarray()[5, 5]) - luma) <= 2


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le"])
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_pixel_formats(tmp_path, pix_fmt, codec):
    size = (49, 63) if "444" in pix_fmt else SIZE
    frames = moving_square(4, size)
    write(tmp_path / "clip.mkv", frames, pix_fmt=pix_fmt, codec=codec)
    with av.open(str(tmp_path / "clip.mkv")) as container:
        got = list(container.decode(video=0))
    assert [picture.format.name for picture in got] == [pix_fmt] * 4
    assert np.abs(got[-1].to_ndarray(format="rgb24")[40, 60].astype(int) - frames[-1][40, 60]).max() <= 4


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p10le"])
def test_a_frame_is_converted_the_same_way_each_time(tmp_path, monkeypatch, pix_fmt):
    """On several threads, FFmpeg's scaler gets rows of about one such picture in ten wrong."""
    seen, real = set(), engine.media.containers.VideoSink._mux

    def collect(sink, picture):
        for plane in picture.planes if picture else ():
            rows = np.frombuffer(plane, np.uint16).reshape(plane.height, -1)
            seen.add((plane.height, rows[:, : plane.width].tobytes()))
        real(sink, picture)

    monkeypatch.setattr(engine.media.containers.VideoSink, "_mux", collect)
    frame = np.random.default_rng(0).integers(0, 256, (48, 104, 3), np.uint8)
    write(tmp_path / "clip.mkv", 300 * [frame], pix_fmt=pix_fmt)
    assert len(seen) == 3


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9"])
def test_crf_is_quality(tmp_path, codec):
    frames = [np.random.default_rng(i).integers(0, 256, (*SIZE, 3), np.uint8) for i in range(4)]
    errors, sizes = [], []
    for crf in (4, 45):
        write(tmp_path / f"{crf}.mkv", frames, codec=codec, crf=crf)
        errors.append(np.abs(np.stack(decode(tmp_path / f"{crf}.mkv")[0]).astype(int) - np.stack(frames)).mean())
        sizes.append((tmp_path / f"{crf}.mkv").stat().st_size)
    assert errors[0] < errors[1]
    assert sizes[0] > 2 * sizes[1]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), RuntimeError("a\nb")]
)
def test_without_the_copy_the_recording_is_the_result(tmp_path, name, failure, monkeypatch):
    def fail(self, source, target):
        target.write_bytes(b"half a copy")
        raise failure

    monkeypatch.setattr(engine.media.containers.VideoSink, "_copy", fail)
    sink = write(tmp_path / name, grey_steps(12))
    assert len(sink.notes) == 1
    assert "stays fragmented" in sink.notes[0]
    assert "\n" not in sink.notes[0]
    assert os.listdir(tmp_path) == [name]
    got, _ = decode(tmp_path / name)
    assert len(got) == 12
    assert is_grey_steps(got)


def test_a_copy_that_lacks_frames_is_not_taken(tmp_path, monkeypatch):
    real = engine.media.containers.VideoSink._copy
    monkeypatch.setattr(engine.media.containers.VideoSink, "_copy", lambda *arguments: real(*arguments) - 1)
    assert "11 of 12 frames were copied" in write(tmp_path / "clip.mp4", grey_steps(12)).notes[0]
    assert len(decode(tmp_path / "clip.mp4")[0]) == 12
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_signal_ends_the_copy(tmp_path):
    sink = open_sink(tmp_path / "clip.mp4", 16, SIZE)
    for frame in grey_steps(12):
        sink.write(frame)
    sink.hurry = True
    sink.close()
    assert "stays fragmented" in sink.notes[0]
    assert len(decode(tmp_path / "clip.mp4")[0]) == 12
    assert not left_over(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov", "clip.mkv", "clip.webm"])
def test_a_file_cut_anywhere_is_kept_up_to_there(tmp_path, name):
    """What a full disk leaves: the file ends inside a frame, and nothing more can be written."""
    for cut in (3, 41, 170):
        path = tmp_path / f"{cut}{name}"
        sink = open_sink(path, 16, SIZE)
        for frame in grey_steps(20):
            sink.write(frame)
        with part_of(path).open("r+b") as file:
            file.truncate(part_of(path).stat().st_size - cut)
        sink.container = type("Full", (), {"close": lambda self: 1 / 0, "mux": lambda self, packet: 1 / 0})()
        sink.abort()
        assert sink.kept == path
        got, _ = decode(path)
        assert 12 <= len(got) == sink.frames < 20
        assert is_grey_steps(got)
        if name.endswith(("mp4", "mov")):
            assert is_ordinary_mp4(path)


def test_an_encoder_that_is_missing_is_said(tmp_path, monkeypatch):
    real = av.codec.Codec

    def codec(name, mode="r"):
        if mode == "w" and name in ("libx264", "libopenh264", "libx265"):
            raise ValueError(name)
        return real(name, mode)

    monkeypatch.setattr(av.codec, "Codec", codec)
    for asked in ("h264", "hevc"):
        with pytest.raises(ValueError, match=rf"codec: got {asked} for mp4, expected av1 or vp9"):
            open_sink(tmp_path / "clip.mp4", 16, SIZE, encoding=Encoding(codec=asked))
    write(tmp_path / "clip.mp4", grey_steps(3))  # the default is then another one
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "av1"
