"""The conditions of a measurement: machine, software, model, geometry."""

import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import engine
from engine.model.cache import FP8
from engine.model.quantized import FORMATS
from engine.stream import Pipeline

ROOT = Path(__file__).parents[2]


def _processor() -> str:
    """The processor's name where the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with + where tracked files differ from it; empty outside a checkout.

    A copy without .git is told it by the environment (GREEDY_COMMIT).
    """
    if told := os.environ.get("GREEDY_COMMIT"):
        return told
    try:
        git = ["git", "-C", str(ROOT)]
        found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        # Untracked files, such as results, do not belong to the program.
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no", "--", "engine", "kernels",
                                  "bench"], capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "engine": engine.__version__}
    for name in ("torch", "triton", "diffusers", "transformers", "onnxruntime", "tensorrt", "flashdreams"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _accelerator(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    card = torch.cuda.get_device_properties(device)
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = ""
    return {"gpu": card.name, "gpu_memory_gb": card.total_memory / 2**30, "driver": driver, "cuda": torch.version.cuda}


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, software, commit, and the load by other work."""
    return {
        "device": _accelerator(device).get("gpu") or f"{device.type}: {_processor()}",
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "memory_gb": psutil.virtual_memory().total / 2**30,
        "load_average": psutil.getloadavg()[0],
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        **_accelerator(device),
        "versions": _versions(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def precision_of(pipeline: Pipeline) -> str:
    """The precision of the blocks: float32, bfloat16, fp8 or int8, and whether attention is FP8 as well."""
    kinds = {type(part) for module in pipeline.stages.modules().values() for part in module.modules()}
    quantized = [name for name, kind in FORMATS.items() if kind in kinds]
    products = quantized[0] if quantized else str(pipeline.dtype).removeprefix("torch.")
    return products + (", fp8 attention" if pipeline.kv_dtype == FP8 else "")


def stream_header(pipeline: Pipeline, model: str) -> dict[str, Any]:
    """The stream: weights, preset, steps, geometry."""
    preset, config = pipeline.preset, pipeline.config
    return {
        "model": model,
        "layers": config.num_layers,
        "dim": config.dim,
        "preset": pipeline.preset_name,
        "family": preset.family,
        "chunk": preset.chunk,
        "window": preset.window,
        "steps": [list(steps[: preset.stop_after or None]) for steps in preset.steps],
        **({} if preset.reuse is None else {"reuse": asdict(preset.reuse)}),
        "backend": pipeline.stages.name,
        "precision": precision_of(pipeline),
        "height": pipeline.height,
        "width": pipeline.width,
        "target_fps": pipeline.fps,
    }


def print_header(*parts: dict[str, Any]) -> None:
    """Print the header as lines of a report."""
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            print(f"{key:16} {value:.4g}" if isinstance(value, float) else f"{key:16} {value}")
