"""Configuration as frozen dataclasses: the transformer's shape, the streaming preset, and the runtime."""

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from engine.files import read_json
from engine.options import Convert, FieldError, option, read, real_number, shown, whole_number

Precision = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8"]
Commit = Literal["clean", "noisy", "none"]
Switch = Literal["auto", "on", "off"]
EncoderDevice = Literal["auto", "cuda", "cpu", "release"]
# The most that sizes, counts and lengths may be, as the C++ core has it: beyond that no machine runs a model.
MOST = 1 << 20
MOST_LAYERS = 1024
MOST_SHIFT = 1e3  # and its inverse the least: the grid is float32


def expect_field(what: str, values: object, name: str, ok: bool, expected: str) -> None:
    """Raise FieldError with the field's value and the expected one unless `ok`."""
    if not ok:
        got = shown(getattr(values, name))
        raise FieldError(f"{what}: got {name} {got}, expected {expected}", name, got, expected)


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Wan2.1 transformer, with the keys of diffusers' transformer/config.json."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self) -> None:
        high_wide = self.patch_size[1:]
        self.expect("patch_size", self.patch_size[0] == 1 and 1 <= min(high_wide) <= max(high_wide) <= MOST,
                    f"1, height, width up to {MOST}")  # fmt: skip
        for name in ("num_attention_heads", "in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim"):
            self.expect(name, 1 <= getattr(self, name) <= MOST, f"1 to {MOST}")
        self.expect("num_layers", 1 <= self.num_layers <= MOST_LAYERS, f"1 to {MOST_LAYERS}")
        head_dim = self.attention_head_dim
        self.expect("attention_head_dim", 8 <= head_dim <= MOST and head_dim % 2 == 0, f"an even number, 8 to {MOST}")
        self.expect("qk_norm", self.qk_norm == "rms_norm_across_heads", "'rms_norm_across_heads'")
        self.expect("eps", 0 < self.eps < 1, "a number between 0 and 1")

    def expect(self, name: str, ok: bool, expected: str) -> None:
        """Raise FieldError with the field's value and the expected one unless `ok`."""
        expect_field("transformer", self, name, ok, expected)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "TransformerConfig":
        """From the contents of transformer/config.json. ValueError if invalid, or for an image-conditioned variant."""
        values = {key: value for key, value in raw.items() if not key.startswith("_")}
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if values.pop(key, None) is not None:
                raise ValueError(f"transformer: got {key}, expected a text-to-video model without it")
        values.pop("rope_max_seq_len", None)  # rope.py computes any position, so no limit applies
        return read(cls, values, "transformer")


MOST_THREADS = 1024


