"""Devices and precisions by name."""

import ctypes
from contextlib import suppress
from typing import get_args

import torch

from engine.config import Precision

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
    """The working dtype of a precision: bf16 for fp8; auto is bf16 on a GPU, else fp32."""
    if precision == "auto":
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
