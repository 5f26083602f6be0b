"""From options to a server: loads the model, measures how many sessions it holds, and makes the application's parts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from engine.bundles.native import NativePipeline
from engine.commands.job import Bundle, Model
from engine.commands.opening import open_pipeline, shape_of
from engine.config import Preset, Runtime
from engine.options import Parser, add_options, chosen, option, options_of
from engine.stream import Pipeline
from engine.threads import cores
from serve.core.encoders import scale_for
from serve.core.house import House, Room, Watching, capacity, seconds_per_chunk
from serve.core.job_store import Store
from serve.core.jobs import Jobs
from serve.core.session import Limits
from serve.options import Network, Sessions
from serve.web.metrics import Metrics
from serve.web.server import EXAMPLES, Server


@dataclass(frozen=True)
class Rate:
    """How fast the model's video plays."""

    fps: float | None = option(None, "frame rate; default: the model's own", metavar="F")

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"--fps: got {self.fps}, expected up to 1000")


def add_server_options(parser: Parser) -> None:
    """Add the options of a server, and those of its model."""
    add_options(parser, Network, "network")
    add_options(parser, Sessions, "sessions")
    add_options(parser, Rate)
    add_options(parser, Model, "model")
    add_options(parser, Preset, "preset: fields to replace", skip=("family",), defaults=False)
    add_options(parser, Bundle, "bundle")
    add_options(parser, Runtime, "machine")


def build(args: argparse.Namespace) -> Server:
    """The server of a command line. Errors as `engine.load`."""
    network, sessions, rate = options_of(args, Network), options_of(args, Sessions), options_of(args, Rate)
    model, bundle, runtime = options_of(args, Model), options_of(args, Bundle), options_of(args, Runtime)
    overrides: dict[str, Any] = chosen(args, Preset)
    fixed = [*chosen(args, Model), *chosen(args, Runtime), *overrides]
    shape = shape_of(model, bundle, tuple(name for name in fixed if name != "threads"), rate.fps)
    store = Store(sessions.jobs_dir)  # before the model is loaded, as another server may use it
    try:
        pipeline = open_pipeline(model, bundle, runtime, overrides, shape)
    except BaseException:
        store.close()
        raise
    embedded = model.model is None and model.checkpoint is None and bundle.bundle is None
    folder = bundle.bundle or model.model or model.checkpoint
    name = sessions.name or (folder.resolve().stem if folder is not None else "sprites")
    return make_server(pipeline, name, network, sessions, EXAMPLES if embedded else (), store)


def make_server(
    pipeline: Pipeline | NativePipeline, name: str, network: Network, sessions: Sessions,
    examples: tuple[str, ...] = (), store: Store | None = None,
) -> Server:  # fmt: skip
    """A server of a loaded pipeline. It streams a little first, to be warm and to measure. `store`: of its jobs."""
    if pipeline.device.type == "cuda":
        pipeline.warm()
    native = isinstance(pipeline, NativePipeline) and pipeline.device.type == "cpu"
    parallel = sessions.parallel or (cores() if native else 1)
    scale = sessions.scale or scale_for(pipeline.height, pipeline.width)
    seconds, frames = seconds_per_chunk(pipeline, EXAMPLES[0], scale)
    room = Room(sessions.sessions or capacity(seconds, frames, pipeline.fps, parallel), sessions.waiting)
    limits = Limits(sessions.idle, sessions.lifetime, sessions.lease, recording=sessions.recording_mb << 20)
    metrics = Metrics()
    house = House(pipeline, room, limits, scale, parallel, Watching(metrics.chunk, metrics.end))
    store = store or Store(sessions.jobs_dir)
    keep = 3600 * sessions.keep_hours
    jobs = Jobs(house, store, name, sessions.jobs, sessions.job_queue, keep, metrics.job)
    return Server(house, jobs, name, network, sessions, metrics, frames, seconds, examples)
