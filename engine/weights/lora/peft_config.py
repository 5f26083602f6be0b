"""adapter_config.json of PEFT (diffusers writes the same into a file's metadata): what it says about each module."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from engine.options import shown
from engine.weights.checkpoint import shorten
from engine.weights.lora.patterns import Pattern

MOST = 1 << 20  # of a rank or an alpha
MOST_ENTRIES = 4096  # of rank_pattern, target_modules and the like

# What the configuration may hold. Entries that are not listed must be unset (null, false, empty).
_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core", None, ""),  # a module that PEFT imports
}
_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_WITHOUT_EFFECT = {  # on a merge
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip


class PeftConfig:
    """Rank and scale of each module. ValueError for what is no plain LoRA, DoRA or LoRA with bias."""

    def __init__(self, raw: Mapping[str, Any], label: str) -> None:
        self._raw, self._label = raw, label
        for key, values in _VALUES.items():
            if not any(raw.get(key, values[0]) is value or raw.get(key, values[0]) == value for value in values):
                raise self._error(f"{key} {shown(raw[key])}", " or ".join(map(repr, values)))
        others = raw.keys() - _VALUES.keys() - _READ - _WITHOUT_EFFECT
        if unread := sorted(key for key in others if raw[key]):
            name = unread[0][:60] if unread[0].isprintable() else ascii(unread[0][:60])
            raise self._error(f"{name} {shown(str(raw[unread[0]]))}", "it unset")
        self._targets, self._excluded = self._names("target_modules"), self._names("exclude_modules")
        self._ranks, self._alphas = self._patterns("rank_pattern", _rank), self._patterns("alpha_pattern", _positive)
        for key, fits, expected in (
            ("r", _rank, "a positive whole number"),
            ("lora_alpha", _positive, "a positive number"),
        ):
            if not fits(raw.get(key)):
                raise self._error(f"{key} {shown(raw.get(key))}", f"{expected} up to {MOST}")

    def rank(self, name: str) -> int:
        """The rank of a module; `name` is the one that PEFT knows it by."""
        return int(_by_pattern(self._ranks, name, self._raw["r"]))

    def scale(self, name: str) -> float:
        """The factor of a module's product."""
        rank = self.rank(name)
        alpha = _by_pattern(self._alphas, name, self._raw["lora_alpha"])
        return float(alpha / (rank**0.5 if self._raw.get("use_rslora") else rank))

    def parts(self) -> set[str]:
        """What a module must have beside its two matrices."""
        return {part for part, key in (("magnitude", "use_dora"), ("bias", "lora_bias")) if self._raw.get(key)}

    def problem(self, found: Iterable[str], modules: Iterable[str]) -> str | None:
        """How the file's modules differ from those that the configuration names among the model's modules, if so.

        PEFT itself leaves out what a file lacks, without a word. A choice by layers is not checked.
        """
        if self._raw.get("layers_to_transform") is not None or self._targets is None:
            return None
        wanted = {n for n in modules if _named(self._targets, n) and not _named(self._excluded or [], n)}
        got = set(found)
        if missing := sorted(wanted - got):
            return f"got no weights of {shorten(missing)}, expected all of target_modules"
        if extra := sorted(got - wanted):
            return f"got weights of {shorten(extra)}, expected those of target_modules alone"
        return None

    def _names(self, key: str) -> Pattern | list[str] | None:
        """A choice of modules: a regular expression of the whole name, or names. None for all of them, and for none."""
        value = self._raw.get(key)
        if value in (None, "all-linear", ""):
            return None
        if isinstance(value, str):
            return self._pattern(key, value)
        if not isinstance(value, list) or len(value) > MOST_ENTRIES or not all(isinstance(one, str) for one in value):
            raise self._error(f"{key} {shown(value)}", f"a regular expression or up to {MOST_ENTRIES} names")
        return value

    def _patterns(self, key: str, fits: Callable[[Any], bool]) -> list[tuple[Pattern, float]]:
        patterns = self._raw.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > MOST_ENTRIES or not all(map(fits, patterns.values())):
            raise self._error(f"{key} {shown(patterns)}", f"up to {MOST_ENTRIES} positive numbers up to {MOST} by name")
        return [(self._pattern(key, pattern), value) for pattern, value in patterns.items()]

    def _pattern(self, key: str, text: str) -> Pattern:
        try:
            return Pattern(text)
        except ValueError as error:
            raise self._error(f"{key} {text[:60]!r} ({error})", "a regular expression without look-around") from None

    def _error(self, got: str, expected: str) -> ValueError:
        return ValueError(f"{self._label}: got {got}, expected {expected}")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST


def _rank(value: Any) -> bool:
    return _positive(value) and value == int(value)


def _by_pattern(patterns: Sequence[tuple[Pattern, float]], name: str, otherwise: float) -> float:
    """PEFT's rule: the first pattern that matches whole dotted parts at the name's end."""
    return next((value for pattern, value in patterns if pattern.matches_end(name)), otherwise)


def _named(targets: Pattern | list[str], name: str) -> bool:
    """PEFT's rule: a pattern is for the whole name; a list holds whole dotted suffixes."""
    if isinstance(targets, Pattern):
        return targets.matches(name)
    return any(name == target or name.endswith(f".{target}") for target in targets)
