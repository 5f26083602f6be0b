"""Both ends of the adapter protocol: `Adapter` races a subprocess, `serve` turns an engine into one.

One JSON object per line. Requests, and the answers that end them:

    open      settings               {"ok": true, "about": ..., "fills": chunks until caches are full}
    generate  prompt, seed, frames   {"frames": made so far} as frames reach the host; {"ok": true, "frames": all}
    latents   seed, chunks, file,    {"ok": true}: the long stream begins anew, and its first latents are in the file
              timesteps
    warm                             {"ok": true, ...}: caches are full, everything is compiled and captured
    chunks    chunks                 {"frames": made so far} after each chunk of the long stream; {"ok": true}
    stages    chunks                 {"ok": true, "ms": {"denoise": [...], "context": [...], "decode": [...]}}
    close                            {"ok": true}, then the process ends

{"error": "..."} can replace any answer. `open` and `generate` are enough for `bench compare`; `bench race` asks for the
others. docs/benchmarks.md has the settings and the units.
"""

import json
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, Protocol

from bench.instruments.processes import with_group

LIMIT = 3600.0  # seconds for one answer, where the caller sets no other
GRACE = 5.0  # seconds that a process has to end by itself


class AdapterError(ValueError):
    """An adapter that died, hung, or answered something else than what was asked."""


