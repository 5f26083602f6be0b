"""Devices and precisions by name."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import get_args

import psutil
import torch

from engine.config import Precision

_M_MMAP_THRESHOLD = -3  # of malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(name for name in get_args(Precision) if name != "auto")


def device_of(name: str) -> torch.device:
    """The device called cpu, cuda, cuda:1, ...; auto is cuda if there is a GPU, else cpu. ValueError if unusable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: got {name!r}, expected cpu or a usable accelerator ({str(error).splitlines()[0]})"
        ) from None
    return device


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The working dtype of a precision: bf16 for fp8; auto and int8 have bf16 on a GPU, else fp32."""
    if precision in ("auto", "int8"):
        precision = "fp32" if device.type == "cpu" else "bf16"
    return DTYPES["bf16" if precision == "fp8" else precision]


def check_fp8(device: torch.device) -> None:
    """ValueError for a GPU without e4m3. On a processor FP8 runs as its definition."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            raise ValueError(f"precision: got fp8 on a GPU of compute capability {major}.{minor}, expected 8.9 or more")


def give_back(device: torch.device) -> None:
    """Return free memory to the system: the cache of torch's allocator on a GPU, the heap's pages on a processor."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # of the GNU C library alone
        ctypes.CDLL(None).malloc_trim(0)


def keep_no_heap() -> None:
    """Let the GNU C library return every block of a megabyte or more when it is freed, on a processor.

    By default it learns from such blocks to keep them, up to 32 MB each. The blocks of a decoding then break up its
    heap, which grows for many chunks, to twice of what is in use. The user's own setting in the environment counts.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and "GLIBC_TUNABLES" not in os.environ:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def free_memory(device: torch.device) -> int:
    """Bytes that the process can still have. A processor's are also those that its control groups leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *_granted(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _granted(root: Path, own: Path) -> list[int]:
    """Bytes that every control group of this process with a limit still grants; pages of files can be dropped."""
    found = []
    with suppress(OSError):
        for _, controllers, path in (line.split(":", 2) for line in own.read_text().splitlines()):
            if controllers and "memory" not in controllers.split(","):
                continue
            mount = root / "memory" if controllers else root  # version 1 has a tree for each controller
            place = mount / path.lstrip("/")
            for folder in (place, *place.parents):
                if folder.is_relative_to(mount):
                    found += _left(folder)
    return found


def _left(folder: Path) -> list[int]:
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            files = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return [max(0, int((folder / limit).read_text()) - int((folder / usage).read_text()) + files)]
    return []
