"""Viewers of a live server, and what they see. Times are those of time.monotonic."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from websockets.exceptions import ConnectionClosed, WebSocketException

from bench.serving.playback import Arrival
from bench.serving.process import Server
from bench.serving.sockets import CHUNK, opened, start, turn

GONE_WITHIN = 15.0  # seconds that a viewer gives the server to end its session


@dataclass(frozen=True)
class Plan:
    """What one viewer does: starts a video, and switches its prompt every `switch` seconds; 0: never."""

    number: int
    prompts: Sequence[str]  # the first one, then those that it switches to, in a circle
    seed: int
    fps: float
    format: str = "m4s"
    switch: float = 0.0
    delay: float = 0.0  # seconds before it starts


@dataclass
class Seen:
    """What one viewer saw."""

    plan: Plan
    transport: str
    asked: float = 0.0  # when it asked for a video
    waited: bool = False  # for a place
    refused: str = ""  # the error code instead of a video
    failed: str = ""  # whatever else went wrong
    arrivals: list[Arrival] = field(default_factory=list)
    spent_ms: list[float] = field(default_factory=list)  # by the server, for each chunk
    bytes: int = 0
    sent: dict[str, float] = field(default_factory=dict)  # prompt switches by their id, and when they were sent
    shows: dict[str, int] = field(default_factory=dict)  # the first chunk of each
    digests: dict[int, str] = field(default_factory=dict)  # frames so far: their sha256; of raw frames

    @property
    def frames(self) -> int:
        return sum(one.frames for one in self.arrivals)

    @property
    def seconds(self) -> float:
        """From asking to the last chunk."""
        return self.arrivals[-1].at - self.asked if self.arrivals else 0.0

    def chunk(self, message: dict[str, Any]) -> None:
        """Note a chunk that arrived now."""
        for event in message["started_event_ids"]:
            self.shows.setdefault(event, len(self.arrivals))
        self.arrivals.append(Arrival(time.monotonic(), message["num_frames"]))
        self.spent_ms.append(message["chunk_ms"])

    def told(self, message: dict[str, Any]) -> bool:
        """Note a message without a chunk; False where it is the last one."""
        kind = message["type"]
        if kind == "session.waiting":
            self.waited = True
        elif kind == "error" and not self.arrivals:
            self.refused = message["code"]
        elif kind == "error" or (kind == "session.done" and message["reason"] not in ("stopped", "finished")):
            self.failed = self.failed or message.get("message") or f"the session ended: {message['reason']}"
        return kind not in ("session.done", "error")


Watch = Callable[[Server, Plan, float], Awaitable[Seen]]  # the last one: when the viewer leaves


async def by_socket(server: Server, plan: Plan, until: float) -> Seen:
    """Watch over a socket, until a time."""
    seen, hashed = Seen(plan, "socket"), hashlib.sha256()
    await asyncio.sleep(plan.delay)
    try:
        async with opened(server) as socket:
            seen.asked = time.monotonic()
            await socket.send(start(plan.prompts[0], plan.seed, plan.format))
            switching: asyncio.Task[None] | None = None
            try:
                async with asyncio.timeout_at(until):
                    while True:
                        message, payload = await socket.receive()
                        if message["type"] == CHUNK:
                            seen.chunk(message)
                            seen.bytes += len(payload)
                            if plan.format == "rgb":
                                hashed.update(payload)
                                seen.digests[seen.frames] = hashed.hexdigest()
                            if switching is None and plan.switch:
                                switching = asyncio.create_task(switches(plan, seen, socket.send))
                        elif not seen.told(message):
                            return seen
            except TimeoutError:
                if await socket.stop(GONE_WITHIN) is None:
                    seen.failed = f"the server did not end the session within {GONE_WITHIN:g} s"
            finally:
                if switching is not None:
                    switching.cancel()
    except (OSError, WebSocketException, RuntimeError) as error:
        seen.failed = seen.failed or f"{type(error).__name__}: {error}"
    return seen


async def switches(plan: Plan, seen: Seen, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Switch the prompt again and again. The first one comes after a part of the time that differs by viewer."""
    await asyncio.sleep(plan.switch * (0.5 + (plan.number * 0.618) % 0.5))
    with suppress(ConnectionClosed):
        for number in count(1):
            event = f"viewer-{plan.number}-switch-{number}"
            seen.sent[event] = time.monotonic()
            await send(turn(event, plan.prompts[number % len(plan.prompts)]))
            await asyncio.sleep(plan.switch)
