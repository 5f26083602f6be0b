"""Files that hold named tensors: safetensors, torch's own, GGUF. The content decides which one a file is, not its name.

A container knows names, shapes and dtypes before it reads any data.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.weights.formats.signatures import kind_of
from engine.weights.formats.tensors import Stored
from engine.weights.formats.torch_files import TorchFile

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_NAMES = {"C64": "complex64", "C128": "complex128"}  # of dtypes that are no real numbers


class Container(Protocol):
    """Named tensors of one file."""

    file: Path
    kind: str  # "safetensors", "torch" or "GGUF"
    maps: bool  # whether `read` gives tensors that lie in the mapped file, without reading them
    tensors: dict[str, Stored]
    metadata: dict[str, str]

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]: ...


class SafetensorsFile:
    """A safetensors file. `read` maps it again every 32 MB, to release the pages already converted."""

    kind, maps = "safetensors", True
    _SPAN = 32 << 20

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            # As torch maps a file it may not be larger than memory; its header can be read all the same.
            with safe_open(file, framework="np") as opened:
                self.metadata = dict(opened.metadata() or {})
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
                self.tensors = {key: _stored(part.get_shape(), part.get_dtype()) for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: got an unreadable file, expected safetensors ({error})") from None

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        waiting = list(reversed(list(keys)))
        while waiting:
            read = 0
            with self._opened() as opened:
                while waiting and read < self._SPAN:
                    key = waiting.pop()
                    tensor = opened.get_tensor(key)
                    read += tensor.nbytes
                    yield key, tensor
                    del tensor

    def _opened(self) -> Any:
        try:
            return safe_open(self.file, framework="pt")
        except RuntimeError as error:
            size = self.file.stat().st_size
            raise MemoryError(f"{self.file}: got {size} bytes that the system does not map ({error}), expected "
                              "more memory, or the same weights in several files") from None  # fmt: skip


def _stored(shape: list[int], dtype: str) -> Stored:
    if dtype in _DTYPES:
        return Stored(tuple(shape), _DTYPES[dtype])
    return Stored(tuple(shape), dtype, f"a tensor in {_NAMES.get(dtype, dtype)}")


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GGUFFile:
    """A GGUF file. `read` expands its blocks to float32. Needs the package gguf."""

    kind, maps = "GGUF", False

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ImportError(f"{file}: got no package gguf, expected pip install 'greedy-stream[gguf]'") from None
        self.file = file
        try:
            reader = GGUFReader(file)
            self.metadata = {name: _text(field) for name, field in reader.fields.items() if len(field.data) == 1}
            self._parts = {part.name: part for part in reader.tensors}
            self.tensors = {name: Stored(self._shape(reader, part), self._dtype(part))
                            for name, part in self._parts.items()}  # fmt: skip
        except Exception as error:  # the reader raises whatever its parsing meets
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file}: got an unreadable file, expected GGUF ({reason})") from None

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        from gguf.quants import dequantize

        for key in keys:
            part = self._parts[key]
            try:
                values = dequantize(part.data, part.tensor_type)
            except NotImplementedError:
                raise ValueError(f"{self.file}: got {key} in {part.tensor_type.name}, "
                                 "expected a format that the package gguf expands") from None  # fmt: skip
            shape = self.tensors[key].shape
            # A copy: the reader's arrays are read-only.
            yield key, torch.from_numpy(values.copy()).to(_PLAIN.get(part.tensor_type.name)).reshape(shape)

    def _dtype(self, part: Any) -> torch.dtype | str:
        return _PLAIN.get(part.tensor_type.name, part.tensor_type.name)

    @staticmethod
    def _shape(reader: Any, part: Any) -> tuple[int, ...]:
        """Fastest dimension first in the file, which holds at most four: a fifth stands in a field of its own."""
        whole = reader.fields.get(f"comfy.gguf.orig_shape.{part.name}")
        if whole is not None:
            return tuple(int(whole.parts[index][0]) for index in whole.data)
        return tuple(int(size) for size in reversed(part.shape))


def _text(field: Any) -> str:
    """A field's value as text."""
    return str(field.contents())


def open_container(file: Path) -> Container:
    """Open a file. FileNotFoundError, or ValueError for one that is damaged or holds something else."""
    if not file.is_file():
        raise FileNotFoundError(f"weights: got {file}, expected an existing file")
    kinds: dict[str, type[SafetensorsFile | TorchFile | GGUFFile]] = {
        "safetensors": SafetensorsFile, "torch": TorchFile, "GGUF": GGUFFile
    }  # fmt: skip
    return kinds[kind_of(file)](file)
