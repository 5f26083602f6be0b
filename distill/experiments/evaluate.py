"""Generate clips from held-out prompts and score them exactly, in VBench's vocabulary; or score videos by their motion.

    python -m distill evaluate --model engine/assets/sprites --prompts 64 --seed 0 --frames 33 --json
    python -m distill evaluate --model runs/sprites --task sprites --frames 81 --thirds
    python -m distill evaluate --model Wan2.1-student --vbench VBench_full_info.json --out runs/vbench
    python -m distill evaluate --videos clips --out report.json
    python -m distill evaluate --videos before --videos after

The student streams through the engine's public API, one prompt after another, as in any user's program. --teacher runs
the bidirectional teacher through the stock diffusers WanPipeline, with classifier-free guidance. The last line is JSON:
semantic, quality, total, the shares of the clips that show every fact of their caption (all_right) and of those that
blink, and every dimension with its standard error. --vbench writes clips of VBench's own prompts; the vbench package
then scores them, where it and its weights are installed.

--videos scores any videos: those below a folder, or one. Temporal flickering, motion smoothness and dynamic degree
follow VBench's rules, with OpenCV's optical flow in place of its networks (extra `evaluate`; docs/evaluation.md). Two
folders are compared, clip by clip where names are equal. Videos that cannot be read or are too short are skipped and
named. A table is printed, or with --json a line with a row for each clip; --out writes the same to a file.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import engine
from distill.experiments.switches import switch_scores
from distill.experiments.videos import run_videos
from distill.models.sampling import contact_sheet
from distill.scores.pixels import from_uint8
from distill.scores.tasks import TASKS, Task, find_task
from distill.training.stage import Options, Stage
from engine.options import option
from engine.stream import Pipeline
from engine.weights.folders import check_index

PARTS = ("first", "middle", "last")
WITH_VIDEOS = ("videos", "out", "json", "threads", "debug")
HEADLINE = ("semantic", "quality", "total", "all_right", "blink")


@dataclass(frozen=True)
class EvaluateOptions(Options):
    model: Path = option(Path("engine/assets/sprites"), "pipeline directory", metavar="DIR")
    task: str = option("scenes", "task on which the model was trained", choices=sorted(TASKS))
    prompts: int = option(64, "number of clips")
    seed: int = option(0, "of the prompts and of the noise")
    frames: int = option(33, "pixel frames per clip")
    trained: bool = option(False, "prompts of the training side instead of held-out ones")
    switch: bool = option(False, "scenes: switch the prompt in mid-stream instead, one fact at a time and all at once")
    thirds: bool = option(False, "also the quality of each third of the clips")
    teacher: bool = option(False, "the teacher, through diffusers' WanPipeline")
    steps: int = option(20, "teacher: denoising steps")
    guidance: float = option(2.0, "teacher: guidance scale")
    decoder: Literal["full", "tiny"] = option("full", "student, tiny: the model's own tiny VAE decodes")
    preset: str = option("{}", "student: preset fields to replace, as JSON", metavar="JSON")
    sheet: Path | None = option(None, "write a contact sheet of the first 12 clips", metavar="FILE")
    vbench: Path | None = option(None, "VBench_full_info.json: run VBench itself instead", metavar="INFO")
    videos: tuple[Path, ...] = option((), "score these videos instead; given twice: compare them", metavar="DIR|FILE")
    out: Path | None = option(None, "VBench: folder of clips and results (runs/vbench); --videos: file", metavar="PATH")
    json: bool = option(False, "print only the line of JSON")

    def __post_init__(self) -> None:
        if len(self.videos) > 2:
            raise ValueError(f"videos: got {len(self.videos)} folders, expected one or two")
        if self.videos:
            others = [f.name for f in fields(self) if f.name not in WITH_VIDEOS and getattr(self, f.name) != f.default]
            if others:
                raise ValueError(f"videos: got --{others[0]} beside it, expected only --out, --json and --threads")
        if self.prompts < 1 or self.frames < 1:
            raise ValueError(f"got {self.prompts} prompts and {self.frames} frames, expected at least 1 of each")

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields of --preset."""
        try:
            fields = json.loads(self.preset)
        except json.JSONDecodeError:
            fields = None
        if not isinstance(fields, dict):
            raise ValueError(f"--preset: got {self.preset!r}, expected a JSON object")
        return fields


def student_of(options: EvaluateOptions) -> Pipeline:
    return engine.load(options.model, overrides=options.overrides, decoder=options.decoder, device="cpu")


def student_videos(pipeline: Pipeline, specs: list[Any], frames: int, seed: int) -> list[Tensor]:
    """One stream per prompt; clip i has seed `seed + i`."""
    videos = []
    for i, spec in enumerate(specs):
        with pipeline.stream(spec.caption, seed=seed + i, frames=frames) as stream:
            videos.append(from_uint8(np.stack(list(stream))))
    return videos


