"""The torch backend: the stage functions of generators.Stages on this project's own modules."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.model.cache import CachedAttention, RingCache
from engine.model.text import encode_text
from engine.model.transformer import TextKV, WanTransformer
from engine.model.vae import VAE
from engine.runtime.fused import FusedTransformer

Slot = int | Tensor  # a number, or an int32 scalar on the device where the pass is captured as a graph


class TorchStages:
    """Holds weights and nothing else; `models` maps etm and sdd, or dit, to their transformers.

    Where `fused` has the same transformers on fused kernels, the streaming passes run on those.
    """

    name = "torch"

    def __init__(
        self, models: dict[str, WanTransformer], vae: VAE | None, text_encoder: nn.Module | None,
        fused: dict[str, FusedTransformer] | None = None,
    ) -> None:  # fmt: skip
        self.models, self.vae, self.text_encoder = models, vae, text_encoder
        self.fused = fused

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return encode_text(_need(self.text_encoder, "text encoder"), ids, mask)

    def prepare_text(self, text_emb: Tensor) -> dict[str, TextKV]:
        return {name: model.prepare_text(text_emb) for name, model in self.models.items()}

    def _model(self, role: str, attend: CachedAttention, frames: int) -> Any:
        """The transformer for a pass over `frames` latent frames. Fused kernels write rows in one run."""
        fused = self.fused is not None and not attend.wraps(frames)
        return (self.fused if fused else self.models)[role]  # type: ignore[index]

    def etm(
        self, latent: Tensor, cos: Tensor, sin: Tensor, slot: Slot, valid: Slot, cache: RingCache,
        text_kv: dict[str, TextKV],
    ) -> Tensor:  # fmt: skip
        attend = CachedAttention(cache, slot, valid)
        model = self._model("etm", attend, latent.shape[2])
        return model.encode(latent, _zero(latent), text_kv["etm"], cos, sin, attend)[0]

    def sdd_context(
        self, latent: Tensor, cos: Tensor, sin: Tensor, slot: Slot, valid: Slot, cache: RingCache,
        text_kv: dict[str, TextKV],
    ) -> None:  # fmt: skip
        attend = CachedAttention(cache, slot, valid)
        self._model("sdd", attend, latent.shape[2]).encode(latent, _zero(latent), text_kv["sdd"], cos, sin, attend)

    def sdd(
        self, latent: Tensor, t: Tensor, c_f: Tensor | None, cos: Tensor, sin: Tensor, valid: Slot,
        cache: RingCache, text_kv: dict[str, TextKV],
    ) -> Tensor:  # fmt: skip
        attend = CachedAttention(cache, 0, valid)
        return self._model("sdd", attend, latent.shape[2])(latent, t, text_kv["sdd"], cos, sin, attend, c_f)

    def dit(
        self, latent: Tensor, t: Tensor, cos: Tensor, sin: Tensor, slot: Slot, valid: Slot,
        cache: RingCache, text_kv: dict[str, TextKV],
    ) -> Tensor:  # fmt: skip
        attend = CachedAttention(cache, slot, valid)
        return self._model("dit", attend, latent.shape[2])(latent, t, text_kv["dit"], cos, sin, attend)

    def vae_first(self, latent: Tensor) -> tuple[Tensor, Any]:
        return _need(self.vae, "VAE").first(latent)

    def vae_steady(self, latent: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return _need(self.vae, "VAE").steady(latent, cache)

    def vae_encode(self, video: Tensor) -> Tensor:
        return _need(self.vae, "VAE").encode(video)


def _zero(latent: Tensor) -> Tensor:
    return torch.zeros(latent.shape[0], dtype=torch.float32, device=latent.device)


def _need(part: Any, what: str) -> Any:
    if part is None:
        raise ValueError(f"got a pipeline without a {what}, expected one")
    return part
