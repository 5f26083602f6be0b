"""LayerNorm with a scale and a shift, and optionally e4m3 with one scale per token, in one pass over the hidden state.

One kernel has two forms: `norm_modulate` (no weights of its own; 1 + scale and shift per frame, from the timestep)
and `layer_norm_affine` (a weight and a bias). In PyTorch the first takes four passes.

Each takes a tensor or a `Residual`, which it adds up in the same pass; the sum is then there for the next residual.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import autocasts, described, fits_per_frame, needs_gradient, power_of_two
from kernels.gate_residual import Residual
from kernels.launch import launch, tl, triton
from kernels.quantize import empty_rows, quantize_rows_reference, row_scale, to_e4m3
from kernels.table import OPS, Variant, implementation, register

Hidden = Tensor | Residual  # [B, F * n, dim]


def norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, F * n, dim], shift and scale [B, F, 1, dim] -> [B, F * n, dim]; every step rounded to x's dtype."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale) + shift).flatten(1, 2)


def layer_norm_affine_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, n, dim], weight and bias [dim] -> [B, n, dim]."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@triton.jit(do_not_specialize=["tokens", "frames"])
def _layer_norm(
    X, Y, GATE, SUM, SHIFT, SCALE, OUT, OUT_SCALE, tokens, frames, gate_b, gate_f, shift_b, shift_f, scale_b, scale_f,
    eps, DIM: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """One program per token: x [B * frames * tokens, DIM], float32 inside, rounded once.

    With Y the norm is that of x + y * gate, rounded as gate_residual does (x + y without GATE), which goes to SUM.
    """
    row = tl.program_id(0).to(tl.int64)
    frame = row // tokens
    b, f = frame // frames, frame % frames
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    x = tl.load(X + row * DIM + at, mask=inside, other=0.0).to(tl.float32)
    if Y is not None:
        y = tl.load(Y + row * DIM + at, mask=inside, other=0.0)
        if GATE is not None:
            gate = tl.load(GATE + b * gate_b + f * gate_f + at, mask=inside, other=0.0)
            y = (y.to(tl.float32) * gate.to(tl.float32)).to(Y.dtype.element_ty)
        total = (x + y.to(tl.float32)).to(SUM.dtype.element_ty)
        tl.store(SUM + row * DIM + at, total, mask=inside)
        x = total.to(tl.float32)
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
    hidden: Hidden, shift: Tensor, scale: Tensor, eps: float, plus_one: bool, out: Tensor,
    out_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """shift and scale [B or 1, F, 1, dim], last stride 1; fills out, and out_scale where out is e4m3."""
    x, y, gate = _parts(hidden)
    (batch, length, dim), frames = x.shape, shift.shape[1]
    shift, scale, block = shift.expand(batch, -1, -1, -1), scale.expand(batch, -1, -1, -1), power_of_two(dim)
    if gate is not None and gate.shape[1] != frames:  # a weight of all frames, and gates of each
        frames, shift, scale = gate.shape[1], *(t.expand(-1, gate.shape[1], -1, -1) for t in (shift, scale))
    gate = None if gate is None else gate.expand(batch, -1, -1, -1)
    total = None if y is None else torch.empty_like(y)
    warps = max(block // (1024 if out_scale is None else 2048), 1)  # the fastest of 1, 2, 4, 8 on an H100
    launch(
        _layer_norm, (batch * length,), x.contiguous(), y, gate, total, shift, scale, out, out_scale,
        length // frames, frames, *(shift if gate is None else gate).stride()[:2], *shift.stride()[:2],
        *scale.stride()[:2], eps, dim, block, plus_one, out_scale is not None, num_warps=warps,
        enable_fp_fusion=False,  # the product with the gate rounds as in gate_residual, with and without a sum
    )  # fmt: skip
    if isinstance(hidden, Residual) and total is not None:
        hidden.accept(total)


def _parts(hidden: Hidden) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, y and gate of a sum that is still to be computed; else the tensor alone."""
    if isinstance(hidden, Tensor):
        return hidden, None, None
    if hidden.added:
        return hidden.total(), None, None
    return hidden.x, hidden.y.contiguous(), hidden.gate


