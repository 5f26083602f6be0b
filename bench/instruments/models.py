"""Which weights a measurement runs on: the embedded model, a directory, or random ones of a known shape."""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from bench.instruments.random_weights import RandomSource, write_text_encoder
from engine import threads
from engine.config import Runtime, TransformerConfig
from engine.generators import family_of
from engine.loader import EMBEDDED, assemble, load, load_bundle, make_stages
from engine.model.cache import FP8
from engine.model.text import Tokenizer, load_text_encoder
from engine.model.transformer import WanTransformer
from engine.model.vae import VAE, VAEConfig
from engine.presets import find_preset
from engine.runtime.device import DTYPES, PRECISIONS
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline
from engine.weights.checkpoint import fill

PROMPT = "a red circle moving right slowly on a gray background"
# Shapes for --random: transformer, VAE, (height, width), whether a processor can stream it at that size.
SHAPES = {
    "wan2.1-1.3b": (TransformerConfig(), VAEConfig(), (480, 832), False),
    "tiny": (
        TransformerConfig(num_attention_heads=2, attention_head_dim=32, text_dim=64, ffn_dim=128, num_layers=2),
        VAEConfig(base_dim=16, num_res_blocks=1), (32, 48), True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where pipelines come from; `pipeline` can be asked for several presets of the same weights."""

    model: Path | None
    random: str | None
    bundle: Path | None
    backend: str | None
    device: str
    precision: str
    height: int | None
    width: int | None
    fp8_attention: bool = False
    eager: bool = False

    @property
    def label(self) -> str:
        if self.random:
            return f"random weights of {self.random}"
        if self.bundle:
            return f"bundle {self.bundle.name}"
        return self.model.name if self.model else "embedded sprites"

    def pipeline(self, preset: str | None = None) -> Pipeline:
        """Loaded weights under a preset (the model's own where None)."""
        if self.bundle is not None:
            return open_bundle(self.bundle, self.backend, preset)
        if self.random is None:
            return load(
                self.model, preset=preset, device=self.device, dtype=self.precision, height=self.height,
                width=self.width, fp8_attention=self.fp8_attention, eager=self.eager,
            )  # fmt: skip
        return random_pipeline(
            self.random, preset or "greedy", self.device, self.precision, self.height, self.width,
            self.fp8_attention, self.eager,
        )  # fmt: skip

    def directory(self) -> Path:
        """The weights on disk, for engines in other processes."""
        if self.random or self.bundle:
            raise ValueError(f"adapter: got {self.label}, expected weights on disk (--model)")
        return self.model or EMBEDDED


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What every measurement of a stream takes."""
    model = command.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="DIR", help="pipeline directory (default: the embedded model)")
    model.add_argument(
        "--random", choices=tuple(SHAPES),
        help="random weights of this shape; wan2.1-1.3b on a processor only with a small --height and --width",
    )  # fmt: skip
    model.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle's compiled graphs instead of modules")
    command.add_argument("--height", type=int)
    command.add_argument("--width", type=int)
    command.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    command.add_argument("--fp8-attention", action="store_true", help="self-attention on e4m3 as well")
    command.add_argument("--eager", action="store_true", help="no fused kernels and no CUDA graphs on a GPU")
    command.add_argument("--backend", choices=("torch", "onnx", "aoti"), help="torch; with --bundle its first")
    command.add_argument("--device", default="auto")
    command.add_argument("--threads", type=int, help="CPU threads; default: as in engine.run")
    command.add_argument("--prompt", default=PROMPT)
    command.add_argument("--seed", type=int, default=0)


def source_of(args: argparse.Namespace) -> Source:
    """The weights that were asked for; sets the number of threads."""
    if args.threads is not None:
        threads.use(args.threads)
    return Source(
        args.model, args.random, args.bundle, args.backend, args.device, args.precision, args.height, args.width,
        args.fp8_attention, args.eager,
    )  # fmt: skip


def open_bundle(folder: Path, backend: str | None = None, preset: str | None = None) -> Pipeline:
    """A bundle; its preset and its size are what it was exported with."""
    pipeline = load_bundle(folder, backend)
    if preset not in (None, pipeline.preset_name):
        raise ValueError(f"bundle: got preset {preset!r}, expected {pipeline.preset_name!r}")
    return pipeline


def random_pipeline(
    shape: str, preset: str, device: str = "auto", precision: str = "auto", height: int | None = None,
    width: int | None = None, fp8_attention: bool = False, eager: bool = False,
) -> Pipeline:  # fmt: skip
    """A pipeline of random weights, made in memory. The text encoder is a small stand-in of the right width."""
    config, vae_config, (high, wide), anywhere = SHAPES[shape]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cpu" and not anywhere and not (height and width):
        raise ValueError(f"random {shape} on {device}: got {wide}x{high}, expected a small --height and --width, "
                         "such as 64 96: a full-size chunk takes minutes there")  # fmt: skip
    if precision == "auto":
        precision = "fp32" if place.type == "cpu" else "bf16"
    fp8 = precision == "fp8"
    dtype, style = DTYPES["bf16" if fp8 else precision], find_preset(preset)
    height, width = height or high, width or wide
    for what, pixels, patch in (("height", height, config.patch_size[1]), ("width", width, config.patch_size[2])):
        unit = vae_config.scale_factor_spatial * patch
        if pixels < unit or pixels % unit:
            raise ValueError(f"{what}: got {pixels}, expected a positive multiple of {unit}")
    with torch.device("meta"):
        family = family_of(style)
        models = {role: WanTransformer(config, family.conditioned(role)) for role in family.roles()}
        vae = VAE(vae_config)
    for seed, module in enumerate((*models.values(), vae)):
        fill(module, RandomSource(module, f"random {shape}", seed), dtype, place)
    for model in models.values():
        model.fuse()
    with tempfile.TemporaryDirectory() as folder:
        write_text_encoder(Path(folder), config.text_dim, dtype)
        tokenizer = Tokenizer(Path(folder) / "tokenizer")
        encoder = load_text_encoder(Path(folder) / "text_encoder", dtype, place)
    runtime = Runtime(precision="fp8" if fp8 else "auto", fp8_attention=fp8_attention, eager=eager)
    stages = make_stages(models, vae, encoder, place, runtime)
    return assemble(
        stages, config, style, dtype, place, tokenizer=tokenizer, name=preset, height=height, width=width,
        vae_config=vae_config, kv_dtype=FP8 if fp8_attention else None,
    )  # fmt: skip


def family(preset: str) -> str:
    """Presets of a family run on the same weights."""
    return find_preset(preset).family


def with_preset(pipeline: Pipeline, name: str, **changes: object) -> Pipeline:
    """The same weights under another preset of the same family, or with some of its fields replaced."""
    return replace(pipeline, preset=find_preset(name, changes), preset_name=name)


def torch_parts(pipeline: Pipeline) -> TorchStages:
    """The torch backend's modules."""
    if pipeline.stages.name != "torch":
        raise ValueError(f"backend: got {pipeline.stages.name}, expected torch")
    return cast(TorchStages, pipeline.stages)


def on_torch(pipeline: Pipeline, other: Pipeline) -> Pipeline:
    """The pipeline with another's stages, for counting: a bundle computes what its modules would."""
    return pipeline if pipeline.stages.name == "torch" else replace(pipeline, stages=other.stages)


def vae_config(pipeline: Pipeline) -> VAEConfig | None:
    """The VAE's shape, where the backend has the module."""
    return getattr(getattr(pipeline.stages, "vae", None), "config", None)


def weight_bytes(*modules: nn.Module | None) -> int:
    """Bytes of parameters and buffers; shared tensors count once."""
    tensors = {t.data_ptr(): t.nbytes for m in modules if m is not None for t in (*m.parameters(), *m.buffers())}
    return sum(tensors.values())
