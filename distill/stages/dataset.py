"""Turn a folder of videos and captions into shards, the data of next_chunk, rl and dmd.

    python -m distill dataset --videos clips --model engine/assets/sprites --frames 33 --out runs/own
    python -m distill next_chunk --set teacher=engine/assets/sprites --set data=runs/own ...

Captions: clip.txt beside clip.mp4, or --captions FILE, a .jsonl or .csv file with file (video, path) and caption (text,
prompt), paths below --videos. Videos are whatever --video of the engine reads, animations included; pictures too, for
--frames 1. The model's own VAE encodes them, as float16. A video that gives no clip is skipped, with a line on stderr
and in skipped.jsonl; report.json has the counts.

A stopped run goes on with the missing shards, and gives the same files. A shard is kept if it was made with the same
settings from the same videos. The first one that was not ends the run with status 2: take another --out, or delete it.
Videos that follow the old ones may be added.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from os import SEEK_END
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.captions import Skipped, Video, find_videos
from distill.data.shards import INDEX, shard_path, write_index, write_shard
from distill.data.videos import Cut, clips_of
from distill.training.stage import Options, Stage
from engine.commands.stderr import say
from engine.files import read_json, whole_file, write_json
from engine.loader import check_size, settings_of
from engine.model.text import Tokenizer
from engine.model.vae import VAE, uint8_to_frames
from engine.options import option
from engine.runtime.device import DTYPES, device_of
from engine.weights.adapters import base_hash
from engine.weights.checkpoint import fill
from engine.weights.folders import Given, find_parts

_ENDS = 1 << 14  # bytes at both ends of a video by which it is known again
_PAUSE = 10.0  # seconds between two progress lines


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(Options):
    videos: Path = option(help="folder of videos, searched with the folders in it", metavar="DIR")
    captions: Path | None = option(None, ".jsonl or .csv file; without it NAME.txt beside each video", metavar="FILE")
    model: Path = option(help="pipeline directory whose VAE encodes and whose tokenizer reads", metavar="DIR")
    out: Path = option(help="folder of the shards", metavar="DIR")
    frames: int = option(81, "pixel frames per clip, 4k + 1: k + 1 latent frames")
    height: int | None = option(None, "pixels; default: the model's own")
    width: int | None = option(None, "pixels; default: the model's own")
    fps: float | None = option(None, "frames per second of the clips; default: the model's own")
    clips: int = option(1, "most clips cut from one video; 0: as many as fit")
    stride: int | None = option(None, "frames from one clip's begin to the next one's; default: --frames")
    resize: Literal["cover", "stretch"] = option("cover", "cover: crop in the middle; stretch: change the shape")
    shard: int = option(100, "clips per shard")
    precision: Literal["fp32", "bf16"] = option("fp32", "of the VAE")
    device: str = option("auto", "cpu, cuda, ...; auto: cuda where there is a GPU")
    strict: bool = option(False, "the first video that would be skipped ends the run with status 2")

    def __post_init__(self) -> None:
        for name, least in (("clips", 0), ("stride", 1), ("shard", 1), ("frames", 1)):
            if (got := getattr(self, name)) is not None and got < least:
                raise ValueError(f"{name}: got {got}, expected at least {least}")


class Place(NamedTuple):
    """Where reading goes on: a video's number, and how many of its clips have been read."""

    video: int
    clip: int


