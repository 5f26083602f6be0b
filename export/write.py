"""A pipeline of the torch backend -> a bundle directory, written beside its name and renamed when complete."""

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.bundles.hashes import check_hash, check_hashes, file_hash
from engine.bundles.manifest import (
    VERSION,
    BackendSpec,
    FileSpec,
    GoldenSpec,
    GraphSpec,
    Manifest,
    read_manifest,
    validated,
)
from engine.bundles.stages import NotHere
from engine.files import read_json, whole_folder, write_json
from engine.loader import load_bundle
from engine.model.text import Tokenizer, clean_prompt, fold_prompt
from engine.model.vae import SplitVAE
from engine.runtime.device import DTYPES
from engine.stream import Pipeline
from export.compilers import Compiler, compilers_of
from export.eight_bits import quantized_as
from export.graphs import stage_graphs
from export.program import trace
from export.tensorrt.build import BuildOptions

GOLDEN_CHUNKS = 3
# Allowed difference, in grey levels, of golden frames from torch's frames of the same precision, and of replayed frames
# from the stored ones. It is the largest difference; for bf16, fp8 and int8 the mean, because one other rounding there
# changes all later values.
TOLERANCE = {"fp32": 2, "fp16": 4, "bf16": 2, "fp8": 2, "int8": 2}
COUNTED = {"fp32": "at most", "fp16": "at most"} | dict.fromkeys(("bf16", "fp8", "int8"), "on average")
_GOLDEN = "golden.safetensors"


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. OSError where that fails, such as on a full disk."""
    try:
        safetensors.torch.save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path}: got an error of the file system, expected room to write there ({error})") from None


class WeightStore:
    """Large constants of all graphs; equal contents are stored once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._key_of: dict[str, str] = {}

    def add(self, graph: str, name: str, value: Tensor) -> str:
        """The key of this content: the graph and the name under which it was first added."""
        value = value.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        key = self._key_of.setdefault(digest.hexdigest(), f"{graph}/{name}")
        if key not in self.tensors:
            self.tensors[key] = value.clone()  # views of one storage cannot be saved
        return key


class Reusable:
    """Compiled graphs by the hash of their source: graphs of an older bundle, and graphs written since."""

    def __init__(self, folder: Path | None) -> None:
        self._files: dict[str, Path] = {}
        if folder is None:
            return
        manifest = read_manifest(folder)
        for backend in manifest.backends.values():
            for spec in backend.graphs.values():
                if spec.source is not None:
                    check_hash(folder, manifest, spec.file)
                    self._files[spec.source] = folder / spec.file

    def copy(self, source: str | None, file: Path) -> bool:
        """Copy the graph of `source` to `file`, and return whether there was one. Else `file` becomes that graph."""
        if source is None:
            return False
        found = self._files.setdefault(source, file)
        if found != file:
            shutil.copyfile(found, file)
        return found != file


def write_bundle(
    pipeline: Pipeline, out: Path, tokenizer: Path, prompt: str, seed: int = 0, backends: Sequence[str] = ("onnx",),
    reuse: Path | None = None, plans: BuildOptions | None = None,
) -> Iterator[str]:  # fmt: skip
    """Write `out`, yielding a line of progress for each step. The golden frames are replayed before the rename.

    tokenizer is the directory to copy; prompt and seed make the golden frames. The first backend is a loader's default.
    Compiled graphs of the bundle `reuse` are copied where they would come out the same. plans are TensorRT's build
    options. Raises ValueError where `out` exists.
    """
    if pipeline.preset.reuse is not None:
        raise ValueError("export: got a preset with reuse, expected one without: a bundle has one graph per pass")
    if pipeline.preset.local_heads is not None and plans is not None and plans.attention.endswith("fp8"):
        raise ValueError(f"export: got attention {plans.attention} for a preset with local heads, expected another")
    if out.exists():
        raise ValueError(f"export: got {out}, which exists, expected a new directory")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"export: got {out}, expected an existing directory {out.parent}")
    if not tokenizer.is_dir():
        raise FileNotFoundError(f"export: got no tokenizer in {tokenizer}, expected a directory")
    if not backends or len(set(backends)) != len(backends):
        raise ValueError(f"export: got backends {', '.join(backends) or 'none'}, expected each once")
    quantized = quantized_as(pipeline)
    if quantized == "int8" and (others := [backend for backend in backends if backend != "onnx"]):
        raise ValueError(f"export: got int8 for {others[0]}, expected it for onnx alone")
    fp8 = quantized == "fp8"
    compilers = [one for backend in backends for one in compilers_of(backend, pipeline.device, plans, fp8)]
    with whole_folder(out) as part:
        yield from _write(pipeline, part, tokenizer, prompt, seed, compilers, Reusable(reuse))


