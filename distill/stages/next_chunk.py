"""Next-chunk training of the student (Eq. 6): every frame from its clean past, all frames of a clip in parallel.

    python -m distill.next_chunk --config distill/configs/sprites.toml --out runs/student
    accelerate launch --num_processes 8 -m distill.next_chunk --config ... --out ...

Two losses a step. Clips: flow matching on frames 1 .. F - 1, their past either the data or, for `roll_share` of the
steps, what the student itself streams from the clip's first frame. First frames, which have only the text: their
target is the teacher's classifier-free guidance, integrated over one sampling step (`first = "guided"`), so that the
student needs neither guidance nor many steps; `first = "data"` is the plain Eq. 6.
Writes --out/student.pt (adapters and W_c, averaged, and the config that made them).
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.data.shards import Shards
from distill.models.base import Base
from distill.models.causal import CausalStudent
from distill.models.rollout import noise_levels, roll_out
from distill.models.sampling import guided_flow, noised, shifted
from distill.models.student import Student
from distill.training.draws import Draws
from distill.training.loop import FitConfig, Objective, accelerator_of, fit
from distill.training.state import load_config, parse_arguments, run_stage, save_state
from engine.config import Preset
from engine.generators import FAMILIES
from engine.model.transformer import TextKV, WanTransformer
from engine.presets import find_preset

AnyStudent = Student | CausalStudent


@dataclass(frozen=True)
class NextChunkConfig(FitConfig):
    teacher: str = "runs/teacher/teacher"
    start: str = ""  # student.pt to go on from; none begins as the teacher
    data: str = "runs/bank/clips"
    family: str = "greedy"  # or causal: one causal transformer over `window` frames, the Self-Forcing family
    rank: int = 64
    etm: bool = True  # without it the student is a causal decoder on chunk 0 and the last chunk alone
    window: int = 3
    max_position: int = 4  # the SDD's positions stop growing here; longer training clips cover what lies beyond
    frames: int = 9  # latent frames of a clip
    first_batch: int = 16  # first frames a step: a multiple of batch
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
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first not in ("guided", "data"):
            raise ValueError(f"first: got {self.first!r}, expected 'guided' or 'data'")
        if self.family not in FAMILIES:
            raise ValueError(f"family: got {self.family!r}, expected one of {', '.join(FAMILIES)}")
        if 1000 % self.sampling_steps:
            raise ValueError(f"sampling_steps: got {self.sampling_steps}, expected a divisor of 1000")
        if self.first_batch % self.batch:
            raise ValueError(f"first_batch: got {self.first_batch}, expected a multiple of batch ({self.batch})")

    def preset_fields(self) -> dict[str, Any]:
        """The engine's preset fields that the student is trained with."""
        given = {
            "steps": list(range(1000, 0, -1000 // self.sampling_steps)),
            "warped": True,
            "shift": self.sampling_shift,
            "solver": self.solver,
            "chunk": 1,
            # The engine counts latent frames, the current one included.
            "window": self.window + (self.family == "greedy"),
        }
        return given | ({"max_position": self.max_position} if self.family == "greedy" else {})

    @property
    def preset_name(self) -> str:
        return "greedy" if self.family == "greedy" else "self-forcing-framewise"

    @property
    def preset(self) -> Preset:
        return find_preset(self.preset_name, self.preset_fields())

    def student(self, base: Base) -> AnyStudent:
        """A fresh student of this shape."""
        if self.family == "causal":
            return CausalStudent(base.transformer, self.rank, self.window, recompute=self.recompute).to(base.device)
        student = Student(
            base.transformer,
            self.rank,
            self.window,
            self.max_position,
            etm=self.etm,
            recompute=self.recompute,
        )
        return student.to(base.device)


def read_student(path: Path) -> tuple[dict[str, Tensor], NextChunkConfig]:
    """The trained tensors of a student file and the config that made it."""
    if not path.is_file():
        raise FileNotFoundError(f"student: got {path}, expected a file that next_chunk or rl wrote")
    state = torch.load(path, weights_only=True)
    unknown = sorted(set(state["config"]) - {field.name for field in fields(NextChunkConfig)})
    if unknown:
        raise ValueError(f"{path}: got settings {unknown}, expected a student of this version")
    return state["student"], NextChunkConfig(**state["config"])


def load_student(
    path: Path, base: Base | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[AnyStudent, NextChunkConfig, Base]:
    """A trained student, the config that made it and its teacher, whose frozen weights are in `dtype` (or as made)."""
    trained, config = read_student(path)
    base = base or Base(Path(config.teacher), dtype or config.dtype, device)
    student = config.student(base)
    student.load_trained(trained)
    return student.eval(), config, base


def begin_from(student: AnyStudent, path: Path, config: NextChunkConfig) -> None:
    """Put the trained tensors of another student of the same shape and teacher into this one."""
    trained, made = read_student(path)
    for name in ("teacher", "family", "rank", "etm", "window", "max_position"):
        if getattr(made, name) != getattr(config, name):
            got, expected = getattr(made, name), getattr(config, name)
            raise ValueError(f"start: got {path} with {name} = {got!r}, expected {expected!r}")
    student.load_trained(trained)


def save_student(path: Path, trained: dict[str, Tensor], config: NextChunkConfig) -> None:
    save_state(path, {"student": {name: t.cpu() for name, t in trained.items()}, "config": asdict(config)})


def draw_levels(shape: tuple[int, ...], config: NextChunkConfig, draws: Draws) -> Tensor:
    """Noise levels [B, *shape] in (0, 1]: some exactly those of the sampling steps, the rest shifted logit-normal."""
    grid = noise_levels(config.preset)[:-1]
    picked = grid[draws.choice(len(grid), *shape)]
    free = shifted(torch.sigmoid(draws.normal(*shape)), config.shift)
    return torch.where(draws.uniform(*shape) < config.on_schedule, picked, free)


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
    grid = noise_levels(config.preset).to(noisy.device)
    start, end = grid[index], grid[index + 1]
    latent, width = noisy, ((end - start) / config.substeps)
    for step in range(config.substeps):
        t = (start + step * width)[:, None]
        flow = guided_flow(teacher, latent, t, text, empty, config.guidance)
        latent = latent + width.view(-1, 1, 1, 1, 1) * flow
    return (latent - noisy) / (end - start).view(-1, 1, 1, 1, 1)


class NextChunk(Objective):
    """Eq. 6 for some samples of a step."""

    def __init__(self, config: NextChunkConfig, base: Base, data: Shards) -> None:
        super().__init__()
        if config.frames > data.frames:
            raise ValueError(f"frames: got {config.frames}, expected at most the {data.frames} of {data.folder}")
        self.config, self.data = config, data
        self._frozen = [base]  # in a list: no part of this module, neither moved nor synchronised
        self.student = config.student(base)

    @property
    def base(self) -> Base:
        return self._frozen[0]

    def frozen(self) -> list[nn.Module]:
        return self.base.models

    def groups(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        return {"student": (self.student.trained(), 1.0)}

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        turn = float(torch.rand((), generator=draws.shared))
        roll = draws.step >= config.roll_from * config.steps and turn < config.roll_share
        later = self.next_frame_loss(draws, roll=roll)
        many = config.first_batch // config.batch
        samples = [sample * many + i for sample in draws.samples for i in range(many)]
        first = self.first_frame_loss(Draws(config.seed + 1, draws.step, samples))
        return later + first, {"later": later, "first": first}

    def _read(self, draws: Draws, batch: int, frames: int) -> tuple[Tensor, list[str]]:
        latent, captions = self.data.read(draws.clips(batch, len(self.data)), frames)
        return latent.to(self.base.device), captions

    def first_frame_loss(self, draws: Draws) -> Tensor:
        """Frame 0 from the text alone."""
        config, base = self.config, self.base
        latent, captions = self._read(draws, config.first_batch, 1)
        noise = draws.normal(*latent.shape[1:]).to(latent)
        emb = base.encode(captions)
        text = self.student.stages.prepare_text(emb)
        if config.first == "data":
            t = draw_levels((1,), config, draws).to(latent)
            noisy, target = noised(latent, noise, t), noise - latent
        else:
            index = draws.choice(config.sampling_steps)
            t = noise_levels(config.preset)[index][:, None].to(latent)
            noisy = noised(latent, noise, t)
            given = base.transformer.prepare_text(emb)
            empty = base.prepare([""] * len(captions))
            target = segment_target(base.transformer, noisy, index.to(latent.device), given, empty, config)
        return (self.student.flow(latent[:, :, :0], noisy, t, text) - target).square().mean()

    def next_frame_loss(self, draws: Draws, *, roll: bool) -> Tensor:
        """Eq. 6 on frames 1 .. F - 1; with `roll` their past is the student's own, streamed from the real frame 0."""
        config = self.config
        latent, captions = self._read(draws, config.batch, config.frames)
        dropped = draws.uniform() < config.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        emb = self.base.encode(captions)
        text, context = self.student.stages.prepare_text(emb), latent[:, :, :-1]
        seeds, size = draws.seeds(), (latent.shape[-2], latent.shape[-1])
        if roll:
            start = latent[:, :, :1]
            context = roll_out(self.student, emb, config.frames - 1, seeds, config.preset, size, start).to(latent)
        if config.context_noise:
            level = config.context_noise * draws.uniform(1, 1, 1, 1).to(latent)
            context = (1 - level) * context + level * draws.normal(*context.shape[1:]).to(latent)
        t = draw_levels((config.frames,), config, draws).to(latent)
        noise = draws.normal(*latent.shape[1:]).to(latent)
        flow = self.student.flow(context, noised(latent, noise, t), t, text)
        return (flow - (noise - latent))[:, :, 1:].square().mean()


def train(
    config: NextChunkConfig,
    out: Path,
    board: Path | None = None,
    stop_at: int | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Tensor]:
    """Run (or go on with) the training; the averaged parameters, also in out/student.pt when it is through."""
    accelerator = accelerator or accelerator_of(config)
    torch.manual_seed(config.seed)  # adapters start alike in every process
    base = Base(Path(config.teacher), config.dtype, accelerator.device)
    objective = NextChunk(config, base, Shards(Path(config.data)))
    if config.start:
        begin_from(objective.student, Path(config.start), config)
    trained = fit(objective, config, out, accelerator, board, stop_at)
    if accelerator.is_main_process and (stop_at is None or stop_at >= config.steps):
        save_student(out / "student.pt", trained, config)
    return trained


def main() -> None:
    arguments = parse_arguments(__doc__, "runs/student", dry_run=True)
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, "next_chunk", NextChunkConfig)
    if arguments.dry_run:
        from distill.stages.plan import report

        return report(arguments.config, "next_chunk", config)
    train(config, arguments.out, arguments.out if arguments.tensorboard else None)


if __name__ == "__main__":
    run_stage(main)
