"""Layers of the Wan2.1 diffusion transformer, with the parameter names of diffusers' WanTransformer3DModel.

Everything runs in the dtype of its weights, as the public streaming code does; only normalisation
statistics and rotations are float32.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from engine.model.rope import apply_rope

# (layer, q, k, v) -> out, each [B, tokens, heads, head_dim]: how a block's self-attention finds its keys.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def dense_attention(mask: Tensor | None = None) -> Attend:
    """Self-attention within the given tokens; mask bool [tokens, tokens], True where a query may look."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return out.transpose(1, 2)

    return attend


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) over the last dimension: float32 inside, rounded to x's dtype before any weight."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS normalisation over the full width, before the head split."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight


class Attention(nn.Module):
    """Projections of one attention: to_q, to_k, to_v, to_out.0, norm_q, norm_k."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self._fused: tuple[Tensor, Tensor] | None = None  # weight and bias of q, k, v as one product

    def fuse(self) -> None:
        """Make q, k, v one product from now on; the three parameters become views of it, so it costs no memory.

        For weights that stay where they are: later moves or assignments are not followed.
        """
        projections = (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        for p, w, b in zip(projections, weight.chunk(3), bias.chunk(3), strict=True):
            p.weight, p.bias = nn.Parameter(w, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self._fused = weight, bias

    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight [3 * dim, dim] and bias [3 * dim] of q, k, v as one product, after `fuse`."""
        if self._fused is None:
            raise ValueError("attention: got three projections, expected a call of fuse before")
        return self._fused

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, dim] -> three of [B, n, heads, head_dim]"""
        if self._fused is None:
            return self.query(x), *self.key_value(x)
        q, k, v = F.linear(x, *self._fused).chunk(3, dim=-1)
        heads = (self.heads, -1)
        return self.norm_q(q).unflatten(-1, heads), self.norm_k(k).unflatten(-1, heads), v.unflatten(-1, heads)

    def query(self, x: Tensor) -> Tensor:
        """[B, n, dim] -> [B, n, heads, head_dim]"""
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n, dim] -> two of [B, n, heads, head_dim]"""
        key = self.norm_k(self.to_k(x)).unflatten(-1, (self.heads, -1))
        return key, self.to_v(x).unflatten(-1, (self.heads, -1))

    def output(self, x: Tensor) -> Tensor:
        """[B, n, heads, head_dim] -> [B, n, dim]"""
        return self.to_out[0](x.flatten(2))


class _GeluProjection(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        # Index 1 is a dropout in the published layout; it holds no weights.
        self.net = nn.ModuleList([_GeluProjection(dim, inner), nn.Identity(), nn.Linear(inner, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, F * n, dim] with one shift and scale [B, F, 1, dim] a frame."""
    frames = shift.shape[1]
    return (x.unflatten(1, (frames, -1)) * (1 + scale) + shift).flatten(1, 2)


def gate(x: Tensor, by: Tensor) -> Tensor:
    """x [B, F * n, dim] times one gate [B, F, 1, dim] a frame."""
    return (x.unflatten(1, (by.shape[1], -1)) * by).flatten(1, 2)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward under per-frame modulation."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, eps: float, cross_attn_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Attention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.attn2 = Attention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor, cos: Tensor, sin: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """x [B, F * n, dim], modulation [B, F, 6, dim], text_k and text_v [B, rows, heads, head_dim]."""
        shift, scale, gate_sa, shift_ff, scale_ff, gate_ff = (
            (self.scale_shift_table[:, None] + modulation).unsqueeze(3).unbind(2)
        )
        h = modulate(self.norm1(x), shift, scale)
        query, key, value = self.attn1.query_key_value(h)
        query, key = apply_rope(torch.cat([query, key], dim=2), cos, sin).chunk(2, dim=2)
        x = x + gate(self.attn1.output(attend(query, key, value)), gate_sa)

        query = self.attn2.query(self.norm2(x))
        out = F.scaled_dot_product_attention(query.transpose(1, 2), text_k.transpose(1, 2), text_v.transpose(1, 2))
        x = x + self.attn2.output(out.transpose(1, 2))
        return x + gate(self.ffn(modulate(self.norm3(x), shift_ff, scale_ff)), gate_ff)


def time_features(t: Tensor, dim: int) -> Tensor:
    """cos || sin of t / 10000^(i / half), t [...] -> float64 [..., dim]."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.to(torch.float64)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _Mlp(nn.Module):
    """linear_1, activation, linear_2."""

    def __init__(self, in_dim: int, dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class ConditionEmbedder(nn.Module):
    """Timestep and text embeddings."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = _Mlp(freq_dim, dim, F.silu)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = _Mlp(text_dim, dim, _gelu_tanh)

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B, F] in [0, 1000] -> embedding [B, F, dim], block modulation [B, F, 6, dim]."""
        embedding = self.time_embedder(time_features(t, self.freq_dim).to(self.time_proj.weight.dtype))
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))
