"""Between host and device without waiting for each other: pinned memory where the device is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A CPU tensor on `device`; onto a GPU the copy is queued and the host goes on."""
    x = x if dtype is None else x.to(dtype)
    # From ordinary memory the host would wait for the copy, and with it for everything queued before.
    return x.to(device) if device.type != "cuda" else x.pin_memory().to(device, non_blocking=True)


class Download:
    """Frames on their way to the host; `wait` gives them."""

    def __init__(self, pixels: Tensor) -> None:
        """pixels uint8 [T, H, W, 3], on the device whose current stream makes them."""
        self._done: torch.cuda.Event | None = None
        if pixels.device.type == "cuda":
            self._host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            self._host.copy_(pixels, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._host = pixels

    def __len__(self) -> int:
        return len(self._host)

    def wait(self) -> np.ndarray:
        """uint8 [T, H, W, 3]"""
        if self._done is None:
            return self._host.numpy()
        self._done.synchronize()
        return self._host.numpy().copy()  # pinned memory is scarce and goes back to its pool


class SideStream:
    """A second queue of the GPU: what runs there starts once the main queue has got here, and no one waits for it.

    On a processor there is no queue and everything runs at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[Tensor], Download], x: Tensor) -> Download:
        """work(x), where x was made on the main queue and may be freed there before `work` is done."""
        if self._stream is None:
            return work(x)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            return work(x)
