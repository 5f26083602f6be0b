"""A bundle: a directory that runs without its original model. This file reads and checks one.

    manifest.json          contents, with shapes, dtypes and the sha256 of every file
    weights.safetensors    every large weight once, shared by the graphs
    tokenizer/             Hugging Face tokenizer files
    graphs/<backend>-<target>/...
    golden.safetensors     frames that a loader of the bundle must reproduce

File names carry no information. Reading a bundle runs no code. Graphs of `aoti` and `tensorrt` are code that streaming
runs: take them only from a source whose programs you would run.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engine.bundles.contract import Shapes, check_graphs, check_sizes
from engine.bundles.registry import BACKENDS
from engine.config import Preset, TransformerConfig
from engine.files import MOST_MARKS, parse_json, read_text
from engine.options import FieldError, read
from engine.presets import check_preset

VERSION: Final = 2
# Manifest version -> graph inputs for the first row to write and the number of rows to attend to.
ROW_INPUTS = {1: ("write_idx", "kv_len"), 2: ("start_row", "valid_rows")}
MOST_TENSOR = 1 << 44  # bytes of a tensor of the widest type
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int64": 8}


def _refuse(field: str, got: str, expected: str) -> NoReturn:
    raise FieldError(f"{field}: got {got}, expected {expected}", field, got, expected)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _safe(path: str) -> str:
    """Return a relative path that stays inside the bundle, in normal form; FieldError for others."""
    parts = PurePosixPath(path).parts
    inside = parts and not PurePosixPath(path).is_absolute() and not any(part in ("..", ".") for part in parts)
    if not inside or "\\" in path or str(PurePosixPath(path)) != path:
        _refuse("", f"path {path!r}", "one inside the bundle")
    return path


def _sized(shape: list[int]) -> list[int]:
    if math.prod((8, *shape)) > MOST_TENSOR:
        _refuse("", "a shape of more than 2^44 bytes", "less")
    return shape


def _whole(value: object) -> object:
    """Pydantic takes True and 1.0 for the literal 1."""
    if type(value) is not int:
        _refuse("", repr(value), "an integer")
    return value


_Size = Annotated[int, Field(ge=1, le=1 << 16)]
_Dim = Annotated[int, Field(ge=1, le=1 << 32)]
_Bytes = Annotated[int, Field(ge=0, le=1 << 44)]
_Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
_Path = Annotated[_Name, AfterValidator(_safe)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TensorSpec(_Strict):
    """Name, shape and dtype of one input or output of a graph."""

    name: _Name
    shape: Annotated[list[_Dim], Field(max_length=8), AfterValidator(_sized)]
    dtype: Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "int64"]


class GraphSpec(_Strict):
    """One compiled function.

    weights  the graph's own constant names -> keys of weights.safetensors
    aliases  outputs that overwrite an input -> that input
    mutates  inputs that the function writes and does not return
    source   sha256 of the compiler's input without weights; equal sources need no new compilation
    """

    file: _Path
    inputs: Annotated[list[TensorSpec], Field(max_length=4096)]
    outputs: Annotated[list[TensorSpec], Field(max_length=4096)]
    weights: dict[_Name, _Name]
    aliases: dict[_Name, _Name]
    mutates: list[_Name] = []
    source: _Hash | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "GraphSpec":
        inputs, outputs = ({tensor.name: tensor for tensor in side} for side in (self.inputs, self.outputs))
        for what, named, side in (("inputs", inputs, self.inputs), ("outputs", outputs, self.outputs)):
            if len(named) != len(side):
                _refuse(what, "tensors that share a name", "one tensor a name")
        for output, replaced in self.aliases.items():
            made, target = outputs.get(output), inputs.get(replaced)
            if made is None or target is None or (made.shape, made.dtype) != (target.shape, target.dtype):
                _refuse("aliases", f"{output!r} for {replaced!r}", "an output and an input of its shape")
        free = inputs.keys() - self.aliases.values()
        if odd := [name for name in self.mutates if name not in free]:
            _refuse("mutates", repr(odd[0]), "an input that no output replaces")
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
            _refuse("backend", repr(self.backend), f"one of {', '.join(BACKENDS)}")
        backend = BACKENDS[self.backend]
        for package in backend.made_with:
            if package not in self.versions:
                _refuse("versions", f"no version of {package} for {self.backend}", "the one it was compiled with")
        odd = {"aliases": "mutates", "mutates": "aliases"}.get(backend.writes, "")
        for name, graph in self.graphs.items():
            if odd and getattr(graph, odd):
                _refuse(f"graphs.{name}.{odd}", odd, f"{backend.writes}, as {self.backend} writes caches")
        return self


class FileSpec(_Strict):
    bytes: _Bytes
    sha256: _Hash


class GoldenSpec(_Strict):
    """A run to repeat. The file holds its frames, uint8 [T, H, W, 3], under `frames`."""

    file: _Path
    prompt: Annotated[str, Field(max_length=10_000)]
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]


class Manifest(_Strict):
    """The content of manifest.json."""

    format: Literal["greedy-bundle"]
    version: Annotated[Literal[1, 2], BeforeValidator(_whole)]
    preset_name: _Name
    preset: dict[str, object]
    transformer: dict[str, object]
    precision: Literal["fp32", "fp16", "bf16", "fp8", "int8"]
    height: _Size
    width: _Size
    fps: Annotated[float, Field(gt=0, le=1000)]
    spatial: _Size
    temporal: _Size
    text_rows: _Size
    weights: _Path
    tokenizer: _Path
    prompt_cleaning: Literal["html", "ftfy"] = "html"  # of the golden prompt; bundles without it knew no ftfy
    decoder: Literal["full", "tiny"] = "full"  # which VAE the graphs vae_first and vae_steady are
    golden: GoldenSpec
    files: Annotated[dict[_Path, FileSpec], Field(max_length=100_000)]
    backends: Annotated[dict[_Name, BackendSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if odd := [name for name, backend in self.backends.items() if name != backend.key]:
            _refuse(f"backends.{odd[0]}", "this name", repr(self.backends[odd[0]].key))
        named = [self.weights, self.golden.file, *(g.file for b in self.backends.values() for g in b.graphs.values())]
        if missing := [name for name in named if name not in self.files]:
            _refuse("", f"no entry in files for {missing[0]}", "one")
        shapes = self.shapes()
        check_sizes(shapes)
        for name, backend in self.backends.items():
            check_graphs(shapes, backend.graphs, f"backends.{name}.graphs")
        return self

    def shapes(self) -> Shapes:
        """All that decides the shapes of the graphs. FieldError for an invalid preset or transformer."""
        return Shapes(
            self.preset_value(), self.transformer_value(), self.height, self.width, self.spatial, self.temporal,
            self.text_rows, self.precision, self.row_inputs,
        )  # fmt: skip

    def preset_value(self) -> Preset:
        """The preset. Version 1 counted the greedy window in chunks, without the current one."""
        values = dict(self.preset)
        if isinstance(values.get("steps"), str):  # only a command line has them so
            _refuse("preset.steps", repr(values["steps"])[:60], "a list")
        if "reuse" in values:
            _refuse("preset", "unknown key reuse", "a preset without it: a bundle has one graph per pass")
        if isinstance(values.get("heads"), str):  # a manifest chooses no file of this machine
            _refuse("preset.heads", repr(values["heads"])[:60], "a table")
        if self.version == 1 and values.get("family") == "greedy":
            window, chunk = values.get("window", 3), values.get("chunk", 1)
            if type(window) is int and type(chunk) is int:
                if window < 0:
                    _refuse("preset.window", str(window), "0 or more")
                values["window"] = (window + 1) * chunk
        try:
            return check_preset(read(Preset, values, "preset"))
        except FieldError as error:
            _refuse(_joined("preset", error.field), error.got, error.expected)

    @property
    def row_inputs(self) -> tuple[str, str]:
        """Names of the graph inputs for the first row to write and the number of rows to attend to."""
        return ROW_INPUTS[self.version]

    def transformer_value(self) -> TransformerConfig:
        try:
            return read(TransformerConfig, self.transformer, "transformer")
        except FieldError as error:
            _refuse(_joined("transformer", error.field), error.got, error.expected)


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check it against the schema and the files on disk (sizes, no links).

    Raises FileNotFoundError or ValueError (got and expected).
    """
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        raise FileNotFoundError(f"bundle: got {folder} without manifest.json, expected a bundle")
    if path.is_symlink():
        raise ValueError(f"{path}: got a symbolic link, expected a plain file that can be read")
    content = parse_json(read_text(path), str(path), MOST_MARKS)
    if isinstance(content, dict) and content.get("format") == "greedy-bundle":
        version = content.get("version")
        if type(version) is int and version not in ROW_INPUTS:  # whatever else it holds is of no interest
            raise ValueError(f"{path}.version: got {version}, expected one of {', '.join(map(str, ROW_INPUTS))}")
    manifest = validated(content, path)
    _check_files(folder, manifest)
    return manifest


