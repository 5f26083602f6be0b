"""A bundle: a directory that runs without its original model. This file reads and checks one.

    manifest.json          contents, with shapes, dtypes and the sha256 of every file
    weights.safetensors    every large weight once, shared by the graphs
    tokenizer/             Hugging Face tokenizer files
    graphs/<backend>-<target>/...
    golden.safetensors     frames that a loader of the bundle must reproduce

File names carry no information. Reading a bundle runs no code. Graphs of `aoti` and `tensorrt` are code that streaming
runs: take them only from a source whose programs you would run.
"""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.bundles.registry import BACKENDS
from engine.config import Preset, TransformerConfig
from engine.files import MOST_JSON_MARKS, check_json_size
from engine.options import read
from engine.presets import check_preset

VERSION: Final = 2
# Manifest version -> graph inputs for the first row to write and the number of rows to attend to.
ROW_INPUTS = {1: ("write_idx", "kv_len"), 2: ("start_row", "valid_rows")}
_Size = Annotated[int, Field(ge=1, le=1 << 16)]
_Dim = Annotated[int, Field(ge=0, le=1 << 32)]
_Bytes = Annotated[int, Field(ge=0, le=1 << 44)]
_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int64": 8}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _safe(path: str) -> str:
    """Return a relative path that stays inside the bundle, in normal form; ValueError for others."""
    parts = PurePosixPath(path).parts
    inside = parts and not PurePosixPath(path).is_absolute() and not any(part in ("..", ".") for part in parts)
    if not inside or "\\" in path or "\0" in path or str(PurePosixPath(path)) != path:
        raise ValueError(f"got path {path!r}, expected one inside the bundle")
    return path


class TensorSpec(_Strict):
    """Name, shape and dtype of one input or output of a graph."""

    name: _Name
    shape: Annotated[list[_Dim], Field(max_length=8)]
    dtype: Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "int64"]


class GraphSpec(_Strict):
    """One compiled function.

    weights  the graph's own constant names -> keys of weights.safetensors
    aliases  outputs that overwrite an input -> that input
    mutates  inputs that the function writes and does not return
    source   sha256 of the compiler's input without weights; equal sources need no new compilation
    """

    file: _Name
    inputs: Annotated[list[TensorSpec], Field(max_length=4096)]
    outputs: Annotated[list[TensorSpec], Field(max_length=4096)]
    weights: dict[_Name, _Name]
    aliases: dict[_Name, _Name]
    mutates: list[_Name] = []
    source: _Hash | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "GraphSpec":
        _safe(self.file)
        inputs, outputs = ({tensor.name: tensor for tensor in side} for side in (self.inputs, self.outputs))
        for what, named, side in (("inputs", inputs, self.inputs), ("outputs", outputs, self.outputs)):
            if len(named) != len(side):
                raise ValueError(f"got {what} of {self.file} that share a name, expected one tensor a name")
        for output, replaced in self.aliases.items():
            made, target = outputs.get(output), inputs.get(replaced)
            if made is None or target is None or (made.shape, made.dtype) != (target.shape, target.dtype):
                raise ValueError(f"got alias {output!r} of {replaced!r}, expected an output and an input of its shape")
        if odd := [name for name in self.mutates if name not in inputs or name in self.aliases.values()]:
            raise ValueError(f"got {odd[0]!r} in mutates, expected an input that no output replaces")
        return self


class BackendSpec(_Strict):
    """The graphs of one backend, their target, and the versions of the packages that compiled them."""

    backend: _Name
    target: Annotated[str, Field(pattern=r"^(cpu|cuda)(-[a-z0-9_]{1,40}){0,3}$")]
    versions: dict[_Name, _Name]
    graphs: dict[_Name, GraphSpec]

    @property
    def key(self) -> str:
        """The backend's name in the manifest; its folder under graphs/ has the same name."""
        return f"{self.backend}-{self.target}"

    @model_validator(mode="after")
    def _consistent(self) -> "BackendSpec":
        if self.backend not in BACKENDS:
            raise ValueError(f"got backend {self.backend!r}, expected one of {', '.join(BACKENDS)}")
        backend = BACKENDS[self.backend]
        for package in backend.made_with:
            if package not in self.versions:
                raise ValueError(
                    f"got no version of {package} for {self.backend}, expected the one it was compiled with"
                )
        kinds = {"aliases": [n for n, g in self.graphs.items() if g.mutates],
                 "mutates": [n for n, g in self.graphs.items() if g.aliases]}  # fmt: skip
        if odd := kinds.get(backend.writes):
            raise ValueError(f"got {odd[0]} of {self.backend} writing its inputs otherwise, expected {backend.writes}")
        return self


