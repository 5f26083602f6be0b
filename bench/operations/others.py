"""Cases of all operations but attention, each beside plain PyTorch.

Plain PyTorch is the code that the model would run without kernels/. On a GPU it also runs under torch.compile.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.instruments.flops import Cost
from engine.model.layers import rms_unit
from engine.model.rope import apply_rope, rope_tables
from kernels.bias_residual import bias_residual, bias_residual_reference
from kernels.causal_convolution import causal_convolution, causal_convolution_reference, pack
from kernels.cuda_library import LIBRARY, fp8_linear_cuda
from kernels.fp8_linear import fp8_linear, fp8_linear_library, fp8_linear_reference, fp8_linear_tiles
from kernels.gate_residual import gate_residual
from kernels.gelu_quantize import gelu_quantize
from kernels.interleave_phases import interleave_phases, interleave_phases_reference
from kernels.linear_gelu import linear_gelu, linear_gelu_reference
from kernels.norm_modulate import norm_modulate, norm_modulate_quantize
from kernels.qk_norm_rope_write import qk_norm_rope_write, qk_norm_rope_write_reference
from kernels.quantize import quantize_per_channel, quantize_per_token, quantize_rows_reference
from kernels.solver_step import solver_step
from kernels.unipc_step import Past, Update, unipc_step, unipc_step_reference
from kernels.vae_norm_silu import vae_norm_silu, vae_norm_silu_reference

Call = Callable[[], Any]


def same(result: Tensor) -> Tensor:
    return result


@dataclass(frozen=True)
class Case:
    """One operation at one shape: calls without arguments, all on the same inputs."""

    op: str
    shape: str
    reference: Call  # the truth, in float64
    ours: Call
    library: dict[str, Call]  # plain PyTorch, best known first
    cost: Cost
    value: Callable[[Any], Tensor] = same  # a call's result -> the tensor that is compared
    speedup: float = 1.0  # of this arithmetic over the arithmetic of the measured ceiling
    most: float = float("inf")  # largest error, where ours may be the library's own call


def _beside(
    op: str, shape: str, ours: Callable[..., Any], plain: Callable[..., Any], args: tuple[Any, ...], traffic: float,
    value: Callable[[Any], Tensor] = same, truth: Callable[..., Any] | None = None,
) -> Case:  # fmt: skip
    """An operation that moves `traffic` bytes. The truth is `truth`, or else the plain code, on float64 inputs."""
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    library: dict[str, Call] = {"eager": partial(plain, *args)}
    if any(isinstance(a, Tensor) and a.is_cuda for a in args):
        library["compiled"] = partial(torch.compile(plain, dynamic=False), *args)
    reference = partial(truth or plain, *wide)
    return Case(op, shape, reference, partial(ours, *args), library, Cost(bytes=traffic), value)


def _random(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=made).to(device, dtype) for shape in shapes]


def _dequantised(result: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    return result.flatten(0, -2) if isinstance(result, Tensor) else result[0].double() * result[1]


def _first(result: tuple[Tensor, ...]) -> Tensor:
    return result[0]


def _quantised(plain: Callable[..., Tensor]) -> Callable[..., Any]:
    """`plain`, then rounded to e4m3. In float64 it is not rounded, because the truth of a quantiser is its input."""

    def both(*args: Tensor) -> Any:
        out = plain(*args)
        return out if out.dtype == torch.float64 else quantize_rows_reference(out)

    return both


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As published: x [B, F * n, dim] with one shift and scale [B, F, 1, dim] per frame."""
    return (x.unflatten(1, (shift.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)


def gate(x: Tensor, by: Tensor) -> Tensor:
    """As published: x [B, F * n, dim] times one gate [B, F, 1, dim] per frame."""
    return (x.unflatten(1, (by.shape[1], -1)) * by).flatten(1, 2)


def _normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale) + shift).flatten(1, 2)


def _norm_modulate(device: torch.device, dtype: torch.dtype, tokens: int, dim: int) -> Case:
    x, shift, scale = _random(device, dtype, (1, tokens, dim), (1, 1, 1, dim), (1, 1, 1, dim))
    traffic = 2.0 * x.nbytes
    return _beside("norm_modulate", f"{tokens} x {dim}", norm_modulate, _normed, (x, shift, scale), traffic)


