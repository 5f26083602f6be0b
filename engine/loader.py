"""Builds a pipeline from files: settings, memory check, weights, adapters, stages."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from engine.config import LocalHeads, Preset, Runtime, TransformerConfig
from engine.files import plain_file, read_json
from engine.generators import family_of
from engine.generators.base import Generator, Geometry
from engine.memory import Case, place_encoder, plan_memory
from engine.model.cache import FP8
from engine.model.quantized import FORMATS, quantized
from engine.model.text import Tokenizer
from engine.model.tiny_vae import TinyVAE
from engine.model.transformer import WanTransformer
from engine.model.umt5 import UMT5Encoder
from engine.model.vae import VAE, SplitVAE, StreamingVAE, VAEConfig
from engine.options import read, replaced, shown
from engine.presets import PRESETS, find_preset, states_of
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.device import check_fp8, device_of, dtype_of, keep_no_heap
from engine.runtime.memory_plan import GIGA, MemoryPlan
from engine.runtime.passes import Stages
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline
from engine.threads import settle, work_of
from engine.weights.adapters import AdapterLike, merge_adapter, read_adapters
from engine.weights.checkpoint import check_tensors, fill, load_text_encoder, load_transformer
from engine.weights.folders import Given, Parts, check_folder, find_parts
from engine.weights.lora.merge import Adapters
from engine.weights.sources import STATES, FileSource, TensorSource
from engine.weights.text_encoder import ReleasedEncoder

if TYPE_CHECKING:
    from engine.bundles.manifest import Manifest
    from engine.bundles.native import NativePipeline

CHECKPOINT_PRESET = "self-forcing"  # of a checkpoint, where none is named
EMBEDDED = Path(__file__).parent / "assets" / "sprites"
# Cross-attention's output product stays as it is. No gate scales its rounding error down, so in FP8 it adds the largest
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
    fp8_keep: tuple[str, ...] = FP8_KEEP  # patterns of products that fp8 and int8 leave as they are


def settings_of(folder: Path) -> Settings:
    """The settings of a pipeline directory. FileNotFoundError where there is none, ValueError for a bad engine.json."""
    check_folder(folder)
    for pattern in ("*.json", "*/*.json", "*/*.safetensors", "adapters/*/*"):  # what is no file would pass for missing
        for part in sorted(folder.glob(pattern)):
            plain_file(part)
    file = folder / "engine.json"
    settings = read(Settings, read_json(file) if plain_file(file) else {}, str(file))
    if settings.preset not in PRESETS:  # a model does not choose a file of this machine
        raise ValueError(f"{file}: got preset {settings.preset!r}, expected one of {', '.join(PRESETS)}")
    if not isinstance(heads := settings.overrides.get("heads", {}), dict):  # nor another one here
        raise ValueError(f"{file}: got overrides.heads {shown(heads)}, expected a table")
    return settings


def settings_for(
    model: Path | None, checkpoint: Path | None, vae: Path | None, text_encoder: Path | None, tokenizer: Path | None
) -> Settings:
    """The settings that `load` takes for these arguments: the directory's, or Wan2.1's where none is read."""
    complete = Given(checkpoint, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer).complete
    return Settings() if complete and model is None else settings_of(model or EMBEDDED)


def choose_preset(
    settings: Settings, name: str | None, overrides: dict[str, Any], checkpoint: Path | None
) -> tuple[str, Preset]:
    """The preset's name and value. The model's own overrides apply only to the preset of its training."""
    if name is None:
        name = CHECKPOINT_PRESET if checkpoint is not None else settings.preset
    if name == settings.preset:
        overrides = settings.overrides | overrides
    return name, find_preset(name, overrides)


def load(
    model: str | Path | None = None, *, preset: str | None = None, overrides: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None, checkpoint_state: str | None = None, vae: str | Path | None = None,
    text_encoder: str | Path | None = None, tokenizer: str | Path | None = None,
    vae_decoder: str | Path | None = None, decoder: Literal["full", "tiny"] = "full",
    adapters: Sequence[AdapterLike] = (), height: int | None = None, width: int | None = None,
    fps: float | None = None, runtime: Runtime | None = None,
    planned: Callable[[MemoryPlan], object] | None = None, **options: Any,
) -> Pipeline:  # fmt: skip
    """Load a pipeline.

    model             a diffusers pipeline directory or Wan's own folder; None is the embedded sprites model
    preset            a name, or a .toml file; None is the model's own
    overrides         fields of the preset to replace
    checkpoint        transformer weights instead of the directory's, of any spelling in docs/weights.md
    checkpoint_state  which state of a training checkpoint to take (generator_ema, generator, ...); None is the
                      preset's
    vae, text_encoder, tokenizer  files or folders instead of the directory's; with a checkpoint and all three, no
                      directory is read
    vae_decoder       a tiny VAE (TAEHV, taew2_1) that decodes in the place of the VAE, which still encodes
    decoder           "tiny": the model's own tiny VAE decodes
    adapters          LoRA files and PEFT folders, merged into every transformer: a path, a text "PATH:0.8", a pair
                      (path, strength) or an engine.Adapter; Stream.set_adapters changes their strengths
    height, width     pixels; None is the model's own
    fps               frames per second of the output; None is the model's own
    runtime           engine.Runtime: device, precision, threads
    planned           is called with the memory plan before weights are read; what it raises ends the call
    options           fields of the runtime by name, such as load(precision="fp8")

    In fp8 and int8 the model's engine.json may list products to keep as they are (fp8_keep: patterns such as
    "sdd.blocks.0.*", "*.ffn.net.2"). Before any weight is read, invalid arguments raise ValueError or FileNotFoundError
    (got and expected), and too little memory raises MemoryError. `Pipeline.notes` tells what is lossy, and what was
    chosen.
    """
    runtime = replaced(runtime or Runtime(), options, "load")
    folder = Path(model) if model is not None else EMBEDDED
    paths = [None if path is None else Path(path) for path in (checkpoint, vae, text_encoder, tokenizer)]
    if decoder not in ("full", "tiny"):
        raise ValueError(f"decoder: got {decoder!r}, expected 'full' or 'tiny'")
    if vae_decoder is not None and decoder == "tiny":
        raise ValueError("decoder: got tiny and a vae_decoder, expected one of them")
    tiny = None if vae_decoder is None else Path(vae_decoder)
    given = Given(paths[0], checkpoint_state, STATES, paths[1], paths[2], paths[3], tiny, decoder)
    settings = settings_for(Path(model) if model is not None else None, *paths)
    name, style = choose_preset(settings, preset, overrides or {}, given.checkpoint)
    family, device = family_of(style), device_of(runtime.device)
    _check_fp8(runtime, device)
    dtype = dtype_of(runtime.precision, device)
    parts = find_parts(folder, replace(given, prefer=states_of(name), dtype=dtype))
    config, vae_config = parts.config, parts.vae_config
    if style.reuse is not None:
        style.reuse.check(config.num_layers)
    height = settings.height if height is None else height
    width = settings.width if width is None else width
    fps = settings.fps if fps is None else fps
    check_size(config, vae_config, height, width)
    if style.heads is not None:
        style.heads.fit(config)
    if style.local_heads is not None and runtime.fp8_attention:
        raise ValueError("fp8 attention: got a preset with local heads, expected one without")
    if not fps > 0:
        raise ValueError(f"fps: got {fps}, expected a positive number")

    adapted, notes = read_adapters(adapters, parts.transformer.files, config), list(parts.notes)
    roles = family.roles()
    geometry = Geometry.of(
        config, 1, height // vae_config.scale_factor_spatial, width // vae_config.scale_factor_spatial
    )
    threads_of(runtime.threads, config, style, geometry.tokens, device)
    words = _tokenizer(parts)
    empty_vae = _empty(parts, family)
    changed = adapted is not None or parts.transformer.lora is not None or (folder / "adapters").is_dir()
    case = Case(parts, style, height, width, device, runtime, words.rows, settings.fp8_keep, changed)
    case = place_encoder(case)
    plan = plan_memory(case)
    if planned is not None:
        planned(plan)
    plan.check()

    if device.type == "cpu":
        keep_no_heap()
    models = {}
    for role in roles:  # one after the other, so that only one of them is in memory before it is quantised
        own = role, family.conditioned(role), adapted, family.rings(style)[role].local
        arguments = folder, config, parts.transformer, *own, dtype, device, notes
        # No name here holds the model: `quantized` lets each weight go when it has its 8 bits.
        models[role] = _in_precision(_transformer(*arguments), runtime.precision, settings.fp8_keep, role)
    whole_vae = _vae(empty_vae, parts, dtype, device)
    encoder = _text_encoder(case)
    stages = make_stages(models, whole_vae, encoder, device, runtime, settings.fp8_keep)
    note = training_note(folder, settings, name, style, parts.transformer, given, adapters)
    notes += _encoder_notes(case) + ([note] if note else [])
    return assemble(
        stages, config, style, dtype, device, tokenizer=words, name=name, height=height,
        width=width, fps=fps, vae_config=vae_config, kv_dtype=FP8 if runtime.fp8_attention else None,
        adapters=adapted, notes=list(dict.fromkeys(notes + (adapted.notes if adapted else []))), plan=plan,
        low_memory=runtime.low_memory,
    )  # fmt: skip


def plan_of(*args: Any, **options: Any) -> MemoryPlan:
    """The memory plan of `load` with these arguments, without loading; also where it does not fit. Errors as `load`."""

    class Planned(Exception):
        pass

    found: list[MemoryPlan] = []

    def keep(plan: MemoryPlan) -> None:
        found.append(plan)
        raise Planned

    with suppress(Planned):
        load(*args, planned=keep, **options)
    return found[0]


def _text_encoder(case: Case) -> nn.Module:
    source, config = case.parts.text_encoder, case.parts.text_config
    if case.encoder == "release":
        return ReleasedEncoder(source, config, case.dtype, case.device)
    return load_text_encoder(source, config, case.dtype, torch.device("cpu") if case.encoder == "cpu" else case.device)


def _encoder_notes(case: Case) -> list[str]:
    """Where prompts are encoded, if that is another place than asked for, or slow."""
    source, chosen = case.parts.text_encoder, case.runtime.text_encoder_device == "auto"
    size = sum(file.stat().st_size for file in source.files)
    if case.encoder == "cpu" and chosen:
        why = f"{case.device} has no room beside the model"
        return [f"{source.label}: prompts are encoded on cpu, where they take longer: {why}"]
    if case.encoder == "release" and size >= GIGA:
        return [f"{source.label}: every prompt reads {size / GIGA:.1f} GB again, which may take long"]
    return []


def _tokenizer(parts: Parts) -> Tokenizer:
    """The tokenizer. ValueError if it has tokens that the text encoder has not."""
    tokenizer, known = Tokenizer(parts.tokenizer, parts.text_rows), parts.text_config.vocab_size
    if tokenizer.tokens > known:
        raise ValueError(f"{parts.tokenizer}: got {tokenizer.tokens} tokens, expected at most {known}, those of the "
                         f"text encoder ({parts.text_encoder.label})")  # fmt: skip
    return tokenizer


def _empty(parts: Parts, family: type[Generator]) -> VAE:
    """Check every tensor's name and shape; returns the VAE without weights. ValueError where they differ."""
    with torch.device("meta"):
        transformer = WanTransformer(parts.config, any(family.conditioned(role) for role in family.roles()))
        vae, encoder = VAE(parts.vae_config), UMT5Encoder(parts.text_config)
        tiny = TinyVAE(parts.tiny_config) if parts.tiny_config else None
    optional = ("condition_proj.weight",)
    for module, source in ((transformer, parts.transformer), (vae, parts.vae), (encoder, parts.text_encoder)):
        check_tensors(source.label, source.shapes(), module.state_dict(), optional)
    if tiny is not None and parts.tiny_vae is not None:
        check_tensors(parts.tiny_vae.label, parts.tiny_vae.shapes(), tiny.state_dict())
    return vae


