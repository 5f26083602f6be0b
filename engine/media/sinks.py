"""Outputs for frames: files that appear whole, image sequences, stdout, a checksum, or only a count.

    with open_sink("out/demo.mp4", fps=16, size=(480, 832)) as sink:
        for frame in stream:        # uint8 [H, W, 3]
            sink.write(frame)

A sink writes `.<name>.part` beside the target; `close` renames it and `abort` deletes it.
An mp4 is fragmented: the `.part` of a killed process plays up to its last whole frame.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import sys
from contextlib import suppress
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol, Self

import numpy as np

from engine.files import part_of

HELD_LIMIT = 1 << 30  # bytes of frames that gif and webp may hold: their writer needs all frames at once
CRF = 18  # x264's quality: visually close to lossless


class Sink(Protocol):
    """Takes frames uint8 [H, W, 3] one by one. After the first `close` or `abort`, further calls of both do nothing."""

    frames: int  # number written so far

    def write(self, frame: np.ndarray) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind, error, trace) -> None: ...


class OutputClosed(BrokenPipeError):
    """The reader of stdout has gone. A stream may end this way; it is not a failure."""


def open_sink(target: str | Path, fps: float, size: tuple[int, int], format: str | None = None) -> Sink:
    """The sink for a target; size is (height, width).

    null                   counts frames
    checksum               hashes them
    -                      writes to stdout in `format` (y4m, mp4 or rgb; y4m if None)
    DIR/, or a directory   writes 00000.png, 00001.png, ...
    name_%05d.png          writes one file per frame
    else                   the suffix decides: .mp4, .y4m, .rgb (raw), .gif, .webp

    Raises ValueError (got and expected), OSError for a place that cannot be written, ImportError for a missing package.
    """
    height, width = size
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps: got {fps}, expected 0.01 to 1000")
    if min(size) < 1:
        raise ValueError(f"size: got {width}x{height} pixels, expected positive numbers")
    name, rate = str(target), Fraction(fps).limit_denominator(1001)
    if format is not None and name != "-":
        raise ValueError(f"format: got {format} for {name}, expected it only for stdout (-); a file has a suffix")
    if name == "null":
        return NullSink(size)
    if name == "checksum":
        return ChecksumSink(size)
    if name == "-":
        format = format or "y4m"
        if format not in STREAM_FORMATS:
            raise ValueError(f"format: got {format}, expected one of {', '.join(STREAM_FORMATS)}")
        return STREAM_FORMATS[format](size, rate, None)
    path = Path(target).absolute()  # gives even . a name
    if name.endswith("/") or path.is_dir():
        _check_place(path)
        return PngSink(size, path, None)
    suffix = path.suffix.lower()
    if suffix == ".png":
        if not re.fullmatch(r"[^%]*%(0\d)?d[^%]*", path.name):
            raise ValueError(f"output: got {path.name}, expected a pattern such as frame_%05d.png, or a directory/")
        _check_place(path)
        return PngSink(size, path.parent, path.name)
    sinks = {f".{kind}": sink for kind, sink in {**STREAM_FORMATS, "gif": AnimationSink, "webp": AnimationSink}.items()}
    if suffix not in sinks:
        expected = f"{', '.join(sinks)}, name_%05d.png, a directory/, null, checksum or -"
        raise ValueError(f"output: got {name}, expected {expected}")
    _check_place(path)
    return sinks[suffix](size, rate, path)


def _check_place(path: Path) -> None:
    """Raise OSError or ValueError before the first frame is made if `path` cannot be written."""
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"output: got {path}, expected an existing directory {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"output: got {path}, expected {folder} to be a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"output: got {path}, expected a directory that can be written, {folder} cannot")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"output: got {path}, a device or pipe, expected a file name; use - for a pipe")


def _need(module: str, what: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        package = {"av": "av", "PIL.Image": "pillow"}[module]
        expected = f"it installed (extra `video`, or pip install {package}); .y4m and .rgb need no package"
        raise ImportError(f"{what} output: got no package {package}, expected {expected}") from error


class BaseSink:
    """Checks frames and the order write* -> close or abort; subclasses define `_put`, `_finish` and `_discard`."""

    def __init__(self, size: tuple[int, int]):
        self.shape = (*size, 3)
        self.frames = 0
        self.ended = False

    def write(self, frame: np.ndarray) -> None:
        if self.ended:
            raise ValueError("sink: got a frame after close, expected none")
        if frame.dtype != np.uint8 or frame.shape != self.shape:
            raise ValueError(f"frame: got {frame.dtype} {frame.shape}, expected uint8 {self.shape}")
        self._put(np.ascontiguousarray(frame))
        self.frames += 1

    def close(self) -> None:
        if self.ended:
            return
        try:
            if self.frames:
                self._finish()
            else:  # without a frame write no file
                self._discard()
        except BaseException:
            self._discard()
            raise
        finally:
            self.ended = True

    def abort(self) -> None:
        if not self.ended:
            self.ended = True
            self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Ctrl-C ends a stream normally: keep the output.
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.close()
        else:
            self.abort()

    def _put(self, frame: np.ndarray) -> None: ...
    def _finish(self) -> None: ...
    def _discard(self) -> None: ...


class NullSink(BaseSink):
    """Counts frames and writes nothing."""


class ChecksumSink(BaseSink):
    """sha256 over the bytes of all frames; `close` sets `digest`."""

    def __init__(self, size: tuple[int, int]):
        super().__init__(size)
        self.digest: str | None = None
        self._hash = hashlib.sha256()

    def _put(self, frame: np.ndarray) -> None:
        self._hash.update(frame.data)

    def _finish(self) -> None:
        self.digest = self._hash.hexdigest()

    _discard = _finish  # zero frames have a checksum too


class Output:
    """Writes bytes to a file under its temporary name, or (path None) to stdout. Every write is flushed."""

    def __init__(self, path: Path | None):
        self.path = path
        self.end = 0  # offset after the last whole write
        if path is None:
            if sys.stdout.isatty():
                raise ValueError("output: got - on a terminal, expected a pipe or a redirection")
            sys.stdout.flush()
            # Use a descriptor of our own: after a broken pipe, sys.stdout then has nothing to flush at exit.
            file = io.FileIO(os.dup(sys.stdout.fileno()), "w")
        else:
            file = io.FileIO(part_of(path), "w")
        self.stream = io.BufferedWriter(file)

    def write(self, data) -> int:
        try:
            count = self.stream.write(data)
            self.stream.flush()
        except BrokenPipeError as error:
            raise OutputClosed(*error.args) from None
        self.end += count
        return count

    def keep(self) -> None:
        if self.path is not None and self.end:
            self.stream.truncate(self.end)  # drop a write that Ctrl-C cut short
        self.stream.close()
        if self.path is not None:
            os.replace(part_of(self.path), self.path)

    def drop(self) -> None:
        with suppress(OSError):
            self.stream.close()
        if self.path is not None:
            part_of(self.path).unlink(missing_ok=True)


class RawSink(BaseSink):
    """RGB bytes, frame after frame, no header."""

    def __init__(self, size: tuple[int, int], rate: Fraction, path: Path | None):
        super().__init__(size)
        self.output = Output(path)

    def _put(self, frame: np.ndarray) -> None:
        self.output.write(frame.data)

    def _finish(self) -> None:
        self.output.keep()

    def _discard(self) -> None:
        self.output.drop()


# BT.601, limited range. A y4m has no field for the matrix; readers assume this one.
RGB_TO_YUV = np.array(
    [
        [65.481, 128.553, 24.966],
        [-37.797, -74.203, 112.0],
        [112.0, -93.786, -18.214],
    ],
    dtype=np.float32,
) / np.float32(255)
YUV_OFFSET = np.array([[16], [128], [128]], dtype=np.float32)


class Y4mSink(RawSink):
    """YUV4MPEG2, 4:4:4: takes every size, needs no package, plays everywhere."""

    def __init__(self, size: tuple[int, int], rate: Fraction, path: Path | None):
        super().__init__(size, rate, path)
        height, width = size
        shape = f"W{width} H{height} F{rate.numerator}:{rate.denominator} Ip A1:1"
        self.header = f"YUV4MPEG2 {shape} C444 XCOLORRANGE=LIMITED\n".encode()

    def _put(self, frame: np.ndarray) -> None:
        planes = RGB_TO_YUV @ frame.reshape(-1, 3).T.astype(np.float32) + YUV_OFFSET  # [3, H*W]
        self.output.write(self.header + b"FRAME\n" + np.rint(planes).astype(np.uint8).tobytes())
        self.header = b""


class Mp4Sink(BaseSink):
    """H.264 with one fragment per frame, so that a player can show an unfinished file."""

    def __init__(self, size: tuple[int, int], rate: Fraction, path: Path | None):
        super().__init__(size)
        height, width = size
        if height % 2 or width % 2:
            raise ValueError(f"mp4 output: got {width}x{height} pixels, expected even numbers; .y4m takes any size")
        av = _need("av", "mp4")
        self.output = Output(path)
        flags = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
        try:
            # The library writes a file itself, so that Ctrl-C cannot cut a write short.
            file = self.output if path is None else str(part_of(path))
            self.container = av.open(file, "w", format="mp4", options=flags)
            self.video = self.container.add_stream(_h264(av), rate=rate)
        except BaseException:
            self.output.drop()
            raise
        self.video.width, self.video.height, self.video.pix_fmt = width, height, "yuv420p"
        # No look-ahead: the encoder returns each frame at once. One thread: the model keeps the other cores.
        self.video.options = {"crf": str(CRF), "preset": "veryfast", "tune": "zerolatency"}
        context = self.video.codec_context
        context.thread_count, context.gop_size, context.time_base = 1, max(1, round(rate)), 1 / rate
        # Name the matrix in the file: players guess another one for large pictures.
        context.colorspace, context.color_range = 6, 1  # BT.601 (SMPTE 170M), limited
        self.new_frame = av.VideoFrame.from_ndarray
        self.time_base = 1 / rate

    def _put(self, frame: np.ndarray) -> None:
        picture = self.new_frame(frame, format="rgb24")
        picture.pts, picture.time_base = self.frames, self.time_base
        self.container.mux(self.video.encode(picture))

    def _finish(self) -> None:
        self.container.mux(self.video.encode(None))
        self.container.close()
        self.output.keep()

    def _discard(self) -> None:
        with suppress(Exception):  # a container without a reader cannot write its trailer
            self.container.close()
        self.output.drop()


def _h264(av: ModuleType) -> str:
    for name in ("libx264", "libopenh264", "mpeg4"):
        with suppress(ValueError):
            return av.codec.Codec(name, "w").name
    raise ValueError("mp4 output: got a PyAV without an encoder, expected libx264; .y4m needs none")


STREAM_FORMATS = {"y4m": Y4mSink, "mp4": Mp4Sink, "rgb": RawSink}


class PngSink(BaseSink):
    """Writes one file per frame to a hidden directory, and publishes them on `close`.

    With a pattern the files move into `folder`; without one the hidden directory becomes `folder`.
    """

    def __init__(self, size: tuple[int, int], folder: Path, pattern: str | None):
        super().__init__(size)
        if pattern is None and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"output: got {folder}, which holds files, expected a new or an empty directory")
        self.image = _need("PIL.Image", "png")
        self.folder, self.pattern = folder, pattern
        self.part = part_of(folder if pattern is None else folder / pattern)
        shutil.rmtree(self.part, ignore_errors=True)  # left by a killed run
        self.part.mkdir()

    def _put(self, frame: np.ndarray) -> None:
        name = (self.pattern or "%05d.png") % self.frames
        self.image.fromarray(frame).save(self.part / name, compress_level=1)

    def _finish(self) -> None:
        if self.pattern is None:
            os.replace(self.part, self.folder)
            return
        for file in sorted(self.part.iterdir()):
            os.replace(file, self.folder / file.name)
        self.part.rmdir()

    def _discard(self) -> None:
        shutil.rmtree(self.part, ignore_errors=True)


class AnimationSink(BaseSink):
    """gif or webp, by the suffix. For short clips: all frames stay in memory until `close`."""

    def __init__(self, size: tuple[int, int], rate: Fraction, path: Path):
        super().__init__(size)
        self.kind = path.suffix.lower()[1:]
        self.image = _need("PIL.Image", self.kind)
        self.rate = rate
        self.output = Output(path)
        self.pictures: list = []

    def _put(self, frame: np.ndarray) -> None:
        if (self.frames + 1) * frame.nbytes > HELD_LIMIT:
            raise ValueError(f"{self.kind} output: got more than {self.frames} frames, expected a short clip; use .mp4")
        self.pictures.append(self.image.fromarray(frame.copy()))

    def _finish(self) -> None:
        # A gif counts hundredths of a second. Round the times, not the durations, to keep the right speed.
        unit = 10 if self.kind == "gif" else 1
        times = [unit * round(i * 1000 / (unit * self.rate)) for i in range(self.frames + 1)]
        timing = {"duration": np.diff(times).tolist(), "loop": 0}
        quality = {"quality": 90} if self.kind == "webp" else {}
        data = io.BytesIO()
        first, *rest = self.pictures
        first.save(data, format=self.kind, save_all=True, append_images=rest, **timing, **quality)
        self.output.write(data.getbuffer())
        self.output.keep()

    def _discard(self) -> None:
        self.pictures.clear()
        self.output.drop()
