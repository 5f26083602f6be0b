"""What a backend runs: passes of transformers, text encoder and VAE. The loop cannot tell which backend it is."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from engine.model.cache import RingCache

TextKV = Any  # what the backend's prepare_text returns; generators only hand it back


@dataclass(frozen=True)
class PassKind:
    """A transformer's kind of pass; each kind is one graph of a bundle.

    graph        its name: etm, sdd_context, sdd or dit
    role         whose weights, prompt and ring it uses: etm, sdd or dit
    timed        the timestep is an input; without it the chunk is clean, at timestep 0
    conditioned  the ETM's feature c_f is an input
    hidden       the result is the last hidden state [B, tokens, dim]; else it is the flow, shaped as the latent
    """

    graph: str
    role: str
    timed: bool = False
    conditioned: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class Pass:
    """One run of a transformer over one chunk, whose keys and values go to the ring of its role.

    latent    [B, C, F, h, w]
    cos, sin  rotary tables of the chunk's tokens, [tokens, head_dim / 2] each
    slot      first slot to write; a slot is one latent frame
    valid     slots to attend to once the chunk is written
    t         [B] in [0, 1000], where the kind is timed
    c_f       [B, tokens, dim], where the kind is conditioned; None is zero, as for chunk 0
    """

    kind: PassKind
    latent: Tensor
    cos: Tensor
    sin: Tensor
    slot: int | Tensor  # a number, or an int32 scalar on the device where the pass is captured as a graph
    valid: int | Tensor
    t: Tensor | None = None
    c_f: Tensor | None = None

    @property
    def frames(self) -> int:
        """Latent frames of the chunk."""
        return self.latent.shape[2]


@dataclass(frozen=True)
class Capabilities:
    """What a backend does otherwise than the loop would expect.

    moves_vae_cache  vae_steady moves the cache on in place, so a decoding that fails cannot be repeated
    """

    moves_vae_cache: bool = False


class Stages(Protocol):
    """A backend: the functions that the loop calls."""

    name: str
    capabilities: Capabilities

    def modules(self) -> dict[str, nn.Module]:
        """The PyTorch modules that hold its weights, by role, `vae` and `text_encoder`; none where graphs do."""
        ...

    def mapped_bytes(self) -> int:
        """Bytes of weights that no module holds."""
        ...

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, rows], to text_emb [B, rows, text_dim]."""
        ...

    def prepare_text(self, text_emb: Tensor) -> TextKV:
        """The prompt as `run` wants it: cross-attention keys and values of every role."""
        ...

    def make_cache(self, *args: Any, **options: Any) -> RingCache:
        """A RingCache of these arguments, where the backend wants it to lie."""
        ...

    def run(self, step: Pass, cache: RingCache, text_kv: TextKV) -> Tensor:
        """Run one pass; the chunk's keys and values are written to `cache`. Returns what the kind of pass says."""
        ...

    def vae_first(self, latent: Tensor) -> tuple[Tensor, Any]:
        """Frame 0 [B, 3, 1, H, W] of latent [B, C, 1, h, w], and the cache for the next call."""
        ...

    def vae_steady(self, latent: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The next 4 frames [B, 3, 4, H, W], and the cache for the next call."""
        ...

    def vae_encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, 1 + 4 n, H, W] in [-1, 1] to latents [B, C, 1 + n, h, w]."""
        ...
