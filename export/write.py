"""A pipeline of the torch backend -> a bundle directory, written beside its name and renamed when whole."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.numpy import save_file

from engine.bundle import (
    BackendSpec,
    FileSpec,
    GoldenSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
    check_hashes,
    file_hash,
    read_manifest,
)
from engine.loader import load_bundle
from engine.stream import Pipeline
from export.graphs import Graph, stage_graphs
from export.onnx_graph import to_onnx

GOLDEN_CHUNKS = 3
TOLERANCE = 2  # grey levels


class WeightStore:
    """Large constants of all graphs, each content once."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._key_of: dict[str, str] = {}

    def add(self, graph: str, name: str, value: np.ndarray) -> str:
        """The key under which this content is kept: where it was first seen."""
        digest = hashlib.sha256(str((value.dtype, value.shape)).encode() + value.tobytes()).hexdigest()
        if digest not in self._key_of:
            self._key_of[digest] = f"{graph}/{name}"
            self.arrays[f"{graph}/{name}"] = np.ascontiguousarray(value)
        return self._key_of[digest]


def write_bundle(pipeline: Pipeline, out: Path, tokenizer: Path, prompt: str, seed: int = 0) -> Iterator[str]:
    """Write `out`, yielding a line of progress for each step; the golden frames are replayed before the rename.

    tokenizer is the directory to copy, prompt and seed make the golden frames. Raises ValueError where `out` exists.
    """
    if out.exists():
        raise ValueError(f"export: got {out}, which exists, expected a new directory")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"export: got {out}, expected an existing directory {out.parent}")
    if not tokenizer.is_dir():
        raise FileNotFoundError(f"export: got no tokenizer in {tokenizer}, expected a directory")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield from _write(pipeline, part, tokenizer, prompt, seed)
        worst = verify_bundle(part)
        if worst > TOLERANCE:
            raise ValueError(f"export: got frames {worst} grey levels off, expected at most {TOLERANCE}")
        yield f"golden frames replayed, at most {worst} grey levels off"
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(pipeline: Pipeline, part: Path, tokenizer: Path, prompt: str, seed: int) -> Iterator[str]:
    folder = part / "graphs" / "onnx-cpu"
    folder.mkdir(parents=True)
    store, graphs = WeightStore(), {}
    stages = stage_graphs(pipeline)
    for number, graph in enumerate(stages, start=1):
        graphs[graph.name] = _graph(graph, part, folder / f"{graph.name}.onnx", store)
        yield f"{number}/{len(stages)} {graph.name}"
    save_file(store.arrays, part / "weights.safetensors")
    shutil.copytree(tokenizer, part / "tokenizer")
    save_file({"frames": golden_frames(pipeline, prompt, seed)}, part / "golden.safetensors")
    files = {
        str(file.relative_to(part)): FileSpec(bytes=file.stat().st_size, sha256=file_hash(file))
        for file in sorted(part.rglob("*"))
        if file.is_file()
    }
    versions = {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript")}
    preset = asdict(pipeline.preset) | {"steps": [list(steps) for steps in pipeline.preset.steps]}
    transformer = asdict(pipeline.config) | {"patch_size": list(pipeline.config.patch_size)}
    manifest = Manifest(
        format="greedy-bundle", version=1, preset_name=pipeline.preset_name, preset=preset,
        transformer=transformer, precision=_precision(pipeline),
        height=pipeline.height, width=pipeline.width, fps=float(pipeline.fps), spatial=pipeline.spatial,
        temporal=pipeline.temporal, text_rows=pipeline.tokenizer.rows if pipeline.tokenizer else 0,
        weights="weights.safetensors", tokenizer="tokenizer",
        golden=GoldenSpec(file="golden.safetensors", prompt=prompt, seed=seed), files=files,
        backends={"onnx-cpu": BackendSpec(backend="onnx", target="cpu", versions=versions, graphs=graphs)},
    )  # fmt: skip
    (part / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _precision(pipeline: Pipeline) -> Literal["fp32", "fp16", "bf16"]:
    names: dict[torch.dtype, Literal["fp32", "fp16", "bf16"]]
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return names[pipeline.dtype]


def _graph(graph: Graph, root: Path, file: Path, store: WeightStore) -> GraphSpec:
    made = to_onnx(graph)
    with torch.no_grad():
        results = graph.module(*graph.inputs.values())
    file.write_bytes(made.model.SerializeToString())
    return GraphSpec(
        file=str(file.relative_to(root)),
        inputs=[_spec(name, value) for name, value in graph.inputs.items()],
        outputs=[_spec(name, value) for name, value in zip(graph.outputs, results, strict=True)],
        weights={name: store.add(graph.name, name, value) for name, value in made.weights.items()},
        aliases=graph.aliases,
    )


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorSpec.model_validate({"name": name, "shape": list(value.shape), "dtype": dtype})


def golden_frames(pipeline: Pipeline, prompt: str, seed: int) -> np.ndarray:
    """The first chunks of a stream, uint8 [T, H, W, 3]."""
    with pipeline.stream(prompt, seed=seed) as stream:
        return np.concatenate([stream.next_chunk() for _ in range(GOLDEN_CHUNKS)])


def verify_bundle(folder: Path) -> int:
    """Check every hash, replay the golden frames; returns the largest difference in grey levels."""
    from safetensors.numpy import load_file

    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    expected = load_file(folder / manifest.golden.file)["frames"]
    got = golden_frames(load_bundle(folder), manifest.golden.prompt, manifest.golden.seed)
    if got.shape != expected.shape:
        raise ValueError(f"golden: got frames {list(got.shape)}, expected {list(expected.shape)}")
    return int(np.abs(got.astype(int) - expected.astype(int)).max())
