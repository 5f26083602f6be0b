"""The video track of one WebRTC viewer: frames as its session has coded them, each at its time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import av
from aiortc.mediastreams import VIDEO_CLOCK_RATE, VIDEO_TIME_BASE, MediaStreamError, MediaStreamTrack

from serve.core.encoders import Unit
from serve.core.messages import Chunk, Item
from serve.core.session import Session
from serve.core.viewers import Viewer
from serve.web.server import Bell

LATE = 0.05  # seconds after which a frame's timestamp is the time at which it is sent
STEP = VIDEO_CLOCK_RATE // 1000  # least ticks between two frames
MOST_CHUNKS = 3  # here: the one that is shown, the next one, and one more, so that no message waits behind a chunk


@dataclass(frozen=True)
class _Frame:
    unit: Unit
    chunk: Chunk
    due: float  # monotonic seconds


class LiveTrack(MediaStreamTrack):
    """Takes the items of a viewer: frames go to the connection, each item is also told.

    Nothing is coded here. The connection asks for a frame when it has sent the one before, and few chunks wait here.
    The rest waits in the viewer, which misses chunks or holds its session.
    """

    kind = "video"

    def __init__(self, session: Session, viewer: Viewer, bell: Bell, tell: Callable[[Item], None]) -> None:
        super().__init__()
        self._session, self._viewer, self._bell, self._tell = session, viewer, bell, tell
        self._frames: deque[_Frame] = deque()
        self._joined = False
        self._done: Item | None = None
        self._origin = 0.0  # monotonic time of timestamp 0
        self._last = -STEP  # timestamp of the last frame

    async def recv(self) -> av.Packet:
        """The next frame, when it is due. The connection calls this from the moment it stands."""
        if not self._joined:
            self._join()
        await asyncio.sleep(0)  # without a clock (speed 0) frames never wait
        while True:
            self._take()
            left = self._frames[0].due - time.monotonic() if self._frames else None
            if left is not None and left <= 0:
                return self._packet(self._frames.popleft(), -left)
            if self._done is not None and not self._frames:
                self._tell(self._done)
                raise MediaStreamError
            await self._bell.wait(left)

    def _join(self) -> None:
        """Begin with what is made from now on: until the connection stood, nobody saw anything."""
        self._joined = True
        self._viewer.drop_chunks()
        self._viewer.watches = True
        self._session.wake()

    def _take(self) -> None:
        """Take what there is, up to MOST_CHUNKS. Frames of an earlier take are dropped."""
        take = self._session.take
        if self._frames and self._frames[-1].chunk.take != take:
            self._frames = deque(frame for frame in self._frames if frame.chunk.take == take)
        while self._done is None and len({frame.chunk.position for frame in self._frames}) < MOST_CHUNKS:
            if (item := self._viewer.take()) is None:
                return
            if isinstance(item, Chunk):
                self._tell(item)
                self._frames.extend(
                    _Frame(unit, item, self._session.frame_due(item, number)) for number, unit in enumerate(item.units)
                )
            elif item.kind == "done":
                self._done = item  # told after the last frame
            else:
                self._tell(item)

    def _packet(self, frame: _Frame, late: float) -> av.Packet:
        """A frame with its timestamp: the real time since the first one, across pauses and restarts."""
        shown = frame.due if late < LATE else frame.due + late
        if self._last < 0:
            self._origin = shown
        self._last = max(round((shown - self._origin) * VIDEO_CLOCK_RATE), self._last + STEP)
        packet = av.Packet(frame.unit.data)
        packet.pts = packet.dts = self._last
        packet.time_base, packet.is_keyframe = VIDEO_TIME_BASE, frame.unit.key
        return packet
