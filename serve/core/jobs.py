"""Videos that are made in the background, one after the other or a few at once, and kept for a while."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.media.sinks import Sink, open_sink
from serve.core.encoders import enlarged
from serve.core.house import JOB, Busy, House
from serve.core.job_store import ENDED, Job, Store
from serve.core.messages import Chunk, Wish
from serve.core.session import Session
from serve.core.viewers import Viewer

log = logging.getLogger("serve")
MOST_TRIES = 3  # a job that takes its server down must not do so for ever
SWEEP = 30.0  # seconds between two looks for jobs that have expired
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Conflict(ValueError):
    """A request has the key of another one."""


class _Ended(Exception):
    """A session ended before its video was whole. `code` is empty if it was told to."""

    def __init__(self, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Jobs:
    """The queue of a server: `workers` threads make one video each, and `waiting` jobs may wait.

    A job is a session in the background, so that live sessions compute first. Its frames are coded once, into the
    video. All that is known of a job is on disk before a caller hears of it. Every method may be called by any thread.
    `keep`: seconds for which a job is kept after its end. `on_end` is called when a job is completed or has failed.
    """

    def __init__(
        self, house: House, store: Store, model: str, workers: int, waiting: int, keep: float,
        on_end: Callable[[Job], None] = lambda job: None,
    ) -> None:  # fmt: skip
        self._house, self._store, self._model, self._on_end = house, store, model, on_end
        self._workers, self._waiting, self._keep = workers, waiting, keep
        self._lock = threading.Condition()
        self._jobs: dict[str, Job] = {}  # the oldest first
        self._queue: deque[str] = deque()
        self._running: dict[str, Session | None] = {}  # None until the session is there
        self._progress: dict[str, int] = {}
        self._closing = False
        for job in store.load():
            self._recover(job)
        self._threads = [threading.Thread(target=self._work, name=f"job-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    # --- for any thread

    def submit(self, job: Job, start: np.ndarray | None = None) -> Job:
        """Queue a job whose video starts from a picture uint8 [1, H, W, 3], if there is one.

        A job with the key of an earlier one is not made: that one is returned. Conflict if it asked for something
        else; Busy if too many wait; OSError if the disk takes no more.
        """
        with self._lock:
            self._expire()
            earlier = next((one for one in self._jobs.values() if one.key == job.key), None) if job.key else None
            if earlier is not None:
                if earlier.digest != job.digest:
                    raise Conflict(f"Idempotency-Key: got {job.key[:100]!r} with another request before, "
                                   "expected the same request or another key")  # fmt: skip
                return earlier
            if self._closing:
                raise Busy("the server is shutting down")
            if len(self._queue) + len(self._running) >= self._workers + self._waiting:
                raise Busy(f"{len(self._running)} jobs run and {len(self._queue)} wait: try again later")
            newest = next(reversed(self._jobs.values())).created if self._jobs else 0.0
            job = replace(job, created=max(time.time(), newest + 1e-6))  # so that a restart keeps the order
            self._store.add(job, start)
            self._jobs[job.id] = job
            self._queue.append(job.id)
            self._lock.notify()
            return job

    def get(self, name: str) -> Job | None:
        with self._lock:
            self._expire()
            return self._jobs.get(name)

    def all(self) -> list[Job]:
        """The oldest first."""
        with self._lock:
            self._expire()
            return list(self._jobs.values())

    def progress(self, job: Job) -> int:
        """Percent of the video that are made; 100 only when it can be had."""
        return 100 if job.status == "completed" else self._progress.get(job.id, 0)

    def video(self, job: Job) -> Path:
        """The file of a completed job."""
        return self._store.video(job.id)

    def delete(self, name: str) -> bool:
        """Forget a job and its video; one that runs ends within the chunk that is being made. False if unknown."""
        with self._lock:
            if self._jobs.pop(name, None) is None:
                return False
            if name in self._running:
                self._store.forget(name)  # its worker removes the files
                if (session := self._running[name]) is not None:
                    session.stop()
                return True
            if name in self._queue:
                self._queue.remove(name)
            self._progress.pop(name, None)
            self._store.remove(name)
            return True

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def close(self, timeout: float = 10.0) -> None:
        """Stop. What runs goes back into the queue, for the next server on the same folder."""
        with self._lock:
            self._closing = True
            for session in self._running.values():
                if session is not None:
                    session.stop("shutdown")
            self._lock.notify_all()
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._store.close()

    # --- with the lock held

    def _recover(self, job: Job) -> None:
        """Take up a job of an earlier server."""
        if job.fleeting or (job.expires is not None and job.expires <= time.time()):
            self._store.remove(job.id)
            return
        if job.status not in ENDED:
            self._store.clean(job.id)
            wrong = self._misfit(job)
            if job.tries >= MOST_TRIES:
                job = self._failed(job, "failed", f"the server ended {job.tries} times while it made this video")
            elif wrong:
                job = self._failed(job, "model_changed", wrong)
            else:
                job = replace(job, status="queued")
                self._queue.append(job.id)
        elif job.status == "completed" and not self._store.video(job.id).is_file():
            job = self._failed(job, "failed", "the video's file is gone")
        self._jobs[job.id] = job
        self._save(job)

    def _misfit(self, job: Job) -> str:
        """Why this server cannot make a job's video; empty if it can."""
        pipeline = self._house.pipeline
        there = f"{self._model} at {pipeline.width}x{pipeline.height}, {pipeline.fps:g} fps"
        asked = f"{job.model} at {job.width}x{job.height}, {job.fps:g} fps"
        return "" if asked == there else f"model: got a job for {asked}, expected one for {there}"

    def _failed(self, job: Job, code: str, message: str) -> Job:
        return self._over(replace(job, status="failed", error_code=code, error=message))

    def _over(self, job: Job) -> Job:
        now = time.time()
        return replace(job, ended=now, expires=now + self._keep)

    def _save(self, job: Job) -> None:
        """Write a job down. On a full disk it is right in memory only; a restart then makes the video again."""
        try:
            self._store.save(job)
        except OSError as error:
            log.warning("job %s was not written: %s", job.id, error)

    def _expire(self) -> None:
        now = time.time()
        for name in [job.id for job in self._jobs.values() if job.expires is not None and job.expires <= now]:
            del self._jobs[name]
            self._progress.pop(name, None)
            self._store.remove(name)

    # --- the workers

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closing:
                    self._lock.wait(SWEEP)
                    self._expire()
                if self._closing:
                    return
                name = self._queue.popleft()
                job = replace(self._jobs[name], status="in_progress", tries=self._jobs[name].tries + 1)
                self._jobs[name], self._running[name], self._progress[name] = job, None, 0
                self._save(job)
            made = self._outcome(job)
            with self._lock:
                if made.status != "completed":
                    self._store.clean(name)
                if name in self._jobs:
                    self._jobs[name] = made
                    self._save(made)
                    if made.status == "queued":
                        self._queue.appendleft(name)
                    else:
                        self._on_end(made)
                else:  # it was deleted
                    self._progress.pop(name, None)
                    self._store.remove(name)
                del self._running[name]  # last, as others look at it without the lock

    def _outcome(self, job: Job) -> Job:
        """The job after its video was made, or was not: completed, failed, or queued again."""
        try:
            notes = self._make(job)
            return self._over(replace(job, status="completed", notes=(*job.notes, *notes)))
        except _Ended as end:
            if not end.code:
                return replace(job, status="queued", tries=job.tries - 1)
            return self._failed(job, end.code, end.message)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            return self._failed(job, "out_of_memory", "the video stopped: the server has too little memory for it")
        except OSError as error:
            # Its text has a path of the server's, which no client needs to know.
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            log.warning("job %s: %s", job.id, error)
            code = "disk_full" if error.errno in _FULL else "failed"
            return self._failed(job, code, f"the video was not written: {reason}")
        except Exception as error:
            log.exception("job %s failed", job.id)
            return self._failed(job, "failed", f"the video stopped: {(str(error).splitlines() or ['?'])[0]}")

    def _make(self, job: Job) -> list[str]:
        """Make a job's video; returns notes about it. _Ended if its session ended early."""
        notes: list[str] = []
        viewer = Viewer(codec=None)
        start = self._store.start(job.id)
        wish = Wish(((job.prompt, 1.0),), job.seed, job.frames, 0.0, start, job.adapters)
        with open_sink(self._store.video(job.id), job.fps, job.size) as sink:
            session = self._open(job, wish, viewer)
            try:
                self._record(job, viewer, sink, notes)
            finally:
                session.stop()
                session.join()  # the next job needs the memory of this one
        return notes + sink.notes

    def _open(self, job: Job, wish: Wish, viewer: Viewer) -> Session:
        with self._lock:
            if self._closing or job.id not in self._jobs:
                raise _Ended
            try:
                session = self._running[job.id] = self._house.job(wish, viewer)
            except Busy:  # the house has closed
                self._closing = True
                raise _Ended from None
        return session

    def _record(self, job: Job, viewer: Viewer, sink: Sink, notes: list[str]) -> None:
        """Write the frames of a session to a sink until it ends. _Ended if that is too early."""
        error, reason = ("", ""), ""
        while not reason:
            item = viewer.take(SWEEP)
            if isinstance(item, Chunk):
                for frame in enlarged(item.frames, job.scale):
                    sink.write(frame)
                self._progress[job.id] = min(99, 100 * sink.frames // job.frames)
            elif item is not None and item.kind == "note":
                notes.append(item.about["message"])
            elif item is not None and item.kind == "error":
                error = item.about["code"], item.about["message"]
            elif item is not None and item.kind == "done":
                reason = item.about["reason"]
        if reason == "finished":
            return
        if reason in ("stopped", "shutdown"):
            raise _Ended
        late = f"the video was not done after {JOB.lifetime / 3600:g} hours"
        raise _Ended(*(error if error[0] else (reason, late if reason == "lifetime" else f"the video {reason}")))
