"""The protocol of a backend: it runs passes of transformers, text encoder and VAE. The loop is the same for all."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from engine.config import Reuse
from engine.model.cache import RingCache

TextKV = Any  # result of the backend's prepare_text; generators only pass it back


@dataclass(frozen=True)
class PassKind:
    """A kind of pass of a transformer. Each kind is one graph of a bundle.

    graph        its name: etm, sdd_context, sdd or dit
    role         the transformer whose weights, prompt and ring it uses: etm, sdd or dit
    timed        the timestep is an input; if false, the chunk is clean, at timestep 0
    conditioned  the ETM's temporal feature c_f is an input
    hidden       the result is the last hidden state [B, tokens, dim]; if false, it is the flow, shaped as the latent
    """

    graph: str
    role: str
    timed: bool = False
    conditioned: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class Pass:
    """One run of a transformer over one chunk. It writes the chunk's keys and values to the ring of its role.

    latent    [B, C, F, h, w]
    cos, sin  rotary tables of the chunk's tokens, [tokens, head_dim / 2] each
    slot      first slot to write; one slot is one latent frame
    valid     number of slots to attend to after the write
    t         [B] in [0, 1000], if the kind is timed
    c_f       [B, tokens, dim], if the kind is conditioned; None means zero, as for chunk 0
    local_slot, local_valid  the same in the ring of the local heads, where the cache has one
    context   a pass of the same role that comes first, of whose result only the keys and values are used: it runs
              together with this one, where the backend joins passes
    reuse     the preset's: the pass keeps what the blocks between the first and the last ones add, in the cache
    short     with `reuse`: those blocks do not run, what was kept is added
    """

    kind: PassKind
    latent: Tensor
    cos: Tensor
    sin: Tensor
    slot: int | Tensor  # an int; in a captured graph an int32 scalar on the device
    valid: int | Tensor
    t: Tensor | None = None
    c_f: Tensor | None = None
    local_slot: int | Tensor | None = None
    local_valid: int | Tensor | None = None
    context: "Pass | None" = None
    reuse: Reuse | None = None
    short: bool = False

    @property
    def frames(self) -> int:
        """Latent frames of the chunk."""
        return self.latent.shape[2]


@dataclass(frozen=True)
class Capabilities:
    """Deviations of a backend from the default behaviour.

    moves_vae_cache  vae_steady updates its cache in place, so a failed or interrupted decoding cannot be repeated
    joins_context    `run` takes a Pass with a context
    whole_chunks     a chunk must not wrap round the end of its ring
    """

    moves_vae_cache: bool = False
    joins_context: bool = False
    whole_chunks: bool = False


class Stages(Protocol):
    """A backend: the functions that the loop calls. Cached state is passed as arguments."""

    name: str
    capabilities: Capabilities

    def modules(self) -> dict[str, nn.Module]:
        """The PyTorch modules with weights, by role, `vae` and `text_encoder`; empty if graphs hold the weights."""
        ...

    def mapped_bytes(self) -> int:
        """Bytes of weights outside these modules."""
        ...

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Every weight with a name that a message can use."""
        ...

    def plain(self) -> "Stages":
        """The same functions without CUDA graphs, so that hooks of `modules` see every call."""
        ...

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask, each int64 [B, rows] -> text_emb [B, rows, text_dim]."""
        ...

    def prepare_text(self, text_emb: Tensor) -> TextKV:
        """text_emb [B, rows, text_dim] -> cross-attention keys and values of every role, as `run` takes them."""
        ...

    def make_cache(self, *args: Any, **options: Any) -> RingCache:
        """A RingCache of these arguments, in memory that the backend chooses."""
        ...

    def run(self, step: Pass, cache: RingCache, text_kv: TextKV) -> Tensor:
        """Run one pass and write the chunk's keys and values to `cache`. Returns hidden state or flow, see PassKind."""
        ...

    def vae_first(self, latent: Tensor) -> tuple[Tensor, Any]:
        """latent [B, C, 1, h, w] -> frame 0 [B, 3, 1, H, W], and the cache for the next call."""
        ...

    def vae_steady(self, latent: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """latent [B, C, 1, h, w] -> the next 4 frames [B, 3, 4, H, W], and the cache for the next call."""
        ...

    def vae_encode_step(self, frames: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The next frames [B, 3, 4, H, W] in [-1, 1] -> latent [B, C, 1, h, w], and the cache for the next call.

        A video begins with one frame alone, without a cache (None).
        """
        ...
