"""Misbehaviour beside a witness: others' frames stay the same bit for bit, and the server gives back all it took.

The witness streams raw frames with a fixed seed while others misbehave. Afterwards the server streams the same video
undisturbed, and the two are compared.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed

from bench.chaos.attacks import ATTACKS, Attack, Way
from bench.instruments.check import Check
from bench.serving import exact
from bench.serving.process import Counts, Peak, Server, started
from bench.serving.sockets import CHUNK, Socket, opened, start, turn

OWN = ("--rate", "1000000", "--sessions", "6", "--waiting", "8", "--lease", "1")  # of the server under attack
BACK_WITHIN = 20.0  # seconds until a server has given back what it took
MORE = Counts(sessions=0, threads=2, files=2, memory_mb=64.0)  # than before, that is nobody's loss
PEAK_MB = 160.0  # over the memory before: a few uploads of the largest size that is taken
SEED = 11
END_WITHIN = 5.0  # seconds until clients know that a server was killed


@dataclass(frozen=True)
class Outcome:
    """What one misbehaviour did. `digests`: frames and their sha256, of the witness."""

    name: str
    faults: list[str]
    seconds: float
    before: Counts
    after: Counts
    peak_mb: float
    digests: dict[int, str]
    recorded: int


@dataclass(frozen=True)
class Size:
    """How hard it gets. attempts: connections of a storm; the other counts follow from it."""

    attempts: int = 1000
    seconds: float = 10.0  # of a slow client
    megabytes: int = 200  # of an upload


def all_of_it(model: Sequence[str], prompt: str, size: Size) -> tuple[list[dict[str, Any]], list[Check]]:
    """Every misbehaviour against a server of our own, which is killed in the end; rows of a table, and checks."""
    with started(["--port", "0", *OWN, *model]) as server:
        rows, checks = misbehaviour(server, prompt, size)
        after = killed(server, model, prompt)
    return rows, [*checks, after]


def misbehaviour(
    server: Server, prompt: str, size: Size, names: Iterable[str] = tuple(ATTACKS)
) -> tuple[list[dict[str, Any]], list[Check]]:
    """Attack a server, started with OWN, in each of these ways."""
    others = [one for one in server.model()["examples"] if one != prompt] or [prompt]
    way = Way(size.attempts, size.seconds, size.megabytes, [prompt, *others], random.Random(SEED))
    asyncio.run(_warm(server, prompt))
    server.empty()
    found = [_attack(server, name, ATTACKS[name], way) for name in names]
    owed = asyncio.run(_undisturbed(server, prompt, max(frames for one in found for frames in one.digests)))
    traces = server.errors().count("Traceback")
    log = Check("the server's log", not traces, f"{traces} tracebacks")
    return [_row(one) for one in found], [*(judged(one, owed) for one in found), log]


def _row(one: Outcome) -> dict[str, Any]:
    return {
        "misbehaviour": one.name, "seconds": one.seconds, "witness frames": max(one.digests, default=0),
        "threads": f"{one.before.threads} -> {one.after.threads}", "files": f"{one.before.files} -> {one.after.files}",
        "MB": f"{one.before.memory_mb:.0f} -> {one.after.memory_mb:.0f}", "peak MB": one.peak_mb,
        "sessions": one.after.sessions, "faults": len(one.faults),
    }  # fmt: skip


def judged(one: Outcome, owed: dict[int, str]) -> Check:
    faults = list(one.faults)
    if len(one.digests) < 2:
        faults.append(f"the witness got {max(one.digests, default=0)} frames, expected two chunks or more")
    if wrong := [frames for frames, digest in one.digests.items() if owed.get(frames) != digest]:
        faults.append(f"the witness's first {min(wrong)} frames differ from an undisturbed video's")
    for name in ("sessions", "threads", "files", "memory_mb"):
        after, most = getattr(one.after, name), getattr(_most(one.before, one.recorded), name)
        if after > most:
            faults.append(f"{name}: got {after:g} afterwards, expected at most {most:g}")
    if one.peak_mb > one.before.memory_mb + PEAK_MB:
        faults.append(f"memory: got {one.peak_mb:.0f} MB meanwhile, expected {one.before.memory_mb + PEAK_MB:.0f}")
    equal = f"{max(one.digests, default=0)} frames of the witness are right, all was given back"
    return Check(one.name, not faults, "; ".join(faults[:5]) or equal)


def _attack(server: Server, name: str, attack: Attack, way: Way) -> Outcome:
    way.recorded = 0
    before, begun = server.counts(), time.monotonic()
    with Peak(server) as peak:
        faults, digests = asyncio.run(_beside(server, attack, way))
    took, until = time.monotonic() - begun, time.monotonic() + BACK_WITHIN
    most = _most(before, way.recorded)
    while not _within(after := server.counts(), most) and time.monotonic() < until:
        time.sleep(0.1)
    return Outcome(name, faults, took, before, after, peak.most or 0.0, digests, way.recorded)


def _within(counts: Counts, most: Counts) -> bool:
    return all(got <= limit for got, limit in zip(astuple(counts), astuple(most), strict=True))


def _most(before: Counts, recorded: int) -> Counts:
    """What a server may hold after an attack; each video that it keeps for a download is a file."""
    sums = (a + b for a, b in zip(astuple(before), astuple(MORE), strict=True))
    most = Counts(*sums)
    return replace(most, files=most.files + recorded)


async def _beside(server: Server, attack: Attack, way: Way) -> tuple[list[str], dict[int, str]]:
    """An attack beside a witness, who sees at least one chunk before it and one after it."""
    witness = _Witness()
    async with opened(server) as client:
        await client.send(start(way.prompts[0], SEED))
        await witness.chunks(client, 1)
        watching = asyncio.create_task(witness.watch(client))
        faults = await attack(server, way)
        seen = witness.frames
        while witness.frames == seen and not watching.done():
            await asyncio.sleep(0.05)
        if watching.done():
            return [*faults, f"the witness's session ended: {watching.exception()}"], witness.digests
        watching.cancel()
        await asyncio.wait({watching})
        await client.connection.close()
    return faults, witness.digests


class _Witness:
    """Hashes the frames of a session."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.frames = 0
        self.digests: dict[int, str] = {}

    async def chunks(self, client: Socket, count: int) -> None:
        """Take so many chunks; RuntimeError where the session ends before."""
        while count:
            message, payload = await client.until(CHUNK, "error", "session.done")
            if message["type"] != CHUNK:
                raise RuntimeError(f"witness: got {message}, expected a chunk")
            self._hash.update(payload)
            self.frames += message["num_frames"]
            self.digests[self.frames] = self._hash.hexdigest()
            count -= 1

    async def watch(self, client: Socket) -> None:
        while True:
            await self.chunks(client, 1)


