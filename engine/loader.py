"""From files to a pipeline: settings, memory check, weights, adapters, stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.checkpoint import (
    TensorSource,
    fill,
    load_transformer,
    merge_adapter,
    merge_lora_file,
    open_source,
    read_json,
)
from engine.config import Preset, TransformerConfig, find_preset
from engine.generators import Geometry
from engine.stages import TorchStages
from engine.stream import Pipeline
from engine.text import Tokenizer, load_text_encoder
from engine.transformer import WanTransformer
from engine.vae import VAE, VAEConfig

EMBEDDED = Path(__file__).parent / "assets" / "sprites"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SETTINGS = {"height": 480, "width": 832, "fps": 16, "preset": "greedy", "overrides": {}}


def settings_of(folder: Path) -> dict[str, Any]:
    """The optional engine.json of a pipeline directory over Wan2.1's own settings."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model: got {folder}, expected a diffusers pipeline directory")
    given = read_json(folder / "engine.json") if (folder / "engine.json").is_file() else {}
    unknown = sorted(set(given) - set(_SETTINGS))
    if unknown:
        raise ValueError(f"{folder / 'engine.json'}: got unknown key {', '.join(unknown)}, "
                         f"expected one of {', '.join(_SETTINGS)}")  # fmt: skip
    return _SETTINGS | given


def choose_preset(
    settings: dict[str, Any], name: str | None, overrides: dict[str, Any], checkpoint: Path | None
) -> tuple[str, Preset]:
    """The preset's name and value; a model's own overrides apply to the preset it was trained for."""
    if name is None:
        name = "self-forcing" if checkpoint is not None else settings["preset"]
    if name == settings["preset"]:
        overrides = settings["overrides"] | overrides
    return name, find_preset(name, overrides)


def load(
    model: str | Path | None = None, *, preset: str | None = None, overrides: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None, checkpoint_state: str | None = None, adapters: Sequence[str | Path] = (),
    device: str = "auto", dtype: str = "auto", height: int | None = None, width: int | None = None,
    fps: float | None = None,
) -> Pipeline:  # fmt: skip
    """A pipeline ready to stream.

    model             a diffusers pipeline directory (Wan2.1-T2V layout); None is the embedded sprites model
    preset            a name, or a .toml file; None is the model's own
    overrides         fields of the preset to replace
    checkpoint        transformer weights instead of the directory's: a Self-Forcing-family .pt, or safetensors
    checkpoint_state  which state of a .pt to take (generator_ema, generator, ...)
    adapters          PEFT LoRA folders, or LongLive's LoRA .pt, merged into every transformer
    device, dtype     cpu, cuda, ...; fp32, bf16, fp16; auto takes cuda and bf16 where there is a GPU, else cpu and fp32
    height, width     pixels; fps frames a second; None is the model's own

    Raises ValueError or FileNotFoundError (got and expected) and MemoryError before any weight is read.
    """
    folder = Path(model) if model is not None else EMBEDDED
    settings = settings_of(folder)
    chosen = Path(checkpoint) if checkpoint is not None else None
    name, style = choose_preset(settings, preset, overrides or {}, chosen)
    place, kind = _device(device), _dtype(dtype, device)
    config = TransformerConfig.from_dict(read_json(folder / "transformer" / "config.json"))
    vae_config = VAEConfig.from_dict(read_json(folder / "vae" / "config.json"))
    height = settings["height"] if height is None else height
    width = settings["width"] if width is None else width
    fps = settings["fps"] if fps is None else fps
    _check_size(config, vae_config, height, width)
    if not fps > 0:
        raise ValueError(f"fps: got {fps}, expected a positive number")

    source = open_source(chosen or folder / "transformer", checkpoint_state)
    vae_source = open_source(folder / "vae")
    roles = ("etm", "sdd") if style.family == "greedy" else ("dit",)
    geometry = Geometry.of(
        config, 1, height // vae_config.scale_factor_spatial, width // vae_config.scale_factor_spatial
    )
    text_source = open_source(folder / "text_encoder")
    needed = len(roles) * source.bytes_at(kind) + vae_source.bytes_at(kind) + text_source.bytes_at(kind)
    _check_memory(needed, cache_bytes(config, style, geometry.tokens, kind), place)

    models = {role: _transformer(folder, config, source, role, adapters, kind, place) for role in roles}
    with torch.device("meta"):
        vae = VAE(vae_config)
    fill(vae, vae_source, kind, place)
    encoder = load_text_encoder(folder / "text_encoder", kind, place)
    stages = TorchStages(models, vae, encoder)
    return assemble(
        stages, config, style, kind, place, tokenizer=Tokenizer(folder / "tokenizer"), name=name, height=height,
        width=width, fps=fps, vae_config=vae_config,
    )  # fmt: skip


