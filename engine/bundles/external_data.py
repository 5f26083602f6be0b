"""Finds tensors of an ONNX file whose data lies in other files.

ONNX Runtime looks for such files in the working directory. Only the bundle's own weights may be outside, which are
given to it as memory. So the file is searched before it is opened, without the package onnx.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

MOST_NESTED = 64  # graphs in attributes of nodes in graphs
# Message -> field number -> the message in it (onnx.proto). All other fields hold no tensor with data outside.
_PARTS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14  # fields of a tensor
_INITIALISER = ("model", "graph", "tensor")


def check_external_data(file: Path, content: bytes, weights: Collection[str]) -> None:
    """ValueError unless exactly `weights` have their data outside the file, each an initialiser of the main graph."""
    try:
        found = list(_external(memoryview(content), ("model",)))
    except (IndexError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file}: got a graph that does not load, expected ONNX") from None
    for way, name in found:
        if way != _INITIALISER or name not in weights:
            raise ValueError(
                f"{file}: got {name[:60]!r} with its data in another file, expected weights of the manifest"
            )
    names = Counter(name for _, name in found)
    if odd := [name for name in weights if names[name] != 1]:
        raise ValueError(f"{file}: got {names[odd[0]]} initialisers {odd[0]!r}, expected the manifest's weight")


def _external(message: memoryview, way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(messages on the way, name) of every tensor with data outside."""
    if len(way) > 4 * MOST_NESTED:
        raise RecursionError
    if way[-1] == "tensor":
        fields = dict(_fields(message))
        if fields.get(_DATA_LOCATION) or _EXTERNAL_DATA in fields:
            name = fields.get(_NAME, 0)
            yield way, "" if isinstance(name, int) else str(name, "utf-8")
        return
    parts = _PARTS[way[-1]]
    for number, value in _fields(message):
        if number in parts and not isinstance(value, int):
            yield from _external(value, (*way, parts[number]))


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of a protobuf message. IndexError where it ends too soon or is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at) if kind in (1, 5) else (-1, at)
        if size < 0 or at + size > len(message):
            raise IndexError
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError
