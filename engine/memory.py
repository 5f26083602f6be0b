"""The memory plan: what a pipeline will need on every device, counted before weights are read, and what would fit.

A processor's needs are counted as resident memory (RSS): what the process allocates, and the pages of weight files that
stay mapped because the file has them in the working dtype. The system can drop mapped pages, so they are named apart.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from engine.config import Preset, Runtime
from engine.generators import family_of
from engine.generators.base import Geometry
from engine.model.activations import (
    tiny_decoding,
    transformer_activations,
    umt5_activations,
    vae_decoding,
    vae_encoding,
)
from engine.model.cache import FP8
from engine.model.quantized import FORMATS, products, wanted
from engine.model.scaled_linear import EIGHT_BITS
from engine.model.vae import VAE
from engine.runtime.device import check_fp8, dtype_of, free_memory
from engine.runtime.memory_plan import (
    CLIP,
    CPU_SHARE,
    CUDA_SHARE,
    DECODING,
    LOADING,
    MEGA,
    PASS,
    PHASES,
    PREPARING,
    PROMPT,
    STREAMING,
    SWITCH,
    TRANSFORMERS,
    MemoryPlan,
    Need,
)
from engine.weights.folders import Parts
from engine.weights.sources import FileSource

Place = Literal["kept", "cpu", "release"]

# Estimate: memory in which cuDNN tries convolutions in the first chunk, as a share of the activations of decoding. It
# was 2.1 GB on an H100 at 832x480. torch makes it smaller where memory is short.
TRIALS = 1.1
SLACK = 0.05  # estimate: of a processor's activations and VAE caches, what its allocator holds and cannot use
SPAN = 32 * MEGA  # mapped pages that reading keeps, see SafetensorsFile
PREPARED = 4  # chunks whose rotary tables a stream keeps, see RopeTables


@dataclass(frozen=True)
class Case:
    """All that decides how much memory a pipeline needs."""

    parts: Parts
    preset: Preset
    height: int  # pixels
    width: int
    device: torch.device
    runtime: Runtime
    rows: int  # of the text embedding
    keep: Sequence[str] = ()  # products that stay as they are, see `quantized`
    adapted: bool = False  # adapters are merged: no weight of a block stays mapped
    encoder: Place = "kept"
    free: dict[str, int] = field(default_factory=dict)  # what was measured, so that variants are compared with the same

    @cached_property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.runtime.precision, self.device)

    @property
    def quantizes(self) -> bool:
        """Whether the large products are in 8 bits."""
        return self.runtime.precision in FORMATS

    @property
    def fused(self) -> bool:
        """Whether kernels run."""
        return self.device.type == "cuda" and not self.runtime.eager

    @property
    def overlaps(self) -> bool:
        """Whether a chunk is decoded while the next one is made."""
        return self.device.type == "cuda" and not self.runtime.low_memory


def plan_memory(case: Case) -> MemoryPlan:
    """The plan of a case; where it does not fit, with the first options that would. Reads no weights."""
    plan = _plan(case)
    return plan if plan.fits() else replace(plan, ways=tuple(ways(case)))


def place_encoder(case: Case) -> Case:
    """The case with its text encoder where `text_encoder_device` asks for it; auto is where it fits.

    ValueError for cuda where the model runs on a processor.
    """
    wish = case.runtime.text_encoder_device
    if wish == "cuda" and case.device.type == "cpu":
        raise ValueError("text_encoder_device: got cuda for a model that runs on cpu, expected auto, cpu or release")
    if wish == "auto":
        places: list[Place] = ["kept", "cpu", "release"] if case.device.type == "cuda" else ["kept"]
        places = ["release"] if case.runtime.low_memory else places
        cases = [replace(case, encoder=place) for place in places]
        return next((one for one in cases if _plan(one).fits()), cases[min(1, len(cases) - 1)])
    if wish == "cpu" and case.device.type != "cpu":
        return replace(case, encoder="cpu")
    return replace(case, encoder="release" if wish == "release" else "kept")


def _plan(case: Case) -> MemoryPlan:
    devices = dict.fromkeys((str(case.device), "cpu"))
    for device in devices:
        if device not in case.free:
            case.free[device] = free_memory(torch.device(device))
    needs = tuple(need for need in _needs(case) if need.bytes + need.mapped > 0)
    return MemoryPlan(needs, {device: case.free[device] for device in devices})


def _needs(case: Case) -> Iterator[Need]:
    yield from _weights(case)
    yield from _encoder(case)
    place, parts, preset, size = str(case.device), case.parts, case.preset, case.dtype.itemsize
    config, family = parts.config, family_of(preset)
    scale = parts.vae_config.scale_factor_spatial
    high, wide = case.height // scale, case.width // scale
    geometry = Geometry.of(config, 1, high, wide)
    tokens, rings = geometry.tokens, family.rings(preset)
    kv = FP8 if case.runtime.fp8_attention else case.dtype
    slots = sum(ring.heads_slots(config) for ring in rings.values())
    yield Need("K/V caches", place, 2 * slots * tokens * config.attention_head_dim * kv.itemsize, during=STREAMING)
    graphs = case.fused and not case.runtime.low_memory
    text = 2 * config.num_layers * case.rows * config.dim * size
    yield Need("text K/V", place, len(rings) * text * (2 if graphs else 1), during=STREAMING)  # graphs have a copy
    yield Need("a new prompt's K/V", place, (len(rings) + 1) * text, during=(PREPARING,))
    chunk = preset.chunk * tokens
    yield Need("rotary tables, features", place, PREPARED * chunk * config.attention_head_dim * 4
               + chunk * config.dim * size, during=STREAMING)  # fmt: skip
    if preset.reuse is not None:
        yield Need("residual of skipped blocks", place, chunk * config.dim * size, during=STREAMING)
    join = case.runtime.join_context
    joined = (graphs if join == "auto" else join == "on") + 1
    most = max(ring.slots for ring in rings.values()) * tokens
    work = transformer_activations(config, joined * chunk, most, case.dtype, fused=case.fused,
                                 precision=case.runtime.precision)  # fmt: skip
    in_place = graphs or case.runtime.low_memory
    how = {"fused": case.fused, "in_place": in_place}
    if parts.tiny_config is None:
        vae = vae_decoding(parts.vae_config, high, wide, case.dtype, **how)
    else:
        vae = tiny_decoding(parts.tiny_config, high, wide, case.dtype, **how)
    clip = vae_encoding(parts.vae_config, high, wide, case.dtype, fused=case.fused)
    yield Need("VAE caches", place, vae.cache, during=STREAMING)
    both = (PASS, DECODING) if case.overlaps else ()
    yield Need("activations of a pass", place, work, during=both or (PASS,))
    yield Need("activations of decoding", place, vae.step, during=both or (DECODING,))
    yield Need("activations of a clip", place, clip, during=(CLIP,))
    if case.device.type == "cuda":
        yield Need("libraries (estimate)", place, CUDA_SHARE)
        if graphs:  # which search the fastest convolutions
            yield Need("trying convolutions (estimate)", place, round(TRIALS * vae.step), during=both or (DECODING,),
                       optional=True)  # fmt: skip
    else:
        yield Need("allocator (estimate)", place, round(SLACK * (vae.cache + vae.step)), during=(DECODING,))
        yield Need("allocator (estimate)", place, round(SLACK * (vae.cache + work)), during=(PASS,))
    yield Need("libraries (estimate)", "cpu", CPU_SHARE)


def _weights(case: Case) -> Iterator[Need]:
    parts, place, size = case.parts, str(case.device), case.dtype.itemsize
    config, family = parts.config, family_of(case.preset)
    shapes, mapped = _counts(parts.transformer), _mapped(case, parts.transformer)
    joint = {name for number in range(config.num_layers) for name in products(number)[0]}
    copied = {n for n in mapped if n.removesuffix(".weight").removesuffix(".bias") in joint}
    if case.preset.local_heads is not None:  # their order is another one
        copied |= {n for n in mapped if n.endswith("attn1.to_out.0.weight")}
    if case.adapted:
        copied |= {n for n in mapped if n.startswith("blocks.")}
    whole = 0
    for number, role in enumerate(family.roles()):
        extra = config.dim**2 if family.conditioned(role) and "condition_proj.weight" not in shapes else 0
        whole = size * (sum(shapes.values()) + extra + 6 * config.num_layers * config.dim)
        there = size * sum(shapes[n] for n in mapped)
        own = whole - size * sum(shapes[n] for n in mapped - copied)
        saved = _saved(case, role) if case.quantizes else 0
        yield Need(f"weights of {role}", place, own - saved, 0 if case.quantizes else there, again=number > 0)
        last = number == len(family.roles()) - 1
        if case.quantizes and last:  # the role that is read last waits in full, beside the others in 8 bits
            yield Need("weights to quantise", place, saved, there, during=(TRANSFORMERS,))
    after = tuple(phase for phase in PHASES if phase != TRANSFORMERS)
    vaes = [parts.vae, *filter(None, [parts.tiny_vae])]
    for source, what in zip(vaes, ("VAE", "tiny VAE"), strict=False):
        only_encodes = source is parts.vae and parts.tiny_vae is not None
        shapes = {n: c for n, c in _counts(source).items() if not (only_encodes and n.startswith(VAE.DECODES))}
        there = size * sum(shapes[n] for n in _mapped(case, source) & shapes.keys())
        yield Need(f"weights of the {what}", place, size * sum(shapes.values()) - there, there, during=after)
    sources = [parts.transformer, *vaes] + ([] if case.encoder == "release" else [parts.text_encoder])
    largest = max(max(_counts(source).values()) for source in sources)
    expansion = 4 * largest if any(not s.maps or s.scaled() for s in sources) else 0
    pages = min(SPAN, max(file.stat().st_size for source in sources for file in source.files))
    yield Need("reading files", "cpu", expansion, pages, during=(TRANSFORMERS, LOADING))


def _saved(case: Case, role: str) -> int:
    """Bytes that a role's products lose when they get 8 bits, and one scale per output."""
    shapes, saved = case.parts.transformer.shapes(), 0
    for number in range(case.parts.config.num_layers):
        for names in products(number):
            if wanted(names, case.keep, role):
                for rows, columns in (shapes[f"{name}.weight"] for name in names):
                    saved += rows * columns * (case.dtype.itemsize - 1) - 4 * rows
    return saved


