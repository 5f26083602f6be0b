"""adapter_config.json of PEFT (diffusers writes the same into a file's metadata): what it says about each module."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from engine.weights.checkpoint import shorten

# What the configuration may hold. Entries that are not listed must be unset (null, false, empty).
_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}
_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_WITHOUT_EFFECT = {  # on a merge
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
}  # fmt: skip


class PeftConfig:
    """Rank and scale of each module. ValueError for what is no plain LoRA, DoRA or LoRA with bias."""

    def __init__(self, raw: Mapping[str, Any], label: str) -> None:
        self._raw, self._label = raw, label
        for key, values in _VALUES.items():
            if raw.get(key, values[0]) not in values:
                raise self._error(f"{key} {raw[key]!r}", " or ".join(map(repr, values)))
        others = raw.keys() - _VALUES.keys() - _READ - _WITHOUT_EFFECT
        if unread := sorted(key for key in others if raw[key]):
            raise self._error(f"{unread[0]} {str(raw[unread[0]])[:60]!r}", "it unset")
        for key in ("target_modules", "exclude_modules"):
            if isinstance(raw.get(key), str):
                self._compile(key, raw[key])
        self._ranks, self._alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")
        for key in ("r", "lora_alpha"):
            if not _positive(raw.get(key)):
                raise self._error(f"{key} {raw.get(key)!r}", "a positive number")

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
        targets, excluded = self._raw.get("target_modules"), self._raw.get("exclude_modules")
        if self._raw.get("layers_to_transform") is not None or targets in (None, "all-linear"):
            return None
        wanted = {n for n in modules if _named(targets, n) and not (excluded and _named(excluded, n))}
        got = set(found)
        if missing := sorted(wanted - got):
            return f"got no weights of {shorten(missing)}, expected all of target_modules"
        if extra := sorted(got - wanted):
            return f"got weights of {shorten(extra)}, expected those of target_modules alone"
        return None

    def _patterns(self, key: str) -> dict[str, float]:
        patterns = self._raw.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_positive, patterns.values())):
            raise self._error(f"{key} {patterns!r}", "positive numbers by name")
        for pattern in patterns:
            self._compile(key, pattern)
        return patterns

    def _compile(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise self._error(f"{key} {pattern!r} ({error})", "a regular expression") from None

    def _error(self, got: str, expected: str) -> ValueError:
        return ValueError(f"{self._label}: got {got}, expected {expected}")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _by_pattern(patterns: Mapping[str, float], name: str, otherwise: float) -> float:
    """PEFT's rule: the first pattern that matches whole dotted parts at the name's end."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _named(targets: str | list[str], name: str) -> bool:
    """PEFT's rule: a text is a regular expression of the whole name; a list holds whole dotted suffixes."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
