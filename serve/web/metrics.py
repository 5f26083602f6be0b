"""Figures for a monitor, in Prometheus' text format."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.core.job_store import Job
from serve.core.messages import Chunk
from serve.core.session import Session

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """What is counted. Each server has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._frames = Counter("greedy_frames", "frames shown", registry=self.registry)
        self._chunks = Counter("greedy_chunks", "chunks shown", registry=self.registry)
        self._late = Counter(
            "greedy_late_chunks", "chunks that came after their first frame was due", registry=self.registry
        )
        self._cpu = Counter(
            "greedy_engine_cpu_seconds", "CPU time of sessions in the engine, without coding and sending",
            registry=self.registry,
        )  # fmt: skip
        self._spent = Histogram(
            "greedy_chunk_seconds", "time to make a chunk", buckets=_SECONDS, registry=self.registry
        )
        self._lateness = Histogram(
            "greedy_chunk_late_seconds", "how late chunks came", buckets=_SECONDS, registry=self.registry
        )
        self._first = Histogram(
            "greedy_first_chunk_seconds",
            "from a session's start to its first chunk",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._ended = Counter(
            "greedy_sessions_ended", "sessions by the reason of their end", ["reason"], registry=self.registry
        )
        self._jobs = Counter("greedy_jobs_ended", "jobs that ended, by status", ["status"], registry=self.registry)
        self._errors = Counter("greedy_errors", "errors told to clients", ["code"], registry=self.registry)
        self._memory = Gauge("greedy_memory_bytes", "resident memory of the server", registry=self.registry)
        self._memory.set_function(lambda: psutil.Process(os.getpid()).memory_info().rss)

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A number that is asked for when it is read."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def chunk(self, session: Session, chunk: Chunk) -> None:
        self._frames.inc(len(chunk.frames))
        self._chunks.inc()
        self._cpu.inc(chunk.cpu)
        self._spent.observe(chunk.spent)
        self._lateness.observe(chunk.late)
        if chunk.late > 0.001:
            self._late.inc()
        if session.chunks == 1:
            self._first.observe(time.monotonic() - session.began)

    def end(self, session: Session) -> None:
        self._ended.labels(session.reason).inc()

    def job(self, job: Job) -> None:
        self._jobs.labels(job.status).inc()

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)
