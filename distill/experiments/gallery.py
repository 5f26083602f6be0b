"""Several prompts streamed side by side into one picture that moves: the README's.

python -m distill.gallery --out docs/gallery.webp
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import engine
from distill.data.scenes import sample
from engine.media.sinks import open_sink

LABEL = 14  # pixels of a line of text under a clip
CHARACTER = 6  # pixels that a character takes at most, about


def labelled(frame: np.ndarray, text: str, scale: int) -> np.ndarray:
    """frame [H, W, 3] enlarged `scale` times over its prompt in three lines."""
    large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    strip = Image.new("RGB", (large.shape[1], 3 * LABEL), "white")
    lines = textwrap.wrap(text, large.shape[1] // CHARACTER)
    ImageDraw.Draw(strip).multiline_text((4, 1), "\n".join(lines), fill="black", font_size=10, spacing=2)
    return np.concatenate([large, np.asarray(strip)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/gallery.webp", help="FILE.webp, .gif, .mp4 or DIR/")
    parser.add_argument("--model", type=Path, help="pipeline directory (default: the embedded model)")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--frames", type=int, default=57)
    parser.add_argument("--scale", type=int, default=6)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = engine.load(args.model)
    specs = sample(args.columns * args.rows, torch.Generator().manual_seed(args.seed), hidden=True)
    clips = []
    for number, spec in enumerate(specs):
        with pipeline.stream(spec.caption, seed=args.seed + number, frames=args.frames) as stream:
            clips.append([labelled(frame, spec.caption, args.scale) for frame in stream])
    rows = [clips[i : i + args.columns] for i in range(0, len(clips), args.columns)]
    height, width = clips[0][0].shape[0] * args.rows, clips[0][0].shape[1] * args.columns
    with open_sink(args.out, pipeline.fps, (height, width)) as sink:
        for number in range(args.frames):
            sink.write(np.concatenate([np.concatenate([clip[number] for clip in row], axis=1) for row in rows]))


if __name__ == "__main__":
    main()
