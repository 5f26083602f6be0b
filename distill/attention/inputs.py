"""What every probe runs on: its options, the student, and the clips."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import engine
from distill.attention.subjects import Clips
from distill.data.shards import Shards
from distill.data.sprites import SIZE
from distill.experiments.following import expect_whole_chunks
from distill.scores.tasks import TASKS, find_task
from distill.training.stage import Options
from engine.model.vae import frames_to_uint8
from engine.options import option
from engine.stream import Pipeline


@dataclass(frozen=True)
class ProbeOptions(Options):
    model: Path | None = option(
        None, "pipeline directory of teacher and student; default: the embedded model", metavar="DIR"
    )
    checkpoint: Path | None = option(None, "weights of the student instead of the directory's", metavar="FILE")
    preset: str | None = option(None, "how the student streams; default: the model's own", metavar="NAME")
    data: Path | None = option(None, "latents of dataset or sample_teacher; default: drawn clips", metavar="DIR")
    task: str = option("scenes", "kind of the drawn clips", choices=sorted(TASKS))
    prompts: int = option(8, "number of clips")
    frames: int = option(33, "pixel frames of each")
    seed: int = option(0, "of the drawn clips and of the noise")
    queries: int = option(64, "queries that are drawn from every latent frame; so many or fewer tokens: exact")
    device: str = option("cpu", "cpu, cuda, auto")
    score: int = option(0, "also make and score clips of so many of the drawn clips' captions")

    def __post_init__(self) -> None:
        self.expect_least("prompts", "queries", least=1)
        self.expect_least("score", least=0)
        if self.score > self.prompts:
            raise ValueError(f"--score: got {self.score}, expected at most the number of --prompts ({self.prompts})")
        if self.score and self.data is not None:
            raise ValueError("--score: got --data, expected drawn clips: only of these the scorer knows what they show")

    def expect_least(self, *names: str, least: int) -> None:
        """ValueError for a field that is smaller."""
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected at least {least}")


def load(options: ProbeOptions, overrides: dict[str, Any] | None = None) -> Pipeline:
    """The student, in plain PyTorch: its attention goes through the watch. With overrides it is another one."""
    pipeline = engine.load(
        options.model, preset=options.preset, overrides=overrides, checkpoint=options.checkpoint,
        device=options.device, eager=True, join_context="off",
    )  # fmt: skip
    expect_whole_chunks(pipeline, options.frames)
    if overrides is None and (pipeline.preset.local_heads is not None or pipeline.preset.reuse is not None):
        raise ValueError("attention: got a student with local heads or reuse, expected one whose heads see the window "
                         "at every step (--preset FILE.toml with heads = \"none\", reuse = \"none\")")  # fmt: skip
    return pipeline


def clips_of(options: ProbeOptions, pipeline: Pipeline) -> tuple[Clips, list[Any]]:
    """The clips to run on, and what they show where they are drawn."""
    frames = (options.frames - 1) // pipeline.temporal + 1
    size = pipeline.config.in_channels, pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial
    if options.data is not None:
        data = Shards(options.data)
        channels, held, *sides = data.shape
        if (channels, *sides) != size or held < frames or len(data) < options.prompts:
            raise ValueError(
                f"--data: got {len(data)} clips of {[channels, held, *sides]}, expected at least {options.prompts} of "
                f"{[size[0], frames, *size[1:]]}"
            )
        latents, captions = data.read(range(options.prompts), frames)
        return Clips(captions, latents, options.seed), []
    if (pipeline.height, pipeline.width) != (SIZE, SIZE):
        got = f"a model of {pipeline.height} x {pipeline.width} pixels"
        raise ValueError(f"--data: got none for {got}, expected captioned latents: drawn clips have {SIZE} x {SIZE}")
    task = find_task(options.task)
    specs = task.draw(options.prompts, options.seed, hidden=True)
    videos = frames_to_uint8(task.render(specs, options.frames)[0]).numpy()
    latents = torch.cat([pipeline.encode_clip(video).float().cpu() for video in videos])
    return Clips([spec.caption for spec in specs], latents, options.seed), specs
