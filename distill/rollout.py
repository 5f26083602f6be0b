"""Rollouts: a student streams its own past through the engine's own stream, so training sees what inference does."""

import torch
from torch import Tensor

from distill.student import Student
from engine.config import Preset
from engine.loader import assemble
from engine.schedule import Schedule
from engine.vae import VAEConfig


def noise_levels(preset: Preset) -> Tensor:
    """Noise levels of one chunk's denoising steps and the 0 they end at: [steps + 1]."""
    schedule = Schedule(preset)
    return torch.tensor([schedule.sigma(t) for t, _ in schedule.steps(0)] + [0.0])


def roll_out(
    student: Student,
    text_emb: Tensor,
    frames: int,
    seed: int,
    preset: Preset,
    size: tuple[int, int] = (8, 8),
    start: Tensor | None = None,
) -> Tensor:
    """Stream latent frames [B, C, frames, h, w] from text_emb [B, rows, text_dim]; nothing is differentiated.

    `start` [B, C, k, h, w] gives the first k frames, as an image or a clip would.
    """
    scale = VAEConfig()  # no pixels here: any scale will do
    height, width = (side * scale.scale_factor_spatial for side in size)
    pipeline = assemble(
        student.stages,
        student.sdd.config,
        preset,
        torch.float32,
        torch.device("cpu"),
        height=height,
        width=width,
        vae_config=scale,
    )
    with pipeline.stream(text_emb.detach(), seed=seed, latents=start) as stream:
        latents = [stream.next_latent() for _ in range(frames)]
    return torch.cat(latents, 2).clone()  # an ordinary tensor: a clone of an inference one, outside inference mode