def _vae(vae: VAE, parts: Parts, dtype: torch.dtype, device: torch.device) -> StreamingVAE:
    """The VAE with its weights, which `_empty` checked; with a tiny one beside it that decodes, it only encodes."""
    if parts.tiny_config is None or parts.tiny_vae is None:
        fill(vae, parts.vae, dtype, device)
        return vae
    with torch.device("meta"):
        tiny = TinyVAE(parts.tiny_config)
    vae.forget_decoder()
    fill(vae, parts.vae, dtype, device, leave=VAE.DECODES)
    fill(tiny, parts.tiny_vae, dtype, device)
    return SplitVAE(vae, tiny)


def make_stages(
    models: dict[str, WanTransformer], vae: StreamingVAE | None, encoder: nn.Module | None, device: torch.device,
    runtime: Runtime | None = None, keep: Sequence[str] = FP8_KEEP,
) -> Stages:  # fmt: skip
    """The torch backend. On a GPU it uses kernels and CUDA graphs, unless the runtime is eager.

    In fp8 and int8 it replaces the large products and keeps no other weights of them. ValueError for FP8 with eager, or
    FP8 attention on a model in another dtype than bf16.
    """
    runtime = runtime or Runtime()
    if runtime.eager and (runtime.precision == "fp8" or runtime.fp8_attention):
        raise ValueError("precision: got fp8 for plain PyTorch, expected it without eager: FP8 needs the kernels")
    _check_fp8(runtime, device)
    dtype = next(iter(models.values())).proj_out.weight.dtype
    if runtime.fp8_attention and dtype != torch.bfloat16:
        raise ValueError(f"fp8 attention: got {dtype}, expected a model in bf16 or fp8")
    models = {role: _in_precision(model, runtime.precision, keep, role) for role, model in models.items()}
    fast = device.type == "cuda" and not runtime.eager
    graphs = fast and not runtime.low_memory  # graphs keep the memory of their passes
    if vae is not None and fast:
        vae.fuse()
    joined = graphs if runtime.join_context == "auto" else runtime.join_context == "on"
    stages = TorchStages(models, vae, encoder, runtime.eager, joined, runtime.low_memory)
    return GraphedStages(stages) if graphs else stages