class Encoder:
    """The VAE and the tokenizer of a model, and its own size and frame rate."""

    def __init__(self, options: DatasetOptions) -> None:
        settings, self.device = settings_of(options.model), device_of(options.device)
        dtype = DTYPES[options.precision]
        parts = find_parts(options.model, Given(dtype=dtype))
        self.config = parts.vae_config
        frames, step = options.frames, self.config.scale_factor_temporal
        if left := (frames - 1) % step:
            near = " or ".join(str(frames - left + more) for more in (0, step))
            raise ValueError(f"frames: got {frames}, expected {step}k + 1, such as {near}")
        height = settings.height if options.height is None else options.height
        width = settings.width if options.width is None else options.width
        check_size(parts.config, self.config, height, width)
        fps = settings.fps if options.fps is None else options.fps
        if not fps > 0:
            raise ValueError(f"fps: got {fps}, expected a positive number")
        crop, stride = options.resize == "cover", options.stride or frames
        self.cut = Cut(frames, height, width, fps, stride, options.clips, crop)
        self.tokenizer = Tokenizer(parts.tokenizer, parts.text_rows)
        with torch.device("meta"):
            self.vae = VAE(self.config)
        fill(self.vae, parts.vae, dtype, self.device)
        self.vae.eval().requires_grad_(False)
        self.settings: dict[str, Any] = {
            "vae": base_hash(parts.vae.files), "frames": frames, "height": height, "width": width, "fps": float(fps),
            "clips": options.clips, "stride": stride, "resize": options.resize, "shard": options.shard,
            "precision": options.precision, "device": self.device.type,
        }  # fmt: skip

    @torch.no_grad()
    def encode(self, clip: np.ndarray) -> Tensor:
        """uint8 [T, H, W, 3] -> float16 [C, F, h, w], normalised, on the CPU."""
        video = uint8_to_frames(torch.from_numpy(clip)[None]).to(self.device)
        latent = self.vae.encode(video)[0].half().cpu()
        if not latent.isfinite().all():
            raise ValueError("latents: got NaN or numbers beyond float16, expected a VAE that encodes the clip")
        return latent


class Dataset:
    """The shards of a folder of videos: which are there, and how the others are made."""

    def __init__(self, encoder: Encoder, videos: list[Video], options: DatasetOptions) -> None:
        self.encoder, self.videos, self.folder, self.out = encoder, videos, options.videos, options.out
        self.size, self.strict = options.shard, options.strict
        self.skipped: list[Skipped] = []
        self.clips = self.shards = 0
        self._sums = [hashlib.sha256().hexdigest()]  # after so many videos
        self._progress = _Progress(len(videos))

    def skip(self, one: Skipped, told: bool = False) -> None:
        """Note a video that is skipped; with --strict, ValueError. told: an earlier run said so."""
        if self.strict:
            raise ValueError(f"{one} (--strict)")
        if not told:
            say(f"skipped: {one}")
        self.skipped.append(one)

    def write(self, stop_at: int | None = None) -> None:
        """Write every missing shard. `stop_at` ends after so many of them, as a kill would."""
        place = Place(0, 0)
        for number in count():
            if stop_at is not None and number >= stop_at:
                return
            kept = self._kept(number)
            place = kept if kept is not None else self._make(number, place)
            if self.shards == number:  # no clip was left
                return

    def _kept(self, number: int) -> Place | None:
        """Where reading goes on after a shard of an earlier run; None if the shard has to be made."""
        path, beside = shard_path(self.out, number), _beside(self.out, number)
        if not path.is_file():
            return None
        if not beside.is_file():
            raise ValueError(f"{path}: got a shard without {beside.name}, expected an empty --out or this stage's own")
        about = read_json(beside)
        for name, expected in self.encoder.settings.items():
            if (got := about["settings"].get(name)) != expected:
                raise ValueError(f"{path}: got a shard made with {name} {got}, expected {expected}: take another --out")
        place = Place(*about["next"])
        begun = place.video + bool(place.clip)
        if begun > len(self.videos) or self._sum(begun) != about["videos"]:
            raise ValueError(f"{path}: got a shard made from other videos or captions, expected those of "
                             f"{self.folder}: take another --out")  # fmt: skip
        if about["clips"] < self.size and place.video < len(self.videos):
            return None  # it was the last one, and now videos follow
        for one in about["skipped"]:
            self.skip(Skipped(*one), told=True)
        self._count(about["clips"])
        self._progress.pass_over(place.video)
        return place

    def _make(self, number: int, place: Place) -> Place:
        """Fill and write a shard; returns where reading goes on. Writes none where no clip is left."""
        latents, captions, known = list[Tensor](), list[str](), len(self.skipped)
        for after, clip in self._read(place):
            place = after
            if clip is not None:
                latents.append(self.encoder.encode(clip))
                captions.append(self.videos[place.video].caption)
            self._progress.show(place.video, self.clips + len(latents), len(self.skipped))
            if len(latents) == self.size:
                break
        if latents:
            (self.out / INDEX).unlink(missing_ok=True)  # it is about other shards
            begun = place.video + bool(place.clip)
            about = {"settings": self.encoder.settings, "videos": self._sum(begun), "next": list(place),
                     "clips": len(latents), "skipped": [list(one) for one in self.skipped[known:]]}  # fmt: skip
            write_json(_beside(self.out, number), about)  # first: a shard without it is another stage's
            write_shard(self.out, number, torch.stack(latents), captions)
            self._count(len(latents))
            print(f"dataset: shard {number + 1}, {self.clips} clips", flush=True)
        return place

    def _count(self, clips: int) -> None:
        self.clips, self.shards = self.clips + clips, self.shards + 1

    def _read(self, place: Place) -> Iterator[tuple[Place, np.ndarray | None]]:
        """Clips from a place on, each with the place after it; None stands for the end of a video."""
        for number in range(place.video, len(self.videos)):
            file, done = self.videos[number].file, place.clip if number == place.video else 0
            try:
                for clip, pixels in enumerate(clips_of(self.folder / file, self.encoder.cut)):
                    if clip >= done:
                        yield Place(number, clip + 1), pixels
            except (ValueError, FileNotFoundError) as error:
                self.skip(Skipped(file, str(error).replace(str(self.folder / file), file)))
            yield Place(number + 1, 0), None

    def _sum(self, videos: int) -> str:
        """A checksum of the first videos: names, captions, sizes, and the bytes at both ends."""
        while len(self._sums) <= videos:
            file, caption = self.videos[len(self._sums) - 1]
            known = json.dumps([self._sums[-1], file, caption]).encode() + _ends(self.folder / file)
            self._sums.append(hashlib.sha256(known).hexdigest())
        return self._sums[videos]


