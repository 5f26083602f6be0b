"""The loop: noise -> denoising steps -> VAE decode -> commit, chunk by chunk, while the caller pulls frames."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.control.settings import Settings
from engine.control.steered import Steered
from engine.generators.base import Generator, Geometry
from engine.generators.source import Intake, Source, Start
from engine.model.vae import frames_to_uint8
from engine.runtime.blending import Course, Prompt
from engine.runtime.finite import bad_number, first_bad
from engine.runtime.passes import Stages
from engine.runtime.progress import StreamProgress, Waiting
from engine.runtime.results import HandsOverChunks
from engine.runtime.streams import Cancelled, Words, check_process
from engine.runtime.transfer import Download, upload
from engine.sampling.noise import DrawnAhead, NoiseSource, PhiloxNoise
from engine.sampling.schedule import Schedule
from engine.sampling.solvers import SOLVERS, make_solver
from engine.shared import Shared


class PythonStream(Steered, HandsOverChunks):
    """A stream whose loop runs in Python: on torch's modules, or on the graphs of a bundle.

    A call that fails or is interrupted, anywhere, changes nothing: the next call returns the same chunk, of the same
    bits. If the frames were decoded already, it returns those. HandsOver tells how a caller loses none. Exceptions:
    - CUDA graphs move the VAE's cache on in place. A decoding that fails or is interrupted inside ends the stream:
      later calls raise ValueError. Waiting for the frames is safe.
    - If passes are joined, a failed one in a full ring of the causal family computes the window again.

    Numbers that are not finite never become pixels. The call that meets them raises an error that says where they
    began: ValueError for weights, FloatingPointError for an overflow.

    One call at a time, see engine.runtime.streams.Stream. Streams of one pipeline are independent.
    """

    def __init__(
        self, pipeline: Shared, prompt: str | Tensor | Words, noise: NoiseSource, frames: int | None,
        latents: Tensor | None, source: Source | None = None,
    ) -> None:  # fmt: skip
        check_process(pipeline.process)
        self.pipeline, self.limit = pipeline, frames
        text_emb = pipeline.embedded(prompt)
        config = pipeline.config
        geometry = Geometry.of(
            config, len(text_emb), pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial
        )
        begun = Course(Prompt(0, text_emb))
        super().__init__(
            StreamProgress(supplied=tuple(pipeline.chunks_of(latents, geometry)), course=begun, intake=Intake()),
            Settings(pipeline.preset, noise, Schedule(pipeline.preset), source),
        )
        self._source, self._begun = source, Start([])  # of the chunk that was made last
        self._prepare_noise(len(self.supplied), geometry)
        strengths = {} if pipeline.adapters is None else pipeline.adapters.strengths
        with torch.inference_mode(), self._weights(strengths):
            self.state = pipeline.generator.open(geometry, pipeline.stages.prepare_text(text_emb))
        self.state.publish(text_emb=text_emb, strengths=strengths)
        # On a GPU the stream makes the next latent while the last one is decoded and shown.
        self.looks_ahead = pipeline.device.type == "cuda" and not pipeline.low_memory and source is None
        self._cancelled = False

    @property
    def supplied(self) -> tuple[Tensor, ...]:
        """Chunks [B, C, F, h, w] of the clip to start from that are not shown yet."""
        return self._now.supplied

    def cancel(self) -> None:
        """Make the call that runs, or else the next one that has a chunk to make, raise Cancelled once.

        The call ends at the next denoising step or latent frame, or when the source gives the frame that it waits for.
        Where a stream looks ahead, the call that runs may have its frames already; then it returns them, and the next
        one raises.
        """
        self._cancelled = True

    def _uncancel(self) -> None:
        self._cancelled = False

    def _go_on(self) -> None:
        """Between two steps of a chunk: Cancelled or ValueError if another thread has ended the call."""
        if self._closed:
            self._check_open()
        if self._cancelled:
            self._cancelled = False
            raise Cancelled("stream: cancelled")

    def flush(self) -> None:
        """Start over at frame 0 with the same prompt, strengths of adapters, seed, steps and window.

        The caches keep their memory. In a transition the prompt that was set last acts at once.
        """
        with self._turns:
            if self._closed:
                raise self._refusal()
            now, self._ahead, self._cancelled = self._now, None, False
            # The state follows with the next chunk: an interrupted call must not leave one without the other.
            self._now = StreamProgress(
                handed=now.handed, last=now.last, serial=now.serial, course=Course(self._prompt),
                intake=now.intake.restarted(),
            )  # fmt: skip
            self._spoiled, self._begun = -1, Start([])

    def _decoded(self, ahead: bool) -> np.ndarray:
        """The next chunk's frames, the same until a call has returned them. `ahead`: make the latent after it, too."""
        if self._now.waiting is None:
            self._decode(self._latent())
        now, waiting = self._now, cast(Waiting, self._now.waiting)
        first = now.started == len(waiting.shown)
        if ahead and not first and (self.limit is None or now.started < self.limit):
            self._look_ahead()  # not in the first call: the viewer waits for its frame
        pixels = waiting.shown.wait()
        self._check_open()  # another thread may have closed it meanwhile
        if not waiting.shown.finite:
            raise self._refused(waiting)
        return pixels

    def _latent(self) -> Tensor:
        """The next chunk's latent, made ahead or now. Raises the error of a failed look-ahead."""
        number = self._now.made
        self._go_on()
        if number == 0:
            self.pipeline.check_weights()
            if self.state.index:  # flushed
                self.pipeline.generator.restart(self.state)
        self._made_under = self._take_changes()
        if self._ahead is None or self._ahead[0] != number:
            if self._source is not None:
                self._wait_for_frames(self._source)
            with self._weights():
                self._ahead = number, self._make(self.pipeline)
        x = self._ahead[1]
        if isinstance(x, Exception):
            self._ahead = None
            raise x
        return x

    def _wait_for_frames(self, source: Source) -> None:
        with self._weights():
            self._commit(self.pipeline.generator)
        source.take(self._now.intake, self._now.made)
        self._go_on()
        self._made_under = self._take_changes()  # some may have been set meanwhile

    def _look_ahead(self) -> None:
        number = self._now.made
        if self._ahead is not None and self._ahead[0] == number:  # by an interrupted call
            return
        try:
            self._take_changes()  # in a transition each chunk has its own embedding
            with self._weights():
                self._ahead = number, self._make(self.pipeline)
        except Cancelled:
            self._cancelled = True  # the next call that has a chunk to make raises it, unless it is taken back
        except Exception as error:  # it belongs to the next chunk, so the next call raises it
            self._ahead = number, error

    def _commit(self, generator: Generator) -> None:
        """Commit the previous chunk. It is done lazily, so that cache passes do not delay frames."""
        now = self._now
        if now.uncommitted is not None and self.state.index < now.made:
            generator.commit(now.uncommitted[0], self.state, supplied=now.uncommitted[1])

    def _make(self, pipeline: Shared) -> Tensor:
        """Commit the previous chunk, then make the next one without publishing it."""
        generator, state, now = pipeline.generator, self.state, self._now
        self._commit(generator)
        if now.supplied:
            return now.supplied[0]
        state.joined = False  # a chunk that is made again takes the context pass along again
        state.kept = False  # and begins with a full step
        index = state.index
        begun = self._begun = self._start(index, pipeline)
        solver = make_solver(self.pipeline.preset.solver, self.schedule)
        noise = self.noise.draw(index, *self._draws(index, state.geometry))
        x, *fresh = upload(noise, self.pipeline.device, self.pipeline.dtype)
        self._prepare_noise(index + 1, state.geometry)
        x = begun.noised(x)
        for (t, t_next), new in zip_longest(begun.steps, fresh[: len(begun.steps) - 1]):
            self._go_on()
            flow = generator.denoise(x, t, state, short=self.schedule.is_short(index, t))
            x = solver.step(x, flow, t, t_next, new)
        return x

    def _start(self, index: int, pipeline: Shared) -> Start:
        if self._source is None:
            return Start(self.schedule.steps(index))
        return self._source.start(self._now.intake, index, self.schedule, pipeline.encoded)

    def _accepted(self, x: Tensor) -> StreamProgress:
        """The progress with one chunk more."""
        now = self._now
        return replace(
            now, made=now.made + 1, course=self._made_under, uncommitted=(x, bool(now.supplied)),
            supplied=now.supplied[1:], intake=self._begun.after,
        )  # fmt: skip

    def close(self) -> None:
        """Drop caches and frames, and end the stream. A call of another thread ends within a step."""
        self._closed = True
        if self._turns.free:
            self._drop()

    def _drop(self) -> None:
        super()._drop()
        self._begun = Start([])

    def _draws(self, index: int, geometry: Geometry) -> tuple[int, tuple[int, ...]]:
        """How many draws chunk `index` takes, and the shape of each."""
        g, preset = geometry, self.pipeline.preset
        strength = 1.0 if self._source is None else self._source.strength
        count = len(self.schedule.steps(index, strength)) if SOLVERS[preset.solver].renoises else 1
        return count, (g.batch, g.channels, preset.chunk_frames(index), g.height, g.width)

    def _prepare_noise(self, index: int, geometry: Geometry) -> None:
        """Begin to draw what chunk `index` will take, if the source can do that beside the stream."""
        if self._ahead_of_time is not None:
            self._ahead_of_time.prepare(index, *self._draws(index, geometry))

    def _decode(self, x: Tensor) -> None:
        """Begin to decode the next chunk x [B, C, F, h, w], which then waits to be handed over."""
        now = self._now
        shown, cache = self.pipeline.side.run(self._frames_of, x)
        if self.pipeline.device.type != "cuda" and not shown.finite:
            raise self._not_finite()
        after = self._accepted(x)
        self._now = replace(
            after, waiting=Waiting(shown, cache, now), started=now.started + len(shown)
        )  # fmt: skip
        self._ahead = None

    def _frames_of(self, x: Tensor) -> tuple[Download, Any]:
        """The frames of a chunk on their way to the host, and the VAE's next cache."""
        stages, cache, parts, largest = self.pipeline.stages, self._now.vae_cache, [], []
        for latent in x.split(1, dim=2):
            if not stages.capabilities.moves_vae_cache:
                self._go_on()
            if cache is None:
                frames, cache = stages.vae_first(latent)
            else:
                if stages.capabilities.moves_vae_cache:
                    self._spoiled = self._now.made  # until the chunk waits: decoded again, it would follow on itself
                frames, cache = stages.vae_steady(latent, cache)
            parts.append(frames_to_uint8(frames[:1])[0])
            largest.append(frames.amax())  # NaN if there is one in the frames; the VAE leaves no inf
        return Download(torch.cat(parts), torch.stack(largest)), cache

    def _refused(self, waiting: Waiting) -> Exception:
        """The error of a decoded chunk that is not finite. If it is not committed, the next call makes it again."""
        stages, number = self.pipeline.stages, waiting.before.made
        moved = stages.capabilities.moves_vae_cache and waiting.before.vae_cache is not None
        if self.state.index > number or moved:
            self._spoiled = self._now.made
            return first_bad(stages, f"chunk {number}")
        self._now = waiting.before
        return self._not_finite()

    def _not_finite(self) -> Exception:
        """The error of the next chunk, which is not finite."""
        number, steps = self._now.made, self._begun.steps
        self._ahead = None
        noise = self.noise.draw(number, *self._draws(number, self.state.geometry))
        if not self.supplied and (got := bad_number(noise)) is not None:
            return ValueError(f"noise: got {got} for chunk {number}, expected finite numbers")

        def again(stages: Stages) -> None:
            cache = self._now.vae_cache
            for latent in self._make(replace(self.pipeline, stages=stages)).split(1, dim=2):
                _, cache = stages.vae_first(latent) if cache is None else stages.vae_steady(latent, cache)

        with self._weights():
            return first_bad(self.pipeline.stages, f"chunk {number}", again, [t for t, _ in steps])


