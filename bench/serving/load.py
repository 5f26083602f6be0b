"""Viewers of a server, all at once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from bench.instruments.check import Check
from bench.serving.figures import figures
from bench.serving.jobs import by_job
from bench.serving.process import Peak, Server
from bench.serving.viewers import Plan, Seen, Watch, by_socket
from bench.serving.webrtc import by_webrtc

TRANSPORTS: dict[str, Watch] = {"socket": by_socket, "webrtc": by_webrtc, "jobs": by_job}
SPREAD = 1.0  # seconds over which viewers come


@dataclass(frozen=True)
class Load:
    """How viewers behave. seconds: that they stay; switch: between two prompts; buffer: before a player starts."""

    seconds: float
    switch: float
    buffer: float
    prompt: str
    seed: int
    transport: str  # one of TRANSPORTS, or mixed


def point(server: Server, load: Load, viewers: int) -> tuple[dict[str, Any], list[Check], Seen | None]:
    """The figures of so many viewers, checks, and one who took raw frames.

    With two viewers or more, the first one takes raw frames of one prompt over a socket: the server owes it the
    engine's. A single viewer is not that one, so that its figures are those of an ordinary one.
    """
    about = server.model()
    others = [one for one in about["examples"] if one != load.prompt] or ["another prompt"]
    plans = [
        Plan(n, [load.prompt, *others], load.seed + n, about["fps"], "m4s", load.switch, SPREAD * n / viewers)
        for n in range(viewers)
    ]  # fmt: skip
    compares = viewers > 1
    if compares:
        plans[0] = Plan(0, [load.prompt], load.seed, about["fps"], "rgb")
    began, cpu = time.monotonic(), server.cpu()
    with Peak(server) as peak:
        seen = asyncio.run(_together(server, load, plans))
    ended = max([began + load.seconds, *(one.arrivals[-1].at for one in seen if one.arrivals)])
    emptied = server.empty()
    after = server.cpu()
    main = "socket" if load.transport == "mixed" else load.transport
    found = figures(seen, load.buffer, began, ended, main) | {"transport": load.transport, "seconds": load.seconds}
    spent = None if cpu is None or after is None else after - cpu
    found["cpu_seconds"] = spent
    found["cpu_per_session_second"] = spent / found["session_seconds"] if spent and found["session_seconds"] else None
    found["memory_mb"] = peak.most and {"before": peak.before, "most": peak.most, "after": server.memory_mb()}
    checks = [
        Check(f"{viewers} viewers end well", not found["failed"] and emptied, "; ".join(found["failed"]) or "all left"),
        Check(f"{viewers} viewers see their prompts", not found["switches_lost"],
              f"{found['switches_lost']} of {found['switches']} switches did not show"),
    ]  # fmt: skip
    return found, checks, seen[0] if compares else None


def alone(server: Server, load: Load) -> Seen:
    """A viewer of raw frames who has the server to itself."""
    plan = Plan(0, [load.prompt], load.seed, server.model()["fps"], "rgb")
    return asyncio.run(by_socket(server, plan, time.monotonic() + load.seconds))


async def _together(server: Server, load: Load, plans: list[Plan]) -> list[Seen]:
    until = time.monotonic() + load.seconds
    names = list(TRANSPORTS) if load.transport == "mixed" else [load.transport]
    ways = [by_socket if plan.format == "rgb" else TRANSPORTS[names[plan.number % len(names)]] for plan in plans]
    return list(await asyncio.gather(*(watch(server, plan, until) for watch, plan in zip(ways, plans, strict=True))))


def numbers(text: str | None, capacity: int) -> list[int]:
    """The numbers of viewers: those of a text, or 1, 2, 4, ... up to the capacity, and two more than that."""
    if text is None:
        return sorted({2**n for n in range(capacity.bit_length())} | {capacity, capacity + 2})
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > 1000:
        raise ValueError(f"--viewers: got {text!r}, expected numbers such as 1,2,4")
    return found