def _ends(path: Path) -> bytes:
    """A file's size and the bytes at both ends; of one that cannot be read, which is skipped, nothing."""
    try:
        with path.open("rb") as file:
            begin, size = file.read(_ENDS), file.seek(0, SEEK_END)
            file.seek(max(0, size - _ENDS))
            return str(size).encode() + begin + file.read(_ENDS)
    except OSError:
        return b""


def _beside(folder: Path, number: int) -> Path:
    """What is known about a shard: settings, checksum of the videos, where reading went on."""
    return shard_path(folder, number).with_suffix(".json")


class _Progress:
    """A line every few seconds: videos, clips, skipped ones, time left."""

    def __init__(self, videos: int) -> None:
        self.videos, self.first = videos, 0
        self.begun = self.last = time.monotonic()

    def pass_over(self, videos: int) -> None:
        """So many videos were read by an earlier run."""
        self.first = videos

    def show(self, video: int, clips: int, skipped: int) -> None:
        now = time.monotonic()
        if now - self.last < _PAUSE:
            return
        self.last, spent, done = now, now - self.begun, video - self.first
        left = f", eta {spent / done * (self.videos - video) / 60:.1f} min" if done else ""
        print(f"dataset: {video} of {self.videos} videos, {clips} clips, {skipped} skipped, {spent / 60:.1f} min{left}",
              flush=True)  # fmt: skip


def write_dataset(options: DatasetOptions, stop_at: int | None = None) -> None:
    """Write all shards, skipped.jsonl, report.json and last the index. ValueError if no clip is usable."""
    encoder = Encoder(options)
    videos, unfit = find_videos(options.videos, options.captions)
    dataset = Dataset(encoder, videos, options)
    for one in unfit:
        dataset.skip(one)
    cut = 0
    for file, caption in videos:
        if note := encoder.tokenizer.cut(caption):
            say(f"{file}: {note}")
            cut += 1
    dataset.write(stop_at)
    if stop_at is not None and dataset.shards >= stop_at:
        return
    skipped = dataset.skipped
    with whole_file(options.out / "skipped.jsonl") as part:
        part.write_text("".join(json.dumps(one._asdict()) + "\n" for one in skipped), encoding="utf-8")
    if not dataset.clips:
        first = f", the first: {skipped[0]}" if skipped else ""
        raise ValueError(f"videos: got no usable clip in {options.videos}, expected at least one "
                         f"({len(skipped)} videos skipped{first})")  # fmt: skip
    counts = {"videos": len(videos), "clips": dataset.clips, "skipped": len(skipped), "captions_cut": cut}
    write_json(options.out / "report.json", {**counts, "shards": dataset.shards, "settings": encoder.settings})
    write_index(options.out, dataset.shards, encoder.settings)
    print(
        f"dataset: clips {dataset.clips}, skipped videos {len(skipped)}, captions cut {cut}: {options.out}", flush=True
    )


def run(options: DatasetOptions) -> None:
    write_dataset(options)


STAGE = Stage(DatasetOptions, run)
