"""What the families share: one stream's shapes, its rotary tables, its state, and what a family must provide.

A generator holds no stream: everything that a stream owns is its state, passed as an argument. `denoise` only
stages keys and values in slots that no finished chunk is read from; `commit` alone publishes. So a call that
raises can be repeated and gives what it would have given.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.config import Preset, TransformerConfig
from engine.model.cache import RingCache
from engine.model.rope import rope_tables
from engine.runtime.passes import PassKind, Stages, TextKV
from engine.runtime.transfer import upload


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


@dataclass(frozen=True)
class Ring:
    """Size of one role's cache, in slots (latent frames); the first `attn_sink` are never evicted."""

    slots: int
    attn_sink: int = 0


class Generator(ABC):
    """A family of models: which passes they make, over which rings, and how these give the next chunk.

    A generator of a pipeline serves the states of all its streams. A new family is a subclass in a file of its own
    and a row of FAMILIES in engine/generators/__init__.py.
    """

    name: ClassVar[str]  # of the family, in presets and manifests
    passes: ClassVar[tuple[PassKind, ...]]

    def __init__(
        self, stages: Stages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.check(preset)
        self.stages, self.config, self.preset = stages, config, preset
        self.dtype, self.device = dtype, device  # of the cached keys and values

    @staticmethod
    @abstractmethod
    def check(preset: Preset) -> None:
        """ValueError where the family has no use for a field's value."""

    @staticmethod
    @abstractmethod
    def rings(preset: Preset) -> Mapping[str, Ring]:
        """The cache of every role."""

    @staticmethod
    @abstractmethod
    def steady(preset: Preset) -> int:
        """Chunks until every ring is full."""

    @staticmethod
    def unit(preset: Preset) -> int:
        """Latent frames that a supplied clip is a multiple of."""
        return 1

    @classmethod
    def roles(cls) -> tuple[str, ...]:
        """Its transformers, in the order of their passes."""
        return tuple(dict.fromkeys(kind.role for kind in cls.passes))

    @classmethod
    def conditioned(cls, role: str) -> bool:
        """Whether a role's transformer takes c_f."""
        return any(kind.conditioned for kind in cls.passes if kind.role == role)

    @abstractmethod
    def open(self, geometry: Geometry, text_kv: TextKV) -> Any:
        """A new stream's state, empty."""

    @abstractmethod
    def denoise(self, x: Tensor, t: float, state: Any) -> Tensor:
        """Flow of the noisy chunk x [B, C, F, h, w] at timestep t; publishes nothing."""

    @abstractmethod
    def commit(self, x: Tensor, state: Any, supplied: bool = False) -> None:
        """Publish a finished chunk; a `supplied` one (an image, a clip) was encoded, not denoised."""

    @abstractmethod
    def set_text(self, text_kv: TextKV, state: Any, recommit: bool = True) -> None:
        """Switch the prompt; `recommit` rewrites the window's keys and values under the new one."""

    def _cache(self, role: str, geometry: Geometry) -> RingCache:
        config, ring = self.config, self.rings(self.preset)[role]
        return self.stages.make_cache(
            config.num_layers, geometry.batch, ring.slots, geometry.tokens, config.num_attention_heads,
            config.attention_head_dim, ring.attn_sink, self.dtype, self.device,
        )  # fmt: skip

    def _rope(self, geometry: Geometry) -> RopeTables:
        return RopeTables(geometry, self.config.attention_head_dim, self.device)


def timesteps(x: Tensor, t: float) -> Tensor:
    """t for every sample of a batch, float32 [B]."""
    return torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
