"""What all sinks share: the order of calls, what is kept when, and the file or stdout that bytes go to."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Self

import numpy as np

from engine.files import NAME_BYTES, Part, left_over


class OutputClosed(BrokenPipeError):
    """The reader of stdout has gone. A stream may end this way; it is not a failure."""


@dataclass(frozen=True)
class Encoding:
    """How frames are coded. None leaves the choice to the format."""

    codec: str | None = None
    pix_fmt: str | None = None
    crf: int | None = None

    def refuse(self, kind: str, *names: str) -> None:
        """Raise ValueError if one of these fields is set: the output `kind` has no such choice."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"{option}: got {value} for {kind} output, expected it for {_TAKES[name]} only")


_VIDEO = ".mp4, .mov, .mkv and .webm"
_TAKES = {"codec": _VIDEO, "crf": _VIDEO, "pix_fmt": f"{_VIDEO}, and .y4m"}
# Pixels that share one chroma sample, (down, across).
PIX_FMTS = {"yuv420p": (2, 2), "yuv422p": (1, 2), "yuv444p": (1, 1), "yuv420p10le": (2, 2), "yuv444p10le": (1, 1)}


def check_pix_fmt(pix_fmt: str, expected: list[str], kind: str, size: tuple[int, int]) -> None:
    """Raise ValueError if an output `kind` cannot hold pictures of size (height, width) in this pixel format."""
    if pix_fmt not in expected:
        raise ValueError(f"pix-fmt: got {pix_fmt} for {kind}, expected {' or '.join(expected)}")
    height, width = size
    down, across = PIX_FMTS[pix_fmt]
    if height % down or width % across:
        what = "even numbers" if down > 1 else "an even width"
        raise ValueError(f"{kind} output: got {width}x{height} pixels in {pix_fmt}, expected {what}, or yuv444p")


def need(module: str, what: str) -> ModuleType:
    """The imported package. ImportError says which output `what` wants it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = {"av": "av", "PIL.Image": "pillow"}[module]
        if not isinstance(error, ModuleNotFoundError):  # it is there: no memory for its libraries, or one is damaged
            raise ImportError(f"{what} output: got {error}, expected the package {package} to load") from error
        expected = f"it installed (pip install {package}); .y4m and .rgb need no package"
        raise ImportError(f"{what} output: got no package {package}, expected {expected}") from error


def shown(path: str | Path) -> str:
    """A name on one line: line breaks and bytes that are no text appear as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


@contextmanager
def naming(target: str) -> Iterator[None]:
    """An error of the operating system from inside names the output that the user asked for, not a temporary file."""
    try:
        yield
    except OutputClosed:
        raise
    except OSError as error:
        if error.errno is None:  # a message of our own
            raise
        reason = os.strerror(error.errno)
        made = type(OSError(error.errno, ""))(f"output: got {reason} for {target}, expected it to be written")
        made.errno = error.errno
        raise made from error


