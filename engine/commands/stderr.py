"""What a command says on stderr. A terminal that is gone, or a reader that has left, must not fail a run."""

import sys
from contextlib import suppress
from typing import Any, TextIO


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


def say(line: str) -> None:
    """Print a line on stderr, if anybody is there."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
