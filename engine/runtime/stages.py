"""The torch backend: runs Stages on this project's own modules."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.cache import CachedAttention, RingCache
from engine.model.text import encode_text
from engine.model.transformer import TextKV, WanTransformer
from engine.model.vae import VAE
from engine.runtime.passes import Capabilities, Pass
from kernels.table import use


class TorchStages:
    """Holds only weights; `models` maps each role to its transformer.

    eager: use PyTorch's own operations even where kernels exist.
    """

    name = "torch"
    capabilities = Capabilities()
    make_cache = RingCache

    def __init__(
        self, models: dict[str, WanTransformer], vae: VAE | None, text_encoder: nn.Module | None, eager: bool = False
    ) -> None:
        self.models, self.vae, self.text_encoder, self.eager = models, vae, text_encoder, eager

    def modules(self) -> dict[str, nn.Module]:
        parts = self.models | {"vae": self.vae, "text_encoder": self.text_encoder}
        return {name: part for name, part in parts.items() if part is not None}

    def mapped_bytes(self) -> int:
        return 0

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return encode_text(need(self.text_encoder, "text encoder"), ids, mask)

    def prepare_text(self, text_emb: Tensor) -> dict[str, TextKV]:
        with self._operations():
            return {name: model.prepare_text(text_emb) for name, model in self.models.items()}

    def run(self, step: Pass, cache: RingCache, text_kv: dict[str, TextKV]) -> Tensor:
        role, attend = step.kind.role, CachedAttention(cache, step.slot, step.valid)
        model, latent = self.models[role], step.latent
        t = latent.new_zeros(latent.shape[0], dtype=torch.float32) if step.t is None else step.t
        arguments = latent, t, text_kv[role], step.cos, step.sin, attend, step.c_f
        with self._operations():
            return model.encode(*arguments)[0] if step.kind.hidden else model(*arguments)

    def _operations(self) -> AbstractContextManager[None]:
        """Kernels where there are any; with `eager` PyTorch's own operations."""
        return use("reference") if self.eager else nullcontext()

    def vae_first(self, latent: Tensor) -> tuple[Tensor, Any]:
        return need(self.vae, "VAE").first(latent)

    def vae_steady(self, latent: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return need(self.vae, "VAE").steady(latent, cache)

    def vae_encode(self, video: Tensor) -> Tensor:
        return need(self.vae, "VAE").encode(video)


def need(part: Any, what: str) -> Any:
    """Return the part. ValueError if the pipeline was assembled without it."""
    if part is None:
        raise ValueError(f"got a pipeline without a {what}, expected one")
    return part
