"""What a command says on stderr. A terminal that is gone, or a reader that has left, must not fail a run."""

import errno
import re
import sys
from contextlib import suppress
from typing import Any, TextIO

from engine.media.base import shown

_BAD_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ImportError)
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
_TORCH_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


class Forgiving:
    """A text file whose failed writes are dropped."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def say(line: str) -> bool:
    """Print a line on stderr, if anybody is there; returns whether it was written."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
            return True
    return False


def is_bad_input(error: BaseException) -> bool:
    """Whether an error is the fault of what the user gave: exit status 2."""
    return isinstance(error, _BAD_INPUT) or (isinstance(error, OSError) and error.errno in _BAD_NAMES)


def need_stdout(what: str) -> None:
    """Raise ValueError where stdout is closed: nobody would get a report."""
    if sys.stdout is None:
        raise ValueError(f"{what}: got stdout closed, expected a pipe or a redirection")


def line_of(error: BaseException) -> str:
    """What an error says, on one line with its notes. Those of the system and of torch get the words of ours."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, OSError) and error.strerror and error.errno:
        lines = [f"{shown(error.filename or 'system')}: got {error.strerror}, expected it to be read or written"]
    elif found := _TORCH_MEMORY.search(str(error)):
        lines = [f"memory: got no room for {found[1]} bytes, expected it"]
    elif (isinstance(error, MemoryError) and not str(error)) or "(os error 12)" in lines[0]:
        lines = ["memory: got none left, expected more"]
    return "; ".join([lines[0], *getattr(error, "__notes__", [])])
