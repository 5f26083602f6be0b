"""Preallocated key/value cache whose slots are latent frames.

Slots fill in order, so the valid ones are always a prefix. Pinned slots (attention sinks) are filled first
and never written again; after that writing goes round the rest. Softmax ignores key order, so a reader
attends to rows [0, valid * tokens) and nothing is ever moved.
"""

import torch
from torch import Tensor


class RingCache:
    """K and V, each [layers, B, slots, tokens, heads, head_dim]; RoPE is already applied to K.

    `write` stages a chunk in the slots that the next commit will own; only `commit` publishes them. A chunk
    that is written again, or never committed, therefore changes nothing that a later chunk reads.
    """

    def __init__(
        self, layers: int, batch: int, slots: int, tokens: int, heads: int, head_dim: int,
        pinned: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if not 0 <= pinned < slots:
            raise ValueError(f"got {pinned} pinned of {slots} slots, expected at least one that is not pinned")
        self.slots, self.tokens, self.pinned = slots, tokens, pinned
        shape = (layers, batch, slots, tokens, heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.committed = 0  # latent frames published since the last reset

    def reset(self) -> None:
        """Forget every frame; the memory stays."""
        self.committed = 0

    @property
    def next_slot(self) -> int:
        """Slot that the next frame goes to."""
        return self._slot_of(self.committed)

    def valid(self, frames: int) -> int:
        """Valid slots once `frames` more frames have been written."""
        return min(self.committed + frames, self.slots)

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer as rows: [B, slots * tokens, heads, head_dim], no copy."""
        return self.k[layer].flatten(1, 2), self.v[layer].flatten(1, 2)

    def write(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Put whole frames, k and v [B, frames * tokens, heads, head_dim], into slots from `slot` on.

        Runs past the last slot continue behind the pinned ones, so a chunk may wrap.
        """
        frames = k.shape[1] // self.tokens
        if frames * self.tokens != k.shape[1] or frames > self.slots:
            raise ValueError(f"got {k.shape[1]} rows, expected whole frames of {self.tokens}, at most {self.slots}")
        done = 0
        while done < frames:
            run = min(frames - done, self.slots - slot)
            rows = slice(done * self.tokens, (done + run) * self.tokens)
            self.k[layer, :, slot : slot + run].flatten(1, 2).copy_(k[:, rows])
            self.v[layer, :, slot : slot + run].flatten(1, 2).copy_(v[:, rows])
            done += run
            slot = self.pinned

    def copy(self, source: int, target: int, frames: int) -> None:
        """Copy whole slots of all layers from `source` on to `target` on."""
        for tensor in (self.k, self.v):
            tensor[:, :, target : target + frames].copy_(tensor[:, :, source : source + frames])

    def commit(self, frames: int) -> None:
        """Publish the `frames` frames written last."""
        self.committed += frames

    def _slot_of(self, frame: int) -> int:
        if frame < self.slots:
            return frame
        return self.pinned + (frame - self.pinned) % (self.slots - self.pinned)
