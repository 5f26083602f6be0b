"""One live video: a thread that makes chunks, changes them as it is told, and gives them to its viewers."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from engine.bundles.native import NativePipeline
from engine.media.live import LiveFrames
from engine.stream import Pipeline
from serve.core.coding import Coded, Coding, Recording
from serve.core.messages import Change, Chunk, Notice, Past, Wish
from serve.core.pace import Pace
from serve.core.turns import Turns
from serve.core.video import OUT_OF_MEMORY, Video, line_of
from serve.core.viewers import Viewer

log = logging.getLogger("serve")
TICK = 0.5  # seconds between two looks at limits, while nothing happens
MOST_CHANGES = 64  # that wait for a chunk


@dataclass(frozen=True)
class Limits:
    """When a session ends by itself, in seconds, and what is kept of it."""

    idle: float = 900.0  # without a change
    lifetime: float = 7200.0
    lease: float = 30.0  # without a viewer
    stall: float = 60.0  # waiting for a viewer that takes nothing
    recording: int = 256 << 20  # bytes


@dataclass(frozen=True)
class Place:
    """What all sessions of a server share."""

    pipeline: Pipeline | NativePipeline
    turns: Turns
    scale: int
    limits: Limits
    on_chunk: Callable[[Session, Chunk], None]
    on_end: Callable[[Session], None]
    background: bool = False  # all other sessions compute first

    def turn(self, deadline: float) -> AbstractContextManager[None]:
        """Within the block a session may compute. `deadline`: monotonic seconds."""
        return self.turns.turn(float("inf") if self.background else deadline)


class TooMany(RuntimeError):
    """More changes wait than a session takes."""


class Session:
    """A stream on a thread of its own. Every method may be called by any thread.

    Commands act where a chunk begins. A chunk begins when it is due soon (`Pace`), when someone watches, and when no
    viewer that holds the session is behind. So frames are neither dropped nor stale. A stop ends the session within
    the chunk that is being made.
    """

    def __init__(self, name: str, place: Place, wish: Wish) -> None:
        self.id = name
        self.state = "waiting"  # starting, playing, paused, ended
        self.reason = ""  # why it ended
        self.chunks = self.frames = 0  # shown so far
        self.recording = Recording(place.limits.recording)
        self.key = secrets.token_urlsafe(12)  # who has it may change the video
        self._place, self._pipeline = place, place.pipeline
        self._video = Video(self._pipeline, wish, self._turn, self.tell)
        self._lock = threading.Condition()
        self._changes: deque[Change] = deque()
        self._past, self._skip = deque(wish.history), wish.skip
        self._viewers: list[Viewer] = []
        self._stopping = ""
        self._records = False
        self._pace = Pace(self._pipeline.fps, wish.speed)
        self._coding = Coding(self._pipeline.height, self._pipeline.width, self._pipeline.fps, place.scale)
        self._paused = self._blocked = False
        self._last = 1  # frames of the chunk that was made last
        now = time.monotonic()
        self.began, self._touched, self._watched, self._free, self._fed = now, now, now, now, now
        self._thread = threading.Thread(target=self._run, name=f"session-{name}", daemon=True)

    # --- for any thread

    def start(self) -> None:
        """Begin, unless it was stopped while it waited."""
        with self._lock:
            if self._stopping:
                return
            now = time.monotonic()
            self.state, self.began, self._touched, self._watched = "starting", now, now, now
        self._thread.start()

    def change(self, change: Change) -> None:
        """Ask for a change with the next chunk. TooMany where too many wait."""
        with self._lock:
            if len(self._changes) >= MOST_CHANGES:
                raise TooMany(f"session: got more than {MOST_CHANGES} changes at once, expected fewer")
            if change.restarts:
                change = self._only_restart(change)
                for viewer in self._viewers:
                    viewer.drop_chunks()  # they are of the old video
            self._changes.append(change)
            self._touched = time.monotonic()
            self._lock.notify_all()

    def watch(self, viewer: Viewer) -> None:
        """Give a viewer all chunks from the next one on. A video that runs sends its start first.

        One viewer holds a session: the newest that would. So one whose connection is lost holds it no longer.
        """
        with self._lock:
            viewer.on_room = self.wake
            if viewer.holds:
                for other in self._viewers:
                    other.holds = False
            if self.state in ("playing", "paused"):
                viewer.put(self._start_notice())
            self._viewers.append(viewer)
            self._records = self._records or viewer.codec in ("h264", "vp8")
            if self.state == "ended":
                viewer.put(self._done_notice())
            self._lock.notify_all()

    def leave(self, viewer: Viewer) -> None:
        with self._lock:
            if viewer in self._viewers:
                self._viewers.remove(viewer)
                self._watched = time.monotonic()
            self._lock.notify_all()

    @property
    def input(self) -> LiveFrames | None:
        """What the video follows. Who puts frames there calls `wake`."""
        return self._video.input

    def stop(self, reason: str = "stopped") -> None:
        """End it within the chunk that is being made."""
        with self._lock:
            self._stopping = self._stopping or reason
            waiting = self.state == "waiting"
            self._lock.notify_all()
        if waiting:
            self._end(reason)

    def wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def tell(self, notice: Notice) -> None:
        """Give every viewer a notice."""
        with self._lock:
            for viewer in self._viewers:
                viewer.put(notice)

    @property
    def watchers(self) -> int:
        with self._lock:
            return sum(viewer.watches for viewer in self._viewers)

    @property
    def take(self) -> int:
        """How often the video has started again: a chunk of an earlier take is stale."""
        return self._video.take

    @property
    def seed(self) -> int:
        return self._video.seed

    @property
    def prompt(self) -> str:
        """The active prompt on one line."""
        return self._video.prompt

    @property
    def history(self) -> list[Past]:
        """Changes since the video began, to make it again."""
        return list(self._video.history)

    def frame_due(self, chunk: Chunk, number: int) -> float:
        """Monotonic time at which frame `number` of a chunk is to be shown, at the speed the chunk was made for."""
        return chunk.due + (number / (self._pipeline.fps * chunk.speed) if chunk.speed else 0.0)

    # --- the session's own thread

    def _run(self) -> None:
        reason, release = "failed", False
        try:
            if self._pipeline.device.type == "cuda":
                torch.cuda.set_device(self._pipeline.device)  # each thread has its own current device
            self._video.begin()
            self._catch_up()
            self._free = self._fed = time.monotonic()  # the wait for a turn, and the opening, were not the viewer's
            with self._lock:
                self.state = "playing"
                for viewer in self._viewers:
                    viewer.put(self._start_notice())
            while not (reason := self._why_end()):
                if self._due_now():
                    self._show(self._next())
        except OUT_OF_MEMORY as error:
            self._fail("out_of_memory", f"the video stopped: {line_of(error)}")
            release = True  # once the stream is closed, and the error's traceback holds none of its tensors
        except Exception as error:
            # What the user asked for was checked before; a number that is not finite, or a fault of ours, ends here.
            log.exception("session %s failed", self.id)
            self._fail("failed", f"the video stopped: {line_of(error)}")
        finally:
            try:
                self._video.close(release)
            except Exception:
                log.exception("session %s did not close its stream", self.id)
            self._end(reason or "failed")

    def _catch_up(self) -> None:
        """Make the chunks again that the viewer has seen, with the changes of their time. Live sessions go first."""
        told, video = 0.0, self._video
        while video.number < self._skip and not self._why_end():
            self._apply_past()
            video.next(float("inf"))
            video.saw()
            if (now := time.monotonic()) - told > TICK:
                told = now
                self.tell(Notice("progress", {"chunk": video.number, "of": self._skip}))

    def _apply_past(self) -> None:
        """Apply the changes of the wish that belong to the next chunk."""
        while self._past and self._past[0].chunk <= self._video.number:
            self._apply(self._past.popleft().change)

    def _why_end(self) -> str:
        """Why the session ends now; empty while it goes on."""
        now, limits = time.monotonic(), self._place.limits
        with self._lock:
            if self._stopping:
                return self._stopping
            if not any(viewer.watches for viewer in self._viewers):
                if now - self._watched > limits.lease:
                    return "lease"
            else:
                self._watched = now
            behind = self._behind()
        self._free = self._free if behind and not self._paused else now
        self._fed = self._fed if self._video.hungry and not self._paused else now
        if self._video.finished:
            return "finished"
        if now - self.began > limits.lifetime:
            return "lifetime"
        if now - self._touched > limits.idle:
            return "idle"
        if now - self._free > limits.stall:
            return "stalled"
        if now - self._fed > limits.stall:
            return "no_frames"
        return ""

    def _due_now(self) -> bool:
        """Apply what was asked for, then wait a while; True when the next chunk is to be made."""
        with self._lock:
            changes, self._changes = self._changes, deque()
        self._apply_past()
        for change in changes:
            self._apply(change)
        with self._lock:
            if self._stopping or self._changes:
                return False
            if self._paused or self._behind() or not any(viewer.watches for viewer in self._viewers):
                self._blocked = True
                self._lock.wait(TICK)
                return False
            if self._video.hungry:
                self._lock.wait(TICK)
                return False
            if self._blocked:
                self._blocked = False
                self._pace.rebase()
            if self._video.input is not None:
                return True  # the input is the clock
            now = time.monotonic()
            early = self._pace.due(self.frames, now) - self._pace.lead(self._last) - now
            if early > 0:
                self._lock.wait(min(early, TICK))
                return False
        return True

    def _apply(self, change: Change) -> None:
        """Change the video and its clock. What the video refuses leaves both as they were."""
        if change.restarts:
            self._past.clear()
        if not self._video.apply(change):
            return
        if change.restarts:
            self._pace.rebase()
        if change.speed is not None:
            self._pace.at_speed(change.speed, self.frames, time.monotonic())
        if change.paused is not None:
            self._paused = change.paused
            self.state = "paused" if self._paused else "playing"

    def _next(self) -> Chunk:
        """Make the next chunk. It has no units yet."""
        asked = time.monotonic()
        made = self._video.next()
        now = time.monotonic()
        due, late = self._pace.made(self.frames, now - asked, now)
        self._last = len(made.frames)
        return Chunk(**vars(made), position=self.frames, units=(), due=due, late=late, speed=self._pace.speed)

    def _turn(self, deadline: float | None) -> AbstractContextManager[None]:
        """Within the block the session may compute: by a deadline, or as its next chunk."""
        if deadline is not None:
            return self._place.turns.turn(deadline)
        return self._place.turn(self._pace.turn_by(self.frames, self._last, time.monotonic()))

    def _show(self, chunk: Chunk) -> None:
        """Code a chunk and give it to those who watch."""
        records = self._records and not self.recording.full
        with self._lock:
            if self._restarting():
                return
            viewers = list(self._viewers)
            wanted = {v.codec: False for v in viewers if v.codec} | ({"h264": False} if records else {})
            for viewer in viewers:
                if viewer.codec and viewer.wants_key and not viewer.full:
                    wanted[viewer.codec] = True
        coded: dict[str, Coded] = self._coding.code(chunk.frames, chunk.position, wanted)
        with self._lock:
            if self._restarting():
                self._coding.restart()  # the next chunk must need no picture that was not sent
                return
            for viewer in viewers:
                one = coded.get(viewer.codec or "", Coded(()))
                viewer.put(replace(chunk, units=one.units, fragment=one.fragment, init=one.init))
            self.chunks, self.frames = self.chunks + 1, self.frames + len(chunk.frames)
        if records:
            self.recording.add(coded["h264"])
            if self.recording.full:
                self.tell(Notice("note", {"message": "the recording is full: the download ends here"}))
        self._video.saw()
        self._place.on_chunk(self, chunk)

    def _behind(self) -> bool:
        """Whether the viewer that holds the session has no room. With the lock held."""
        return any(viewer.full for viewer in self._viewers if viewer.holds)

    def _only_restart(self, change: Change) -> Change:
        """The restart of all that wait: the last one, with the seed that was asked for last. With the lock held."""
        seeds = [one.seed for one in (*self._changes, change) if one.seed is not None]
        self._changes = deque(replace(one, seed=None, reset=None) for one in self._changes)
        return replace(change, seed=seeds[-1] if seeds else None)

    def _restarting(self) -> bool:
        """Whether a restart waits, so that what was made last is stale. With the lock held."""
        return any(change.restarts for change in self._changes)

    def _start_notice(self) -> Notice:
        about = {"seed": self.seed, "prompt": self.prompt, "frames": self._video.wish.frames, "speed": self._pace.speed}
        return Notice("start", about)

    def _done_notice(self) -> Notice:
        stopped = self.reason != "finished"
        about = {"chunks": self.chunks, "frames": self.frames, "stopped": stopped, "reason": self.reason}
        if (given := self._video.input) is not None:
            about["source"] = {"taken": given.taken, "dropped": given.dropped, "repeated": given.repeated}
        return Notice("done", about)

    def _fail(self, code: str, message: str) -> None:
        self.tell(Notice("error", {"code": code, "message": message}))

    def _end(self, reason: str) -> None:
        with self._lock:
            if self.state == "ended":
                return
            self.state, self.reason = "ended", reason
            # It stays for download: let go what only a running video needs.
            self._coding.close()
            self._video.forget()
            for viewer in self._viewers:
                viewer.put(self._done_notice())
        self._place.on_end(self)
