"""Load a full-size model from disk and stream a little of it: does it fit, and what does loading cost?"""

import resource
import time
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from bench.instruments.random_weights import write_random_pipeline
from engine.config import TransformerConfig
from engine.loader import load
from engine.model.vae import VAEConfig
from engine.runtime.device import DTYPES
from engine.runtime.stages import TorchStages


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_load(folder: Path, precision: str, preset: str, size: tuple[int, int], chunks: int) -> dict[str, Any]:
    """Load `folder`, stream `chunks` chunks at size (height, width); memory over what the process had before.

    memory_ratio is peak memory while loading over the bytes of all weights in their final dtype.
    """
    import peft  # noqa: F401 - imported lazily by the loader: its own memory is not the weights'
    import transformers.models.umt5.modeling_umt5  # noqa: F401

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
    """Random weights of Wan2.1-T2V-1.3B's shape with `layers` layers; bytes of the transformer on disk."""
    return write_random_pipeline(folder, TransformerConfig(num_layers=layers), VAEConfig(), DTYPES[stored])
