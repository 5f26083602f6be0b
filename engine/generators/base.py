"""Shared by all families: a stream's shapes, rotary tables and state, and the interface of a generator.

A generator holds no stream: each stream's state is passed as an argument. `denoise` only stages keys and values, in
slots whose old content no pass reads any more. Only `commit` publishes them, all at once. So a call that raises,
anywhere, can be repeated with the same result.

Where the backend joins passes, `commit` leaves its context pass to the next `denoise`: one run of the transformer
computes both. Exception: if such a run fails in a full ring, the window's keys and values are computed again from its
latents, as after a prompt switch. If a later step of that chunk fails, its first step runs alone when it is repeated:
the result is the same up to rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.config import LocalHeads, Preset, TransformerConfig
from engine.model.cache import RingCache
from engine.model.rope import rope_tables
from engine.runtime.passes import Pass, PassKind, Stages, TextKV
from engine.runtime.transfer import upload


@dataclass(frozen=True)
class Geometry:
    """One stream's shapes: latent [batch, channels, F, height, width], and tokens per latent frame."""

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
        """From latent height and width. ValueError unless both are multiples of the patch."""
        _, ph, pw = config.patch_size
        if height < ph or width < pw or height % ph or width % pw:
            raise ValueError(f"latent: got {height} x {width}, expected multiples of {ph} x {pw}")
        return cls(batch, config.in_channels, height, width, height // ph, width // pw)


class RopeTables:
    """Rotary cos and sin on the device, cached for a chunk's denoising steps and for clamped positions."""

    def __init__(self, geometry: Geometry, head_dim: int, device: torch.device) -> None:
        self.geometry, self.head_dim, self.device = geometry, head_dim, device
        self._recent: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def at(self, position: int, frames: int) -> tuple[Tensor, Tensor]:
        """cos and sin of `frames` frames from a temporal position on, each [frames * tokens, head_dim / 2]."""
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
    """State that every stream owns beside its caches."""

    geometry: Geometry
    rope: RopeTables
    text_kv: TextKV
    index: int = 0  # chunks committed
    position: int = 0  # latent frames committed: temporal position of the next one
    slots: int = 0  # the window in latent frames, at most the preset's
    held: int = 0  # latent frames in the ring: its own count is a working copy, which an interrupted call may leave
    stale: bool = False  # the caches belong to an earlier prompt, or an interrupted call has spoiled them
    pending: Pass | None = None  # the last chunk's context pass, if the next chunk's first denoising call is to run it
    joined: bool = False  # that call has run it; false again if the chunk is made again
    kept: bool = False  # the cache holds the residual of a full step of the current chunk, for the preset's `reuse`
    text_emb: Tensor | None = None  # [B, rows, text_dim], from which text_kv was made
    prompt: tuple[int, int] = (0, 0)  # which embedding that is: Course.key
    strengths: Mapping[str, float] = field(default_factory=dict)  # of the adapters in the weights of text_kv

    def publish(self, **changes: Any) -> None:
        """Set several fields at once: no signal handler runs inside dict.update, so none sees half of them."""
        vars(self).update(changes)


@dataclass(frozen=True)
class HeadGroup:
    """Heads whose keys and values lie in one cache of so many slots.

    prefix  of the group's tensors in a bundle's graphs: k_0, local_k_0, local_start_row, ...
    heads   how many of every layer; the groups stand in their order in q, k and v
    """

    prefix: str
    heads: tuple[int, ...]
    slots: int


@dataclass(frozen=True)
class Ring:
    """Size of one role's cache in slots (latent frames). The first `attn_sink` slots are never overwritten.

    local: the heads that keep fewer frames, in a ring of their own.
    """

    slots: int
    attn_sink: int = 0
    local: LocalHeads | None = None

    def groups(self, config: TransformerConfig) -> "list[HeadGroup]":
        """The groups of heads, each with a cache of its own: all but the local heads, then these."""
        few = self.local.counts if self.local else (0,) * config.num_layers
        wide = tuple(config.num_attention_heads - count for count in few)
        return [HeadGroup("", wide, self.slots)] + ([HeadGroup("local_", few, self.local.window)] if self.local else [])

    def heads_slots(self, config: TransformerConfig) -> int:
        """Slots of all heads of all layers: a slot of one head holds tokens * head_dim keys, and as many values."""
        return sum(group.slots * sum(group.heads) for group in self.groups(config))


class Generator(ABC):
    """A family of models: its passes, its rings, and how they make the next chunk.

    One generator serves all streams of a pipeline. To add a family, write a subclass in its own file and a row of
    FAMILIES in engine/generators/__init__.py.
    """

    name: ClassVar[str]  # the family's name in presets and manifests
    passes: ClassVar[tuple[PassKind, ...]]

    def __init__(
        self, stages: Stages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.check(preset)
        if preset.reuse is not None:
            preset.reuse.check(config.num_layers)
        if preset.heads is not None:
            preset.heads.fit(config)
        parts, local = stages.modules(), preset.local_heads
        order = local.layers if local else None
        if any(getattr(parts[role], "local_heads", None) != order for role in self.roles() if role in parts):
            raise ValueError("heads: got transformers that were loaded with another table, expected this preset's")
        self.stages, self.config, self.preset = stages, config, preset
        self.dtype, self.device = dtype, device  # of the cached keys and values

    @staticmethod
    @abstractmethod
    def check(preset: Preset) -> None:
        """ValueError if the family does not support a field's value."""

    @staticmethod
    @abstractmethod
    def rings(preset: Preset) -> Mapping[str, Ring]:
        """The size of every role's cache."""

    @staticmethod
    @abstractmethod
    def steady(preset: Preset) -> int:
        """Number of chunks until every ring is full."""

    @staticmethod
    def unit(preset: Preset) -> int:
        """A supplied clip's latent frames must be a multiple of this number."""
        return 1

    @classmethod
    def roles(cls) -> tuple[str, ...]:
        """The family's transformers, in the order of their passes."""
        return tuple(dict.fromkeys(kind.role for kind in cls.passes))

    @classmethod
    def conditioned(cls, role: str) -> bool:
        """Whether a role's transformer takes c_f."""
        return any(kind.conditioned for kind in cls.passes if kind.role == role)

    @abstractmethod
    def open(self, geometry: Geometry, text_kv: TextKV) -> Any:
        """The empty state of a new stream."""

    def restart(self, state: Any) -> None:
        """Forget every chunk. The prompt, the strengths and the caches' memory stay."""
        state.publish(
            index=0, position=0, held=0, stale=False, pending=None, joined=False, kept=False, **self._nothing(state)
        )

    @abstractmethod
    def _nothing(self, state: Any) -> dict[str, Any]:
        """The family's own fields of a state without chunks."""

    def set_window(self, window: int, state: Any) -> None:
        """Let attention keep `window` latent frames, at most the preset's; the caches are written again.

        Then the stream goes on as one that was opened with that window, saw the same latents and had a prompt switch.
        """
        state.publish(slots=window, **self._rewritten(state))

    @abstractmethod
    def _rewritten(self, state: Any) -> dict[str, Any]:
        """The fields of a state whose caches are to be written again from the window's latents."""

    @abstractmethod
    def denoise(self, x: Tensor, t: float, state: Any, short: bool = False) -> Tensor:
        """Flow of the noisy chunk x at timestep t in [0, 1000], both [B, C, F, h, w]. Publishes nothing.

        short  run only the blocks that the preset's `reuse` names; a chunk's first call is full all the same
        """

    @abstractmethod
    def commit(self, x: Tensor, state: Any, supplied: bool = False) -> None:
        """Publish a finished chunk x [B, C, F, h, w]. A `supplied` chunk was encoded from an image or clip."""

    @abstractmethod
    def set_text(self, text_kv: TextKV, state: Any, recommit: bool = True, **also: Any) -> None:
        """Switch the prompt; `recommit` rewrites the window's keys and values under the new prompt.

        also  other fields of the state, which change with it
        """

    def _run_context(self, step: Pass, cache: RingCache, state: State) -> Pass | None:
        """Run a finished chunk's context pass. Returns it instead, if the next denoising call is to run it."""
        if self.stages.capabilities.joins_context:
            return step
        self.stages.run(step, cache, state.text_kv)
        return None

    def _run_denoising(
        self, step: Pass, cache: RingCache, state: State, short: bool, overwrites: bool = False
    ) -> Tensor:
        """Run a denoising pass, and with it the context pass that is pending.

        short       as `denoise` has it
        overwrites  the step writes over rows that the context reads, so both cannot be repeated
        """
        if self.preset.reuse is None:
            return self._run_whole(step, cache, state, overwrites)
        if short and state.kept:
            return self.stages.run(replace(step, reuse=self.preset.reuse, short=True), cache, state.text_kv)
        state.kept = False  # until the residual is whole
        flow = self._run_whole(replace(step, reuse=self.preset.reuse), cache, state, overwrites)
        state.kept = True
        return flow

    def _run_whole(self, step: Pass, cache: RingCache, state: State, overwrites: bool) -> Tensor:
        if state.pending is None or state.joined:
            return self.stages.run(step, cache, state.text_kv)
        step = replace(step, context=state.pending)
        if not overwrites:
            flow = self.stages.run(step, cache, state.text_kv)
            state.joined = True
            return flow
        state.stale = True  # until the pass is done: if it is interrupted, the window is computed again
        flow = self.stages.run(step, cache, state.text_kv)
        state.publish(pending=None, stale=False)
        return flow

    def _run_pending(self, cache: RingCache, state: State) -> None:
        """Run the pending context pass alone, because no denoising call comes next. It stays pending."""
        if state.pending is not None and not state.joined:
            self.stages.run(state.pending, cache, state.text_kv)

    def _cache(self, role: str, geometry: Geometry) -> RingCache:
        config, ring = self.config, self.rings(self.preset)[role]
        denoises = any(kind.timed for kind in self.passes if kind.role == role)
        residual = self.preset.chunk * geometry.tokens if denoises and self.preset.reuse is not None else 0
        return self.stages.make_cache(
            config.num_layers, geometry.batch, ring.slots, geometry.tokens, config.num_attention_heads,
            config.attention_head_dim, ring.attn_sink, self.dtype, self.device, ring.local, residual,
        )  # fmt: skip

    def _rope(self, geometry: Geometry) -> RopeTables:
        return RopeTables(geometry, self.config.attention_head_dim, self.device)


def timesteps(x: Tensor, t: float) -> Tensor:
    """t in [0, 1000] repeated for every sample of a batch: float32 [B]."""
    return torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
