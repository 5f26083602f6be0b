"""Cases of attention over a ring, in bf16 and FP8, beside every fused attention of PyTorch on the device."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.instruments.flops import Cost
from bench.operations.others import Call, Case
from kernels.ring_attention import ring_attention, ring_attention_reference
from kernels.ring_attention_fp8 import E4M3, E4M3_MAX, ring_attention_fp8, ring_attention_fp8_reference

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def _libraries(q: Tensor, k: Tensor, v: Tensor, valid_rows: int) -> dict[str, Call]:
    """The library's best case: tensors in its own layout that hold only valid rows."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k[:, :valid_rows], v[:, :valid_rows]))

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    found: dict[str, Call] = {"sdpa": plain}
    for name, backend in BACKENDS.items() if q.is_cuda else ():

        def one(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return plain()

        try:
            one()
        except RuntimeError:  # not built in, or not for this shape
            continue
        found[f"sdpa {name}"] = one
    return found


def _inputs(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, queries: int, valid_rows: int, rows: int
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """q, k, v, valid rows; later rows of k and v are NaN and must not be read. On a GPU the number is on the device."""
    made = torch.Generator().manual_seed(0)
    q = torch.randn(1, queries, heads, head_dim, generator=made).to(device, dtype)
    k, v = (torch.randn(1, rows, heads, head_dim, generator=made).to(device, dtype) for _ in range(2))
    for tensor in (k, v):
        tensor[:, valid_rows:] = float("nan")
    return q, k, v, torch.tensor(valid_rows, dtype=torch.int32, device=device) if device.type == "cuda" else valid_rows


def _cost(q: Tensor, valid_rows: int, itemsize: int) -> Cost:
    _, queries, heads, head_dim = q.shape
    work = 4.0 * queries * valid_rows * heads * head_dim
    return Cost(work, 2.0 * heads * head_dim * (itemsize * valid_rows + q.itemsize * queries), work)


def _ring_attention(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, queries: int, valid_rows: int, rows: int
) -> Case:
    q, k, v, device_rows = _inputs(device, dtype, heads, head_dim, queries, valid_rows, rows)
    return Case(
        "ring_attention", f"{queries} x {valid_rows} of {rows}, {heads} heads of {head_dim}",
        lambda: ring_attention_reference(q.double(), k.double(), v.double(), valid_rows),
        lambda: ring_attention(q, k, v, device_rows),
        _libraries(q, k, v, valid_rows), _cost(q, valid_rows, k.itemsize),
    )  # fmt: skip


def _emulated(q: Tensor, k: Tensor, v_t: Tensor, scales: list[Tensor], valid_rows: int) -> Tensor:
    """FP8 attention in eager PyTorch. Its error is the least that rounding allows; its speed does not count."""
    scale = (scales[0] * scales[1] * q.shape[-1] ** -0.5)[:, None, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k[:, :valid_rows].float()) * scale
    weights = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    out = torch.einsum("bhqk,bhdk->bqhd", weights.to(E4M3).float(), v_t[..., :valid_rows].float())
    return out / weights.sum(-1).transpose(1, 2)[..., None] * scales[2][:, None]


def _ring_attention_fp8(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, queries: int, valid_rows: int, rows: int
) -> Case:
    """FP8 attention beside fused attention in bf16, ours and the library's, on the same values."""
    q, k, v, device_rows = _inputs(device, torch.bfloat16, heads, head_dim, queries, valid_rows, rows)
    scales = [t[:, :valid_rows].float().abs().amax((0, 1, 3)) / E4M3_MAX for t in (q, k, v)]
    q8, k8, v8 = ((t.float() / scale[:, None]).to(E4M3) for t, scale in zip((q, k, v), scales, strict=True))
    v_t = torch.zeros(1, heads, head_dim, -(-rows // 16) * 16, device=device).to(E4M3)
    v_t[..., :rows] = v8.permute(0, 2, 3, 1)
    q_scale, k_scale, v_scale = scales
    wide = ((t.float() * scale[:, None]).bfloat16() for t, scale in zip((q8, k8, v8), scales, strict=True))
    q, k, v = (t.contiguous() for t in wide)
    return Case(
        "ring_attention_fp8", f"{queries} x {valid_rows} of {rows}, {heads} heads of {head_dim}",
        lambda: ring_attention_fp8_reference(q8, k8, v_t, q_scale, k_scale, v_scale, valid_rows),
        lambda: ring_attention_fp8(q8, k8, v_t, q_scale, k_scale, v_scale, device_rows),
        {
            "ring_attention bf16": lambda: ring_attention(q, k, v, device_rows), **_libraries(q, k, v, valid_rows),
            "eager fp8": lambda: _emulated(q8, k8, v_t, scales, valid_rows),
        },
        _cost(q8, valid_rows, 1), speedup=2.0,
    )  # fmt: skip


# heads, head_dim, queries, valid rows, rows: the sprites model, odd sizes, Wan 1.3B at 160x96 and 832x480.
SHAPES: dict[str, tuple[Callable[..., Case], dict[str, list[tuple[Any, ...]]]]] = {
    "ring_attention": (
        _ring_attention,
        {
            "cpu": [(4, 32, 64, 192, 256), (4, 32, 64, 1344, 1344), (3, 16, 37, 100, 111), (12, 128, 60, 240, 240)],
            "cuda": [(12, 128, 1560, 4680, 6240), (12, 128, 1560, 6240, 6240), (12, 128, 1560, 32760, 32760)],
        },
    ),
    "ring_attention_fp8": (
        _ring_attention_fp8,
        {
            "cpu": [(4, 32, 64, 192, 256), (12, 128, 60, 240, 240)],
            "cuda": [(12, 128, 1560, 4680, 6240), (12, 128, 1560, 6240, 6240)],
        },
    ),
}  # fmt: skip
