"""ring_attention on e4m3 keys and values: half the traffic, twice the rate of the tensor cores.

FP8 products read both operands along the summed dimension. So values are cached transposed, [B, heads, d, pitch]:
a cache row is a column. Each tensor has one scale per head, which turns e4m3 back into the value: x = scale * x8.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from kernels import table
from kernels.ring_attention import check_dense, check_out, check_query_key_value, ring_attention_reference
from kernels.stream_k_attention import ValidRows, attend

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
HEAD_DIMS = (32, 64, 128)  # that the kernel supports; FP8 products take 32 numbers at a time


def ring_attention_fp8_reference(
    q: Tensor, k: Tensor, v_t: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, valid_rows: int
) -> Tensor:
    """The definition, in float64, on the dequantised e4m3 numbers -> float64 [B, n, heads, d]."""
    if q.dtype != E4M3:
        q = (q.float() / q_scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    v = v_t[..., :valid_rows].double().permute(0, 3, 1, 2)
    q, k, v = (x.double() * s.double()[:, None] for x, s in ((q, q_scale), (k[:, :valid_rows], k_scale), (v, v_scale)))
    return ring_attention_reference(q, k, v, valid_rows)


@overload
def ring_attention_fp8(
    q: Tensor, k: Tensor, v_t: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, valid_rows: ValidRows,
    return_lse: Literal[False] = False, out: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def ring_attention_fp8(
    q: Tensor, k: Tensor, v_t: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, valid_rows: ValidRows,
    return_lse: Literal[True], out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def ring_attention_fp8(
    q: Tensor, k: Tensor, v_t: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, valid_rows: ValidRows,
    return_lse: bool = False, out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from q to the first `valid_rows` rows of k and columns of v_t; later ones are never used.

    q [B, n, heads, d] e4m3, or bf16 (the kernel divides it by q_scale and rounds it to e4m3); k [B, rows, heads, d]
    e4m3; v_t [B, heads, d, pitch] e4m3, pitch >= rows a multiple of 16; scales [heads] float32 on the device.
    Returns [B, n, heads, d] bf16 (in `out`, contiguous, if given), and with return_lse [B, heads, n] float32. Raises
    ValueError as ring_attention does.
    """
    what = "ring_attention_fp8"
    check_query_key_value(what, q, k, v_t, valid_rows)
    check_out(what, out, q, torch.bfloat16)
    batch, rows, heads, head_dim = k.shape
    if v_t.shape[:3] != (batch, heads, head_dim) or v_t.shape[3] < rows or v_t.shape[3] % 16:
        raise ValueError(f"{what}: got v_t {list(v_t.shape)}, expected [{batch}, {heads}, {head_dim}, pitch], "
                         f"pitch a multiple of 16 and at least {rows}")  # fmt: skip
    if q.dtype not in (E4M3, torch.bfloat16) or not k.dtype == v_t.dtype == E4M3:
        raise ValueError(f"{what}: got dtypes {q.dtype}, {k.dtype}, {v_t.dtype}, expected {E4M3} (q: or bfloat16)")
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if scale.shape != (heads,) or scale.dtype != torch.float32 or scale.device != q.device:
            raise ValueError(f"{what}: got {name} {list(scale.shape)} {scale.dtype} on {scale.device}, "
                             f"expected [{heads}] float32 on {q.device}")  # fmt: skip
    run = table.implementation(what, q.device, fits=head_dim in HEAD_DIMS)
    result, lse = run(q, k, v_t, (q_scale, k_scale, v_scale), valid_rows, return_lse, out)
    return (result, lse) if return_lse else result


Scales = tuple[Tensor, Tensor, Tensor]


def _dequantised(
    q: Tensor,
    k: Tensor,
    v_t: Tensor,
    scales: Scales,
    valid_rows: ValidRows,
    return_lse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """ring_attention's own reference on bf16 copies: for processors and comparison, not for speed."""
    if q.dtype != E4M3:
        q = (q.float() / scales[0][:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    v = v_t[..., : k.shape[1]].permute(0, 3, 1, 2)
    wide = ((x.float() * s[:, None]).to(torch.bfloat16) for x, s in zip((q, k, v), scales, strict=True))
    reference = table.OPS["ring_attention"].implementations["reference"]
    return reference(*wide, valid_rows, return_lse, out)


def _triton(
    q: Tensor,
    k: Tensor,
    v_t: Tensor,
    scales: Scales,
    valid_rows: ValidRows,
    return_lse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_dense("ring_attention_fp8", k=k, v_t=v_t)
    return attend(q.contiguous(), k, v_t, valid_rows, scales, out)


def _variants() -> Iterator[table.Variant]:
    """1536 wide, 1560 queries in either precision, 4 latent frames of keys."""

    def meta(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for head_dim in HEAD_DIMS:
        heads = 1536 // head_dim
        k, v_t = meta(1, 6240, heads, head_dim), meta(1, heads, head_dim, 6240)
        scale, valid_rows = meta(heads, dtype=torch.float32), meta(1, dtype=torch.int32)
        for dtype in (E4M3, torch.bfloat16):
            q = meta(1, 1560, heads, head_dim, dtype=dtype)
            call = partial(_triton, q, k, v_t, (scale, scale, scale), valid_rows, True)
            yield table.Variant(f"q {dtype} d={head_dim}", call, ("QGMMA", "UTMALDG"))


table.register("ring_attention_fp8", reference=_dequantised, triton=_triton, variants=_variants)
