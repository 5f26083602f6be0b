"""The transformer's blocks on fused kernels: engine/model/layers.py in as few passes over memory as possible.

Weights are those of a WanTransformer. In fp8 the large products run on e4m3: weights with one scale an output
channel, quantised here once, activations with one scale a token, quantised by the kernel that makes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.cache import CachedAttention
from engine.model.layers import Attention, Block
from engine.model.transformer import TextKV, WanTransformer
from kernels.fp8_linear import fp8_linear
from kernels.gate_residual import gate_residual
from kernels.gelu_quantize import gelu, gelu_quantize
from kernels.linear_gelu import linear_gelu
from kernels.norm_modulate import (
    layer_norm_affine,
    layer_norm_affine_quantize,
    norm_modulate,
    norm_modulate_quantize,
)
from kernels.qk_norm_rope_write import qk_norm_rope_write, qk_norm_rope_write_fp8
from kernels.quantize import quantize_per_channel, quantize_per_token
from kernels.ring_attention import ring_attention
from kernels.ring_attention_fp8 import ring_attention_fp8
from kernels.rms_norm import rms_norm


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b, weight [N, K] in the working dtype."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, plain: Callable[..., Tensor], quantize: Callable[..., Any], *args: Any) -> Tensor:
        """The product of plain(*args) [B, n, K]."""
        return F.linear(plain(*args), self.weight, self.bias)


@dataclass(frozen=True)
class Fp8Linear:
    """The same on e4m3 weight [N, K] with float32 scale [N, 1]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __call__(self, plain: Callable[..., Tensor], quantize: Callable[..., Any], *args: Any) -> Tensor:
        """The product of quantize(*args), which is plain(*args) as e4m3 [B * n, K] and scales [B * n, 1]."""
        values, scales = quantize(*args)
        out = fp8_linear(values, scales, self.weight, self.scale, self.bias)
        return out.unflatten(0, (args[0].shape[0], -1))  # the first argument is the activation [B, n, ...]


