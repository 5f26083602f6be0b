"""The best rates of the device, timed in the same run: a large matrix product or convolution, and a large copy."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.instruments.flops import Cost


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a matrix product or convolution in the model's precision; bytes/s of a copy (read plus written)."""

    flops: float
    bytes: float

    def floor(self, cost: Cost) -> float:
        """The least seconds for this work: those of arithmetic or those of traffic, whichever are more."""
        return max(cost.flops / self.flops, cost.bytes / self.bytes)

    def mfu(self, cost: Cost, seconds: float) -> float:
        """Share of the FLOP ceiling that this work reached."""
        return cost.flops / seconds / self.flops if seconds else 0.0

    def mbu(self, cost: Cost, seconds: float) -> float:
        """Share of the copy ceiling that the least traffic of this work reached."""
        return cost.bytes / seconds / self.bytes if seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def best_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The quickest of `repeats` runs. This suits a ceiling; speeds are medians."""
    wait = torch.cuda.synchronize if device.type == "cuda" else None
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up
        if wait:
            wait()
        start = time.perf_counter()
        call()
        if wait:
            wait()
        best = min(best, time.perf_counter() - start)
    return best


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> Ceilings:
    """Measure both ceilings, in about a second."""
    side, length = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 25)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rate = 2.0 * side**3 / best_seconds(lambda: torch.mm(a, b), device, repeats)
    # On some processors the library for convolutions is quicker than the one for matrix products.
    channels, size = (512, 128) if device.type == "cuda" else (128, 64)
    image = torch.randn(1, channels, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    work = 2.0 * (size - 2) ** 2 * channels * channels * 9
    rate = max(rate, work / best_seconds(lambda: F.conv2d(image, weight), device, repeats))
    source = torch.zeros(length, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device, repeats)
    return Ceilings(rate, 2.0 * source.nbytes / copy)
