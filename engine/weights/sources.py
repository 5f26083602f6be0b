"""Sources of tensors: safetensors files and Self-Forcing-family checkpoints. Shapes are known before data is read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.files import read_json
from engine.weights.names import BUFFERS, diffusers_name


class TensorSource(Protocol):
    """Named tensors. `shapes` reads no data, `read` yields (name, tensor), `bytes_at` is their size in a dtype."""

    label: str
    files: list[Path]
    lora: Path | None  # file with LoRA weights to merge afterwards

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self) -> Iterator[tuple[str, Tensor]]: ...
    def bytes_at(self, dtype: torch.dtype) -> int: ...


def _bytes_at(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


class SafetensorsSource:
    """One or more safetensors files. `read` maps a file again every 32 MB, to release the pages already converted."""

    _SPAN = 32 << 20
    lora: Path | None = None

    def __init__(self, files: list[Path], label: str) -> None:
        self.files, self.label = files, label
        self._where: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                        shape = tuple(opened.get_slice(key).get_shape())
                        name = diffusers_name(key)
                        if name in self._where:
                            raise ValueError(f"{label}: got {name} twice ({file.name}), expected every tensor once")
                        self._where[name] = file, key, shape
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: got an unreadable file, expected safetensors ({error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape) in self._where.items() if not BUFFERS.search(name)}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            waiting = [(name, key) for name, (at, key, _) in self._where.items() if at == file]
            while waiting:
                read = 0
                with safe_open(file, framework="pt") as opened:
                    while waiting and read < self._SPAN:
                        name, key = waiting.pop(0)
                        tensor = opened.get_tensor(key)
                        read += tensor.nbytes
                        yield name, tensor
                        del tensor

    def bytes_at(self, dtype: torch.dtype) -> int:
        return _bytes_at(self.shapes(), dtype)


class TextEncoderSource:
    """A UMT5 encoder's tensors under the names of engine.model.umt5, whatever else of UMT5 its folder holds."""

    def __init__(self, source: TensorSource) -> None:
        self.label, self.files, self.lora, self._source = source.label, source.files, source.lora, source

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {_encoder_name(name): shape for name, shape in self._source.shapes().items() if _of_encoder(name)}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        return ((_encoder_name(name), tensor) for name, tensor in self._source.read() if _of_encoder(name))

    def bytes_at(self, dtype: torch.dtype) -> int:
        return _bytes_at(self.shapes(), dtype)


def _of_encoder(name: str) -> bool:
    return not name.startswith(("decoder.", "lm_head."))


def _encoder_name(name: str) -> str:
    """The embedding is stored as `shared`, or under its place in the encoder, or as both."""
    return "embed_tokens.weight" if name == "shared.weight" else name.removeprefix("encoder.")


class PickleSource:
    """A memory-mapped `.pt` checkpoint of the Self-Forcing family, opened with weights_only=True.

    The constructor raises ValueError for an unreadable file, and where the state or its tensors are missing.
    """

    _STATES = ("generator_ema", "generator", "model", "state_dict")

    def __init__(self, file: Path, state: str | None = None) -> None:
        self.label, self.files = str(file), [file]
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: got an unreadable file, expected a torch checkpoint ({reason})") from None
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{file}: got {type(loaded).__name__}, expected a dictionary of tensors")
        names = [state] if state else [name for name in self._STATES if isinstance(loaded.get(name), Mapping)]
        if state and not isinstance(loaded.get(state), Mapping):
            raise ValueError(f"{file}: got keys {', '.join(map(str, loaded))}, expected {state!r} among them")
        chosen = loaded[names[0]] if names else loaded
        self.lora = file if state is None and isinstance(loaded.get("generator_lora"), Mapping) else None
        self._tensors = {diffusers_name(name): tensor for name, tensor in chosen.items() if isinstance(tensor, Tensor)}
        if not self._tensors:
            raise ValueError(f"{file}: got keys {', '.join(map(str, loaded))}, expected generator or generator_ema")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self._tensors.items() if not BUFFERS.search(name)}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def bytes_at(self, dtype: torch.dtype) -> int:
        return _bytes_at(self.shapes(), dtype)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component folder, sorted. An index decides which ones. FileNotFoundError if none."""
    plain = [folder / f"{stem}.safetensors" for stem in ("model", "diffusion_pytorch_model")]
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    own = [index for index in indexes if index.with_suffix("").with_suffix("") in plain]
    indexes = own or ([] if any(file.is_file() for file in plain) else indexes)
    if indexes:
        files = sorted({folder / name for name in read_json(indexes[0]).get("weight_map", {}).values()})
    else:  # a variant beside the plain file, such as model.fp16.safetensors, is not taken
        stems = [file.stem for file in plain if file.is_file()]
        files = [file for file in sorted(folder.glob("*.safetensors"))
                 if not any(file.name.startswith(f"{stem}.") and file.stem != stem for stem in stems)]  # fmt: skip
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"no {', '.join(missing)}" if missing else "no safetensors file"
        raise FileNotFoundError(f"{folder}: got {what}, expected the weights")
    return files


def open_source(path: Path, state: str | None = None) -> TensorSource:
    """Open a component folder, a .safetensors file or a .pt/.pth checkpoint; `state` names a state of the latter.

    Raises FileNotFoundError, or ValueError for an unreadable or unknown file.
    """
    if path.is_dir():
        return SafetensorsSource(weight_files(path), str(path))
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, expected an existing file")
    if path.suffix == ".safetensors":
        return SafetensorsSource([path], str(path))
    if path.suffix in (".pt", ".pth"):
        return PickleSource(path, state)
    raise ValueError(f"checkpoint: got {path.name}, expected .safetensors, .pt or .pth")
