"""Next-chunk training of the student (Eq. 6): every frame from its clean past, all frames of a clip in parallel.

    python -m distill.next_chunk --config distill/configs/sprites.toml --out runs/student

Two batches a step. Clips: flow matching on frames 1 .. F - 1, their past either the data or, for `roll_share` of the
clips, what the student itself streams from the clip's first frame. Images: frame 0, which has only the text; its
target is the teacher's classifier-free guidance, integrated over one sampling step (`first = "guided"`), so that the
student needs neither guidance nor many steps; `first = "data"` is the plain Eq. 6.
Writes --out/student.pt (adapters and W_c, averaged).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill.codec import Codec
from distill.evaluator import Scores, aggregate, evaluate
from distill.latents import Bank
from distill.rollout import noise_levels, roll_out
from distill.sampling import contact_sheet, guided_flow, shifted
from distill.sprites import sample
from distill.student import Student
from distill.teacher import Teacher, load_teacher
from distill.training import (
    Ema,
    Progress,
    load_config,
    load_state,
    parse_arguments,
    run_stage,
    save_state,
    set_lr,
    trapezoid,
)
from engine.config import Preset, find_preset
from engine.transformer import TextKV, WanTransformer


@dataclass(frozen=True)
class NextChunkConfig:
    teacher: str = "runs/teacher/teacher"
    bank: str = "runs/bank"
    vae: str = "runs/vae/vae"
    rank: int = 64
    window: int = 3
    max_position: int = 4  # the SDD's positions stop growing here; longer training clips cover what lies beyond
    steps: int = 1200
    clips: int = 4
    frames: int = 9  # latent frames of a clip
    images: int = 16
    first: str = "guided"  # target of frame 0: guided or data
    guidance: float = 2.0
    substeps: int = 4  # teacher steps within one sampling step
    sampling_steps: int = 4
    sampling_shift: float = 2.0
    solver: str = "euler"
    on_schedule: float = 0.5  # share of noise levels that are exactly those of the sampling steps
    shift: float = 3.0
    roll_share: float = 0.5
    roll_from: float = 0.25  # share of the run after which the student's own past is used
    context_noise: float = 0.0  # largest noise level mixed into the past
    lr: float = 1e-3
    warmup: int = 50
    decay: float = 0.5
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.99
    seed: int = 0
    save_every: int = 100
    score_every: int = 300
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.first not in ("guided", "data"):
            raise ValueError(f"first: got {self.first!r}, expected 'guided' or 'data'")
        if 1000 % self.sampling_steps:
            raise ValueError(f"sampling_steps: got {self.sampling_steps}, expected a divisor of 1000")

    def preset_fields(self) -> dict[str, Any]:
        """The engine's preset fields that the student is trained with."""
        return {
            "steps": list(range(1000, 0, -1000 // self.sampling_steps)),
            "warped": True,
            "shift": self.sampling_shift,
            "solver": self.solver,
            "chunk": 1,
            "window": self.window,
            "max_position": self.max_position,
        }

    @property
    def preset(self) -> Preset:
        return find_preset("greedy", self.preset_fields())


def trained_state(student: Student) -> dict[str, Tensor]:
    """The parameters that are trained: both adapters and W_c."""
    return {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}


def load_trained(student: Student, state: dict[str, Tensor]) -> None:
    own = trained_state(student)
    if state.keys() != own.keys():
        raise ValueError(f"student: got {len(state)} trained tensors, expected {len(own)} (rank or layout differ)")
    for name, value in state.items():
        own[name].copy_(value)


def draw_levels(shape: tuple[int, ...], config: NextChunkConfig, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1]: some exactly those of the sampling steps, the rest shifted logit-normal."""
    grid = noise_levels(config.preset)[:-1]
    picked = grid[torch.randint(len(grid), shape, generator=generator)]
    free = shifted(torch.sigmoid(torch.randn(shape, generator=generator)), config.shift)
    return torch.where(torch.rand(shape, generator=generator) < config.on_schedule, picked, free)


@torch.no_grad()
def segment_target(
    teacher: WanTransformer,
    noisy: Tensor,
    index: Tensor,
    text: TextKV,
    empty: TextKV,
    config: NextChunkConfig,
) -> Tensor:
    """Mean flow of the guided teacher over sampling step `index` [B], from noisy [B, C, 1, h, w] at its start."""
    grid = noise_levels(config.preset)
    start, end = grid[index], grid[index + 1]
    latent, width = noisy, ((end - start) / config.substeps)
    for step in range(config.substeps):
        t = (start + step * width)[:, None]
        flow = guided_flow(teacher, latent, t, text, empty, config.guidance)
        latent = latent + width.view(-1, 1, 1, 1, 1) * flow
    return (latent - noisy) / (end - start).view(-1, 1, 1, 1, 1)


def first_frame_loss(
    student: Student, teacher: Teacher, bank: Bank, config: NextChunkConfig, generator: torch.Generator
) -> Tensor:
    """Frame 0 from the text alone."""
    latent, captions = bank.draw(config.images, 1, generator)
    noise = torch.randn(latent.shape, generator=generator)
    emb = teacher.encode(captions)
    text = student.stages.prepare_text(emb)
    if config.first == "data":
        t = draw_levels((config.images, 1), config, generator)
        target = noise - latent
    else:
        index = torch.randint(config.sampling_steps, (config.images,), generator=generator)
        t = noise_levels(config.preset)[index][:, None]
    noisy = (1 - t[..., None, None, None]) * latent + t[..., None, None, None] * noise
    if config.first == "guided":
        given = teacher.transformer.prepare_text(emb)
        empty = teacher.transformer.prepare_text(teacher.encode([""] * config.images))
        target = segment_target(teacher.transformer, noisy, index, given, empty, config)
    return (student.flow(latent[:, :, :0], noisy, t, text) - target).square().mean()


def next_frame_loss(
    student: Student,
    teacher: Teacher,
    bank: Bank,
    config: NextChunkConfig,
    generator: torch.Generator,
    *,
    roll: bool,
) -> Tensor:
    """Eq. 6 on frames 1 .. F - 1; with `roll` their past is the student's own, streamed from the real frame 0."""
    latent, captions = bank.draw(config.clips, config.frames, generator)
    emb = teacher.encode(captions)
    text, context = student.stages.prepare_text(emb), latent[:, :, :-1]
    if roll:
        seed = int(torch.randint(2**31, (), generator=generator))
        context = roll_out(student, emb, config.frames - 1, seed, config.preset, start=latent[:, :, :1])
    if config.context_noise:
        level = config.context_noise * torch.rand(config.clips, 1, 1, 1, 1, generator=generator)
        context = (1 - level) * context + level * torch.randn(context.shape, generator=generator)
    t = draw_levels((config.clips, config.frames), config, generator)
    noise = torch.randn(latent.shape, generator=generator)
    level = t[:, None, :, None, None]
    flow = student.flow(context, (1 - level) * latent + level * noise, t, text)
    return (flow - (noise - latent))[:, :, 1:].square().mean()


def evaluate_student(
    student: Student,
    teacher: Teacher,
    codec: Codec,
    count: int,
    frames: int,
    seed: int,
    config: NextChunkConfig,
    *,
    hidden: bool,
    sheet: Path | None = None,
) -> list[Scores]:
    """Stream `count` prompts for `frames` latent frames and score every clip."""
    specs = sample(count, torch.Generator().manual_seed(seed), hidden=hidden)
    videos: list[Tensor] = []
    for i in range(0, count, 16):
        emb = teacher.encode([spec.caption for spec in specs[i : i + 16]])
        videos += codec.decode(roll_out(student, emb, frames, seed + i, config.preset)).unbind(0)
    if sheet is not None:
        contact_sheet(videos[:12], sheet)
    return [evaluate(video, spec) for video, spec in zip(videos, specs, strict=True)]


def train(
    config: NextChunkConfig, out: Path, board: Path | None = None, stop_at: int | None = None
) -> tuple[Student, Teacher]:
    """Run (or go on with) the training; returns the averaged student and its teacher."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed + 1)
    teacher, bank = load_teacher(Path(config.teacher)), Bank.load(Path(config.bank))
    student, averaged = (
        Student(teacher.transformer, config.rank, config.window, config.max_position) for _ in range(2)
    )
    codec = Codec(AutoencoderKLWan.from_pretrained(config.vae)) if config.score_every else None
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    ema, first = Ema(student, config.ema), 0
    if state := load_state(out / "state.pt"):
        load_trained(student, state["student"])
        ema.load(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
    progress = Progress("next_chunk", config.steps, config.log_every, board)
    for step in range(first, min(config.steps, stop_at or config.steps)):
        set_lr([optimizer], config.lr * trapezoid(step, config.steps, config.warmup, config.decay))
        draw = float(torch.rand((), generator=generator))
        roll = step >= config.roll_from * config.steps and draw < config.roll_share
        later = next_frame_loss(student, teacher, bank, config, generator, roll=roll)
        start = first_frame_loss(student, teacher, bank, config, generator)
        optimizer.zero_grad()
        (later + start).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        ema.update(step)
        done = step + 1
        progress.update(done, later.item(), first=start.item())
        if done % config.save_every == 0 or done == config.steps:
            state = {
                "student": trained_state(student),
                "ema": ema.mean,
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "step": done,
            }
            save_state(out / "state.pt", state)
        if codec is not None and done % config.score_every == 0:
            load_trained(averaged, ema.mean)
            scores = evaluate_student(
                averaged, teacher, codec, 32, 9, 77, config, hidden=False, sheet=out / f"step{done:05d}.png"
            )
            print(f"next_chunk {done}", {k: v["mean"] for k, v in aggregate(scores).items()}, flush=True)
    load_trained(averaged, ema.mean)
    return averaged, teacher


def main() -> None:
    arguments = parse_arguments(__doc__, "runs/student")
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, "next_chunk", NextChunkConfig)
    student, teacher = train(config, arguments.out, arguments.out if arguments.tensorboard else None)
    save_state(arguments.out / "student.pt", {"student": trained_state(student), "config": asdict(config)})
    codec = Codec(AutoencoderKLWan.from_pretrained(config.vae))
    sheet = arguments.out / "final.png"
    report = aggregate(evaluate_student(student, teacher, codec, 64, 9, 4242, config, hidden=True, sheet=sheet))
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    run_stage(main)
