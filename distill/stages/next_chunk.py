"""Next-chunk training of the student (Eq. 6): every frame from its clean past, all frames of a clip in parallel.

    python -m distill next_chunk --config distill/configs/sprites.toml --out runs/student
    accelerate launch --num_processes 8 -m distill next_chunk --config ... --out ...

A step has two losses. Clips: flow matching on frames 1 .. F - 1. Their past is the data, or, in `roll_share` of the
steps, the student's own stream from the first frame of the clip. First frames have only the text. With
`first = "guided"` their target is the teacher's classifier-free guidance, integrated over one sampling step. The
student then needs neither guidance nor many steps. `first = "data"` is the plain Eq. 6.
Writes --out/student.pt: averaged adapters and W_c, and the config that made them.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.data.shards import Shards
from distill.models.base import Base
from distill.models.causal import CausalStudent
from distill.models.rollout import noise_levels, roll_out
from distill.models.sampling import guided_flow, noised, shifted
from distill.models.student import Student
from distill.training.draws import Draws
from distill.training.loop import FitConfig, Objective, accelerator_of, fit
from distill.training.stage import Stage, TrainingOptions
from distill.training.state import save_state
from engine.config import Preset
from engine.files import read_json
from engine.loader import settings_of
from engine.model.transformer import TextKV, WanTransformer
from engine.options import option
from engine.presets import find_preset
from engine.weights.adapters import check_base
from engine.weights.finding import part_files

AnyStudent = Student | CausalStudent


@dataclass(frozen=True)
class NextChunkConfig(FitConfig):
    """The table [next_chunk]. A student file holds these keys: renaming one makes older files unreadable."""

    teacher: str = option("runs/teacher/teacher", "pipeline directory of the teacher")
    start: str = option("", "student.pt to start from; empty: begin as the teacher")
    data: str = option("runs/bank/clips", "folder of captioned latents")
    family: str = option("greedy", "greedy; causal: one causal transformer, as in the Self-Forcing family")
    rank: int = option(64, "of the LoRA adapters")
    etm: bool = option(True, "false: a causal decoder that sees only chunk 0 and the last chunk")
    window: int = option(3, "greedy: frames before the current one that the ETM sees (w of Eq. 1); causal: with it")
    max_position: int = option(4, "largest temporal position of the SDD; longer clips cover the frames beyond it")
    frames: int = option(9, "latent frames per clip")
    first_batch: int = option(16, "first frames per step: a multiple of batch")
    first: str = option("guided", "target of frame 0: guided or data")
    guidance: float = option(2.0, "scale of the teacher's guidance for frame 0")
    substeps: int = option(4, "teacher steps within one sampling step")
    sampling_steps: int = option(4, "denoising steps per frame of the student")
    sampling_shift: float = option(2.0, "shift of the student's noise schedule")
    solver: str = option("euler", "of the student: euler, renoise or unipc")
    on_schedule: float = option(0.5, "share of the noise levels that are exactly those of the sampling steps")
    shift: float = option(3.0, "shift of the other noise levels")
    roll_share: float = option(0.5, "share of the steps whose past is the student's own stream")
    roll_from: float = option(0.25, "share of the run before the first such step")
    context_noise: float = option(0.0, "largest noise level mixed into the past")
    caption_dropout: float = option(0.0, "share of the samples that train without a caption")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first not in ("guided", "data"):
            raise ValueError(f"first: got {self.first!r}, expected 'guided' or 'data'")
        if self.family not in ("greedy", "causal"):  # of the engine's families, those with a student
            raise ValueError(f"family: got {self.family!r}, expected 'greedy' or 'causal'")
        if 1000 % self.sampling_steps:
            raise ValueError(f"sampling_steps: got {self.sampling_steps}, expected a divisor of 1000")
        if self.first_batch % self.batch:
            raise ValueError(f"first_batch: got {self.first_batch}, expected a multiple of batch ({self.batch})")

    def preset_fields(self) -> dict[str, Any]:
        """The fields of the engine's preset with which the student is trained."""
        # The engine's window has the current frame in it; w of Eq. 1 leaves it out.
        window = self.window + (self.family == "greedy")
        shared = {
            "steps": list(range(1000, 0, -1000 // self.sampling_steps)),
            "warped": True,
            "shift": self.sampling_shift,
            "solver": self.solver,
            "chunk": 1,
            "window": window,
        }
        return shared | ({"max_position": self.max_position} if self.family == "greedy" else {})

    @property
    def preset_name(self) -> str:
        return "greedy" if self.family == "greedy" else "self-forcing-framewise"

    @property
    def preset(self) -> Preset:
        return find_preset(self.preset_name, self.preset_fields())

    def student(self, base: Base) -> AnyStudent:
        """A fresh student of this shape, on the device of its teacher."""
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


@dataclass(frozen=True)
class NextChunkOptions(TrainingOptions):
    out: Path = option(Path("runs/student"), "folder of checkpoints, logs and student.pt")


def read_student(path: Path) -> tuple[dict[str, Tensor], NextChunkConfig]:
    """The trained tensors of a student file, or of a directory that assemble wrote, and the config that made it."""
    if (path / "adapters" / "sdd").is_dir():
        return _assembled(path)
    if not path.is_file():
        raise FileNotFoundError(f"student: got {path}, expected a training stage's file or a model with adapters/")
    state = torch.load(path, weights_only=True)
    unknown = sorted(set(state["config"]) - {field.name for field in fields(NextChunkConfig)})
    if unknown:
        raise ValueError(f"{path}: got settings {unknown}, expected a student of this version")
    return state["student"], NextChunkConfig(**state["config"])


def _assembled(folder: Path) -> tuple[dict[str, Tensor], NextChunkConfig]:
    """The student in adapters/ and engine.json; its teacher is the directory itself."""
    settings, trained = settings_of(folder), dict[str, Tensor]()
    base_files = list(part_files(folder / "transformer", "transformer").files)
    made = read_json(folder / "adapters" / "sdd" / "adapter_config.json")
    if made.get("lora_alpha") != made["r"]:
        raise ValueError(f"student: got lora_alpha {made.get('lora_alpha')}, expected the rank ({made['r']})")
    for role in ("etm", "sdd"):
        check_base(folder / "adapters" / role, base_files)
        for key, value in load_file(folder / "adapters" / role / "adapter_model.safetensors").items():
            module = key.removeprefix("base_model.model.").removesuffix(".weight")
            trained[f"{role}.{module}.default.weight"] = value.float()
    condition = load_file(folder / "adapters" / "sdd" / "condition.safetensors")
    trained["sdd.condition_proj.weight"] = condition["condition_proj.weight"].float()
    preset = find_preset(settings.preset, settings.overrides)
    config = NextChunkConfig(
        teacher=str(folder), rank=made["r"],
        window=preset.window - 1, max_position=preset.max_position, sampling_steps=len(preset.steps[-1]),
        sampling_shift=preset.shift, solver=preset.solver,
    )  # fmt: skip
    if config.preset != preset:
        raise ValueError(f"student: got {folder} with {preset}, expected {config.preset}")
    return trained, config


def load_student(
    path: Path, base: Base | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[AnyStudent, NextChunkConfig, Base]:
    """A trained student, the config that made it, and its teacher. `dtype` is of frozen weights (default: as made)."""
    trained, config = read_student(path)
    base = base or Base(Path(config.teacher), dtype or config.dtype, device)
    student = config.student(base)
    student.load_trained(trained)
    return student.eval(), config, base


def begin_from(student: AnyStudent, path: Path, config: NextChunkConfig) -> None:
    """Load the trained tensors of another student of the same shape and teacher."""
    trained, made = read_student(path)
    for name in ("teacher", "family", "rank", "etm", "window", "max_position"):
        if getattr(made, name) != getattr(config, name):
            got, expected = getattr(made, name), getattr(config, name)
            raise ValueError(f"start: got {path} with {name} = {got!r}, expected {expected!r}")
    student.load_trained(trained)


def save_student(path: Path, trained: dict[str, Tensor], config: NextChunkConfig) -> None:
    """Write a student file: its trained tensors and the config that made it."""
    save_state(path, {"student": {name: t.cpu() for name, t in trained.items()}, "config": asdict(config)})


def draw_sigmas(shape: tuple[int, ...], config: NextChunkConfig, draws: Draws) -> Tensor:
    """Noise levels sigma [B, *shape]: some are exactly those of the sampling steps, the rest shifted logit-normal."""
    grid = noise_levels(config.preset)[:-1]
    picked = grid[draws.choice(len(grid), *shape)]
    free = shifted(torch.sigmoid(draws.normal(*shape)), config.shift)
    return torch.where(draws.uniform(*shape) < config.on_schedule, picked, free)


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
    """Mean flow of the guided teacher over sampling step `index` [B]; the step starts at noisy [B, C, 1, h, w]."""
    grid = noise_levels(config.preset).to(noisy.device)
    start, end = grid[index], grid[index + 1]
    latent, width = noisy, ((end - start) / config.substeps)
    for step in range(config.substeps):
        sigma = (start + step * width)[:, None]
        flow = guided_flow(teacher, latent, sigma, text, empty, config.guidance)
        latent = latent + width.view(-1, 1, 1, 1, 1) * flow
    return (latent - noisy) / (end - start).view(-1, 1, 1, 1, 1)


class StudentObjective(Objective):
    """A loss on a student, with its frozen teacher and captioned latents at hand."""

    def __init__(self, base: Base, student: AnyStudent, data: Shards) -> None:
        super().__init__()
        self._frozen = [base]  # a list hides it from this module, which then neither moves nor synchronises it
        self.student, self.data = student, data

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
        return draws.clips(batch, len(self.data))

    def begins(self, draws: Draws, batch: int) -> Tensor:
        """The first frames [B] at which the captions of those clips hold."""
        return torch.tensor([switch[1] if switch else 0 for switch in self.data.earlier(self.clips(draws, batch))])


class NextChunk(StudentObjective):
    """Eq. 6 on some samples of a step."""

    def __init__(self, config: NextChunkConfig, base: Base, data: Shards) -> None:
        if config.frames > data.frames:
            raise ValueError(f"frames: got {config.frames}, expected at most the {data.frames} of {data.folder}")
        super().__init__(base, config.student(base), data)
        self.config = config

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        turn = float(torch.rand((), generator=draws.shared))
        roll = draws.step >= config.roll_from * config.steps and turn < config.roll_share
        later = self.next_frame_loss(draws, roll=roll)
        many = config.first_batch // config.batch
        samples = [sample * many + i for sample in draws.samples for i in range(many)]
        first = self.first_frame_loss(Draws(config.seed + 1, draws.step, samples))
        return later + first, {"later": later, "first": first}

    def first_frame_loss(self, draws: Draws) -> Tensor:
        """Frame 0 from the text alone."""
        config, base = self.config, self.base
        latent, captions = self.read(draws, config.first_batch, 1)
        earlier = self.data.earlier(self.clips(draws, config.first_batch))
        captions = [switch[0] if switch else caption for switch, caption in zip(earlier, captions, strict=True)]
        noise = draws.normal(*latent.shape[1:]).to(latent)
        emb = base.encode(captions)
        text = self.student.stages.prepare_text(emb)
        if config.first == "data":
            sigma = draw_sigmas((1,), config, draws).to(latent)
            noisy, target = noised(latent, noise, sigma), noise - latent
        else:
            index = draws.choice(config.sampling_steps)
            sigma = noise_levels(config.preset)[index][:, None].to(latent)
            noisy = noised(latent, noise, sigma)
            captioned = base.transformer.prepare_text(emb)
            empty = base.prepare([""] * len(captions))
            target = segment_target(base.transformer, noisy, index.to(latent.device), captioned, empty, config)
        return (self.student.flow(latent[:, :, :0], noisy, sigma, text) - target).square().mean()

    def next_frame_loss(self, draws: Draws, *, roll: bool) -> Tensor:
        """Eq. 6 on frames 1 .. F - 1. With `roll` the student streams their past from the real frame 0."""
        config = self.config
        latent, captions = self.read(draws, config.batch, config.frames)
        begins = self.begins(draws, config.batch).to(latent.device)
        dropped = draws.uniform() < config.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        emb = self.base.encode(captions)
        text, context = self.student.stages.prepare_text(emb), latent[:, :, :-1]
        seeds, size = draws.seeds(), (latent.shape[-2], latent.shape[-1])
        if roll:
            start = latent[:, :, :1]
            rolled = roll_out(self.student, emb, config.frames - 1, seeds, config.preset, size, start).to(latent)
            context = torch.where((begins > 0).view(-1, 1, 1, 1, 1), context, rolled)
        if config.context_noise:
            level = config.context_noise * draws.uniform(1, 1, 1, 1).to(latent)
            context = (1 - level) * context + level * draws.normal(*context.shape[1:]).to(latent)
        sigma = draw_sigmas((config.frames,), config, draws).to(latent)
        noise = draws.normal(*latent.shape[1:]).to(latent)
        flow = self.student.flow(context, noised(latent, noise, sigma), sigma, text)
        # Of a clip whose prompt is switched, only the later frames: a stream commits its past anew under the new
        # prompt, so they have the later caption and the whole past. Frame 0 has a loss of its own.
        return error_from(flow - (noise - latent), begins.clamp(min=1))


def fit_student(
    objective: StudentObjective,
    config: FitConfig,
    made: NextChunkConfig,
    out: Path,
    accelerator: Accelerator,
    board: Path | None,
    stop_at: int | None,
) -> dict[str, Tensor]:
    """`fit`; a complete run also writes the averaged student to out/student.pt. `made` is the config that made it."""
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
    objective = NextChunk(config, base, Shards(Path(config.data)))
    if config.start:
        begin_from(objective.student, Path(config.start), config)
    return fit_student(objective, config, config, out, accelerator, board, stop_at)


def run(config: NextChunkConfig, options: NextChunkOptions) -> None:
    train(config, options.out, options.board)


STAGE = Stage(NextChunkOptions, run, NextChunkConfig, "next_chunk")
