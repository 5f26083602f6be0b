"""Adapters of a pipeline: which file at which strength under which name; and those that belong to a model."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import TransformerConfig
from engine.files import read_json
from engine.model.transformer import WanTransformer
from engine.weights.checkpoint import check_tensors
from engine.weights.containers import open_container
from engine.weights.formats.tensors import expect_floating
from engine.weights.lora.form import read_lora
from engine.weights.lora.merge import Adapters, check_strength, merge_into

_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|infinity|nan)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """A LoRA file or PEFT folder, and its strength; the name is the file's stem or the folder's name.

    ValueError unless the strength is finite.
    """

    path: Path
    strength: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        path = Path(self.path)
        object.__setattr__(self, "path", path)
        if not self.name:
            whole = Path(os.path.abspath(path))  # a link keeps its own name
            object.__setattr__(self, "name", whole.name if path.is_dir() else whole.stem)

    @classmethod
    def of(cls, value: "AdapterLike") -> "Adapter":
        """From a path, a text PATH or PATH:STRENGTH, a pair of both, or an Adapter.

        A text that is an existing path is that path, whatever colons are in it.
        """
        if isinstance(value, Adapter):
            return value
        if isinstance(value, tuple):
            if len(value) != 2:
                raise ValueError(f"adapter: got {len(value)} values, expected a path and a strength")
            return cls(Path(value[0]), value[1])
        text = str(value)
        path, colon, number = text.rpartition(":")
        if colon and path and _NUMBER.fullmatch(number) and not Path(text).exists():
            return cls(Path(path), float(number))
        return cls(Path(text))


AdapterLike = str | Path | tuple[str | Path, float] | Adapter


def read_adapters(
    values: Sequence[AdapterLike], base_files: list[Path], config: TransformerConfig
) -> Adapters | None:  # fmt: skip
    """Read adapters for transformers of a shape, as `engine.load` takes them; None if there are none.

    Raises FileNotFoundError, or ValueError for two of one name, an unreadable file, another base or another shape.
    """
    if isinstance(values, str | Path | Adapter):
        raise ValueError(f"adapters: got {values!r}, expected a list")
    chosen = [Adapter.of(value) for value in values]
    names = [adapter.name for adapter in chosen]
    if twice := [adapter for adapter in chosen if names.count(adapter.name) > 1]:
        paths = " and ".join(str(adapter.path) for adapter in twice[:2])
        raise ValueError(f"adapter: got the name {twice[0].name!r} for {paths}, expected different names "
                         "(Adapter(path, strength, name) gives one)")  # fmt: skip
    loras = {}
    for adapter in chosen:
        loras[adapter.name] = read_lora(adapter.path)
        loras[adapter.name].fit(_shapes(config))
        check_base(adapter.path, base_files)
        if (condition := adapter.path / "condition.safetensors").is_file():
            raise ValueError(f"{condition}: got condition weights, expected none for an adapter of every transformer")
    return Adapters(loras, {adapter.name: float(adapter.strength) for adapter in chosen}) if loras else None


def base_hash(files: Iterable[Path]) -> str:
    """sha256 over the contents of a base's weight files, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_base(path: Path, base_files: list[Path]) -> None:
    """ValueError if base.json in a folder names another base (`base_sha256`) than these files."""
    if (path / "base.json").is_file():
        expected, got = read_json(path / "base.json").get("base_sha256"), base_hash(base_files)
        if got != expected:
            raise ValueError(f"adapter {path}: got a base with sha256 {got[:12]}, expected {str(expected)[:12]}")


def merge_adapter(model: WanTransformer, path: Path, base_files: list[Path]) -> list[str]:
    """Merge an adapter that belongs to a model, in place and for good; its condition.safetensors becomes W_c.

    Returns notes about what was skipped. Raises FileNotFoundError for a missing file, ValueError for another base or
    weights that do not fit.
    """
    lora = read_lora(path)
    check_base(path, base_files)
    merge_into(model, [(lora, 1.0)])
    model.requires_grad_(False)
    condition = path / "condition.safetensors"
    if condition.is_file():
        if model.condition_proj is None:
            raise ValueError(f"{condition}: got condition weights, expected none for this model")
        source, weight = open_container(condition), model.condition_proj.weight
        shapes = {name: stored.shape for name, stored in source.tensors.items()}
        check_tensors(condition, shapes, {"condition_proj.weight": weight})
        for key, stored in source.tensors.items():
            expect_floating(condition, key, stored)
        for name, tensor in source.read(shapes):
            model.load_state_dict({name: tensor.to(weight)}, strict=False)
    return list(lora.notes)


@dataclass(frozen=True)
class Description:
    """A summary of an adapter.

    layout      "PEFT folder" or "file"
    spelling    prefixes and parts as the file writes them
    parameters  number of parameters that it changes
    ranks       the different ranks, rising; empty if it has differences alone
    width       of the transformer that it was made for; None if nothing tells
    blocks      the least number of blocks of that transformer
    notes       what is skipped
    problem     why it does not fit the transformer that was asked about; None if it fits, or none was
    """

    layout: str
    spelling: tuple[str, ...]
    parameters: int
    ranks: tuple[int, ...]
    width: int | None
    blocks: int
    notes: tuple[str, ...]
    problem: str | None = None


def describe(path: Path, config: TransformerConfig | None = None) -> Description:
    """Summarise an adapter, and say whether it fits a transformer. Errors as `read_lora`."""
    lora = read_lora(path)
    problem = None if config is None else lora.problem(_shapes(config))
    layout = "PEFT folder" if lora.peft is not None else "file"
    return Description(
        layout, lora.spelling, len(lora.changes), lora.ranks, lora.width, lora.blocks, lora.notes, problem
    )  # fmt: skip


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a transformer."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in WanTransformer(config).named_parameters()}
