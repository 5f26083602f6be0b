"""RL fine-tuning of the student (Eq. 7-10): the student's own rollouts, judged by the teacher's score against its own.

    python -m distill.rl --config distill/configs/sprites.toml --out runs/rl

One f and one t of the sampling steps are drawn for the whole batch. The engine streams frames 0 .. f - 1 and goes
into frame f down to t, without gradients; the student's step from there is repeated with them. Scores are read as
velocities v = noise - x (Eq. 10 has the right sign only so): mu moves by -(v_real - v_gen).

    scores = "renoised"  mu is the predicted clean frame, noised again at t' in [clamp, 1 - clamp], as in DMD
    scores = "literal"   mu is the next point of the solver, scored where it stands (at t = 0 after the last step)
    critic = "self"      v_gen is the student's own decoder (the paper's); "trained": a fake score network learns it
    context = "clean"    the teacher sees the rollout clean and frame f noisy; "noised": the whole clip at t'

Writes --out/student.pt, as distill.stages.next_chunk does.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.data.shards import Shards
from distill.models.base import Base
from distill.models.rollout import noise_levels, roll_into
from distill.models.sampling import guided_flow, noised, shifted
from distill.stages.next_chunk import AnyStudent, NextChunkConfig, load_student, save_student
from distill.training.draws import Draws
from distill.training.loop import FitConfig, Objective, accelerator_of, fit
from distill.training.state import load_config, parse_arguments, run_stage

SCORES, CRITICS, CONTEXTS = ("renoised", "literal"), ("self", "trained"), ("clean", "noised")


@dataclass(frozen=True)
class RlConfig(FitConfig):
    student: str = "runs/student/student.pt"  # what next-chunk training made
    data: str = "runs/bank/clips"  # prompts; the latents are not read but for their size
    batch: int = 8
    lr: float = 2e-4
    frames: int = 9  # f is drawn below it
    first_frame: bool = False  # draw f = 0 too, the frame from text alone (the paper starts at 1)
    scores: str = "renoised"
    critic: str = "self"
    critic_lr: float = 2.0  # of a trained critic, against lr
    critic_every: int = 2  # the student learns in one step of so many when the critic is trained
    context: str = "clean"
    guidance: float = 2.0  # of the teacher's score
    clamp: float = 0.02
    shift: float = 2.0  # of t'
    normalise: bool = True  # divide by the teacher's mean error on clean frames, as DMD does

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("scores", SCORES), ("critic", CRITICS), ("context", CONTEXTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if not 0 <= self.clamp < 0.5 or self.frames < 2 or self.critic_every < 1:
            raise ValueError(
                f"got clamp {self.clamp}, frames {self.frames}, critic_every {self.critic_every}, "
                "expected 0 to 0.5, at least 2 and at least 1"
            )


def direction(v_real: Tensor, v_gen: Tensor, mu: Tensor, noisy: Tensor, t: Tensor, *, normalise: bool) -> Tensor:
    """What Eq. 10 subtracts from mu [B, C, 1, h, w]: v_real - v_gen, all of that shape; t [B].

    `normalise` is DMD's: the difference of the two clean predictions over the mean error of the teacher's.
    """
    difference = v_real - v_gen
    if not normalise:
        return difference
    level = t.view(-1, 1, 1, 1, 1)
    error = (mu - (noisy - level * v_real)).abs().mean((1, 2, 3, 4), keepdim=True)
    return level * difference / error.clamp(min=1e-3)


def rl_loss(mu: Tensor, away: Tensor) -> Tensor:
    """Eq. 10: half the mean square of mu - sg(mu - away); its gradient by mu is `away` over the number of elements."""
    return 0.5 * (mu - (mu - away).detach()).square().mean()


class Rl(Objective):
    """Eq. 10 for some samples of a step, and the loss of a trained critic."""

    def __init__(self, config: RlConfig, made: NextChunkConfig, base: Base, student: AnyStudent, data: Shards) -> None:
        super().__init__()
        self.config, self.made, self.data = config, made, data
        self._frozen = [base]
        self.student = student
        self.critic = None
        if config.critic == "trained":
            self.critic = made.student(base)
            self.critic.load_trained(student.trained())

    @property
    def base(self) -> Base:
        return self._frozen[0]

    def frozen(self) -> list[nn.Module]:
        return self.base.models

    def groups(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        groups = {"student": (self.student.trained(), 1.0)}
        if self.critic is not None:
            groups["critic"] = (self.critic.trained(), self.config.critic_lr)
        return groups

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config, preset = self.config, self.made.preset
        least = 0 if config.first_frame else 1
        frame = int(torch.randint(least, config.frames, (), generator=draws.shared))
        levels = noise_levels(preset)
        step = int(torch.randint(len(levels) - 1, (), generator=draws.shared))
        captions = self._captions(draws)
        emb = self.base.encode(captions)
        size = (self.data.shape[2], self.data.shape[3])
        past, noisy = roll_into(self.student, emb, frame, step, draws.seeds(), preset, size)
        t = levels[step].expand(len(captions)).to(noisy)
        text = self.student.stages.prepare_text(emb)
        learns = self.critic is None or draws.step % config.critic_every == 0
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            flow = self.student.next_flow(past, noisy, t, text)
            clean = noisy - t.view(-1, 1, 1, 1, 1) * flow
            mu = clean if config.scores == "renoised" else noisy + (levels[step + 1] - levels[step]) * flow
        parts: dict[str, Tensor] = {}
        loss = torch.zeros((), device=mu.device)
        if learns:
            away = self.away(mu.detach(), past, float(levels[step + 1]), emb, captions, draws)
            loss = rl_loss(mu, away)
            parts = {"rl": loss, "away": away.square().mean()}
        if self.critic is not None:
            parts["critic"] = self.critic_loss(clean.detach(), past, emb, draws)
            loss = loss + parts["critic"]
        return loss, parts

    def _captions(self, draws: Draws) -> list[str]:
        return self.data.captions(draws.clips(self.config.batch, len(self.data)))

    def _levels(self, draws: Draws) -> Tensor:
        """t' [B] within the clamp."""
        free = shifted(draws.uniform(), self.config.shift)
        return self.config.clamp + (1 - 2 * self.config.clamp) * free

    @torch.no_grad()
    def away(self, mu: Tensor, past: Tensor, level: float, emb: Tensor, captions: list[str], draws: Draws) -> Tensor:
        """What the loss subtracts from mu; `level` is where the solver's next point stands."""
        config = self.config
        if config.scores == "literal":
            t, noisy = torch.full((len(mu),), level).to(mu), mu
        else:
            t = self._levels(draws).to(mu)
            noisy = noised(mu, draws.normal(*mu.shape[1:]).to(mu), t[:, None])
        judge = self.student if self.critic is None else self.critic
        v_gen = judge.next_flow(past, noisy, t, judge.stages.prepare_text(emb))
        v_real = self.teacher_flow(past, noisy, t, emb, captions, draws)
        return direction(v_real, v_gen, mu, noisy, t, normalise=config.normalise)

    def teacher_flow(
        self, past: Tensor, noisy: Tensor, t: Tensor, emb: Tensor, captions: list[str], draws: Draws
    ) -> Tensor:
        """The frozen teacher's guided velocity of the newest frame of the whole clip, [B, C, 1, h, w]."""
        teacher = self.base.transformer
        times = torch.zeros(len(past), past.shape[2] + 1, device=t.device)
        if self.config.context == "noised":
            times[:] = t[:, None]
            past = noised(past, draws.normal(*past.shape[1:]).to(past), times[:, :-1])
        times[:, -1] = t
        given, empty = teacher.prepare_text(emb), self.base.prepare([""] * len(captions))
        clip = torch.cat([past, noisy], 2)
        return guided_flow(teacher, clip, times, given, empty, self.config.guidance)[:, :, -1:]

    def critic_loss(self, clean: Tensor, past: Tensor, emb: Tensor, draws: Draws) -> Tensor:
        """Flow matching of the fake score on the student's own frames."""
        assert self.critic is not None
        t, noise = self._levels(draws).to(clean), draws.normal(*clean.shape[1:]).to(clean)
        flow = self.critic.next_flow(past, noised(clean, noise, t[:, None]), t, self.critic.stages.prepare_text(emb))
        return (flow - (noise - clean)).square().mean()


def train(
    config: RlConfig,
    out: Path,
    board: Path | None = None,
    stop_at: int | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Tensor]:
    """Run (or go on with) the fine-tuning; the averaged parameters, also in out/student.pt when it is through."""
    accelerator = accelerator or accelerator_of(config)
    torch.manual_seed(config.seed)
    student, made, base = load_student(Path(config.student), None, accelerator.device, config.dtype)
    objective = Rl(config, made, base, student, Shards(Path(config.data)))
    trained = fit(objective, config, out, accelerator, board, stop_at)
    if accelerator.is_main_process and (stop_at is None or stop_at >= config.steps):
        save_student(out / "student.pt", trained, made)
    return trained


def main() -> None:
    arguments = parse_arguments(__doc__, "runs/rl", dry_run=True)
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, "rl", RlConfig)
    if arguments.dry_run:
        from distill.stages.plan import report

        return report(arguments.config, "rl", config)
    train(config, arguments.out, arguments.out if arguments.tensorboard else None)


if __name__ == "__main__":
    run_stage(main)
