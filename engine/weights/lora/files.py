"""Opens LoRA files and PEFT folders: tensors by key, and the configuration that goes with them.

Contents decide what a file is, never its name. Pickles are opened with weights_only=True: no code in them runs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.files import read_json
from engine.weights.checkpoint import shorten
from engine.weights.containers import kind_of, load_torch, open_container
from engine.weights.lora.peft_config import PeftConfig

_METADATA = "lora_adapter_metadata"  # where diffusers stores PEFT's configuration in a safetensors file
_STATES = ("generator_lora", "lora", "lora_state_dict", "state_dict", "model", "module")
_FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")


def read_adapter(path: Path) -> tuple[dict[str, Any], PeftConfig | None, bool]:
    """Tensors by key, PEFT's configuration if there is one, and whether `path` is a PEFT folder."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"adapter: got {path}, expected a LoRA file or a PEFT folder")
        tensors, metadata = read_tensors(path)
        stored = _stored_config(path, metadata)
        return tensors, PeftConfig(stored, f"adapter {path}") if stored else None, False
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
    return read_tensors(file)[0], PeftConfig(config, f"adapter {path}"), True


def read_tensors(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors (and numbers) by key, and the metadata of a safetensors file or a torch checkpoint, mapped.

    A checkpoint may hold them in a state, such as generator_lora. ValueError for an unreadable file.
    """
    if kind_of(file) != "torch":
        container = open_container(file)
        return dict(container.read(container.tensors)), container.metadata
    loaded, _ = load_torch(file)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file}: got {type(loaded).__name__}, expected a dictionary of tensors")
    states = [name for name in _STATES if isinstance(loaded.get(name), Mapping) and loaded[name]]
    if not states and not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{file}: got keys {shorten(list(map(str, loaded)))}, expected LoRA tensors, "
                         f"or one of {', '.join(_STATES)}")  # fmt: skip
    loaded = loaded[states[0]] if states else loaded
    # Some tools write alpha as a number; every other number or text, as a count of steps, belongs to the training.
    return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor) or "alpha" in str(key)}, {}


def _stored_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's configuration of the transformer as diffusers writes it: plain, or each key with a part's name ahead."""
    if _METADATA not in metadata:
        return None
    try:
        stored = json.loads(metadata[_METADATA])
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"{file}: got {_METADATA} {metadata[_METADATA][:40]!r}, expected JSON of a table")
    own = {key.removeprefix("transformer."): value for key, value in stored.items() if key.startswith("transformer.")}
    return own or (stored if "r" in stored else None)
