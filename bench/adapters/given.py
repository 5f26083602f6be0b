"""What both sides of a race are given: weights, the prompt's embedding, noise; and the file of latents they hand back.

`open` names weights by a directory, {"model": "DIR"}, or by the shape and the seed of random ones, as in {"weights":
{"shape": "tiny", "seed": 0, "attention_gain": 4.0}}. Then each process draws the same tensors itself, on the device it
runs on: draws on another kind of device are other numbers. {"text": {"rows": 100, "seed": 1}} is a random embedding of
a prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.instruments import models
from bench.instruments.random_weights import RandomSource
from engine.config import Runtime, TransformerConfig
from engine.files import read_json
from engine.loader import load
from engine.model.text import Tokenizer, encode_text
from engine.model.transformer import WanTransformer
from engine.model.vae import VAE, VAEConfig
from engine.runtime.device import device_of
from engine.sampling.noise import PhiloxNoise
from engine.stream import Pipeline
from engine.weights.checkpoint import open_text_encoder
from engine.weights.sources import TensorSource, open_source

PRESET = "self-forcing"
ROWS = 512  # of a random embedding, as Wan's prompts have


def random_of(settings: Mapping[str, Any]) -> tuple[str, int, float]:
    """(shape, seed, attention gain) of the random weights that `open` names. ValueError for an unknown shape."""
    asked = dict(settings["weights"])
    shape, seed, gain = asked.pop("shape", None), int(asked.pop("seed", 0)), float(asked.pop("attention_gain", 1))
    if shape not in models.SHAPES or asked:
        raise ValueError(f"weights: got {settings['weights']}, expected shape ({', '.join(models.SHAPES)}), seed, "
                         "attention_gain")  # fmt: skip
    return shape, seed, gain


def pipeline(settings: Mapping[str, Any], runtime: Runtime) -> Pipeline:
    """This engine's pipeline on the weights that `open` names."""
    height, width = settings.get("height"), settings.get("width")
    if "weights" not in settings:
        return load(settings["model"], preset=PRESET, height=height, width=width, runtime=runtime)
    shape, seed, gain = random_of(settings)
    return models.random_pipeline(shape, PRESET, runtime, height, width, gain, seed)


@dataclass(frozen=True)
class Tensors:
    """The same weights for another engine: configs, tensors with diffusers' names, and how text is embedded.

    rows   of a prompt's embedding
    embed  a prompt -> [1, rows, text_dim] on the device; None where weights are random: there the embedding is given
    """

    config: TransformerConfig
    vae_config: VAEConfig
    transformer: TensorSource
    vae: TensorSource
    height: int
    width: int
    rows: int
    embed: Callable[[str], Tensor] | None


def tensors(settings: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
    """The weights that `open` names."""
    device = device_of(settings["device"])
    if "weights" in settings:
        shape, seed, gain = random_of(settings)
        config, vae_config, (high, wide), _ = models.SHAPES[shape]
        with torch.device("meta"):
            modules = WanTransformer(config), VAE(vae_config)
        sources = [RandomSource(module, shape, seed + i, device, gain) for i, module in enumerate(modules)]
        high, wide = settings.get("height") or high, settings.get("width") or wide
        return Tensors(config, vae_config, sources[0], sources[1], high, wide, ROWS, None)
    folder = Path(settings["model"])
    tokenizer = Tokenizer(folder / "tokenizer")
    encoder = open_text_encoder(folder / "text_encoder", dtype, device)

    @torch.inference_mode()
    def embed(prompt: str) -> Tensor:
        ids, mask = tokenizer(prompt)
        return encode_text(encoder, ids.to(device), mask.to(device)).to(dtype)

    return Tensors(
        TransformerConfig.from_dict(read_json(folder / "transformer" / "config.json")),
        VAEConfig.from_dict(read_json(folder / "vae" / "config.json")), open_source(folder / "transformer"),
        open_source(folder / "vae", part="vae"), settings["height"], settings["width"], tokenizer.rows, embed,
    )  # fmt: skip


def text(settings: Mapping[str, Any], config: TransformerConfig) -> Tensor | None:
    """The embedding [1, ROWS, text_dim] that `open` names, float32, zero behind its rows; None where it names none."""
    asked = settings.get("text")
    if asked is None:
        return None
    made = torch.randn(1, ROWS, config.text_dim, generator=torch.Generator().manual_seed(asked["seed"]))
    made[:, asked["rows"] :] = 0
    return made


def noise(seed: int, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """The first `count` draws of a chunk [count, *shape], float32: this engine's own, which depend on nothing else."""
    return PhiloxNoise(seed).draw(chunk, count, shape)


def write_latents(file: str, latents: list[Tensor]) -> None:
    """Write latents [1, C, F, h, w], chunk by chunk, in float32: "chunk_0", "chunk_1", ..."""
    named = {f"chunk_{i}": latent.detach().float().cpu().contiguous() for i, latent in enumerate(latents)}
    save_file(named, file)


def read_latents(file: str | Path) -> list[Tensor]:
    """The chunks of such a file, in order."""
    found = load_file(file)
    return [found[f"chunk_{i}"] for i in range(len(found))]