def _check_fp8(runtime: Runtime, device: torch.device) -> None:
    if runtime.precision == "fp8" or runtime.fp8_attention:
        check_fp8(device)


def _in_precision(model: WanTransformer, precision: str, keep: Sequence[str], role: str) -> WanTransformer:
    """The model itself, or in fp8 and int8 its quantised twin."""
    return quantized(model, precision, keep, role) if precision in FORMATS else model


def assemble(
    stages: Stages, config: TransformerConfig, preset: Preset, dtype: torch.dtype, device: torch.device, *,
    height: int, width: int, tokenizer: Tokenizer | None = None, name: str = "", fps: float = 16,
    vae_config: VAEConfig | None = None, kv_dtype: torch.dtype | None = None, adapters: Adapters | None = None,
    notes: Sequence[str] = (), plan: MemoryPlan | None = None, low_memory: bool = False,
) -> Pipeline:  # fmt: skip
    """Make a pipeline of parts in memory (tests, parity, random weights). height and width are pixels."""
    scale = vae_config or VAEConfig()
    return Pipeline(
        stages, tokenizer, config, preset, name, dtype, device, height, width, fps,
        scale.scale_factor_spatial, scale.scale_factor_temporal, kv_dtype, adapters, tuple(notes), plan, low_memory,
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


def load_bundle(
    folder: str | Path, backend: str | None = None, *, threads: int | None = None, verify: bool = True,
    planned: Callable[[MemoryPlan], object] | None = None,
) -> "Pipeline | NativePipeline":  # fmt: skip
    """Load a pipeline that runs a bundle's compiled graphs. The bundle fixes size, preset and precision.

    backend  a name of BACKENDS, or of one entry of the manifest; `native` is the C++ core on the first entry that it
             can open. None is the first entry that opens on this machine; `Pipeline.notes` tells which did not, and why
    threads  CPU threads; None chooses as in Runtime
    verify   compare the sha256 of every file that is used with the manifest first; that of code is always compared
    planned  is called with the memory plan before weights are read, except by the C++ core, which has none; what it
             raises ends the call

    The graphs of aoti and tensorrt are code: load only bundles from a source whose programs you would run. Raises
    ValueError or FileNotFoundError if the bundle differs from its manifest or is for another machine, ImportError if a
    package or the C++ core is missing, MemoryError if there is too little memory.
    """
    from engine.bundles.hashes import check_hashes, tokenizer_files
    from engine.bundles.manifest import read_manifest  # imported here: only bundles need their packages
    from engine.bundles.native import NOT_HERE, NativePipeline
    from engine.bundles.registry import BACKENDS
    from engine.bundles.stages import DTYPES as TENSOR_DTYPES
    from engine.bundles.stages import NotHere

    folder = Path(folder)
    manifest = read_manifest(folder)
    if backend == "native":
        native = NativePipeline(folder, verify=verify, threads=threads)
        threads_of_bundle(threads, manifest, native.device)
        return native
    found = [spec for spec in manifest.backends.values() if backend in (None, spec.backend, spec.key)]
    if not found:
        expected = ", ".join((*manifest.backends, "native"))
        raise ValueError(f"bundle: got backend {backend!r}, expected one of {expected}")
    if verify:
        check_hashes(folder, manifest, tokenizer_files(manifest))
    tokenizer, preset = Tokenizer(folder / manifest.tokenizer), manifest.preset_value()
    if tokenizer.rows != manifest.text_rows:
        raise ValueError(f"bundle: got a tokenizer of {tokenizer.rows} rows, expected {manifest.text_rows}")
    refused: dict[str, NotHere | ImportError] = {}
    for spec in found:
        device = torch.device(spec.target.split("-")[0])
        count = threads_of_bundle(threads, manifest, device)
        try:
            stages = BACKENDS[spec.backend].load()(
                folder, manifest, spec, count, device, verify=verify, planned=planned
            )
        except (NotHere, ImportError) as error:
            refused[spec.key] = error
            continue
        if (rows := stages.token_rows) is not None and tokenizer.tokens > rows:
            raise ValueError(f"{folder / manifest.tokenizer}: got token {tokenizer.tokens - 1}, expected "
                             f"0 to {rows - 1}, the rows of the text encoder's table")  # fmt: skip
        graph = spec.graphs[family_of(preset).passes[0].graph]
        named = {tensor.name: tensor for tensor in graph.inputs}
        latent, keys = named["latent"], named.get("k_0") or named["local_k_0"]
        return Pipeline(
            stages, tokenizer, manifest.transformer_value(), preset, manifest.preset_name,
            TENSOR_DTYPES[latent.dtype], device, manifest.height, manifest.width, manifest.fps,
            manifest.spatial, manifest.temporal, TENSOR_DTYPES[keys.dtype],
            notes=tuple(f"{key}{NOT_HERE}{error}" for key, error in refused.items()),
            plan=stages.plan,
        )  # fmt: skip
    reasons = list(dict.fromkeys(map(str, refused.values())))
    raise next(iter(refused.values())) if len(reasons) == 1 else NotHere("; ".join(reasons))


def training_note(
    folder: Path, settings: Settings, name: str, preset: Preset, source: FileSource, given: Given,
    adapters: Sequence[object],
) -> str | None:  # fmt: skip
    """What is not known about the weights' training for the preset; None where files tell that they are for it.

    A directory tells by its engine.json or its adapters/, a training checkpoint by its state. Wan's own weights make
    whole videos at once: every preset streams them untrained.
    """
    roles = family_of(preset).roles()
    if (folder / "adapters" / roles[-1]).is_dir() or source.lora is not None:
        return None
    if given.checkpoint is None and (folder / "engine.json").is_file() and settings.preset == name:
        return None
    if given.checkpoint is not None and preset.family == "causal":
        return None  # the user chose both
    what = f"no weights trained for preset {name} were found in {given.checkpoint or folder}"
    if adapters:
        return f"{what}; whether {', '.join(map(str, adapters))} was trained for it is not known"
    return f"{what}: they were trained to make whole videos at once, and stream untrained"


def _transformer(
    folder: Path, config: TransformerConfig, source: TensorSource, role: str, conditioned: bool,
    adapted: Adapters | None, local: LocalHeads | None, dtype: torch.dtype, device: torch.device, notes: list[str],
) -> WanTransformer:  # fmt: skip
    """The transformer of a role with its adapters merged: those that belong to it, then the user's. Adds notes."""
    model = load_transformer(config, source, dtype, device, conditioned)
    own = folder / "adapters" / role
    for adapter in ([source.lora] if source.lora else []) + ([own] if own.is_dir() else []):
        notes += merge_adapter(model, adapter, source.files)
    if adapted is not None:
        adapted.merge(role, model)
    model.order_heads(local)
    model.fuse()
    return model


def check_size(config: TransformerConfig, vae: VAEConfig, height: int, width: int) -> None:
    """ValueError for pixels that are no whole number of tokens."""
    for what, pixels, patch in (("height", height, config.patch_size[1]), ("width", width, config.patch_size[2])):
        unit = vae.scale_factor_spatial * patch
        if pixels < unit or pixels % unit:
            raise ValueError(f"{what}: got {pixels}, expected a positive multiple of {unit}")
