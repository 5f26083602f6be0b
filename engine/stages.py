"""The torch backend: the stage functions of generators.Stages on this project's own modules."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.cache import RingCache
from engine.layers import Attend
from engine.text import encode_text
from engine.transformer import TextKV, WanTransformer
from engine.vae import VAE
from kernels.ring_attention import ring_attention


def cached_attention(cache: RingCache, slot: int, valid: int) -> Attend:
    """Self-attention that writes its keys and values to `slot` on and then attends to `valid` slots."""
    rows = valid * cache.tokens

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, slot, k, v)
        keys, values = cache.view(layer)
        return ring_attention(q, keys, values, rows)

    return attend


class TorchStages:
    """Holds weights and nothing else; `models` maps etm and sdd, or dit, to their transformers."""

    name = "torch"

    def __init__(self, models: dict[str, WanTransformer], vae: VAE | None, text_encoder: nn.Module | None) -> None:
        self.models, self.vae, self.text_encoder = models, vae, text_encoder

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return encode_text(_need(self.text_encoder, "text encoder"), ids, mask)

    def prepare_text(self, text_emb: Tensor) -> dict[str, TextKV]:
        return {name: model.prepare_text(text_emb) for name, model in self.models.items()}

    def etm(
        self, latent: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int, cache: RingCache,
        text_kv: dict[str, TextKV],
    ) -> Tensor:  # fmt: skip
        attend = cached_attention(cache, slot, valid)
        return self.models["etm"].encode(latent, _zero(latent), text_kv["etm"], cos, sin, attend)[0]

    def sdd_context(
        self, latent: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int, cache: RingCache,
        text_kv: dict[str, TextKV],
    ) -> None:  # fmt: skip
        attend = cached_attention(cache, slot, valid)
        self.models["sdd"].encode(latent, _zero(latent), text_kv["sdd"], cos, sin, attend)

    def sdd(
        self, latent: Tensor, t: Tensor, c_f: Tensor | None, cos: Tensor, sin: Tensor, valid: int,
        cache: RingCache, text_kv: dict[str, TextKV],
    ) -> Tensor:  # fmt: skip
        attend = cached_attention(cache, 0, valid)
        return self.models["sdd"](latent, t, text_kv["sdd"], cos, sin, attend, c_f)

    def dit(
        self, latent: Tensor, t: Tensor, cos: Tensor, sin: Tensor, slot: int, valid: int,
        cache: RingCache, text_kv: dict[str, TextKV],
    ) -> Tensor:  # fmt: skip
        attend = cached_attention(cache, slot, valid)
        return self.models["dit"](latent, t, text_kv["dit"], cos, sin, attend)

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
