"""Rollouts: a student streams its own past through the engine's generator, caches, schedule and solver."""

import torch
from torch import Tensor

from distill.student import Student
from engine.config import Preset
from engine.generators import Geometry, GreedyGenerator
from engine.noise import PhiloxNoise
from engine.schedule import Schedule, make_solver


def noise_levels(preset: Preset) -> Tensor:
    """Noise levels of one chunk's denoising steps and the 0 they end at: [steps + 1]."""
    schedule = Schedule(preset)
    return torch.tensor([schedule.sigma(t) for t, _ in schedule.steps(0)] + [0.0])


@torch.no_grad()
def roll_out(
    student: Student,
    text_emb: Tensor,
    frames: int,
    seed: int,
    preset: Preset,
    size: tuple[int, int] = (8, 8),
    start: Tensor | None = None,
) -> Tensor:
    """Stream latent frames [B, C, frames, h, w] from text_emb [B, rows, text_dim].

    `start` [B, C, k, h, w] gives the first k frames, as an image or a clip would.
    """
    config, batch = student.sdd.config, len(text_emb)
    generator = GreedyGenerator(student.stages, config, preset, torch.float32, torch.device("cpu"))
    state = generator.open(Geometry.of(config, batch, *size), student.stages.prepare_text(text_emb))
    schedule, noise = Schedule(preset), PhiloxNoise(seed)
    shape = (batch, config.in_channels, 1, *size)
    given = start.split(1, 2) if start is not None else ()
    done: list[Tensor] = []
    for index in range(frames):
        if done:
            generator.commit(done[-1], state)
        if index < len(given):
            done.append(given[index])
            continue
        solver, x = make_solver(preset.solver, schedule), noise.draw(index, 0, shape)
        for number, (t, t_next) in enumerate(schedule.steps(index), start=1):
            flow = generator.denoise(x, t, state)
            x = solver.step(x, flow, t, t_next, lambda i=index, n=number: noise.draw(i, n, shape))
        done.append(x)
    return torch.cat(done, 2)