def _encoder(case: Case) -> Iterator[Need]:
    """The text encoder: 8-bit weights stay in 8 bits, and one is expanded at a time."""
    source, config, size = case.parts.text_encoder, case.parts.text_config, case.dtype.itemsize
    place = "cpu" if case.encoder == "cpu" else str(case.device)
    on_cpu = torch.device(place).type == "cpu"
    stored, mapped = source.stored(), _mapped(case, source, on_cpu)
    eight = {n for n, s in stored.items() if s.dtype in EIGHT_BITS and len(s.shape) == 2 and "bias" not in n}
    wide = {n for n in stored if case.dtype == torch.float16 and n.endswith(".wo.weight")} - eight
    counts = _counts(source)
    bytes_of = {n: count * (1 if n in eight else 4 if n in wide else size) for n, count in counts.items()}
    there = (mapped - wide) | (eight if on_cpu and source.maps else set())
    expanded = config.d_model * config.d_ff * size if eight else 0
    while_encoding = umt5_activations(config, case.rows, case.dtype) + expanded
    if case.encoder == "release":
        block = {n for n in stored if n.startswith("block.0.")}
        layer = sum(bytes_of[n] for n in block - there)
        pages = sum(counts[n] * _size(stored[n].dtype) for n in block) if source.maps else 0
        whole = 0 if source.maps else 4 * counts["embed_tokens.weight"]
        during = (PROMPT, SWITCH)
        yield Need("text encoder, a layer", place, layer + while_encoding, pages if on_cpu else 0, during=during)
        yield Need("text encoder's pages", "cpu", 0, 0 if on_cpu else pages, during=during)
        yield Need("text encoder's table", "cpu", whole, during=during)
        return
    after = tuple(phase for phase in PHASES if phase != TRANSFORMERS)
    pages = sum(bytes_of[n] for n in there)
    yield Need("text encoder", place, sum(bytes_of.values()) - pages, pages, during=after)
    yield Need("activations of a prompt", place, while_encoding, during=(PROMPT, SWITCH))


