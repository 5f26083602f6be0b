"""The loop: noise -> denoising steps -> VAE decode -> commit, chunk by chunk, while the caller pulls frames."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import Preset, TransformerConfig
from engine.generators import family_of, make_generator
from engine.generators.base import Generator, Geometry
from engine.model.text import Tokenizer
from engine.model.vae import frames_to_uint8, uint8_to_frames
from engine.runtime.memory_plan import MemoryPlan
from engine.runtime.passes import Stages
from engine.runtime.transfer import Download, SideStream, upload
from engine.sampling.noise import DrawnAhead, NoiseSource, PhiloxNoise
from engine.sampling.schedule import Schedule
from engine.sampling.solvers import SOLVERS, make_solver


@dataclass(frozen=True)
class Pipeline:
    """Weights, backend and preset, shared by all streams. All changing state belongs to a Stream."""

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
    notes: tuple[str, ...] = ()  # what a user should know about the weights: what was chosen, what is lossy
    plan: MemoryPlan | None = None  # the memory that the pipeline and one stream were counted to need
    low_memory: bool = False  # decode a chunk before the next one is made, on the same queue

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

    def warm(self) -> None:
        """Stream an empty prompt twice, to compile kernels and capture graphs before the first stream."""
        rows = self.tokenizer.rows if self.tokenizer else 1
        prompt = torch.zeros(1, rows, self.config.text_dim)
        for _ in range(2):  # some passes run once per stream, and a graph is captured on the second run
            with self.stream(prompt) as stream:
                for _ in range(3):
                    stream.next_chunk()
                stream.set_prompt(prompt)  # its passes as well
                stream.next_chunk()

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> Tensor:
        """text_emb [1, rows, text_dim] of a prompt. ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("got a pipeline without a tokenizer, expected one")
        ids, mask = self.tokenizer(prompt)
        return self.stages.encode_text(ids.to(self.device), mask.to(self.device)).to(self.device, self.dtype)

    @torch.inference_mode()
    def encode_clip(self, clip: np.ndarray) -> Tensor:
        """Latents [1, C, F, h, w] of uint8 frames [T, H, W, 3]. F is a multiple of the family's unit.

        A longer clip than 1 + 4 (F - 1) frames loses its beginning; a shorter one (an image) repeats its last frame.
        ValueError for another shape or dtype.
        """
        expected = (self.height, self.width, 3)
        if clip.ndim != 4 or clip.shape[1:] != expected or clip.dtype != np.uint8 or not len(clip):
            raise ValueError(
                f"clip: got {clip.dtype} {list(clip.shape)}, expected uint8 [T, {self.height}, {self.width}, 3]"
            )
        unit = family_of(self.preset).unit(self.preset)
        latents = max((1 + (len(clip) - 1) // self.temporal) // unit, 1) * unit
        frames = 1 + self.temporal * (latents - 1)
        clip = clip[-frames:]
        if len(clip) < frames:
            clip = np.concatenate([clip, np.repeat(clip[-1:], frames - len(clip), axis=0)])
        video = uint8_to_frames(torch.from_numpy(np.ascontiguousarray(clip))[None]).to(self.device, self.dtype)
        return self.stages.vae_encode(video)

    def stream(
        self, prompt: str | Tensor, *, seed: int = 0, frames: int | None = None, clip: np.ndarray | None = None,
        latents: Tensor | None = None, noise: NoiseSource | None = None,
    ) -> "Stream":  # fmt: skip
        """An iterator of uint8 frames [H, W, 3].

        prompt   text, or a text embedding [B, rows, text_dim]; only video 0 of a batch is decoded
        seed     0 to 2^64 - 1
        frames   number of frames to stream; None means no limit
        clip     uint8 [T, H, W, 3] to start from: one frame is image-to-video, a longer clip is continued
        latents  an encoded clip [B, C, F, h, w]
        noise    replaces the seeded source

        Raises ValueError for invalid arguments (got and expected).
        """
        if frames is not None and frames < 1:
            raise ValueError(f"frames: got {frames}, expected at least 1")
        if clip is not None:
            latents = self.encode_clip(clip)
        if noise is None:
            noise = PhiloxNoise(seed)
            # A GPU would wait for the draws. A processor has no idle core for another thread.
            noise = DrawnAhead(noise, self.worker) if self.device.type == "cuda" else noise
        return Stream(self, prompt, noise, frames, latents)


class Stream:
    """One video in progress: iterate for frames, or call `next_chunk` for whole chunks.

    A failed chunk changes nothing: the next call makes the same chunk again. Exceptions: if CUDA graphs decode, a
    failed decoding closes the stream; if passes are joined, a failed one in a full ring of the causal family computes
    the window again. Not thread-safe; streams of one pipeline are independent.
    """

    def __init__(
        self, pipeline: Pipeline, prompt: str | Tensor, noise: NoiseSource, frames: int | None, latents: Tensor | None
    ) -> None:
        self.pipeline, self.noise, self.limit = pipeline, noise, frames
        self.schedule = Schedule(pipeline.preset)
        text_emb = self._embed(prompt)
        config = pipeline.config
        geometry = Geometry.of(
            config, len(text_emb), pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial
        )
        self.supplied = deque(self._split(latents, geometry)) if latents is not None else deque()
        self._ahead_of_time = noise if isinstance(noise, DrawnAhead) else None
        self._prepare_noise(len(self.supplied), geometry)
        with torch.inference_mode():
            self.state = pipeline.generator.open(geometry, pipeline.stages.prepare_text(text_emb))
        self.emitted = 0  # frames returned by the iterator so far
        self._vae_cache: Any = None
        self._uncommitted: tuple[Tensor, bool] | None = None  # the last chunk, and whether it was supplied
        # On a GPU the stream makes the next latent while the last one is decoded and shown.
        self.looks_ahead = pipeline.device.type == "cuda" and not pipeline.low_memory
        self._ahead: Tensor | Exception | None = None
        self._started = 0  # frames of the chunks whose decoding has begun
        self._frames: deque[np.ndarray] = deque()
        self._closed = False

    def set_prompt(self, prompt: str | Tensor, recommit: bool = True) -> None:
        """Switch the prompt, text or embedding [B, rows, text_dim], from the next chunk on.

        `recommit` also rewrites the window's keys and values under the new prompt, so that the past no longer pulls
        towards the old one. Without it, a stream that looks ahead has committed the last chunk under the old prompt.
        ValueError for another shape or a closed stream.
        """
        self._check_open()
        with torch.inference_mode():
            text_kv = self.pipeline.stages.prepare_text(self._embed(prompt, self.state.geometry.batch))
            self.pipeline.generator.set_text(text_kv, self.state, recommit)
        self._ahead = None  # it has the old prompt; noise depends only on the chunk, so make it again

    @torch.inference_mode()
    def next_chunk(self) -> np.ndarray:
        """The next chunk, uint8 [T, H, W, 3]: T = 1 + 4 (F - 1) for chunk 0, then 4 F. ValueError if closed."""
        x = self._take()
        shown = self.pipeline.side.run(self._decode, x)
        self._accept(x)
        first, self._started = self._started == 0, self._started + len(shown)
        if self.looks_ahead and not first and (self.limit is None or self._started < self.limit):
            self._look_ahead()  # not in the first call: the viewer waits for its frame
        return shown.wait()

    @torch.inference_mode()
    def next_latent(self) -> Tensor:
        """The next chunk's clean latent [B, C, F, h, w], not decoded. ValueError if closed."""
        x = self._take()
        self._accept(x)
        return x

    def _take(self) -> Tensor:
        """Return the latent made ahead, or make one. Raises the error of a failed look-ahead."""
        self._check_open()
        x, self._ahead = self._ahead, None
        if isinstance(x, Exception):
            raise x
        return self._make() if x is None else x

    def _look_ahead(self) -> None:
        try:
            self._ahead = self._make()
        except Exception as error:  # it belongs to the next chunk, so the next call raises it
            self._ahead = error

    def _make(self) -> Tensor:
        """Commit the previous chunk, then make the next one without publishing it."""
        generator, state = self.pipeline.generator, self.state
        # Commit lazily, so that cache passes do not delay frames.
        if self._uncommitted is not None:
            generator.commit(self._uncommitted[0], state, supplied=self._uncommitted[1])
            self._uncommitted = None
        if self.supplied:
            return self.supplied[0]
        index = state.index
        steps = self.schedule.steps(index)
        solver = make_solver(self.pipeline.preset.solver, self.schedule)
        noise = self.noise.draw(index, *self._draws(index, state.geometry))
        x, *fresh = upload(noise, self.pipeline.device, self.pipeline.dtype)
        self._prepare_noise(index + 1, state.geometry)
        for (t, t_next), new in zip_longest(steps, fresh):
            flow = generator.denoise(x, t, state)
            x = solver.step(x, flow, t, t_next, new)
        return x

    def _accept(self, x: Tensor) -> None:
        self._uncommitted = x, bool(self.supplied)
        if self.supplied:
            self.supplied.popleft()

    def close(self) -> None:
        """Drop caches and frames, and end the stream. Closing twice is fine."""
        self._closed = True
        self._frames.clear()
        self.supplied.clear()
        self.state = self._uncommitted = self._vae_cache = self._ahead = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if self._closed or (self.limit is not None and self.emitted >= self.limit):
            raise StopIteration
        if not self._frames:
            self._frames.extend(self.next_chunk())
        self.emitted += 1
        return self._frames.popleft()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("stream: got a closed one, expected an open one")

    def _embed(self, prompt: str | Tensor, batch: int | None = None) -> Tensor:
        if isinstance(prompt, str):
            prompt = self.pipeline.encode_prompt(prompt)
        width = self.pipeline.config.text_dim
        fits = prompt.ndim == 3 and min(prompt.shape) > 0 and prompt.shape[-1] == width
        if not fits or len(prompt) != (batch or len(prompt)):
            raise ValueError(f"prompt: got an embedding {list(prompt.shape)}, expected [{batch or 'B'}, rows, {width}]")
        return prompt.to(self.pipeline.device, self.pipeline.dtype)

    def _draws(self, index: int, geometry: Geometry) -> tuple[int, tuple[int, ...]]:
        """How many draws chunk `index` takes, and the shape of each."""
        g, preset = geometry, self.pipeline.preset
        count = len(self.schedule.steps(index)) if SOLVERS[preset.solver].renoises else 1
        return count, (g.batch, g.channels, preset.chunk_frames(index), g.height, g.width)

    def _prepare_noise(self, index: int, geometry: Geometry) -> None:
        """Begin to draw what chunk `index` will take, if the source can do that beside the stream."""
        if self._ahead_of_time is not None:
            self._ahead_of_time.prepare(index, *self._draws(index, geometry))

    def _split(self, latents: Tensor, geometry: Geometry) -> list[Tensor]:
        """Split supplied latents [B, C, F, h, w] into chunks; the first may be shorter. ValueError if misshapen."""
        expected = geometry.batch, geometry.channels, geometry.height, geometry.width
        preset = self.pipeline.preset
        unit = family_of(preset).unit(preset)
        fits = latents.ndim == 5 and (*latents.shape[:2], *latents.shape[3:]) == expected
        if not fits or latents.shape[2] < 1 or latents.shape[2] % unit:
            frames = "F" if unit == 1 else f"{unit}k"
            raise ValueError(f"latents: got {list(latents.shape)}, expected "
                             f"[{expected[0]}, {expected[1]}, {frames}, {expected[2]}, {expected[3]}]")  # fmt: skip
        latents = latents.to(self.pipeline.device, self.pipeline.dtype)
        head = preset.first_chunk or latents.shape[2] % preset.chunk
        rest = latents[:, :, head:].split(preset.chunk, dim=2) if latents.shape[2] > head else ()
        return [latents[:, :, :head], *rest] if head else list(rest)

    def _decode(self, x: Tensor) -> Download:
        """Decode a chunk x [B, C, F, h, w]; keep the VAE's next cache only after success."""
        stages, cache, parts = self.pipeline.stages, self._vae_cache, []
        try:
            for latent in x.split(1, dim=2):
                frames, cache = stages.vae_first(latent) if cache is None else stages.vae_steady(latent, cache)
                parts.append(frames_to_uint8(frames[:1])[0])
            shown = Download(torch.cat(parts))
        except Exception:
            if stages.capabilities.moves_vae_cache:
                self.close()  # the cache has changed in place, so a retry would decode the chunk after itself
            raise
        self._vae_cache = cache
        return shown