async def _undisturbed(server: Server, prompt: str, frames: int) -> dict[int, str]:
    """The digests of a video that has the server to itself."""
    witness = _Witness()
    async with opened(server) as client:
        await client.send(start(prompt, SEED, speed=0))
        while witness.frames < frames:
            await witness.chunks(client, 1)
        await client.stop()
    return witness.digests


async def _warm(server: Server, prompt: str) -> None:
    """Sessions in every format at once, so that threads and buffers that stay are there before anything is counted."""

    async def one(number: int) -> None:
        async with opened(server) as client:
            await client.send(start(prompt, number, ("m4s", "jpeg", "rgb")[number % 3], speed=0))
            for _ in range(3):
                await client.until(CHUNK, "error", within=60.0)
            await client.stop()

    await asyncio.gather(*(one(number) for number in range(8)))


def killed(server: Server, model: Sequence[str], prompt: str, chunks: int = 4) -> Check:
    """Kill a server with signal 9 in mid-stream. Its client knows at once, and a new server goes on with the video.

    The client sends its seed, the prompts with their chunks, and the number of the next chunk. All frames together must
    be those of the engine's command, which switches the prompt at the same frame.
    """
    name, hashed = "killed server", hashlib.sha256()
    other = next((one for one in server.model()["examples"] if one != prompt), prompt)
    past = asyncio.run(_until_killed(server, prompt, other, chunks, hashed))
    if isinstance(past, str):
        return Check(name, False, past)
    with started(["--port", str(urlsplit(server.url).port), *OWN, *model]) as again:
        frames = past["frames"] + asyncio.run(_resumed(again, prompt, past, chunks, hashed))
    expected = exact.checksum(model, prompt, SEED, frames, [(past["switched"], other)])
    got = hashed.hexdigest()
    detail = f"{past['frames']} frames before, {frames} in all, sha256 {got[:16]}, engine.run {expected[:16]}"
    return Check(name, got == expected, detail)


async def _until_killed(server: Server, prompt: str, other: str, chunks: int, hashed: Any) -> dict[str, Any] | str:
    """Stream, switch the prompt, kill the server; what a client knows then, or what went wrong."""
    frames, following, history = 0, 0, list[dict[str, Any]]()
    switched = 0
    async with opened(server) as client:
        await client.send(start(prompt, SEED))
        while not history or following < history[0]["chunk"] + chunks:
            message, payload = await client.until(CHUNK, "error", "session.done", within=60.0)
            if message["type"] != CHUNK:
                return f"got {message}, expected a chunk"
            hashed.update(payload)
            frames, following = frames + message["num_frames"], message["generation_chunk_index"] + 1
            if "switch" in message["started_event_ids"]:
                history.append({"chunk": message["generation_chunk_index"], "prompt": other})
                switched = message["first_frame"]
            if following == chunks:
                await client.send(turn("switch", other))
        assert server.process is not None
        server.process.kill()
        try:
            while True:  # chunks that were under way are not shown
                await client.until(CHUNK, within=END_WITHIN)
        except ConnectionClosed:
            return {"frames": frames, "chunk": following, "history": history, "switched": switched}
        except TimeoutError:
            return f"{END_WITHIN:g} s after the kill the client's connection was still open"


async def _resumed(server: Server, prompt: str, past: dict[str, Any], chunks: int, hashed: Any) -> int:
    """Go on with a video on another server; the number of new frames."""
    frames = 0
    async with opened(server) as client:
        resume = {"chunk": past["chunk"], "history": past["history"]}
        await client.send(start(prompt, SEED, speed=0, resume=resume))
        for number in range(chunks):
            message, payload = await client.until(CHUNK, "error", "session.done", within=60.0)
            if message["type"] != CHUNK or message["generation_chunk_index"] != past["chunk"] + number:
                raise ValueError(f"resume: got {message}, expected chunk {past['chunk'] + number}")
            hashed.update(payload)
            frames += message["num_frames"]
        await client.stop()
    return frames
