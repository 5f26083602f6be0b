"""The torch backend: runs Stages on this project's own modules."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.cache import CachedAttention, GroupedAttention, JoinedAttention, RingCache
from engine.model.layers import Middle
from engine.model.text import ReadAgain, encode_text
from engine.model.transformer import TextKV, WanTransformer
from engine.model.vae import StreamingVAE
from engine.runtime.finite import named_weights
from engine.runtime.passes import Capabilities, Pass
from kernels.table import use


class TorchStages:
    """Holds only weights; `models` maps each role to its transformer.

    eager         use PyTorch's own operations even where kernels exist
    join_context  run a chunk's context pass together with the next chunk's first denoising call
    in_place      vae_steady overwrites its cache instead of making another one
    """

    name = "torch"
    make_cache = RingCache

    def __init__(
        self, models: dict[str, WanTransformer], vae: StreamingVAE | None, text_encoder: nn.Module | None,
        eager: bool = False, join_context: bool = False, in_place: bool = False,
    ) -> None:  # fmt: skip
        self.models, self.vae, self.text_encoder, self.eager = models, vae, text_encoder, eager
        self.capabilities = Capabilities(moves_vae_cache=in_place, joins_context=join_context)

    def modules(self) -> dict[str, nn.Module]:
        parts = self.models | {"vae": self.vae, "text_encoder": self.text_encoder}
        return {name: part for name, part in parts.items() if part is not None}

    def mapped_bytes(self) -> int:
        return 0

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        return named_weights(self.modules())

    def plain(self) -> "TorchStages":
        return self

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        encoder = need(self.text_encoder, "text encoder")
        device = place_of(encoder, ids.device)  # it may be another one than the transformers'
        return encode_text(encoder, ids.to(device), mask.to(device))

    def prepare_text(self, text_emb: Tensor) -> dict[str, TextKV]:
        with self._operations():
            return {name: model.prepare_text(text_emb) for name, model in self.models.items()}

    def run(self, step: Pass, cache: RingCache, text_kv: dict[str, TextKV]) -> Tensor:
        if step.context is not None:
            return self._joined(step.context, step, cache, text_kv)
        role, attend = step.kind.role, _attention_of(step, cache)
        model = self.models[role]
        arguments: tuple[Any, ...] = step.latent, _time_of(step), text_kv[role], step.cos, step.sin, attend, step.c_f
        if (middle := _middle_of(step, cache)) is not None:
            arguments = *arguments, middle
        with self._operations():
            return model.encode(*arguments)[0] if step.kind.hidden else model(*arguments)

    def _joined(self, context: Pass, step: Pass, cache: RingCache, text_kv: dict[str, TextKV]) -> Tensor:
        """Both passes as one over the tokens of both chunks; in each layer the context comes first."""
        passes, model = (context, step), self.models[step.kind.role]
        attend = JoinedAttention(tuple((_attention_of(p, cache), len(p.cos)) for p in passes))
        latent = torch.cat([p.latent for p in passes], dim=2)
        t = torch.cat([_time_of(p)[:, None].expand(-1, p.frames) for p in passes], dim=1)
        cos, sin = torch.cat([p.cos for p in passes]), torch.cat([p.sin for p in passes])
        tokens = len(context.cos)
        c_f = None if step.c_f is None else F.pad(step.c_f, (0, 0, tokens, 0))  # zero adds nothing
        with self._operations():
            text, middle = text_kv[step.kind.role], _middle_of(step, cache)
            hidden, embedding = model.encode(latent, t, text, cos, sin, attend, c_f, middle)
            return model.head(hidden[:, tokens:], embedding[:, context.frames :], step.latent)

    def _operations(self) -> AbstractContextManager[None]:
        """Kernels where there are any; with `eager` PyTorch's own operations."""
        return use("reference") if self.eager else nullcontext()

    def vae_first(self, latent: Tensor) -> tuple[Tensor, Any]:
        return need(self.vae, "VAE").first(latent)

    def vae_steady(self, latent: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return need(self.vae, "VAE").steady(latent, cache, in_place=self.capabilities.moves_vae_cache)

    def vae_encode_step(self, frames: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return need(self.vae, "VAE").encode_step(frames, cache)


def _attention_of(step: Pass, cache: RingCache) -> CachedAttention | GroupedAttention:
    """How a pass finds its keys in the cache."""
    attend = CachedAttention(cache, step.slot, step.valid)
    if cache.local is None or step.local_slot is None or step.local_valid is None:
        return attend
    return GroupedAttention(attend, CachedAttention(cache.local, step.local_slot, step.local_valid))


def _time_of(step: Pass) -> Tensor:
    """[B], float32; 0 where the kind is not timed."""
    return step.latent.new_zeros(len(step.latent), dtype=torch.float32) if step.t is None else step.t


def _middle_of(step: Pass, cache: RingCache) -> Middle | None:
    """The blocks whose residual a pass keeps or takes, with its place in the cache."""
    if step.reuse is None or cache.residual is None:
        return None
    return Middle(step.reuse.first, step.reuse.last, cache.residual[:, : len(step.cos)], step.short)


def place_of(encoder: nn.Module, default: torch.device) -> torch.device:
    """The device on which a text encoder computes."""
    if isinstance(encoder, ReadAgain):
        return encoder.device
    return next((p.device for p in encoder.parameters()), default)


def need(part: Any, what: str) -> Any:
    """Return the part. ValueError if the pipeline was assembled without it."""
    if part is None:
        raise ValueError(f"got a pipeline without a {what}, expected one")
    return part