@dataclass(frozen=True)
class Runtime:
    """Device, precision and threads that run a model. ValueError for a number of threads below 1 or above 1024."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: Precision = option(
        "auto", "auto is bf16 on a GPU, else fp32; fp8 puts the large products on e4m3 and is made for H100 and later; "
        "int8 puts them on integers and is made for processors",
    )  # fmt: skip
    fp8_attention: bool = option(False, "run self-attention on e4m3 as well")
    eager: bool = option(False, "run plain PyTorch on a GPU: no fused kernels, no CUDA graphs")
    join_context: Switch = option(
        "auto", "run a chunk's context pass together with the next chunk's first step: the same up to rounding, in "
        "one run less; auto is on with CUDA graphs",
    )  # fmt: skip
    text_encoder_device: EncoderDevice = option(
        "auto", "where prompts are encoded: cuda (beside the model), cpu, or release (beside the model, read again for "
        "every prompt and then let go); auto is beside the model if it fits, else cpu",
    )  # fmt: skip
    low_memory: bool = option(
        False, "need less memory and take longer: release the text encoder, decode before the next chunk is made, no "
        "CUDA graphs (docs/memory.md)",
    )  # fmt: skip
    threads: int | None = option(None, "CPU threads; default: OMP_NUM_THREADS, else by the model's size", metavar="N")

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            expected = "at least 1" if self.threads < 1 else f"at most {MOST_THREADS}"
            raise ValueError(f"threads: got {self.threads}, expected {expected}")


def parse_steps(text: str) -> tuple[tuple[float, ...], ...]:
    """Parse '1000,750,500,250' or, one row per chunk, '1000,750,500,250/1000,500'. ValueError for other texts."""
    try:
        return tuple(tuple(real_number(step.strip()) for step in part.split(",")) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"steps: got {text!r}, expected numbers as in 1000,500 or 1000,750,500,250/1000") from None


def _rows(value: Any) -> Any:
    """Steps as rows, one per chunk. Parses a text; turns a flat list into one row."""
    if isinstance(value, str):
        return parse_steps(value)
    if not isinstance(value, list | tuple):
        return value
    rows = value if any(isinstance(item, list | tuple) for item in value) else [value]
    return tuple(tuple(row) if isinstance(row, list) else row for row in rows)


Steps = Annotated[tuple[tuple[float, ...], ...], Convert(_rows)]


@dataclass(frozen=True)
class Reuse:
    """Denoising steps of every chunk at which only the first and the last blocks run.

    The blocks between them add what they added at the chunk's last full step. ValueError for an invalid field.
    """

    steps: tuple[int, ...] = option(help="steps, counted from 1; step 1 is always full")
    first: int = option(1, "blocks that run before those that are left out")
    last: int = option(1, "blocks that run after them")

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.steps))
        ok = bool(self.steps) and rising and 2 <= self.steps[0] <= self.steps[-1] <= MOST
        expect_field("reuse", self, "steps", ok, "rising step numbers from 2 on: step 1 is always full")
        for name in ("first", "last"):
            expect_field("reuse", self, name, 0 <= getattr(self, name) <= MOST_LAYERS, f"0 to {MOST_LAYERS}")

    def check(self, layers: int) -> None:
        """ValueError unless a transformer with so many layers has blocks to leave out."""
        if self.first + self.last >= layers:
            raise ValueError(f"reuse: got first {self.first} and last {self.last} of {layers} layers, "
                             "expected at least one between them")  # fmt: skip


def _reuse(value: Any) -> Any:
    """Parse '3', '2,4' and '3:1:1' (steps, first, last); 'none' is no reuse. Leaves other values as they are."""
    if not isinstance(value, str) or value == "none":
        return None if value == "none" else value
    steps, *rest = value.split(":")
    try:
        return Reuse(tuple(map(whole_number, steps.split(","))), *map(whole_number, rest))
    except FieldError:
        raise
    except (TypeError, ValueError):
        expected = "steps as in 3 or 2,4, also with the first and last blocks that run as in 3:1:1, or none"
        raise FieldError(f"reuse: got {value!r}, expected {expected}", "reuse", repr(value), expected) from None


@dataclass(frozen=True)
class LocalHeads:
    """The heads of self-attention that keep the keys of few frames; all others keep the preset's window.

    `python -m distill attention --heads FILE` measures which heads lose little by that (docs/heads.md).
    """

    window: int = option(help="latent frames that a local head keeps, the current chunk included")
    attn_sink: int = option(help="first latent frames that stay among them for good")
    layers: tuple[tuple[int, ...], ...] = option(help="numbers of the local heads of every layer")

    def __post_init__(self) -> None:
        self.expect("window", 1 <= self.window <= MOST, f"1 to {MOST}")
        self.expect("attn_sink", 0 <= self.attn_sink < self.window, f"0 to window - 1 ({self.window - 1})")
        self.expect("layers", 1 <= len(self.layers) <= MOST_LAYERS, f"1 to {MOST_LAYERS} layers")
        for heads in self.layers:
            rising = all(a < b for a, b in pairwise((-1, *heads)))
            self.expect("layers", rising, "rising numbers from 0 in every layer")

    def expect(self, name: str, ok: bool, expected: str) -> None:
        """Raise FieldError with the field's value and the expected one unless `ok`."""
        if not ok:
            got = shown(getattr(self, name))
            raise FieldError(f"heads: got {name} {got}, expected {expected}", f"heads.{name}", got, expected)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of local heads of every layer."""
        return tuple(map(len, self.layers))

    def fit(self, config: TransformerConfig) -> None:
        """FieldError unless the transformer has these layers and heads."""
        layers, heads = config.num_layers, config.num_attention_heads
        got = f"a table of {len(self.layers)} layers"
        fits = len(self.layers) == layers
        if fits and (numbers := [number for row in self.layers for number in row if number >= heads]):
            got, fits = f"head {numbers[0]}", False
        if fits and all(count == heads for count in self.counts):
            got, fits = "local heads alone", False
        if not fits:
            expected = f"one of {layers} layers of {heads} heads, numbered from 0, not all of them local"
            raise FieldError(f"heads: got {got}, expected {expected}", "heads.layers", got, expected)


def _head_table(value: Any) -> Any:
    """A head table from its fields, or from a JSON file that holds them; "none" is no table."""
    what = "heads"
    if value == "none":
        return None
    if isinstance(value, str | Path):
        what, value = str(value), read_json(Path(value))
    if not isinstance(value, dict):
        return value
    try:
        return read(LocalHeads, value, what)
    except FieldError as error:
        field = f"heads.{error.field.removeprefix('heads.')}".rstrip(".")
        raise FieldError(str(error), field, error.got, error.expected) from None


@dataclass(frozen=True)
class Preset:
    """How a stream is generated. Lengths count latent frames. ValueError for an invalid field.

    engine/presets.py checks the further rules of families and solvers.
    """

    family: str = option(help="greedy: ETM + SDD (Greedy Distill); causal: one causal DiT (Self-Forcing and relatives)")
    chunk: int = option(1, "latent frames per chunk")
    first_chunk: int = option(0, "latent frames of chunk 0; 0 means --chunk")
    window: int = option(4, "latent frames that attention keeps, the current chunk included (greedy: those of the ETM)")
    attn_sink: int = option(0, "causal: first latent frames that stay in the window for good")
    max_position: int = option(20, "greedy: largest temporal position of the SDD (longest distance in training)")
    steps: Steps = option(
        ((1000.0, 750.0, 500.0, 250.0),), "timesteps in (0, 1000] of chunk 0 / chunk 1 / ... / the rest",
        metavar="T,T,..[/T,..]",
    )  # fmt: skip
    warped: bool = option(True, "steps index the shifted grid (750 is 937.5 at shift 5) instead of being timesteps")
    shift: float = option(5.0, "shift of the noise schedule")
    solver: str = option("renoise", "renoise (predict x0, add fresh noise), euler or unipc")
    commit: Commit = option(
        "clean", "what later chunks see of a finished one: clean (a pass at --context-timestep), noisy (keys and "
        "values of the last denoising call) or none",
    )  # fmt: skip
    context_timestep: float = option(0.0, "timestep of the pass that commits a chunk")
    stop_after: int = option(0, "leave a chunk's loop after so many steps; 0 means all (step-unified students)")
    reuse: Annotated[Reuse | None, Convert(_reuse)] = option(
        None, "at these steps of every chunk run the first and the last blocks only (3 means 3:1:1), and reuse what "
        "the others added; none is the default (docs/experiments.md)", metavar="STEP,..[:FIRST:LAST]",
    )  # fmt: skip
    heads: Annotated[LocalHeads | None, Convert(_head_table)] = option(
        None, "causal: a table of the heads that keep few frames, or none (docs/heads.md)", metavar="FILE"
    )

    def __post_init__(self) -> None:
        self.expect("commit", self.commit in get_args(Commit), "one of " + ", ".join(get_args(Commit)))
        self.expect("chunk", 1 <= self.chunk <= MOST, f"1 to {MOST}")
        self.expect("first_chunk", 0 <= self.first_chunk <= self.chunk, f"0 to chunk ({self.chunk})")
        for name in ("window", "attn_sink", "max_position", "stop_after"):
            self.expect(name, 0 <= getattr(self, name) <= MOST, f"0 to {MOST}")
        self.expect("shift", 1 / MOST_SHIFT <= self.shift <= MOST_SHIFT, f"{1 / MOST_SHIFT:g} to {MOST_SHIFT:g}")
        self.expect("context_timestep", 0 <= self.context_timestep <= 1000, "0 to 1000")
        self.expect("steps", bool(self.steps) and all(self.steps), "at least one timestep for every chunk")
        for steps in self.steps:
            # A chunk begins as noise. A small first timestep is a count of steps, taken for a timestep.
            self.expect("steps", steps[0] >= 100, "timesteps that begin near 1000 (four steps: 1000,750,500,250)")
            falling = all(a > b for a, b in pairwise(steps))
            self.expect("steps", falling and steps[-1] > 0 and steps[0] <= 1000, "falling numbers in (0, 1000]")
            whole = all(float(step).is_integer() for step in steps)
            self.expect("steps", whole or not self.warped, "whole numbers where warped")
        if self.reuse is not None:
            self._check_reuse(self.reuse)

    def _check_reuse(self, reuse: Reuse) -> None:
        fewest = min(len(steps[: self.stop_after or None]) for steps in self.steps)
        if reuse.steps[-1] > fewest:
            raise FieldError(f"preset: got reuse at step {reuse.steps[-1]}, expected at most {fewest}, the fewest that "
                             "a chunk has", "reuse", str(reuse.steps[-1]), f"at most {fewest}")  # fmt: skip
        # Noisy keys and values are those of the last step, and a short one writes only those of its own blocks.
        self.expect("commit", self.commit != "noisy", "clean or none with reuse")

    def table(self) -> dict[str, Any]:
        """All fields as a manifest has them: without reuse and heads where there are none, as older ones have it."""
        values = asdict(self) | {"steps": [list(steps) for steps in self.steps]}
        values["heads"] = None if self.local_heads is None else asdict(self.local_heads)
        return {name: value for name, value in values.items() if value is not None or name not in ("reuse", "heads")}

    def expect(self, name: str, ok: bool, expected: str) -> None:
        """Raise FieldError with the field's value and the expected one unless `ok`."""
        expect_field("preset", self, name, ok, expected)

    @property
    def local_heads(self) -> LocalHeads | None:
        """The table of local heads, which keep no more frames than the others; None where it names none."""
        if self.heads is None or not any(self.heads.layers):
            return None
        return replace(self.heads, window=min(self.heads.window, self.window))

    def chunk_frames(self, index: int) -> int:
        """Latent frames of chunk `index`."""
        return self.first_chunk if index == 0 and self.first_chunk else self.chunk

    def pixel_frames(self, index: int, temporal: int) -> int:
        """Frames of chunk `index`, of `temporal` ones per latent frame after the first."""
        return self.chunk_frames(index) * temporal - (temporal - 1 if index == 0 else 0)
