"""Servers under test: `python -m serve` in a process of its own, or an application on a thread of this one.

    with serving("--jobs-dir", folder) as server:
        httpx.get(server.url + "/health")

tests/serve/conftest.py makes `served` a fixture: one server of the embedded model for all tests of a process.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
START_WITHIN = 120.0  # seconds; about 8 on a quiet machine
END_WITHIN = 30.0
_READY = "serving on "
# The server's own options in the environment of whoever runs the tests must not reach it.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


@dataclass
class Served:
    """A server that answers. `url` has no slash at its end."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path  # its stdout and stderr

    @property
    def socket_url(self) -> str:
        return self.url.replace("http", "ws", 1)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal, kill it if it stays; its exit status (minus the signal's number after a signal)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(END_WITHIN)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End it as a power cut would."""
        self.process.kill()
        return self.process.wait()


def free_port() -> int:
    """One below those that the kernel gives to other programs meanwhile."""
    while True:
        port = random.randrange(15_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def start_server(
    *options: object, log: Path, environment: Mapping[str, str] | None = None, wait: bool = True
) -> Served:
    """Start `python -m serve` on a free port; with `wait`, return when it answers. RuntimeError has what it printed.

    The caller ends it. Without `wait`, `url` is empty.
    """
    told = {k: v for k, v in os.environ.items() if not k.startswith("GREEDY_SERVE")} | _ENVIRONMENT
    command = [sys.executable, "-m", "serve", "--port", "0", *map(str, options)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            env=told | dict(environment or {}),
        )  # fmt: skip
    made = Served("", process, log)
    until = time.monotonic() + START_WITHIN
    while wait:
        ready = [line for line in made.output.splitlines(keepends=True) if line.startswith(_READY)]
        if ready and ready[0].endswith("\n"):
            made.url = ready[0].removeprefix(_READY).strip().rstrip("/").replace("//localhost", "//127.0.0.1")
            break
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}:\n{made.output}")
        if time.monotonic() > until:
            made.kill()
            raise RuntimeError(f"the server did not answer within {START_WITHIN:g} s:\n{made.output}")
        time.sleep(0.05)
    return made


@contextmanager
def serving(*options: object, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """`python -m serve` with these options, on a free port; it ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        made = start_server(*options, log=Path(folder) / "log", environment=environment)
        try:
            yield made
        finally:
            made.stop()


@contextmanager
def app_on_a_thread(app: Any, **config: Any) -> Iterator[str]:
    """Serve an ASGI application from this process, on a free port; yields its url. `config`: fields of uvicorn.Config.

    Tests see into such a server, and the model is loaded once.
    """
    import uvicorn

    config = {"host": "127.0.0.1", "port": 0, "log_level": "error", "timeout_graceful_shutdown": 2} | config
    running = uvicorn.Server(uvicorn.Config(app, **config))
    thread = threading.Thread(target=running.run, daemon=True)  # off the main thread uvicorn leaves signals alone
    thread.start()
    try:
        until = time.monotonic() + START_WITHIN
        while not running.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the application did not start")
            time.sleep(0.01)
        yield "http://{}:{}".format(*running.servers[0].sockets[0].getsockname()[:2])
    finally:
        running.should_exit = True
        thread.join(END_WITHIN)
        assert not thread.is_alive(), "the application did not end"


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """A server of the embedded model with default options, for all tests of a process. Its first use takes seconds."""
    with serving("--rate", 100_000) as made:
        yield made
