"""Fine-tuning of a trained student, as stages consistency, rl and dmd do it: another loss on the same parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.data.shards import Shards
from distill.models.base import Base
from distill.models.sampling import shifted
from distill.models.student_file import AnyStudent, NextChunkConfig, StudentConfig, load_student
from distill.stages.next_chunk import StudentObjective, fit_student
from distill.training.draws import Draws
from distill.training.loop import accelerator_of
from engine.options import option


@dataclass(frozen=True)
class StartedConfig(StudentConfig):
    """What the tables of all these stages share."""

    student: str = option("runs/student/student.pt", "student file, or model directory with adapters/, to start from")
    data: str = option("runs/bank/clips", "folder of captioned latents")


@dataclass(frozen=True)
class TuningConfig(StartedConfig):
    """What those share that need only captions and latent size of the data, and a teacher's scores."""

    critic_every: int = option(2, "with a trained critic, steps per update of the student")
    guidance: float = option(2.0, "scale of the teacher's guidance")
    clamp: float = option(0.02, "distance of sigma' from 0 and 1")
    shift: float = option(2.0, "shift of sigma'")
    normalise: bool = option(True, "divide by the teacher's mean error on clean frames, as DMD does")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clamp < 0.5:
            raise ValueError(f"clamp: got {self.clamp}, expected 0 to 0.5")
        if self.critic_every < 1:
            raise ValueError(f"critic_every: got {self.critic_every}, expected at least 1")


class Tuning(StudentObjective):
    """A loss on a student's own rollouts, which teacher and critic score at noise levels sigma'."""

    config: TuningConfig
    made: NextChunkConfig  # of the student that the stage writes

    def captions(self, draws: Draws) -> list[str]:
        return self.data.captions(self.clips(draws, self.config.batch))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a latent."""
        return self.data.shape[2], self.data.shape[3]

    def sigmas(self, draws: Draws) -> Tensor:
        """sigma' [B], spread over [clamp, 1 - clamp]."""
        free = shifted(draws.uniform(), self.config.shift)
        return self.config.clamp + (1 - 2 * self.config.clamp) * free


C = TypeVar("C", bound=StartedConfig)


def fine_tune(
    objective_of: Callable[[C, NextChunkConfig, Base, AnyStudent, Shards], StudentObjective],
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
    return fit_student(objective, config, objective.made, out, accelerator, board, stop_at)
