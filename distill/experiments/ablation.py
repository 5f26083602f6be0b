"""The ablation (Table 3 of the paper), long videos (Fig. 6) and quality against steps, on the embedded scale.

    make ablation                     (python -m distill ablation --config distill/configs/ablation.toml)

Trains every arm with every seed, on the same data and for the same steps. Scores all arms on the same held-out prompts
and noise. Writes tables and plots to --results. A run skips all that --out already holds and resumes a stopped
training, so that it can end and start again at any time.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill.data.scenes import Scene, seen
from distill.experiments.tables import AblationConfig, write_report
from distill.models.base import Base
from distill.models.codec import Codec
from distill.models.pretrained import pretrained
from distill.models.rollout import roll_out
from distill.models.sampling import noised
from distill.scores.tasks import find_task
from distill.stages import next_chunk, rl
from distill.stages.next_chunk import AnyStudent, NextChunkConfig, draw_sigmas, load_student
from distill.stages.rl import RlConfig
from distill.training.draws import Draws
from distill.training.stage import Stage, TableOptions
from engine.config import Preset
from engine.files import whole_file, write_json
from engine.options import option, read_table
from engine.presets import find_preset

# RL arm -> the arm that it starts from
PARENTS = {"etm-rl": "etm", "etm-rl-critic": "etm", "no-etm-rl": "no-etm", "causal-rl": "causal"}
CRITICS = ("etm-rl-critic", "causal-rl")


@dataclass(frozen=True)
class AblationOptions(TableOptions):
    config: Path = option(
        Path("distill/configs/ablation.toml"), "TOML file, also of [next_chunk], [rl]", metavar="FILE"
    )
    out: Path = option(Path("runs/ablation"), "folder of students and scores")
    results: Path = option(Path("docs/results"), "folder of tables and plots")
    report: bool = option(False, "train nothing; report the scores that --out holds")


class Runner:
    """Trains and scores arms under one folder."""

    def __init__(self, config: AblationConfig, made: NextChunkConfig, tuned: RlConfig, out: Path) -> None:
        self.config, self.made, self.tuned, self.out = config, made, tuned, out
        self.task = find_task(config.task)
        self.codec = Codec(pretrained(AutoencoderKLWan, config.vae))
        self.specs = self.task.draw(config.prompts, config.prompt_seed, hidden=True)
        self.base = Base(Path(made.teacher), made.dtype)
        self._same_settings()

    def _same_settings(self) -> None:
        """Refuse a folder whose students were made with other settings: they do not belong in one table."""
        free = ("arms", "seeds", "steps")
        settings = {
            "ablation": {k: v for k, v in asdict(self.config).items() if k not in free},
            "next_chunk": asdict(self.made),
            "rl": asdict(self.tuned),
        }
        text, path = json.dumps(settings, indent=1), self.out / "settings.json"
        if path.is_file() and path.read_text() != text:
            raise ValueError(f"{path}: got other settings than today's, expected the same (or another --out)")
        with whole_file(path) as part:
            part.write_text(text)

    @torch.enable_grad()  # a measurement without gradients trains a missing student first
    def train(self, arm: str, seed: int) -> Path:
        """The student file of an arm and seed; trains a missing one."""
        config = self.config
        folder = self.out / f"{arm}-{seed}"
        path = folder / "student.pt"
        if arm == "etm-cfg":
            return self.train("etm", seed)
        if path.is_file():
            return path
        if arm in PARENTS:
            start = self.train(PARENTS[arm], seed)
            critic = "trained" if arm in CRITICS else "self"
            tuned = replace(self.tuned, student=str(start), steps=config.rl_steps, seed=seed, critic=critic)
            rl.train(tuned, folder)
            return path
        made = replace(self.made, seed=seed, steps=config.next_chunk_steps)
        if arm == "etm-longer":
            # Another seed, so that it does not repeat the draws of its parent's first steps.
            made = replace(made, start=str(self.train("etm", seed)), steps=config.longer_steps, seed=seed + 1000)
        elif arm == "no-etm":
            made = replace(made, etm=False, rank=2 * made.rank)
        elif arm == "causal":
            made = replace(made, family="causal", rank=2 * made.rank, window=config.causal_window)
        next_chunk.train(made, folder)
        return path

    @torch.no_grad()
    def videos(
        self, student: AnyStudent, preset: Preset, prompts: int, frames: int, guidance: float = 1.0, supplied: int = 0
    ) -> list[Tensor]:
        """Clips of the first prompts, always from the same noise; they continue `supplied` drawn latent frames."""
        made = []
        for start in range(0, prompts, 16):
            specs = self.specs[start : min(start + 16, prompts)]
            seeds = Draws(self.config.prompt_seed, start, list(range(len(specs)))).seeds()
            emb = self.base.encode([spec.caption for spec in specs])
            start_from = self.codec.encode(self.task.render(specs, 4 * supplied - 3)[0]) if supplied else None
            if guidance != 1:
                empty = self.base.encode([""] * len(specs))
                with student.guided(guidance):
                    both = None if start_from is None else start_from.repeat(2, 1, 1, 1, 1)
                    latent = roll_out(student, torch.cat([emb, empty]), frames, seeds * 2, preset, start=both)[
                        : len(specs)
                    ]
            else:
                latent = roll_out(student, emb, frames, seeds, preset, start=start_from)
            made += [self.codec.decode(clip[None])[0] for clip in latent]
        return made

    def result(self, arm: str, seed: int) -> dict[str, Any]:
        """Scores of an arm and seed; measures missing ones."""
        path = self.out / f"{arm}-{seed}" / "result.json"
        if path.is_file():
            return json.loads(path.read_text())
        begun = time.monotonic()
        student, made, _ = load_student(self.train(arm, seed), self.base)
        minutes = (time.monotonic() - begun) / 60
        config = self.config
        guidance = config.guidance if arm == "etm-cfg" else 1.0
        videos = self.videos(student, made.preset, config.prompts, config.frames, guidance)
        result: dict[str, Any] = {
            "arm": arm,
            "seed": seed,
            "trained": sum(p.numel() for p in student.trained().values()),
            "minutes": round(minutes, 1),
            "scores": self.task.score(videos, self.specs),
        }
        result["blinking"] = result["scores"]["blink"]["mean"]  # a fact that no caption states
        if config.given:
            videos = self.videos(student, made.preset, config.prompts, config.frames, guidance, config.given)
            result["given"] = self.task.score(videos, self.specs)
        if config.long_frames:
            long = self.videos(student, made.preset, config.long_prompts, config.long_frames, guidance)
            result["long"] = self.over_time(long)
        write_json(path, result)
        return result

    @torch.no_grad()
    def loss(self, arm: str, seed: int) -> dict[str, float]:
        """Eq. 6 on drawn held-out clips, with the same noise for every arm; measures a missing one.

        Clips are few and scores coarse; the loss pairs the arms frame by frame. `reappearing` averages the frames that
        show a mover whose last latent frame was hidden: the text and two frames do not tell its place.
        """
        path = self.out / f"{arm}-{seed}" / "loss.json"
        if path.is_file():
            return json.loads(path.read_text())
        student, made, _ = load_student(self.train(arm, seed), self.base)
        errors, again = [], []
        for start in range(0, len(self.specs), 16):
            specs = self.specs[start : start + 16]
            clean = self.codec.encode(self.task.render(specs, 4 * self.config.frames - 3)[0])
            draws = Draws(self.config.prompt_seed, start, list(range(len(specs))))
            sigma, noise = draw_sigmas((clean.shape[2],), made, draws), draws.normal(*clean.shape[1:])
            text = student.stages.prepare_text(self.base.encode([spec.caption for spec in specs]))
            flow = student.flow(clean[:, :, :-1], noised(clean, noise, sigma), sigma, text)
            errors.append((flow - (noise - clean)).square().mean((1, 3, 4))[:, 1:])
            if isinstance(specs[0], Scene):
                shown = torch.stack([seen(spec, 4 * self.config.frames - 3)[::4] for spec in specs])
                again.append(shown[:, 1:] & ~shown[:, :-1])
        error = torch.cat(errors)
        result = {"all": float(error.mean())}
        if again and bool(torch.cat(again).any()):
            result["reappearing"] = float(error[torch.cat(again)].mean())
        write_json(path, result)
        return result

    def over_time(self, videos: list[Tensor]) -> list[dict[str, float]]:
        """Quality and semantic scores of successive windows of long clips."""
        length = self.config.window
        specs = self.specs[: len(videos)]
        rows = []
        for start in range(0, videos[0].shape[1] - length + 1, length):
            found = self.task.score([v[:, start : start + length] for v in videos], specs, begins=start == 0)
            row = {"from": float(start)}
            for name in ("quality", "object_class", "color", "multiple_objects", "imaging_quality"):
                row[name] = found[name]["mean"] if name in found else math.nan
            rows.append(row)
        return rows

    def trade_off(self, arm: str, seed: int) -> list[dict[str, float]]:
        """Scores and relative cost of one student with other numbers of denoising steps."""
        path = self.out / "trade_off.json"
        if path.is_file():
            return json.loads(path.read_text())
        student, made, _ = load_student(self.train(arm, seed), self.base)
        rows = []
        for count in self.config.steps:
            fields = made.preset_fields() | {"steps": list(range(1000, 0, -(1000 // count)))[:count]}
            videos = self.videos(student, find_preset("greedy", fields), self.config.prompts, self.config.frames)
            found = self.task.score(videos, self.specs)
            names = ("semantic", "quality", "total")
            rows.append({"steps": count, "cost": (2 + count) / 6} | {n: found[n]["mean"] for n in names}
                        | {f"{n}_se": found[n]["se"] for n in names})  # fmt: skip
        write_json(path, rows)
        return rows


def saved_results(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """The results and the trade-off that a folder holds."""
    found = sorted(out.glob("*/result.json"))
    if not found:
        raise FileNotFoundError(f"results: got none in {out}, expected */result.json")
    results = []
    for path in found:
        loss = path.with_name("loss.json")
        more = {"loss": json.loads(loss.read_text())} if loss.is_file() else {}
        results.append(json.loads(path.read_text()) | more)
    trade = out / "trade_off.json"
    return results, json.loads(trade.read_text()) if trade.is_file() else []


def run(config: AblationConfig, options: AblationOptions) -> None:
    """Train, score and report every arm and seed; with --report only report."""
    if options.report:
        return write_report(config, *saved_results(options.out), options.results)
    made = read_table(NextChunkConfig, options.config, "next_chunk")
    runner = Runner(config, made, read_table(RlConfig, options.config, "rl"), options.out)
    results = []
    for seed in config.seeds:
        for arm in config.arms:
            results.append(runner.result(arm, seed) | {"loss": runner.loss(arm, seed)})
            print(json.dumps({"arm": arm, "seed": seed, "total": results[-1]["scores"]["total"]}), flush=True)
            write_report(config, results, [], options.results)
    write_report(config, results, runner.trade_off("etm", config.seeds[0]), options.results)


STAGE = Stage(AblationOptions, run, AblationConfig, "ablation")