class Pipeline(Shared):
    """Weights, backend and preset, and the streams that share them."""

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

    def stream(
        self, prompt: str | Tensor | Words, *, seed: int = 0, frames: int | None = None, clip: np.ndarray | None = None,
        latents: Tensor | None = None, noise: NoiseSource | None = None, source: Iterable[np.ndarray] | None = None,
        strength: float | None = None, noise_scale: float | None = None,
    ) -> PythonStream:  # fmt: skip
        """An iterator of uint8 frames [H, W, 3].

        prompt   text; texts with weights, [(text, weight), ...], for the mean of their embeddings; or an embedding
                 [B, rows, text_dim], of which only video 0 is decoded. Of a text with more tokens than the model
                 reads, the rest is ignored with a PromptWarning (engine.model.text)
        seed     0 to 2^64 - 1
        frames   number of frames to stream; None means no limit
        clip     uint8 [T, H, W, 3] to start from: one frame is image-to-video, a longer clip is continued
        latents  an encoded clip [B, C, F, h, w]
        noise    replaces the seeded source
        source   frames uint8 [H, W, 3] that the video follows (docs/video-to-video.md). The stream ends where too few
                 are left for a chunk
        strength, noise_scale  how closely it follows them: engine.generators.source.Source

        Raises ValueError for invalid arguments (got and expected).
        """
        check_process(self.process)
        if frames is not None and frames < 1:
            raise ValueError(f"frames: got {frames}, expected at least 1")
        followed = self.follows(source, strength, noise_scale)
        if followed is not None and (clip is not None or latents is not None):
            raise ValueError("source: got a clip or latents as well, expected one of them")
        if clip is not None:
            latents = self.encode_clip(clip)
        if noise is None:
            noise = PhiloxNoise(seed)
            # A GPU would wait for the draws. A processor has no idle core for another thread.
            noise = DrawnAhead(noise, self.worker) if self.device.type == "cuda" else noise
        return PythonStream(self, prompt, noise, frames, latents, followed)