def _counts(source: FileSource) -> dict[str, int]:
    return {name: torch.Size(shape).numel() for name, shape in source.shapes().items()}


def _size(dtype: torch.dtype | str) -> int:
    """Bytes of one stored number; a block format of GGUF has no whole number and is not mapped."""
    return 0 if isinstance(dtype, str) else dtype.itemsize


def _mapped(case: Case, source: FileSource, on_cpu: bool | None = None) -> set[str]:
    """Names of the weights that stay mapped to their file."""
    on_cpu = case.device.type == "cpu" if on_cpu is None else on_cpu
    return source.mapped(case.dtype) if on_cpu else set()


# The words to type, and the case with them.
Lever = tuple[str, Case]


def ways(case: Case) -> list[str]:
    """The first combinations of options with which the case fits, as they are typed; at most three.

    They come in this order: the text encoder elsewhere, a smaller precision, FP8 attention, the preset of low_memory, a
    smaller window, a smaller picture. One that does not suffice stays for the next ones.
    """
    found: list[str] = []
    options: list[str] = []
    for levers in (_encoders, _precisions, _attention, _low_memory, _windows, _sizes):
        tried = list(levers(case))
        fitting = next((words for words, changed in tried if _plan(changed).fits()), None)
        if fitting is not None:
            found.append(" ".join([*options, fitting]))
        elif tried and levers not in (_windows, _sizes):
            words, case = tried[-1]
            options.append(words)
        if len(found) == 3:
            break
    return found


