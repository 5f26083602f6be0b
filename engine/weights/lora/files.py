"""Opens LoRA files and PEFT folders: tensors by key, and the configuration that goes with them.

Contents decide what a file is, never its name. Pickles are opened with weights_only=True: no code in them runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.files import parse_json, read_json
from engine.weights.checkpoint import shorten
from engine.weights.containers import open_container
from engine.weights.formats.signatures import kind_of
from engine.weights.formats.tensors import dense_problem, expect_dense
from engine.weights.formats.torch_files import Leaf, is_tensor, leaves, load_torch
from engine.weights.lora.peft_config import PeftConfig
from engine.weights.lora.states import STATES, take_state
from engine.weights.names import is_adapter

_METADATA = "lora_adapter_metadata"  # where diffusers stores PEFT's configuration in a safetensors file
_FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")


class AdapterFile(NamedTuple):
    """What a LoRA file or a PEFT folder holds.

    tensors   tensors and numbers by key
    peft      PEFT's configuration, if there is one
    folder    whether it is a PEFT folder
    notes     about other states in the file
    """

    tensors: dict[str, Any]
    peft: PeftConfig | None
    folder: bool
    notes: list[str]


def read_adapter(path: Path) -> AdapterFile:
    """Open a LoRA file or a PEFT folder. FileNotFoundError, or ValueError (got and expected)."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"adapter: got {path}, expected a LoRA file or a PEFT folder")
        tensors, metadata, notes = read_tensors(path)
        stored = _stored_config(path, metadata)
        return AdapterFile(tensors, PeftConfig(stored, f"adapter {path}") if stored else None, False, notes)
    file = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"adapter: got {path} without {_FOLDER_FILES[0]}, expected a PEFT folder")
    if not file.name.startswith("adapter_model"):  # diffusers' save_lora_weights
        return read_adapter(file)
    if not (path / "adapter_config.json").is_file():
        raise FileNotFoundError(f"adapter: got {path} without adapter_config.json, expected a PEFT folder")
    config = read_json(path / "adapter_config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'adapter_config.json'}: got {type(config).__name__}, expected a table")
    peft = PeftConfig(config, f"adapter {path}")  # before the weights: it refuses what is no plain LoRA
    tensors, _, notes = read_tensors(file)
    others = sorted(place.parent.name for place in path.glob("*/adapter_config.json"))
    if others:  # libraries merge the text encoder's without a word
        notes.append(f"adapter {path}: {shorten(others)} is there and not used")
    return AdapterFile(tensors, peft, True, notes)


def read_tensors(file: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Tensors (and numbers) by key, the metadata of a safetensors file, and notes; torch checkpoints are mapped.

    A file may hold them in a state, such as generator_lora, however deep it is nested. ValueError for an unreadable
    file, and for a tensor that is not dense.
    """
    if kind_of(file) != "torch":
        container = open_container(file)
        chosen, notes = take_state(file, (Leaf(key, "", None) for key in container.tensors))
        keys = {leaf.name: key for key, leaf in chosen}
        for key in keys:
            expect_dense(file, key, container.tensors[key].problem)
        return {keys[key]: tensor for key, tensor in container.read(keys)}, container.metadata, notes
    loaded, _ = load_torch(file)
    # Some tools write alpha as a number; every other number or text, as a count of steps, belongs to the training.
    values = [leaf for leaf in leaves(loaded) if is_tensor(leaf.name, leaf.value) or "alpha" in leaf.name]
    chosen, notes = take_state(file, values)
    if not any(is_adapter([key]) or not leaf.folder for key, leaf in chosen):  # nothing in a state, nothing outside
        raise ValueError(f"{file}: got keys {shorten(list(map(str, loaded)))}, expected LoRA tensors, "
                         f"or one of {', '.join(filter(None, STATES))}")  # fmt: skip
    for _, leaf in chosen:
        if not isinstance(leaf.value, int | float) or is_adapter([leaf.name]):
            expect_dense(file, leaf.name, dense_problem(leaf.value))
    return {key: leaf.value for key, leaf in chosen}, {}, notes


def _stored_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's configuration of the transformer as diffusers writes it: plain, or each key with a part's name ahead."""
    if _METADATA not in metadata:
        return None
    try:
        stored = parse_json(metadata[_METADATA], str(file))
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"{file}: got {_METADATA} {metadata[_METADATA][:40]!r}, expected JSON of a table")
    own = {key.removeprefix("transformer."): value for key, value in stored.items() if key.startswith("transformer.")}
    own = own or (stored if "r" in stored else {})
    # The file itself says which modules it has. A choice among a model's is not needed, so any pattern will do.
    return {key: value for key, value in own.items() if key not in ("target_modules", "exclude_modules")} or None
