"""What the probe looks at: the teacher on noised clips, and streams of the student. Both can run again on the same
inputs with other attention, and both make clips for the scorer.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.attention.probe import Probe, Watch, level_of, watching
from distill.models.rollout import timed_passes
from distill.models.sampling import joint_flow, noised, sample_joint
from distill.scores.pixels import from_uint8
from engine.generators.base import Geometry
from engine.model.transformer import WanTransformer
from engine.model.vae import frames_to_uint8
from engine.runtime.passes import Pass
from engine.sampling.schedule import Schedule
from engine.stream import Pipeline, PythonStream
from engine.weights.checkpoint import load_transformer
from engine.weights.folders import Given, find_parts

Flows = dict[float, Tensor]  # noise level -> flow [1, C, frames, h, w]


@dataclass(frozen=True)
class Clips:
    """What all subjects run on: captions, their clean latents [B, C, F, h, w], and the seed of the noise."""

    captions: list[str]
    latents: Tensor
    seed: int

    @property
    def frames(self) -> int:
        return self.latents.shape[2]


class Subject(ABC):
    """A model under the probe: its transformers by role, and the noise levels at which each role denoises."""

    name: str
    models: Mapping[str, WanTransformer]
    levels: Mapping[str, tuple[float, ...]]

    def __init__(self, pipeline: Pipeline, clips: Clips) -> None:
        self.pipeline, self.clips = pipeline, clips

    @abstractmethod
    def flows(self, number: int, watches: Mapping[str, Watch]) -> Flows:
        """The flow of clip `number` at every noise level, with watches by role; inputs are the same every time."""

    @abstractmethod
    def video(self, number: int, watches: Mapping[str, Watch]) -> Tensor:
        """A clip that the model makes of caption `number`, [3, T, H, W] in [-1, 1]; its noise is always the same."""

    def touched(self, role: str) -> tuple[float, ...] | None:
        """The noise levels at which a replacement acts: not in a stream's context passes. None: all."""
        return self.levels[role]

    def mass(self, queries: int | None) -> dict[str, Tensor]:
        """M of every role, [prompts, levels, layers, heads, F, F]; NaN where no key was seen."""
        found = defaultdict(list)
        for number in range(len(self.clips.captions)):
            probes = {
                role: Probe(self.clips.frames, levels, self.models[role].config.num_layers, queries, number)
                for role, levels in self.levels.items()
            }
            self.flows(number, probes)
            for role, probe in probes.items():
                found[role].append(torch.stack([probe.mass[level] for level in self.levels[role]]))
        return {role: torch.stack(parts) for role, parts in found.items()}

    def text_emb(self, number: int) -> Tensor:
        return self.pipeline.encode_prompt(self.clips.captions[number])


class Teacher(Subject):
    """The bidirectional teacher: all frames of a clip see all."""

    name = "teacher"

    def __init__(
        self, pipeline: Pipeline, clips: Clips, folder: Path, levels: tuple[float, ...], steps: int, guidance: float
    ) -> None:
        super().__init__(pipeline, clips)
        parts = find_parts(folder, Given(dtype=pipeline.dtype))
        model = load_transformer(parts.config, parts.transformer, pipeline.dtype, pipeline.device).eval()
        self.model, self.steps, self.guidance = model, steps, guidance
        self.models, self.levels = {"teacher": model}, {"teacher": levels}

    def touched(self, role: str) -> None:
        """A clip that is sampled passes other levels than those that were measured."""
        return None

    @torch.inference_mode()
    def flows(self, number: int, watches: Mapping[str, Watch]) -> Flows:
        text, clean = (
            self.model.prepare_text(self.text_emb(number)),
            self._placed(self.clips.latents[number : number + 1]),
        )
        found, noise = {}, self._noise(number)
        with watching(self.models, watches):
            for level in self.levels["teacher"]:
                sigma = torch.full((1, self.clips.frames), level, device=clean.device)
                found[level] = joint_flow(self.model, noised(clean, noise, sigma).to(clean), sigma, text)
        return found

    @torch.inference_mode()
    def video(self, number: int, watches: Mapping[str, Watch]) -> Tensor:
        text, empty = (self.model.prepare_text(emb) for emb in (self.text_emb(number), self.pipeline.encode_prompt("")))
        with watching(self.models, watches):
            latent = sample_joint(self.model, text, empty, self._noise(number), steps=self.steps, scale=self.guidance)
        return decoded(self.pipeline, latent)

    def _noise(self, number: int) -> Tensor:
        draws = torch.Generator().manual_seed(self.clips.seed + number)
        return self._placed(torch.randn(1, *self.clips.latents.shape[1:], generator=draws))

    def _placed(self, latent: Tensor) -> Tensor:
        return latent.to(self.pipeline.device, self.pipeline.dtype)