def _with(case: Case, **changes: object) -> Case:
    return replace(case, runtime=replace(case.runtime, **changes))  # type: ignore[arg-type]


def _encoders(case: Case) -> Iterator[Lever]:
    if case.encoder == "kept":
        places: tuple[Place, ...] = ("cpu", "release") if case.device.type != "cpu" else ("release",)
        for place in places:
            changed = replace(_with(case, text_encoder_device=place), encoder=place)
            yield f"--text-encoder-device {place}", changed


def _precisions(case: Case) -> Iterator[Lever]:
    if case.device.type == "cpu":
        if case.dtype == torch.float32 and not case.quantizes:
            yield "--precision bf16", _with(case, precision="bf16")
    elif not case.quantizes and not case.runtime.eager and _runs_fp8(case):
        yield "--precision fp8", _with(case, precision="fp8")


def _attention(case: Case) -> Iterator[Lever]:
    able = case.device.type != "cpu" and not case.runtime.eager and case.dtype == torch.bfloat16 and _runs_fp8(case)
    able = able and case.preset.local_heads is None
    if able and not case.runtime.fp8_attention:
        yield "--fp8-attention", _with(case, fp8_attention=True)


def _low_memory(case: Case) -> Iterator[Lever]:
    if not case.runtime.low_memory:
        yield "--low-memory", _with(case, low_memory=True)


def _windows(case: Case) -> Iterator[Lever]:
    """The largest window that fits, if there is one."""
    preset = case.preset

    def smaller(window: int) -> Case | None:
        changed = replace(preset, window=window)
        try:
            family_of(changed).check(changed)
        except ValueError:
            return None
        return replace(case, preset=changed)

    def fits(window: int) -> bool:
        return (changed := smaller(window)) is None or _plan(changed).fits()  # the ones too small come last

    windows = range(preset.window - preset.chunk, 0, -preset.chunk)
    at = bisect_left(windows, True, key=fits)
    if at < len(windows) and (changed := smaller(windows[at])) is not None:
        yield f"--window {windows[at]}", changed


def _sizes(case: Case) -> Iterator[Lever]:
    """Smaller pictures of about the same shape, the largest first."""
    config, scale = case.parts.config, case.parts.vae_config.scale_factor_spatial
    down, across = scale * config.patch_size[1], scale * config.patch_size[2]
    for height in range(case.height - down, 0, -down):
        width = max(1, round(case.width * height / case.height / across)) * across
        yield f"--height {height} --width {width}", replace(case, height=height, width=width)


def _runs_fp8(case: Case) -> bool:
    try:
        check_fp8(case.device)
    except ValueError:
        return False
    return True
