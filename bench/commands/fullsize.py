"""Load a full-size model from disk and stream a little of it: does it fit, and what does loading cost?"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from bench.instruments.random_weights import write_random_pipeline
from bench.report.saved import Printed
from engine.config import TransformerConfig
from engine.loader import load
from engine.model.vae import VAEConfig
from engine.options import command_line, option
from engine.runtime.device import DTYPES
from engine.runtime.stages import TorchStages


@dataclass(frozen=True, kw_only=True)
class Options(Printed):
    dir: Path = option(help="where the weights are; written if it does not exist", metavar="DIR")
    layers: int = option(30, "transformer layers that are written")
    stored: str = option("bf16", "precision on disk", choices=DTYPES)
    precision: str = option("bf16", "precision in memory", choices=DTYPES)
    preset: str = option("self-forcing-framewise", "what streams", metavar="NAME|FILE.toml")
    height: int = option(96, "pixels")
    width: int = option(160, "pixels")
    chunks: int = option(2, "chunks that are streamed")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_load(folder: Path, precision: str, preset: str, size: tuple[int, int], chunks: int) -> dict[str, Any]:
    """Load `folder`, then stream `chunks` chunks at size (height, width). Memory is counted from before the load.

    memory_ratio is the peak memory while loading over the bytes of all weights in their final dtype.
    """
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    pipeline = load(folder, preset=preset, precision=precision, height=size[0], width=size[1])
    seconds, peak = time.perf_counter() - start, _peak_bytes()
    stages = cast(TorchStages, pipeline.stages)
    modules = [m for m in (*stages.models.values(), stages.vae, stages.text_encoder) if m is not None]
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    result = {
        "parameters": sum(p.numel() for module in modules for p in module.parameters()),
        "weight_bytes": weights,
        "memory_ratio": (peak - before) / weights,
        "load_seconds": seconds,
        "preset": preset,
        "precision": precision,
        "height": size[0],
        "width": size[1],
    }
    torch.manual_seed(0)
    start, frames = time.perf_counter(), 0
    with pipeline.stream("a photo of a cat") as stream:
        for _ in range(chunks):
            frames += len(stream.next_chunk())
    return result | {"frames": frames, "stream_seconds": time.perf_counter() - start}


def make(folder: Path, layers: int, stored: str) -> int:
    """Write random weights of Wan2.1-T2V-1.3B's shape with `layers` layers; returns the transformer's bytes on disk."""
    return write_random_pipeline(folder, TransformerConfig(num_layers=layers), VAEConfig(), DTYPES[stored])


def run(options: Options) -> int:
    if not options.dir.exists():
        print(f"writing random weights to {options.dir}", file=sys.stderr)
        make(options.dir, options.layers, options.stored)
        # Loading is measured in a new process, because this one has just held the weights.
        again = [sys.executable, "-m", "bench", "fullsize", *command_line(options)]
        return subprocess.run(again, check=False).returncode
    size = options.height, options.width
    result = measure_load(options.dir, options.precision, options.preset, size, options.chunks)
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:20} {value:.4g}" if isinstance(value, float) else f"{key:20} {value}")
    return 0