def teacher_videos(
    model: Path, specs: list[Any], frames: int, seed: int, steps: int, scale: float, batch: int = 16
) -> list[Tensor]:
    """Whole clips from the stock pipeline."""
    from diffusers import WanPipeline

    check_index(model)  # diffusers would take classes and modules that the index names
    pipeline = WanPipeline.from_pretrained(
        model, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generator, videos = torch.Generator().manual_seed(seed), []
    for i in range(0, len(specs), batch):
        made = pipeline(
            [spec.caption for spec in specs[i : i + batch]],
            height=32,
            width=32,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=scale,
            max_sequence_length=pipeline.tokenizer.model_max_length,
            output_type="pt",
            generator=generator,
        ).frames
        videos += (made.float().transpose(1, 2) * 2 - 1).unbind(0)
    return videos


def thirds(task: Task, videos: list[Tensor], specs: list[Any]) -> dict[str, dict[str, float]]:
    """Quality of each third of the clips, and of the last against the first."""
    length = videos[0].shape[1] // 3
    if length < 13:
        raise ValueError(f"thirds: got {videos[0].shape[1]} frames, expected at least 39")
    result = {}
    for number, name in enumerate(PARTS):
        parts = [video[:, number * length : (number + 1) * length] for video in videos]
        result[name] = task.score(parts, specs, begins=number == 0)["quality"]
    ratio = result["last"]["mean"] / max(result["first"]["mean"], 1e-9)
    return {**result, "last_to_first": {"mean": round(ratio, 4)}}


def vbench_prompts(info: Path) -> list[str]:
    """Every prompt of VBench's list, once."""
    if not info.is_file():
        raise FileNotFoundError(f"vbench: got {info}, expected VBench_full_info.json")
    return list(dict.fromkeys(entry["prompt_en"] for entry in json.loads(info.read_text(encoding="utf-8"))))


def run_vbench(model: Path, info: Path, out: Path, count: int, seed: int, frames: int) -> None:
    """Write out/videos/PROMPT-i.mp4 for `count` prompts, five samples each as VBench wants; VBench scores them."""
    try:
        from vbench import VBench
    except ImportError:
        raise ValueError("vbench: got no such package, expected `pip install vbench` and its weights") from None
    from engine.files import whole_file
    from engine.media.sinks import open_sink

    pipeline, folder = engine.load(model), out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(vbench_prompts(info)[:count]):
        for sample in range(5):
            path = folder / f"{prompt}-{sample}.mp4"
            if path.is_file():
                continue
            with (
                whole_file(path) as part,  # a clip that is there counts as made: half of one must not be
                pipeline.stream(prompt, seed=seed + 5 * number + sample, frames=frames) as stream,
                open_sink(part, pipeline.fps, (pipeline.height, pipeline.width)) as sink,
            ):
                for frame in stream:
                    sink.write(frame)
    judge = VBench("cuda" if torch.cuda.is_available() else "cpu", str(info), str(out / "results"))
    judge.evaluate(videos_path=str(folder), name=model.name)


def run_switches(options: EvaluateOptions) -> None:
    """Score streams whose prompt is switched, and print a table and a line of JSON."""
    found = switch_scores(student_of(options), options.prompts, options.seed, hidden=not options.trained)
    if not options.json:
        print(f"{'switch of':>12}  " + "".join(f"{name:>17}" for name in next(iter(found.values()))))
        for name, scores in found.items():
            print(f"{name:>12}  " + "".join(f"{s['mean']:>9.3f} +- {s['se']:.3f}" for s in scores.values()))
    print(json.dumps({"prompts": options.prompts, "seed": options.seed, "held_out": not options.trained,
                      "preset": options.overrides, "switches": found}))  # fmt: skip


def run(options: EvaluateOptions) -> None:
    """Make the clips, score them, and print a table and a line of JSON."""
    if options.videos:
        return run_videos(options.videos, options.out, options.json, options.threads)
    if options.vbench:
        out = options.out or Path("runs/vbench")
        return run_vbench(options.model, options.vbench, out, options.prompts, options.seed, options.frames)
    if options.switch:
        return run_switches(options)
    overrides, task = options.overrides, find_task(options.task)
    specs = task.draw(options.prompts, options.seed, hidden=not options.trained)
    if options.teacher:
        steps, guidance = options.steps, options.guidance
        videos = teacher_videos(options.model, specs, options.frames, options.seed, steps, guidance)
    else:
        videos = student_videos(student_of(options), specs, options.frames, options.seed)
    if options.sheet:
        contact_sheet(videos[:12], options.sheet)
    found = task.score(videos, specs)
    if not options.json:
        for name, value in found.items():
            print(f"{name:>24} {value['mean']:.3f} +- {value['se']:.3f}  (n = {value['n']})")
    result: dict[str, Any] = {
        "model": "teacher" if options.teacher else "student",
        "task": task.name,
        "prompts": options.prompts,
        "frames": options.frames,
        "seed": options.seed,
        "held_out": not options.trained,
        "preset": overrides,
        "decoder": options.decoder,
        **{name: found[name]["mean"] for name in HEADLINE},
        "dimensions": found,
    }
    if options.thirds:
        result["thirds"] = thirds(task, videos, specs)
    print(json.dumps(result))


STAGE = Stage(EvaluateOptions, run)
