"""Writes files and folders beside their final name and renames them, so that they appear whole or not at all.

    with whole_file(path) as part:
        part.write_bytes(data)      # after the block path exists, complete; an error leaves path unchanged

A killed process can leave a `.<name>.part` behind. The next write of that name replaces it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def part_of(path: Path) -> Path:
    """The hidden, temporary name beside `path`."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file name that the caller writes to; after the block that file replaces `path`."""
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder that the caller fills; after the block that folder replaces `path`."""
    part = part_of(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Write a whole JSON file that ends with a line break."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. FileNotFoundError or ValueError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"got no file {path}, expected one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got no JSON, expected an object ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value
