"""How closely video-to-video follows its input and its prompt, at several strengths; and a picture of it.

python -m distill following --clips 16 --strengths 1 --strengths 0.7 --picture docs/video-to-video.png
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import engine
from distill.data.looks import LOOKS, Pair, draw_pair
from distill.data.scenes import Scene, render
from distill.data.sprites import DIRECTIONS
from distill.scores.dimensions import mean_and_error
from distill.scores.following import follows, has_followed
from distill.scores.pixels import from_uint8
from distill.training.stage import Options, Stage
from engine.files import write_json
from engine.model.vae import frames_to_uint8
from engine.options import option
from engine.stream import Pipeline


@dataclass(frozen=True)
class FollowingOptions(Options):
    model: Path | None = option(None, "pipeline directory; default: the embedded model", metavar="DIR")
    clips: int = option(16, "held-out input clips")
    frames: int = option(33, "pixel frames of each")
    strengths: tuple[float, ...] = option((1.0, 0.9, 0.7, 0.5), "may be repeated", metavar="S")
    noise_scale: float | None = option(None, "how far motion lowers the noise")
    change: tuple[str, ...] = option(
        ("colour", "shape"), "what the prompt says otherwise than its input shows; may be repeated",
        choices=LOOKS,
    )  # fmt: skip
    opposite: bool = option(False, "let prompts name the opposite direction of their input's")
    seed: int = option(1, "of the clips and of the noise")
    out: Path | None = option(None, "write the scores as JSON", metavar="FILE")
    picture: Path | None = option(None, "draw inputs and outputs at each strength", metavar="FILE.png")


def pairs(count: int, seed: int, change: tuple[str, ...], opposite: bool = False) -> list[Pair]:
    """Another look, with the input's motion or against it: held-out scenes of one object that is always seen."""
    draws, found = torch.Generator().manual_seed(seed), list[Pair]()
    while len(found) < count:
        shown, wanted = draw_pair(change, draws, hidden=True)
        if wanted.other is None and not wanted.period:
            found.append(Pair(shown, replace(wanted, direction=_opposite(wanted)) if opposite else wanted))
    return found


def _opposite(scene: Scene) -> str:
    x, y = DIRECTIONS[scene.direction]
    return next(name for name, step in DIRECTIONS.items() if step == (-x, -y))


def drawn(scene: Scene, frames: int) -> np.ndarray:
    """The input clip: uint8 [T, 32, 32, 3]."""
    video: Tensor = frames_to_uint8(render([scene], frames)[0])[0]
    return video.numpy()


def outputs(pipeline: Pipeline, made: list[Pair], options: FollowingOptions, strength: float) -> list[np.ndarray]:
    """The video of each pair, uint8 [T, 32, 32, 3]."""
    videos = []
    for number, (shown, wanted) in enumerate(made):
        source = drawn(shown, options.frames)
        with pipeline.stream(
            wanted.caption, seed=options.seed + number, source=source, strength=strength,
            noise_scale=options.noise_scale,
        ) as stream:  # fmt: skip
            videos.append(np.stack(list(stream)))
    return videos


def scores_of(videos: list[np.ndarray], made: list[Pair]) -> dict[str, Any]:
    """Mean, standard error and number of every score over the clips."""
    rows = []
    for video, (shown, wanted) in zip(videos, made, strict=True):
        scores = follows(from_uint8(video), shown, wanted)
        rows.append(scores | has_followed(scores))
    return {name: mean_and_error(row[name] for row in rows) for name in rows[0]}


def strip(clips: list[tuple[str, np.ndarray]], frames: list[int], scale: int = 3) -> Image.Image:
    """Some frames of clips, one labelled row per clip."""
    width, gap, label = 32 * scale, 4, 130
    picture = Image.new("RGB", (label + len(frames) * (width + gap), len(clips) * (width + gap)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (text, video) in enumerate(clips):
        draw.multiline_text((4, row * (width + gap) + 8), text, fill="black", font_size=11)
        for column, number in enumerate(frames):
            tile = Image.fromarray(video[number]).resize((width, width), Image.Resampling.NEAREST)
            picture.paste(tile, (label + column * (width + gap), row * (width + gap)))
    return picture


def expect_whole_chunks(pipeline: Pipeline, frames: int) -> None:
    """ValueError unless some first chunks have so many frames."""
    chunks, made = 0, 0
    while made < frames:
        made, before = made + pipeline.preset.pixel_frames(chunks, pipeline.temporal), made
        chunks += 1
    if frames < 2 or made != frames:
        near = f"{before} or {made}" if frames > 1 else "more than one"
        raise ValueError(f"--frames: got {frames}, expected whole chunks ({near})")


def run(options: FollowingOptions) -> None:
    """Stream, score, print a line per strength, and draw the first two clips."""
    if options.clips < 1:
        raise ValueError(f"--clips: got {options.clips}, expected at least 1")
    pipeline, result = engine.load(options.model), dict[str, Any]()
    expect_whole_chunks(pipeline, options.frames)
    if options.picture is not None:  # before minutes of streams
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=options.picture.parent) as spare:
            Image.new("RGB", (1, 1)).save(Path(spare) / options.picture.name)
    made = pairs(options.clips, options.seed, options.change, options.opposite)
    shown = [[("input", drawn(scene, options.frames))] for scene, _ in made[:2]]
    for strength in options.strengths:
        videos = outputs(pipeline, made, options, strength)
        result[f"{strength:g}"] = scores = scores_of(videos, made)
        print(json.dumps({"strength": strength} | {name: value["mean"] for name, value in scores.items()}), flush=True)
        for rows, video, (_, wanted) in zip(shown, videos, made, strict=False):
            words = wanted.caption.replace(" moving", "\nmoving").replace(" on", "\non")
            rows.append((f"strength {strength:g}\n{words}", video))
    if options.out is not None:
        write_json(options.out, {"clips": options.clips, "frames": options.frames, "scores": result})
    if options.picture is not None:
        every = list(range(0, options.frames, max(1, options.frames // 8)))
        strip([row for rows in shown for row in rows], every).save(options.picture)


STAGE = Stage(FollowingOptions, run)
