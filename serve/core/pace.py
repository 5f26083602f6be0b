"""When a chunk is made, so that its frames are ready when they are due and a new prompt shows soon."""

from __future__ import annotations

from collections import deque

SPARE = 0.03  # seconds kept in hand for encoding and sending
RECENT = 16  # chunks by which the next one's time is judged


class Pace:
    """The clock of one video: frame n is due n / (fps * speed) seconds after the first one. Times are monotonic.

    Each chunk is made as late as its recent times allow. Nothing piles up, so a command takes effect with the chunk
    after the one that is shown. A chunk that comes late moves all later ones: frames are never dropped to catch up.
    Speed 0 has no clock: chunks are made as fast as viewers take them.
    """

    def __init__(self, fps: float, speed: float = 1.0) -> None:
        self._fps, self._speed = fps, speed
        self._start: float | None = None  # when frame `_first` is shown
        self._first = 0
        self._spent: deque[float] = deque(maxlen=RECENT)

    @property
    def speed(self) -> float:
        """Seconds of video per second; 0 without a clock."""
        return self._speed

    def at_speed(self, speed: float, frame: int, now: float) -> None:
        """From `frame` on, frames follow each other at another speed."""
        running = self._speed and self._start is not None
        self._start, self._first = self.due(frame, now) if running else None, frame
        self._speed = speed

    def rebase(self) -> None:
        """Start the clock anew with the next chunk, after a pause or a restart."""
        self._start = None

    def due(self, frame: int, now: float) -> float:
        """When a frame is to be shown; now where no clock runs."""
        if not self._speed or self._start is None:
            return now
        return self._start + (frame - self._first) / (self._fps * self._speed)

    def turn_by(self, frame: int, frames: int, now: float) -> float:
        """Until when a chunk wants its turn among other sessions' chunks; `frames`: its length.

        Who plays faster than real time claims no more than real time does, and so does who begins, as often as it may
        be: those that play at their rate come first.
        """
        due = self.due(frame, now)
        return due if self._start is not None and 0 < self._speed <= 1 else max(due, now + frames / self._fps)

    def lead(self, frames: int) -> float:
        """How long before it is due a chunk of `frames` frames is begun: at most as long as one is shown."""
        length = frames / (self._fps * self._speed) if self._speed else 0.0
        return min(2 * max(self._spent, default=length) + SPARE, max(length, SPARE))

    def made(self, frame: int, spent: float, now: float) -> tuple[float, float]:
        """A chunk from `frame` on is ready after `spent` seconds: (when it is due, how late it came)."""
        self._spent.append(spent)
        if self._start is None:
            self._start, self._first = now, frame
        due = self.due(frame, now)
        late = max(0.0, now - due)
        if late and self._speed:
            self._start, self._first = now, frame
        return due + late, late
