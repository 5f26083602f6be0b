"""Fine-tuning of a trained student, as stages rl and dmd do it: another loss on the same parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.data.shards import Shards
from distill.models.base import Base
from distill.stages.next_chunk import AnyStudent, NextChunkConfig, load_student, save_student
from distill.training.loop import FitConfig, Objective, accelerator_of, fit
from engine.options import option


@dataclass(frozen=True)
class TuningConfig(FitConfig):
    """What the tables of these stages share."""

    student: str = option("runs/student/student.pt", "student file, or model directory with adapters/, to start from")
    data: str = option("runs/bank/clips", "folder of captioned latents; only captions and latent size are read")


C = TypeVar("C", bound=TuningConfig)


def fine_tune(
    objective_of: Callable[[C, NextChunkConfig, Base, AnyStudent, Shards], Objective],
    config: C,
    out: Path,
    board: Path | None = None,
    stop_at: int | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Tensor]:
    """Fine-tune, or resume. Returns the averaged parameters; a complete run also writes them to out/student.pt."""
    accelerator = accelerator or accelerator_of(config)
    torch.manual_seed(config.seed)
    student, made, base = load_student(Path(config.student), None, accelerator.device, config.dtype)
    objective = objective_of(config, made, base, student, Shards(Path(config.data)))
    trained = fit(objective, config, out, accelerator, board, stop_at)
    if accelerator.is_main_process and (stop_at is None or stop_at >= config.steps):
        save_student(out / "student.pt", trained, made)
    return trained
