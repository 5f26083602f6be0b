"""A bank of captioned latents: drawn and encoded once, then read by every training stage.

    python -m distill.latents --vae runs/vae/vae --out runs/bank

Writes bank.safetensors (`images` [N, 8, 1, 8, 8] and `clips` [M, 8, 9, 8, 8], float16, normalised) and bank.json
(the captions). Only training combinations are drawn.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.codec import Codec
from distill.tasks import Task, find_task
from distill.training import load_config, parse_arguments, run_stage


@dataclass(frozen=True)
class BankConfig:
    task: str = "sprites"
    vae: str = "runs/vae/vae"
    images: int = 20000
    clips: int = 5000
    frames: int = 33
    seed: int = 100


class Bank:
    """Captioned latents in memory; `draw` takes a random batch of images or of clip prefixes."""

    def __init__(self, images: Tensor, image_captions: list[str], clips: Tensor, clip_captions: list[str]) -> None:
        for name, tensor, captions in (("images", images, image_captions), ("clips", clips, clip_captions)):
            if len(tensor) != len(captions):
                raise ValueError(f"bank: got {len(captions)} captions, expected {len(tensor)} for the {name}")
        self.sets = {1: (images, image_captions), 0: (clips, clip_captions)}

    @classmethod
    def load(cls, folder: Path) -> "Bank":
        tensors = load_file(folder / "bank.safetensors")
        captions = json.loads((folder / "bank.json").read_text())
        return cls(tensors["images"], captions["images"], tensors["clips"], captions["clips"])

    @property
    def frames(self) -> int:
        """Latent frames of a clip."""
        return self.sets[0][0].shape[2]

    def draw(self, count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Latents [count, 8, frames, 8, 8] in float32 and their captions."""
        latents, captions = self.sets[int(frames == 1)]
        if frames > latents.shape[2]:
            raise ValueError(f"bank: got {frames} latent frames, expected at most {latents.shape[2]}")
        picks = torch.randint(len(latents), (count,), generator=generator)
        return latents[picks, :, :frames].float(), [captions[i] for i in picks.tolist()]


def encode_set(
    codec: Codec, task: Task, count: int, frames: int, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Draw and encode `count` training clips: latents float16 and captions."""
    latents, captions = [], []
    batch = max(1, 64 // frames)
    while len(captions) < count:
        specs = task.sample(min(batch, count - len(captions)), generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(codec.encode(task.render(specs, frames)[0]).half())
        captions += [spec.caption for spec in specs]
        if len(captions) % (count // 10) < batch:
            print(f"bank: {len(captions)}/{count} of {frames} frames", flush=True)
    return torch.cat(latents).contiguous(), captions


def main() -> None:
    arguments = parse_arguments(__doc__, "runs/bank")
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, "bank", BankConfig)
    codec = Codec(AutoencoderKLWan.from_pretrained(config.vae))
    task, generator = find_task(config.task), torch.Generator().manual_seed(config.seed)
    images, image_captions = encode_set(codec, task, config.images, 1, generator)
    clips, clip_captions = encode_set(codec, task, config.clips, config.frames, generator)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file({"images": images, "clips": clips}, arguments.out / "bank.safetensors")
    (arguments.out / "bank.json").write_text(json.dumps({"images": image_captions, "clips": clip_captions}))
    print("bank: std", clips.float().std((0, 2, 3, 4)).tolist())


if __name__ == "__main__":
    run_stage(main)
