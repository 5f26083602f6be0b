"""Presets by name, TOML files that override them, and the checks that depend on families and solvers."""

from pathlib import Path
from typing import Any

from engine.config import Preset
from engine.generators import family_of
from engine.options import read_toml, replaced
from engine.sampling.solvers import SOLVERS
from engine.weights.sources import STATES

_FOUR = (1000.0, 750.0, 500.0, 250.0)
# Latent frames per training video of the public self-forcing models. Longer streams slide the window.
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
    "causal-forcing": Preset("causal", chunk=3, window=_TRAINED),
    "krea-realtime": Preset("causal", chunk=3, window=6, steps=((1000, 937, 833, 625),), warped=False),
}  # fmt: skip
# Published for the plain weights of their training, where others are for the moving average (generator_ema).
_PLAIN_STATE = ("causvid", "longlive", "causal-forcing", "krea-realtime")
# Width of the transformers that a preset's weights were published for, where it is not 1536 (Wan2.1-1.3B).
_WIDTHS = {"krea-realtime": 5120}


def presets_for(width: int) -> list[str]:
    """The presets whose weights were published for transformers of that width; all where none were.

    greedy is not among them: a checkpoint alone holds one of its two transformers.
    """
    causal = [name for name, preset in PRESETS.items() if preset.family == "causal"]
    return [name for name in causal if _WIDTHS.get(name, 1536) == width] or causal


def states_of(name: str) -> tuple[str, ...]:
    """States of a training checkpoint, the one first that the preset's weights were published for."""
    if name.endswith(".toml"):
        name = str(read_toml(Path(name)).get("base", "greedy"))
    first, second, *rest = STATES
    return (second, first, *rest) if name in _PLAIN_STATE else STATES


def check_preset(preset: Preset) -> Preset:
    """Return the preset. ValueError if its family or solver is unknown, or its family does not support a field."""
    preset.expect("solver", preset.solver in SOLVERS, "one of " + ", ".join(SOLVERS))
    family_of(preset).check(preset)
    return preset


def override(preset: Preset, values: dict[str, Any]) -> Preset:
    """Replace some fields of a preset. ValueError for unknown keys and wrong values."""
    # Replace all at once: a window may be valid only with a new attn_sink.
    return check_preset(replaced(preset, values, "preset"))


def find_preset(name: str, overrides: dict[str, Any] | None = None) -> Preset:
    """A built-in preset by name, or from a file NAME.toml with `base = "greedy"` and fields to replace."""
    overrides = overrides or {}
    if not name.endswith(".toml"):
        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, expected a .toml file or one of {', '.join(PRESETS)}")
        return override(PRESETS[name], overrides)
    values = read_toml(Path(name))
    base = values.pop("base", "greedy")
    if not isinstance(base, str) or base not in PRESETS:
        raise ValueError(f"{name}: got base {base!r}, expected one of {', '.join(PRESETS)}")
    return override(PRESETS[base], values | overrides)
