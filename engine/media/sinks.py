"""Outputs for frames: files that appear whole, image sequences, stdout, a checksum, or only a count.

    with open_sink("out/demo.mp4", fps=16, size=(480, 832)) as sink:
        for frame in stream:        # uint8 [H, W, 3]
            sink.write(frame)

A sink writes beside the target, under a temporary name of its own. `close` gives the output its final name and then
replaces an older file. `abort` keeps what was made, under a name that nothing has: `kept` says which, and a note on
the error that is passed to it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from engine.media.base import BaseSink, Encoding, OutputClosed, check_name, check_place, naming, shown
from engine.media.containers import CONTAINERS, VideoSink
from engine.media.raw import RawSink, Y4mSink
from engine.media.sequences import PATTERN, AnimationSink, PngSink

LONGEST = 16384  # pixels; no picture or video that is in use has a longer side

__all__ = ["ChecksumSink", "Encoding", "NullSink", "OutputClosed", "Sink", "open_sink"]


class Sink(Protocol):
    """Takes frames uint8 [H, W, 3] one by one. After the first `close` or `abort`, further calls of both do nothing."""

    target: str  # what messages call it
    frames: int  # number written so far; after an error, number kept
    hurry: bool  # set while `close` runs, it leaves out what only improves the file
    kept: Path | None  # after an error: the file or folder that holds the frames
    notes: list[str]  # what a user should know: something older was replaced, found or left as it was

    def write(self, frame: np.ndarray) -> None: ...
    def close(self) -> None: ...
    def abort(self, error: BaseException | None = None) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind, error, trace) -> None: ...


def open_sink(
    target: str | Path, fps: float, size: tuple[int, int], format: str | None = None, encoding: Encoding | None = None
) -> Sink:
    """The sink for a target; size is (height, width).

    null                   counts frames
    checksum               hashes them
    -                      writes to stdout in `format` (y4m if None; mp4, mkv, webm or rgb)
    DIR/, or a directory   writes 00000.png, 00001.png, ...
    name_%05d.png          writes one file per frame
    else                   the suffix decides: .mp4, .mov, .mkv, .webm, .y4m, .rgb (raw), .gif, .webp

    Raises ValueError (got and expected), OSError for a place that cannot be written, ImportError for a missing package.
    """
    with naming(shown(target)):
        sink = _made(str(target), fps, size, format, encoding or Encoding())
    sink.target = shown(target)
    return sink


def _made(name: str, fps: float, size: tuple[int, int], format: str | None, encoding: Encoding) -> Sink:
    height, width = size
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps: got {fps}, expected 0.01 to 1000")
    if min(size) < 1:
        raise ValueError(f"size: got {width}x{height} pixels, expected positive numbers")
    if max(size) > LONGEST:
        raise ValueError(f"size: got {width}x{height} pixels, expected at most {LONGEST} each way")
    rate = Fraction(fps).limit_denominator(1001)
    if format is not None and name != "-":
        raise ValueError(f"format: got {format} for {shown(name)}, expected it for - (stdout); a file has a suffix")
    if name in ("null", "checksum"):
        encoding.refuse(name, "codec", "crf", "pix_fmt")
        return NullSink(size) if name == "null" else ChecksumSink(size)
    if name == "-":
        format = format or "y4m"
        if format not in STDOUT_FORMATS:
            raise ValueError(f"format: got {format}, expected one of {', '.join(STDOUT_FORMATS)}")
        return FORMATS[format](size, rate, None, encoding)
    if not name:
        raise ValueError("output: got an empty name, expected a file name")
    if "\0" in name:
        raise ValueError(f"output: got {shown(name)}, expected a name without NUL characters")
    path = Path(name).absolute()  # gives even . a name
    check_name(path)
    check_place(path)
    suffix = path.suffix.lower()
    if name.endswith("/") or path.is_dir():
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"output: got {shown(name)}, which is a file, expected a directory")
        if not name.endswith("/") and suffix[1:] in FORMATS:
            expected = f"a file name, or {shown(name)}/ for a png sequence"
            raise ValueError(f"output: got {shown(name)}, which is a directory, expected {expected}")
        return PngSink(size, path, None, encoding)
    if suffix == ".png":
        if not re.fullmatch(PATTERN, path.name, re.DOTALL):
            expected = "a pattern such as frame_%05d.png, or a directory/"
            raise ValueError(f"output: got {shown(path.name)}, expected {expected}")
        return PngSink(size, path.parent, path.name, encoding)
    if suffix[1:] not in FORMATS:
        expected = f"{', '.join(f'.{one}' for one in FORMATS)}, name_%05d.png, a directory/, null, checksum or -"
        raise ValueError(f"output: got {shown(name)}, expected {expected}")
    return FORMATS[suffix[1:]](size, rate, path, encoding)


class NullSink(BaseSink):
    """Counts frames and writes nothing."""


class ChecksumSink(BaseSink):
    """sha256 over the bytes of all frames; `close` sets `digest`."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.digest: str | None = None
        self._hash = hashlib.sha256()

    def _put(self, frame: np.ndarray) -> None:
        self._hash.update(frame.data)

    def _finish(self) -> None:
        self.digest = self._hash.hexdigest()

    _discard = _finish  # zero frames have a checksum too


STDOUT_FORMATS = ("y4m", "mp4", "mkv", "webm", "rgb")
# Suffix -> makes a sink of size, rate, path (None: stdout) and encoding.
FORMATS: dict[str, Callable[..., Sink]] = {
    **{kind: partial(VideoSink, kind=kind) for kind in CONTAINERS},
    "y4m": Y4mSink,
    "rgb": RawSink,
    "gif": AnimationSink,
    "webp": AnimationSink,
}
