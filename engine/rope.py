"""Rotary position tables of Wan: head dim split into time, height and width, interleaved pairs, theta 1e4.

Angles are computed in float64 for any integer position, so there is no table to run out of.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def _angles(positions: Tensor, dim: int) -> Tensor:
    """positions [n] -> angles [n, dim / 2], float64."""
    frequencies = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return positions.to(torch.float64)[:, None] * frequencies


@lru_cache(maxsize=16)
def _spatial_angles(height: int, width: int, dim: int) -> Tensor:
    """Angles of one frame's height and width parts: [height * width, dim], float64."""
    rows = _angles(torch.arange(height), dim)[:, None].expand(-1, width, -1)
    columns = _angles(torch.arange(width), dim)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def rope_tables(positions: Sequence[int], height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin for frames at the given temporal positions, each float32 [F * height * width, head_dim / 2].

    height and width count tokens. The split is head_dim - 4 * (head_dim // 6) for time and
    2 * (head_dim // 6) for each of height and width (128 -> 44, 42, 42), as in Wan2.1.
    """
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"got head_dim {head_dim}, expected an even number")
    spatial_dim = 2 * (head_dim // 6)
    time = _angles(torch.tensor(list(positions), dtype=torch.float64), head_dim - 2 * spatial_dim)
    space = _spatial_angles(height, width, spatial_dim)
    angles = torch.cat(
        [time[:, None].expand(-1, len(space), -1), space[None].expand(len(time), -1, -1)], dim=-1
    ).flatten(0, 1)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [B, n, heads, d] by cos, sin [n, d / 2]; float32 inside, x's dtype out."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