def assemble(
    stages: TorchStages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device, *,
    height: int, width: int, tokenizer: Tokenizer | None = None, name: str = "", fps: float = 16,
    vae_config: VAEConfig | None = None,
) -> Pipeline:  # fmt: skip
    """A pipeline of parts already in memory (tests, parity, random weights)."""
    scale = vae_config or VAEConfig()
    return Pipeline(
        stages, tokenizer, config, preset, name, dtype, device, height, width, fps,
        scale.scale_factor_spatial, scale.scale_factor_temporal,
    )  # fmt: skip


def load_bundle(folder: str | Path, backend: str = "onnx") -> Pipeline:
    """A pipeline that runs on a bundle's compiled graphs; size, preset and precision are the bundle's.

    Raises ValueError or FileNotFoundError (got and expected) where the bundle is not what its manifest says.
    """
    from engine.bundle import read_manifest  # extra packages that only bundles need
    from engine.onnx_stages import OnnxStages

    folder = Path(folder)
    manifest = read_manifest(folder)
    found = [spec for spec in manifest.backends.values() if spec.backend == backend]
    if not found:
        raise ValueError(f"bundle: got backend {backend!r}, expected one of {', '.join(manifest.backends)}")
    tokenizer = Tokenizer(folder / manifest.tokenizer)
    if tokenizer.rows != manifest.text_rows:
        raise ValueError(f"bundle: got a tokenizer of {tokenizer.rows} rows, expected {manifest.text_rows}")
    stages = OnnxStages(folder, manifest, found[0], torch.get_num_threads())
    return Pipeline(
        stages, tokenizer, manifest.transformer_value(), manifest.preset_value(), manifest.preset_name,
        DTYPES[manifest.precision], torch.device("cpu"), manifest.height, manifest.width, manifest.fps,
        manifest.spatial, manifest.temporal,
    )  # fmt: skip


def cache_bytes(config: TransformerConfig, preset: Preset, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one stream's key and value caches; they do not grow."""
    slots = (preset.window + 4) * preset.chunk if preset.family == "greedy" else preset.window
    return 2 * config.num_layers * slots * tokens * config.dim * dtype.itemsize


def is_untrained(folder: Path | None, preset: Preset, checkpoint: object, adapters: Sequence[object]) -> bool:
    """Whether a stream would run on the bidirectional teacher's weights: it runs, but nobody trained it to."""
    if checkpoint is not None or adapters:
        return False
    return not (preset.family == "greedy" and ((folder or EMBEDDED) / "adapters" / "sdd").is_dir())


def _transformer(
    folder: Path, config: TransformerConfig, source: TensorSource, role: str, adapters: Sequence[str | Path],
    dtype: torch.dtype, device: torch.device,
) -> WanTransformer:  # fmt: skip
    model = load_transformer(config, source, dtype, device, conditioned=role == "sdd")
    own = folder / "adapters" / role
    belonging = ([source.lora] if source.lora else []) + ([own] if own.is_dir() else [])
    for adapter in belonging + [Path(adapter) for adapter in adapters]:
        if adapter.is_dir():
            merge_adapter(model, adapter, source.files)
        elif adapter.suffix == ".pt" and adapter.is_file():
            merge_lora_file(model, adapter)
        else:
            raise FileNotFoundError(f"adapter: got {adapter}, expected a PEFT folder or a .pt file with generator_lora")
    model.fuse()
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: got {name!r}, expected cpu or a usable accelerator ({str(error).splitlines()[0]})"
        ) from None
    return device


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.float32 if _device(device).type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"dtype: got {name!r}, expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


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
