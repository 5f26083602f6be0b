"""What serving adds to the engine's loop: CPU seconds per chunk of the server's process over those of the loop's."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.instruments.spread import interleaved, paired_ratio
from bench.serving.process import END_WITHIN, Server, started
from bench.serving.sockets import CHUNK, opened, start

FORMATS = ("rgb", "m4s")  # raw frames: serving alone; m4s: also H.264, its container and the recording
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def overhead(model: Sequence[str], prompt: str, seed: int, frames: int, rounds: int) -> dict[str, Any]:
    """Stream the same video from a server and from the plain loop in turn, both with the arguments of a model.

    Ratios are medians of pairs measured side by side.
    """
    with started(["--port", "0", "--rate", "1000000", *model], ONE_THREAD) as server, _loop(model) as loop:
        variants = {"plain": partial(_plain, loop, prompt, seed, frames)}
        variants |= {one: partial(_served, server, one, prompt, seed, frames) for one in FORMATS}
        for warm in variants.values():
            warm()
        found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for _, name, measured in interleaved(variants, rounds):
            found[name].append(measured)
    base = [one["cpu"] for one in found["plain"]]
    rows = []
    for name, all_rounds in found.items():
        parts = {part: float(np.median([one[part] for one in all_rounds])) for part in all_rounds[0]}
        ratio = None if name == "plain" else paired_ratio([one["cpu"] for one in all_rounds], base)
        beside = float(np.median([one["cpu"] / one["engine"] - 1 for one in all_rounds]))
        rows.append(
            {
                "what": name,
                "ratio": ratio,
                "beside": beside,
                "cpu_ms": {part: 1e3 * value for part, value in parts.items()},
            }
        )
    return {"frames": frames, "rounds": rounds, "rows": rows}


def _served(server: Server, format: str, prompt: str, seed: int, frames: int) -> dict[str, float]:
    return asyncio.run(_stream(server, format, prompt, seed, frames))


async def _stream(server: Server, format: str, prompt: str, seed: int, frames: int) -> dict[str, float]:
    """CPU seconds per chunk of a server with one viewer, who takes chunks as fast as they are made: all, and by thread.

    cpu     the whole process
    loop    the thread that serves connections
    video   the session's thread
    engine  the part of that inside the engine
    """
    assert server.process is not None
    pid, begun = server.process.pid, server.cpu() or 0.0
    before, inside = _threads(pid), server.engine_cpu()
    threads, chunks = dict(before), 0
    async with opened(server) as socket:
        await socket.send(start(prompt, seed, format, num_frames=frames, speed=0))
        while (message := (await socket.receive())[0])["type"] != "session.done":
            if message["type"] == "error":
                raise ValueError(f"overhead: got {message['message']}, expected a video")
            if message["type"] == CHUNK:
                chunks += 1
                threads |= _threads(pid)  # a session's thread ends with it
    server.empty()
    cpu = (server.cpu() or 0.0) - begun
    loop = _threads(pid).get(pid, 0.0) - before.get(pid, 0.0)
    video = max((spent for thread, spent in threads.items() if thread not in before), default=0.0)
    engine = server.engine_cpu() - inside
    return {"cpu": cpu / chunks, "loop": loop / chunks, "video": video / chunks, "engine": engine / chunks}


def _threads(pid: int) -> dict[int, float]:
    """CPU seconds of each thread so far; empty where the system does not tell."""
    found = {}
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        try:
            after = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found[int(folder.name)] = (int(after[11]) + int(after[12])) / TICK  # utime and stime: proc(5)
    return found


@contextmanager
def _loop(model: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The plain loop's process, ready."""
    command = [sys.executable, "-m", "bench.serving.plain", *model]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD
    )
    try:
        _answer(process)
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(END_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _plain(process: subprocess.Popen[str], prompt: str, seed: int, frames: int) -> dict[str, float]:
    assert process.stdin is not None
    about = psutil.Process(process.pid)
    before = about.cpu_times()
    process.stdin.write(json.dumps({"prompt": prompt, "seed": seed, "frames": frames}) + "\n")
    process.stdin.flush()
    chunks = _answer(process)["chunks"]
    after = about.cpu_times()
    cpu = (after.user + after.system - before.user - before.system) / chunks
    return {"cpu": cpu, "loop": 0.0, "video": cpu, "engine": cpu}


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ValueError(f"the plain loop: got its end, status {process.wait()}, expected an answer")
    return json.loads(line)
