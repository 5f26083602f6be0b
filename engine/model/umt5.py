"""UMT5's encoder, with the parameter names of transformers' UMT5EncoderModel without its `encoder.` prefix.

It is here because importing transformers' model takes as long as the rest of a start. Tests hold it to transformers'.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import MOST, MOST_LAYERS
from engine.model.scaled_linear import dtype_of
from engine.options import read


@dataclass(frozen=True)
class UMT5Config:
    """Shape of an encoder, with the keys of text_encoder/config.json; the defaults are UMT5-xxl's."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(f"text encoder: got feed_forward_proj {self.feed_forward_proj!r}, expected 'gated-gelu'")
        sizes = (self.vocab_size, self.d_model, self.d_kv, self.d_ff, self.num_layers, self.num_heads)
        if min(sizes) < 1 or not self.layer_norm_epsilon > 0:
            raise ValueError(f"text encoder: got {self}, expected positive sizes")
        if max(sizes) > MOST or self.num_layers > MOST_LAYERS:
            raise ValueError(f"text encoder: got {self}, expected sizes up to {MOST} and {MOST_LAYERS} layers")
        if self.relative_attention_num_buckets < 4 or self.relative_attention_num_buckets % 4:
            raise ValueError(f"text encoder: got {self.relative_attention_num_buckets} buckets, "
                             "expected a multiple of 4")  # fmt: skip

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "UMT5Config":
        """From the contents of text_encoder/config.json. ValueError if invalid or for another model type."""
        if raw.get("model_type", "umt5") != "umt5":
            raise ValueError(f"text encoder: got model_type {raw['model_type']!r}, expected 'umt5'")
        known = {field.name for field in fields(cls)}
        return read(cls, {key: value for key, value in raw.items() if key in known}, "text encoder")


class UMT5Norm(nn.Module):
    """x / rms(x) * weight. The mean of squares is float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + self.eps)).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Attention over all rows with a learned bias by relative position, and without the scale 1 / sqrt(d)."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.heads, width = config.num_heads, config.num_heads * config.d_kv
        self.buckets, self.distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.q, self.k, self.v = (nn.Linear(config.d_model, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, config.d_model, bias=False)
        # from_pretrained: the constructor would draw random numbers (see layers.modulation_table)
        self.relative_attention_bias = nn.Embedding.from_pretrained(torch.empty(self.buckets, self.heads))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x [B, rows, d_model], seen bool [B, 1, 1, rows] -> as x."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        rows = torch.arange(x.shape[1], device=x.device)
        bias = self.relative_attention_bias(self._bucket(rows[None, :] - rows[:, None])).permute(2, 0, 1)
        bias = torch.where(seen, bias, torch.finfo(bias.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))

    def _bucket(self, offset: Tensor) -> Tensor:
        """Bucket of each offset (key's row minus query's), int64: half of them exact, half logarithmic, by sign."""
        half, exact = self.buckets // 2, self.buckets // 4
        far = offset.abs()
        ratio = torch.log(far.float() / exact) / math.log(self.distance / exact)
        logarithmic = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return (offset > 0).long() * half + torch.where(far < exact, far, logarithmic)


class GatedGelu(nn.Module):
    """gelu(wi_0 x) * wi_1 x, then wo. wo may be float32 in a float16 model, whose range its product leaves."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.wi_0(x)
        # step by step, for transformers' rounding: F.gelu has another one
        gelu = 0.5 * inner * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner.pow(3.0))))
        return self.wo((gelu * self.wi_1(x)).to(dtype_of(self.wo)))


class Residual(nn.Module):
    """x + layer(norm(x)); the layer has the name that transformers gives it."""

    def __init__(self, config: UMT5Config, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.layer_norm = UMT5Norm(config.d_model, config.layer_norm_epsilon)
        self.add_module(name, layer)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return x + self.get_submodule(self.name)(self.layer_norm(x), *rest)


class Layer(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        attention = Residual(config, "SelfAttention", SelfAttention(config))
        self.layer = nn.ModuleList([attention, Residual(config, "DenseReluDense", GatedGelu(config))])

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, seen))


class UMT5Encoder(nn.Module):
    """Token ids to embeddings."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model))
        self.block = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_layer_norm = UMT5Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (1 where a row counts) int64 [B, rows] -> [B, rows, d_model]."""
        x, seen = self.embed_tokens(ids), (mask != 0)[:, None, None, :]
        for layer in self.block:
            x = layer(x, seen)
        return self.final_layer_norm(x)
