"""LoRA files and PEFT folders in one normal form: the change of each parameter of a transformer.

Nothing is dropped without a word: a key has a meaning, is skipped with
a note, or is refused by name.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.options import shown
from engine.weights.checkpoint import shorten
from engine.weights.lora.files import read_adapter
from engine.weights.lora.keys import Key, parse, wan_name
from engine.weights.lora.peft_config import PeftConfig

_MOST_ALPHA = 1e30  # float32 holds it


@dataclass(frozen=True)
class Change:
    """What an adapter does to one parameter W [out, ...], at strength s.

    W + s scale B A + s diff_scale diff; with a magnitude m [out] (PEFT's DoRA) m (W + s scale B A) / norm of its rows.
    """

    down: Tensor | None = None  # A [rank, in], of a convolution [rank, in, t, h, w]
    up: Tensor | None = None  # B [out, rank], of a convolution [out, rank, 1, 1, 1]
    scale: float = 1.0
    magnitude: Tensor | None = None
    diff: Tensor | None = None
    diff_scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.down is None else len(self.down)


@dataclass(frozen=True)
class LoRA:
    """An adapter: changes by parameter, in diffusers' names.

    spelling  prefix and parts as the file writes them
    notes     what was skipped, in words
    peft      the configuration of a PEFT folder: the modules must be those that it names
    raws      the modules with a product, and the names by which PEFT knows them
    """

    path: Path
    changes: dict[str, Change]
    spelling: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    peft: PeftConfig | None = None
    raws: dict[str, str] = field(default_factory=dict)

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError unless every change fits a parameter of these shapes (got and expected)."""
        if problem := self.problem(shapes):
            raise ValueError(f"adapter {self.path}: {problem}")

    def problem(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Why the adapter does not fit a transformer with these parameters; None if it fits."""
        width, blocks = self.width, self.blocks
        of_model = LoRA(self.path, {name: Change(diff=torch.empty(shape, device="meta"))
                                    for name, shape in shapes.items()})  # fmt: skip
        if width and width != of_model.width:
            return f"got LoRA of a transformer of width {width}, expected width {of_model.width}"
        if blocks > of_model.blocks:
            return f"got LoRA of a transformer of {blocks} blocks, expected {of_model.blocks}"
        if unknown := [name for name in self.changes if name not in shapes]:
            return f"got LoRA of {shorten(unknown)}, expected parts of this transformer"
        for name, change in self.changes.items():
            shape = shapes[name]
            if change.rank > (largest := max(shape[0], prod(shape[1:]))):
                return f"got rank {change.rank} of {name}, expected at most {largest}, the layer's larger side"
            for what, got, expected in _shapes(change, shape):
                if got != expected:
                    return f"got {what} of {name} {list(got)}, expected {list(expected)}"
        return None if self.peft is None else self.peft.problem(self.raws.values(), self._targets(shapes))

    def _targets(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every module with a matrix, as the adapter spells its own: in Wan's names or diffusers', behind a prefix."""
        modules = [name.removesuffix(".weight") for name, s in shapes.items() if name.endswith("weight") and len(s) > 1]
        theirs = any(not raw.endswith(name) for name, raw in self.raws.items())
        spelled = wan_name if theirs else str
        prefix = next((raw.removesuffix(spelled(name)) for name, raw in self.raws.items()), "")
        return [prefix + spelled(name) for name in modules]

    @property
    def width(self) -> int | None:
        """Width of the transformer that it was made for; None if no change tells."""
        return next((width for name, change in self.changes.items() if (width := _width(name, change))), None)

    @property
    def blocks(self) -> int:
        """The least number of blocks of a transformer that it fits."""
        numbers = [name.split(".")[1] for name in self.changes if name.startswith("blocks.")]
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, rising."""
        return tuple(sorted({change.rank for change in self.changes.values()} - {0}))


def read_lora(path: Path) -> LoRA:
    """Read a PEFT folder or a LoRA file of any spelling. FileNotFoundError, or ValueError (got and expected)."""
    tensors, peft, folder, about = read_adapter(path)
    modules, notes, spelling = _by_module(path, tensors)
    notes = about + notes
    changes: dict[str, Change] = {}
    for name, (raw, parts) in modules.items():
        for parameter, change in _changes(path, name, raw, parts, peft):
            if parameter in changes:
                raise ValueError(f"adapter {path}: got two changes of {parameter}, expected one")
            changes[parameter] = change
    if not changes:
        raise ValueError(f"adapter {path}: got no LoRA of a transformer ({'; '.join(notes) or 'empty'}), expected some")
    raws = {name: raw for name, (raw, parts) in modules.items() if "down" in parts}
    return LoRA(path, changes, spelling, tuple(notes), peft if folder else None, raws)


def _by_module(
    path: Path, tensors: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, dict[str, Tensor]]], list[str], tuple[str, ...]]:
    """Parts by module, with the module's raw name; notes about skipped keys; the file's spelling."""
    modules: dict[str, tuple[str, dict[str, Tensor]]] = {}
    skipped: dict[str, list[str]] = {}
    spelling: Counter[str] = Counter()
    for key, value in tensors.items():
        try:
            meaning = parse(key)
        except ValueError as error:
            raise ValueError(f"adapter {path}: {error}") from None
        if meaning.skipped:
            skipped.setdefault(meaning.skipped, []).append(key)
            continue
        tensor = _number(path, key, meaning, value)
        _, parts = modules.setdefault(meaning.module, (meaning.raw, {}))
        if meaning.part in parts:
            raise ValueError(f"adapter {path}: got {key} and another spelling of it, expected every tensor once")
        parts[meaning.part] = tensor
        spelling.update(meaning.spelling)
    notes = [f"adapter {path}: skipped {len(keys)} tensors of {what} ({shorten(keys)})"
             for what, keys in skipped.items()]  # fmt: skip
    return modules, notes, tuple(word for word in spelling if word)


def _number(path: Path, key: str, meaning: Key, value: Any) -> Tensor:
    """The value as a tensor of numbers."""
    if meaning.part == "alpha":
        if isinstance(value, int | float) and not isinstance(value, bool) and -_MOST_ALPHA <= value <= _MOST_ALPHA:
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite().all():
            got = str(value)[:40] if isinstance(value, Tensor) else shown(value)
            raise ValueError(f"adapter {path}: got {key} {got}, expected one finite number")
        return value
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"adapter {path}: got {key} of {kind}, expected floating-point numbers")
    return value


def _changes(
    path: Path, module: str, raw: str, parts: Mapping[str, Tensor], peft: PeftConfig | None
) -> Iterator[tuple[str, Change]]:
    """The changes of a module's parameters. ValueError for half a pair or ranks that differ."""
    if "table" in parts:
        yield module, Change(diff=parts["table"])
    expected = {"down", "up"} if parts.keys() & {"down", "up", "magnitude", "bias", "alpha"} else set()
    if missing := expected - parts.keys():
        half = f"{', '.join(sorted(parts.keys()))} without {' and '.join(sorted(missing))} of {module}"
        raise ValueError(f"adapter {path}: got {half}, expected both matrices")
    down, up = parts.get("down"), parts.get("up")
    scale = 1.0
    if down is not None and up is not None:
        if down.ndim < 2 or up.ndim < 2 or not len(down) or up.shape[1] != len(down):
            shapes = f"A {list(down.shape)} and B {list(up.shape)}"
            raise ValueError(f"adapter {path}: got {shapes} of {module}, expected one rank")
        if peft is not None:
            if peft.rank(raw) != len(down):
                raise ValueError(f"adapter {path}: got rank {len(down)} of {module}, expected {peft.rank(raw)}")
            if wanted := peft.parts() - parts.keys():
                raise ValueError(f"adapter {path}: got no {' and '.join(sorted(wanted))} of {module}, expected it")
            scale = peft.scale(raw)
        if "alpha" in parts:
            scale = float(parts["alpha"]) / len(down)
    if down is not None or "diff" in parts:
        yield f"{module}.weight", Change(down, up, scale, parts.get("magnitude"), parts.get("diff"))
    if "bias" in parts and "diff_b" in parts:
        raise ValueError(f"adapter {path}: got two changes of {module}.bias, expected one")
    if "bias" in parts:
        yield f"{module}.bias", Change(diff=parts["bias"], diff_scale=scale)
    if "diff_b" in parts:
        yield f"{module}.bias", Change(diff=parts["diff_b"])


def _width(name: str, change: Change) -> int | None:
    """The width of the transformer as far as one change tells."""
    side = change.down.shape[1] if change.down is not None else None
    out = change.up.shape[0] if change.up is not None else None
    last = change.diff.shape[-1] if change.diff is not None and change.diff.ndim else None
    if ".attn" in name or name.endswith(("scale_shift_table", ".ffn.net.0.proj.weight", "time_proj.weight")):
        return side or last
    if ".ffn.net.2." in name:
        return out or (last if name.endswith("bias") else None)
    return None


def _shapes(change: Change, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Got and expected shape of each tensor of a change."""
    if change.down is not None and change.up is not None:
        yield "A", tuple(change.down.shape), (change.rank, *shape[1:])
        yield "B", tuple(change.up.shape), (shape[0], change.rank, *(1 for _ in shape[2:]))
    if change.magnitude is not None:
        yield "a magnitude", (change.magnitude.numel(),), shape[:1]
    if change.diff is not None:
        yield "a difference", tuple(change.diff.shape), shape
