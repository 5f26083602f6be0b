"""A bank of captioned latents: drawn and encoded once, then read by every training stage.

    python -m distill latents --out runs/bank

Writes two folders of shards (`distill.data.shards`): --out/images with one latent frame, --out/clips with all. Latents
are float16 and normalised. Only training combinations are drawn. A stopped run resumes with the missing shards.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill.data import switches
from distill.data.shards import Shards, shard_path, write_index, write_shard
from distill.data.switches import Switch, with_switches
from distill.models.codec import Codec
from distill.models.pretrained import pretrained
from distill.scores.tasks import Task, find_task
from distill.training.draws import Draws, generator
from distill.training.stage import Stage, TableOptions
from engine.options import option

SHARD = 250  # clips per shard
BATCH = 64  # pixel frames per call of the encoder, about


@dataclass(frozen=True)
class BankConfig:
    """The table [bank]."""

    task: str = option("sprites", "clips to draw: sprites or scenes")
    vae: str = option("runs/vae/vae", "VAE that encodes them")
    images: int = option(20000, "single frames to draw")
    clips: int = option(5000, "clips to draw")
    frames: int = option(33, "pixel frames per clip")
    switch_share: float = option(0.0, "scenes: share of the clips in which the prompt is switched")
    seed: int = option(100, "of the drawn clips")

    def __post_init__(self) -> None:
        if not 0 <= self.switch_share <= 1 or (self.switch_share and self.task != "scenes"):
            raise ValueError(f"switch_share: got {self.switch_share} of {self.task}, expected 0 to 1 of scenes")


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
    codec: Codec, task: Task, count: int, frames: int, seed: int, folder: Path, switch_share: float = 0.0
) -> None:
    """Draw and encode `count` training clips of `frames` pixel frames, shard by shard."""
    shards, render = -(-count // SHARD), switches.render if switch_share else task.render
    for number in range(shards):
        if shard_path(folder, number).is_file():
            continue
        draws = generator(seed, folder.name, number)
        specs = task.sample(min(SHARD, count - number * SHARD), draws)
        if switch_share:
            specs = with_switches(specs, switch_share, draws)
        size = max(1, BATCH // frames)
        latents = []
        for i in range(0, len(specs), size):
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(codec.encode(render(specs[i : i + size], frames)[0]).half())
        earlier = [(spec.before.caption, spec.begins) if isinstance(spec, Switch) else None for spec in specs]
        write_shard(folder, number, torch.cat(latents), [spec.caption for spec in specs], earlier)
        print(f"{folder.name}: {number + 1}/{shards} shards", flush=True)
    write_index(folder, shards, {"task": task.name, "pixel_frames": frames, "seed": seed})


def run(config: BankConfig, options: BankOptions) -> None:
    """Draw and encode both sets, and print the spread of the latent channels."""
    codec = Codec(pretrained(AutoencoderKLWan, config.vae))
    task = find_task(config.task)
    encode_set(codec, task, config.images, 1, config.seed, options.out / "images")
    encode_set(codec, task, config.clips, config.frames, config.seed, options.out / "clips", config.switch_share)
    clips = Shards(options.out / "clips")
    print("bank: std", clips.read(range(len(clips)))[0].std((0, 2, 3, 4)).tolist())


STAGE = Stage(BankOptions, run, BankConfig, "bank")
