"""All sessions of a server: who is let in, who waits, what is kept of those that ended."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.bundles.native import NativePipeline
from engine.stream import Pipeline
from serve.core.coding import Coding
from serve.core.messages import Chunk, Notice, Wish
from serve.core.session import Limits, Place, Session
from serve.core.turns import Turns
from serve.core.viewers import Viewer

# Of the time between chunks, how much sessions may compute. Beside viewers a chunk takes up to half as long again as
# alone, and one that is late makes the next one late.
SHARE = 0.7
TIMED = 6  # chunks of each of two streams by which the time of one is measured
KEPT = 300.0  # seconds for which an ended session can be downloaded
MOST_KEPT = 32
# A job has no viewer who changes it or leaves; it may have to let live sessions go first for hours.
JOB = Limits(idle=float("inf"), lifetime=86_400.0, lease=float("inf"), stall=600.0, recording=0)


class Busy(RuntimeError):
    """No session is free, and no place in the line."""


@dataclass(frozen=True)
class Room:
    """How many live sessions run at once, and how many may wait."""

    sessions: int
    waiting: int = 8


@dataclass(frozen=True)
class Watching:
    """Called when something happens that a monitor counts; by any thread."""

    chunk: Callable[[Session, Chunk], None] = field(default=lambda session, chunk: None)
    end: Callable[[Session], None] = field(default=lambda session: None)


class House:
    """Opens sessions as long as all hold their frame rate. Others wait in a line, and then are refused."""

    def __init__(
        self, pipeline: Pipeline | NativePipeline, room: Room, limits: Limits, scale: int, parallel: int,
        watching: Watching | None = None,
    ) -> None:  # fmt: skip
        self.pipeline, self.room, self.limits, self.scale = pipeline, room, limits, scale
        self.turns = Turns(parallel)
        self._watching = watching or Watching()
        self._place = Place(pipeline, self.turns, scale, limits, self._watching.chunk, self._ended)
        self._background = Place(
            pipeline, self.turns, scale, JOB, lambda session, chunk: None, self._job_ended, background=True
        )
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}
        self._running: set[str] = set()
        self._line: list[Session] = []
        self._kept: list[tuple[float, Session]] = []
        self._jobs: set[Session] = set()  # nobody can watch them
        self._closed = False

    def open(self, wish: Wish, viewer: Viewer) -> Session:
        """A new session that `viewer` watches: it starts now, or waits. Busy where there is no place to wait."""
        session = Session(secrets.token_urlsafe(9), self._place, wish)
        with self._lock:
            if self._closed:
                raise Busy("the server is shutting down")
            free = len(self._running) < self.room.sessions
            if not free and len(self._line) >= self.room.waiting:
                raise Busy(f"all {self.room.sessions} sessions run and {self.room.waiting} wait: try again later")
            self._sessions[session.id] = session
            session.watch(viewer)
            if free:
                self._running.add(session.id)
                session.start()
            else:
                self._line.append(session)
                self._tell_places()
        return session

    def job(self, wish: Wish, viewer: Viewer) -> Session:
        """A session beside the live ones, which go first. The caller limits the number of jobs. Busy at the end."""
        session = Session(secrets.token_urlsafe(9), self._background, wish)
        with self._lock:
            if self._closed:
                raise Busy("the server is shutting down")
            self._jobs.add(session)
        session.watch(viewer)
        session.start()
        return session

    def get(self, name: str) -> Session | None:
        """A session by its id, also one that ended not long ago."""
        self._forget()
        with self._lock:
            return self._sessions.get(name)

    @property
    def running(self) -> int:
        with self._lock:
            return len(self._running)

    @property
    def waiting(self) -> int:
        with self._lock:
            return len(self._line)

    def live(self) -> list[Session]:
        """Sessions that have not ended, without jobs."""
        with self._lock:
            return [session for session in self._sessions.values() if session.state != "ended"]

    def close(self, timeout: float = 10.0) -> None:
        """End all sessions and wait for their threads."""
        with self._lock:
            self._closed = True
            sessions = [*self._sessions.values(), *self._jobs]
        for session in sessions:
            session.stop("shutdown")
        until = time.monotonic() + timeout
        for session in sessions:
            session.join(max(0.0, until - time.monotonic()))
            session.recording.close()

    def _ended(self, session: Session) -> None:
        with self._lock:
            self._running.discard(session.id)
            if session in self._line:
                self._line.remove(session)
            while self._line and len(self._running) < self.room.sessions and not self._closed:
                following = self._line.pop(0)
                self._running.add(following.id)
                following.start()
            self._tell_places()
            self._kept.append((time.monotonic(), session))
        self._forget()
        self._watching.end(session)

    def _job_ended(self, session: Session) -> None:
        with self._lock:
            self._jobs.discard(session)
        session.recording.close()

    def _tell_places(self) -> None:
        for place, session in enumerate(self._line, start=1):
            session.tell(Notice("waiting", {"place": place}))

    def _forget(self) -> None:
        """Drop sessions that ended long ago, and their recordings."""
        now = time.monotonic()
        with self._lock:
            while self._kept and (now - self._kept[0][0] > KEPT or len(self._kept) > MOST_KEPT):
                _, session = self._kept.pop(0)
                session.recording.close()
                self._sessions.pop(session.id, None)


def seconds_per_chunk(pipeline: Pipeline | NativePipeline, prompt: str, scale: int) -> tuple[float, int]:
    """(seconds, frames) of a chunk, coded too: the median of a few of two streams in turn, after the first ones.

    In turn, as a stream finds nothing of its own in the processor's caches after another one's chunk.
    """
    times, frames, position = [], 0, 0
    coding = Coding(pipeline.height, pipeline.width, pipeline.fps, scale)
    with pipeline.stream(prompt) as one, pipeline.stream(prompt, seed=1) as other:
        for number in range(TIMED + 2):
            for stream in (one, other):
                begun = time.perf_counter()
                chunk = stream.next_chunk()
                frames = len(chunk)
                coding.code(chunk, position, {"h264": position == 0})
                position += frames
                if number >= 2:
                    times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2], frames


def capacity(seconds: float, frames: int, fps: float, parallel: int) -> int:
    """Sessions that hold `fps`, a chunk of `frames` taking `seconds` and `parallel` made at once; at least 1."""
    return max(1, int(SHARE * parallel * frames / (fps * seconds) + 1e-9))