@dataclass(frozen=True)
class Video:
    """One video: frames, seconds until it was complete, and (seconds, frames so far) of every progress line."""

    frames: int
    seconds: float
    progress: list[tuple[float, int]]

    @property
    def first_frame(self) -> float:
        return self.progress[0][0] if self.progress else self.seconds

    def steady_ms_per_frame(self, fills: int = 1) -> float:
        """Median over the chunks after the first `fills`: those before them fill the caches.

        A video with fewer chunks leaves out its first. One that came at once counts as a whole.
        """
        begin = fills if len(self.progress) > fills else 1
        marks = [(0.0, 0), *self.progress][begin:]
        chunks = [1e3 * (b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(marks) if b[1] > a[1]]
        return statistics.median(chunks) if chunks else 1e3 * self.seconds / self.frames


class Adapter:
    """A subprocess under test. This side measures: from the request to the line that announces the frames.

    settings  of `open`; `threads` is also put into the environment
    limit     seconds for every answer; a process that takes longer is killed with all that it started
    log       where its stderr goes; default: where ours goes
    wait      False only starts it: several then load their weights at the same time, and `opened` waits for each

    Whatever the adapter does wrong raises AdapterError, which names it.
    """

    def __init__(
        self, name: str, command: list[str], settings: Mapping[str, Any], limit: float = LIMIT,
        log: IO[str] | None = None, wait: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.limit = name, limit
        self.about: dict[str, Any] = {}  # the answer to `open`
        # Libraries read the number of threads when they are imported, before any request arrives.
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])} if "threads" in settings else None
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise AdapterError(
                f"adapter {name}: got {shlex.join(command)}, expected a command that starts ({error})"
            ) from None
        # A thread of its own: reading a pipe has no time limit, and a line's time is taken as it arrives.
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._send({"op": "open", **settings})
        if wait:
            self.opened()

    def opened(self) -> None:
        """Wait for the answer to `open`."""
        try:
            self.about = self._answer("open", self.limit, [])
        except BaseException:
            self.kill()
            raise

    @property
    def fills(self) -> int:
        """Chunks until the adapter's caches are full."""
        return max(1, int(self.about.get("fills", 1)))

    def generate(self, prompt: str, seed: int, frames: int) -> Video:
        progress: list[tuple[float, int]] = []
        start = time.perf_counter()
        answer = self._ask({"op": "generate", "prompt": prompt, "seed": seed, "frames": frames}, self.limit, progress)
        seconds = time.perf_counter() - start
        if answer.get("frames") != frames:
            raise AdapterError(f"adapter {self.name}: got {answer.get('frames')} frames, expected {frames}")
        return Video(frames, seconds, [(at - start, made) for at, made in progress])

    def chunks(self, count: int, limit: float | None = None) -> list[float]:
        """Seconds of each of `count` chunks of the adapter's long stream, frames on the host.

        One more chunk is made first and not timed: an engine may have begun it while others ran.
        """
        progress: list[tuple[float, int]] = []
        self._ask({"op": "chunks", "chunks": count + 1}, limit or self.limit, progress)
        if len(progress) != count + 1:
            raise AdapterError(f"adapter {self.name}: got {len(progress)} lines for chunks, expected {count + 1}")
        return [end - begin for (begin, _), (end, _) in pairwise(progress)]

    def stages(self, count: int, limit: float | None = None) -> dict[str, list[float]]:
        """Milliseconds of each of `count` chunks by stage."""
        found = self.ask("stages", limit, chunks=count).get("ms")
        if not isinstance(found, dict) or not all(len(times) == count for times in found.values()):
            raise AdapterError(f"adapter {self.name}: got stages {found}, expected {count} milliseconds of each")
        return found

    def ask(self, op: str, limit: float | None = None, **request: Any) -> dict[str, Any]:
        """The answer to a request, within `limit` seconds."""
        return self._ask({"op": op, **request}, limit or self.limit, [])

    def close(self) -> None:
        """End the process. It has some seconds to end by itself before it is killed."""
        self._send({"op": "close"})
        with suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self.kill()

    def kill(self) -> None:
        """End the process and all that it started, at once. Killing twice is fine."""
        with_group(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(GRACE)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe:
                    pipe.close()

    def __enter__(self) -> "Adapter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put((time.perf_counter(), line))
        self._lines.put((time.perf_counter(), ""))

    def _send(self, request: dict[str, Any]) -> None:
        """Send a request. To a process that ended it is lost, and the missing answer says so."""
        with suppress(OSError, ValueError):  # ValueError: the pipe is closed
            if self._process.stdin:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()

    def _ask(self, request: dict[str, Any], limit: float, progress: list[tuple[float, int]]) -> dict[str, Any]:
        self._send(request)
        return self._answer(request["op"], limit, progress)

    def _answer(self, op: str, limit: float, progress: list[tuple[float, int]]) -> dict[str, Any]:
        """The answer that ends a request. Progress lines are kept with the clock's time."""
        deadline = time.perf_counter() + limit
        while True:
            try:
                now, line = self._lines.get(timeout=max(0.0, deadline - time.perf_counter()))
            except queue.Empty:
                self.kill()
                raise AdapterError(f"adapter {self.name}: got no answer to {op} in {limit:.0f} s, "
                                   "expected one") from None  # fmt: skip
            if not line:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(1)
                raise AdapterError(f"adapter {self.name}: got no answer to {op}, expected a JSON line "
                                   f"(exit status {self._process.poll()})")  # fmt: skip
            try:
                answer = json.loads(line)
            except json.JSONDecodeError:
                raise AdapterError(f"adapter {self.name}: got {line.strip()[:80]!r}, expected JSON") from None
            if not isinstance(answer, dict):
                raise AdapterError(f"adapter {self.name}: got {line.strip()[:80]!r}, expected a JSON object")
            if "error" in answer:
                raise AdapterError(f"adapter {self.name}: {answer['error']}")
            if answer.get("ok"):
                return answer
            if "frames" in answer:
                progress.append((now, int(answer["frames"])))


class Engine(Protocol):
    """An engine behind an adapter."""

    def generate(self, prompt: str, seed: int, frames: int) -> Iterator[int]:
        """Make a video. Yields the number of frames that are on the host so far; the last number is `frames`."""
        ...


class Racer(Engine, Protocol):
    """An engine that `bench race` can ask for everything. Between two requests its device has nothing to do."""

    def warm(self) -> dict[str, Any]:
        """Run the long stream until its caches are full and nothing is left to compile or capture."""
        ...

    def chunks(self, chunks: int) -> Iterator[int]:
        """Go on with the long stream. Yields the number of frames on the host so far, after each chunk."""
        ...

    def stages(self, chunks: int) -> dict[str, list[float]]:
        """Go on with the long stream, stage after stage. Returns milliseconds by stage, one number per chunk."""
        ...

    def latents(self, seed: int, chunks: int, file: str, timesteps: str) -> None:
        """Begin the long stream anew, from shared noise; write its first latents to a safetensors file (given.py).

        timesteps: the dtype to which the network's timesteps are rounded, as fp32 or bf16.
        """
        ...


def serve(build: Callable[[dict[str, Any]], tuple[Engine, dict[str, Any]]]) -> None:
    """Answer requests on stdin until `close`. `build(settings)` returns the engine and the answer to `open`."""
    # Libraries that print must not disturb the protocol, so their stdout goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine | None = None

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    for line in sys.stdin:
        try:
            request = json.loads(line)
            op = request.pop("op", None)
            if op == "close":
                say({"ok": True})
                return
            if op == "open":
                engine, about = build(request)
                say({"ok": True, **about})
            else:
                say(_reply(engine, op, request, say))
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def _reply(
    engine: Engine | None, op: str, request: dict[str, Any], say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The answer that ends a request; progress is said on the way."""
    call = getattr(engine, op, None) if op in ("generate", "warm", "chunks", "stages", "latents") else None
    if call is None:
        return {"error": f"got op {op!r}, expected open, then what this engine can do, or close"}
    found = call(**request)
    if op in ("generate", "chunks"):
        made = 0
        for made in found:
            say({"frames": made})
        return {"ok": True, "frames": made}
    if op == "stages":
        return {"ok": True, "ms": found}
    return {"ok": True, **(found or {})}
