"""Distribution matching on the student's own rollouts (DMD, SiD), in Self-Forcing's form.

    python -m distill dmd --config distill/configs/sprites.toml --out runs/dmd

A step draws one exit step for all frames. Without gradients, the engine streams a clip whose frames leave their
denoising loops after that step. One parallel pass repeats the exit step of every frame with gradients. Teacher and
critic score the whole clip, noised to one level sigma' per sample. Unlike Eq. 10 of stage rl, every frame is judged
beside its neighbours. The critic is a copy of the teacher. It learns the student's own clips in every step; the student
learns in every `critic_every`-th one, after `critic_warmup`.

    loss = "dmd"   each frame moves by the difference of the two clean predictions (DMD, Self-Forcing)
    loss = "sid"   score identity distillation: the gradient runs through teacher and critic too

Diagonal Distillation is `schedule = "diagonal"` with `context = "last"` and `motion`: later chunks of a causal student
take fewer steps, see the noisy end of their past, and the differences of neighbouring frames are matched as well.

With `adversarial` a discriminator on the critic's features learns to tell the student's clips from better ones, and the
student learns to mislead it:

    opponent = "next"   finished clips of the same student with the next larger number of `sampling_steps`, which get no
                        gradient (adversarial self-distillation); the largest number meets the data
    opponent = "data"   clips of the data with the same captions

Writes --out/student.pt, as stage next_chunk does; the student then streams with this schedule and context.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.data.shards import Shards
from distill.models.base import Base
from distill.models.causal import CausalStudent
from distill.models.critic import Critic
from distill.models.discriminator import Discriminator, adversarial_losses
from distill.models.matching import direction, motion_loss, moving_loss, sid_loss, through
from distill.models.rollout import chunks_in, roll_exits, roll_out
from distill.models.sampling import guided_flow, noised
from distill.models.student import checkpointed
from distill.models.student_file import CONTEXTS, AnyStudent, NextChunkConfig
from distill.stages.tuning import Tuning, TuningConfig, fine_tune
from distill.training.draws import Draws
from distill.training.stage import Stage, TrainingOptions
from engine.config import Preset, TransformerConfig
from engine.options import option

LOSSES, GRADIENTS, OPPONENTS = ("dmd", "sid"), ("all", "one"), ("next", "data")
SWITCHES = range(2, 6)  # latent frames at which a prompt is switched
NUDGE = 0.1  # standard deviation of the small moves of R1 and R2


@dataclass(frozen=True)
class DmdConfig(TuningConfig):
    """The table [dmd]."""

    steps: int = option(120, "optimiser steps")
    lr: float = option(4e-4, "highest learning rate")
    warmup: int = option(10, "steps of linear warm-up")
    betas: tuple[float, ...] = option((0.0, 0.999), "of AdamW")
    frames: int = option(9, "latent frames that teacher and critic see at once")
    rollout: int = option(0, "latent frames per rollout; where more than `frames`, a random window of them is scored")
    sampling_steps: tuple[int, ...] = option((), "denoising steps per frame, one drawn a step; empty: the student's")
    first_steps: int = option(0, "denoising steps of frame 0 where it takes more (First-Frame Enhancement); 0: none")
    schedule: str = option("", "causal: engine preset whose timesteps the rollouts take; empty: the student's")
    context: str = option("", "causal: what chunks see of their past: clean, noised or last; empty: the student's")
    motion: float = option(0.0, "weight of the same loss on differences of neighbouring frames")
    switch_share: float = option(0.0, "share of the steps whose rollouts switch the prompt, with the window after it")
    loss: str = option("dmd", "dmd or sid")
    alpha: float = option(1.0, "of SiD")
    gradient: str = option("all", "frames of a clip that carry gradients: all, or one, drawn for every sample")
    critic_rank: int = option(0, "LoRA rank of the critic; 0: all weights learn")
    critic_lr: float = option(1.0, "factor on lr for the critic")
    critic_warmup: int = option(10, "first steps, in which the critic learns alone")
    adversarial: float = option(0.0, "weight of the adversarial losses; 0: no discriminator")
    opponent: str = option("next", "its better clips: next (the student with more sampling steps) or data")
    features: tuple[int, ...] = option((), "blocks whose features it sees, at most 3, from 0; empty: the last two")
    head_width: int = option(256, "inner width of its head")
    head_lr: float = option(1.0, "factor on lr for its head")
    r1: float = option(20.0, "weight of its flatness around the better clips")
    r2: float = option(20.0, "weight of its flatness around the student's clips")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("loss", LOSSES), ("gradient", GRADIENTS), ("opponent", OPPONENTS), ("context", CONTEXTS)):
            if getattr(self, name) not in (*known, *(("",) if name == "context" else ())):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.motion < 0 or (self.motion and (self.loss != "dmd" or self.frames < 2)):
            raise ValueError(
                f"motion: got {self.motion} with loss {self.loss!r} and {self.frames} frames, "
                "expected 0, or more with 'dmd' and 2 frames or more"
            )
        for name, least in (("frames", 1), ("rollout", 0), ("critic_warmup", 0), ("critic_rank", 0), ("first_steps", 0),
                            ("adversarial", 0), ("head_width", 1), ("r1", 0), ("r2", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.rollout and self.rollout < self.frames:
            raise ValueError(f"rollout: got {self.rollout}, expected 0 or at least frames ({self.frames})")
        if not 0 <= self.switch_share <= 1:
            raise ValueError(f"switch_share: got {self.switch_share}, expected 0 to 1")
        for count in (*self.sampling_steps, self.first_steps or 1):
            if count < 1 or 1000 % count:
                raise ValueError(f"denoising steps: got {count}, expected a divisor of 1000")
        blocks, numbers = list(self.features), list(self.sampling_steps)
        if blocks != sorted(set(blocks)) or len(blocks) > 3 or min(blocks, default=0) < 0:
            raise ValueError(f"features: got {blocks}, expected at most 3 block numbers from 0, rising")
        if self.adversarial and self.opponent == "next" and (len(numbers) < 2 or numbers != sorted(set(numbers))):
            raise ValueError(f"sampling_steps: got {numbers}, expected two or more, rising, for opponent = 'next'")
        if self.adversarial and self.switch_share:
            raise ValueError(f"switch_share: got {self.switch_share}, expected 0 with adversarial losses")

    @property
    def length(self) -> int:
        """Latent frames per rollout."""
        return self.rollout or self.frames


@dataclass(frozen=True)
class DmdOptions(TrainingOptions):
    out: Path = option(Path("runs/dmd"), "folder of checkpoints, logs and student.pt")


def presets_of(config: DmdConfig, made: NextChunkConfig) -> list[Preset]:
    """The presets of the rollouts, of which every step draws one."""
    made = streamed_by(config, made)
    own = made.preset
    for frames in (config.frames, config.rollout):
        chunks_in(frames, own)
    if not config.sampling_steps and not config.first_steps:
        return [own]
    if made.schedule:
        raise ValueError(f"schedule: got {made.schedule!r}, expected none beside sampling_steps or first_steps")
    rows = [even_steps(count) for count in config.sampling_steps] or [own.steps[-1]]
    first = even_steps(config.first_steps) if config.first_steps else ()
    return [replace(own, steps=(first, row) if len(first) > len(row) else (row,)) for row in rows]


def streamed_by(config: DmdConfig, made: NextChunkConfig) -> NextChunkConfig:
    """The config of the student that the stage writes: made by `made`, streamed as it is trained here."""
    return replace(made, schedule=config.schedule or made.schedule, context=config.context or made.context)


def even_steps(count: int) -> tuple[float, ...]:
    """So many evenly spaced timesteps from 1000 down."""
    return tuple(float(t) for t in range(1000, 0, -1000 // count))


def discriminator_of(config: DmdConfig, made: NextChunkConfig, shape: TransformerConfig) -> Discriminator | None:
    """The discriminator, if the config wants one: a logit per number of sampling steps."""
    if not config.adversarial:
        return None
    return Discriminator(shape, config.features, len(presets_of(config, made)), config.head_width)


@dataclass(frozen=True)
class Turn:
    """What all samples of a step share."""

    number: int  # of the preset
    exit_step: int
    start: int  # first frame of the window
    length: int  # latent frames to stream
    earlier: tuple[int, Tensor] | None  # where the prompt is switched: the frames before, and their text_emb


class Dmd(Tuning):
    """The losses of student and critic on some samples of a step."""

    config: DmdConfig

    def __init__(self, config: DmdConfig, made: NextChunkConfig, base: Base, student: AnyStudent, data: Shards) -> None:
        super().__init__(base, student, data)
        self.config, self.made, self.presets = config, streamed_by(config, made), presets_of(config, made)
        self.critic = Critic(base.transformer, config.critic_rank, recompute=config.recompute)
        if config.recompute and config.loss == "sid":  # whose gradient runs through the teacher
            checkpointed(base.transformer)
        self.discriminator = discriminator_of(config, made, base.transformer.config)
        if self.discriminator is not None:
            if config.length > data.frames:
                raise ValueError(f"rollout: got {config.length}, expected at most the {data.frames} of {data.folder}")
            # A student's clips have one caption each, and so have those that it is compared with.
            self.pool = [clip for clip, switch in enumerate(data.earlier(range(len(data)))) if switch is None]
            if not self.pool:
                raise ValueError(f"data: got {data.folder} where every clip switches its prompt, expected some without")

    def groups(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        groups = super().groups() | {"critic": (self.critic.trained(), self.config.critic_lr)}
        if self.discriminator is not None:
            groups["head"] = (self.discriminator.trained(), self.config.head_lr)
        return groups

    def learns(self, step: int) -> bool:
        """Whether the student is updated in a step: the last one of every `critic_every`."""
        step, every = step - self.config.critic_warmup, self.config.critic_every
        return step >= 0 and step % every == every - 1

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        emb = self.base.encode(self.captions(draws))
        learns, turn = self.learns(draws.step), self.turn(draws)
        with nullcontext() if learns else torch.no_grad():
            clip = self.generate(emb, draws, turn)
        parts = {}
        if learns:
            parts[config.loss] = self.student_loss(clip, emb, draws)
        parts["critic"] = self.critic_loss(clip.detach(), emb, draws)
        loss = torch.stack(list(parts.values())).sum()
        if self.discriminator is not None:
            better = self.better(emb, draws, turn).to(clip)
            rivalry, named = self.adversarial_loss(clip, better, emb, draws, turn.number)
            loss, parts = loss + config.adversarial * rivalry, parts | named
        return loss, parts

    def turn(self, draws: Draws) -> Turn:
        config, shared = self.config, draws.shared
        number = int(torch.randint(len(self.presets), (), generator=shared))
        exit_step = int(torch.randint(max(map(len, self.presets[number].steps)), (), generator=shared))
        start, length = int(torch.randint(config.length - config.frames + 1, (), generator=shared)), config.length
        earlier = self.earlier(draws)
        if earlier:
            start, length = earlier[0], earlier[0] + config.frames
        return Turn(number, exit_step, start, length, earlier)

    def generate(self, emb: Tensor, draws: Draws, turn: Turn) -> Tensor:
        """A clip of the student's own, [B, C, frames, h, w]; the exit step of its frames carries their gradients.

        The frame with which a window begins later than its rollout has none: the teacher takes it for a first latent,
        which shows one picture where others show four. A stream commits its past anew under a new prompt. So one pass
        with the later prompt equals its frames after a switch, but for what the ETM saw before its window.
        """
        config, preset, start = self.config, self.presets[turn.number], turn.start
        seeds, size, exit_step = draws.seeds(), self.size, turn.exit_step
        rolled = roll_exits(self.student, emb, turn.length, exit_step, seeds, preset, size, turn.earlier)
        window = slice(start, start + config.frames)
        if not torch.is_grad_enabled():
            return rolled.clean[:, :, window]
        text = self.student.stages.prepare_text(emb)
        told = {"context_sigma": rolled.past_sigma} if isinstance(self.student, CausalStudent) else {}
        flow = self.student.flow(rolled.past, rolled.noisy, rolled.sigma, text, **told)
        clip = rolled.predicted(flow)[:, :, window]
        if config.gradient == "one":
            return self._one_frame_of(clip, draws, turn)
        return torch.cat([clip[:, :, :1].detach(), clip[:, :, 1:]], 2) if start else clip

    def earlier(self, draws: Draws) -> tuple[int, Tensor] | None:
        """In a step that switches the prompt: the number of latent frames before, and their text_emb.

        Their captions are the clips' earlier ones in the data, or else those of other clips.
        """
        turn = float(torch.rand((), generator=draws.shared))
        if turn >= self.config.switch_share:
            return None
        begins, chunk = SWITCHES[int(torch.randint(len(SWITCHES), (), generator=draws.shared))], self.made.chunk
        own = self.data.earlier(self.clips(draws, self.config.batch))
        others = self.data.captions(draws.choice(len(self.data)).tolist())
        captions = [switch[0] if switch else other for switch, other in zip(own, others, strict=True)]
        return (begins + chunk - 1) // chunk * chunk, self.base.encode(captions)

    def _one_frame_of(self, clip: Tensor, draws: Draws, turn: Turn) -> Tensor:
        """The clip with the gradient of one random frame per sample, of those that have one."""
        frames = clip.shape[2]
        least = 1 if turn.start and frames > 1 else 0
        chosen = least + draws.choice(frames - least).to(clip.device)
        ours = (torch.arange(frames, device=clip.device) == chosen[:, None])[:, None, :, None, None]
        return torch.where(ours, clip, clip.detach())

    def _noised(self, clip: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """The clip at one level per sample within the clamp: noisy, noise, both as the clip, and sigma' [B]."""
        sigma = self.sigmas(draws).to(clip)
        noise = draws.normal(*clip.shape[1:]).to(clip)
        return noised(clip, noise, levels(sigma, clip)), noise, sigma

    def student_loss(self, clip: Tensor, emb: Tensor, draws: Draws) -> Tensor:
        """DMD or SiD on the student's clip, whose gradient reaches the clip alone."""
        config = self.config
        if config.loss == "sid":
            return through(lambda leaf: sid_loss(leaf, *self._cleaned(leaf, emb, draws), config.alpha), clip)
        with torch.no_grad():
            v_real, v_gen, noisy, sigma = self._scores(clip, emb, draws)
            away = direction(v_real, v_gen, clip, noisy, sigma, normalise=config.normalise)
        loss = moving_loss(clip, away)
        if config.motion:
            loss = loss + config.motion * motion_loss(clip, v_real, v_gen, noisy, sigma)
        return loss

    def _scores(self, clip: Tensor, emb: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flows of the guided teacher and of the critic for the noised clip, that clip, and its sigma' [B]."""
        teacher, (noisy, _, sigma) = self.base.transformer, self._noised(clip, draws)
        text, empty = teacher.prepare_text(emb), self.base.prepare([""] * len(emb))
        v_real = guided_flow(teacher, noisy, levels(sigma, clip), text, empty, self.config.guidance)
        return v_real, self.critic.flow(noisy, levels(sigma, clip), emb), noisy, sigma

    def _cleaned(self, clip: Tensor, emb: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The clean clips that teacher and critic predict for the noised one."""
        v_real, v_gen, noisy, sigma = self._scores(clip, emb, draws)
        level = sigma.view(-1, 1, 1, 1, 1)
        return noisy - level * v_real, noisy - level * v_gen

    def critic_loss(self, clip: Tensor, emb: Tensor, draws: Draws) -> Tensor:
        """Flow matching on the student's own clips."""
        noisy, noise, sigma = self._noised(clip, draws)
        return (self.critic.flow(noisy, levels(sigma, clip), emb) - (noise - clip)).square().mean()

    def better(self, emb: Tensor, draws: Draws, turn: Turn) -> Tensor:
        """The opponent's clips, [B, C, frames, h, w], without gradients."""
        config, start, end = self.config, turn.start, turn.start + self.config.frames
        if config.opponent == "next" and turn.number + 1 < len(self.presets):
            preset = self.presets[turn.number + 1]
            return roll_out(self.student, emb, end, draws.seeds(), preset, self.size)[:, :, start:]
        return self.data.read(self.clips(draws, config.batch), end)[0][:, :, start:]

    def adversarial_loss(
        self, clip: Tensor, better: Tensor, emb: Tensor, draws: Draws, number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the discriminator and, for a clip with gradients, of the student."""
        assert self.discriminator is not None
        level = levels(self.sigmas(draws).to(clip), clip)
        noise, nudge = (draws.normal(*clip.shape[1:]).to(clip) for _ in range(2))
        logits = partial(self.discriminator, self.critic, level, emb, number)
        blur = partial(noised, noise=noise, sigma=level)
        return adversarial_losses(logits, blur, clip, better, NUDGE * nudge, self.config.r1, self.config.r2)


def levels(sigma: Tensor, clip: Tensor) -> Tensor:
    """One level per sample, [B], as one per frame, [B, F]."""
    return sigma[:, None].expand(-1, clip.shape[2])


train = partial(fine_tune, Dmd)


def run(config: DmdConfig, options: DmdOptions) -> None:
    train(config, options.out, options.board)


STAGE = Stage(DmdOptions, run, DmdConfig, "dmd")
