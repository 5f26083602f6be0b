"""Layers of the Wan2.1 diffusion transformer, with the parameter names of diffusers' WanTransformer3DModel.

Layers compute in the dtype of their weights, as the public streaming code does. Only normalisation statistics and
rotations are float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.model.cache import Streaming
from engine.model.quantized import Fp8Linear, linear_of, same
from engine.model.rope import apply_rope
from kernels.gate_residual import Residual
from kernels.gelu_quantize import gelu, gelu_quantize
from kernels.linear_gelu import linear_gelu
from kernels.norm_modulate import (
    Hidden,
    layer_norm_affine,
    layer_norm_affine_quantize,
    norm_modulate,
    norm_modulate_quantize,
)
from kernels.quantize import quantize_per_token
from kernels.rms_norm import rms_norm

QKV = Tensor | tuple[Tensor, Tensor, Tensor]  # one tensor [B, n, 3 * dim], or three [B, n, dim]
# (layer, q, k, v) -> out, each [B, tokens, heads, head_dim]: how a block's self-attention finds its keys.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Middle:
    """The blocks between the `first` and the `last` ones of a transformer.

    residual  [B, tokens, dim]: what they add to the hidden state of the last tokens. They write it; if they are
              `skipped`, it is added in their place
    """

    first: int
    last: int
    residual: Tensor
    skipped: bool


def dense_attention(mask: Tensor | None = None) -> Attend:
    """Self-attention among the tokens of one call. mask: bool [tokens, tokens], True where a query sees a key."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return out.transpose(1, 2)

    return attend


# Fastest first. PyTorch's own order begins with flash attention, which took 30 us of 1560 queries and 512 keys on an
# H100; ring_attention took 27 us, cuDNN 20 us.
_LIBRARY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to all of a text, whose length is fixed: a library's. q, k, v and the result [B, rows, heads, d]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(_LIBRARY, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rms_unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) over the last dimension: float32 inside, rounded to x's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """[1, rows, dim], normal with standard deviation dim**-0.5.

    Empty on the meta device: random numbers there would import torch's compiler, which takes four seconds.
    """
    shape = (1, rows, dim)
    on_meta = torch.get_default_device().type == "meta"
    return nn.Parameter(torch.empty(shape) if on_meta else torch.randn(shape) / dim**0.5)


