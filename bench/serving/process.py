"""`python -m serve` as a process under test: its address, what it uses, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psutil

from bench.instruments.processes import with_group

START_WITHIN = 300.0  # seconds; large models are read from a disk
END_WITHIN = 20.0
ANSWER_WITHIN = 10.0
READY = "serving on "
MB = 2**20


@dataclass(frozen=True)
class Counts:
    """What a server holds."""

    sessions: int  # that run or wait
    threads: int
    files: int
    memory_mb: float


@dataclass
class Server:
    """A server that answers. `process` is None where it is not on this machine."""

    url: str
    token: str = ""
    process: psutil.Process | None = None
    log: Path | None = None  # its stderr, where we started it

    @property
    def socket(self) -> str:
        """The address of the live socket."""
        return self.url.replace("http", "ws", 1) + "/v1/realtime/video"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def ask(self, path: str, body: Mapping[str, Any] | None = None, method: str | None = None) -> Any:
        """The JSON answer to a request; bytes where it is no JSON. OSError, with the server's words, for an error."""
        data = None if body is None else json.dumps(body).encode()
        head = self.headers | ({"Content-Type": "application/json"} if data else {})
        request = urllib.request.Request(self.url + path, data, head, method=method)
        try:
            with _OPENER.open(request, timeout=ANSWER_WITHIN) as answer:
                content = answer.read()
                kind = answer.headers.get_content_type()
        except urllib.error.HTTPError as error:
            with error:
                raise Answered(error.code, error.read().decode("utf-8", "replace")) from None
        return json.loads(content) if kind == "application/json" else content

    def model(self) -> dict[str, Any]:
        return self.ask("/v1/models")["data"][0]

    def cpu(self) -> float | None:
        """CPU seconds so far, of ended threads as well."""
        if self.process is None:
            return None
        times = self.process.cpu_times()
        return times.user + times.system

    def engine_cpu(self) -> float:
        """CPU seconds that sessions have spent in the engine so far."""
        figures = self.ask("/metrics").decode()
        (line,) = re.findall(r"^greedy_engine_cpu_seconds_total ([\d.e+-]+)$", figures, re.MULTILINE)
        return float(line)

    def memory_mb(self) -> float | None:
        return None if self.process is None else self.process.memory_info().rss / MB

    def counts(self) -> Counts:
        """What it holds now. ValueError where its process is not known."""
        if self.process is None:
            raise ValueError(f"server: got {self.url}, expected one on this machine")
        health = self.ask("/health")
        with self.process.oneshot():
            threads, files = self.process.num_threads(), self.process.num_fds()
        return Counts(health["sessions"] + health["waiting"], threads, files, self.memory_mb() or 0.0)

    def errors(self) -> str:
        """What it printed on stderr."""
        return "" if self.log is None else self.log.read_text(encoding="utf-8", errors="replace")

    def empty(self, timeout: float = ANSWER_WITHIN) -> bool:
        """Wait until no session runs or waits; False after `timeout` seconds."""
        until = time.monotonic() + timeout
        while (health := self.ask("/health"))["sessions"] + health["waiting"]:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


class Answered(OSError):
    """An HTTP error: its status, and what the server said."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:300]}")
        self.status, self.body = status, body


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy


@contextmanager
def started(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server with these arguments; it ends with the block. ValueError, with what it printed, where none starts."""
    with tempfile.TemporaryDirectory(prefix="greedy-bench-") as folder:
        log = Path(folder) / "stderr"
        with log.open("wb") as errors:
            command = [sys.executable, "-m", "serve", *arguments]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True,
                env=os.environ | {"GREEDY_SERVE_TOKEN": ""} | dict(environment or {}), start_new_session=True,
            )  # fmt: skip
        try:
            yield Server(_address(process, log), "", psutil.Process(process.pid), log)
        finally:
            end(process)


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """The address that a server prints when it listens."""
    timer = threading.Timer(START_WITHIN, with_group, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(READY):
                return line.removeprefix(READY).strip().rstrip("/").replace("//localhost", "//127.0.0.1")
    finally:
        timer.cancel()
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise ValueError(f"python -m serve: got {said[-1] if said else 'no address'}, expected a server that listens")


def end(process: subprocess.Popen[str]) -> None:
    """End a server, and what it started, first politely."""
    with_group(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_WITHIN)
    with_group(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def running(url: str, token: str) -> Server:
    """A server that runs already. Its process is found by its port, where it listens on this machine. OSError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url: got {url!r}, expected http://HOST:PORT")
    server = Server(f"{parts.scheme}://{parts.netloc}", token)
    try:
        server.ask("/health")
    except urllib.error.URLError as error:
        raise ValueError(f"server: got {url} ({error.reason}), expected one that answers") from None
    if parts.hostname in ("127.0.0.1", "localhost", "::1"):
        server.process = _listener(parts.port or 80)
    return server


def _listener(port: int) -> psutil.Process | None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp")):
                return process
    return None


class Peak:
    """Samples a server's memory on a thread of its own while the block runs."""

    def __init__(self, server: Server, every: float = 0.1) -> None:
        self._server, self._every = server, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = server.memory_mb()
        self.most = self.before

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            with suppress(psutil.Error):
                self.most = max(self.most or 0.0, self._server.memory_mb() or 0.0)

    def __enter__(self) -> Self:
        if self.before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.before is not None:
            self._thread.join()