def _norm_modulate_quantize(device: torch.device, dtype: torch.dtype, tokens: int, dim: int) -> Case:
    args = _random(device, dtype, (1, tokens, dim), (1, 1, 1, dim), (1, 1, 1, dim))
    return _beside(
        "norm_modulate_quantize", f"{tokens} x {dim}", norm_modulate_quantize, _quantised(_normed), tuple(args),
        args[0].nbytes + args[0].numel(), _dequantised,
    )  # fmt: skip


def _gated(x: Tensor, y: Tensor, by: Tensor) -> Tensor:
    return x + (y.unflatten(1, (by.shape[1], -1)) * by).flatten(1, 2)


def _gate_residual(device: torch.device, dtype: torch.dtype, tokens: int, dim: int) -> Case:
    x, y, by = _random(device, dtype, (1, tokens, dim), (1, tokens, dim), (1, 1, 1, dim))
    return _beside("gate_residual", f"{tokens} x {dim}", gate_residual, _gated, (x, y, by), 3.0 * x.nbytes)


def _gelu_quantize(device: torch.device, dtype: torch.dtype, tokens: int, dim: int) -> Case:
    (x,) = _random(device, dtype, (tokens, dim))
    plain = _quantised(partial(F.gelu, approximate="tanh"))
    traffic = x.nbytes + x.numel()
    return _beside("gelu_quantize", f"{tokens} x {dim}", gelu_quantize, plain, (x,), traffic, _dequantised)


def _linear_gelu(device: torch.device, dtype: torch.dtype, tokens: int, columns: int, depth: int) -> Case:
    x, weight, bias = _random(device, dtype, (tokens, depth), (columns, depth), (columns,))
    args = (x, weight / depth**0.5, bias)
    case = _beside("linear_gelu", f"{tokens} x {columns} x {depth}", linear_gelu, linear_gelu_reference, args, 0.0)
    traffic = x.nbytes + weight.nbytes + float(tokens * columns * x.itemsize)
    return replace(case, cost=Cost(2.0 * tokens * columns * depth, traffic))


def _quantize_per_token(device: torch.device, dtype: torch.dtype, tokens: int, dim: int) -> Case:
    (x,) = _random(device, dtype, (tokens, dim))
    traffic = x.nbytes + x.numel()
    return _beside(
        "quantize_per_token", f"{tokens} x {dim}", quantize_per_token, _quantised(same), (x,), traffic, _dequantised
    )


