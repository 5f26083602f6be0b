"""Files that hold named tensors: safetensors, torch's own, GGUF. The content decides which one a file is, not its name.

A container knows names, shapes and dtypes before it reads any data.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.weights.formats.gguf_files import GGUFFile
from engine.weights.formats.headers import check_header
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
        check_header(file)
        try:
            # As torch maps a file it may not be larger than memory; its header can be read all the same.
            with safe_open(file, framework="np") as opened:
                self.metadata = dict(opened.metadata() or {})
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
                self.tensors = {key: _stored(part.get_shape(), part.get_dtype()) for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ValueError(f"{file}: got an unreadable file, expected safetensors ({reason})") from None

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


def open_container(file: Path) -> Container:
    """Open a file. FileNotFoundError, or ValueError for one that is damaged or holds something else."""
    if not file.is_file():
        raise FileNotFoundError(f"weights: got {file}, expected an existing file")
    kinds: dict[str, type[SafetensorsFile | TorchFile | GGUFFile]] = {
        "safetensors": SafetensorsFile, "torch": TorchFile, "GGUF": GGUFFile
    }  # fmt: skip
    return kinds[kind_of(file)](file)
