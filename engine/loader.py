"""Builds a pipeline from files: settings, memory check, weights, adapters, stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from engine.config import Preset, Runtime, TransformerConfig
from engine.files import read_json
from engine.generators import family_of
from engine.generators.base import Geometry
from engine.model.cache import FP8
from engine.model.fp8 import to_fp8
from engine.model.text import Tokenizer
from engine.model.transformer import WanTransformer
from engine.model.vae import VAE, VAEConfig
from engine.options import read, replaced
from engine.presets import find_preset
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.device import check_fp8, device_of, dtype_of
from engine.runtime.passes import Stages
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline
from engine.threads import settle, work_of
from engine.weights.adapters import AdapterLike, merge_adapter, read_adapters
from engine.weights.checkpoint import fill, load_text_encoder, load_transformer
from engine.weights.merge import Adapters
from engine.weights.sources import TensorSource, TextEncoderSource, open_source

if TYPE_CHECKING:
    from engine.bundles.manifest import Manifest

EMBEDDED = Path(__file__).parent / "assets" / "sprites"
# Cross-attention's output product stays in bf16. No gate scales its rounding error down, so in FP8 it adds the largest
# error of all products (docs/fp8.md). It has only 6% of the operations.
FP8_KEEP = ("*.attn2.to_out.0",)


@dataclass(frozen=True)
class Settings:
    """The optional engine.json of a pipeline directory; the defaults are Wan2.1's own settings."""

    height: int = 480
    width: int = 832
    fps: float = 16.0
    preset: str = "greedy"
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of that preset that the model was trained with
    fp8_keep: tuple[str, ...] = FP8_KEEP  # patterns of products that FP8 leaves as they are