class FileSpec(_Strict):
    bytes: _Bytes
    sha256: _Hash


class GoldenSpec(_Strict):
    """A run to repeat. The file holds its frames, uint8 [T, H, W, 3], under `frames`."""

    file: _Name
    prompt: Annotated[str, Field(max_length=10_000)]
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]


class Manifest(_Strict):
    """The content of manifest.json."""

    format: Literal["greedy-bundle"]
    version: Literal[1, 2]
    preset_name: _Name
    preset: dict[str, object]
    transformer: dict[str, object]
    precision: Literal["fp32", "fp16", "bf16", "fp8"]
    height: _Size
    width: _Size
    fps: Annotated[float, Field(gt=0, le=1000)]
    spatial: _Size
    temporal: _Size
    text_rows: _Size
    weights: _Name
    tokenizer: _Name
    prompt_cleaning: Literal["html", "ftfy"] = "html"  # of the golden prompt; bundles without it knew no ftfy
    golden: GoldenSpec
    files: Annotated[dict[_Name, FileSpec], Field(max_length=100_000)]
    backends: Annotated[dict[_Name, BackendSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        for name in (*self.files, self.tokenizer):
            _safe(name)
        if odd := [name for name, backend in self.backends.items() if name != backend.key]:
            raise ValueError(f"got backend {odd[0]!r}, expected {self.backends[odd[0]].key!r}")
        named = [self.weights, self.golden.file, *(g.file for b in self.backends.values() for g in b.graphs.values())]
        missing = [name for name in named if name not in self.files]
        if missing:
            raise ValueError(f"got no entry in files for {missing[0]}, expected one")
        self.preset_value(), self.transformer_value()
        return self

    def preset_value(self) -> Preset:
        """The preset; ValueError if invalid. Version 1 counted the greedy window in chunks, without the current one."""
        values = dict(self.preset)
        if self.version == 1 and values.get("family") == "greedy":
            window, chunk = values.get("window", 3), values.get("chunk", 1)
            if type(window) is int and type(chunk) is int:
                values["window"] = (window + 1) * chunk
        return check_preset(read(Preset, values, "preset"))

    @property
    def row_inputs(self) -> tuple[str, str]:
        """Names of the graph inputs for the first row to write and the number of rows to attend to."""
        return ROW_INPUTS[self.version]

    def transformer_value(self) -> TransformerConfig:
        return TransformerConfig.from_dict(dict(self.transformer))


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check it against the schema and the files on disk (sizes, no links).

    Raises FileNotFoundError or ValueError (got and expected).
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"bundle: got {folder} without manifest.json, expected a bundle")
    if path.stat().st_size > 1 << 26:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes, expected at most {1 << 26}")
    check_json_size(path, MOST_JSON_MARKS)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: got no JSON, expected a manifest ({error})") from None
    if (
        isinstance(content, dict)
        and content.get("version") not in list(ROW_INPUTS)
        and content.get("format") == "greedy-bundle"
    ):
        raise ValueError(
            f"{path}: got version {content.get('version')!r}, expected one of {', '.join(map(str, ROW_INPUTS))}"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        got = str(first.get("input"))[:60]
        raise ValueError(f"{path}: {where}: got {got}, expected: {first['msg']}") from None
    for name, spec in manifest.files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file() or not _inside(file, folder):
            raise ValueError(f"{file}: got no plain file inside the bundle, expected one of {spec.bytes} bytes")
        if file.stat().st_size != spec.bytes:
            raise ValueError(f"{file}: got {file.stat().st_size} bytes, expected {spec.bytes}")
    return manifest


def check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    """Check one file's sha256; ValueError if it differs."""
    got, expected = file_hash(folder / name), manifest.files[name].sha256
    if got != expected:
        raise ValueError(f"{folder / name}: got sha256 {got[:12]}, expected {expected[:12]}")


def check_hashes(folder: Path, manifest: Manifest) -> None:
    """Check every file's sha256; ValueError at the first that differs."""
    for name in manifest.files:
        check_hash(folder, manifest, name)


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _inside(file: Path, folder: Path) -> bool:
    return os.path.commonpath([file.resolve(), folder.resolve()]) == str(folder.resolve())
