"""Rotary position tables of Wan: head dim split into time, height and width, interleaved pairs, theta 1e4.

Angles are computed in float64 for any integer position, so positions have no upper limit.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0
# Later callers reuse these tables, so they must not depend on one caller's `with torch.device(...)`.
_CPU = torch.device("cpu")


@lru_cache(maxsize=16)
def _frequencies(dim: int) -> Tensor:
    """[dim / 2], float64"""
    return THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=_CPU) / dim)


def _cos_sin(positions: Tensor, dim: int) -> Tensor:
    """positions [n] -> cos and sin, [2, n, dim / 2], float32 from float64 angles."""
    angles = positions[:, None] * _frequencies(dim)
    return torch.stack([angles.cos(), angles.sin()]).float()


@lru_cache(maxsize=16)
def _spatial(height: int, width: int, dim: int) -> Tensor:
    """cos and sin of one frame's height and width parts: [2, height * width, dim], float32."""
    rows = _cos_sin(torch.arange(height, dtype=torch.float64, device=_CPU), dim)[:, :, None].expand(-1, -1, width, -1)
    columns = _cos_sin(torch.arange(width, dtype=torch.float64, device=_CPU), dim)[:, None].expand(-1, height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(1, 2)


def rope_tables(positions: Sequence[int], height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin for frames at temporal `positions`, each float32 [F * height * width, head_dim / 2].

    height and width count tokens. As in Wan2.1, time takes head_dim - 4 * (head_dim // 6) of the head dim. Height and
    width take 2 * (head_dim // 6) each (128 -> 44, 42, 42).
    """
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"got head_dim {head_dim}, expected an even number")
    spatial_dim = 2 * (head_dim // 6)
    # Only the temporal part changes from chunk to chunk.
    space = _spatial(height, width, spatial_dim)[:, None]
    time = _cos_sin(torch.tensor(list(positions), dtype=torch.float64, device=_CPU), head_dim - 2 * spatial_dim)[
        :, :, None
    ]
    tables = torch.cat(
        [time.expand(-1, -1, space.shape[2], -1), space.expand(-1, time.shape[1], -1, -1)], dim=-1
    ).flatten(1, 2)
    return tables[0], tables[1]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [B, n, heads, d] by cos, sin [n, d / 2] in float32; returns x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