def _qk_norm_rope_write(
    device: torch.device, dtype: torch.dtype, heads: int, dim: int, height: int, width: int, slots: int
) -> Case:
    """One latent frame of height x width tokens into the last of `slots` slots."""
    tokens, inner = height * width, heads * dim
    qkv, q_weight, k_weight = _random(device, dtype, (1, tokens, 3 * inner), (inner,), (inner,))
    cos, sin = (table.to(device) for table in rope_tables([7], height, width, dim))
    cache = torch.zeros(2, 1, slots * tokens, heads, dim, device=device, dtype=dtype)
    row = torch.tensor((slots - 1) * tokens, dtype=torch.int32, device=device)

    def fused(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        q = qk_norm_rope_write(qkv, q_weight, k_weight, cos, sin, cache[0], cache[1], row)
        return q, *cache[:, :, -tokens:]

    def plain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = (
            (rms_unit(q) * q_weight).unflatten(-1, (heads, dim)),
            (rms_unit(k) * k_weight).unflatten(-1, (heads, dim)),
        )
        q, k = apply_rope(torch.cat([q, k], dim=2), cos, sin).chunk(2, dim=2)
        cache[0, :, -tokens:].copy_(k)
        cache[1, :, -tokens:].copy_(v.unflatten(-1, (heads, dim)))
        return q, *cache[:, :, -tokens:]

    def truth(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        k, v = torch.zeros(2, 1, tokens, heads, dim, device=device, dtype=qkv.dtype)
        return qk_norm_rope_write_reference(qkv, q_weight, k_weight, cos, sin, k, v, 0), k, v

    return _beside(
        "qk_norm_rope_write", f"{tokens} x 3 x {heads} x {dim}", fused, plain, (qkv, q_weight, k_weight),
        2.0 * qkv.nbytes, torch.stack, truth,
    )  # fmt: skip


def _solver_step(device: torch.device, dtype: torch.dtype, height: int, width: int) -> Case:
    """Renoise one latent frame. The noise levels are on the device, as a CUDA graph needs them."""
    x, noise, flow = _random(device, torch.float32, *[(1, 16, 1, height, width)] * 3)
    sigma, level = torch.tensor([0.9375, 0.75], device=device)

    def plain(x: Tensor, flow: Tensor, noise: Tensor) -> Tensor:
        clean = (x.double() - sigma * flow.double()).to(x.dtype)
        return (1 - level) * clean + level * noise

    def ours(x: Tensor, flow: Tensor, noise: Tensor) -> Tensor:
        return solver_step(x, flow, sigma, level, noise)

    return _beside("solver_step", f"16 x {height} x {width}", ours, plain, (x, flow, noise), 4.0 * x.nbytes)


def _unipc_step(device: torch.device, dtype: torch.dtype, height: int, width: int) -> Case:
    """A step of order 2 on one latent frame, in a stream's float64 past."""
    x, flow, *past = _random(device, torch.float32, *[(1, 16, 1, height, width)] * 5)
    corrector, predictor = Update(0.6, -0.4, -1.9, 0.37, 0.61), Update(0.5, -0.45, -2.3, 0.5)

    def step(call: Callable[..., Any], x: Tensor, flow: Tensor, *past: Tensor) -> Tensor:
        return call(x, flow, Past(*(t.double() for t in past)), 0.8, corrector, predictor)[0]

    traffic = 2.0 * x.nbytes + 5 * 2.0 * x.nbytes
    return _beside("unipc_step", f"16 x {height} x {width}", partial(step, unipc_step),
                   partial(step, unipc_step_reference), (x, flow, *past), traffic)  # fmt: skip


def _fp8_linear(device: torch.device, dtype: torch.dtype, rows: int, columns: int, depth: int) -> Case:
    """Beside the library's row-wise product; on a GPU also the product in `dtype`, and this project's kernels."""
    x, weight, bias = _random(device, torch.bfloat16, (rows, depth), (columns, depth), (columns,))
    x_pair, weight_pair = quantize_per_token(x), quantize_per_channel(weight)
    args = (*x_pair, *weight_pair, bias, torch.bfloat16)
    library: dict[str, Call] = {"scaled_mm": partial(fp8_linear_library, *args)}
    if device.type == "cuda":
        wide, wide_weight = (_dequantised(pair).to(dtype) for pair in (x_pair, weight_pair))
        library[str(dtype).removeprefix("torch.")] = partial(F.linear, wide, wide_weight, bias.to(dtype))
        library["tiles"] = partial(fp8_linear_tiles, *args)
        if LIBRARY.exists():
            library["cuda c++"] = partial(fp8_linear_cuda, *args)
    flops = 2.0 * rows * columns * depth
    traffic = x.numel() + weight.numel() + 2.0 * rows * columns
    return Case(
        "fp8_linear", f"{rows} x {columns} x {depth}", partial(fp8_linear_reference, *args[:-1], torch.float64),
        partial(fp8_linear, *args), library, Cost(flops, traffic), speedup=2.0, most=1e-2,
    )  # fmt: skip


def _vae_norm_silu(
    device: torch.device, dtype: torch.dtype, channels: int, frames: int, height: int, width: int, adds: int
) -> Case:
    """adds: also add bias and residual, and give the sum."""
    whole = 1, channels, frames, height, width
    layout = torch.channels_last_3d
    tensors = _random(device, dtype, whole, (1, channels, 2, height, width), whole)
    x, cache, residual = (t.contiguous(memory_format=layout) for t in tensors)
    gamma, bias = _random(device, dtype, (channels,), (channels,))
    traffic = 2.0 * (1 + adds) * x.nbytes + 3.0 * cache.nbytes
    shape = f"{channels} x {frames} x {height} x {width}{' + bias + residual' if adds else ''}"
    args = (x, gamma, cache, None, *((bias, residual) if adds else ()))
    return _beside("vae_norm_silu", shape, vae_norm_silu, vae_norm_silu_reference, args, traffic, _first)


def _bias_residual(
    device: torch.device, dtype: torch.dtype, channels: int, images: int, height: int, width: int
) -> Case:
    shape = images, channels, height, width
    h, residual = (t.contiguous(memory_format=torch.channels_last) for t in _random(device, dtype, shape, shape))
    (bias,) = _random(device, dtype, (channels,))
    name = f"{channels} x {images} x {height} x {width}"
    args = h, bias, residual
    return _beside("bias_residual", name, bias_residual, bias_residual_reference, args, 3.0 * h.nbytes)


def _causal_convolution(
    device: torch.device, dtype: torch.dtype, channels: int, outputs: int, frames: int, height: int, width: int
) -> Case:
    """The weight is packed and cuDNN's is channels-last beforehand, as the VAE keeps them."""
    shapes = (frames + 2, channels, height, width), (outputs, channels, 3, 3, 3)
    x, weight = _random(device, dtype, *shapes)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = (weight / (27 * channels) ** 0.5).contiguous(memory_format=torch.channels_last_3d)
    ours = partial(causal_convolution, packed=pack(weight))
    name = f"{channels} -> {outputs} x {frames} x {height} x {width}"
    positions = float(frames * height * width)
    traffic = x.nbytes + weight.nbytes + positions * outputs * x.itemsize
    case = _beside("causal_convolution", name, ours, causal_convolution_reference, (x, weight), traffic)
    return replace(case, cost=Cost(2.0 * 27 * channels * outputs * positions, traffic))


def _interleave_phases(
    device: torch.device, dtype: torch.dtype, channels: int, images: int, height: int, width: int
) -> Case:
    y, bias = _random(device, dtype, (images, 4 * channels, height + 1, width + 1), (channels,))
    y = y.contiguous(memory_format=torch.channels_last)
    name = f"{channels} x {images} x {height} x {width}"
    traffic = 8.0 * images * channels * height * width * y.itemsize
    return _beside("interleave_phases", name, interleave_phases, interleave_phases_reference, (y, bias), traffic)


_WIDTHS: dict[str, list[tuple[int, ...]]] = {"cpu": [(37, 96), (60, 1536)], "cuda": [(1560, 1536)]}
_INNER: dict[str, list[tuple[int, ...]]] = {"cpu": [(60, 8960)], "cuda": [(1560, 8960)]}

# op -> its maker, and its shapes for each device: small on a processor, Wan 1.3B at 832x480 on a GPU.
SHAPES: dict[str, tuple[Callable[..., Case], dict[str, list[tuple[int, ...]]]]] = {
    "norm_modulate": (_norm_modulate, _WIDTHS),
    "norm_modulate_quantize": (_norm_modulate_quantize, _WIDTHS),
    "gate_residual": (_gate_residual, _WIDTHS),
    "gelu_quantize": (_gelu_quantize, _INNER),
    "linear_gelu": (_linear_gelu, {"cpu": [(60, 256, 96)], "cuda": [(1560, 8960, 1536)]}),
    "quantize_per_token": (_quantize_per_token, _WIDTHS),
    "qk_norm_rope_write": (
        _qk_norm_rope_write,
        {"cpu": [(4, 32, 8, 8, 4), (12, 128, 6, 10, 4)], "cuda": [(12, 128, 30, 52, 4)]},
    ),
    "solver_step": (_solver_step, {"cpu": [(12, 20)], "cuda": [(60, 104)]}),
    "unipc_step": (_unipc_step, {"cpu": [(12, 20)], "cuda": [(60, 104)]}),
    "fp8_linear": (
        _fp8_linear,
        {
            "cpu": [(60, 128, 256)],
            "cuda": [(1560, 4608, 1536), (1560, 1536, 1536), (1560, 8960, 1536), (1560, 1536, 8960)],
        },
    ),
    "vae_norm_silu": (
        _vae_norm_silu,
        {
            "cpu": [(32, 2, 16, 16, 0)],
            "cuda": [(384, 2, 120, 208, 0), (96, 4, 480, 832, 0), (96, 4, 480, 832, 1)],
        },
    ),
    "causal_convolution": (
        _causal_convolution,
        {"cpu": [(32, 96, 2, 6, 10), (32, 3, 1, 6, 10)], "cuda": [(96, 96, 4, 480, 832), (96, 3, 4, 480, 832)]},
    ),
    "interleave_phases": (
        _interleave_phases,
        {"cpu": [(32, 2, 8, 8)], "cuda": [(192, 4, 120, 208), (96, 4, 240, 416)]},
    ),
    "bias_residual": (_bias_residual, {"cpu": [(32, 2, 16, 16)], "cuda": [(192, 4, 240, 416)]}),
}