def norm_modulate_triton(x: Hidden, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Like norm_modulate_reference, but rounded once."""
    out = torch.empty_like(_parts(x)[0], memory_format=torch.contiguous_format)
    _launch(x, shift, scale, eps, True, out)
    return out


def norm_modulate_quantize_triton(x: Hidden, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, returned as e4m3 [B * F * n, dim] and its scales."""
    out, out_scale = empty_rows(_parts(x)[0])
    _launch(x, shift, scale, eps, True, out, out_scale)
    return out, out_scale


def layer_norm_affine_triton(x: Hidden, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Like layer_norm_affine_reference."""
    out = torch.empty_like(_parts(x)[0], memory_format=torch.contiguous_format)
    _launch(x, bias[None, None, None], weight[None, None, None], eps, False, out)
    return out


def layer_norm_affine_quantize_triton(x: Hidden, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, returned as e4m3 [B * n, dim] and its scales."""
    out, out_scale = empty_rows(_parts(x)[0])
    _launch(x, bias[None, None, None], weight[None, None, None], eps, False, out, out_scale)
    return out, out_scale


def _run(op: str, hidden: Hidden, eps: float, per_frame: bool, **given: Tensor) -> Any:
    """Check shapes and run; the two tensors given are [B, F, 1, dim] per frame, or [dim]."""
    args = tuple(given.values())
    x, y, gate = _parts(hidden)
    if autocasts(x):
        return OPS[op].implementations["reference"](_added(hidden), *args, eps)
    wide = args if per_frame else tuple(a[None, None, None] for a in args)
    sums = y is None or (x.shape == y.shape and x.dtype == y.dtype and (gate is None or fits_per_frame(x, gate)))
    if not fits_per_frame(x, *wide) or not sums:
        expected = f"{', '.join(given)} {'[B, F, 1, dim]' if per_frame else '[dim]'}"
        raise ValueError(f"{op}: got {described(x=x, y=y, gate=gate, **given)}, expected x [B, F * n, dim] "
                         f"and {expected}, one dtype, dim contiguous")  # fmt: skip
    tensors = [t for t in (x, y, gate, *args) if t is not None]
    call = implementation(op, x.device, fits=not needs_gradient(*tensors))
    if call is OPS[op].implementations["reference"]:
        return call(_added(hidden), *args, eps)
    return call(hidden, *args, eps)


def _added(hidden: Hidden) -> Tensor:
    return hidden if isinstance(hidden, Tensor) else hidden.total()


def norm_modulate(x: Hidden, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift.

    x [B, F * n, dim], shift and scale [B, F, 1, dim] (one per frame; only the last stride is fixed) -> [B, F * n, dim].
    Raises ValueError where shapes or dtypes do not fit.
    """
    return _run("norm_modulate", x, eps, True, shift=shift, scale=scale)


def norm_modulate_quantize(x: Hidden, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Like norm_modulate -> e4m3 [B * F * n, dim], float32 scale [B * F * n, 1]; value = e4m3 * scale."""
    return _run("norm_modulate_quantize", x, eps, True, shift=shift, scale=scale)


def layer_norm_affine(x: Hidden, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * weight + bias: x [B, n, dim], weight and bias [dim] -> [B, n, dim]."""
    return _run("layer_norm_affine", x, eps, False, weight=weight, bias=bias)


def layer_norm_affine_quantize(x: Hidden, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Like layer_norm_affine -> e4m3 [B * n, dim], float32 scale [B * n, 1]; value = e4m3 * scale."""
    return _run("layer_norm_affine_quantize", x, eps, False, weight=weight, bias=bias)


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
    def call(y: bool, gate: bool) -> Any:
        x, *args = inputs()
        by = torch.empty(1, 1, 6, 1, 1536, dtype=torch.bfloat16, device="meta")[:, :, 2] if gate else None
        return triton_call(Residual(x, x, by) if y else x, *args, 1e-6)

    def variants() -> Iterator[Variant]:
        for name, *what in (("1536", False, False), ("1536, x + y", True, False), ("1536, x + y * gate", True, True)):
            yield Variant(name, partial(call, *what))

    register(op, reference=reference, triton=triton_call, variants=variants)


_enter("norm_modulate", norm_modulate_reference, norm_modulate_triton, _full_size)
_enter("norm_modulate_quantize", _quantized(norm_modulate_reference), norm_modulate_quantize_triton, _full_size)
_enter("layer_norm_affine", layer_norm_affine_reference, layer_norm_affine_triton, _affine_full_size)
_enter("layer_norm_affine_quantize", _quantized(layer_norm_affine_reference), layer_norm_affine_quantize_triton,
       _affine_full_size)  # fmt: skip