class BaseSink:
    """Checks frames and the order write* -> close or abort.

    Subclasses define `_put` (one frame), `_finish` (everything gets its final name), `_rescue` (keep what plays under
    a name that nothing has, set `frames` to how many; None if that is nothing) and `_discard` (leave nothing).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.shape = (*size, 3)
        self.target = "-"  # as messages name it
        self.frames = 0
        self.ended = False
        self.hurry = False  # set it while `close` runs: it then leaves out what only improves the file
        self.kept: Path | None = None  # where an abort, or a close that failed, left the frames
        self.notes: list[str] = []

    def write(self, frame: np.ndarray) -> None:
        if self.ended:
            raise ValueError("sink: got a frame after close, expected none")
        if frame.dtype != np.uint8 or frame.shape != self.shape:
            raise ValueError(f"frame: got {frame.dtype} {frame.shape}, expected uint8 {self.shape}")
        with naming(self.target):
            self._put(np.ascontiguousarray(frame))
        self.frames += 1

    def close(self) -> None:
        if self.ended:
            return
        self.ended = True
        try:
            with naming(self.target):
                if self.frames:
                    self._finish()
                else:
                    self._discard()
        except BaseException as error:
            self._end_badly(error)
            raise

    def abort(self, error: BaseException | None = None) -> None:
        if not self.ended:
            self.ended = True
            self._end_badly(error)

    def _end_badly(self, error: BaseException | None) -> None:
        """Keep what was made, and note that on the error that led here. It is the one to report: others end here."""
        with suppress(Exception):
            if self.frames:
                self.kept = self._rescue()
            else:
                self._discard()
        if error is not None and self.kept is not None:
            error.add_note(f"kept {self.frames} frames in {shown(self.kept)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Ctrl-C ends a stream normally.
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.close()
        else:
            self.abort(error)

    def _put(self, frame: np.ndarray) -> None: ...
    def _finish(self) -> None: ...
    def _rescue(self) -> Path | None: ...
    def _discard(self) -> None: ...


def reserve(path: Path, notes: list[str], folder: bool = False) -> Part:
    """A temporary file or folder for the output `path`. OSError or ValueError, got and expected, if none can be made.

    What a killed process left for the same output stays, with a note, unless it is empty.
    """
    for part in left_over(path):
        with suppress(OSError):
            if any(part.iterdir()) if part.is_dir() else part.stat().st_size:
                notes.append(f"an earlier run was killed and left {shown(part)}: rename or delete it")
            elif part.is_dir():
                part.rmdir()
            else:
                part.unlink()
    try:
        return Part(path, folder)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"output: got {shown(path)}, expected a place for a new file ({reason})"
        kinds = {errno.EROFS: PermissionError, errno.ENAMETOOLONG: ValueError, errno.EINVAL: ValueError}
        raise kinds.get(error.errno or 0, type(error))(message) from None


def publish(part: Part, notes: list[str]) -> None:
    """Give a whole output its final name, with a note if that replaces an older one."""
    if part.replace():
        notes.append(f"replaced the older {shown(part.target)}")


def check_name(path: Path) -> None:
    """Raise ValueError for a name that no file system takes."""
    if (length := len(os.fsencode(path.name))) > NAME_BYTES:
        raise ValueError(f"output: got a name of {length} bytes, expected at most {NAME_BYTES}")


def check_place(path: Path) -> None:
    """Raise OSError or ValueError before the first frame is made if `path` cannot be written."""
    target = Path(os.path.realpath(path))
    folder = target.parent
    try:
        present, is_folder = folder.exists(), folder.is_dir()
        other = target.exists() and not target.is_file() and not target.is_dir()
    except OSError as error:
        expected = "a shorter path" if error.errno == errno.ENAMETOOLONG else "a place for a new file"
        raise ValueError(f"output: got {shown(path)}, expected {expected} ({error.strerror})") from None
    if target.is_symlink():
        raise ValueError(f"output: got {shown(path)}, a link to itself, expected a link to a file")
    if not present:
        raise FileNotFoundError(f"output: got {shown(path)}, expected an existing directory {shown(folder)}")
    if not is_folder:
        raise NotADirectoryError(f"output: got {shown(path)}, expected {shown(folder)} to be a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        expected = f"a directory that can be written, {shown(folder)} cannot"
        raise PermissionError(f"output: got {shown(path)}, expected {expected}")
    if other:
        expected = "a file name; use - for a pipe, null for nothing"
        raise ValueError(f"output: got {shown(path)}, a device or pipe, expected {expected}")
    if target.is_file() and not os.access(target, os.W_OK):
        raise PermissionError(f"output: got {shown(path)}, which is write-protected, expected a file to replace")


def check_stdout() -> None:
    """Raise ValueError if stdout takes no video, and OutputClosed if the reader of its pipe has gone."""
    if sys.stdout is None or sys.stdout.closed:
        raise ValueError("output: got - with stdout closed, expected a pipe or a redirection")
    if sys.stdout.isatty():
        raise ValueError("output: got - on a terminal, expected a pipe or a redirection")
    number = sys.stdout.fileno()
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise ValueError("output: got - with stdout open for reading, expected a pipe or a redirection")
    poll = select.poll()
    poll.register(number, 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        raise OutputClosed("output: got no reader of stdout, expected one")


class Output:
    """Writes bytes to a file under a temporary name, or (path None) to stdout, at once and unbuffered."""

    def __init__(self, path: Path | None, notes: list[str]) -> None:
        self.notes = notes
        self.end = 0  # offset after the last whole write
        self.part: Part | None = None
        if path is None:
            check_stdout()
            sys.stdout.flush()
            # Use a descriptor of our own: after a broken pipe, sys.stdout then has nothing to flush at exit.
            self.file = io.FileIO(os.dup(sys.stdout.fileno()), "w")
        else:
            self.part = reserve(path, notes)
            self.file = io.FileIO(self.part.path, "w")

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        count = len(rest)
        try:
            while rest:
                done = self.file.write(rest)
                if done is None:  # a pipe that does not block, and is full
                    select.select([], [self.file], [])
                rest = rest[done or 0 :]
        except BrokenPipeError as error:
            raise OutputClosed(*error.args) from None
        self.end += count
        return count

    def restart(self) -> None:
        """Forget what was written to the file."""
        self.file.seek(0)
        self.file.truncate()
        self.end = 0

    def keep(self) -> None:
        """Give the file its final name."""
        self._end()
        if self.part is not None:
            publish(self.part, self.notes)

    def rescue(self) -> Path | None:
        """Keep all whole writes under a name that nothing has."""
        with suppress(OSError):
            self._end()
        return self.part.keep() if self.part is not None else None

    def _end(self) -> None:
        if not self.file.closed:
            if self.part is not None:
                self.file.truncate(self.end)  # drop a write that was cut short
            self.file.close()

    def drop(self) -> None:
        with suppress(OSError):
            self.file.close()
        if self.part is not None:
            self.part.drop()
