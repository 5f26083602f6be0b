"""The queue between a session and one who watches or records it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from serve.core.messages import Chunk, Item, Notice

ROOM = 3  # chunks that wait for a viewer
MOST_NOTICES = 1000  # of one who takes nothing


class Viewer:
    """Takes the items of one session in order. A session puts, one thread or loop takes.

    codec   "h264", "vp8" or "jpeg"; None: raw frames
    holds   a session waits for its viewers that hold it: it makes no chunk while one of them has no room. Another one
            that has no room misses chunks, and goes on with a key frame.
    watches whether the session goes on for it; a recorder alone keeps no session alive
    notify  is called, by any thread, when there is something to take
    """

    def __init__(
        self, codec: str | None, holds: bool = True, watches: bool = True, notify: Callable[[], None] | None = None,
        room: int = ROOM,
    ) -> None:  # fmt: skip
        self.codec, self.holds, self.watches = codec, holds, watches
        self.wants_key = True
        self.on_room: Callable[[], None] = lambda: None  # of the session
        self._notify, self._room = notify, room
        self._ready = threading.Condition()
        self._items: deque[Item] = deque()
        self._chunks = self._skipped = 0

    @property
    def full(self) -> bool:
        return self._chunks >= self._room

    def put(self, item: Item) -> None:
        """Append an item. A chunk without room is missed, and all until a key frame."""
        with self._ready:
            if isinstance(item, Chunk):
                if self.full or (self._skipped and item.units and not item.units[0].key):
                    self._skipped += len(item.frames)
                    self.wants_key = True
                    return
                item, self._skipped = replace(item, skipped=self._skipped), 0
                if not item.units or item.units[0].key:  # a wish that came while the chunk was coded stays
                    self.wants_key = False
                self._chunks += 1
            elif len(self._items) >= MOST_NOTICES and item.kind != "done":
                return
            self._items.append(item)
            self._ready.notify_all()
        if self._notify is not None:
            self._notify()

    def take(self, timeout: float = 0.0) -> Item | None:
        """The next item; None if none came within `timeout` seconds."""
        until = time.monotonic() + timeout
        with self._ready:
            while not self._items:
                if (left := until - time.monotonic()) <= 0 or not self._ready.wait(left):
                    return None
            item = self._items.popleft()
            self._chunks -= isinstance(item, Chunk)
        if isinstance(item, Chunk):
            self.on_room()
        return item

    def drop_chunks(self) -> None:
        """Forget chunks that wait, because the video starts again."""
        with self._ready:
            self._items = deque(item for item in self._items if isinstance(item, Notice))
            self._chunks = self._skipped = 0
            self.wants_key = True
