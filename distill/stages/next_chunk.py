"""Next-chunk training of the student (Eq. 6): every frame from its clean past, all frames of a clip in parallel.

    python -m distill next_chunk --config distill/configs/sprites.toml --out runs/student
    accelerate launch --num_processes 8 -m distill next_chunk --config ... --out ...

A step has two losses. Clips: flow matching on frames 1 .. F - 1. Their past is the data, or, in `roll_share` of the
steps, the student's own stream from the first frame of the clip. First frames have only the text. With
`first = "guided"` their target is the teacher's classifier-free guidance, integrated over one sampling step. The
student then needs neither guidance nor many steps. `first = "data"` is the plain Eq. 6.
With `pairs`, `pair_share` of the steps train video-to-video instead (`pair_loss`): one clip noised is where the other's
frames begin, as streams with a source do.
With `target = "ode"` a causal student learns instead where the teacher's trajectories end (the initialisation of
CausVid and Self-Forcing): its clean prediction from the latents on the way is regressed to the clip. Every chunk has a
level of its own and sees the chunks before it at theirs.
Writes --out/student.pt: averaged adapters and W_c, and the config that made them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.data.shards import Pairs, Shards
from distill.models.base import Base
from distill.models.causal import CausalStudent
from distill.models.fp8 import compute_in_fp8
from distill.models.rollout import noise_levels, roll_out
from distill.models.sampling import guided_flow, noised, shifted
from distill.models.student_file import AnyStudent, NextChunkConfig, StudentConfig, begin_from, save_student
from distill.training.draws import Draws
from distill.training.loop import Objective, accelerator_of, fit
from distill.training.stage import Stage, TrainingOptions
from engine.loader import settings_of
from engine.model.transformer import TextKV, WanTransformer
from engine.options import option
from engine.runtime.device import check_fp8


@dataclass(frozen=True)
class NextChunkOptions(TrainingOptions):
    out: Path = option(Path("runs/student"), "folder of checkpoints, logs and student.pt")


def draw_sigmas(shape: tuple[int, ...], config: NextChunkConfig, draws: Draws) -> Tensor:
    """Noise levels sigma [B, *shape]: some are exactly those of the sampling steps, the rest shifted logit-normal."""
    grid = noise_levels(config.preset)[:-1]
    picked = grid[draws.choice(len(grid), *shape)]
    free = shifted(torch.sigmoid(draws.normal(*shape)), config.shift)
    return torch.where(draws.uniform(*shape) < config.on_schedule, picked, free)


def draw_path(shape: tuple[int, ...], config: NextChunkConfig, draws: Draws) -> tuple[Tensor, Tensor]:
    """Levels s at which streams with a source begin, and levels sigma on the way from there: [B, *shape] each.

    Some s are those of the sampling steps, others lie between them. Half of the sigmas are s: the first step.
    """
    grid = noise_levels(config.preset)[:-1]
    picked, free = grid[draws.choice(len(grid), *shape)], grid[-1] + (1 - grid[-1]) * draws.uniform(*shape)
    begin = torch.where(draws.uniform(*shape) < config.on_schedule, picked, free)
    return begin, begin * torch.where(draws.uniform(*shape) < 0.5, 1.0, draws.uniform(*shape))


def error_from(difference: Tensor, begins: Tensor) -> Tensor:
    """Mean square of a difference [B, C, F, h, w] over the frames from begins [B] on."""
    learnt = torch.arange(difference.shape[2]).to(begins) >= begins[:, None]
    error = difference.square().mean((1, 3, 4)) * learnt  # [B, F]
    return (error.sum(1) / learnt.sum(1).clamp(min=1)).mean()


@torch.no_grad()
def segment_target(
    teacher: WanTransformer,
    noisy: Tensor,
    index: Tensor,
    text: TextKV,
    empty: TextKV,
    config: NextChunkConfig,
) -> Tensor:
    """Mean flow of the guided teacher over sampling step `index` [B]; the step starts at noisy [B, C, chunk, h, w]."""
    grid = noise_levels(config.preset).to(noisy.device)
    start, end = grid[index], grid[index + 1]
    latent, width = noisy, ((end - start) / config.substeps)
    for step in range(config.substeps):
        sigma = (start + step * width)[:, None].expand(-1, noisy.shape[2])
        flow = guided_flow(teacher, latent, sigma, text, empty, config.guidance)
        latent = latent + width.view(-1, 1, 1, 1, 1) * flow
    return (latent - noisy) / (end - start).view(-1, 1, 1, 1, 1)


def points_of(path: Tensor, index: Tensor) -> Tensor:
    """The frames of trajectories [B, K, C, F, h, w] at levels index [B, F]: [B, C, F, h, w]."""
    batch, frames = index.shape
    rows, columns = torch.arange(batch)[:, None], torch.arange(frames)
    return path.permute(0, 3, 1, 2, 4, 5)[rows, columns, index].transpose(1, 2)


class StudentObjective(Objective):
    """A loss on a student, with its frozen teacher and captioned latents at hand."""

    def __init__(self, base: Base, student: AnyStudent, data: Shards) -> None:
        super().__init__()
        self._frozen = [base]  # a list hides it from this module, which then neither moves nor synchronises it
        self.student, self.data = student, data
        self.pool: Sequence[int] = range(len(data))  # the clips from which steps draw

    @property
    def base(self) -> Base:
        return self._frozen[0]

    def frozen(self) -> list[nn.Module]:
        return self.base.models

    def groups(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        return {"student": (self.student.trained(), 1.0)}

    def read(self, draws: Draws, batch: int, frames: int) -> tuple[Tensor, list[str]]:
        """Latents of the samples' clips, of `batch` a step, on the device, and their captions."""
        latent, captions = self.data.read(self.clips(draws, batch), frames)
        return latent.to(self.base.device), captions

    def clips(self, draws: Draws, batch: int) -> list[int]:
        return [self.pool[number] for number in draws.clips(batch, len(self.pool))]

    def begins(self, draws: Draws, batch: int, chunk: int) -> Tensor:
        """The first frames [B] of the chunks from which on the captions of those clips hold."""
        begins = [switch[1] if switch else 0 for switch in self.data.earlier(self.clips(draws, batch))]
        return (torch.tensor(begins) + chunk - 1) // chunk * chunk


