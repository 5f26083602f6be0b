"""Preallocated key/value cache whose slots are latent frames.

Slots fill in order, so the valid ones are always a prefix. The cache fills the attention sink's slots first and never
writes them again; the other slots form a ring. Softmax ignores key order, so a reader attends to rows
[0, valid * tokens) and the cache never moves a key.

Where a preset has local heads, their keys lie in a smaller ring of their own, `local`. The transformer has them after
the other heads (WanTransformer.order_heads), so both groups are slices of q, k and v.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import LocalHeads
from kernels.qk_norm_rope_write import qk_norm_rope_write, qk_norm_rope_write_fp8
from kernels.ring_attention import ring_attention
from kernels.ring_attention_fp8 import ring_attention_fp8
from kernels.table import has_kernel

FP8 = torch.float8_e4m3fn


class RingCache:
    """K and V, each [layers, B, slots, tokens, heads, head_dim]; RoPE is already applied to K.

    Where layers differ in their number of heads, k and v are lists of one tensor per layer. `local` is the ring of the
    local heads, where there are some; whatever happens to the frames of the one happens to those of the other.

    In FP8 (dtype e4m3) V is stored transposed, [layers, B, heads, head_dim, pitch], as FP8 matrix units need it. pitch
    is slots * tokens rounded up to 16. Only the fused kernels write such a cache.

    `write` stages a chunk in the slots that the next commit will own; only `commit` publishes them. So a chunk
    that is written twice, or never committed, changes nothing that a later chunk reads.

    `residual` [batch, residual, heads * head_dim] is what a preset's `reuse` keeps of the current chunk's last full
    step; without `reuse` it is None.

    The constructor raises ValueError unless 0 <= attn_sink < slots, and for local heads in FP8.
    """

    def __init__(
        self, layers: int, batch: int, slots: int, tokens: int, heads: int | Sequence[int], head_dim: int,
        attn_sink: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
        local: LocalHeads | None = None, residual: int = 0,
    ) -> None:  # fmt: skip
        if not 0 <= attn_sink < slots:
            raise ValueError(f"cache: got attn_sink {attn_sink} of {slots} slots, expected at least one slot beside it")
        self.slots, self.tokens, self.attn_sink = slots, tokens, attn_sink
        self.fp8 = dtype == FP8
        if self.fp8 and local is not None:
            raise ValueError("heads: got keys in FP8, expected bf16, fp16 or fp32 beside local heads")
        every = (heads,) * layers if isinstance(heads, int) else tuple(heads)
        narrow = (0,) * layers if local is None else local.counts
        self.heads = tuple(all_heads - few for all_heads, few in zip(every, narrow, strict=True))  # of every layer
        pitch = (slots * tokens + 15) // 16 * 16
        shapes = [(batch, slots, tokens, count, head_dim) for count in self.heads]
        transposed = [(batch, count, head_dim, pitch) for count in self.heads]
        self.k = _layered(shapes, dtype, device)
        self.v = _layered(transposed if self.fp8 else shapes, dtype, device)
        self.local: RingCache | None = None
        if local is not None:
            own = batch, local.window, tokens, narrow, head_dim, local.attn_sink, dtype, device
            self.local = RingCache(layers, *own)
        self.capacity, self.device = slots, self.k[0].device
        self.committed = 0  # latent frames published since the last reset
        # FP8 attention uses a static scale of 1 per head: normalised q and k fit e4m3 unscaled, and so does v.
        self.unit = torch.ones(self.heads[0], device=device) if self.fp8 else None
        kept, hidden = (batch, residual, every[0] * head_dim), torch.bfloat16 if self.fp8 else dtype
        self.residual = torch.zeros(kept, dtype=hidden, device=device) if residual else None

    @property
    def rings(self) -> "tuple[RingCache, ...]":
        """This ring, and that of the local heads."""
        return (self,) if self.local is None else (self, self.local)

    @cached_property
    def address(self) -> int:
        """Tells caches apart that are in memory at one time; a layer without heads has no address of its own."""
        return max(part.data_ptr() for ring in self.rings for part in ring.k)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of the residual."""
        kept = 0 if self.residual is None else self.residual.nbytes
        return kept + sum(part.nbytes for ring in self.rings for side in (ring.k, ring.v) for part in side)

    def limit(self, slots: int) -> None:
        """Use the first `slots` slots alone, at most as many as there is memory for. What they hold stays as it is."""
        for ring in self.rings:
            ring.slots = min(slots, ring.capacity)

    def reset(self) -> None:
        """Forget every frame; keep the memory."""
        self.rewind(0)

    @property
    def next_slot(self) -> int:
        """Slot of the next frame."""
        return self._slot_of(self.committed)

    def valid(self, frames: int) -> int:
        """Number of valid slots after `frames` more frames are written."""
        return min(self.committed + frames, self.slots)

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer as rows, [B, slots * tokens, heads, head_dim], without a copy; in FP8 V as stored."""
        return self.k[layer].flatten(1, 2), self.v[layer] if self.fp8 else self.v[layer].flatten(1, 2)

    def write(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Write whole frames, k and v [B, frames * tokens, heads, head_dim], starting at `slot`.

        A chunk may wrap: frames past the last slot continue after the attention sink. Raises ValueError for an FP8
        cache, for partial frames, and for more frames than slots.
        """
        if self.fp8:
            raise ValueError("cache: got a chunk that the fused kernels cannot write (it wraps), "
                             "expected one that fits, or attention in bf16")  # fmt: skip
        frames = k.shape[1] // self.tokens
        if frames * self.tokens != k.shape[1] or frames > self.slots:
            raise ValueError(f"got {k.shape[1]} rows, expected whole frames of {self.tokens}, at most {self.slots}")
        done = 0
        while done < frames:
            run = min(frames - done, self.slots - slot)
            rows = slice(done * self.tokens, (done + run) * self.tokens)
            self.k[layer][:, slot : slot + run].flatten(1, 2).copy_(k[:, rows])
            self.v[layer][:, slot : slot + run].flatten(1, 2).copy_(v[:, rows])
            done += run
            slot = self.attn_sink

    def slots_from(self, slot: int, frames: int) -> list[Tensor]:
        """Views of K and V in `frames` slots of every layer, the first of them `slot`; not those of local heads."""
        own, columns = slice(slot, slot + frames), slice(slot * self.tokens, (slot + frames) * self.tokens)
        values = [v[..., columns] if self.fp8 else v[:, own] for v in self.v]  # in FP8 V's slots are columns
        return [*(k[:, own] for k in self.k), *values]

    def full(self, frames: int) -> bool:
        """Whether `frames` more frames are written over older ones, of any head."""
        return any(ring.committed + frames > ring.slots for ring in self.rings)

    def commit(self, frames: int) -> None:
        """Publish the last `frames` frames written."""
        self.rewind(self.committed + frames)

    def rewind(self, frames: int) -> None:
        """Publish the first `frames` frames since the last reset, and no others. Repeating it changes nothing."""
        for ring in self.rings:
            ring.committed = frames

    def _slot_of(self, frame: int) -> int:
        if frame < self.slots:
            return frame
        return self.attn_sink + (frame - self.attn_sink) % (self.slots - self.attn_sink)