class FusedBlock:
    """One transformer block."""

    def __init__(self, block: Block, name: str, fp8: bool, keep: Sequence[str]) -> None:
        """Products whose name fits a pattern of `keep`, with its role (`sdd.blocks.3.ffn.net.2`) or without, stay as
        they are; q, k and v are one product.
        """

        def product(parts: Sequence[str], weight: Tensor, bias: Tensor | None) -> Linear | Fp8Linear:
            names = [f"{name}.{part}" for part in parts]
            names += [name.partition(".")[2] for name in names]  # without the role
            if not fp8 or any(fnmatchcase(name, pattern) for name in names for pattern in keep):
                return Linear(weight, bias)
            values, scale = quantize_per_channel(weight)
            return Fp8Linear(values, scale, bias)

        def linear(part: str, module: torch.nn.Module) -> Linear | Fp8Linear:
            module = cast(torch.nn.Linear, module)
            return product([part], module.weight, module.bias)

        first, cross, ffn = block.attn1, block.attn2, block.ffn
        self.qkv = product(["attn1.to_q", "attn1.to_k", "attn1.to_v"], *first.fused())
        self.out = linear("attn1.to_out.0", first.to_out[0])
        self.cross_q = linear("attn2.to_q", cross.to_q)
        self.cross_out = linear("attn2.to_out.0", cross.to_out[0])
        self.up = linear("ffn.net.0.proj", cast(Any, ffn.net[0]).proj)
        self.down = linear("ffn.net.2", ffn.net[2])
        self.attn1: Attention = first
        self.attn2: Attention = cross
        self.norm2, self.eps = block.norm2, block.norm1.eps
        # Static scales of fp8 attention, one a head: after their norms q and k fit e4m3 as they are, and so does v.
        self.unit = torch.ones(first.heads, device=first.to_q.weight.device)

    def __call__(
        self, x: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor, cos: Tensor, sin: Tensor,
        layer: int, past: CachedAttention,
    ) -> Tensor:  # fmt: skip
        """x [B, F * n, dim], modulation [B, F, 6, dim] with the block's own table added, text [B, rows, heads, d]."""
        shift, scale, gate_sa, shift_ff, scale_ff, gate_ff = modulation.unsqueeze(3).unbind(2)
        qkv = self.qkv(norm_modulate, norm_modulate_quantize, x, shift, scale, self.eps)
        y = self.out(_same, quantize_per_token, self._self_attention(qkv, cos, sin, layer, past).flatten(2))
        x = gate_residual(x, y, gate_sa)

        q = self._cross_query(x)
        q = rms_norm(q, self.attn2.norm_q.weight, self.attn2.norm_q.eps).unflatten(-1, (self.attn2.heads, -1))
        attended = ring_attention(q, text_k, text_v, text_k.shape[1]).flatten(2)
        x = x + self.cross_out(_same, quantize_per_token, attended)

        return gate_residual(x, self._feed_forward(x, shift_ff, scale_ff), gate_ff)

    def _feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        up, down = self.up, self.down
        if isinstance(up, Linear) and isinstance(down, Linear) and up.bias is not None:
            inner = linear_gelu(norm_modulate(x, shift, scale, self.eps), up.weight, up.bias)
            return down(_same, quantize_per_token, inner)
        return down(gelu, gelu_quantize, up(norm_modulate, norm_modulate_quantize, x, shift, scale, self.eps))

    def _cross_query(self, x: Tensor) -> Tensor:
        norm = self.norm2
        if isinstance(norm, torch.nn.LayerNorm):
            return self.cross_q(layer_norm_affine, layer_norm_affine_quantize, x, norm.weight, norm.bias, norm.eps)
        return self.cross_q(_same, quantize_per_token, x)

    def _self_attention(self, qkv: Tensor, cos: Tensor, sin: Tensor, layer: int, past: CachedAttention) -> Tensor:
        """qkv [B, n, 3 * dim] -> [B, n, heads, d]; keys and values go to the cache."""
        norms = self.attn1.norm_q.weight, self.attn1.norm_k.weight
        k, v = past.cache.view(layer)
        if not past.cache.fp8:
            q = qk_norm_rope_write(qkv, *norms, cos, sin, k, v, past.start_row, self.attn1.norm_q.eps)
            return ring_attention(q, k, v, past.valid_rows)
        one = self.unit
        q = qk_norm_rope_write_fp8(
            qkv, *norms, cos, sin, k, v, one, one, one, past.start_row, self.attn1.norm_q.eps
        )  # fmt: skip
        return ring_attention_fp8(q, k, v, one, one, one, past.valid_rows)


class FusedTransformer:
    """A WanTransformer whose blocks run on the fused kernels; called as one, its `attend` being CachedAttention."""

    def __init__(self, model: WanTransformer, fp8: bool = False, keep: Sequence[str] = (), role: str = "dit") -> None:
        """fp8: large products on e4m3, except those whose name fits a pattern of `keep` (see FusedBlock)."""
        self.model, self.fp8 = model, fp8
        self.blocks = [
            FusedBlock(cast(Block, block), f"{role}.blocks.{i}", fp8, keep) for i, block in enumerate(model.blocks)
        ]
        self._tables = torch.stack([cast(Block, block).scale_shift_table for block in model.blocks])[:, None]

    @property
    def fp8_bytes(self) -> int:
        """Bytes of the e4m3 weights and scales that stand beside the model's own."""
        products = (product for block in self.blocks for product in vars(block).values())
        return sum(p.weight.nbytes + p.scale.nbytes for p in products if isinstance(p, Fp8Linear))

    def encode(
        self, latent: Tensor, t: Tensor, text_kv: TextKV, cos: Tensor, sin: Tensor, attend: CachedAttention,
        c_f: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As WanTransformer.encode."""
        hidden, embedding, modulation = self.model.embed(latent, t, c_f)
        hidden, tables = hidden.contiguous(), self._tables + modulation  # [layers, B, F, 6, dim]
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, tables[layer], text_kv[0][layer], text_kv[1][layer], cos, sin, layer, attend)
        return hidden, embedding

    def __call__(
        self, latent: Tensor, t: Tensor, text_kv: TextKV, cos: Tensor, sin: Tensor, attend: CachedAttention,
        c_f: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As WanTransformer.forward."""
        hidden, embedding = self.encode(latent, t, text_kv, cos, sin, attend, c_f)
        return self.model.head(hidden, embedding, latent)


def _same(x: Tensor) -> Tensor:
    return x
