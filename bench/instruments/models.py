"""Which weights a measurement runs on: the embedded model, a directory, a bundle, or random ones of a known shape."""

import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from bench.instruments.random_weights import RandomSource, small_encoder, write_tokenizer
from engine import threads
from engine.bundles.registry import BACKENDS
from engine.config import Runtime, TransformerConfig
from engine.generators import family_of
from engine.loader import EMBEDDED, assemble, load, load_bundle, make_stages
from engine.model.cache import FP8
from engine.model.text import Tokenizer
from engine.model.tiny_vae import TinyVAEConfig
from engine.model.transformer import WanTransformer
from engine.model.vae import VAE, SplitVAE, StreamingVAE, VAEConfig
from engine.options import option
from engine.presets import find_preset
from engine.runtime.device import device_of, dtype_of
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline
from engine.weights.checkpoint import fill

PROMPT = "a red circle moving right slowly on a gray background"
# Shapes for --random: transformer, VAE, (height, width), and whether a processor can stream it at that size.
SHAPES = {
    "wan2.1-1.3b": (TransformerConfig(), VAEConfig(), (480, 832), False),
    "tiny": (
        TransformerConfig(num_attention_heads=2, attention_head_dim=32, text_dim=64, ffn_dim=128, num_layers=2),
        VAEConfig(base_dim=16, num_res_blocks=1), (32, 48), True,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Options: where a measurement runs."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", metavar="DEVICE")
    threads: int | None = option(None, "CPU threads; default: as in engine.run", metavar="N")

    def set_threads(self) -> None:
        """Set the number of CPU threads where the user chose one."""
        if self.threads is not None:
            threads.use(self.threads)


@dataclass(frozen=True, kw_only=True)
class Source(Runtime):
    """Options: which weights are measured, and how they run. `pipeline` loads them, under any preset of theirs."""

    model: Path | None = option(
        None, "pipeline directory; default: the embedded model", metavar="DIR", exclusive="weights"
    )
    random: str | None = option(
        None, "random weights of this shape; wan2.1-1.3b on a processor only with a small --height and --width",
        choices=SHAPES, exclusive="weights",
    )  # fmt: skip
    bundle: Path | None = option(
        None, "a bundle's compiled graphs instead of modules", metavar="DIR", exclusive="weights"
    )
    backend: str | None = option(None, "torch; with --bundle its first", choices=("torch", *BACKENDS))
    height: int | None = option(None, "pixels; default: the model's own")
    width: int | None = option(None, "pixels; default: the model's own")
    prompt: str = option(PROMPT, "of every stream", metavar="TEXT")
    seed: int = option(0, "of the noise (0)")

    def prepare(self) -> None:
        """Refuse options that contradict each other, and set the number of threads."""
        if self.backend and (self.backend == "torch") == bool(self.bundle):
            raise ValueError(f"--backend: got {self.backend} {'with' if self.bundle else 'without'} --bundle, expected "
                             "torch without one or one of its own with one")  # fmt: skip
        if self.threads is not None:
            threads.use(self.threads)

    @property
    def runtime(self) -> Runtime:
        """The options that every loader takes."""
        return Runtime(**{f.name: getattr(self, f.name) for f in fields(Runtime)})

    @property
    def label(self) -> str:
        if self.random:
            return f"random weights of {self.random}"
        if self.bundle:
            return f"bundle {self.bundle.name}"
        return self.model.name if self.model else "embedded sprites"

    def pipeline(self, preset: str | None = None) -> Pipeline:
        """Load the weights under a preset; None takes the model's own."""
        if self.bundle is not None:
            return open_bundle(self.bundle, self.backend, preset)
        if self.random is None:
            return load(self.model, preset=preset, height=self.height, width=self.width, runtime=self.runtime)
        return random_pipeline(self.random, preset or "greedy", self.runtime, self.height, self.width)

    def directory(self) -> Path:
        """The weights on disk, for engines that run in other processes."""
        if self.random or self.bundle:
            raise ValueError(f"adapter: got {self.label}, expected weights on disk (--model)")
        return self.model or EMBEDDED


@dataclass(frozen=True, kw_only=True)
class PresetSource(Source):
    """Options: weights, and the one preset under which they stream."""

    preset: str | None = option(None, "default: the model's own", metavar="NAME|FILE.toml")


def open_bundle(folder: Path, backend: str | None = None, preset: str | None = None) -> Pipeline:
    """A bundle. Its preset and its size were fixed when it was exported."""
    pipeline = load_bundle(folder, backend)
    if not isinstance(pipeline, Pipeline):
        raise ValueError(f"bundle: got backend {backend}, expected one whose loop runs in Python")
    if preset not in (None, pipeline.preset_name):
        raise ValueError(f"bundle: got preset {preset!r}, expected {pipeline.preset_name!r}")
    return pipeline


def random_pipeline(
    shape: str, preset: str, runtime: Runtime | None = None, height: int | None = None, width: int | None = None,
    attention_gain: float = 1, seed: int = 0,
) -> Pipeline:  # fmt: skip
    """A pipeline of random weights, made in memory. Its text encoder is a small stand-in of the right width.

    attention_gain: see RandomSource. Transformers, VAE and text encoder are drawn from seed, seed + 1, ...
    """
    config, vae_config, _, _ = SHAPES[shape]
    runtime = runtime or Runtime()
    place = device_of(runtime.device)
    dtype, style = dtype_of(runtime.precision, place), find_preset(preset)
    height, width = size_of(shape, place, height, width)
    with torch.device("meta"):
        family = family_of(style)
        models = {role: WanTransformer(config, family.conditioned(role)) for role in family.roles()}
        vae = VAE(vae_config)
    encoder = small_encoder(config.text_dim)
    for number, module in enumerate((*models.values(), vae, encoder), start=seed):
        fill(module, RandomSource(module, f"random {shape}", number, place, attention_gain), dtype, place)
    for model in models.values():
        model.order_heads(style.local_heads)
        model.fuse()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = Tokenizer(Path(folder))
    stages = make_stages(models, vae, encoder, place, runtime)
    return assemble(
        stages, config, style, dtype, place, tokenizer=tokenizer, name=preset, height=height, width=width,
        vae_config=vae_config, kv_dtype=FP8 if runtime.fp8_attention else None,
    )  # fmt: skip


def size_of(shape: str, place: torch.device, height: int | None, width: int | None) -> tuple[int, int]:
    """Pixels of a random pipeline: height and width, the shape's own where they are None.

    ValueError for a size that the shape does not have, or that a processor cannot stream.
    """
    config, vae_config, (high, wide), anywhere = SHAPES[shape]
    if place.type == "cpu" and not anywhere and not (height and width):
        raise ValueError(f"random {shape} on {place}: got {wide}x{high}, expected a small --height and --width, "
                         "such as 64 96: a full-size chunk takes minutes there")  # fmt: skip
    height, width = height or high, width or wide
    for what, pixels, patch in (("height", height, config.patch_size[1]), ("width", width, config.patch_size[2])):
        unit = vae_config.scale_factor_spatial * patch
        if pixels < unit or pixels % unit:
            raise ValueError(f"{what}: got {pixels}, expected a positive multiple of {unit}")
    return height, width


def family_name(preset: str) -> str:
    """The family of a preset. Presets of one family run on the same weights."""
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
    """The pipeline with the modules of `other` where it has none: FLOPs of a bundle are counted on these."""
    return pipeline if pipeline.stages.name == "torch" else replace(pipeline, stages=other.stages)


def vae_config(pipeline: Pipeline) -> VAEConfig | TinyVAEConfig | None:
    """The shape of the VAE that decodes, where the backend has the module."""
    vae = pipeline.stages.modules().get("vae")
    decodes = vae.decodes if isinstance(vae, SplitVAE) else vae
    return cast(StreamingVAE, decodes).config if decodes is not None else None


def weight_bytes(*modules: nn.Module | None) -> int:
    """Bytes of parameters and buffers; shared tensors count once."""
    tensors = {t.data_ptr(): t.nbytes for m in modules if m is not None for t in (*m.parameters(), *m.buffers())}
    return sum(tensors.values())
