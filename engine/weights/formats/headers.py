"""The header of a safetensors file, checked before the library opens it."""

from pathlib import Path
from typing import Any

from engine.files import parse_json
from engine.weights.formats.tensors import MOST_DIMENSIONS, check_names

MOST_HEADER = 8 << 20  # bytes; 20,000 tensors with long names take 4 MB, and training tools add their notes


def check_header(file: Path) -> None:
    """ValueError for a header that is too large, names a tensor twice or gives one too many dimensions.

    A damaged header passes where the library itself says what is wrong.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MOST_HEADER and length <= file.stat().st_size:
            raise ValueError(f"{file}: got a header of {length} bytes, expected at most {MOST_HEADER}")
        if length > MOST_HEADER:
            return  # cut off: the library says so
        text = opened.read(length)
    header = parse_json(text, f"{file}: header")
    if not isinstance(header, dict):
        raise ValueError(f"{file}: header: got {type(header).__name__}, expected a JSON object")
    header.pop("__metadata__", None)
    check_names(file, header)
    for name, about in header.items():
        if dimensions := _too_many(about):
            raise ValueError(f"{file}: got {name} of {dimensions} dimensions, expected at most {MOST_DIMENSIONS}")


def _too_many(about: Any) -> int:
    shape = about.get("shape") if isinstance(about, dict) else None
    return len(shape) if isinstance(shape, list) and len(shape) > MOST_DIMENSIONS else 0
