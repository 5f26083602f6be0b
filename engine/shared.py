"""What all streams of a pipeline share: weights, backend, preset, and the encoding of prompts and clips."""

import os
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import Preset, TransformerConfig
from engine.generators import family_of, make_generator
from engine.generators.base import Generator, Geometry
from engine.generators.source import Source
from engine.model.text import Tokenizer, check_prompt
from engine.model.vae import uint8_to_frames
from engine.runtime.blending import check_words, mean_of
from engine.runtime.finite import bad_number, bad_weight, first_bad, numbers
from engine.runtime.memory_plan import MemoryPlan
from engine.runtime.passes import Stages
from engine.runtime.streams import Words, check_process
from engine.runtime.transfer import SideStream, upload
from engine.weights.lora.merge import Adapters


@dataclass(frozen=True)
class Shared:
    """Weights, backend and preset. All changing state belongs to a Stream."""

    stages: Stages
    tokenizer: Tokenizer | None
    config: TransformerConfig
    preset: Preset
    preset_name: str
    dtype: torch.dtype
    device: torch.device
    height: int
    width: int
    fps: float
    spatial: int  # pixels per latent pixel, in height and in width
    temporal: int  # frames per latent frame, after the first
    kv_dtype: torch.dtype | None = None  # dtype of cached keys and values; None is `dtype`
    adapters: Adapters | None = None  # whose strengths streams may change
    notes: tuple[str, ...] = ()  # what a user should know about the weights: what was chosen, what is lossy
    plan: MemoryPlan | None = None  # the memory that the pipeline and one stream were counted to need
    low_memory: bool = False  # decode a chunk before the next one is made, on the same queue
    process: int = field(default_factory=os.getpid)  # that opened it

    @cached_property
    def generator(self) -> Generator:
        """The preset's generator on this pipeline's stages."""
        return make_generator(self.stages, self.config, self.preset, self.kv_dtype or self.dtype, self.device)

    @cached_property
    def side(self) -> SideStream:
        """The queue on which streams decode while their next latents are made."""
        return SideStream(torch.device("cpu") if self.low_memory else self.device)

    @cached_property
    def worker(self) -> Executor:
        """The thread on which streams draw their next chunk's noise."""
        return ThreadPoolExecutor(1, thread_name_prefix="noise")

    @cached_property
    def _bad_weight(self) -> str:
        """Names a weight of transformers and VAE that is not finite; empty if all are."""
        return bad_weight(self.stages.named_weights(), text=False)

    @cached_property
    def _bad_text_weight(self) -> str:
        return bad_weight(self.stages.named_weights(), text=True)

    def check_weights(self, text: bool = False) -> None:
        """ValueError for a weight of transformers and VAE (`text`: of the text encoder) that is not finite.

        It reads all weights, once. Results alone do not tell: attention on a processor turns NaN scores into zeros.
        """
        if bad := self._bad_text_weight if text else self._bad_weight:
            raise ValueError(bad)

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> Tensor:
        """text_emb [1, rows, text_dim] of a prompt. Errors: no tokenizer, numbers that are not finite.

        Warns (PromptWarning) if the prompt has more tokens than the model reads.
        """
        check_process(self.process)
        if self.tokenizer is None:
            raise ValueError("got a pipeline without a tokenizer, expected one")
        ids, mask = self.tokenizer(prompt)
        self.check_weights(text=True)
        tokens = ids.to(self.device), mask.to(self.device)
        text_emb = self.stages.encode_text(*tokens).to(self.device, self.dtype)
        if bad_number(text_emb) is not None:
            raise first_bad(self.stages, "text", lambda stages: stages.encode_text(*tokens))
        return text_emb

    @torch.inference_mode()
    def encode_clip(self, clip: np.ndarray) -> Tensor:
        """Latents [1, C, F, h, w] of uint8 frames [T, H, W, 3]. F is a multiple of the family's unit.

        A longer clip than 1 + 4 (F - 1) frames loses its beginning; a shorter one (an image) repeats its last frame.
        ValueError for another shape or dtype.
        """
        check_process(self.process)
        expected = (self.height, self.width, 3)
        if clip.ndim != 4 or clip.shape[1:] != expected or clip.dtype != np.uint8 or not len(clip):
            raise ValueError(
                f"clip: got {clip.dtype} {list(clip.shape)}, expected uint8 [T, {self.height}, {self.width}, 3]"
            )
        unit = family_of(self.preset).unit(self.preset)
        latents = max((1 + (len(clip) - 1) // self.temporal) // unit, 1) * unit
        frames = 1 + self.temporal * (latents - 1)
        self.check_weights()
        clip = clip[-frames:]
        if len(clip) < frames:
            clip = np.concatenate([clip, np.repeat(clip[-1:], frames - len(clip), axis=0)])
        encoded, _ = self.encoded(clip)
        if bad_number(encoded) is not None:
            raise first_bad(self.stages, "clip", lambda stages: replace(self, stages=stages).encoded(clip))
        return encoded

    def encoded(self, frames: np.ndarray, cache: Any = None) -> tuple[Tensor, Any]:
        """Latents [1, C, F, h, w] of uint8 frames [T, H, W, 3], and the encoder's cache for those that follow.

        T is 1 + 4 (F - 1) without a cache, else 4 F. In parts or at once: the latents are the same.
        """
        pixels = upload(torch.from_numpy(np.ascontiguousarray(frames))[None], self.device)
        video, latents = uint8_to_frames(pixels).to(self.dtype), []
        first = 0 if cache is not None else 1
        for part in video.split([1] * first + [self.temporal] * ((len(frames) - first) // self.temporal), dim=2):
            latent, cache = self.stages.vae_encode_step(part, cache)
            latents.append(latent)
        return torch.cat(latents, dim=2), cache

    def embedded(self, prompt: str | Tensor | Words, batch: int | None = None) -> Tensor:
        """text_emb [B, rows, text_dim] of a text, an embedding, or the mean of weighted texts.

        ValueError for another shape or batch, and for weights that are not above 0.
        """
        if isinstance(prompt, str):
            prompt = ((prompt, 1.0),)
        if not isinstance(prompt, Tensor):
            words = check_words(prompt)
            for text, _ in words:
                check_prompt(text)
            encoded = [self.encode_prompt(text) for text, _ in words]
            prompt = encoded[0] if len(words) == 1 else mean_of(encoded, [weight for _, weight in words])
        width = self.config.text_dim
        fits = prompt.ndim == 3 and min(prompt.shape) > 0 and prompt.shape[-1] == width
        if not fits or len(prompt) != (batch or len(prompt)):
            raise ValueError(f"prompt: got an embedding {list(prompt.shape)}, expected [{batch or 'B'}, rows, {width}]")
        prompt = prompt.to(self.device, self.dtype)
        if (got := bad_number(prompt)) is not None:
            raise ValueError(f"prompt: got {got} in the embedding ({numbers(prompt)}), expected finite numbers")
        return prompt

    def follows(
        self, frames: Iterable[np.ndarray] | None, strength: float | None, noise_scale: float | None
    ) -> Source | None:
        """The source of a stream's arguments. ValueError for what is wrong."""
        if frames is not None:
            return Source(frames, (self.height, self.width), self.temporal, self.preset, strength, noise_scale)
        if strength is not None or noise_scale is not None:
            raise ValueError("strength, noise_scale: got one of them without a source, expected a source as well")
        return None

    def chunks_of(self, latents: Tensor | None, geometry: Geometry) -> list[Tensor]:
        """Split supplied latents [B, C, F, h, w] into chunks; the first may be shorter. ValueError if misshapen."""
        if latents is None:
            return []
        expected = geometry.batch, geometry.channels, geometry.height, geometry.width
        preset = self.preset
        unit = family_of(preset).unit(preset)
        fits = latents.ndim == 5 and (*latents.shape[:2], *latents.shape[3:]) == expected
        if not fits or latents.shape[2] < 1 or latents.shape[2] % unit:
            frames = "F" if unit == 1 else f"{unit}k"
            raise ValueError(f"latents: got {list(latents.shape)}, expected "
                             f"[{expected[0]}, {expected[1]}, {frames}, {expected[2]}, {expected[3]}]")  # fmt: skip
        latents = latents.to(self.device, self.dtype)
        if (got := bad_number(latents)) is not None:
            raise ValueError(f"latents: got {got} ({numbers(latents)}), expected finite numbers")
        head = preset.first_chunk or latents.shape[2] % preset.chunk
        rest = latents[:, :, head:].split(preset.chunk, dim=2) if latents.shape[2] > head else ()
        return [latents[:, :, :head], *rest] if head else list(rest)
