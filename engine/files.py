"""Files and folders that appear whole or not at all: written beside their name and renamed.

    with whole_file(path) as part:
        part.write_bytes(data)      # path exists, complete, after the block; an error leaves path as it was

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
    """The hidden name beside `path` that is written first."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within the block the caller writes the sibling that it gets; afterwards that file replaces `path`."""
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Within the block the caller fills the new, empty folder that it gets; afterwards that folder replaces `path`."""
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
    """A whole JSON file, with a line break at its end."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
