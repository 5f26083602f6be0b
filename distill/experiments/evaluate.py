"""Generate clips from held-out prompts and score them exactly, in VBench's vocabulary.

    python -m distill.evaluate --model engine/assets/sprites --prompts 64 --seed 0 --frames 33 --json
    python -m distill.evaluate --model runs/sprites --task sprites --frames 81 --thirds
    python -m distill.evaluate --model Wan2.1-student --vbench VBench_full_info.json --out runs/vbench

The student streams through the engine's public API, one prompt after another, as any user's would; --teacher runs
the bidirectional teacher through the stock diffusers WanPipeline with classifier-free guidance. The last line is
JSON: semantic, quality, total and every dimension with its standard error. --vbench writes the clips of VBench's own
prompts and has the vbench package judge them, where it and its weights are installed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import engine
from distill.data.sprites import Spec
from distill.models.sampling import contact_sheet
from distill.scores.pixels import from_uint8
from distill.scores.strict import aggregate, evaluate
from distill.scores.tasks import TASKS, Task, find_task
from distill.training.state import run_stage

PARTS = ("first", "middle", "last")


def student_videos(model: Path, specs: list[Any], frames: int, seed: int, preset: dict[str, Any]) -> list[Tensor]:
    """One stream a prompt; clip i has seed `seed + i`."""
    pipeline = engine.load(model, overrides=preset, device="cpu")
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

    pipeline = WanPipeline.from_pretrained(model, torch_dtype=torch.float32)
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
    """Write out/videos/PROMPT-i.mp4 for `count` prompts, five samples each as VBench wants, and have them judged."""
    try:
        from vbench import VBench
    except ImportError:
        raise ValueError("vbench: got no such package, expected `pip install vbench` and its weights") from None
    from engine.media.sinks import open_sink

    pipeline, folder = engine.load(model), out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(vbench_prompts(info)[:count]):
        for sample in range(5):
            path = folder / f"{prompt}-{sample}.mp4"
            if path.is_file():
                continue
            with (
                pipeline.stream(prompt, seed=seed + 5 * number + sample, frames=frames) as stream,
                open_sink(str(path), pipeline.fps, (pipeline.height, pipeline.width)) as sink,
            ):
                for frame in stream:
                    sink.write(frame)
    judge = VBench("cuda" if torch.cuda.is_available() else "cpu", str(info), str(out / "results"))
    judge.evaluate(videos_path=str(folder), name=model.name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("engine/assets/sprites"), help="pipeline directory")
    parser.add_argument("--task", choices=sorted(TASKS), default="scenes", help="what the model was trained to draw")
    parser.add_argument("--prompts", type=int, default=64, help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and of the noise")
    parser.add_argument("--frames", type=int, default=33, help="pixel frames of a clip")
    parser.add_argument("--trained", action="store_true", help="prompts seen in training instead of held-out ones")
    parser.add_argument("--thirds", action="store_true", help="also the quality of each third of the clips")
    parser.add_argument("--teacher", action="store_true", help="the teacher through diffusers' WanPipeline")
    parser.add_argument("--steps", type=int, default=20, help="teacher: denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="teacher: guidance scale")
    parser.add_argument("--preset", type=json.loads, default={}, help="student: preset fields to replace, as JSON")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 12 clips")
    parser.add_argument("--vbench", type=Path, metavar="INFO", help="VBench_full_info.json: run VBench itself instead")
    parser.add_argument("--out", type=Path, default=Path("runs/vbench"), help="VBench: folder of clips and results")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.prompts < 1 or arguments.frames < 1:
        parser.error(f"got {arguments.prompts} prompts and {arguments.frames} frames, expected at least 1 of each")
    torch.set_num_threads(arguments.threads)
    if arguments.vbench:
        run_vbench(
            arguments.model, arguments.vbench, arguments.out, arguments.prompts, arguments.seed, arguments.frames
        )
        return
    task = find_task(arguments.task)
    specs = task.draw(arguments.prompts, arguments.seed, hidden=not arguments.trained)
    if arguments.teacher:
        videos = teacher_videos(
            arguments.model, specs, arguments.frames, arguments.seed, arguments.steps, arguments.guidance
        )
    else:
        videos = student_videos(arguments.model, specs, arguments.frames, arguments.seed, arguments.preset)
    if arguments.sheet:
        contact_sheet(videos[:12], arguments.sheet)
    found = task.score(videos, specs)
    if not arguments.json:
        for name, value in found.items():
            print(f"{name:>24} {value['mean']:.3f} +- {value['se']:.3f}  (n = {value['n']})")
    result: dict[str, Any] = {
        "model": "teacher" if arguments.teacher else "student",
        "task": task.name,
        "prompts": arguments.prompts,
        "frames": arguments.frames,
        "seed": arguments.seed,
        "held_out": not arguments.trained,
        "preset": arguments.preset,
        **{name: found[name]["mean"] for name in ("semantic", "quality", "total")},
        "dimensions": found,
    }
    if isinstance(specs[0], Spec):  # the strict evaluator of one object on a torus: everything at once, or not
        result["scores"] = aggregate([evaluate(video, spec) for video, spec in zip(videos, specs, strict=True)])
    if arguments.thirds:
        result["thirds"] = thirds(task, videos, specs)
    print(json.dumps(result))


if __name__ == "__main__":
    run_stage(main)
