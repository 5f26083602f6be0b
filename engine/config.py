"""Everything that can be chosen, as frozen dataclasses: the transformer's shape and the streaming preset."""

import tomllib
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

FAMILIES = ("greedy", "causal")
SOLVERS = ("renoise", "euler", "unipc")
COMMITS = ("clean", "noisy", "none")


def _known(cls: type, given: dict[str, Any], what: str) -> None:
    names = [field.name for field in fields(cls)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{what}: got unknown key {', '.join(unknown)}, expected one of {', '.join(names)}")


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
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise ValueError(f"transformer: got patch_size {self.patch_size}, expected (1, height, width)")
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"transformer: got qk_norm {self.qk_norm!r}, expected 'rms_norm_across_heads'")
        sizes = (*self.patch_size, self.num_attention_heads, self.in_channels, self.out_channels, self.text_dim)
        if min(*sizes, self.freq_dim, self.ffn_dim, self.num_layers) < 1 or not self.eps > 0:
            raise ValueError(f"transformer: got {self}, expected positive sizes")
        if self.attention_head_dim % 2 or self.attention_head_dim < 8:
            raise ValueError(f"transformer: got attention_head_dim {self.attention_head_dim}, "
                             "expected an even number of at least 8")  # fmt: skip

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "TransformerConfig":
        """From the contents of transformer/config.json; image-conditioned variants are refused."""
        given = {key: value for key, value in given.items() if not key.startswith("_")}
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if given.pop(key, None) is not None:
                raise ValueError(f"transformer: got {key}, expected a text-to-video model without it")
        given.pop("rope_max_seq_len", None)  # positions are computed, not looked up
        _known(cls, given, "transformer")
        return cls(**{name: _typed(name, value, getattr(cls, name)) for name, value in given.items()})


@dataclass(frozen=True)
class Preset:
    """How a stream is generated. Lengths are in latent frames unless they say chunks.

    family        greedy: ETM + SDD (Greedy Distill); causal: one causal DiT (Self-Forcing and relatives)
    chunk         latent frames a chunk
    first_chunk   latent frames of chunk 0; 0 means `chunk`
    window        greedy: chunks before the current one that the ETM sees (w of Eq. 1);
                  causal: frames kept, the current chunk included
    attn_sink     causal: first frames that are never evicted
    max_position  greedy: largest temporal position of the SDD (longest distance seen in training)
    steps         timesteps in [0, 1000] for chunk 0, chunk 1, ..., the rest
    warped        steps index the shifted grid (750 -> 937.5 at shift 5) instead of being timesteps
    shift         shift of the noise schedule
    solver        renoise (predict x0, add fresh noise), euler, unipc
    commit        what later chunks see of a finished one: clean (a pass at context_timestep),
                  noisy (keys and values of the last denoising call), none
    stop_after    leave every chunk's loop after this many steps; 0 means all (step-unified students)
    """

    family: str
    chunk: int = 1
    first_chunk: int = 0
    window: int = 3
    attn_sink: int = 0
    max_position: int = 20
    steps: tuple[tuple[float, ...], ...] = ((1000, 750, 500, 250),)
    warped: bool = True
    shift: float = 5.0
    solver: str = "renoise"
    commit: str = "clean"
    context_timestep: float = 0.0
    stop_after: int = 0

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"preset: got {name} {getattr(self, name)!r}, expected {expected}")

        for name, kind in (("family", FAMILIES), ("solver", SOLVERS), ("commit", COMMITS)):
            check(name, getattr(self, name) in kind, "one of " + ", ".join(kind))
        check("chunk", self.chunk >= 1, "at least 1")
        check("first_chunk", 0 <= self.first_chunk <= self.chunk, f"0 to chunk ({self.chunk})")
        check("shift", self.shift > 0, "a positive number")
        check("stop_after", self.stop_after >= 0, "0 or a number of steps")
        check("context_timestep", 0 <= self.context_timestep <= 1000, "0 to 1000")
        check("steps", bool(self.steps) and all(self.steps), "at least one timestep for every chunk")
        for steps in self.steps:
            falling = all(a > b for a, b in pairwise(steps))
            check("steps", falling and steps[-1] > 0 and steps[0] <= 1000, "falling numbers in (0, 1000]")
            whole = all(float(step).is_integer() for step in steps)
            check("steps", whole or not self.warped, "whole numbers where warped")
        if self.family == "greedy":
            check("window", self.window >= 0, "0 or more chunks")
            check("max_position", self.max_position >= 2 * self.chunk, "at least two chunks")
            check("commit", self.commit == "clean", "clean for the greedy family")
            check("first_chunk", self.first_chunk in (0, self.chunk), "0 for the greedy family")
        else:
            check("attn_sink", self.attn_sink >= 0, "0 or more frames")
            least = self.attn_sink + self.chunk
            check("window", self.window >= least, f"at least attn_sink + chunk ({least})")

    def chunk_frames(self, index: int) -> int:
        """Latent frames of chunk `index`."""
        return self.first_chunk if index == 0 and self.first_chunk else self.chunk


