"""The server under viewers over loopback: how soon and how evenly chunks come, what it costs, whether frames are right.

It starts `python -m serve`, or takes a running one (--url). docs/benchmarks.md explains each number.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from bench.chaos import misbehaviour
from bench.instruments import check
from bench.instruments.check import Check
from bench.instruments.header import machine, print_header
from bench.instruments.models import PROMPT
from bench.instruments.spread import table
from bench.report import saved
from bench.serving import exact, load, process, tables
from bench.serving.overhead import overhead
from bench.serving.viewers import Seen
from engine.commands.job import Bundle, Model
from engine.config import Runtime
from engine.options import command_line, option

WAITING = 1  # places in the line of a server of ours: of two viewers too many, one waits and one is refused


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, Model, Bundle, Runtime):
    url: str | None = option(None, "measure a server that runs; default: start one", metavar="URL")
    token: str | None = option(None, "its token; default: $GREEDY_SERVE_TOKEN", metavar="TEXT")
    sessions: int | None = option(None, "live sessions of a server of ours; default: it measures", metavar="N")
    viewers: str | None = option(None, "numbers of viewers; default: 1, 2, 4, ... and two too many", metavar="N,N,...")
    seconds: float = option(20.0, "of each number of viewers")
    transport: Literal["socket", "webrtc", "jobs", "mixed"] = option("socket", "how viewers get their video")
    switch: float = option(3.0, "seconds between a viewer's prompts; 0: one prompt", metavar="S")
    buffer: float = option(100.0, "milliseconds from the first chunk until a simulated player starts", metavar="MS")
    prompt: str = option(PROMPT, "the first one of every viewer", metavar="TEXT")
    seed: int = option(0, "of the first viewer")
    rounds: int = option(7, "of the comparison with the engine's loop; 0: none")
    frames: int = option(201, "of each video in that comparison")
    chaos: bool = option(False, "also misbehave, and check that others do not notice")
    attempts: int = option(1000, "connections of a storm, in --chaos")

    def prepare(self) -> None:
        """ValueError for numbers that nothing can be measured with."""
        if not 0 < self.seconds <= 3600 or self.switch < 0 or self.buffer < 0 or self.rounds < 0 or self.frames < 5:
            raise ValueError(
                f"got {self.seconds} seconds, {self.switch} s a switch, {self.buffer} ms, {self.rounds} rounds of "
                f"{self.frames} frames, expected up to 3600 seconds, at least 5 frames and nothing negative"
            )
        if not 1 <= self.attempts <= 100_000:
            raise ValueError(f"--attempts: got {self.attempts}, expected 1 to 100000")
        if self.url and self.chaos:
            raise ValueError("--chaos: got --url as well, expected none: the server is killed in the end")

    @property
    def model_arguments(self) -> list[str]:
        """What the server, the engine's command and its plain loop have in common."""
        kinds = (Model, Bundle, Runtime)
        return [word for kind in kinds for word in command_line(_part(kind, self))]


def _part(kind: type[Any], options: Options) -> Any:
    return kind(**{f.name: getattr(options, f.name) for f in fields(kind)})


@contextmanager
def _server(options: Options) -> Iterator[process.Server]:
    if options.url:
        yield process.running(options.url, options.token or os.environ.get("GREEDY_SERVE_TOKEN", ""))
        return
    own = ["--port", "0", "--rate", "1000000", "--waiting", str(WAITING), *options.model_arguments]
    if options.sessions:
        own += ["--sessions", str(options.sessions)]
    with process.started(own) as server:
        yield server


def run(options: Options) -> int:
    options.prepare()
    report, checks = measure(options)
    if not options.json:
        print_header(report["machine"], report["server"])
    if not check.settled(checks, options.json):
        return 1
    if not options.json:
        print_report(report)
    saved.emit(options, "serve", report, "" if options.transport == "socket" else options.transport)
    return 0


def measure(options: Options) -> tuple[dict[str, Any], list[Check]]:
    """The report, and its checks."""
    points, checks, compared = [], list[Check](), dict[str, Seen]()
    how = load.Load(options.seconds, options.switch, options.buffer / 1e3, options.prompt, options.seed,
                    options.transport)  # fmt: skip
    with _server(options) as server:
        about = server.model()
        for viewers in load.numbers(options.viewers, about["capacity"]):
            found, judged, raw = load.point(server, how, viewers)
            points.append(found)
            checks += judged
            if raw is not None:
                compared[f"frames under {viewers} viewers are the engine's"] = raw
            print(f"{viewers} viewers: {json.dumps(tables.point_row(found))}", file=sys.stderr)
        if not compared:
            compared["frames of one viewer are the engine's"] = load.alone(server, how)
    checks += exact.compared(options.model_arguments, compared)
    device = torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")
    where = machine(device)
    keys = ("id", "preset", "width", "height", "scale", "fps", "chunk_frames", "capacity")
    report: dict[str, Any] = {
        "machine": where, "server": {key: about[key] for key in keys} | {"buffer_ms": options.buffer},
        "points": points, "device": where["device"], "commit": where["commit"],
        "timings": {
            f"{p['viewers']} viewers, {name}": found for p in points for name, found in p["quartiles"].items()
        },
    }  # fmt: skip
    if options.rounds and not options.url:
        report["overhead"] = overhead(
            options.model_arguments, options.prompt, options.seed, options.frames, options.rounds
        )
    if options.chaos:
        report["chaos"], judged = misbehaviour.all_of_it(
            options.model_arguments, options.prompt, misbehaviour.Size(options.attempts)
        )
        checks += judged
    report["checks"] = [vars(c) for c in checks]
    return report, checks


def print_report(report: dict[str, Any]) -> None:
    """Print the report for people."""
    print("\n" + table([tables.point_row(point) for point in report["points"]]))
    if "overhead" in report:
        print("\nCPU milliseconds per chunk, one thread, one viewer who takes chunks as fast as they are made\n")
        print(table(tables.overhead_rows(report["overhead"])))
    if "chaos" in report:
        print("\n" + table(report["chaos"]))