def settings_of(folder: Path) -> Settings:
    """The settings of a pipeline directory. FileNotFoundError where there is none, ValueError for a bad engine.json."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model: got {folder}, expected a diffusers pipeline directory")
    file = folder / "engine.json"
    return read(Settings, read_json(file) if file.is_file() else {}, str(file))


def choose_preset(
    settings: Settings, name: str | None, overrides: dict[str, Any], checkpoint: Path | None
) -> tuple[str, Preset]:
    """The preset's name and value. The model's own overrides apply only to the preset of its training."""
    if name is None:
        name = "self-forcing" if checkpoint is not None else settings.preset
    if name == settings.preset:
        overrides = settings.overrides | overrides
    return name, find_preset(name, overrides)


def load(
    model: str | Path | None = None, *, preset: str | None = None, overrides: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None, checkpoint_state: str | None = None, adapters: Sequence[AdapterLike] = (),
    height: int | None = None, width: int | None = None, fps: float | None = None, runtime: Runtime | None = None,
    **options: Any,
) -> Pipeline:  # fmt: skip
    """Load a pipeline.

    model             a diffusers pipeline directory (Wan2.1-T2V layout); None is the embedded sprites model
    preset            a name, or a .toml file; None is the model's own
    overrides         fields of the preset to replace
    checkpoint        transformer weights instead of the directory's: a Self-Forcing-family .pt, or safetensors
    checkpoint_state  which state of a .pt to take (generator_ema, generator, ...)
    adapters          LoRA files and PEFT folders, merged into every transformer: a path, a text "PATH:0.8", a pair
                      (path, strength) or an engine.Adapter; Stream.set_adapters changes their strengths
    height, width     pixels; None is the model's own
    fps               frames per second of the output; None is the model's own
    runtime           engine.Runtime: device, precision, threads
    options           fields of the runtime by name, such as load(precision="fp8")

    In fp8 the model's engine.json may list products to keep in bf16 (fp8_keep: patterns such as "sdd.blocks.0.*",
    "*.ffn.net.2"). Before any weight is read, invalid arguments raise ValueError or FileNotFoundError (got and
    expected), and too little memory raises MemoryError.
    """
    runtime = replaced(runtime or Runtime(), options, "load")
    folder = Path(model) if model is not None else EMBEDDED
    settings = settings_of(folder)
    chosen = Path(checkpoint) if checkpoint is not None else None
    name, style = choose_preset(settings, preset, overrides or {}, chosen)
    family, fp8 = family_of(style), runtime.precision == "fp8"
    device = device_of(runtime.device)
    if fp8 or runtime.fp8_attention:
        check_fp8(device)
    dtype = dtype_of(runtime.precision, device)
    config = TransformerConfig.from_dict(read_json(folder / "transformer" / "config.json"))
    vae_config = VAEConfig.from_dict(read_json(folder / "vae" / "config.json"))
    height = settings.height if height is None else height
    width = settings.width if width is None else width
    fps = settings.fps if fps is None else fps
    _check_size(config, vae_config, height, width)
    if not fps > 0:
        raise ValueError(f"fps: got {fps}, expected a positive number")

    source = open_source(chosen or folder / "transformer", checkpoint_state)
    adapted, notes = read_adapters(adapters, source.files, config), list[str]()
    vae_source = open_source(folder / "vae")
    roles = family.roles()
    geometry = Geometry.of(
        config, 1, height // vae_config.scale_factor_spatial, width // vae_config.scale_factor_spatial
    )
    threads_of(runtime.threads, config, style, geometry.tokens, device)
    tokenizer = Tokenizer(folder / "tokenizer")
    text_source = TextEncoderSource(open_source(folder / "text_encoder"))
    needed = len(roles) * source.bytes_at(dtype) + vae_source.bytes_at(dtype) + text_source.bytes_at(dtype)
    needed += len(roles) * source.bytes_at(FP8) if fp8 else 0
    kv_dtype = FP8 if runtime.fp8_attention else dtype
    _check_memory(needed, cache_bytes(config, style, geometry.tokens, kv_dtype), device)

    models = {
        role: _transformer(folder, config, source, role, family.conditioned(role), adapted, dtype, device, notes)
        for role in roles
    }
    with torch.device("meta"):
        vae = VAE(vae_config)
    fill(vae, vae_source, dtype, device)
    encoder = load_text_encoder(folder / "text_encoder", dtype, device)
    stages = make_stages(models, vae, encoder, device, runtime, settings.fp8_keep)
    return assemble(
        stages, config, style, dtype, device, tokenizer=tokenizer, name=name, height=height,
        width=width, fps=fps, vae_config=vae_config, kv_dtype=FP8 if runtime.fp8_attention else None,
        adapters=adapted, notes=list(dict.fromkeys(notes + (adapted.notes if adapted else []))),
    )  # fmt: skip


def make_stages(
    models: dict[str, WanTransformer], vae: VAE | None, encoder: nn.Module | None, device: torch.device,
    runtime: Runtime | None = None, keep: Sequence[str] = FP8_KEEP,
) -> Stages:  # fmt: skip
    """The torch backend. On a GPU it uses kernels and CUDA graphs, unless the runtime is eager.

    In FP8 it replaces the large products and keeps no bf16 weights of them. ValueError for FP8 with eager, or FP8
    attention on a model in another dtype than bf16.
    """
    runtime = runtime or Runtime()
    fp8 = runtime.precision == "fp8"
    if runtime.eager and (fp8 or runtime.fp8_attention):
        raise ValueError("precision: got fp8 for plain PyTorch, expected it without eager: FP8 needs the kernels")
    if fp8 or runtime.fp8_attention:
        check_fp8(device)
    dtype = next(iter(models.values())).proj_out.weight.dtype
    if runtime.fp8_attention and dtype != torch.bfloat16:
        raise ValueError(f"fp8 attention: got {dtype}, expected a model in bf16 or fp8")
    if fp8:
        models = {role: to_fp8(model, keep, role) for role, model in models.items()}
    fast = device.type == "cuda" and not runtime.eager
    if vae is not None and fast:
        vae.fuse()
    joined = fast if runtime.join_context == "auto" else runtime.join_context == "on"
    stages = TorchStages(models, vae, encoder, runtime.eager, joined)
    return GraphedStages(stages) if fast else stages


def assemble(
    stages: Stages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device, *,
    height: int, width: int, tokenizer: Tokenizer | None = None, name: str = "", fps: float = 16,
    vae_config: VAEConfig | None = None, kv_dtype: torch.dtype | None = None, adapters: Adapters | None = None,
    notes: Sequence[str] = (),
) -> Pipeline:  # fmt: skip
    """Make a pipeline of parts in memory (tests, parity, random weights). height and width are pixels."""
    scale = vae_config or VAEConfig()
    return Pipeline(
        stages, tokenizer, config, preset, name, dtype, device, height, width, fps,
        scale.scale_factor_spatial, scale.scale_factor_temporal, kv_dtype, adapters, list(notes),
    )  # fmt: skip


def threads_of(
    threads: int | None, config: TransformerConfig, preset: Preset, tokens: int, device: torch.device
) -> int:
    """Set and return the number of CPU threads for a model with `tokens` tokens per latent frame."""
    if device.type != "cpu" and threads is None:
        return torch.get_num_threads()
    return settle(threads, work_of(preset.chunk * tokens, config.dim, config.ffn_dim))


def threads_of_bundle(threads: int | None, manifest: "Manifest", device: torch.device) -> int:
    """Set and return the number of CPU threads for a bundle's model."""
    config = manifest.transformer_value()
    geometry = Geometry.of(config, 1, manifest.height // manifest.spatial, manifest.width // manifest.spatial)
    return threads_of(threads, config, manifest.preset_value(), geometry.tokens, device)


def load_bundle(folder: str | Path, backend: str | None = None, *, threads: int | None = None) -> Pipeline:
    """Load a pipeline that runs a bundle's compiled graphs. The bundle fixes size, preset and precision.

    backend  a name of BACKENDS; None is the first one in the bundle
    threads  CPU threads; None chooses as in Runtime

    The graphs of aoti and tensorrt are code: load only bundles from a source whose programs you would run. Raises
    ValueError or FileNotFoundError if the bundle differs from its manifest or is for another machine.
    """
    from engine.bundles.manifest import read_manifest  # imported here: only bundles need their packages
    from engine.bundles.registry import BACKENDS
    from engine.bundles.stages import DTYPES as TENSOR_DTYPES

    folder = Path(folder)
    manifest = read_manifest(folder)
    found = [spec for spec in manifest.backends.values() if backend in (None, spec.backend)]
    if not found:
        raise ValueError(f"bundle: got backend {backend!r}, expected one of {', '.join(manifest.backends)}")
    tokenizer = Tokenizer(folder / manifest.tokenizer)
    if tokenizer.rows != manifest.text_rows:
        raise ValueError(f"bundle: got a tokenizer of {tokenizer.rows} rows, expected {manifest.text_rows}")
    device, preset = torch.device(found[0].target.split("-")[0]), manifest.preset_value()
    count = threads_of_bundle(threads, manifest, device)
    stages = BACKENDS[found[0].backend].load()(folder, manifest, found[0], count, device)
    graph = found[0].graphs[family_of(preset).passes[0].graph]
    latent, keys = (next(spec for spec in graph.inputs if spec.name == name) for name in ("latent", "k_0"))
    return Pipeline(
        stages, tokenizer, manifest.transformer_value(), preset, manifest.preset_name,
        TENSOR_DTYPES[latent.dtype], device, manifest.height, manifest.width, manifest.fps,
        manifest.spatial, manifest.temporal, TENSOR_DTYPES[keys.dtype],
    )  # fmt: skip


def cache_bytes(config: TransformerConfig, preset: Preset, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one stream's key and value caches, which do not grow. `tokens` counts per latent frame."""
    slots = sum(ring.slots for ring in family_of(preset).rings(preset).values())
    return 2 * config.num_layers * slots * tokens * config.dim * dtype.itemsize


def is_untrained(folder: Path | None, preset: Preset, checkpoint: object, adapters: Sequence[object]) -> bool:
    """Whether the weights are the bidirectional teacher's, which were not trained to stream."""
    if checkpoint is not None or adapters:
        return False
    own = [(folder or EMBEDDED) / "adapters" / role for role in family_of(preset).roles()]
    return not own[-1].is_dir()


def _transformer(
    folder: Path, config: TransformerConfig, source: TensorSource, role: str, conditioned: bool,
    adapted: Adapters | None, dtype: torch.dtype, device: torch.device, notes: list[str],
) -> WanTransformer:  # fmt: skip
    """The transformer of a role with its adapters merged: those that belong to it, then the user's. Adds notes."""
    model = load_transformer(config, source, dtype, device, conditioned)
    own = folder / "adapters" / role
    for adapter in ([source.lora] if source.lora else []) + ([own] if own.is_dir() else []):
        notes += merge_adapter(model, adapter, source.files)
    if adapted is not None:
        adapted.merge(role, model)
    model.fuse()
    return model


def _check_size(config: TransformerConfig, vae: VAEConfig, height: int, width: int) -> None:
    for what, pixels, patch in (("height", height, config.patch_size[1]), ("width", width, config.patch_size[2])):
        unit = vae.scale_factor_spatial * patch
        if pixels < unit or pixels % unit:
            raise ValueError(f"{what}: got {pixels}, expected a positive multiple of {unit}")


def _check_memory(weights: int, caches: int, device: torch.device) -> None:
    free = psutil.virtual_memory().available if device.type != "cuda" else torch.cuda.mem_get_info(device)[0]
    if weights + caches > free:
        giga = 1 << 30
        parts = f"weights {weights / giga:.1f}, caches {caches / giga:.1f}"
        raise MemoryError(
            f"memory: got {free / giga:.1f} GB free on {device}, expected {(weights + caches) / giga:.1f} ({parts})"
        )
