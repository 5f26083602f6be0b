"""A student on disk and its config: what the stages that train students share.

A student file holds the trained tensors and the config that made them. A directory that `assemble` wrote holds them as
adapters/, and the preset in engine.json.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.models.base import Base
from distill.models.causal import CausalStudent
from distill.models.rollout import chunks_in
from distill.models.student import Student
from distill.training.loop import FitConfig
from distill.training.state import save_state
from engine.config import Preset
from engine.files import read_json
from engine.generators import family_of
from engine.loader import settings_of
from engine.model.transformer import WanTransformer
from engine.options import option
from engine.presets import PRESETS, find_preset
from engine.weights.adapters import check_base
from engine.weights.finding import part_files

AnyStudent = Student | CausalStudent
# Fields of the engine's preset for what later chunks see of a finished one: its clean frames, these noised to level .1
# (the engine is told that level, and adds no noise), or the input of its last denoising step.
CONTEXTS = {
    "clean": {"commit": "clean", "context_timestep": 0.0},
    "noised": {"commit": "clean", "context_timestep": 100.0},
    "last": {"commit": "noisy", "context_timestep": 0.0},
}
EVEN = ("self-forcing-framewise", "self-forcing")  # presets of the causal family without timesteps of their own


@dataclass(frozen=True)
class StudentConfig(FitConfig):
    """What the stages that train a student share."""

    fp8: bool = option(False, "round the student's large products to e4m3, as its FP8 stream will")


@dataclass(frozen=True)
class NextChunkConfig(StudentConfig):
    """The table [next_chunk]. A student file holds these keys: renaming one makes older files unreadable."""

    teacher: str = option("runs/teacher/teacher", "pipeline directory of the teacher")
    start: str = option("", "student.pt to start from; empty: begin as the teacher")
    data: str = option("runs/bank/clips", "folder of captioned latents")
    pairs: str = option("", "folder of inputs and targets, pairs of clips, to train video-to-video on; empty: not")
    pair_share: float = option(0.5, "share of the steps that train on pairs, if there are any")
    family: str = option("greedy", "greedy; causal: one causal transformer, as in the Self-Forcing family")
    rank: int = option(64, "of the LoRA adapters")
    etm: bool = option(True, "false: a causal decoder that sees only chunk 0 and the last chunk")
    window: int = option(3, "greedy: frames before the current one that the ETM sees (w of Eq. 1); causal: with it")
    chunk: int = option(1, "causal: latent frames per chunk; clips are whole chunks")
    attn_sink: int = option(0, "causal: first latent frames that stay in the window for good")
    schedule: str = option("", "causal: engine preset whose timesteps the student takes; empty: sampling_steps, evenly")
    context: str = option("clean", "causal: what later chunks see of a finished one; stage dmd sets it")
    max_position: int = option(4, "largest temporal position of the SDD; longer clips cover the frames beyond it")
    frames: int = option(9, "latent frames per clip")
    target: str = option("data", "data: flow matching; ode, causal: the ends of the teacher's trajectories in the data")
    first_batch: int = option(16, "first frames per step: a multiple of batch")
    first: str = option("guided", "target of frame 0: guided or data")
    guidance: float = option(2.0, "scale of the teacher's guidance for frame 0")
    substeps: int = option(4, "teacher steps within one sampling step")
    sampling_steps: int = option(4, "denoising steps per frame of the student")
    unified: tuple[int, ...] = option((), "other numbers of denoising steps to train for; every loss draws one of all")
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
        for name, count in (("sampling_steps", self.sampling_steps), *(("unified", count) for count in self.unified)):
            if count < 1 or 1000 % count:
                raise ValueError(f"{name}: got {count}, expected a divisor of 1000")
        if self.unified and (self.schedule or self.target == "ode"):
            raise ValueError(f"unified: got {list(self.unified)}, expected none with a schedule or target 'ode'")
        self._check_causal()
        if not 0 <= self.pair_share <= 1 or (self.pairs and self.target == "ode"):
            got = f"{self.pair_share} of target {self.target!r}"
            raise ValueError(f"pair_share: got {got}, expected 0 to 1, and no pairs for 'ode'")
        if self.first_batch % self.batch:
            raise ValueError(f"first_batch: got {self.first_batch}, expected a multiple of batch ({self.batch})")

    def _check_causal(self) -> None:
        """ValueError for fields that the family does not have, or that do not fit each other."""
        if self.target not in ("data", "ode"):
            raise ValueError(f"target: got {self.target!r}, expected 'data' or 'ode'")
        if self.context not in CONTEXTS:
            raise ValueError(f"context: got {self.context!r}, expected one of {', '.join(CONTEXTS)}")
        if self.family == "greedy":
            for name, only in (
                ("chunk", 1),
                ("attn_sink", 0),
                ("schedule", ""),
                ("context", "clean"),
                ("target", "data"),
            ):
                if getattr(self, name) != only:
                    raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {only!r} for family 'greedy'")
            return
        causal = [name for name, preset in PRESETS.items() if preset.family == "causal"]
        if self.schedule and self.schedule not in causal:
            raise ValueError(f"schedule: got {self.schedule!r}, expected one of {', '.join(causal)}")
        chunks_in(self.frames, self.preset)

    def preset_fields(self) -> dict[str, Any]:
        """The fields of the engine's preset with which the student is trained."""
        # The engine's window has the current frame in it; w of Eq. 1 leaves it out.
        window = self.window + (self.family == "greedy")
        shared = {
            "steps": list(range(1000, 0, -1000 // self.sampling_steps)),
            "warped": True,
            "shift": self.sampling_shift,
            "solver": self.solver,
            "chunk": self.chunk,
            "window": window,
        }
        if self.family == "greedy":
            return shared | {"max_position": self.max_position}
        if self.schedule:
            named = PRESETS[self.schedule]
            shared |= {"steps": [list(row) for row in named.steps], "warped": named.warped}
        return shared | {"attn_sink": self.attn_sink} | CONTEXTS[self.context]

    @property
    def preset_name(self) -> str:
        return "greedy" if self.family == "greedy" else self.schedule or EVEN[self.chunk > 1]

    @property
    def preset(self) -> Preset:
        return find_preset(self.preset_name, self.preset_fields())

    def student(self, base: Base) -> AnyStudent:
        """A fresh student of this shape, on the device of its teacher."""
        return self.student_of(base.transformer).to(base.device)

    def student_of(self, teacher: WanTransformer) -> AnyStudent:
        """A fresh student of this shape."""
        if self.family == "causal":
            shape = self.rank, self.window, self.chunk, self.attn_sink
            return CausalStudent(teacher, *shape, recompute=self.recompute)
        return Student(teacher, self.rank, self.window, self.max_position, etm=self.etm, recompute=self.recompute)


def read_student(path: Path) -> tuple[dict[str, Tensor], NextChunkConfig]:
    """The trained tensors of a student file, or of a directory that assemble wrote, and the config that made it."""
    if any((path / "adapters" / role).is_dir() for role in ("sdd", "dit")):
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
    preset = find_preset(settings.preset, settings.overrides)
    base_files = list(part_files(folder / "transformer", "transformer").files)
    roles = family_of(preset).roles()
    made = read_json(folder / "adapters" / roles[-1] / "adapter_config.json")
    if made.get("lora_alpha") != made["r"]:
        raise ValueError(f"student: got lora_alpha {made.get('lora_alpha')}, expected the rank ({made['r']})")
    for role in roles:
        check_base(folder / "adapters" / role, base_files)
        for key, value in load_file(folder / "adapters" / role / "adapter_model.safetensors").items():
            module = key.removeprefix("base_model.model.").removesuffix(".weight")
            trained[f"{role}.{module}.default.weight"] = value.float()
    shared: dict[str, Any] = {
        "teacher": str(folder), "rank": made["r"], "sampling_shift": preset.shift, "solver": preset.solver
    }  # fmt: skip
    if preset.family == "greedy":
        condition = load_file(folder / "adapters" / "sdd" / "condition.safetensors")
        trained["sdd.condition_proj.weight"] = condition["condition_proj.weight"].float()
        config = NextChunkConfig(
            window=preset.window - 1, max_position=preset.max_position, sampling_steps=len(preset.steps[-1]), **shared
        )
    else:
        committed = {"commit": preset.commit, "context_timestep": preset.context_timestep}
        context = next((name for name, fields in CONTEXTS.items() if fields == committed), "clean")
        taken = {"sampling_steps": len(preset.steps[-1])} if settings.preset in EVEN else {"schedule": settings.preset}
        config = NextChunkConfig(
            family="causal", window=preset.window, chunk=preset.chunk, attn_sink=preset.attn_sink, context=context,
            frames=max(NextChunkConfig.frames // preset.chunk, 1) * preset.chunk, **taken, **shared,
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
    for name in ("teacher", "family", "rank", "etm", "window", "chunk", "attn_sink", "max_position"):
        if getattr(made, name) != getattr(config, name):
            got, expected = getattr(made, name), getattr(config, name)
            raise ValueError(f"start: got {path} with {name} = {got!r}, expected {expected!r}")
    student.load_trained(trained)


def save_student(path: Path, trained: dict[str, Tensor], config: NextChunkConfig) -> None:
    """Write a student file: its trained tensors and the config that made it."""
    save_state(path, {"student": {name: t.cpu() for name, t in trained.items()}, "config": asdict(config)})
