"""How much of their attention the latent frames give each other.

`frame_mass` computes it from q and k, exactly or from drawn queries. `watching` shows a `Watch` every self-attention
of a model that runs: the bidirectional teacher, or the transformers of a stream. `Probe` is the watch that measures.
The engine is not changed: the model's calls get another `attend`, which calls their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.model.cache import CachedAttention, RingCache
from engine.model.layers import Attend
from engine.model.transformer import WanTransformer


def head_weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention of one head, softmax(q k^T / sqrt(d)): q [B, queries, d], k [B, keys, d], at least in float32."""
    exact = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(q.to(exact) @ k.to(exact).transpose(1, 2) / q.shape[-1] ** 0.5, -1)


def frame_mass(
    q: Tensor, k: Tensor, tokens: int, *, visible: Sequence[Sequence[int]] | None = None,
    queries: int | None = None, draws: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """M[b, head, i, j]: mean over the queries of frame i of the attention mass on the keys of frame j.

    q [B, I * tokens, heads, d] and k [B, J * tokens, heads, d], as attention gets them; the result is [B, heads, I, J].
    visible[i]: the frames of k that frame i sees (None: all); elsewhere the mass is 0.
    queries: so many are drawn from every frame, the same for all heads. They estimate M without bias. None: all.

    One head and one frame of queries at a time: at most B * queries * J * tokens weights are in memory.
    """
    q, k = q.unflatten(1, (-1, tokens)), k.unflatten(1, (-1, tokens))
    every = list(range(k.shape[1]))
    mass = q.new_zeros(
        q.shape[0], q.shape[3], q.shape[1], len(every), dtype=torch.promote_types(q.dtype, torch.float32)
    )
    for i in range(q.shape[1]):
        seen = every if visible is None else list(visible[i])
        rows = drawn_rows(tokens, queries, draws).to(q.device)
        for head in range(q.shape[3]):
            keys = k[..., head, :] if seen == every else k[:, seen, :, head]
            weights = head_weights(q[:, i, rows, head], keys.flatten(1, 2))
            mass[:, head, i, seen] = weights.unflatten(-1, (len(seen), tokens)).sum(-1).mean(1)
    return mass


def drawn_rows(tokens: int, queries: int | None, draws: torch.Generator | None) -> Tensor:
    """The queries of a frame that are taken: all, or some without replacement."""
    if queries is None or queries >= tokens:
        return torch.arange(tokens)
    return torch.randperm(tokens, generator=draws)[:queries]


@dataclass(frozen=True)
class Seen:
    """One call of a transformer: the numbers of its latent frames, of those whose keys they all see, and its noise."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    level: float  # sigma in [0, 1]; 0 for a clean chunk


class Watch(Protocol):
    """Sees the self-attention of one layer, and returns its result: `out`, or what is to replace it.

    q and out [B, queries * n, heads, d]; k and v [B, keys * n, heads, d], keys in the order of seen.keys.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, seen: Seen) -> Tensor: ...


@dataclass
class Probe:
    """Measures the mass of one clip at every noise level: level -> [layers, heads, F, F]; NaN where nothing was seen.

    frames: latent frames of the clip. levels: those to measure (sigma). queries and seed: as for `frame_mass`.
    """

    frames: int
    levels: Sequence[float]
    layers: int
    queries: int | None = None
    seed: int = 0
    mass: dict[float, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._draws = torch.Generator().manual_seed(self.seed)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, seen: Seen) -> Tensor:
        if seen.level in self.levels:
            tokens = q.shape[1] // len(seen.queries)
            found = frame_mass(q, k, tokens, queries=self.queries, draws=self._draws).mean(0).cpu()
            if seen.level not in self.mass:
                shape = self.layers, q.shape[2], self.frames, self.frames
                self.mass[seen.level] = torch.full(shape, torch.nan, dtype=found.dtype)
            rows = torch.tensor(seen.queries)[:, None]
            self.mass[seen.level][layer, :, rows, torch.tensor(seen.keys)] = found
        return out


def level_of(t: float) -> float:
    """The noise level (sigma) of a timestep in [0, 1000], as keys of tables have it."""
    return round(t / 1000, 4)


@dataclass
class Frames:
    """The latent frames in the caches of one role of a stream; without caches, those of the call."""

    position: Callable[[], int]  # the number of the first frame of the chunk that runs
    slots: dict[RingCache, list[int]] = field(default_factory=dict)

    def seen(self, attend: Attend, frames: int, t: Tensor) -> Seen:
        """What a call of so many frames sees. Call it once for every call, in their order."""
        queries = range(self.position(), self.position() + frames)
        level = level_of(float(t.flatten()[0]))
        if not isinstance(attend, CachedAttention):
            return Seen(tuple(queries), tuple(queries), level)
        cache = attend.cache
        held = self.slots.setdefault(cache, [-1] * cache.slots)
        slot = int(attend.slot)
        for frame in queries:  # as RingCache.write does
            slot = cache.attn_sink if slot == cache.slots else slot
            held[slot] = frame
            slot += 1
        return Seen(tuple(queries), tuple(held[: int(attend.valid)]), level)


@contextmanager
def watching(
    models: Mapping[str, WanTransformer], watches: Mapping[str, Watch], position: Callable[[], int] = lambda: 0
) -> Iterator[None]:
    """Within the block every self-attention of a role that has a watch goes through it.

    position: the number of the first latent frame of the chunk that a stream runs; 0 where whole clips run.
    A stream must run whole: from its first chunk on, without a switch of prompt, with passes that are not joined.
    """
    with ExitStack() as stack:
        for role, watch in watches.items():
            stack.enter_context(_watched(models[role], watch, Frames(position)))
        yield


@contextmanager
def _watched(model: WanTransformer, watch: Watch, frames: Frames) -> Iterator[None]:
    plain = model.encode

    def encode(latent: Tensor, t: Tensor, text_kv: Any, cos: Tensor, sin: Tensor, attend: Attend, *rest: Any) -> Any:
        seen = frames.seen(attend, latent.shape[2] // model.config.patch_size[0], t)

        def attend_and_show(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(layer, q, k, v)
            if isinstance(attend, CachedAttention):
                k, v = (rows[:, : attend.valid_rows] for rows in attend.cache.view(layer))
            return watch(layer, q, k, v, out, seen)

        return plain(latent, t, text_kv, cos, sin, attend_and_show, *rest)

    model.encode = encode  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.encode = plain  # type: ignore[method-assign]