_FOUR = (1000.0, 750.0, 500.0, 250.0)
# Latent frames that the public self-forcing models were trained on; beyond them the window slides.
_TRAINED = 21

PRESETS: dict[str, Preset] = {
    "greedy": Preset("greedy", solver="unipc"),
    "self-forcing": Preset("causal", chunk=3, window=_TRAINED),
    "self-forcing-framewise": Preset("causal", chunk=1, window=_TRAINED),
    "causvid": Preset(
        "causal", chunk=3, window=_TRAINED, steps=((1000, 757, 522),), warped=False, shift=8.0
    ),
    "longlive": Preset("causal", chunk=3, window=12, attn_sink=3),
    "ffe-1step": Preset("causal", chunk=1, window=_TRAINED, steps=(_FOUR, (1000,))),
    "ffe-2step": Preset("causal", chunk=1, window=_TRAINED, steps=(_FOUR, (1000, 500))),
    "diagonal": Preset(
        "causal", chunk=3, window=12, attn_sink=3, commit="noisy", warped=False,
        steps=((1000, 933, 733, 357), (1000, 933, 357), (1000, 357.142857)),
    ),
}  # fmt: skip


def parse_steps(text: str) -> tuple[tuple[float, ...], ...]:
    """'1000,750,500,250' or, chunk by chunk, '1000,750,500,250/1000,500'."""
    try:
        return tuple(tuple(float(step) for step in part.split(",")) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"steps: got {text!r}, expected numbers as in 1000,500 or 1000,750,500,250/1000") from None


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not all(type(item) in (int, float) for item in value):
        raise ValueError(f"{name}: got {value!r}, expected numbers")
    return tuple(float(item) for item in value)


def _typed(name: str, value: Any, default: Any) -> Any:
    """A TOML, JSON or command-line value as its field's own type."""
    if name == "steps":
        if isinstance(value, str):
            return parse_steps(value)
        rows = value if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else [value]
        return tuple(_numbers(name, row) for row in rows)
    if name == "patch_size":
        return tuple(int(item) for item in _numbers(name, value))
    kind = type(default)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}: got {value!r}, expected {kind.__name__}")
    return value


def override(preset: Preset, given: dict[str, Any]) -> Preset:
    """A preset with some fields replaced; unknown keys and wrong types raise ValueError."""
    _known(Preset, given, "preset")
    typed = {name: _typed(name, value, getattr(preset, name)) for name, value in given.items()}
    return replace(preset, **typed)


def find_preset(name: str, overrides: dict[str, Any] | None = None) -> Preset:
    """A built-in preset by name, or the file NAME.toml with `base = "greedy"` and fields to replace."""
    overrides = overrides or {}
    if not name.endswith(".toml"):
        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, expected a .toml file or one of {', '.join(PRESETS)}")
        return override(PRESETS[name], overrides)
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"preset: got {name}, expected an existing file")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"preset: got {name}, expected TOML ({error})") from None
    base = given.pop("base", "greedy")
    if base not in PRESETS:
        raise ValueError(f"{name}: got base {base!r}, expected one of {', '.join(PRESETS)}")
    # All at once: a window may only be valid together with the sink given beside it.
    return override(PRESETS[base], given | overrides)
