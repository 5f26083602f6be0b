"""What the tests of the attention probe share."""

import torch
from tiny import latents_of, pipeline_of, text_of

from distill.attention.subjects import Clips, Student

TOKENS, FRAMES = 6, 5  # tokens of a latent frame of the tiny models, latent frames of a clip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_of(preset, frames=6):
    """A student under the probe that runs on one caption; without a text encoder the caption is an embedding."""
    student = Student(pipeline_of(preset), Clips(["one"], latents_of(1, frames), 3))
    student.text_emb = lambda number: text_of(seed=0)
    student.open = lambda number: student.pipeline.stream(text_of(seed=0), seed=3)
    return student
