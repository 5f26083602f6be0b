"""Sample the training clips from the frozen teacher: captioned latents as shards, the students' data.

    python -m distill sample_teacher --config distill/configs/scenes.toml --out runs/teacher_clips
    accelerate launch --num_processes 8 -m distill sample_teacher --config ... --out ...

The noise of a clip depends on (seed, clip number) alone. A resumed run, or a run on more processes, therefore writes
the same files. Processes take turns at shards. The index comes last, when all shards exist. With `levels` the shards
also hold the teacher's latents on the way, from which next_chunk's target "ode" trains causal students.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.data.shards import shard_path, write_index, write_shard
from distill.models.base import Base
from distill.models.sampling import sample_path
from distill.scores.tasks import find_task
from distill.training.draws import generator
from distill.training.loop import PATIENCE, PRECISIONS, count_processes
from distill.training.stage import Stage, TableOptions
from engine.options import option


@dataclass(frozen=True)
class SampleTeacherConfig:
    """The table [sample_teacher]."""

    teacher: str = option("runs/teacher/teacher", "pipeline directory of the teacher")
    prompts: str = option("", "text file, one prompt per line, used in turn; empty: captions of the task")
    task: str = option("sprites", "task whose training captions are drawn: sprites or scenes")
    clips: int = option(1000, "clips to sample")
    shard: int = option(50, "clips per shard")
    batch: int = option(10, "clips per call of the teacher")
    frames: int = option(9, "latent frames per clip")
    height: int = option(8, "latent pixels")
    width: int = option(8, "latent pixels")
    steps: int = option(50, "denoising steps")
    guidance: float = option(2.0, "scale of classifier-free guidance")
    shift: float = option(3.0, "shift of the noise schedule")
    levels: tuple[float, ...] = option((), "falling noise levels in (0, 1] whose latents are kept too, for target ode")
    precision: str = option("fp32", "fp32 or bf16, of the teacher; latents are stored in 16 bits")
    seed: int = option(7, "of captions and noise")

    def __post_init__(self) -> None:
        sizes = (self.clips, self.shard, self.batch, self.frames, self.height, self.width, self.steps)
        if min(sizes) < 1 or self.precision not in PRECISIONS:
            raise ValueError(f"got {self}, expected positive sizes and a precision of {', '.join(PRECISIONS)}")
        if list(self.levels) != sorted(set(self.levels), reverse=True) or not all(0 < x <= 1 for x in self.levels):
            raise ValueError(f"levels: got {list(self.levels)}, expected falling numbers in (0, 1]")


@dataclass(frozen=True)
class SampleTeacherOptions(TableOptions):
    out: Path = option(Path("runs/teacher_clips"), "folder of the shards")


def captions_of(config: SampleTeacherConfig, first: int, count: int) -> list[str]:
    """The captions of clips first .. first + count - 1."""
    if not config.prompts:
        task = find_task(config.task)
        return [
            task.sample(1, generator(config.seed, "caption", clip))[0].caption for clip in range(first, first + count)
        ]
    path = Path(config.prompts)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: got {path}, expected a text file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompts: got an empty {path}, expected one prompt per line")
    return [lines[clip % len(lines)] for clip in range(first, first + count)]


@torch.no_grad()
def sample_clips(
    base: Base, config: SampleTeacherConfig, first: int, captions: list[str]
) -> tuple[Tensor, Tensor | None]:
    """Clips from number `first` on, in 16 bits, on the CPU: latents [n, C, F, h, w], and trajectories, if kept."""
    model, parts, paths = base.transformer, list[Tensor](), list[Tensor]()
    shape = (model.config.in_channels, config.frames, config.height, config.width)
    for start in range(0, len(captions), config.batch):
        part = captions[start : start + config.batch]
        seeds = [generator(config.seed, "clip", first + start + i) for i in range(len(part))]
        noise = torch.stack([torch.randn(shape, generator=own) for own in seeds]).to(model.proj_out.weight)
        text, empty = base.prepare(part), base.prepare([""] * len(part))
        latent, path = sample_path(
            model, text, empty, noise, config.levels, steps=config.steps, scale=config.guidance, shift=config.shift
        )
        parts.append(latent.cpu())
        if path:
            paths.append(torch.stack(path, 1).cpu())
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float16
    return torch.cat(parts).to(dtype), torch.cat(paths).to(dtype) if paths else None


def write_clips(config: SampleTeacherConfig, out: Path, accelerator: Accelerator, stop_at: int | None = None) -> None:
    """Write all missing shards, then the index. `stop_at` ends after so many shards, as a kill would."""
    base = Base(Path(config.teacher), PRECISIONS[config.precision], accelerator.device)
    shards = -(-config.clips // config.shard)
    accelerator.print(f"{out.name}: {count_processes(accelerator)}, {shards} shards", flush=True)
    for number in range(accelerator.process_index, shards, accelerator.num_processes):
        if stop_at is not None and number >= stop_at:
            return
        if shard_path(out, number).is_file():
            continue
        first = number * config.shard
        captions = captions_of(config, first, min(config.shard, config.clips - first))
        latents, trajectory = sample_clips(base, config, first, captions)
        write_shard(out, number, latents, captions, trajectory=trajectory)
        print(f"sample_teacher: shard {number + 1}/{shards}", flush=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        source = {"steps": config.steps, "guidance": config.guidance, "shift": config.shift, "seed": config.seed}
        write_index(out, shards, source, config.levels)


def run(config: SampleTeacherConfig, options: SampleTeacherOptions) -> None:
    """Sample on whatever device and processes there are."""
    write_clips(config, options.out, Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[PATIENCE]))


STAGE = Stage(SampleTeacherOptions, run, SampleTeacherConfig, "sample_teacher")
