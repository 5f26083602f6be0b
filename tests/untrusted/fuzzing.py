"""Runs a reader on damaged data for some seconds: every answer is the product's own, soon, and in little memory."""

import resource
import signal
import sys
import time
from contextlib import contextmanager
from random import Random

SLOWEST = 2.0  # seconds of the process for one case
LARGEST = 200  # MB that one case may add
HANG = 20  # seconds after which a case is interrupted


class TooLong(BaseException):
    """No Exception: readers turn those into their own."""


@contextmanager
def within(seconds):
    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def checked(read, case, refusals=(ValueError, FileNotFoundError)):
    """Run one case. Returns whether it was read; AssertionError for anything but a result or a refusal in one line."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with within(HANG):
            read(case)
        done = True
    except refusals as error:
        refusal, done = error, False
    except TooLong:
        raise AssertionError(f"no end within {HANG} s") from None
    if not done:
        text = str(refusal)
        assert text, f"{type(refusal).__name__} without words"
        assert len(text) < 3000, f"{len(text)} characters: {text[:200]}"
        assert "\n" not in text, text[:500]
    spent, grown = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert spent < SLOWEST, f"{spent:.1f} s"
    assert grown < LARGEST * 1024, f"{grown / 1024:.0f} MB"
    return done


def fuzz(make, read, seconds, seed=0, refusals=(ValueError, FileNotFoundError)):
    """Cases `make(Random)` for some seconds. Returns how many were read and refused; the failing number is told."""
    checked(read, make(None), refusals)
    counts = [0, 0]
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            counts[checked(read, make(Random(f"{seed}-{number}")), refusals)] += 1
        except BaseException as error:
            error.add_note(f"case {seed}-{number}")
            raise
        number += 1
    assert counts[0] > 0, "nothing was refused: the damage does not reach the reader"
    print(f"{number} cases, {counts[1]} read, {counts[0]} refused", file=sys.stderr)
    return counts
