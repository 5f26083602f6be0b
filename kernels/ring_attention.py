"""Dense attention over the valid prefix of a ring cache.

Every valid slot is attended and RoPE is baked into the cached keys, so key order does not matter and
the whole operation is softmax(q k^T / sqrt(d)) v over rows [0, valid_rows): no mask, no gather, no roll.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ring_attention_reference(q: Tensor, k: Tensor, v: Tensor, valid_rows: int) -> Tensor:
    """The definition, in float64: q [B, n, heads, d], k and v [B, rows, heads, d] -> [B, n, heads, d]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k[:, :valid_rows].double()) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :valid_rows].double()).to(q.dtype)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, valid_rows: int) -> Tensor:
    """Attend from q to the first `valid_rows` rows of k and v; rows behind them are never read.

    q [B, n, heads, d]; k, v [B, rows, heads, d]; returns [B, n, heads, d] in q's dtype.
    Raises ValueError where shapes or dtypes do not fit.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"ring_attention: got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, "
                         "expected q [B, n, heads, d] and k, v [B, rows, heads, d]")  # fmt: skip
    if not 0 < valid_rows <= k.shape[1]:
        raise ValueError(f"ring_attention: got valid_rows {valid_rows}, expected 1 to {k.shape[1]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"ring_attention: got dtypes {q.dtype}, {k.dtype}, {v.dtype}, expected one")
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k[:, :valid_rows].transpose(1, 2), v[:, :valid_rows].transpose(1, 2)
    )
    return out.transpose(1, 2)
