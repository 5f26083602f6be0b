"""What an ablation measures on a student: clips of held-out prompts and their scores, and the loss of Eq. 6."""

import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill.data.scenes import Scene, seen
from distill.experiments.arms import Plan
from distill.experiments.pairs import clips_name
from distill.models.base import Base
from distill.models.codec import Codec
from distill.models.pretrained import pretrained
from distill.models.rollout import roll_out
from distill.models.sampling import noised
from distill.models.student_file import AnyStudent, load_student
from distill.scores.dimensions import with_totals
from distill.scores.tasks import find_task
from distill.stages.next_chunk import draw_sigmas
from distill.training.draws import Draws
from engine.config import Preset
from engine.presets import override

BATCH = 16  # clips streamed at once


class Measure:
    """The same prompts and noise for every student."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config = plan, plan.config
        self.task = find_task(self.config.task)
        self.codec = Codec(pretrained(AutoencoderKLWan, self.config.vae))
        self.specs = self.task.draw(self.config.lengths[0][1], self.config.prompt_seed, hidden=True)
        self.base = Base(Path(plan.made.teacher), plan.made.dtype)

    @torch.no_grad()
    def scores(self, arm: str, seed: int, steps: str, path: Path) -> dict[str, Any]:
        """Scores of every clip that the student at `path` streams as the arm does with these steps."""
        student, made, _ = load_student(path, self.base)
        rows, reuse = self.plan.samplings[steps], self.plan.reuse.get(steps)
        asked = ({"steps": rows} if rows else {}) | ({"reuse": reuse} if reuse else {})
        preset = override(made.preset, asked)
        guidance, lengths = self.plan.arms[arm].guidance, self.config.lengths
        videos = self._videos(student, preset, guidance)
        clips = {}
        for frames, prompts in lengths:
            parts = [video[:, : 4 * frames - 3] for video in videos[:prompts]]
            clips[clips_name(frames)] = by_score(self._rows(parts))
        if self.config.given and steps == self.plan.steps(arm)[0]:
            frames, prompts = lengths[0]
            parts = self._stream(student, preset, guidance, frames, 0, prompts, continued=True)
            clips["given"] = by_score(self._rows(parts))
        return {
            "arm": arm,
            "steps": steps,
            "seed": seed,
            "trained": sum(p.numel() for p in student.trained().values()),
            "passes": passes(preset, self.base.transformer.config.num_layers) * (1 + (guidance != 1)),
            "clips": clips,
            "windows": self._windows(videos[: lengths[-1][1]]),
        }

    def _videos(self, student: AnyStudent, preset: Preset, guidance: float) -> list[Tensor]:
        """A clip of every prompt, as long as the longest set that it is in: shorter ones are its beginning."""
        videos, first = list[Tensor](), 0
        for frames, prompts in reversed(self.config.lengths):
            videos += self._stream(student, preset, guidance, frames, first, prompts)
            first = prompts
        return videos

    def _stream(
        self, student: AnyStudent, preset: Preset, guidance: float, frames: int, first: int, end: int,
        *, continued: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        """Clips of prompts first .. end - 1; they continue `given` drawn latent frames if `continued`."""
        videos = []
        for begin in range(first, end, BATCH):
            specs = self.specs[begin : min(begin + BATCH, end)]
            emb, start = self.base.encode([spec.caption for spec in specs]), None
            seeds = [seed for i in range(len(specs)) for seed in Draws(self.config.prompt_seed, begin + i, [0]).seeds()]
            if continued:
                start = self.codec.encode(self.task.render(specs, 4 * self.config.given - 3)[0])
            if guidance == 1:
                latent = roll_out(student, emb, frames, seeds, preset, start=start)
            else:
                both = torch.cat([emb, self.base.encode([""] * len(specs))])
                twice = None if start is None else start.repeat(2, 1, 1, 1, 1)
                with student.guided(guidance):
                    latent = roll_out(student, both, frames, seeds * 2, preset, start=twice)[: len(specs)]
            videos += [self.codec.decode(clip[None])[0] for clip in latent]
        return videos

    def _rows(self, videos: list[Tensor], begins: bool = True) -> list[dict[str, float]]:
        """The scores of every clip of the first prompts."""
        clips = zip(videos, self.specs, strict=False)
        return [with_totals(self.task.dimensions(video, spec, begins=begins)) for video, spec in clips]

    def _windows(self, videos: list[Tensor]) -> list[dict[str, float]]:
        """Mean quality and total of successive windows of the clips."""
        length, found = self.config.window, []
        for first in range(0, videos[0].shape[1] - length + 1, length):
            rows = self._rows([video[:, first : first + length] for video in videos], begins=first == 0)
            found.append({"from": first} | {name: mean(row[name] for row in rows) for name in ("quality", "total")})
        return found

    @torch.no_grad()
    def loss(self, path: Path) -> dict[str, float]:
        """Eq. 6 on drawn held-out clips, with the same noise for every student.

        Clips are few and scores coarse; the loss pairs the arms frame by frame. `reappearing` averages the frames that
        show a mover whose last latent frame was hidden: the text and two frames do not tell its place.
        """
        student, made, _ = load_student(path, self.base)
        frames, chunk = self.config.lengths[0][0], made.preset.chunk
        errors, again = [], []
        for start in range(0, len(self.specs), BATCH):
            specs = self.specs[start : start + BATCH]
            clean = self.codec.encode(self.task.render(specs, 4 * frames - 3)[0])
            draws = Draws(self.config.prompt_seed, start, list(range(len(specs))))
            sigma, noise = draw_sigmas((frames,), self.plan.made, draws), draws.normal(*clean.shape[1:])
            sigma = sigma[:, ::chunk].repeat_interleave(chunk, 1)
            text = student.stages.prepare_text(self.base.encode([spec.caption for spec in specs]))
            flow = student.flow(clean[:, :, :-chunk], noised(clean, noise, sigma), sigma, text)
            errors.append((flow - (noise - clean)).square().mean((1, 3, 4))[:, 1:])
            if isinstance(specs[0], Scene):
                shown = torch.stack([seen(spec, 4 * frames - 3)[::4] for spec in specs])
                again.append(shown[:, 1:] & ~shown[:, :-1])
        error = torch.cat(errors)
        result = {"all": float(error.mean())}
        if again and bool(torch.cat(again).any()):
            result["reappearing"] = float(error[torch.cat(again)].mean())
        return result


def by_score(rows: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """The scores of clips as a list per score; None where it does not apply."""
    return {name: [None if math.isnan(row[name]) else round(row[name], 5) for row in rows] for name in rows[0]}


def passes(preset: Preset, layers: int) -> float:
    """Transformer passes per latent frame, once a video runs: denoising steps, and those that read a finished chunk.

    A step that runs some of the `layers` blocks is that part of a pass.
    """
    context = 2 if preset.family == "greedy" else int(preset.commit == "clean")
    reuse = preset.reuse
    saved = 0.0 if reuse is None else len(reuse.steps) * (1 - (reuse.first + reuse.last) / layers)
    return (len(preset.steps[-1]) - saved + context) / preset.chunk
