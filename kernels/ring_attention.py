"""Dense attention over the valid prefix of a ring cache.

Every valid slot is attended and the cached keys already carry RoPE, so key order does not matter.
The whole operation is softmax(q k^T / sqrt(d)) v over rows [0, valid_rows): no mask, no gather, no roll.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import table
from kernels.checks import autocasts, needs_gradient
from kernels.stream_k_attention import ValidRows, attend, row_of

HEAD_DIMS = (16, 32, 64, 128)  # that the kernel supports; PyTorch computes the others


def ring_attention_reference(q: Tensor, k: Tensor, v: Tensor, valid_rows: int) -> Tensor:
    """The definition, in float64: q [B, n, heads, d], k and v [B, rows, heads, d] -> [B, n, heads, d]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k[:, :valid_rows].double()) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :valid_rows].double()).to(q.dtype)


@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, valid_rows: ValidRows, return_lse: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, valid_rows: ValidRows, return_lse: Literal[True], out: Tensor | None = None
) -> tuple[Tensor, Tensor]: ...
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, valid_rows: ValidRows, return_lse: bool = False, out: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from q to the first `valid_rows` rows of k and v; later rows are never used.

    q [B, n, heads, d]; k, v [B, rows, heads, d]; returns [B, n, heads, d] in q's dtype. With return_lse it also
    returns the natural logarithm of the softmax's denominators, [B, heads, n] float32. valid_rows may be an int32
    tensor: the host does not read it and no launch depends on it. The caller must keep it in [1, rows]. The result is
    written to `out`, contiguous or heads of a contiguous tensor, if given. Raises ValueError where shapes, dtypes or,
    for the Triton kernel, strides do not fit.
    """
    if autocasts(q):
        result, lse = _sdpa(q, k, v, valid_rows, return_lse, out)
        return (result, lse) if return_lse else result  # type: ignore[return-value]
    check_query_key_value("ring_attention", q, k, v, valid_rows)
    check_out("ring_attention", out, q, q.dtype)
    if k.shape != v.shape:
        raise ValueError(f"ring_attention: got k {list(k.shape)}, v {list(v.shape)}, expected one shape")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"ring_attention: got dtypes {q.dtype}, {k.dtype}, {v.dtype}, expected one")
    fits = q.shape[-1] in HEAD_DIMS and q.dtype in (torch.bfloat16, torch.float16) and not needs_gradient(q, k, v)
    run = table.implementation("ring_attention", q.device, fits=fits)
    result, lse = run(q, k, v, valid_rows, return_lse, out)
    return (result, lse) if return_lse else result


def check_query_key_value(what: str, q: Tensor, k: Tensor, v: Tensor, valid_rows: ValidRows) -> None:
    """Check the shapes of q and k, the devices, and valid_rows; raises ValueError."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"{what}: got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, "
                         "expected q [B, n, heads, d] and k, v [B, rows, heads, d]")  # fmt: skip
    if not q.device == k.device == v.device:
        raise ValueError(f"{what}: got devices {q.device}, {k.device}, {v.device}, expected one")
    if isinstance(valid_rows, Tensor):
        if valid_rows.numel() != 1 or valid_rows.dtype != torch.int32 or valid_rows.device != q.device:
            raise ValueError(f"{what}: got valid_rows {list(valid_rows.shape)} {valid_rows.dtype} on "
                             f"{valid_rows.device}, expected one int32 on {q.device}")  # fmt: skip
    elif not 0 < valid_rows <= k.shape[1]:
        raise ValueError(f"{what}: got valid_rows {valid_rows}, expected 1 to {k.shape[1]}")


def check_out(what: str, out: Tensor | None, q: Tensor, dtype: torch.dtype) -> None:
    """Check the tensor that receives the result; raises ValueError."""
    if out is not None and (out.shape != q.shape or out.dtype != dtype or not row_of(out)):
        raise ValueError(f"{what}: got out {list(out.shape)} {out.dtype} with strides {out.stride()}, expected "
                         f"{list(q.shape)} {dtype}, contiguous, or heads of such a tensor")  # fmt: skip


def check_dense(what: str, **tensors: Tensor) -> None:
    """Check what block descriptors need: contiguous, at an address divisible by 16; raises ValueError."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"{what}: got {name} with strides {tensor.stride()} at byte {tensor.data_ptr() % 16} "
                             "of 16, expected it contiguous and aligned")  # fmt: skip


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, valid_rows: ValidRows, return_lse: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's attention. Where valid_rows is a tensor every row is read, and the invalid ones are masked."""
    mask = None
    if isinstance(valid_rows, Tensor):
        mask = (torch.arange(k.shape[1], device=k.device) < valid_rows)[None]
        k, v = (torch.where(mask[0, :, None, None], x, 0) for x in (k, v))  # NaN times a weight of zero is NaN
    else:
        k, v = k[:, :valid_rows], v[:, :valid_rows]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    result = result if out is None else out.copy_(result)
    if not return_lse:
        return result, None
    scores = q.float() @ k.float().transpose(2, 3) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -float("inf"))
    return result, scores.logsumexp(-1)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, valid_rows: ValidRows, return_lse: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_dense("ring_attention", k=k, v=v)
    return attend(q if row_of(q) else q.contiguous(), k, v, valid_rows, None, out)


def _variants() -> Iterator[table.Variant]:
    """1536 wide, 1560 queries, 4 latent frames of keys, narrow heads as in smaller models."""
    valid_rows = torch.empty(1, dtype=torch.int32, device="meta")
    for head_dim in HEAD_DIMS:
        shape = 1536 // head_dim, head_dim
        q, k = (torch.empty(1, n, *shape, dtype=torch.bfloat16, device="meta") for n in (1560, 6240))
        yield table.Variant(f"bf16 d={head_dim}", partial(_triton, q, k, k, valid_rows, True), ("HGMMA", "UTMALDG"))


table.register("ring_attention", reference=_sdpa, triton=_triton, variants=_variants)
