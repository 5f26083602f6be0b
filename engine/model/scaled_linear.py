"""Weights that stay in 8 bits (e4m3, e5m2 or int8, with or without scales) and are expanded where they are used.

The result has the bits of the same module with weights that were expanded beforehand. Memory holds the 8 bits and one
weight at a time in full.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_SLICE = 1 << 20  # weights that are float32 at a time


def expand(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [out, ...] in 8 bits, scale one number or [out] -> float32 [out, ...]."""
    return weight.float() * (scale.float().reshape(-1, *[1] * (weight.dim() - 1)) if weight.dim() else scale.float())


class _Scaled(nn.Module):
    """weight [rows, columns] in 8 bits; scale float32 [1, 1] or [rows, 1], None for weights without; `dtype` of use."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", None if scale is None else scale.float().reshape(-1, 1))

    def expanded(self) -> Tensor:
        """The weight in full, [rows, columns] of `dtype`."""
        if self.scale is None:
            return self.weight.to(self.dtype)
        whole = self.weight.new_empty(self.weight.shape, dtype=self.dtype)
        rows = max(1, _SLICE // self.weight.shape[1])
        scales = self.scale.expand(len(self.weight), 1)
        for out, part, scale in zip(whole.split(rows), self.weight.split(rows), scales.split(rows), strict=True):
            out.copy_(expand(part, scale))
        return whole


class ScaledLinear(_Scaled):
    """Replaces a Linear without bias: y = x W^T."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]"""
        return F.linear(x, self.expanded())


class ScaledEmbedding(_Scaled):
    """Replaces an Embedding; expands only the rows that are looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., columns]"""
        # indexing copies bits, which not every device does for e4m3
        rows = self.weight.view(torch.uint8)[ids.flatten()].view(self.weight.dtype)
        if self.scale is not None:
            rows = expand(rows, self.scale if len(self.scale) == 1 else self.scale[ids.flatten()])
        return rows.to(self.dtype).unflatten(0, ids.shape)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype in which a Linear or ScaledLinear computes."""
    if isinstance(layer, ScaledLinear):
        return layer.dtype
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def expanded(module: M) -> M:
    """The module with every 8-bit weight expanded for good, in place; export traces it."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, _Scaled):
            path, _, leaf = name.rpartition(".")
            rows, columns = layer.weight.shape
            with torch.device("meta"):
                plain = nn.Linear(columns, rows, bias=False) if isinstance(layer, ScaledLinear) else None
                plain = plain or nn.Embedding.from_pretrained(torch.empty(rows, columns))
            plain.weight = nn.Parameter(layer.expanded(), requires_grad=False)
            setattr(module.get_submodule(path), leaf, plain.eval())
    return module
