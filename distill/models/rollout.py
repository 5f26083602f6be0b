"""Rollouts: a student streams its own past through the engine's stream, so that training sees what inference does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from distill.models.student import Adapted, passes_run_by
from engine.config import Preset
from engine.loader import assemble
from engine.model.cache import RingCache
from engine.model.vae import VAEConfig
from engine.runtime.passes import Pass, Stages, TextKV
from engine.sampling.noise import PhiloxNoise
from engine.sampling.schedule import Schedule
from engine.sampling.solvers import make_solver
from engine.stream import Pipeline


class SampleNoise:
    """Noise of a batch whose samples have their own seeds. Each gets the noise that its own stream would draw."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.sources = [PhiloxNoise(seed) for seed in seeds]

    def draw(self, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
        """float32 [count, *shape]; shape[0] is the batch."""
        if shape[0] != len(self.sources):
            raise ValueError(f"noise: got a batch of {shape[0]}, expected {len(self.sources)}")
        return torch.cat([source.draw(chunk, count, (1, *shape[1:])) for source in self.sources], 1)


def noise_levels(preset: Preset) -> Tensor:
    """Sigmas of one chunk's denoising steps, and the 0 at their end: [steps + 1]."""
    schedule = Schedule(preset)
    return torch.tensor([schedule.sigma(t) for t, _ in schedule.steps(0)] + [0.0])


def _pipeline(student: Adapted, preset: Preset, size: tuple[int, int]) -> Pipeline:
    """The engine's pipeline of a student, on latents of `size` (height, width)."""
    scale = VAEConfig()  # any scale will do: nothing here decodes to pixels
    height, width = (side * scale.scale_factor_spatial for side in size)
    model = next(iter(student.stages.models.values()))
    weight = model.proj_out.weight
    return assemble(
        student.stages,
        model.config,
        preset,
        weight.dtype,
        weight.device,
        height=height,
        width=width,
        vae_config=scale,
    )


def roll_out(
    student: Adapted,
    text_emb: Tensor,
    frames: int,
    seeds: Sequence[int],
    preset: Preset,
    size: tuple[int, int] = (8, 8),
    start: Tensor | None = None,
) -> Tensor:
    """Stream latent frames [B, C, frames, h, w] from text_emb [B, rows, text_dim], without gradients.

    `seeds` holds one seed per sample. `start` [B, C, k, h, w] replaces the first k frames, as an image or a clip would.
    """
    pipeline = _pipeline(student, preset, size)
    with pipeline.stream(text_emb.detach(), noise=SampleNoise(seeds), latents=start) as stream:
        latents = [stream.next_latent() for _ in range(frames)]
    return torch.cat(latents, 2).clone()  # outside inference mode a clone is an ordinary tensor


@contextmanager
def _denoising(stages: Stages) -> Iterator[list[Pass]]:
    """A list that holds the newest denoising pass, and nothing else, while streams run."""
    plain, newest = stages.run, list[Pass]()

    def run(step: Pass, cache: RingCache, text_kv: TextKV) -> Tensor:
        if step.kind.timed:
            newest[:] = [step]
        return plain(step, cache, text_kv)

    with passes_run_by(stages, run):
        yield newest


def roll_exits(
    student: Adapted,
    text_emb: Tensor,
    frames: int,
    exit_step: int,
    seeds: Sequence[int],
    preset: Preset,
    size: tuple[int, int] = (8, 8),
    earlier: tuple[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stream latent frames that end after denoising step `exit_step`, or a shorter loop's last one, without gradients.

    Later frames see the clean frames that their past's exit step predicted, as in Self-Forcing. `earlier` is a number
    of frames and the text_emb that they have; the prompt is then switched. Returns the frames
    [B, C, frames, h, w], what the exit step got as input (the same shape), and its noise levels sigma [B, frames].
    """
    begins, first_emb = earlier or (0, text_emb)
    pipeline = _pipeline(student, replace(preset, stop_after=exit_step + 1), size)
    clean, noisy, levels = [], [], []
    with (
        _denoising(student.stages) as newest,
        pipeline.stream(first_emb.detach(), noise=SampleNoise(seeds)) as stream,
    ):
        for frame in range(frames):
            if frame == begins > 0:
                stream.set_prompt(text_emb.detach())
            clean.append(stream.next_latent())
            (last,) = newest
            noisy.append(last.latent)
            levels.append(last.t / 1000)
    return torch.cat(clean, 2).clone(), torch.cat(noisy, 2).clone(), torch.stack(levels, 1).clone()


def roll_into(
    student: Adapted,
    text_emb: Tensor,
    frames: int,
    steps: int,
    seeds: Sequence[int],
    preset: Preset,
    size: tuple[int, int] = (8, 8),
) -> tuple[Tensor, Tensor]:
    """Stream `frames` latent frames, then take `steps` denoising steps into the next one, without gradients.

    Returns the finished frames [B, C, frames, h, w] and the unfinished one [B, C, 1, h, w].
    """
    pipeline, schedule = _pipeline(student, preset, size), Schedule(preset)
    generator, solver, noise = pipeline.generator, make_solver(preset.solver, schedule), SampleNoise(seeds)
    with pipeline.stream(text_emb.detach(), noise=noise) as stream, torch.inference_mode():
        latents = [stream.next_latent() for _ in range(frames)]
        if latents:  # a stream commits a chunk only when the caller asks for the next one
            generator.commit(latents[-1], stream.state)
        batch, channels = len(text_emb), pipeline.config.in_channels
        wanted = 1 + (len(preset.steps[-1]) - 1 if solver.renoises else 0)
        x, *fresh = noise.draw(frames, wanted, (batch, channels, 1, *size)).to(pipeline.device, pipeline.dtype)
        for number, (t, t_next) in enumerate(schedule.steps(frames)[:steps]):
            flow = generator.denoise(x, t, stream.state)
            x = solver.step(x, flow, t, t_next, fresh[number] if number < len(fresh) else None)
    past = torch.cat(latents, 2) if latents else x[:, :, :0]
    return past.clone(), x.clone()
