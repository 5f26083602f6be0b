"""The options of `engine.run`: one frozen dataclass per concern, and the whole command line as a Job."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.bundles.registry import BACKENDS
from engine.commands.stderr import need_stdout
from engine.config import Preset, Runtime
from engine.media.sinks import LONGEST
from engine.options import chosen, option, options_of
from engine.runtime.blending import MOST_CHUNKS

MOST_FRAMES = 2**53 - 1  # in the C++ core and in JSON, too, a counter holds so many


@dataclass(frozen=True)
class Video:
    """The video to generate: prompts, first frames, length and seed."""

    prompt: str | None = option(None, "what the video shows", metavar="TEXT", exclusive="prompt")
    prompt_file: str | None = option(
        None, "the same from a file, or - for stdin: UTF-8 or UTF-16. A line that begins with [3.0s] or [48f] "
        "switches the prompt there, as --prompt-at", metavar="FILE", exclusive="prompt",
    )  # fmt: skip
    blend: tuple[tuple[str, str], ...] = option(
        (), "mix another text into --prompt, whose own weight is 1; may be repeated", metavar=("TEXT", "WEIGHT")
    )
    prompt_at: tuple[tuple[str, str], ...] = option(
        (), "switch the prompt while streaming, at 3.0s or frame 48f, from the next chunk on; may be repeated",
        metavar=("TIME", "TEXT"),
    )  # fmt: skip
    transition: int = option(0, "reach every later prompt in N chunks, in equal steps; 0: at once", metavar="N")
    adapter_at: tuple[tuple[str, str], ...] = option(
        (), "change an adapter's strength at 3.0s or frame 48f, from the next chunk on; may be repeated",
        metavar=("TIME", "NAME=STRENGTH"),
    )  # fmt: skip
    no_recommit: bool = option(False, "leave the past as it is when the prompt or a strength changes")
    image: Path | None = option(None, "start from a picture (image-to-video)", metavar="FILE", exclusive="clip")
    video: Path | None = option(
        None, "continue a clip; its end is re-encoded and comes first", metavar="FILE", exclusive="clip"
    )
    video_frames: int = option(81, "how much of the clip's end to take", metavar="N")
    source: str | None = option(
        None, "follow a video (video-to-video): a file, - for stdin (y4m, mkv, ts, fragmented mp4), camera, camera:N "
        "or /dev/videoN. The video ends with its source", metavar="SOURCE", exclusive="clip",
    )  # fmt: skip
    strength: float | None = option(
        None, "how far the video may leave its source: chunks begin at the first step whose noise level (sigma) is at "
        "most this; 1 is noise alone; default: 0.5, or the last step's level where that is higher", metavar="S",
    )  # fmt: skip
    noise_scale: float | None = option(
        None, "lower that level by up to this much where the source moves fast; default: not at all", metavar="S"
    )
    frames: int | None = option(None, "stop after N frames", metavar="N", exclusive="length")
    seconds: float | None = option(
        None, "stop after S seconds; default: stream until Ctrl-C", metavar="S", exclusive="length"
    )
    seed: int = option(0, "the same seed gives the same video", metavar="N")

    def __post_init__(self) -> None:
        if self.prompt is None and self.prompt_file is None:
            raise ValueError("--prompt: got none, expected a text, or --prompt-file with one")
        if self.blend and self.prompt is None:
            raise ValueError("--blend: got no --prompt to mix it with, expected one")
        if not 0 <= self.transition <= MOST_CHUNKS:
            raise ValueError(f"--transition: got {self.transition}, expected 0 to {MOST_CHUNKS}")
        if self.video_frames < 1:
            raise ValueError(f"--video-frames: got {self.video_frames}, expected at least 1")
        if self.video_frames > MOST_FRAMES:
            raise ValueError(f"--video-frames: got {self.video_frames}, expected at most 2^53 - 1")
        for name, value in (("strength", self.strength), ("noise-scale", self.noise_scale)):
            if value is not None and self.source is None:
                raise ValueError(f"--{name}: got {value:g} alone, expected --source as well")
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"--{name}: got {value:g}, expected a number above 0, up to 1")
        if self.source == "-" == self.prompt_file:
            raise ValueError("--source: got - for --prompt-file as well, expected standard input to be one of them")
        if self.frames is not None and not 1 <= self.frames <= MOST_FRAMES:
            raise ValueError(f"--frames: got {self.frames}, expected 1 to 2^53 - 1")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds: got {self.seconds}, expected a positive number")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed: got {self.seed}, expected 0 to 2^64 - 1")


@dataclass(frozen=True)
class Model:
    """The model that streams."""

    model: Path | None = option(
        None, "diffusers pipeline directory, or Wan's own folder; default: the embedded sprites model", metavar="DIR"
    )
    checkpoint: Path | None = option(
        None, "transformer weights: .safetensors, .pt, .gguf or a folder with them; greedy-stream inspect FILE tells "
        "what a file is", metavar="FILE",
    )  # fmt: skip
    checkpoint_state: str | None = option(
        None, "state of a training checkpoint: generator_ema, generator, ...; default: the preset's", metavar="NAME"
    )
    vae: Path | None = option(None, "VAE instead of the model's", metavar="FILE")
    vae_decoder: Path | None = option(
        None, "tiny VAE (TAEHV, taew2_1) that decodes in the place of the VAE", metavar="FILE", exclusive="decoder"
    )
    decoder: Literal["full", "tiny"] = option("full", "tiny: the model's own tiny VAE decodes", exclusive="decoder")
    text_encoder: Path | None = option(None, "UMT5 encoder instead of the model's", metavar="FILE")
    tokenizer: Path | None = option(None, "tokenizer instead of the model's", metavar="DIR")
    adapter: tuple[str, ...] = option(
        (), "LoRA file or PEFT folder to merge, at a strength (1); may be repeated", metavar="PATH[:STRENGTH]"
    )
    preset: str | None = option(None, "default: the model's own", metavar="NAME|FILE.toml")
    height: int | None = option(None, "pixels; default: the model's own")
    width: int | None = option(None, "pixels; default: the model's own")

    def __post_init__(self) -> None:
        if self.checkpoint_state is not None and self.checkpoint is None:
            raise ValueError(f"--checkpoint-state: got {self.checkpoint_state} alone, expected --checkpoint as well")
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and not 1 <= value <= LONGEST:
                raise ValueError(f"--{name}: got {value}, expected 1 to {LONGEST}")


@dataclass(frozen=True)
class Bundle:
    """A bundle to stream from instead of a model."""

    bundle: Path | None = option(None, "stream from a bundle that python -m export wrote; graphs of "
                                 "aoti and tensorrt are code: take them only from where you would take a program",
                                 metavar="DIR")  # fmt: skip
    backend: str | None = option(
        None, "default: torch; with --bundle its first that runs here", choices=("torch", *BACKENDS, "native")
    )  # fmt: skip
    verify: bool = option(
        True, "compare the hashes of the bundle's files before they are used; --no-verify: of aoti's and tensorrt's "
        "graphs alone, which are code",
    )  # fmt: skip


@dataclass(frozen=True)
class Output:
    """The frames' output and the report's."""

    out: str = option(
        "video.mp4",
        "FILE.mp4, .mov, .mkv, .webm, .y4m, .rgb, .gif, .webp, DIR/ or name_%05d.png (png sequence), - (stdout), null, "
        "checksum",
        metavar="TARGET",
    )
    format: Literal["y4m", "mp4", "mkv", "webm", "rgb"] | None = option(None, "what --out - writes; default: y4m")
    codec: str | None = option(
        None, "h264 (default of mp4, mov, mkv), hevc, av1 or vp9 (default of webm)", metavar="NAME"
    )
    pix_fmt: str | None = option(
        None, "yuv420p (default; y4m: yuv444p), yuv422p, yuv444p, yuv420p10le, yuv444p10le", metavar="NAME"
    )
    crf: int | None = option(None, "constant quality, 0 is best; default: visually close to lossless", metavar="N")
    fps: float | None = option(None, "frame rate of the output; default: the model's own", metavar="F")
    scale: int = option(1, "enlarge every pixel N times each way", metavar="N")
    plan: bool = option(False, "print how much memory the run would need on every device, and stop")
    json: bool = option(False, "print a report as the last line of stdout")
    quiet: bool = option(False, "print no progress and no warnings")
    debug: bool = option(False, "show tracebacks")

    def __post_init__(self) -> None:
        if self.json and self.out == "-":
            raise ValueError("--json: got --out -, expected a file (both write to stdout)")
        if not 1 <= self.scale <= LONGEST:
            raise ValueError(f"--scale: got {self.scale}, expected 1 to {LONGEST}")
        if self.json:
            need_stdout("--json")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"--fps: got {self.fps}, expected a positive number")


@dataclass(frozen=True)
class Job:
    """A whole command line."""

    video: Video
    model: Model
    overrides: dict[str, Any]  # fields of the preset
    bundle: Bundle
    runtime: Runtime
    output: Output
    fixed: tuple[str, ...]  # options that the user set and that a bundle would fix

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Job":
        overrides = chosen(args, Preset)
        set_by_user = [*chosen(args, Model), *chosen(args, Runtime), *overrides]
        return cls(
            options_of(args, Video), options_of(args, Model), overrides, options_of(args, Bundle),
            options_of(args, Runtime), options_of(args, Output), tuple(n for n in set_by_user if n != "threads"),
        )  # fmt: skip
