"""The VAE's causal convolutions at their own shapes: 3-D, or 2-D over stacked taps; with and without the bias."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.commands.kernels import said
from bench.gpu.lines import Lines
from bench.instruments import models
from engine.model import vae_layers
from engine.model.vae import VAE, VAEConfig
from kernels.causal_convolution import causal_convolution_triton, has_fast_kernel, pack


@torch.inference_mode()
def convolutions(lines: Lines) -> None:
    """One row per shape and form: milliseconds with cuDNN's benchmark, and without."""
    _, config, (height, width), _ = models.SHAPES["tiny" if lines.smoke else "wan2.1-1.3b"]
    device, dtype = torch.device(lines.device), torch.float32 if lines.smoke else torch.bfloat16
    for (frames, channels, out, kernel, high, wide), count in shapes(config, height // 8, width // 8).items():
        x = torch.randn(frames, channels, high, wide, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(out, channels, 3, kernel, kernel, device=device, dtype=dtype)
        bias = torch.randn(out, device=device, dtype=dtype)
        for name, call in forms(x, weight, bias).items():
            ms: dict[str, float | str] = {}
            for benchmark in (True, False):
                with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
                    try:
                        ms[f"benchmark_{str(benchmark).lower()}"] = _ms(call, device)
                    except RuntimeError as refused:  # no engine for this form, or no memory for it
                        ms[f"benchmark_{str(benchmark).lower()}"] = said(refused)
            shape = f"{channels} -> {out}, {kernel}x{kernel}, {frames} x {high} x {wide}"
            lines.add("row", table="convolutions", shape=shape, times_per_latent=count, form=name, ms=ms)


def shapes(config: VAEConfig, height: int, width: int) -> dict[tuple[int, ...], int]:
    """The causal convolutions of a steady latent, counted: (input frames, channels, outputs, kernel, height, width)."""
    found: dict[tuple[int, ...], int] = {}
    inner = vae_layers.causal_taps

    def noted(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        key = len(x), x.shape[1], len(weight), weight.shape[3], x.shape[2], x.shape[3]
        found[key] = found.get(key, 0) + 1
        return inner(x, weight, *others)

    with torch.device("meta"):
        decoder = VAE(config)
        latent = torch.empty(1, config.z_dim, 1, height, width)
    try:
        vae_layers.causal_taps = noted  # type: ignore[assignment]
        _, cache = decoder.first(latent)
        found.clear()
        decoder.steady(latent, tuple(cache))
    finally:
        vae_layers.causal_taps = inner
    return found


def forms(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """x [T + 2, C, H, W] channels-last -> [T, C', H, W], in each form."""
    space, last = weight.shape[-1] // 2, len(x) - 2
    video = x[None].permute(0, 2, 1, 3, 4)
    flat = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    deep = weight.contiguous(memory_format=torch.channels_last_3d)
    padded = F.pad(deep, (0, 0, 0, 0, 0, 0, 0, 0, 0, -len(weight) % 8)).contiguous(memory_format=torch.channels_last_3d)
    padding = (0, space, space)

    def stacked() -> Tensor:
        taps = torch.cat([x[tap : tap + last] for tap in range(3)], dim=1)
        return F.conv2d(taps, flat, bias, padding=space)

    found: dict[str, Callable[[], Tensor]] = {
        "3-D": lambda: F.conv3d(video, weight, bias, padding=padding),
        "3-D, weights channels-last": lambda: F.conv3d(video, deep, bias, padding=padding),
        "3-D, no bias": lambda: F.conv3d(video, deep, None, padding=padding),
        "2-D over stacked taps": stacked,
    }
    if len(weight) % 8:
        found["3-D, outputs padded to 8"] = lambda: F.conv3d(video, padded, None, padding=padding)
    if vae_layers.fits_cudnn_badly(weight) and has_fast_kernel(x.device):
        found["our kernel"] = partial(causal_convolution_triton, x, weight, packed=pack(weight))
    return found


def _ms(call: Callable[[], Tensor], device: torch.device, repeats: int = 5) -> float:
    """The best of a few runs, after two that set up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for number in range(repeats + 2):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if number >= 2:
            best = min(best, time.perf_counter() - start)
    return 1e3 * best
