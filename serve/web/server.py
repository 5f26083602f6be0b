"""What the handlers of one server share."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from engine.bundles.native import NativePipeline
from engine.generators.source import usual_strength
from engine.sampling.schedule import Schedule
from engine.stream import Pipeline
from serve.core.encoders import MIME
from serve.core.house import House
from serve.core.jobs import Jobs
from serve.core.messages import Notice
from serve.core.session import Session
from serve.options import Network, Sessions
from serve.web.metrics import Metrics

# Of the embedded model: it can switch from each of these to each other one, and the object stays.
EXAMPLES = (
    "a red circle moving right slowly on a gray background",
    "a red square moving down quickly on a gray background",
    "a yellow circle moving left slowly on a gray background",
    "a red circle moving up slowly on a white background",
    "a yellow square moving down slowly on a black background",
)


@dataclass
class Server:
    """The house and its jobs, its model's name, and how requests are checked."""

    house: House
    jobs: Jobs
    name: str
    network: Network
    sessions: Sessions
    metrics: Metrics
    chunk_frames: int  # of a chunk, after the first one
    chunk_seconds: float  # to make one, alone on the machine
    examples: tuple[str, ...] = ()
    started: float = field(default_factory=time.time)

    @property
    def pipeline(self) -> Pipeline | NativePipeline:
        return self.house.pipeline

    @property
    def adapters(self) -> dict[str, float]:
        adapters = getattr(self.pipeline, "adapters", None)
        return dict(adapters.strengths) if adapters is not None else {}

    def model(self) -> dict[str, Any]:
        """The model as /v1/models tells it."""
        pipeline = self.pipeline
        return {
            "id": self.name, "object": "model", "created": int(self.started), "owned_by": "greedy-stream",
            "width": pipeline.width, "height": pipeline.height, "fps": pipeline.fps, "preset": pipeline.preset_name,
            "adapters": list(self.adapters), "strengths": self.adapters,
            "examples": list(self.examples),
            "capacity": self.house.room.sessions, "formats": ["m4s", "jpeg", "rgb"], "scale": self.house.scale,
            "chunk_frames": self.chunk_frames, "source": _source(pipeline),
        }  # fmt: skip

    def start_message(self, session: Session, start: Notice, owns: bool) -> dict[str, Any]:
        """What video.start tells of a session and its pictures; to who owns it, also its key."""
        pipeline, scale = self.pipeline, self.house.scale
        config = {
            "model": self.name, "width": pipeline.width * scale, "height": pipeline.height * scale,
            "fps": pipeline.fps, "seed": start.about["seed"], "num_frames": start.about["frames"], "scale": scale,
            "speed": start.about["speed"], "prompt": start.about["prompt"],
        }  # fmt: skip
        return {"session": session.id, "mime": MIME, "config": config} | ({"key": session.key} if owns else {})

    def seed(self, asked: int | None) -> int:
        """The seed that was asked for, or one at random that JavaScript's numbers hold."""
        return secrets.randbelow(2**31) if asked is None else asked

    def close(self) -> None:
        """End all jobs and sessions. Jobs first: what runs goes back into their queue."""
        self.jobs.close()
        self.house.close()


def _source(pipeline: Pipeline | NativePipeline) -> dict[str, float] | None:
    """Strengths with which the model follows frames: the least one, and the usual one; None where it follows none."""
    if not isinstance(pipeline, Pipeline):
        return None
    schedule = Schedule(pipeline.preset)
    least = ceil(100 * schedule.last_level) / 100
    return {"least": least, "strength": max(least, usual_strength(schedule))}


class Refused(Exception):
    """A request that is answered with an error: HTTP status, type, and a line for people."""

    def __init__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.headers = status, kind, message, headers or {}


class Bucket:
    """Lets each key do `rate` things a minute, in bursts of at most so many."""

    def __init__(self, rate: float, most: int = 10_000) -> None:
        self._rate, self._most = rate, most
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key: (things left, when that was)
        self._lock = threading.Lock()

    def take(self, key: str) -> float:
        """Do one thing; returns the seconds to wait if there are none left, else 0."""
        now = time.monotonic()
        with self._lock:
            left, at = self._left.pop(key, (self._rate, now))
            left = min(self._rate, left + (now - at) * self._rate / 60)
            self._left[key] = (left - 1 if left >= 1 else left, now)
            while len(self._left) > self._most:
                self._left.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) * 60 / self._rate


class Bell:
    """Wakes a coroutine from any thread; silent once its loop has closed."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def ring(self) -> None:
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until it rings; False after `timeout` seconds without."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout)
        except TimeoutError:
            return False
        self._event.clear()
        return True


def error_notice(code: str, message: str, event: str | None = None) -> Notice:
    """An error for one viewer."""
    return Notice("error", {"code": code, "message": message} | ({"event_id": event} if event else {}))
