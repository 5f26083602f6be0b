"""What may stand in for a part of the attention, latent frame by latent frame, while a model runs.

Let m(q, j) be the mass that a query q of frame i gives frame j: the sum of its weights on the keys of j. The weights
divided by m(q, j) are its pattern inside the block (i, j). Mean and deviation of an entry (layer, head, i, j) of M are
over noise levels and prompts. A denoising pass of a stream has its own table, as the ETM has; context passes stay.

steady    entries whose deviation is at most `threshold`: m(q, j) becomes the entry's mean for every query, and the
          pattern inside the block stays. Then the row is scaled to sum 1.
varying   the same for the entries whose deviation is above `threshold`.
distant   blocks with |i - j| > `near` get mass 0, but for those on frame 0; the row is scaled to sum 1. What is left is
          the first frame and the neighbours.
constant  heads whose mean matrix M[layer, head] has a deviation above `threshold` over its entries: every weight of a
          query becomes 1 / (number of its keys). Neither masses nor patterns are left.

Heads and frames without an entry that is replaced keep the plain result, bit by bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.attention.probe import Seen, head_weights

KINDS = ("steady", "varying", "distant", "constant")
LEAST = 1e-12  # a block's mass is divided by no less


@dataclass(frozen=True)
class Table:
    """Mean and deviation of M over noise levels and prompts, [layers, heads, F, F] each; NaN where nothing is seen."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, mass: Tensor) -> "Table":
        """From M [samples, layers, heads, F, F]; one sample has no deviation, and counts as steady."""
        known = ~mass.isnan()
        count = known.sum(0)
        mean = mass.nansum(0) / count  # 0 / 0 is NaN
        square = torch.where(known, mass - mean, 0).square().sum(0) / (count - 1).clamp_min(1)
        return cls(mean, torch.where(count > 0, square.sqrt(), torch.nan))

    def of_heads(self) -> Tensor:
        """The deviation of every head's mean matrix over its entries, [layers, heads]."""
        rows = self.mean.flatten(2)
        known = ~rows.isnan()
        mean = rows.nanmean(-1, keepdim=True)
        return (torch.where(known, rows - mean, 0).square().sum(-1) / (known.sum(-1) - 1).clamp_min(1)).sqrt()


def replaced_entries(kind: str, table: Table, threshold: float, near: int) -> Tensor:
    """True for every entry that a kind replaces, [layers, heads, F, F]. ValueError for an unknown kind."""
    known = ~table.mean.isnan()
    if kind == "steady":
        return known & (table.std <= threshold)
    if kind == "varying":
        return known & (table.std > threshold)
    if kind == "distant":
        frame = torch.arange(known.shape[-1])
        return known & ((frame[:, None] - frame).abs() > near) & (frame > 0)
    if kind == "constant":
        return known & (table.of_heads() > threshold)[..., None, None]
    raise ValueError(f"replacement: got {kind!r}, expected one of {', '.join(KINDS)}")


class Replacement:
    """The watch that replaces. `levels`: the noise levels of the calls that it touches; None: all."""

    def __init__(
        self, kind: str, table: Table, levels: tuple[float, ...] | None, threshold: float = 0.02, near: int = 1
    ) -> None:
        self.kind, self.table, self.levels = kind, table, levels
        self.entries = replaced_entries(kind, table, threshold, near)

    @property
    def share(self) -> float:
        """The share of the entries that are replaced."""
        return float(self.entries.sum() / (~self.table.mean.isnan()).sum())

    @property
    def mass(self) -> float:
        """The share of the attention that lies on them, on average."""
        rows = (~self.table.mean.isnan()).any(-1).sum()
        return float(torch.where(self.entries, self.table.mean, 0).sum() / rows)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, seen: Seen) -> Tensor:
        if self.levels is not None and seen.level not in self.levels:
            return out
        tokens, keys = q.shape[1] // len(seen.queries), list(seen.keys)
        for place, frame in enumerate(seen.queries):
            rows = slice(place * tokens, (place + 1) * tokens)
            for head in range(q.shape[2]):
                entries = self.entries[layer, head, frame, keys]
                if entries.any():
                    mean = self.table.mean[layer, head, frame, keys].to(q.device)
                    own = q[:, rows, head], k[:, :, head], v[:, :, head]
                    out[:, rows, head] = self._replaced(*own, entries.to(q.device), mean).to(out.dtype)
        return out

    def _replaced(self, q: Tensor, k: Tensor, v: Tensor, entries: Tensor, mean: Tensor) -> Tensor:
        """The result of one head for the queries of one frame, [B, n, d]. entries and mean [key frames]."""
        if self.kind == "constant":
            return v.mean(1, keepdim=True).expand(-1, q.shape[1], -1)
        weights = head_weights(q, k).unflatten(-1, (len(entries), -1))  # [B, n, key frames, tokens]
        mass = weights.sum(-1)
        wanted = torch.where(entries, torch.zeros_like(mean) if self.kind == "distant" else mean, mass)
        wanted = wanted / wanted.sum(-1, keepdim=True)
        weights *= (wanted / mass.clamp_min(LEAST))[..., None]
        return weights.flatten(2) @ v.to(weights.dtype)
