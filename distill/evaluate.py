"""Generate clips from held-out prompts and score them exactly.

    python -m distill.evaluate --model engine/assets/sprites --prompts 64 --seed 0 --frames 33 --json

The student streams through the engine's public API, one prompt after another, as any user's would; --teacher runs
the bidirectional teacher through the stock diffusers WanPipeline with classifier-free guidance. The last line is
JSON: every score with its standard error.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import engine
from distill.evaluator import aggregate, evaluate, from_uint8
from distill.sampling import contact_sheet
from distill.sprites import Spec, sample


def student_videos(model: Path, specs: list[Spec], frames: int, seed: int, preset: dict[str, Any]) -> list[Tensor]:
    """One stream a prompt; clip i has seed `seed + i`."""
    pipeline = engine.load(model, overrides=preset, device="cpu")
    videos = []
    for i, spec in enumerate(specs):
        with pipeline.stream(spec.caption, seed=seed + i, frames=frames) as stream:
            videos.append(from_uint8(np.stack(list(stream))))
    return videos


def teacher_videos(
    model: Path, specs: list[Spec], frames: int, seed: int, steps: int, scale: float, batch: int = 16
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("engine/assets/sprites"), help="pipeline directory")
    parser.add_argument("--prompts", type=int, default=64, help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and of the noise")
    parser.add_argument("--frames", type=int, default=33, help="pixel frames of a clip")
    parser.add_argument("--trained", action="store_true", help="prompts seen in training instead of held-out ones")
    parser.add_argument("--teacher", action="store_true", help="the teacher through diffusers' WanPipeline")
    parser.add_argument("--steps", type=int, default=20, help="teacher: denoising steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="teacher: guidance scale")
    parser.add_argument("--preset", type=json.loads, default={}, help="student: preset fields to replace, as JSON")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 12 clips")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="only the last line")
    arguments = parser.parse_args()
    if arguments.prompts < 1 or arguments.frames < 1:
        parser.error(f"got {arguments.prompts} prompts and {arguments.frames} frames, expected at least 1 of each")
    torch.set_num_threads(arguments.threads)
    try:
        specs = sample(arguments.prompts, torch.Generator().manual_seed(arguments.seed), hidden=not arguments.trained)
        if arguments.teacher:
            videos = teacher_videos(
                arguments.model, specs, arguments.frames, arguments.seed, arguments.steps, arguments.guidance
            )
        else:
            videos = student_videos(arguments.model, specs, arguments.frames, arguments.seed, arguments.preset)
    except (ValueError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    if arguments.sheet:
        contact_sheet(videos[:12], arguments.sheet)
    scores = aggregate([evaluate(video, spec) for video, spec in zip(videos, specs, strict=True)])
    if not arguments.json:
        for name, value in scores.items():
            print(f"{name:>12} {value['mean']:.3f} +- {value['se']:.3f}")
    about = {
        "model": "teacher" if arguments.teacher else "student",
        "prompts": arguments.prompts,
        "frames": arguments.frames,
        "seed": arguments.seed,
        "held_out": not arguments.trained,
    }
    print(json.dumps({**about, "scores": scores}))


if __name__ == "__main__":
    main()