def _layered(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device | str
) -> Tensor | list[Tensor]:
    """Zeros of one allocation: [layers, *shape] where all shapes are the same, else a tensor per layer."""
    if len(set(shapes)) == 1:
        return torch.zeros((len(shapes), *shapes[0]), dtype=dtype, device=device)
    sizes = [prod(shape) for shape in shapes]
    whole = torch.zeros(sum(sizes), dtype=dtype, device=device)
    ends = accumulate(sizes)
    return [whole[end - size : end].view(shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)]


@dataclass(frozen=True)
class CachedAttention:
    """Self-attention over a cache: writes keys and values starting at `slot`, then attends to `valid` slots.

    Call it with (layer, q, k, v), each [B, tokens, heads, head_dim]. If `in_kernels` is true, call `fused` with the
    qkv product instead. slot and valid are ints, or int32 scalars on the device that a CUDA graph reads on every
    replay.
    """

    cache: RingCache
    slot: int | Tensor
    valid: int | Tensor

    def in_kernels(self, tokens: int) -> bool:
        """Whether a kernel takes a chunk's qkv product straight into the ring and to attention.

        True in FP8, where such a kernel exists, and for a slot on the device; false for a chunk that wraps. A device
        slot is not checked: the caller must ensure that the chunk does not wrap.
        """
        if isinstance(self.slot, Tensor):
            return True
        wraps = self.slot + tokens // self.cache.tokens > self.cache.slots
        return not wraps and (self.cache.fp8 or has_kernel("qk_norm_rope_write", self.cache.device))

    def fused(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend from qkv [B, n, 3 * dim], not normalised; write K and V to the ring.

        Returns [B, n, heads, d], in `out` if given.
        """
        k, v = self.cache.view(layer)
        norms = q_weight, k_weight, cos, sin, k, v
        if not self.cache.fp8:
            q = qk_norm_rope_write(qkv, *norms, self.start_row, eps)
            return ring_attention(q, k, v, self.valid_rows, out=out)
        one = cast(Tensor, self.cache.unit)
        q = qk_norm_rope_write_fp8(qkv, *norms, one, one, one, self.start_row, eps)
        return ring_attention_fp8(q, k, v, one, one, one, self.valid_rows, out=out)

    @cached_property
    def start_row(self) -> int | Tensor:
        """First row to write."""
        return self.slot * self.cache.tokens

    @cached_property
    def valid_rows(self) -> int | Tensor:
        """Number of rows to attend to after the write."""
        return self.valid * self.cache.tokens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if isinstance(self.slot, Tensor) or isinstance(self.valid, Tensor):
            raise ValueError("cache: got slots on the device, expected numbers: only fused kernels take the others")
        self.cache.write(layer, self.slot, k, v)
        keys, values = (rows[:, : self.valid_rows].transpose(1, 2) for rows in self.cache.view(layer))
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)


@dataclass(frozen=True)
class GroupedAttention:
    """Self-attention over two groups of heads, each with its own ring: all heads but the local ones, and these.

    Called as CachedAttention.
    """

    wide: CachedAttention
    local: CachedAttention

    def in_kernels(self, tokens: int) -> bool:
        """As CachedAttention's."""
        return self.wide.in_kernels(tokens) and self.local.in_kernels(tokens)

    def _groups(self, layer: int) -> Iterator[tuple[CachedAttention, slice]]:
        """The groups that have heads in a layer, and which."""
        first, both = self.wide.cache.heads[layer], (self.wide, self.local)
        for attend, heads in zip(both, (slice(0, first), slice(first, None)), strict=True):
            if attend.cache.heads[layer]:
                yield attend, heads

    def fused(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As CachedAttention's."""
        wide, local = self.wide.cache.view(layer), self.local.cache.view(layer)
        q = qk_norm_rope_write(
            qkv, q_weight, k_weight, cos, sin, *wide, self.wide.start_row, eps, (*local, self.local.start_row)
        )
        out = torch.empty_like(q) if out is None else out
        for attend, heads in self._groups(layer):
            keys = wide if attend is self.wide else local
            ring_attention(q[:, :, heads], *keys, attend.valid_rows, out=out[:, :, heads])
        return out

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [attend(layer, q[:, :, heads], k[:, :, heads], v[:, :, heads]) for attend, heads in self._groups(layer)]
        return torch.cat(parts, dim=2)


@dataclass(frozen=True)
class JoinedAttention:
    """Self-attention of several chunks in one run of the transformer, each over the cache in its turn.

    parts: (attention, tokens) of each chunk. A later one reads what an earlier one wrote, and may write over rows that
    the earlier one has read.
    """

    parts: tuple[tuple[CachedAttention | GroupedAttention, int], ...]

    def in_kernels(self, tokens: int) -> bool:
        """As CachedAttention's; `tokens` counts those of all parts."""
        return all(attend.in_kernels(own) for attend, own in self.parts)

    def fused(
        self, layer: int, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        """As CachedAttention's; qkv [B, n, 3 * dim] and cos, sin [n, d / 2] of all parts."""
        sizes = [own for _, own in self.parts]
        batch, tokens, head_dim = *qkv.shape[:2], 2 * cos.shape[1]
        whole = qkv.new_empty(batch, tokens, qkv.shape[2] // (3 * head_dim), head_dim)
        shares = zip(
            self.parts, qkv.split(sizes, 1), cos.split(sizes), sin.split(sizes), whole.split(sizes, 1), strict=True
        )
        for (attend, _), own, own_cos, own_sin, out in shares:
            given = out if out.is_contiguous() else None  # only of one video are the shares contiguous
            found = attend.fused(layer, own.contiguous(), q_weight, k_weight, own_cos, own_sin, eps, given)
            if given is None:
                out.copy_(found)
        return whole

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [own for _, own in self.parts]
        shares = zip(self.parts, *(tensor.split(sizes, 1) for tensor in (q, k, v)), strict=True)
        return torch.cat([attend(layer, *own) for (attend, _), *own in shares], dim=1)


Streaming = CachedAttention | GroupedAttention | JoinedAttention
