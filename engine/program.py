"""How the programs of this package begin and how a signal ends them: no traceback, and the status 128 + its number.

`begin` runs before anything heavy is imported. During the imports, which take seconds, a signal ends the program at
once. Inside `cleanly` it raises KeyboardInterrupt, so that half-made files are removed first.
"""

import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

PACKAGES = ("engine", "export", "distill", "bench", "serve")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def begin() -> None:
    """Prepare the process if it runs a program of this package; leave other processes as they are."""
    if not _is_ours():
        return
    # A file that is opened later must not get the number of a closed standard stream: messages would land in it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    handle(leave)
    sys.excepthook = _lacking


def _is_ours() -> bool:
    """Whether Python was started as `python -m PACKAGE...` or by the script greedy-stream."""
    if sys.argv[:1] != ["-m"]:  # as it stands while Python looks for the module that -m names
        return bool(sys.argv) and os.path.basename(sys.argv[0]) == "greedy-stream"
    words = iter(sys.orig_argv[1:])
    for word in words:
        # Flags may stand before m in one word. W and X are none: what follows them is their value.
        if option := re.fullmatch(r"-[bBdEiIOPqRsSuvVx]*m(.*)", word):
            return (option[1] or next(words, "")).partition(".")[0] in PACKAGES
    return False


def _lacking(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the program with one line and status 2 where a package is missing, else with the traceback."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if not name or "." in name or name in (*PACKAGES, "kernels"):
        sys.__excepthook__(kind, error, trace)
        return
    extra = _extra_of(name)
    print(f"error: got no package {name}, expected pip install {extra or name}", file=sys.stderr)
    raise SystemExit(2)


def _extra_of(package: str) -> str | None:
    """What to install for the first extra that names the package."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("greedy-stream") or []
    except PackageNotFoundError:  # the sources alone
        return None
    named = re.compile(rf"{re.escape(package)}\b(?!-).*extra == .(\w+)".replace("_", "[-_]"))
    found = next(filter(None, map(named.match, lines)), None)
    return found and f"'greedy-stream[{found[1]}]'"


def handle(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Let `handler` have the signals that end a program. Returns the handlers before, for `restore`."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may
    # Ignored ones stay so, as nohup wants it; None is the handler of a host in another language, which keeps it.
    taken = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in taken}


def restore(handlers: dict[int, Any]) -> None:
    """Give the signals back what `handle` returned."""
    for number, handler in handlers.items():
        # The program's work is done where `begin` had them: nothing is left to interrupt.
        signal.signal(number, signal.SIG_IGN if handler is leave else handler)


def leave(number: int, frame: FrameType | None) -> None:
    """A handler that ends the process at once."""
    os._exit(128 + number)


@contextmanager
def cleanly() -> Iterator[None]:
    """A signal inside the block raises KeyboardInterrupt there; the program then ends with status 128 + its number.

    A second signal ends the program at once. What stdout does not take ends it with status 1, and with that of SIGPIPE
    where the reader has left.
    """
    came, process = list[int](), os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if came or os.getpid() != process:  # a forked worker has nothing to clean up
            leave(number, frame)
        came.append(number)
        raise KeyboardInterrupt

    before = handle(handler)
    try:
        yield
        flush_stdout()
    except (KeyboardInterrupt, Exception) as error:
        # Libraries turn a signal into errors of their own.
        if came or isinstance(error, KeyboardInterrupt):
            with suppress(OSError, ValueError):
                sys.stdout and sys.stdout.flush()
            raise SystemExit(128 + (came[0] if came else signal.SIGINT)) from None
        if isinstance(error, OSError):
            flush_stdout(isinstance(error, BrokenPipeError))  # raises if the error was its
        raise
    finally:
        restore(before)


def flush_stdout(failed: bool = False) -> None:
    """Write what stdout still holds. SystemExit, after a line on stderr, if it takes no more.

    failed: a write has, and stdout may hold nothing that shows it
    """
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
        if failed and _reader_has_left():
            raise BrokenPipeError
    except OSError as error:
        drop_stdout()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        if sys.stderr is not None:
            with suppress(OSError, ValueError):
                print(f"error: stdout: got {error.strerror}, expected it to be written", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def drop_stdout() -> None:
    """Let stdout end nowhere: at exit nothing fails to be flushed."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _reader_has_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file of the system
        return False
