"""GGUF files: their header, read here within bounds, and their blocks, which the package gguf expands."""

import struct
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.weights.formats.tensors import MOST_DIMENSIONS, MOST_TENSORS, Stored, check_names

MOST_FIELDS = 10_000
MOST_HEADER = 32 << 20  # bytes; the vocabulary of UMT5 takes 6 MB
MOST_TEXT = 1 << 20  # bytes of a text: a chat template, a licence
MOST_ENTRIES = 1 << 20  # of an array: a vocabulary has 256,384
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Types of values by their number: struct's letters; 8 is a text, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Block(NamedTuple):
    """Where a tensor's bytes lie, and in which of gguf's types."""

    type: Any
    offset: int  # in the file
    size: int  # bytes


class GGUFFile:
    """A GGUF file. `read` expands its blocks to float32. Needs the package gguf."""

    kind, maps = "GGUF", False

    def __init__(self, file: Path) -> None:
        try:
            import gguf  # noqa: F401 - its absence is told before the file's faults
        except ImportError:
            raise ImportError(f"{file}: got no package gguf, expected pip install 'greedy-stream[gguf]'") from None
        self.file = file
        try:
            with file.open("rb") as opened:
                header = _Header(opened, file.stat().st_size)
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file}: got an unreadable file, expected GGUF ({reason})") from None
        self.metadata = {name: str(value) for name, value in header.fields.items() if not isinstance(value, list)}
        check_names(file, header.tensors)
        self._blocks = header.tensors
        self.tensors = {name: self._stored(name, header) for name in header.tensors}

    def _stored(self, name: str, header: "_Header") -> Stored:
        """Fastest dimension first in the file, which holds at most four: a fifth stands in a field of its own."""
        shape = tuple(reversed(header.shapes[name]))
        whole = header.fields.get(f"comfy.gguf.orig_shape.{name}")
        if isinstance(whole, list):
            sizes = [size for size in whole if type(size) is int and size >= 0]
            if len(sizes) != len(whole) or len(whole) > MOST_DIMENSIONS or prod(sizes) != prod(shape):
                raise ValueError(f"{self.file}: got {str(whole)[:60]} as the shape of {name}, expected one of the "
                                 f"{prod(shape)} numbers that it has")  # fmt: skip
            shape = tuple(sizes)
        word = self._blocks[name].type.name
        return Stored(shape, _PLAIN.get(word, word))

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        from gguf.quants import dequantize

        bytes_of = np.memmap(self.file, mode="r")
        for key in keys:
            block = self._blocks[key]
            stored = np.asarray(bytes_of[block.offset : block.offset + block.size])
            try:
                values = dequantize(stored, block.type)
            except NotImplementedError:
                raise ValueError(f"{self.file}: got {key} in {block.type.name}, "
                                 "expected a format that the package gguf expands") from None  # fmt: skip
            # A copy: the mapped bytes are read-only.
            tensor = torch.from_numpy(values.copy()).to(_PLAIN.get(block.type.name))
            yield key, tensor.reshape(self.tensors[key].shape)


class _Header:
    """Fields and tensors of a GGUF file. ValueError for what is damaged, or claims more than its file can hold.

    fields   by name: numbers, texts, arrays of numbers as lists; arrays of texts are skipped
    tensors  by name: where their bytes lie
    shapes   by name, fastest dimension first
    """

    def __init__(self, opened: BinaryIO, size: int) -> None:
        self._opened, self._size = opened, size
        _, version, tensors, fields = self._take("4sIQQ")
        if version not in (2, 3):
            raise ValueError("a big-endian file" if version and version & 0xFFFF == 0 else f"version {version}")
        for what, count, most in (("tensors", tensors, MOST_TENSORS), ("fields", fields, MOST_FIELDS)):
            if count > most:
                raise ValueError(f"{count} {what}, at most {most} are read")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._text()
            if name in self.fields:
                raise ValueError(f"the field {name[:60]!a} twice")
            self.fields[name] = self._value(*self._take("I"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        found = {}
        for _ in range(tensors):
            name, (dimensions,) = self._text(), self._take("I")
            if name in found:
                raise ValueError(f"the tensor {name[:60]!a} twice")
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"{dimensions} dimensions of {name[:60]!a}")
            self.shapes[name] = self._take(f"{dimensions}Q")
            found[name] = self._take("IQ")
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {str(alignment)[:20]}, a power of two up to 1048576 is read")
        start = -(-opened.tell() // alignment) * alignment
        self.tensors = {name: self._block(name, kind, start + offset) for name, (kind, offset) in found.items()}

    def _block(self, name: str, kind: int, offset: int) -> Block:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        type = GGMLQuantizationType(kind)
        count, (per_block, per_size) = prod(self.shapes[name]), GGML_QUANT_SIZES[type]
        row = self.shapes[name][0] if self.shapes[name] else 1
        size = count // per_block * per_size
        if not count or row % per_block or offset + size > self._size:
            raise ValueError(f"{name[:60]!a} of {count} numbers in {type.name}, which the file does not hold")
        return Block(type, offset, size)

    def _take(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        data = self._opened.read(struct.calcsize(form))
        return struct.unpack(form, data)

    def _skip(self, count: int) -> None:
        if self._opened.tell() + count > min(self._size, MOST_HEADER):
            raise ValueError(f"a value of {count} bytes, which the header does not hold")
        self._opened.seek(count, 1)

    def _text(self) -> str:
        (length,) = self._take("Q")
        if length > MOST_TEXT or self._opened.tell() + length > min(self._size, MOST_HEADER):
            raise ValueError(f"a text of {length} bytes, which the header does not hold")
        return self._opened.read(length).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._take(_letter(kind))[0]
        inner, count = self._take("IQ")
        if count > MOST_ENTRIES:
            raise ValueError(f"an array of {count} entries, at most {MOST_ENTRIES} are read")
        if inner == _STRING:  # of a tokenizer, which nothing here uses
            for _ in range(count):
                self._skip(*self._take("Q"))
            return []
        form = f"{count}{_letter(inner)}"
        if count > MOST_DIMENSIONS:  # scores and the like
            self._skip(struct.calcsize(f"<{form}"))
            return []
        return list(self._take(form))


def _letter(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}, which GGUF does not have or nests")
    return _SCALARS[kind]
