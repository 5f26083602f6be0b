"""A bank of captioned latents: drawn and encoded once, then read by every training stage.

    python -m distill latents --out runs/bank

Writes two folders of shards (`distill.data.shards`): --out/images with one latent frame, --out/clips with all. Latents
are float16 and normalised. Only training combinations are drawn. A stopped run resumes with the missing shards.
With `pairs` it also writes --out/pairs/inputs and --out/pairs/targets: clip i of both has one motion and two looks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill.data import switches
from distill.data.looks import draw_pair
from distill.data.shards import INPUTS, TARGETS, Shards, shard_path, write_index, write_shard
from distill.data.switches import Switch, with_switches
from distill.models.codec import Codec
from distill.models.pretrained import pretrained
from distill.scores.tasks import find_task
from distill.training.draws import Draws, generator
from distill.training.stage import Stage, TableOptions
from engine.options import option

SHARD = 250  # clips per shard
BATCH = 64  # pixel frames per call of the encoder, about
Draw = Callable[[int, torch.Generator], list[Any]]  # count, generator -> specs


@dataclass(frozen=True)
class BankConfig:
    """The table [bank]."""

    task: str = option("sprites", "clips to draw: sprites or scenes")
    vae: str = option("runs/vae/vae", "VAE that encodes them")
    images: int = option(20000, "single frames to draw")
    clips: int = option(5000, "clips to draw")
    frames: int = option(33, "pixel frames per clip")
    switch_share: float = option(0.0, "scenes: share of the clips in which the prompt is switched")
    pairs: int = option(0, "scenes: pairs of clips to draw that share the motion and differ in look")
    seed: int = option(100, "of the drawn clips")

    def __post_init__(self) -> None:
        if not 0 <= self.switch_share <= 1 or (self.switch_share and self.task != "scenes"):
            raise ValueError(f"switch_share: got {self.switch_share} of {self.task}, expected 0 to 1 of scenes")
        if self.pairs < 0 or (self.pairs and self.task != "scenes"):
            raise ValueError(f"pairs: got {self.pairs} of {self.task}, expected 0 or more, of scenes")


@dataclass(frozen=True)
class BankOptions(TableOptions):
    out: Path = option(Path("runs/bank"), "folder of the two folders of shards")


class Bank:
    """Captioned latents in memory. `draw` takes a random batch of images or of clip prefixes."""

    def __init__(self, images: Shards, clips: Shards) -> None:
        self.sets = [shards.read(range(len(shards))) for shards in (clips, images)]

    @classmethod
    def load(cls, folder: Path) -> "Bank":
        images, clips = Shards(folder / "images"), Shards(folder / "clips")
        if any(clips.earlier(range(len(clips)))):
            raise ValueError(f"bank: got clips in {folder} whose prompt is switched, expected one caption per clip")
        return cls(images, clips)

    @property
    def frames(self) -> int:
        """Latent frames per clip."""
        return self.sets[0][0].shape[2]

    def draw(self, draws: Draws, frames: int) -> tuple[Tensor, list[str]]:
        """Latents [B, 8, frames, 8, 8] in float32 and their captions, for the B samples of `draws`."""
        latents, captions = self.sets[int(frames == 1)]
        if frames > latents.shape[2]:
            raise ValueError(f"bank: got {frames} latent frames, expected at most {latents.shape[2]}")
        picks = draws.choice(len(latents))
        return latents[picks, :, :frames], [captions[i] for i in picks.tolist()]


def encode_set(
    codec: Codec, folder: Path, config: BankConfig, count: int, frames: int, draw: Draw, key: str | None = None
) -> None:
    """Draw and encode `count` clips of `frames` pixel frames, shard by shard. Sets of one `key` draw the same."""
    shards = -(-count // SHARD)
    for number in range(shards):
        if shard_path(folder, number).is_file():
            continue
        specs = draw(min(SHARD, count - number * SHARD), generator(config.seed, key or folder.name, number))
        size = max(1, BATCH // frames)
        latents = []
        for i in range(0, len(specs), size):
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(codec.encode(_rendered(config, specs[i : i + size], frames)).half())
        earlier = [(spec.before.caption, spec.begins) if isinstance(spec, Switch) else None for spec in specs]
        write_shard(folder, number, torch.cat(latents), [spec.caption for spec in specs], earlier)
        print(f"{folder.name}: {number + 1}/{shards} shards", flush=True)
    write_index(folder, shards, {"task": config.task, "pixel_frames": frames, "seed": config.seed})


def _rendered(config: BankConfig, specs: list[Any], frames: int) -> Tensor:
    """Video [N, 3, T, 32, 32] in [-1, 1]."""
    render = switches.render if config.switch_share else find_task(config.task).render
    return render(specs, frames)[0]


def run(config: BankConfig, options: BankOptions) -> None:
    """Draw and encode the sets, and print the spread of the latent channels."""
    codec, task = Codec(pretrained(AutoencoderKLWan, config.vae)), find_task(config.task)

    def draw(count: int, draws: torch.Generator) -> list[Any]:
        return with_switches(task.sample(count, draws), config.switch_share, draws)

    def inputs(count: int, draws: torch.Generator) -> list[Any]:
        return [draw_pair(None, draws).shown for _ in range(count)]

    def targets(count: int, draws: torch.Generator) -> list[Any]:
        return [draw_pair(None, draws).wanted for _ in range(count)]

    encode_set(codec, options.out / "images", config, config.images, 1, task.sample)
    encode_set(codec, options.out / "clips", config, config.clips, config.frames, draw)
    if config.pairs:
        encode_set(codec, options.out / "pairs" / INPUTS, config, config.pairs, config.frames, inputs, "pairs")
        encode_set(codec, options.out / "pairs" / TARGETS, config, config.pairs, config.frames, targets, "pairs")
    clips = Shards(options.out / "clips")
    print("bank: std", clips.read(range(len(clips)))[0].std((0, 2, 3, 4)).tolist())


STAGE = Stage(BankOptions, run, BankConfig, "bank")
