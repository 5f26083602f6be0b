"""What the tests of the attention probe share."""

from pathlib import Path

import torch
from tiny import HEIGHT, WIDTH, latents_of, pipeline_of, text_of

from distill.attention.subjects import Clips, Student
from distill.data.shards import write_index, write_shard

TOKENS, FRAMES = 6, 5  # tokens of a latent frame of the tiny models, latent frames of a clip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_of(preset, frames=6):
    """A student under the probe that runs on one caption; without a text encoder the caption is an embedding."""
    student = Student(pipeline_of(preset), Clips(["one"], latents_of(1, frames), 3))
    student.text_emb = lambda number: text_of(seed=0)
    student.open = lambda number: student.pipeline.stream(text_of(seed=0), seed=3)
    return student


def write_clips(folder: Path, frames: int) -> Path:
    """Two captioned clips of so many latent frames, for the model that tiny.write_pipeline writes."""
    latents = latents_of(2, frames, height=HEIGHT // 4, width=WIDTH // 4)
    write_shard(folder, 0, latents, ["a red circle", "a blue square"])
    write_index(folder, 1, {})
    return folder
