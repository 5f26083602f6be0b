"""Both ends of the adapter protocol: `Adapter` races a subprocess, `serve` turns an engine into one.

One JSON object per line. Requests: {"op": "open", ...settings}, {"op": "generate", "prompt", "seed", "frames"},
{"op": "close"}. Answers to open and close: {"ok": true, ...}. Answers to generate: any number of {"frames": made so
far} while the video is made, then {"ok": true, "frames": all of them}. {"error": "..."} can replace any answer.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Video:
    """One video: frames, seconds until it was complete, and (seconds, frames so far) of every progress line."""

    frames: int
    seconds: float
    progress: list[tuple[float, int]]

    @property
    def first_frame(self) -> float:
        return self.progress[0][0] if self.progress else self.seconds


class Adapter:
    """A subprocess under test. This side measures: from the request to the line that announces the frames."""

    def __init__(self, name: str, command: list[str], settings: dict[str, Any]) -> None:
        self.name = name
        # Libraries read the number of threads when they are imported, before any request arrives.
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])} if "threads" in settings else None
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        except OSError as error:
            raise ValueError(
                f"adapter {name}: got {shlex.join(command)}, expected a command that starts ({error})"
            ) from None
        try:
            self.about = self._ask({"op": "open", **settings})
        except BaseException:
            self.close()
            raise

    def generate(self, prompt: str, seed: int, frames: int) -> Video:
        progress: list[tuple[float, int]] = []
        start = time.perf_counter()
        answer = self._ask({"op": "generate", "prompt": prompt, "seed": seed, "frames": frames}, start, progress)
        seconds = time.perf_counter() - start
        if answer.get("frames") != frames:
            raise ValueError(f"adapter {self.name}: got {answer.get('frames')} frames, expected {frames}")
        return Video(frames, seconds, progress)

    def close(self) -> None:
        """End the process. It has five seconds to end by itself before it is killed."""
        with suppress(OSError, ValueError):
            self._send({"op": "close"})
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> "Adapter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, request: dict[str, Any]) -> None:
        if self._process.stdin is None:
            raise ValueError(f"adapter {self.name}: got no stdin, expected a pipe")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _ask(
        self, request: dict[str, Any], start: float = 0.0, progress: list[tuple[float, int]] | None = None
    ) -> dict[str, Any]:
        """Send a request and return the answer that ends it. Progress lines are kept with their times."""
        with suppress(BrokenPipeError):  # reported below, as a missing answer
            self._send(request)
        while True:
            line = self._process.stdout.readline() if self._process.stdout else ""
            now = time.perf_counter()
            if not line:
                raise ValueError(f"adapter {self.name}: got no answer to {request['op']}, expected a JSON line "
                                 f"(exit status {self._process.poll()})")  # fmt: skip
            try:
                answer = json.loads(line)
            except json.JSONDecodeError:
                raise ValueError(f"adapter {self.name}: got {line.strip()[:80]!r}, expected JSON") from None
            if not isinstance(answer, dict):
                raise ValueError(f"adapter {self.name}: got {line.strip()[:80]!r}, expected a JSON object")
            if "error" in answer:
                raise ValueError(f"adapter {self.name}: {answer['error']}")
            if answer.get("ok"):
                return answer
            if progress is not None and "frames" in answer:
                progress.append((now - start, int(answer["frames"])))


class Engine(Protocol):
    """An engine behind an adapter."""

    def generate(self, prompt: str, seed: int, frames: int) -> Iterator[int]:
        """Make a video. Yields the number of frames that are on the host so far; the last number is `frames`."""
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
            if op == "open":
                engine, about = build(request)
                say({"ok": True, **about})
            elif op == "generate" and engine is not None:
                made = 0
                for made in engine.generate(request["prompt"], request["seed"], request["frames"]):
                    say({"frames": made})
                say({"ok": True, "frames": made})
            elif op == "close":
                say({"ok": True})
                return
            else:
                say({"error": f"got op {op!r}, expected open, then generate or close"})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
