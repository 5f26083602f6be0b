"""Peak memory, and its composition."""

import ctypes
import gc
import resource
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bench.instruments.models import weight_bytes
from engine.model.cache import RingCache
from engine.stream import Pipeline

MB = 2**20


def resident_mb() -> float:
    return psutil.Process().memory_info().rss / MB


def settle() -> float:
    """Give free memory back to the system, where that is possible; returns the resident MB."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return resident_mb()


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, which loading caused, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    """Largest memory since `reset_peak`: allocated memory on a GPU, resident memory on a processor."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a state: caches, keys and values of the prompt, kept latents."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, RingCache):
        return value.nbytes
    if is_dataclass(value) and not isinstance(value, type):
        return sum(tensor_bytes(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, Mapping):
        return sum(tensor_bytes(v) for v in value.values())
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return sum(tensor_bytes(v) for v in value)
    return 0


def weights_mb(pipeline: Pipeline) -> dict[str, float]:
    """MB of weights: `vae`, and `weights` for all others."""
    modules = pipeline.stages.modules()
    vae = modules.pop("vae", None)
    # A bundle's graphs share one file of weights, which holds the VAE's too.
    weights = weight_bytes(*modules.values()) + pipeline.stages.mapped_bytes()
    return {"weights": weights / MB, "vae": weight_bytes(vae) / MB}


def breakdown(
    pipeline: Pipeline, state_bytes: int, vae_cache_bytes: int, loaded_mb: float, peak: float
) -> dict[str, float]:
    """MB by purpose. `process` is the memory after loading without the weights: interpreter and libraries.

    `activations` is the rest of the peak, the allocator's slack included.
    """
    parts = weights_mb(pipeline)
    process = max(0.0, loaded_mb - sum(parts.values())) if pipeline.device.type != "cuda" else 0.0
    parts = {"weights": parts["weights"], "caches": state_bytes / MB, "vae": parts["vae"] + vae_cache_bytes / MB}
    return parts | {"activations": max(0.0, peak - process - sum(parts.values())), "process": process}