def _write(
    pipeline: Pipeline, part: Path, tokenizer: Path, prompt: str, seed: int, compilers: list[Compiler],
    older: Reusable,
) -> Iterator[str]:  # fmt: skip
    store = WeightStore()
    made = [
        (compiler, BackendSpec(backend=compiler.backend, target=compiler.target, versions=compiler.versions, graphs={}))
        for compiler in compilers
    ]
    for in_place in (False, True):
        if alike := [(compiler, spec) for compiler, spec in made if compiler.in_place is in_place]:
            yield from _compile(pipeline, in_place, alike, part, store, older)
    specs = {spec.key: spec for _, spec in made}
    save_file(store.tensors, part / "weights.safetensors")
    _copy_tokenizer(tokenizer, part / "tokenizer", pipeline.tokenizer.rows if pipeline.tokenizer else None)

    golden = {"frames": torch.from_numpy(golden_frames(pipeline, prompt, seed))}
    save_file(golden, part / _GOLDEN)
    preset = pipeline.preset.table()
    transformer = asdict(pipeline.config) | {"patch_size": list(pipeline.config.patch_size)}
    content = {
        "format": "greedy-bundle", "version": VERSION, "preset_name": pipeline.preset_name, "preset": preset,
        "transformer": transformer, "precision": _precision(pipeline),
        "height": pipeline.height, "width": pipeline.width, "fps": float(pipeline.fps), "spatial": pipeline.spatial,
        "temporal": pipeline.temporal, "text_rows": pipeline.tokenizer.rows if pipeline.tokenizer else 0,
        "weights": "weights.safetensors", "tokenizer": "tokenizer", "prompt_cleaning": "ftfy",
        "decoder": "tiny" if isinstance(pipeline.stages.modules().get("vae"), SplitVAE) else "full",
        "golden": GoldenSpec(file=_GOLDEN, prompt=prompt, seed=seed), "files": _files(part), "backends": specs,
    }  # fmt: skip
    manifest = validated(content, part / "manifest.json")
    _save_manifest(manifest, part)
    yield from _add_golden(part, manifest, golden)


def _copy_tokenizer(folder: Path, into: Path, rows: int | None = None) -> None:
    """Copy a tokenizer's own files: in some layouts a model's weights lie beside them.

    The copy has `rows` as its limit where the model's config.json sets another one than the tokenizer's.
    """
    into.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"):
        if (folder / name).is_file():
            shutil.copy(folder / name, into)
    if rows is not None and Tokenizer(into).rows != rows:
        file = into / "tokenizer_config.json"
        write_json(file, (read_json(file) if file.is_file() else {}) | {"model_max_length": rows})


def _compile(
    pipeline: Pipeline, in_place: bool, made: list[tuple[Compiler, BackendSpec]], part: Path, store: WeightStore,
    older: Reusable,
) -> Iterator[str]:  # fmt: skip
    """Compile every graph into graphs/<backend>-<target>/ and describe it in each spec; yields a line for each.

    The compilers take the same graphs, so each graph is traced once.
    """
    for _, spec in made:
        (part / "graphs" / spec.key).mkdir(parents=True)
    stages = stage_graphs(pipeline, in_place)
    for number, graph in enumerate(stages, start=1):
        begun, program = time.perf_counter(), trace(graph)
        for compiler, spec in made:
            file = part / "graphs" / spec.key / f"{graph.name}.{compiler.suffix}"
            source = compiler.source(program)
            reused = older.copy(source, file)
            weights = compiler.adopt(program, file) if reused else compiler.write(program, file)
            inputs, outputs = compiler.signature(program)
            spec.graphs[graph.name] = GraphSpec(
                file=str(file.relative_to(part)), inputs=inputs, outputs=outputs,
                weights={name: store.add(graph.name, name, value) for name, value in weights.items()},
                aliases=graph.aliases, mutates=graph.mutates, source=source,
            )  # fmt: skip
            spent = "reused" if reused else f"{time.perf_counter() - begun:.1f} s"
            yield f"{spec.key} {number}/{len(stages)} {graph.name}: {spent}"
            begun = time.perf_counter()


