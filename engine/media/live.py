"""Frames that come while they are used: from a camera, or over a network. A thread gives them, a stream takes them."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from math import ceil
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine.media.frames import Renderer
from engine.media.inputs import reason

_EARLY = 1e-3  # of the time between two frames, by which one may be early


class LiveFrames:
    """An iterator of frames at `fps`, of those that `put` gives at any rate.

    Time starts with the first frame. At each time k / fps the newest frame is taken: of a faster source the others are
    dropped, of a slower one the last frame is repeated. At most `room` frames wait; then the oldest is dropped. So what
    is taken is never older than that, however slow the stream is. A stream that is faster waits.

    Any thread may call every method; one iterates.
    """

    def __init__(self, fps: float, room: int) -> None:
        self.dropped = self.repeated = self.taken = 0
        self._fps, self._room = fps, room
        self._ready: deque[np.ndarray] = deque()
        self._came = threading.Condition()
        self._newest: np.ndarray | None = None
        self._used = 0  # how often the newest frame was taken for the grid
        self._begun, self._next = 0.0, 0  # time of grid point 0; the next point
        self._closed = False
        self._error: Exception | None = None

    def put(self, frame: np.ndarray, seconds: float) -> None:
        """The picture that is shown from `seconds` on, a monotonic time. The frame is kept, not copied."""
        with self._came:
            if self._newest is None:
                self._begun = seconds
            else:
                self._until(ceil((seconds - self._begun) * self._fps - _EARLY))
                if not self._used:
                    self.dropped += 1
            self._newest, self._used = frame, 0
            if self._next <= (seconds - self._begun) * self._fps + _EARLY:  # a grid point falls on it
                self._take()
            self._came.notify_all()

    def _until(self, point: int) -> None:
        """Show the newest frame at the grid points before `point`. Of a long pause only the end counts."""
        self._next = max(self._next, point - self._room)
        while self._next < point:
            self._take()

    def _take(self) -> None:
        assert self._newest is not None
        self._next += 1
        self.repeated += self._used > 0
        self._used += 1
        self._ready.append(self._newest)
        if len(self._ready) > self._room:
            self._ready.popleft()
            self.dropped += 1

    @property
    def waiting(self) -> int:
        """Frames that can be taken at once."""
        with self._came:
            return len(self._ready)

    @property
    def closed(self) -> bool:
        return self._closed

    def fail(self, error: Exception) -> None:
        """End the frames with an error, which the iterator raises once, behind those that wait."""
        with self._came:
            self._error = error
        self.close()

    def close(self) -> None:
        """No more frames come. Those that wait can still be taken."""
        with self._came:
            self._closed = True
            self._came.notify_all()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        with self._came:
            while not self._ready and not self._closed:
                self._came.wait(0.5)  # so that a signal acts on every system
            if self._ready:
                self.taken += 1
                return self._ready.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def told(self) -> str:
        return f"source: dropped {self.dropped}, repeated {self.repeated} frames"


def device_of(name: str) -> Path:
    """camera, camera:1 or /dev/video1 -> the device. ValueError where there is none."""
    found = re.fullmatch(r"camera(?::(\d+))?", name)
    device = Path(f"/dev/video{found[1] or 0}" if found else name)
    if not device.exists():
        others = ", ".join(sorted(str(one) for one in Path("/dev").glob("video*"))) or "none is there"
        raise ValueError(f"source: got {name}, expected a camera at {device} ({others})")
    return device


def camera(device: str, height: int, width: int, fps: float, room: int, driver: str = "v4l2") -> LiveFrames:
    """The pictures of a camera, scaled to cover and cropped in the middle. `close` ends its thread.

    driver: FFmpeg's name of the device's format. ValueError for a camera that does not open.
    """
    import av

    try:
        container = av.open(device, format=driver)
        stream = container.streams.video[0]
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise ValueError(f"source: got {device}, expected a camera that opens ({reason(error)})") from None
    frames = LiveFrames(fps, room)
    render = Renderer(height, width, stream.sample_aspect_ratio, device, [])
    threading.Thread(target=_read, args=(container, stream, render, frames), name="camera", daemon=True).start()
    return frames


def _read(container: Any, stream: Any, render: Renderer, frames: LiveFrames) -> None:
    try:
        for frame in container.decode(stream):
            if frames.closed:
                break
            frames.put(render(frame), time.monotonic())
        frames.close()
    except Exception as error:
        frames.fail(ValueError(f"source: got {reason(error)} from {render.name}, expected pictures"))
    finally:
        container.close()
