"""Files that hold named tensors: safetensors, torch's own, GGUF. The content decides which one a file is, not its name.

A container knows names, shapes and dtypes before it reads any data.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What a directory's weight files are called. A file that the user names may be called anything.
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor in a file. `dtype` is torch's, or the name of a block format of GGUF (Q8_0, Q4_K, ...)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


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
    return Stored(tuple(shape), _DTYPES.get(dtype, dtype))


class TorchFile:
    """A file of torch.save, opened with weights_only=True: code in it never runs.

    Dictionaries inside dictionaries become dotted names: {"generator": {"head.head.bias": t}} holds
    `generator.head.head.bias`. Everything else in the file, as step counts, is left out. `read` maps the file again,
    so that its pages leave memory with the tensors that were read. Files of torch before 1.6 cannot be mapped: they
    are read whole, once.
    """

    kind = "torch"

    def __init__(self, file: Path) -> None:
        self.file = file
        self.metadata: dict[str, str] = {}
        loaded, self.maps = load_torch(file)
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{file}: got {type(loaded).__name__}, expected a dictionary of tensors")
        tensors = dict(_flat(loaded))
        self._whole = {} if self.maps else tensors
        self.tensors = {name: Stored(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        tensors = self._whole or dict(_flat(load_torch(self.file)[0]))
        return ((key, tensors[key].detach()) for key in keys)


def load_torch(file: Path) -> tuple[Any, bool]:
    """What torch.save wrote, and whether it is mapped; code in it never runs. ValueError if unreadable."""
    try:
        # torch takes a path with this suffix for safetensors; the content says otherwise.
        if file.suffix != ".safetensors":
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True), True
            except RuntimeError as error:
                if "mmap" not in str(error):  # files of torch before 1.6 cannot be mapped
                    raise
        with file.open("rb") as opened:
            return torch.load(opened, map_location="cpu", weights_only=True), False
    except Exception as error:
        raise ValueError(f"{file}: got {_reason(error)}, expected a torch checkpoint of tensors") from None


def _reason(error: Exception) -> str:
    """Why torch cannot read a file. Its own text advises to run the code in it."""
    text = str(error)
    if found := re.search(r"(?:GLOBAL|[Uu]nsupported \w+:?) (?:`|')?([\w.]+)", text):
        return f"an object of {found[1]}, which is no tensor"
    if "eights only" in text or "weights_only" in text:
        return "objects that are no tensors"
    return f"an unreadable file ({(text.splitlines() or [type(error).__name__])[0]})"


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GGUFFile:
    """A GGUF file. `read` expands its blocks to float32. Needs the package gguf."""

    kind, maps = "GGUF", False

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ImportError(f"{file}: got no package gguf, expected it installed (pip install gguf)") from None
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


def kind_of(file: Path) -> str:
    """safetensors, torch or GGUF, by the first bytes. ValueError names what the file is instead."""
    with file.open("rb") as opened:
        start = opened.read(512)
    size = file.stat().st_size
    if start[:4] == b"GGUF":
        return "GGUF"
    # A safetensors file begins with the length of its header, which may look like the beginning of any other file.
    has_header = start[8:9] == b"{"
    whole = has_header and 8 + int.from_bytes(start[:8], "little") <= size
    # torch.save: a zip archive, or before 1.6 a pickle.
    if not whole and (start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")):
        return "torch"
    if has_header:
        return "safetensors"  # a file that is cut off too: the library says how
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: got a Git LFS pointer, expected the file itself (git lfs pull)")
    if start.lstrip()[:1] == b"<":
        raise ValueError(f"{file}: got a web page, expected weights: the download failed")
    what = f"{size} bytes that start with {start[:8]!r}" if start else "an empty file"
    raise ValueError(f"{file}: got {what}, expected safetensors, a torch checkpoint or GGUF")


def open_container(file: Path) -> Container:
    """Open a file. FileNotFoundError, or ValueError for one that is damaged or holds something else."""
    if not file.is_file():
        raise FileNotFoundError(f"weights: got {file}, expected an existing file")
    kinds: dict[str, type[SafetensorsFile | TorchFile | GGUFFile]] = {
        "safetensors": SafetensorsFile, "torch": TorchFile, "GGUF": GGUFFile
    }  # fmt: skip
    return kinds[kind_of(file)](file)
