"""The two ways to make the next chunk: ETM + SDD (Greedy Distill), or one causal transformer (Self-Forcing).

A generator holds no stream: everything that a stream owns is its state, passed as an argument. `denoise` only
stages keys and values in slots that no finished chunk is read from; `commit` alone publishes. So a call that
raises can be repeated and gives what it would have given.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.config import Preset, TransformerConfig
from engine.model.cache import RingCache
from engine.model.rope import rope_tables
from engine.runtime.transfer import upload

TextKV = Any  # whatever the backend's prepare_text returns; generators only hand it back


class Stages(Protocol):
    """What a backend runs; the loop cannot tell which backend it is.

    latent [B, C, F, h, w]; t [B]; cos, sin [tokens, head_dim / 2]; slot is the first slot to write, valid the
    number of slots to attend to once it is written; c_f and the ETM's result [B, tokens, dim].
    """

    name: str

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor: ...
    def prepare_text(self, text_emb: Tensor) -> TextKV: ...
    def etm(
        self, latent: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int, cache: RingCache, text_kv: TextKV
    ) -> Tensor: ...
    def sdd_context(
        self, latent: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int, cache: RingCache, text_kv: TextKV
    ) -> None: ...
    def sdd(
        self, latent: Tensor, t: Tensor, c_f: Tensor | None, cos: Tensor, sin: Tensor, valid: int,
        cache: RingCache, text_kv: TextKV,
    ) -> Tensor: ...  # fmt: skip
    def dit(
        self, latent: Tensor, t: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int,
        cache: RingCache, text_kv: TextKV,
    ) -> Tensor: ...  # fmt: skip
    def vae_first(self, latent: Tensor) -> tuple[Tensor, Any]: ...
    def vae_steady(self, latent: Tensor, cache: Any) -> tuple[Tensor, Any]: ...
    def vae_encode(self, video: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Geometry:
    """One stream's shapes: latent [batch, channels, F, height, width] and its tokens a frame."""

    batch: int
    channels: int
    height: int
    width: int
    tokens_high: int
    tokens_wide: int

    @property
    def tokens(self) -> int:
        return self.tokens_high * self.tokens_wide

    @classmethod
    def of(cls, config: TransformerConfig, batch: int, height: int, width: int) -> "Geometry":
        """From latent height and width; both must be whole patches."""
        _, ph, pw = config.patch_size
        if height < ph or width < pw or height % ph or width % pw:
            raise ValueError(f"latent: got {height} x {width}, expected multiples of {ph} x {pw}")
        return cls(batch, config.in_channels, height, width, height // ph, width // pw)


class RopeTables:
    """cos and sin on the device; a chunk's denoising steps and clamped positions reuse them."""

    def __init__(self, geometry: Geometry, head_dim: int, device: torch.device) -> None:
        self.geometry, self.head_dim, self.device = geometry, head_dim, device
        self._recent: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def at(self, position: int, frames: int) -> tuple[Tensor, Tensor]:
        """Tables of `frames` frames from a temporal position on."""
        key = position, frames
        found = self._recent.pop(key, None)
        if found is None:
            g = self.geometry
            cos, sin = rope_tables(range(position, position + frames), g.tokens_high, g.tokens_wide, self.head_dim)
            found = upload(cos, self.device), upload(sin, self.device)
        self._recent[key] = found  # the newest last
        if len(self._recent) > 4:
            del self._recent[next(iter(self._recent))]
        return found


@dataclass
class State:
    """What every stream owns beside its caches."""

    geometry: Geometry
    rope: RopeTables
    text_kv: TextKV
    index: int = 0  # chunks committed
    position: int = 0  # latent frames committed: temporal position of the next one
    stale: bool = False  # the caches were written for another prompt


def cache_maker(stages: Stages) -> Callable[..., RingCache]:
    """How a backend wants its caches made: RingCache itself, unless it keeps them at addresses of its own."""
    return getattr(stages, "make_cache", RingCache)


class Generator(Protocol):
    """Makes chunks for streams; one generator serves many states."""

    def open(self, geometry: Geometry, text_kv: TextKV) -> Any:
        """A new stream's state, empty."""
        ...

    def denoise(self, x: Tensor, t: float, state: Any) -> Tensor:
        """Flow of the noisy chunk x [B, C, F, h, w] at timestep t; publishes nothing."""
        ...

    def commit(self, x: Tensor, state: Any, given: bool = False) -> None:
        """Publish a finished chunk; `given` latents (an image, a clip) were encoded, not denoised."""
        ...

    def set_text(self, text_kv: TextKV, state: Any, recommit: bool = True) -> None:
        """Switch the prompt; `recommit` rewrites the window's keys and values under the new one."""
        ...


@dataclass
class CausalState(State):
    cache: RingCache = field(kw_only=True)
    pinned: list[tuple[int, Tensor]] = field(default_factory=list)  # (position, latent frame) still cached
    window: deque[tuple[int, Tensor]] = field(default_factory=deque)
    staged: bool = False  # the last denoising call's keys and values are in place for the next commit


class CausalGenerator:
    """Self-Forcing, CausVid, LongLive, First-Frame Enhancement, Diagonal Distillation: one causal transformer."""

    def __init__(
        self, stages: Stages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.stages, self.config, self.preset = stages, config, preset
        self.dtype, self.device = dtype, device

    def open(self, geometry: Geometry, text_kv: TextKV) -> CausalState:
        config, preset = self.config, self.preset
        cache = cache_maker(self.stages)(
            config.num_layers, geometry.batch, preset.window, geometry.tokens, config.num_attention_heads,
            config.attention_head_dim, preset.attn_sink, self.dtype, self.device,
        )  # fmt: skip
        return CausalState(
            geometry, RopeTables(geometry, config.attention_head_dim, self.device), text_kv,
            cache=cache, window=deque(maxlen=preset.window - preset.attn_sink),
        )  # fmt: skip

    def denoise(self, x: Tensor, t: float, state: CausalState) -> Tensor:
        self._refresh(state)
        flow = self._run(x, t, state.position, state)
        state.staged = True
        return flow

    def commit(self, x: Tensor, state: CausalState, given: bool = False) -> None:
        self._refresh(state)
        frames = x.shape[2]
        # After a prompt switch the keys of the last denoising call are the old prompt's, or overwritten.
        lost = self.preset.commit == "noisy" and not state.staged
        if given or lost or self.preset.commit == "clean":
            # What was given is clean whatever noise level the preset pretends for its own chunks.
            self._run(x, 0.0 if given else self.preset.context_timestep, state.position, state)
        if given or self.preset.commit != "none":
            state.cache.commit(frames)
            for offset in range(frames):
                frame = state.position + offset, x[:, :, offset : offset + 1]
                (state.pinned if len(state.pinned) < self.preset.attn_sink else state.window).append(frame)
        state.staged = False
        state.position += frames
        state.index += 1

    def set_text(self, text_kv: TextKV, state: CausalState, recommit: bool = True) -> None:
        state.text_kv = text_kv
        if recommit:  # one that is still due stays due
            state.stale, state.staged = state.index > 0, False

    def _run(self, x: Tensor, t: float, position: int, state: CausalState) -> Tensor:
        cache, frames = state.cache, x.shape[2]
        timestep = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
        cos, sin = state.rope.at(position, frames)
        return self.stages.dit(x, timestep, cos, sin, cache.next_slot, cache.valid(frames), cache, state.text_kv)

    def _refresh(self, state: CausalState) -> None:
        """After a prompt switch: one clean pass over the latents still cached, at their own positions.

        `stale` falls last, so a failure on the way only means that the next call starts over.
        """
        if not state.stale:
            return
        state.cache.reset()
        rest = len(state.window) % self.preset.chunk
        window = list(state.window)
        runs = [*_runs(state.pinned, self.preset.chunk), window[:rest], *_runs(window[rest:], self.preset.chunk)]
        for run in filter(None, runs):
            chunk = torch.cat([latent for _, latent in run], dim=2)
            self._run(chunk, self.preset.context_timestep, run[0][0], state)
            state.cache.commit(len(run))
        state.stale = False


def _runs(frames: list[tuple[int, Tensor]], size: int) -> Iterable[list[tuple[int, Tensor]]]:
    return (frames[start : start + size] for start in range(0, len(frames), size))


@dataclass
class GreedyState(State):
    etm: RingCache = field(kw_only=True)  # w + 1 chunks
    sdd: RingCache = field(kw_only=True)  # [current | chunk 0 | last]
    c_f: Tensor | None = None  # temporal feature for the next chunk; None means zero (chunk 0)
    first: Tensor | None = None  # latent of chunk 0
    recent: deque[tuple[int, Tensor]] = field(default_factory=deque)  # (position, latent) of the ETM's chunks


class GreedyGenerator:
    """Greedy Distill: the ETM reads each finished chunk once, the SDD denoises the next one (Eq. 2-5, Alg. 1).

    The SDD's keys are [current | chunk 0 | last]: a prefix from the first chunk on. Its context is clean, at
    timestep 0, computed once a chunk and kept for all steps. Its positions stop growing at max_position, those of
    the ETM grow for ever (only distances inside its window matter).
    """

    def __init__(
        self, stages: Stages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.stages, self.config, self.preset = stages, config, preset
        self.dtype, self.device = dtype, device

    def open(self, geometry: Geometry, text_kv: TextKV) -> GreedyState:
        config, preset = self.config, self.preset
        chunks = preset.window + 1

        def cache(slots: int) -> RingCache:
            return cache_maker(self.stages)(
                config.num_layers, geometry.batch, slots, geometry.tokens, config.num_attention_heads,
                config.attention_head_dim, dtype=self.dtype, device=self.device,
            )  # fmt: skip

        return GreedyState(
            geometry, RopeTables(geometry, config.attention_head_dim, self.device), text_kv,
            etm=cache(chunks * preset.chunk), sdd=cache(3 * preset.chunk), recent=deque(maxlen=chunks),
        )  # fmt: skip

    def denoise(self, x: Tensor, t: float, state: GreedyState) -> Tensor:
        self._refresh(state)
        chunk = self.preset.chunk
        timestep = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
        cos, sin = state.rope.at(min(state.position, self.preset.max_position), chunk)
        valid = (1 + min(state.index, 2)) * chunk
        return self.stages.sdd(x, timestep, state.c_f, cos, sin, valid, state.sdd, state.text_kv)

    def commit(self, x: Tensor, state: GreedyState, given: bool = False) -> None:
        chunk = self.preset.chunk
        if x.shape[2] != chunk:
            raise ValueError(f"greedy: got a chunk of {x.shape[2]} latent frames, expected {chunk}")
        self._refresh(state)
        c_f = self._temporal(x, state.position, state)
        self._context(x, state.position, state)
        state.etm.commit(chunk)
        state.c_f = c_f
        state.first = x if state.index == 0 else state.first
        state.recent.append((state.position, x))
        state.position += chunk
        state.index += 1

    def set_text(self, text_kv: TextKV, state: GreedyState, recommit: bool = True) -> None:
        state.text_kv = text_kv
        if recommit and state.index > 0:  # one that is still due stays due
            state.stale = True

    def _temporal(self, x: Tensor, position: int, state: GreedyState) -> Tensor:
        """c_f = ETM(finished chunk), keys of the w chunks before it and its own (Eq. 1, 2)."""
        cos, sin = state.rope.at(position, self.preset.chunk)
        etm = state.etm
        return self.stages.etm(x, cos, sin, etm.next_slot, etm.valid(self.preset.chunk), etm, state.text_kv)

    def _context(self, x: Tensor, position: int, state: GreedyState) -> None:
        """Clean keys and values of a finished chunk for the SDD; chunk 0 sees itself, later ones also chunk 0.

        The pass runs in the current chunk's slot and is copied to its place when it is whole.
        """
        chunk, first = self.preset.chunk, position == 0
        cos, sin = state.rope.at(min(position, self.preset.max_position - chunk), chunk)
        self.stages.sdd_context(x, cos, sin, 0, (1 if first else 2) * chunk, state.sdd, state.text_kv)
        state.sdd.copy(0, (1 if first else 2) * chunk, chunk)

    def _refresh(self, state: GreedyState) -> None:
        """After a prompt switch: the ETM's window, chunk 0 and the last chunk again, under the new prompt.

        `stale` falls last, so a failure on the way only means that the next call starts over.
        """
        if not state.stale or state.first is None:
            return
        state.etm.reset()
        for position, latent in state.recent:
            state.c_f = self._temporal(latent, position, state)
            state.etm.commit(self.preset.chunk)
        self._context(state.first, 0, state)
        position, last = state.recent[-1]
        if position:
            self._context(last, position, state)
        state.stale = False


def make_generator(
    stages: Stages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device
) -> CausalGenerator | GreedyGenerator:
    """The generator of a preset's family."""
    kind = GreedyGenerator if preset.family == "greedy" else CausalGenerator
    return kind(stages, config, preset, dtype, device)
