"""Which frame of a clip is shown at which time of an even grid."""

from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil
from typing import Generic, TypeVar

Picture = TypeVar("Picture")


class Clock:
    """Times of successive frames in seconds since the first one.

    A frame without a timestamp follows its predecessor by the predecessor's duration. So does a frame whose timestamp
    lies before its predecessor's: there the recording starts again.
    """

    def __init__(self, usual: Fraction, origin: Fraction | None = None) -> None:
        self.usual, self.origin = usual, origin  # seconds: a frame's duration where none is known; the first timestamp
        self.shift = Fraction(0)  # after a new start
        self.time, self.length, self.step = Fraction(-1), Fraction(0), Fraction(0)

    def at(self, stamp: Fraction | None, length: Fraction | None) -> Fraction:
        """The time of the next frame, from its timestamp and its duration, both in seconds."""
        if self.time < 0:
            if self.origin is None:
                self.origin = stamp or Fraction(0)
            time = max(Fraction(0), stamp - self.origin) if stamp is not None else Fraction(0)
        else:
            after = self.time + (self.length or self.step or self.usual)
            assert self.origin is not None
            time = after if stamp is None else stamp - self.origin + self.shift
            if time < self.time:
                self.shift += after - time
                time = after
            self.step = time - self.time
        self.time, self.length = time, length or Fraction(0)
        return time

    def end(self) -> Fraction:
        """When the last frame's own duration is over; else its predecessor's; else the usual one."""
        return self.time + (self.length or self.step or self.usual)


def rounded_to(time_base: Fraction) -> Fraction:
    """The tick that timestamps are rounded to, in seconds; 0 where they are exact.

    Matroska, WebM and GIF count thousandths or hundredths of a second. FFmpeg copies thousandths into an MP4 whose
    clock counts 16000ths. Other clocks have ticks that are fine, or that are the frames themselves.
    """
    return {Fraction(1, 16000): Fraction(1, 1000)}.get(time_base, time_base) if time_base in _ROUNDED else Fraction(0)


_ROUNDED = (Fraction(1, 100), Fraction(1, 1000), Fraction(1, 16000))


def tolerance_of(time_base: Fraction) -> Fraction:
    """By how much a timestamp may lie after the time that was meant: half a tick if it is rounded.

    A microsecond allows for a rate such as 23.976.
    """
    return Fraction(1, 10**6) + rounded_to(time_base) / 2


class Grid(Generic[Picture]):
    """The end of a clip on the grid 0, 1 / fps, 2 / fps, ... since the first frame.

    At each time the frame is taken that is shown: the last one whose timestamp is not after it. Call `show` for every
    frame in order, `finish` once, then read `pictures`.
    """

    def __init__(self, fps: float, last: int, tolerance: Fraction) -> None:
        self.fps, self.last, self.tolerance = Fraction(fps), last, tolerance
        self.first: int | None = None  # first grid point that a frame is known for
        self.total = 0  # grid points before the end, or before the frame that is shown now
        self._runs: deque[tuple[int, int, Picture]] = deque()  # from, until, picture
        self._now: Picture | None = None

    def point(self, time: Fraction) -> int:
        """The first grid point not before a time in seconds."""
        return max(0, ceil((time - self.tolerance) * self.fps))

    def show(self, time: Fraction, picture: Picture, keep: Callable[[Picture], Picture]) -> None:
        """A frame that is shown from `time` on. `keep` makes what is stored of it, if a grid point falls on it."""
        self._until(self.point(time))
        self._now, self._keep = picture, keep

    def finish(self, end: Fraction) -> None:
        """The last frame is shown until `end`. A clip has at least one grid point."""
        self._until(max(self.point(end), 1))

    def _until(self, point: int) -> None:
        if self._now is None:
            self.first = self.total = point
        elif point > self.total:
            self._runs.append((self.total, point, self._keep(self._now)))
            self.total = point
        while self._runs and self._runs[0][1] <= self.total - self.last:
            self._runs.popleft()

    def drain(self) -> Iterator[Picture]:
        """The pictures of all grid points so far, one for each point; the grid then forgets them."""
        while self._runs:
            begin, until, picture = self._runs.popleft()
            for _ in range(begin, until):
                yield picture

    @property
    def start(self) -> int:
        """The first grid point of the last `last` ones."""
        return max(0, self.total - self.last)

    def pictures(self) -> Iterator[tuple[Picture, int]]:
        """The pictures of the last `last` grid points, each with how often it stands in succession."""
        for begin, until, picture in self._runs:
            if until > self.start:
                yield picture, until - max(begin, self.start)
