"""Sample the training clips from the frozen teacher: captioned latents as shards, the students' data.

    python -m distill.sample_teacher --config distill/configs/scenes.toml --out runs/teacher_clips
    accelerate launch --num_processes 8 -m distill.sample_teacher --config ... --out ...

Every clip's noise depends on (seed, its number) alone, so a run that was stopped, or one on more processes, writes the
same files; processes take turns at shards, and the index is written when all are there.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.data.shards import shard_path, write_index, write_shard
from distill.models.base import Base
from distill.models.sampling import sample_joint
from distill.scores.tasks import find_task
from distill.training.draws import generator
from distill.training.loop import PATIENCE, PRECISIONS, count_processes
from distill.training.state import load_config, parse_arguments, run_stage


@dataclass(frozen=True)
class SampleTeacherConfig:
    teacher: str = "runs/teacher/teacher"
    prompts: str = ""  # text file, one prompt a line, used in turn; none draws captions of the task's training side
    task: str = "sprites"
    clips: int = 1000
    shard: int = 50  # clips a shard
    batch: int = 10
    frames: int = 9  # latent frames
    height: int = 8  # latent pixels
    width: int = 8
    steps: int = 50
    guidance: float = 2.0
    shift: float = 3.0
    precision: str = "fp32"  # of the teacher; latents are stored in 16 bits
    seed: int = 7

    def __post_init__(self) -> None:
        sizes = (self.clips, self.shard, self.batch, self.frames, self.height, self.width, self.steps)
        if min(sizes) < 1 or self.precision not in PRECISIONS:
            raise ValueError(f"got {self}, expected positive sizes and a precision of {', '.join(PRECISIONS)}")


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
        raise ValueError(f"prompts: got an empty {path}, expected a prompt a line")
    return [lines[clip % len(lines)] for clip in range(first, first + count)]


@torch.no_grad()
def sample_clips(base: Base, config: SampleTeacherConfig, first: int, captions: list[str]) -> Tensor:
    """Latents [n, C, F, h, w] of clips from number `first` on, in 16 bits, on the CPU."""
    model, parts = base.transformer, []
    shape = (model.config.in_channels, config.frames, config.height, config.width)
    for start in range(0, len(captions), config.batch):
        part = captions[start : start + config.batch]
        seeds = [generator(config.seed, "clip", first + start + i) for i in range(len(part))]
        noise = torch.stack([torch.randn(shape, generator=own) for own in seeds]).to(model.proj_out.weight)
        text, empty = base.prepare(part), base.prepare([""] * len(part))
        latent = sample_joint(model, text, empty, noise, steps=config.steps, scale=config.guidance, shift=config.shift)
        parts.append(latent.cpu())
    return torch.cat(parts).to(torch.bfloat16 if config.precision == "bf16" else torch.float16)


def run(config: SampleTeacherConfig, out: Path, accelerator: Accelerator, stop_at: int | None = None) -> None:
    """Write (or go on with) all shards; `stop_at` ends after so many shards, as a kill would."""
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
        write_shard(out, number, sample_clips(base, config, first, captions), captions)
        print(f"sample_teacher: shard {number + 1}/{shards}", flush=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        source = {"steps": config.steps, "guidance": config.guidance, "shift": config.shift, "seed": config.seed}
        write_index(out, shards, source)


def main() -> None:
    arguments = parse_arguments(__doc__, "runs/teacher_clips")
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, "sample_teacher", SampleTeacherConfig)
    run(config, arguments.out, Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[PATIENCE]))


if __name__ == "__main__":
    run_stage(main)
