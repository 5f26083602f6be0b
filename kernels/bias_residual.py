"""h + bias + residual in one pass over a convolution's result, where no normalisation follows that could add them.

cuDNN's convolution would add the bias in a pass of its own, and PyTorch the residual in another. Images are
channels-last in memory: [N, C, H, W] in shape, [N, H, W, C] in memory.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import described, needs_gradient, power_of_two
from kernels.launch import launch, tl, triton
from kernels.table import Variant, implementation, register

_ELEMENTS = 4096  # per program: its tile of positions and channels


def bias_residual_reference(h: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """h, residual [N, C, H, W], bias [C] -> as h; every step is rounded to h's dtype."""
    total = h + bias[:, None, None]
    return total if residual is None else total + residual


@triton.jit(do_not_specialize=["positions"])
def _bias_residual(
    H, BIAS, RESIDUAL, OUT, positions, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr
):  # fmt: skip
    """One program per tile: H, RESIDUAL (or None), OUT [positions, CHANNELS], BIAS [CHANNELS]."""
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (position < positions) & (channel < CHANNELS)
    at = position * CHANNELS + channel
    total = tl.load(H + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(BIAS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        total += tl.load(RESIDUAL + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=inside)


def bias_residual_triton(h: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """Like bias_residual_reference, but rounded once."""
    images, channels, height, width = h.shape
    positions, block = images * height * width, power_of_two(channels)
    tile = max(_ELEMENTS // block, 1)
    out = torch.empty_like(h)
    launch(
        _bias_residual, (-(-positions // tile),), h, bias, residual, out, positions, channels, block, tile, num_warps=8
    )
    return out


def _channels_last(x: Tensor) -> bool:
    return x.permute(0, 2, 3, 1).is_contiguous()


def bias_residual(h: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """h + bias + residual: h and residual (or None) [N, C, H, W], bias [C], one dtype -> as h.

    On a GPU images are channels-last in memory. Raises ValueError where shapes, dtypes or strides do not fit.
    """
    images = [h] if residual is None else [h, residual]
    fits = h.ndim == 4 and h.numel() and bias.shape == h.shape[1:2]
    if not fits or any(t.shape != h.shape or t.dtype != h.dtype for t in images) or bias.dtype != h.dtype:
        got = described(h=h, bias=bias, residual=residual)
        raise ValueError(f"bias_residual: got {got}, expected h, residual [N, C, H, W] and bias [C], one dtype")
    call = implementation("bias_residual", h.device, fits=not needs_gradient(bias, *images))
    if call is bias_residual_triton and not all(map(_channels_last, images)):
        strides = ", ".join(str(t.stride()) for t in images)
        raise ValueError(f"bias_residual: got strides {strides}, expected channels-last images")
    return call(h, bias, residual)


def _variants() -> Iterator[Variant]:
    """What goes into the decoder's upsampling at 832x480."""
    for channels, frames, height, width in ((384, 1, 60, 104), (192, 4, 240, 416)):
        h = torch.empty(frames, height, width, channels, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
        bias = torch.empty(channels, dtype=torch.bfloat16, device="meta")
        for residual in (None, h):
            name = f"{channels} x {frames} x {height} x {width}{'' if residual is None else ' + residual'}"
            yield Variant(name, partial(bias_residual_triton, h, bias, residual))


register("bias_residual", reference=bias_residual_reference, triton=bias_residual_triton, variants=_variants)