def _add_golden(part: Path, manifest: Manifest, golden: dict[str, Tensor]) -> Iterator[str]:
    """Replay the golden frames on the written bundle, compare them with torch's, and store them beside these."""
    allowed = TOLERANCE[manifest.precision]
    for key in manifest.backends:
        try:
            frames = _replayed(part, manifest, key)
        except NotHere as error:
            yield f"{key}: golden frames not replayed: {error}"
            continue
        worst = _apart(frames, golden["frames"], manifest.precision)
        if worst > allowed:
            raise ValueError(f"export: got frames of {key} {worst} grey levels off torch's, expected at most {allowed}")
        golden[f"frames.{key}"] = torch.from_numpy(frames)
        yield f"{key}: golden frames replayed, {COUNTED[manifest.precision]} {worst} grey levels off torch's"
    save_file(golden, part / _GOLDEN)
    _save_manifest(manifest.model_copy(update={"files": manifest.files | _files(part, _GOLDEN)}), part)


def _files(part: Path, pattern: str = "*") -> dict[str, FileSpec]:
    return {
        str(file.relative_to(part)): FileSpec(bytes=file.stat().st_size, sha256=file_hash(file))
        for file in sorted(part.rglob(pattern))
        if file.is_file()
    }


def _save_manifest(manifest: Manifest, part: Path) -> None:
    absent = {"decoder"} if manifest.decoder == "full" else None  # as older bundles have it
    text = manifest.model_dump_json(indent=1, exclude=absent)
    (part / "manifest.json").write_text(f"{text}\n", encoding="utf-8")


def _precision(pipeline: Pipeline) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return quantized_as(pipeline) or names[pipeline.dtype]


def _replayed(folder: Path, manifest: Manifest, backend: str) -> np.ndarray:
    """The golden frames on one backend of a bundle with good hashes. The prompt is read as when it was written."""
    pipeline, golden = load_bundle(folder, backend, verify=False), manifest.golden
    assert isinstance(pipeline, Pipeline)  # the entries of a manifest are
    before = fold_prompt(golden.prompt)
    if manifest.prompt_cleaning == "ftfy" or before == clean_prompt(golden.prompt):
        return golden_frames(pipeline, golden.prompt, golden.seed)
    assert pipeline.tokenizer is not None  # a bundle has one
    ids, mask = pipeline.tokenizer.ids(before)
    with torch.inference_mode():
        embedding = pipeline.stages.encode_text(ids.to(pipeline.device), mask.to(pipeline.device))
    return golden_frames(pipeline, embedding, golden.seed)


def golden_frames(pipeline: Pipeline, prompt: str | Tensor, seed: int) -> np.ndarray:
    """The first chunks of a stream, uint8 [T, H, W, 3]."""
    with pipeline.stream(prompt, seed=seed) as stream:
        return np.concatenate([stream.next_chunk() for _ in range(GOLDEN_CHUNKS)])


def verify_bundle(folder: Path, backends: Sequence[str] = ()) -> dict[str, int | NotHere]:
    """Check every hash, then replay the golden frames on `backends` (on all where empty).

    Returns each backend's difference in grey levels, as TOLERANCE counts it: from the frames that it gave when it was
    exported, or from torch's where it could not run there. Where it does not run here, it returns the reason; if none
    of a named backend runs here, or none at all, it raises that.
    """
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    stored = load_file(folder / manifest.golden.file)
    found: dict[str, int | NotHere] = {}
    for key, backend in manifest.backends.items():
        if not backends or backend.backend in backends:
            try:
                frames = _replayed(folder, manifest, key)
                found[key] = _apart(frames, stored.get(f"frames.{key}", stored["frames"]), manifest.precision)
            except NotHere as error:
                found[key] = error
    for name in backends or [""]:
        results = [result for key, result in found.items() if name in ("", manifest.backends[key].backend)]
        if not results:
            raise ValueError(f"verify: got backend {name}, expected one of {', '.join(manifest.backends)}")
        if all(isinstance(result, NotHere) for result in results):
            raise cast(NotHere, results[0])
    return found


def _apart(got: np.ndarray, expected: Tensor, precision: str) -> int:
    """Difference in grey levels, as TOLERANCE counts it."""
    if got.shape != tuple(expected.shape):
        raise ValueError(f"golden: got frames {list(got.shape)}, expected {list(expected.shape)}")
    difference = np.abs(got.astype(int) - expected.numpy().astype(int))
    return math.ceil(difference.mean()) if COUNTED[precision] == "on average" else int(difference.max())
