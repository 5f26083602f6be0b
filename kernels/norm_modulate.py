"""LayerNorm with a scale and a shift, and optionally e4m3 with one scale per token, in one pass over the hidden state.

One kernel has two forms: `norm_modulate` (no weights of its own; 1 + scale and shift per frame, from the timestep)
and `layer_norm_affine` (a weight and a bias). In PyTorch the first takes four passes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import autocasts, described, fits_per_frame, needs_gradient, power_of_two, warps_for
from kernels.launch import launch, tl, triton
from kernels.quantize import empty_rows, quantize_rows_reference, row_scale, to_e4m3
from kernels.table import Variant, implementation, register


def norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, F * n, dim], shift and scale [B, F, 1, dim] -> [B, F * n, dim]; every step rounded to x's dtype."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale) + shift).flatten(1, 2)


def layer_norm_affine_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, n, dim], weight and bias [dim] -> [B, n, dim]."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@triton.jit(do_not_specialize=["tokens", "frames"])
def _layer_norm(
    X, SHIFT, SCALE, OUT, OUT_SCALE, tokens, frames, shift_b, shift_f, scale_b, scale_f, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """One program per token: x [B * frames * tokens, DIM], float32 inside, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    frame = row // tokens
    b, f = frame // frames, frame % frames
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    x = tl.load(X + row * DIM + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + b * scale_b + f * scale_f + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(SHIFT + b * shift_b + f * shift_f + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / DIM, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
    if PLUS_ONE:
        scale += 1.0
    y = y * scale + shift
    if QUANTIZE:
        out_scale = row_scale(tl.max(tl.abs(y), 0))
        tl.store(OUT_SCALE + row, out_scale)
        y = to_e4m3(y, out_scale)
    tl.store(OUT + row * DIM + at, y.to(OUT.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, plus_one: bool, out: Tensor, out_scale: Tensor | None = None
) -> None:
    """shift and scale [B or 1, F, 1, dim], last stride 1; fills out, and out_scale where out is e4m3."""
    (batch, length, dim), frames = x.shape, shift.shape[1]
    shift, scale, block = shift.expand(batch, -1, -1, -1), scale.expand(batch, -1, -1, -1), power_of_two(dim)
    launch(
        _layer_norm, (batch * length,), x.contiguous(), shift, scale, out, out_scale, length // frames, frames,
        *shift.stride()[:2], *scale.stride()[:2], eps, dim, block, plus_one, out_scale is not None,
        num_warps=warps_for(block),
    )  # fmt: skip


def norm_modulate_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Like norm_modulate_reference, but rounded once."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, shift, scale, eps, True, out)
    return out


def norm_modulate_quantize_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, returned as e4m3 [B * F * n, dim] and its scales."""
    out, out_scale = empty_rows(x)
    _launch(x, shift, scale, eps, True, out, out_scale)
    return out, out_scale


def layer_norm_affine_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Like layer_norm_affine_reference."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, bias[None, None, None], weight[None, None, None], eps, False, out)
    return out


def layer_norm_affine_quantize_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, returned as e4m3 [B * n, dim] and its scales."""
    out, out_scale = empty_rows(x)
    _launch(x, bias[None, None, None], weight[None, None, None], eps, False, out, out_scale)
    return out, out_scale


def _check_modulation(op: str, x: Tensor, shift: Tensor, scale: Tensor) -> None:
    if not fits_per_frame(x, shift, scale):
        raise ValueError(f"{op}: got {described(x=x, shift=shift, scale=scale)}, expected x [B, F * n, dim] "
                         "and shift, scale [B, F, 1, dim], one dtype, dim contiguous")  # fmt: skip


def _check_affine(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if not fits_per_frame(x, weight[None, None, None], bias[None, None, None]):
        raise ValueError(f"{op}: got {described(x=x, weight=weight, bias=bias)}, expected x [B, n, dim] "
                         "and weight, bias [dim], one dtype")  # fmt: skip


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift.

    x [B, F * n, dim], shift and scale [B, F, 1, dim] (one per frame; only the last stride is fixed) -> [B, F * n, dim].
    Raises ValueError where shapes or dtypes do not fit.
    """
    if autocasts(x):
        return norm_modulate_reference(x, shift, scale, eps)
    _check_modulation("norm_modulate", x, shift, scale)
    fits = not needs_gradient(x, shift, scale)
    return implementation("norm_modulate", x.device, fits=fits)(x, shift, scale, eps)


def norm_modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Like norm_modulate -> e4m3 [B * F * n, dim], float32 scale [B * F * n, 1]; value = e4m3 * scale."""
    _check_modulation("norm_modulate_quantize", x, shift, scale)
    return implementation("norm_modulate_quantize", x.device)(x, shift, scale, eps)


def layer_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * weight + bias: x [B, n, dim], weight and bias [dim] -> [B, n, dim]."""
    if autocasts(x):
        return layer_norm_affine_reference(x, weight, bias, eps)
    _check_affine("layer_norm_affine", x, weight, bias)
    fits = not needs_gradient(x, weight, bias)
    return implementation("layer_norm_affine", x.device, fits=fits)(x, weight, bias, eps)


def layer_norm_affine_quantize(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Like layer_norm_affine -> e4m3 [B * n, dim], float32 scale [B * n, 1]; value = e4m3 * scale."""
    _check_affine("layer_norm_affine_quantize", x, weight, bias)
    return implementation("layer_norm_affine_quantize", x.device)(x, weight, bias, eps)


def _quantized(reference: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *args: quantize_rows_reference(reference(*args))


def _full_size() -> tuple[Tensor, Tensor, Tensor]:
    """x, shift, scale of one 832x480 latent frame at width 1536; the last two are slices of six, as in a block."""
    make = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    modulation = make(1, 1, 6, 1, 1536)
    return make(1, 1560, 1536), modulation[:, :, 0], modulation[:, :, 1]


def _affine_full_size() -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.empty(1536, dtype=torch.bfloat16, device="meta")
    return _full_size()[0], weight, weight


def _enter(
    op: str, reference: Callable[..., Any], triton_call: Callable[..., Any], inputs: Callable[[], tuple[Tensor, ...]]
) -> None:
    register(op, reference=reference, triton=triton_call,
             variants=lambda: [Variant("1536", partial(triton_call, *inputs(), 1e-6))])  # fmt: skip


_enter("norm_modulate", norm_modulate_reference, norm_modulate_triton, _full_size)
_enter("norm_modulate_quantize", _quantized(norm_modulate_reference), norm_modulate_quantize_triton, _full_size)
_enter("layer_norm_affine", layer_norm_affine_reference, layer_norm_affine_triton, _affine_full_size)
_enter("layer_norm_affine_quantize", _quantized(layer_norm_affine_reference), layer_norm_affine_quantize_triton,
       _affine_full_size)  # fmt: skip
