"""Causal consistency distillation (Causal-Forcing++): a student of few steps from a teacher-forced student.

    python -m distill consistency --config distill/configs/sprites.toml --out runs/consistency

Everything starts as one student: the frozen teacher, the learning student, and its moving average. A step draws one of
`levels` noise levels sigma for the whole batch and noises clips of the data to it, all frames alike. The teacher takes
one guided Euler step from there to the next level, after the clean past of every frame. From both points the clean
frames are predicted, x - sigma v, by the student and by its average. They should agree. At the last level the next one
is 0, and the target is the data. With fp8 the student and its average round their products, and the teacher does not.
Writes --out/student.pt, as stage next_chunk does.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from distill.data.shards import Shards
from distill.models.base import Base
from distill.models.fp8 import unrounded
from distill.models.rollout import chunks_in
from distill.models.sampling import noised, shifted
from distill.models.student_file import AnyStudent, NextChunkConfig
from distill.stages.next_chunk import StudentObjective, error_from
from distill.stages.tuning import StartedConfig, fine_tune
from distill.training.draws import Draws
from distill.training.stage import Stage, TrainingOptions
from engine.options import option


@dataclass(frozen=True)
class ConsistencyConfig(StartedConfig):
    """The table [consistency]."""

    steps: int = option(300, "optimiser steps")
    lr: float = option(2e-4, "highest learning rate")
    warmup: int = option(10, "steps of linear warm-up")
    frames: int = option(9, "latent frames per clip")
    levels: int = option(48, "noise levels from 1 to 0")
    shift: float = option(2.0, "shift of the levels; best that of the student's own schedule")
    guidance: float = option(1.0, "scale of the teacher's guidance, where its weights have none in them yet")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frames", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.shift <= 0:
            raise ValueError(f"shift: got {self.shift}, expected more than 0")


@dataclass(frozen=True)
class ConsistencyOptions(TrainingOptions):
    out: Path = option(Path("runs/consistency"), "folder of checkpoints, logs and student.pt")


class Consistency(StudentObjective):
    """The consistency loss on some samples of a step."""

    def __init__(
        self, config: ConsistencyConfig, made: NextChunkConfig, base: Base, student: AnyStudent, data: Shards
    ) -> None:
        if config.frames > data.frames:
            raise ValueError(f"frames: got {config.frames}, expected at most the {data.frames} of {data.folder}")
        chunks_in(config.frames, made.preset)
        if made.context != "clean":
            raise ValueError(f"context: got {made.context!r}, expected 'clean': this stage trains on a clean past")
        super().__init__(base, student, data)
        self.config, self.made = config, made
        self.teacher = {name: p.detach().clone() for name, p in student.trained().items()}
        self.average = self.teacher

    def follow(self, average: dict[str, Tensor]) -> None:
        self.average = average

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        latent, captions = self.read(draws, config.batch, config.frames)
        index = int(torch.randint(config.levels, (), generator=draws.shared))
        emb, noise = self.base.encode(captions), draws.normal(*latent.shape[1:]).to(latent)
        sigma, noisy, target = self.target(latent, noise, emb, index)
        begins = self.begins(draws, config.batch, self.made.chunk).to(latent.device)
        flow = self.student(latent[:, :, : -self.made.chunk], noisy, sigma, emb)
        loss = error_from(clean(noisy, sigma, flow) - target, begins)
        return loss, {"consistency": loss}

    @torch.no_grad()
    def target(self, latent: Tensor, noise: Tensor, emb: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Level `index` as sigma [B, F], the clips noised to it, and the clean clips to predict from there."""
        levels = shifted(torch.linspace(1, 0, self.config.levels + 1), self.config.shift).to(latent)
        sigma, after = (level.expand(latent.shape[0], latent.shape[2]) for level in levels[index : index + 2])
        noisy, past = noised(latent, noise, sigma), latent[:, :, : -self.made.chunk]
        if index + 1 == self.config.levels:
            return sigma, noisy, latent
        nearer = noisy + (after - sigma)[:, None, :, None, None] * self.teacher_flow(past, noisy, sigma, emb)
        flow = functional_call(self.student, self.average, (past, nearer, after, emb))
        return sigma, noisy, clean(nearer, after, flow)

    def teacher_flow(self, past: Tensor, noisy: Tensor, sigma: Tensor, emb: Tensor) -> Tensor:
        """The guided flow of the student as it began. A first chunk trained to be guided is not guided again."""
        scale = self.config.guidance
        if scale == 1:
            return self._unguided(past, noisy, sigma, emb)
        both = torch.cat([emb, self.base.encode([""] * len(emb))])
        inputs = (part.repeat(2, *[1] * (part.ndim - 1)) for part in (past, noisy, sigma))
        v_text, v_empty = self._unguided(*inputs, both).chunk(2)
        scales = torch.full((noisy.shape[2], 1, 1), scale).to(noisy)
        if self.made.first == "guided":
            scales[: self.made.chunk] = 1
        return v_empty + scales * (v_text - v_empty)

    def _unguided(self, *inputs: Tensor) -> Tensor:
        with unrounded():
            return functional_call(self.student, self.teacher, inputs)


def clean(noisy: Tensor, sigma: Tensor, flow: Tensor) -> Tensor:
    """The clean clip that a flow predicts: noisy and flow [B, C, F, h, w], sigma [B, F]."""
    return noisy - sigma[:, None, :, None, None] * flow


train = partial(fine_tune, Consistency)


def run(config: ConsistencyConfig, options: ConsistencyOptions) -> None:
    train(config, options.out, options.board)


STAGE = Stage(ConsistencyOptions, run, ConsistencyConfig, "consistency")
