"""RL fine-tuning of the student (Eq. 7-10): the teacher's score judges the student's own rollouts.

    python -m distill rl --config distill/configs/sprites.toml --out runs/rl

A step draws one frame f and one sampling step's sigma for the whole batch. Without gradients, the engine streams frames
0 .. f - 1 and denoises frame f down to sigma. The student then repeats its next step with gradients. Scores are
velocities v = noise - x; only with these does Eq. 10 have the right sign. mu moves by -(v_real - v_gen).

    scores = "renoised"  mu is the predicted clean frame, noised again at sigma' in [clamp, 1 - clamp], as in DMD
    scores = "literal"   mu is the next point of the solver, scored at its own sigma (0 after the last step)
    critic = "self"      v_gen comes from the student's own decoder, as in the paper
    critic = "trained"   v_gen comes from a fake score network, trained beside the student
    context = "clean"    the teacher sees the rollout clean and frame f noisy
    context = "noised"   the teacher sees the whole clip at sigma'

Writes --out/student.pt, as stage next_chunk does.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.data.shards import Shards
from distill.models.base import Base
from distill.models.matching import direction, moving_loss
from distill.models.rollout import chunks_in, noise_levels, roll_into
from distill.models.sampling import guided_flow, noised
from distill.models.student_file import AnyStudent, NextChunkConfig
from distill.stages.tuning import Tuning, TuningConfig, fine_tune
from distill.training.draws import Draws
from distill.training.stage import Stage, TrainingOptions
from engine.options import option

SCORES, CRITICS, CONTEXTS = ("renoised", "literal"), ("self", "trained"), ("clean", "noised")


@dataclass(frozen=True)
class RlConfig(TuningConfig):
    """The table [rl]."""

    batch: int = option(8, "samples per step, over all processes")
    lr: float = option(2e-4, "highest learning rate")
    frames: int = option(9, "latent frames; f is one of their chunks")
    first_frame: bool = option(False, "also draw f = 0, the frame from text alone; the paper starts at 1")
    scores: str = option("renoised", "point of the scores: renoised or literal")
    critic: str = option("self", "source of v_gen: self or trained")
    critic_lr: float = option(2.0, "factor on lr for a trained critic")
    context: str = option("clean", "past that the teacher sees: clean or noised")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("scores", SCORES), ("critic", CRITICS), ("context", CONTEXTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.frames < 2:
            raise ValueError(f"frames: got {self.frames}, expected at least 2")


@dataclass(frozen=True)
class RlOptions(TrainingOptions):
    out: Path = option(Path("runs/rl"), "folder of checkpoints, logs and student.pt")


class Rl(Tuning):
    """Eq. 10 on some samples of a step, and the loss of a trained critic."""

    config: RlConfig

    def __init__(self, config: RlConfig, made: NextChunkConfig, base: Base, student: AnyStudent, data: Shards) -> None:
        super().__init__(base, student, data)
        self.config, self.made = config, made
        if chunks_in(config.frames, made.preset) < 2 or made.context != "clean":
            raise ValueError(
                f"rl: got {config.frames} frames and a student with context {made.context!r}, "
                f"expected two chunks of {made.chunk} or more, and a clean context"
            )
        self.critic = None
        if config.critic == "trained":
            self.critic = made.student(base)
            self.critic.load_trained(student.trained())

    def groups(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        groups = super().groups()
        if self.critic is not None:
            groups["critic"] = (self.critic.trained(), self.config.critic_lr)
        return groups

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config, preset = self.config, self.made.preset
        least = 0 if config.first_frame else 1
        number = int(torch.randint(least, chunks_in(config.frames, preset), (), generator=draws.shared))
        sigmas = noise_levels(preset, number)
        step = int(torch.randint(len(sigmas) - 1, (), generator=draws.shared))
        captions = self.captions(draws)
        emb = self.base.encode(captions)
        past, noisy = roll_into(self.student, emb, number * preset.chunk, step, draws.seeds(), preset, self.size)
        sigma = sigmas[step].expand(len(captions)).to(noisy)
        text = self.student.stages.prepare_text(emb)
        learns = self.critic is None or draws.step % config.critic_every == 0
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            flow = self.student.next_flow(past, noisy, sigma, text)
            clean = noisy - sigma.view(-1, 1, 1, 1, 1) * flow
            mu = clean if config.scores == "renoised" else noisy + (sigmas[step + 1] - sigmas[step]) * flow
        parts: dict[str, Tensor] = {}
        loss = torch.zeros((), device=mu.device)
        if learns:
            away = self.away(mu.detach(), past, float(sigmas[step + 1]), emb, captions, draws)
            loss = moving_loss(mu, away)
            parts = {"rl": loss, "away": away.square().mean()}
        if self.critic is not None:
            parts["critic"] = self.critic_loss(clean.detach(), past, emb, draws)
            loss = loss + parts["critic"]
        return loss, parts

    @torch.no_grad()
    def away(self, mu: Tensor, past: Tensor, after: float, emb: Tensor, captions: list[str], draws: Draws) -> Tensor:
        """The part that the loss subtracts from mu; `after` is sigma of the solver's next point."""
        config = self.config
        if config.scores == "literal":
            sigma, noisy = torch.full((len(mu),), after).to(mu), mu
        else:
            sigma = self.sigmas(draws).to(mu)
            noisy = noised(mu, draws.normal(*mu.shape[1:]).to(mu), sigma[:, None])
        judge = self.student if self.critic is None else self.critic
        v_gen = judge.next_flow(past, noisy, sigma, judge.stages.prepare_text(emb))
        v_real = self.teacher_flow(past, noisy, sigma, emb, captions, draws)
        return direction(v_real, v_gen, mu, noisy, sigma, normalise=config.normalise)

    def teacher_flow(
        self, past: Tensor, noisy: Tensor, sigma: Tensor, emb: Tensor, captions: list[str], draws: Draws
    ) -> Tensor:
        """The frozen teacher's guided velocity of the last chunk of the clip, [B, C, chunk, h, w]."""
        teacher, before = self.base.transformer, past.shape[2]
        sigmas = torch.zeros(len(past), before + noisy.shape[2], device=sigma.device)
        if self.config.context == "noised":
            sigmas[:] = sigma[:, None]
            past = noised(past, draws.normal(*past.shape[1:]).to(past), sigmas[:, :before])
        sigmas[:, before:] = sigma[:, None]
        text, empty = teacher.prepare_text(emb), self.base.prepare([""] * len(captions))
        clip = torch.cat([past, noisy], 2)
        return guided_flow(teacher, clip, sigmas, text, empty, self.config.guidance)[:, :, before:]

    def critic_loss(self, clean: Tensor, past: Tensor, emb: Tensor, draws: Draws) -> Tensor:
        """Flow matching of the fake score on the student's own frames."""
        assert self.critic is not None
        sigma, noise = self.sigmas(draws).to(clean), draws.normal(*clean.shape[1:]).to(clean)
        noisy, text = noised(clean, noise, sigma[:, None]), self.critic.stages.prepare_text(emb)
        flow = self.critic.next_flow(past, noisy, sigma, text)
        return (flow - (noise - clean)).square().mean()


train = partial(fine_tune, Rl)


def run(config: RlConfig, options: RlOptions) -> None:
    train(config, options.out, options.board)


STAGE = Stage(RlOptions, run, RlConfig, "rl")