class Student(Subject):
    """A stream of the engine. Its roles are those of its family: ETM and SDD, or one causal transformer."""

    name = "student"

    def __init__(self, pipeline: Pipeline, clips: Clips, inputs: "Student | None" = None) -> None:
        """inputs: `flows` repeats the passes of this student's streams instead of its own."""
        super().__init__(pipeline, clips)
        self.models = pipeline.stages.models  # type: ignore[attr-defined]  # of the torch backend
        schedule = Schedule(pipeline.preset)
        timed = {level_of(t) for number in range(self.chunks) for t, _ in schedule.steps(number)}
        denoises = {kind.role for kind in pipeline.generator.passes if kind.timed}
        self.levels = {role: tuple(sorted(timed)) if role in denoises else (0.0,) for role in self.models}
        self._streamed: dict[int, list[tuple[Tensor, list[Pass]]]] = {} if inputs is None else inputs._streamed

    @cached_property
    def chunks(self) -> int:
        """Chunks of a clip. ValueError unless it ends with a chunk."""
        made = number = 0
        while made < self.clips.frames:
            made += self.pipeline.preset.chunk_frames(number)
            number += 1
        if made != self.clips.frames:
            raise ValueError(f"frames: got {self.clips.frames} latent frames, expected whole chunks of the student")
        return number

    def flows(self, number: int, watches: Mapping[str, Watch]) -> Flows:
        """The stream's own passes again: every chunk has the inputs and the past of the stream without watches."""
        pipeline, found = self.pipeline, defaultdict[float, list[Tensor]](list)
        generator, config = pipeline.generator, pipeline.config
        height, width = pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial
        with torch.inference_mode():
            text = pipeline.stages.prepare_text(self.text_emb(number))
            state = generator.open(Geometry.of(config, 1, height, width), text)
            with watching(self.models, watches, lambda: state.position):
                for finished, passes in self.passes(number):
                    for step in passes:
                        t = float(step.t[0])  # type: ignore[index]
                        found[level_of(t)].append(generator.denoise(step.latent, t, state))
                    generator.commit(finished, state)
        return {level: torch.cat(parts, 2) for level, parts in found.items()}

    def passes(self, number: int) -> list[tuple[Tensor, list[Pass]]]:
        """Every chunk of a stream without watches: its finished latent and its denoising passes."""
        if number not in self._streamed:
            schedule, made = Schedule(self.pipeline.preset), []
            with self.open(number) as stream, timed_passes(self.pipeline.stages) as passes:
                for index in range(self.chunks):
                    finished = stream.next_latent()
                    made.append((finished, [step for step, _ in passes[-len(schedule.steps(index)) :]]))
            self._streamed[number] = made
        return self._streamed[number]

    def video(self, number: int, watches: Mapping[str, Watch]) -> Tensor:
        with (
            self.open(number) as stream,
            watching(self.models, watches, lambda: stream.state.position),
        ):
            return from_uint8(np.concatenate([stream.next_chunk() for _ in range(self.chunks)]))

    def open(self, number: int) -> PythonStream:
        """A stream of caption `number`, with its seed."""
        return self.pipeline.stream(self.clips.captions[number], seed=self.clips.seed + number)


def decoded(pipeline: Pipeline, latent: Tensor) -> Tensor:
    """The pixels of a clip's latents [1, C, F, h, w], as a stream would show them: [3, T, H, W] in [-1, 1]."""
    return from_uint8(frames_to_uint8(pipeline.stages.modules()["vae"].decode(latent))[0].cpu().numpy())