class NextChunk(StudentObjective):
    """Eq. 6 on some samples of a step."""

    def __init__(self, config: NextChunkConfig, base: Base, data: Shards, pairs: Pairs | None = None) -> None:
        if config.frames > data.frames:
            raise ValueError(f"frames: got {config.frames}, expected at most the {data.frames} of {data.folder}")
        if config.context != "clean":
            raise ValueError(f"context: got {config.context!r}, expected 'clean': this stage trains on a clean past")
        if config.target == "ode":
            expected, levels = noise_levels(config.preset)[:-1], torch.tensor(data.levels)
            if levels.shape != expected.shape or (levels - expected).abs().max() > 1e-3:
                raise ValueError(
                    f"target: got {data.folder} with trajectories at levels {data.levels}, expected those of the "
                    f"sampling steps, {[round(level, 6) for level in expected.tolist()]} (sample_teacher with levels)"
                )
        if pairs is not None and config.frames > pairs.frames:
            raise ValueError(f"frames: got {config.frames}, expected at most the {pairs.frames} of {config.pairs}")
        super().__init__(base, config.student(base), data)
        self.config, self.pairs = config, pairs

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        if config.target == "ode":
            loss = self.ode_loss(draws)
            return loss, {"ode": loss}
        turn = float(torch.rand((), generator=draws.shared))
        if self.pairs is not None and float(torch.rand((), generator=draws.shared)) < config.pair_share:
            loss = self.pair_loss(draws)
            return loss, {"pairs": loss}
        roll = draws.step >= config.roll_from * config.steps and turn < config.roll_share
        later = self.next_frame_loss(draws, roll=roll)
        many = config.first_batch // config.batch
        samples = [sample * many + i for sample in draws.samples for i in range(many)]
        first = self.first_frame_loss(Draws(config.seed + 1, draws.step, samples))
        return later + first, {"later": later, "first": first}

    def _drawn(self, draws: Draws) -> NextChunkConfig:
        """The config, with the number of denoising steps for which one loss trains."""
        counts = self.config.sampling_steps, *self.config.unified
        if len(counts) == 1:
            return self.config
        return replace(self.config, sampling_steps=counts[int(torch.randint(len(counts), (), generator=draws.shared))])

    def _dropped(self, captions: list[str], draws: Draws) -> list[str]:
        dropped = draws.uniform() < self.config.caption_dropout
        return ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]

    def _disturbed(self, context: Tensor, draws: Draws) -> Tensor:
        """A past [B, C, F, h, w] with some noise in it, of one level per sample."""
        if not self.config.context_noise:
            return context
        level = self.config.context_noise * draws.uniform(1, 1, 1, 1).to(context)
        return (1 - level) * context + level * draws.normal(*context.shape[1:]).to(context)

    def pair_loss(self, draws: Draws) -> Tensor:
        """Flow matching from inputs x, noised to a level s at which streams with a source begin, to targets y.

        A sampling step leads along y + sigma / s ((1 - s) x + s noise - y), sigma <= s: there the flow is the
        difference over s. With x = y this is Eq. 6. The past is that of y, the caption too.
        """
        assert self.pairs is not None
        config, chunk = self._drawn(draws), self.config.chunk
        shown, wanted, captions = self.pairs.read(draws.clips(config.batch, len(self.pairs)), config.frames)
        shown, wanted = shown.to(self.base.device), wanted.to(self.base.device)
        text = self.student.stages.prepare_text(self.base.encode(captions))
        context = self._disturbed(wanted[:, :, :-chunk], draws)
        begin, sigma = (
            level.to(wanted).repeat_interleave(chunk, 1)
            for level in draw_path((config.frames // chunk,), config, draws)
        )
        start = noised(shown, draws.normal(*shown.shape[1:]).to(shown), begin)
        flow = self.student.flow(context, noised(wanted, start, sigma / begin), sigma, text)
        return (flow - (start - wanted) / begin[:, None, :, None, None]).square().mean()

    def ode_loss(self, draws: Draws) -> Tensor:
        """Mean square distance of the clean prediction, from trajectories at a drawn level per chunk, to their ends.

        The lowest level is 0: such a chunk is the end itself, adds nothing, and shows later ones a finished past.
        """
        config = self.config
        assert isinstance(self.student, CausalStudent)
        latent, captions = self.read(draws, config.batch, config.frames)
        path = self.data.read_trajectory(self.clips(draws, config.batch), config.frames).to(latent)
        emb, levels = self.base.encode(self._dropped(captions, draws)), [*self.data.levels, 0.0]
        index = draws.choice(len(levels), config.frames // config.chunk).repeat_interleave(config.chunk, 1)
        noisy, sigma = points_of(torch.cat([path, latent[:, None]], 1), index), torch.tensor(levels)[index].to(latent)
        flow = self.student.flow_on_noisy(noisy, sigma, self.student.stages.prepare_text(emb))
        return (noisy - sigma[:, None, :, None, None] * flow - latent).square().mean()

    def first_frame_loss(self, draws: Draws) -> Tensor:
        """Chunk 0 from the text alone."""
        config, base = self._drawn(draws), self.base
        latent, captions = self.read(draws, config.first_batch, config.chunk)
        earlier = self.data.earlier(self.clips(draws, config.first_batch))
        captions = [switch[0] if switch else caption for switch, caption in zip(earlier, captions, strict=True)]
        ends = torch.tensor([switch[1] if switch else config.chunk for switch in earlier], device=latent.device)
        noise = draws.normal(*latent.shape[1:]).to(latent)
        emb = base.encode(captions)
        text = self.student.stages.prepare_text(emb)
        if config.first == "data":
            sigma = draw_sigmas((1,), config, draws).to(latent).expand(-1, config.chunk)
            noisy, target = noised(latent, noise, sigma), noise - latent
        else:
            grid = noise_levels(config.preset)
            index = draws.choice(len(grid) - 1)
            sigma = grid[index][:, None].to(latent).expand(-1, config.chunk)
            noisy = noised(latent, noise, sigma)
            captioned = base.transformer.prepare_text(emb)
            empty = base.prepare([""] * len(captions))
            target = segment_target(base.transformer, noisy, index.to(latent.device), captioned, empty, config)
        own = torch.arange(config.chunk).to(ends) < ends[:, None]  # frames before a switch of the prompt
        error = self.student.flow(latent[:, :, :0], noisy, sigma, text) - target
        return (error * own[:, None, :, None, None]).square().mean()

    def next_frame_loss(self, draws: Draws, *, roll: bool) -> Tensor:
        """Eq. 6 on all chunks but the first. With `roll` the student streams their past from the real chunk 0."""
        config, chunk = self._drawn(draws), self.config.chunk
        latent, captions = self.read(draws, config.batch, config.frames)
        begins = self.begins(draws, config.batch, chunk).to(latent.device)
        emb = self.base.encode(self._dropped(captions, draws))
        text, context = self.student.stages.prepare_text(emb), latent[:, :, :-chunk]
        seeds, size = draws.seeds(), (latent.shape[-2], latent.shape[-1])
        if roll:
            start, past = latent[:, :, :chunk], config.frames - chunk
            rolled = roll_out(self.student, emb, past, seeds, config.preset, size, start).to(latent)
            context = torch.where((begins > 0).view(-1, 1, 1, 1, 1), context, rolled)
        context = self._disturbed(context, draws)
        sigma = draw_sigmas((config.frames // chunk,), config, draws).to(latent).repeat_interleave(chunk, 1)
        noise = draws.normal(*latent.shape[1:]).to(latent)
        flow = self.student.flow(context, noised(latent, noise, sigma), sigma, text)
        # Of a clip whose prompt is switched, only the later chunks: a stream commits its past anew under the new
        # prompt, so they have the later caption and the whole past. Chunk 0 has a loss of its own.
        return error_from(flow - (noise - latent), begins.clamp(min=chunk))


def fit_student(
    objective: StudentObjective,
    config: StudentConfig,
    made: NextChunkConfig,
    out: Path,
    accelerator: Accelerator,
    board: Path | None,
    stop_at: int | None,
) -> dict[str, Tensor]:
    """`fit`; a complete run also writes the averaged student to out/student.pt. `made` is the config that made it."""
    if config.fp8:
        check_fp8(accelerator.device)
        compute_in_fp8(objective.student, settings_of(Path(made.teacher)).fp8_keep)
    trained = fit(objective, config, out, accelerator, board, stop_at)
    if accelerator.is_main_process and (stop_at is None or stop_at >= config.steps):
        save_student(out / "student.pt", trained, made)
    return trained


def train(
    config: NextChunkConfig,
    out: Path,
    board: Path | None = None,
    stop_at: int | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Tensor]:
    """Train, or resume. Returns the averaged parameters; a complete run also writes them to out/student.pt."""
    accelerator = accelerator or accelerator_of(config)
    torch.manual_seed(config.seed)  # every process starts from the same adapters
    base = Base(Path(config.teacher), config.dtype, accelerator.device)
    pairs = Pairs(Path(config.pairs)) if config.pairs else None
    objective = NextChunk(config, base, Shards(Path(config.data)), pairs)
    if config.start:
        begin_from(objective.student, Path(config.start), config)
    return fit_student(objective, config, config, out, accelerator, board, stop_at)


def run(config: NextChunkConfig, options: NextChunkOptions) -> None:
    train(config, options.out, options.board)


STAGE = Stage(NextChunkOptions, run, NextChunkConfig, "next_chunk")
