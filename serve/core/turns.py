"""Who computes next: the session whose next frame is due first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Turns:
    """Lets `parallel` threads compute at once; of those that wait, the one with the earliest deadline goes first.

    A GPU runs one chunk at a time. So does the torch backend on a processor, as Python's lock lets one thread run.
    """

    def __init__(self, parallel: int) -> None:
        self._free = parallel
        self._lock = threading.Condition()
        self._line: list[tuple[float, int]] = []  # (deadline, order of arrival)
        self._arrivals = count()

    @contextmanager
    def turn(self, deadline: float) -> Iterator[None]:
        """Within the block the thread may compute. `deadline`: monotonic seconds; inf lets everyone else go first."""
        ticket = deadline, next(self._arrivals)
        with self._lock:
            heapq.heappush(self._line, ticket)
            while not (self._free and self._line[0] == ticket):
                self._lock.wait()
            heapq.heappop(self._line)
            self._free -= 1
            self._lock.notify_all()  # another turn may be free for the next in line
        try:
            yield
        finally:
            with self._lock:
                self._free += 1
                self._lock.notify_all()