def validated(content: Any, path: Path) -> Manifest:
    """The manifest with this content. ValueError, in one line that begins with `path` and a field, if it is none."""
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ValueError(_one_line(_told(path, error))) from None


def _told(path: Path, error: ValidationError) -> str:
    """The first error as a line that begins with its field: manifest.json.preset.shift."""
    first = error.errors(include_url=False)[0]
    where = [str(key) for key in first["loc"] if key != "[key]"]
    got, expected = repr(first.get("input"))[:60], first["msg"]
    raised = first.get("ctx", {}).get("error")
    if first["type"] == "missing":
        got, expected = f"no {where.pop()}", "it"
    elif first["type"] == "extra_forbidden":
        got, expected = f"unknown key {where.pop()}", "only known ones"
    elif isinstance(raised, FieldError):
        where, got, expected = [*where, raised.field], raised.got, raised.expected
    return f"{_joined(str(path), *where)}: got {got}, expected {expected}"


def _joined(*fields: str) -> str:
    return ".".join(filter(None, fields))


def _one_line(text: str) -> str:
    """Text on one line, whatever a file puts into it."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Sizes of all files, no links, and nothing beside the tokenizer's that the manifest does not list."""
    root = folder.resolve()
    for name, spec in manifest.files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file() or file.resolve() != root / name:
            raise ValueError(_one_line(f"{file}: got no plain file inside the bundle, expected one"))
        if (size := file.stat().st_size) != spec.bytes:
            raise ValueError(_one_line(f"{file}: got {size} bytes, expected {spec.bytes}"))
    for file in _beside(folder / manifest.tokenizer):
        if str(file.relative_to(folder)) not in manifest.files:
            raise ValueError(_one_line(f"{file}: got a file that the manifest does not list, expected none"))


def _beside(folder: Path) -> Iterable[Path]:
    """What lies in a folder; a library that reads it might take any of it."""
    return sorted(folder.iterdir()) if folder.is_dir() else []
