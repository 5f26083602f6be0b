"""Rollouts: a student streams its own past through the engine's stream, so that training sees what inference does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

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


def noise_levels(preset: Preset, chunk: int = 0) -> Tensor:
    """Sigmas of a chunk's denoising steps, and the 0 at their end: [steps + 1]."""
    schedule = Schedule(preset)
    return torch.tensor([schedule.sigma(t) for t, _ in schedule.steps(chunk)] + [0.0])


def chunks_in(frames: int, preset: Preset) -> int:
    """The chunks of a clip of so many latent frames. ValueError unless it ends with a chunk."""
    if frames < 0 or frames % preset.chunk:
        raise ValueError(f"frames: got {frames}, expected a multiple of the chunk ({preset.chunk})")
    return frames // preset.chunk


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
    A clip that ends within a chunk is cut there.
    """
    pipeline, latents, made = _pipeline(student, preset, size), list[Tensor](), 0
    with pipeline.stream(text_emb.detach(), noise=SampleNoise(seeds), latents=start) as stream:
        while made < frames:
            latents.append(stream.next_latent())
            made += latents[-1].shape[2]
    return torch.cat(latents, 2)[:, :, :frames].clone()  # outside inference mode a clone is an ordinary tensor


class Exits(NamedTuple):
    """What a rollout leaves for the pass with gradients. Latents are [B, C, F, h, w]."""

    clean: Tensor  # the frames that the exit steps predicted
    noisy: Tensor  # what these steps got as input
    sigma: Tensor  # the noise levels that they were told, [B, F]
    level: Tensor  # those that the solver took, [F]: of the grid points next to them
    past: Tensor  # what later chunks saw of every chunk but the last, [B, C, F - chunk, h, w]
    past_sigma: Tensor  # the noise levels there, [B, F - chunk]

    def predicted(self, flow: Tensor) -> Tensor:
        """The clean frames that a flow at the exit steps predicts."""
        return _predicted(self.noisy, flow, self.level)


def _predicted(noisy: Tensor, flow: Tensor, level: Tensor) -> Tensor:
    return noisy - level[:, None, None].to(noisy) * flow


@contextmanager
def timed_passes(stages: Stages) -> Iterator[list[tuple[Pass, Tensor]]]:
    """A list to which streams add their passes with a timestep, and the flows, while they run."""
    plain, made = stages.run, list[tuple[Pass, Tensor]]()

    def run(step: Pass, cache: RingCache, text_kv: TextKV) -> Tensor:
        flow = plain(step, cache, text_kv)
        if step.kind.timed:
            made.append((step, flow))
        return flow

    with passes_run_by(stages, run):
        yield made


def roll_exits(
    student: Adapted,
    text_emb: Tensor,
    frames: int,
    exit_step: int,
    seeds: Sequence[int],
    preset: Preset,
    size: tuple[int, int] = (8, 8),
    earlier: tuple[int, Tensor] | None = None,
) -> Exits:
    """Stream latent frames, without gradients, and look at denoising step `exit_step`, or a shorter loop's last one.

    Where the preset commits clean chunks, loops end with this step and later chunks see what it predicted, as in
    Self-Forcing. With a context timestep they see it noised to that level. Where the preset commits noisy chunks, loops
    run to their ends and later chunks see the input of the last step, as in any stream. `earlier` is a number of frames
    and the text_emb that they have; the prompt is then switched, and the stream commits what it has anew.
    """
    begins, first_emb = earlier or (0, text_emb)
    count, switch, noisy_past = chunks_in(frames, preset), chunks_in(begins, preset), preset.commit == "noisy"
    streamed = preset if noisy_past else replace(preset, stop_after=exit_step + 1)
    pipeline, schedule, noise = _pipeline(student, streamed, size), Schedule(streamed), SampleNoise(seeds)
    found: list[tuple[Tensor, ...]] = []
    finished: list[Tensor] = []
    past: list[tuple[Tensor, Tensor]] = []
    if preset.context_timestep:
        _commit_from(past, pipeline)
    with timed_passes(student.stages) as passes, pipeline.stream(first_emb.detach(), noise=noise) as stream:
        for number in range(count):
            if number == switch > 0:
                stream.set_prompt(text_emb.detach())
                if noisy_past:
                    past[:] = [(clean, torch.zeros_like(t)) for clean, (_, t) in zip(finished, past, strict=True)]
            finished.append(stream.next_latent())
            last, levels = passes[-1][0], [schedule.sigma(t) for t, _ in schedule.steps(number)]
            found.append(_exit_of(passes[-len(levels) :], levels, exit_step, finished[-1]))
            past.append((last.latent, last.t) if noisy_past else _noised_past(finished[-1], number, noise, streamed))
            passes.clear()
    # Outside inference mode a clone is an ordinary tensor. Frozen weights may be bf16; clips are not.
    clean, noisy = (torch.cat([part[i] for part in found], 2).clone().float() for i in (0, 1))
    sigma, level = torch.stack([part[2] for part in found], 1) / 1000, torch.cat([part[3] for part in found])
    seen = torch.cat([latent for latent, _ in past], 2)[:, :, : -preset.chunk].clone().float()
    told = torch.stack([t for _, t in past], 1)[:, :-1] / 1000
    sigma, level, told = (value.repeat_interleave(preset.chunk, -1) for value in (sigma, level, told))
    return Exits(clean, noisy, sigma, level, seen, told)


def _exit_of(
    calls: Sequence[tuple[Pass, Tensor]], levels: Sequence[float], exit_step: int, finished: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an exit step predicted, its input, its t [B] and level [1], from a chunk's denoising passes and flows."""
    exits = min(exit_step, len(levels) - 1)
    (step, flow), level = calls[exits], torch.tensor([levels[exits]])
    clean = finished if exits == len(levels) - 1 else _predicted(step.latent, flow, level)
    return clean, step.latent, step.t, level