class RMSNorm(nn.Module):
    """RMS normalisation over the full width, before the head split."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


PROJECTIONS = ("to_q", "to_k", "to_v")  # of self-attention, in the order of their joint product


class Attention(nn.Module):
    """Projections of one attention: to_q, to_k, to_v, to_out.0, norm_q, norm_k."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q: nn.Module | None = nn.Linear(dim, dim)
        self.to_k: nn.Module | None = nn.Linear(dim, dim)
        self.to_v: nn.Module | None = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.joint: nn.Module | None = None  # one product that replaces to_q, to_k and to_v
        self._fused: tuple[Tensor, Tensor] | None = None  # joint weight and bias; to_q, to_k and to_v are views of them

    def fuse(self) -> None:
        """Compute q, k, v as one product from now on. The three parameters become views of it: no memory is added.

        Call it when the weights are final: later moves or assignments do not reach the joint product.
        """
        projections: Any = (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections])
        for p, w, b in zip(projections, weight.chunk(3), bias.chunk(3), strict=True):
            p.weight, p.bias = nn.Parameter(w, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self._fused = weight, bias

    def separate(self) -> None:
        """Undo `fuse`: compute three products with the current to_q, to_k and to_v."""
        self._fused = None

    def joined_weights(self) -> tuple[Tensor, Tensor]:
        """Weight [3 * dim, dim] and bias [3 * dim] of the joint q, k, v product. ValueError before `fuse`."""
        if self._fused is None:
            raise ValueError("attention: got three projections, expected a call of fuse before")
        return self._fused

    def join(self, joint: nn.Module) -> None:
        """Replace to_q, to_k and to_v by one module [dim -> 3 * dim] and drop them."""
        self.joint, self._fused = joint, None
        self.to_q = self.to_k = self.to_v = None

    def query_key_value(self, plain: Callable[..., Tensor], quantize: Callable[..., Any], *args: Any) -> QKV:
        """q, k, v of plain(*args), not normalised: three tensors [B, n, dim], or [B, n, 3 * dim] of one product."""
        if self.joint is not None:
            return linear_of(self.joint, plain, quantize, *args)
        x = plain(*args)
        if self._fused is not None:
            return F.linear(x, *self._fused)
        return self.to_q(x), self.to_k(x), self.to_v(x)  # type: ignore[misc]

    def rotated(self, qkv: QKV, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated q and k, and v: each [B, n, heads, head_dim]."""
        q, k, v = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
        heads = (self.heads, -1)
        q, k = self.norm_q(q).unflatten(-1, heads), self.norm_k(k).unflatten(-1, heads)
        q, k = apply_rope(torch.cat([q, k], dim=2), cos, sin).chunk(2, dim=2)
        return q, k, v.unflatten(-1, heads)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of text: x [B, n, dim] -> two tensors [B, n, heads, head_dim]."""
        key = self.norm_k(self.to_k(x)).unflatten(-1, (self.heads, -1))  # type: ignore[misc]
        return key, self.to_v(x).unflatten(-1, (self.heads, -1))  # type: ignore[misc]

    def output(self, x: Tensor) -> Tensor:
        """[B, n, heads, head_dim] -> [B, n, dim]"""
        return linear_of(self.to_out[0], same, quantize_per_token, x.flatten(2))


class _GeluProjection(nn.Module):
    """Holds the first product under its published name."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj: nn.Module = nn.Linear(dim, inner)


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        # Index 1 is a dropout in the published layout; it holds no weights.
        self.net = nn.ModuleList([_GeluProjection(dim, inner), nn.Identity(), nn.Linear(inner, dim)])

    def forward(self, x: Hidden, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """Normalise x [B, F * n, dim], modulate it by shift and scale [B, F, 1, dim], apply both products."""
        up, down = cast(_GeluProjection, self.net[0]).proj, self.net[2]
        if type(up) is nn.Linear and not isinstance(down, Fp8Linear):
            return down(linear_gelu(norm_modulate(x, shift, scale, eps), up.weight, up.bias))
        inner = linear_of(up, norm_modulate, norm_modulate_quantize, x, shift, scale, eps)
        return linear_of(down, gelu, gelu_quantize, inner)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward under per-frame modulation.

    Operations of kernels/ run a kernel on a GPU. Elsewhere, and where a gradient is needed, they run their PyTorch
    definition. LoRA and 8 bits may replace Linears. The kernel before an FP8 product quantises its activation.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, eps: float, cross_attn_norm: bool) -> None:
        super().__init__()
        self.eps = eps
        self.attn1 = Attention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.attn2 = Attention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = modulation_table(6, dim)

    def forward(
        self, x: Hidden, modulation: Tensor, text_k: Tensor, text_v: Tensor, cos: Tensor, sin: Tensor,
        attend: Attend, layer: int, added: bool = False,
    ) -> Residual:  # fmt: skip
        """x [B, F * n, dim], text_k and text_v [B, rows, heads, head_dim] -> as x, not added up.

        modulation [B, F, 6, dim] is that of all blocks; with `added` this block's table is already in it.
        """
        own = modulation if added else self.scale_shift_table[:, None] + modulation
        shift, scale, gate_sa, shift_ff, scale_ff, gate_ff = own.unsqueeze(3).unbind(2)
        qkv = self.attn1.query_key_value(norm_modulate, norm_modulate_quantize, x, shift, scale, self.eps)
        x = Residual(total(x), self.attn1.output(self._self_attention(qkv, cos, sin, attend, layer)), gate_sa)

        query = self.attn2.norm_q(self._cross_query(x)).unflatten(-1, (self.attn2.heads, -1))
        x = Residual(total(x), self.attn2.output(cross_attention(query, text_k, text_v)))
        inner = self.ffn(x, shift_ff, scale_ff, self.eps)
        return Residual(total(x), inner, gate_ff)

    def _self_attention(self, qkv: QKV, cos: Tensor, sin: Tensor, attend: Attend, layer: int) -> Tensor:
        """[B, n, heads, head_dim]"""
        first = self.attn1
        if isinstance(attend, Streaming) and attend.in_kernels(len(cos)):
            joined = qkv if isinstance(qkv, Tensor) else torch.cat(qkv, dim=-1)
            return attend.fused(layer, joined, first.norm_q.weight, first.norm_k.weight, cos, sin, first.norm_q.eps)
        return attend(layer, *first.rotated(qkv, cos, sin))

    def _cross_query(self, x: Hidden) -> Tensor:
        norm, to_q = self.norm2, cast(nn.Module, self.attn2.to_q)
        if isinstance(norm, nn.LayerNorm):
            normed = norm.weight, norm.bias, norm.eps
            return linear_of(to_q, layer_norm_affine, layer_norm_affine_quantize, x, *normed)
        return linear_of(to_q, same, quantize_per_token, total(x))


def total(x: Hidden) -> Tensor:
    """The hidden state [B, F * n, dim]; computed now unless a norm has read it."""
    return x if isinstance(x, Tensor) else x.total()


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
