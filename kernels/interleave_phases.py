"""The pass behind an upsampling convolution: its four phases go to their places in the larger images, plus the bias.

PyTorch adds the bias to a strided view, at less than half of the memory's rate. Images are channels-last in memory:
[N, C, H, W] in shape, [N, H, W, C] in memory.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import described, needs_gradient, power_of_two
from kernels.launch import launch, tl, triton
from kernels.table import Variant, implementation, register

_ELEMENTS = 4096  # per program: its tile of positions and channels


def interleave_phases_reference(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [N, 4 * C', H + 1, W + 1], channels-last, bias [C'] -> [N, C', 2H, 2W], channels-last.

    Output (2i + py, 2j + px) is phase 2 * py + px of window (i + py, j + px).
    """
    n, channels, high, wide = len(y), y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    image, _, row, column = y.stride()
    shifted = y.as_strided(
        (n, high, 2, wide, 2, channels), (image, row, row + 2 * channels, column, column + channels, 1),
        y.storage_offset(),
    )  # fmt: skip
    out = y.new_empty(n, 2 * high, 2 * wide, channels)
    torch.add(shifted, 0 if bias is None else bias, out=out.view(shifted.shape))
    return out.permute(0, 3, 1, 2)


@triton.jit(do_not_specialize=["positions", "height", "width"])
def _interleave_phases(
    Y, BIAS, OUT, positions, height, width, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr
):  # fmt: skip
    """One program per tile: Y [N, height / 2 + 1, width / 2 + 1, 4, CHANNELS], OUT [N, height, width, CHANNELS]."""
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (position < positions) & (channel < CHANNELS)
    x, row = position % width, position // width
    y, image = row % height, row // height
    window = (image * (height // 2 + 1) + (y + 1) // 2) * (width // 2 + 1) + (x + 1) // 2
    phase = y % 2 * 2 + x % 2
    total = tl.load(Y + (window * 4 + phase).to(tl.int64) * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    if BIAS is not None:
        total += tl.load(BIAS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    tl.store(OUT + position.to(tl.int64) * CHANNELS + channel, total.to(OUT.dtype.element_ty), mask=inside)


def interleave_phases_triton(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """As interleave_phases_reference."""
    n, channels, height, width = len(y), y.shape[1] // 4, 2 * y.shape[2] - 2, 2 * y.shape[3] - 2
    positions, block = n * height * width, power_of_two(channels)
    tile = max(_ELEMENTS // block, 1)
    out = torch.empty(n, height, width, channels, dtype=y.dtype, device=y.device)
    launch(
        _interleave_phases, (-(-positions // tile),), y, bias, out, positions, height, width, channels, block, tile,
        num_warps=8,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def interleave_phases(y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Four phases [N, 4 * C', H + 1, W + 1] -> images of twice the size plus bias [C'] (or None): [N, C', 2H, 2W].

    y is channels-last in memory, and so is the result. Raises ValueError where shapes, dtypes or strides do not fit.
    """
    fits = y.ndim == 4 and y.numel() and not y.shape[1] % 4 and min(y.shape[2:]) > 1
    if not fits or (bias is not None and (4 * bias.numel(), bias.ndim, bias.dtype) != (y.shape[1], 1, y.dtype)):
        raise ValueError(f"interleave_phases: got {described(y=y, bias=bias)}, expected y [N, 4 * C', H + 1, W + 1] "
                         "and bias [C'], one dtype")  # fmt: skip
    if not y.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError(f"interleave_phases: got strides {y.stride()}, expected channels-last images")
    plain = needs_gradient(y) or (bias is not None and needs_gradient(bias))
    # Positions and windows are counted in 32 bits.
    return implementation("interleave_phases", y.device, fits=not plain and y.numel() < 2**31)(y, bias)


def _variants() -> Iterator[Variant]:
    """The decoder's three upsamplings at 832x480."""
    for channels, frames, height, width in ((192, 2, 60, 104), (192, 4, 120, 208), (96, 4, 240, 416)):
        y = torch.empty(frames, height + 1, width + 1, 4 * channels, dtype=torch.bfloat16, device="meta")
        bias = torch.empty(channels, dtype=torch.bfloat16, device="meta")
        name = f"{channels} x {frames} x {height} x {width}"
        yield Variant(name, partial(interleave_phases_triton, y.permute(0, 3, 1, 2), bias))


register(
    "interleave_phases", reference=interleave_phases_reference, triton=interleave_phases_triton, variants=_variants
)