def _noised_past(clean: Tensor, number: int, noise: SampleNoise, preset: Preset) -> tuple[Tensor, Tensor]:
    """A finished chunk at the preset's context timestep, and that timestep [B]."""
    t = torch.full((len(clean),), preset.context_timestep, device=clean.device)
    if not preset.context_timestep:
        return clean, t
    used = max(map(len, preset.steps))  # a draw that no denoising step takes
    fresh, level = noise.draw(number, used + 1, tuple(clean.shape))[used].to(clean), preset.context_timestep / 1000
    return (1 - level) * clean + level * fresh, t


def _commit_from(past: Sequence[tuple[Tensor, Tensor]], pipeline: Pipeline) -> None:
    """Make the streams of a pipeline commit what `past` holds of their chunks."""
    plain = pipeline.generator.commit

    def commit(x: Tensor, state: Any, supplied: bool = False) -> None:
        plain(past[state.index][0], state, supplied)

    pipeline.generator.commit = commit  # type: ignore[method-assign]


def roll_into(
    student: Adapted,
    text_emb: Tensor,
    frames: int,
    steps: int,
    seeds: Sequence[int],
    preset: Preset,
    size: tuple[int, int] = (8, 8),
) -> tuple[Tensor, Tensor]:
    """Stream `frames` latent frames, then take `steps` denoising steps into the next chunk, without gradients.

    Returns the finished frames [B, C, frames, h, w] and the unfinished chunk [B, C, chunk, h, w].
    """
    pipeline, schedule, number = _pipeline(student, preset, size), Schedule(preset), chunks_in(frames, preset)
    generator, solver, noise = pipeline.generator, make_solver(preset.solver, schedule), SampleNoise(seeds)
    with pipeline.stream(text_emb.detach(), noise=noise) as stream, torch.inference_mode():
        latents = [stream.next_latent() for _ in range(number)]
        if latents:  # a stream commits a chunk only when the caller asks for the next one
            generator.commit(latents[-1], stream.state)
        batch, channels = len(text_emb), pipeline.config.in_channels
        levels = schedule.steps(number)
        shape = (batch, channels, preset.chunk, *size)
        x, *fresh = noise.draw(number, len(levels) if solver.renoises else 1, shape).to(pipeline.device, pipeline.dtype)
        for step, (t, t_next) in enumerate(levels[:steps]):
            flow = generator.denoise(x, t, stream.state, short=schedule.is_short(number, t))
            x = solver.step(x, flow, t, t_next, fresh[step] if step < len(fresh) else None)
    past = torch.cat(latents, 2) if latents else x[:, :, :0]
    return past.clone(), x.clone()
