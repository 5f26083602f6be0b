"""Copies between host and device without waiting, through pinned memory if the device is a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def upload(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a CPU tensor to `device`, as `dtype` if set. For a GPU it queues the copy and returns at once."""
    x = x if dtype is None else x.to(dtype)
    # From pageable memory the host would wait for the copy, and so for all work queued before it.
    return x.to(device) if device.type != "cuda" else x.pin_memory().to(device, non_blocking=True)


class Download:
    """Frames on their way to the host; `wait` returns them, as often as it is called."""

    def __init__(self, pixels: Tensor, largest: Tensor) -> None:
        """Start the copy of pixels, uint8 [T, H, W, 3], after the work queued on the device's current stream.

        largest  numbers [n] that are finite if the frames were. They travel with the pixels, so nothing else waits.
        """
        self._done: torch.cuda.Event | None = None
        self._host, self._largest = pixels, largest
        if pixels.device.type == "cuda":
            self._host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            self._largest = torch.empty(largest.shape, dtype=largest.dtype, pin_memory=True)
            self._host.copy_(pixels, non_blocking=True)
            self._largest.copy_(largest, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def __len__(self) -> int:
        return len(self._host)

    def wait(self) -> np.ndarray:
        """Wait for the copy; returns uint8 [T, H, W, 3]."""
        if self._done is None:
            return self._host.numpy()
        self._done.synchronize()
        return self._host.numpy().copy()  # a copy, so that scarce pinned memory returns to its pool

    @property
    def finite(self) -> bool:
        """Whether the frames come from finite numbers. It waits as `wait` does."""
        if self._done is not None:
            self._done.synchronize()
        return all(map(math.isfinite, self._largest.tolist()))


class SideStream:
    """A second queue of the GPU. Its work starts after the main queue's current work; the main queue does not wait.

    On a CPU there is no queue: work runs immediately.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[Tensor], T], x: Tensor) -> T:
        """Run work(x). The main queue made x and may free it before `work` is done."""
        if self._stream is None:
            return work(x)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            return work(x)
