"""Several prompts, streamed side by side into one moving picture: the README's.

python -m distill gallery --out docs/gallery.webp
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import engine
from distill.data.scenes import sample
from distill.training.stage import Options, Stage
from engine.media.sinks import open_sink
from engine.options import option

LABEL = 14  # pixels per line of text under a clip
CHARACTER = 6  # pixels per character, at most


@dataclass(frozen=True)
class GalleryOptions(Options):
    out: str = option("docs/gallery.webp", "FILE.webp, .gif, .mp4 or DIR/", metavar="TARGET")
    model: Path | None = option(None, "pipeline directory; default: the embedded model", metavar="DIR")
    columns: int = option(4, "clips per row")
    rows: int = option(2, "rows of clips")
    frames: int = option(57, "pixel frames")
    scale: int = option(6, "enlarge every pixel this many times each way")
    seed: int = option(3, "of the prompts and of the noise")


def labelled(frame: np.ndarray, text: str, scale: int) -> np.ndarray:
    """frame [H, W, 3], enlarged `scale` times, above its prompt in three lines."""
    large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    strip = Image.new("RGB", (large.shape[1], 3 * LABEL), "white")
    lines = textwrap.wrap(text, large.shape[1] // CHARACTER)
    ImageDraw.Draw(strip).multiline_text((4, 1), "\n".join(lines), fill="black", font_size=10, spacing=2)
    return np.concatenate([large, np.asarray(strip)])


def run(options: GalleryOptions) -> None:
    """Stream all clips, then write them frame by frame."""
    pipeline = engine.load(options.model)
    specs = sample(options.columns * options.rows, torch.Generator().manual_seed(options.seed), hidden=True)
    clips = []
    for number, spec in enumerate(specs):
        with pipeline.stream(spec.caption, seed=options.seed + number, frames=options.frames) as stream:
            clips.append([labelled(frame, spec.caption, options.scale) for frame in stream])
    rows = [clips[i : i + options.columns] for i in range(0, len(clips), options.columns)]
    height, width = clips[0][0].shape[0] * options.rows, clips[0][0].shape[1] * options.columns
    with open_sink(options.out, pipeline.fps, (height, width)) as sink:
        for number in range(options.frames):
            sink.write(np.concatenate([np.concatenate([clip[number] for clip in row], axis=1) for row in rows]))


STAGE = Stage(GalleryOptions, run)
