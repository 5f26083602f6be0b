"""Models of diffusers and transformers from a folder on this machine."""

from pathlib import Path
from typing import Any


def pretrained(kind: Any, folder: str | Path) -> Any:
    """A model of a class from its folder: safetensors alone. Nothing in the folder runs, and no hub is asked.

    FileNotFoundError unless it is a folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"model: got {folder}, expected a folder with a {kind.__name__}")
    return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
