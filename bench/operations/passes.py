"""One pass of a transformer in every precision of a processor: in PyTorch and in ONNX Runtime, on the same inputs."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.instruments.random_weights import RandomSource
from bench.instruments.spread import interleaved, paired_ratio, quartiles
from engine.bundles.manifest import GraphSpec
from engine.bundles.onnx import OnnxGraph
from engine.loader import FP8_KEEP, load, make_stages
from engine.model.transformer import WanTransformer
from engine.stream import Pipeline
from engine.weights.checkpoint import fill
from export.calibrate import calibrate
from export.compilers import OnnxCompiler
from export.eight_bits import Recipe, quantize
from export.graphs import Graph, stage_graphs
from export.program import trace

PROMPT = "a red circle moving right slowly on a gray background"
HEAD, LAYERS, SIDE = 64, 2, 24  # of a random transformer; SIDE latent pixels, one token each
RECIPES = {
    "fp8 tensor": Recipe("tensor", FP8_KEEP),
    "int8 token": Recipe("token", FP8_KEEP, "int8"),
    "int8 tensor": Recipe("tensor", FP8_KEEP, "int8"),
}
Call = Callable[[], Any]


def pipeline_of(width: int) -> Pipeline:
    """The embedded model for width 0; else two random layers of that width, on 576 tokens, with its VAE and text."""
    embedded = load(device="cpu", precision="fp32")
    if not width:
        return embedded
    if width % HEAD:
        raise ValueError(f"fp8: got width {width}, expected a multiple of {HEAD}")
    config = replace(embedded.config, num_attention_heads=width // HEAD, attention_head_dim=HEAD, ffn_dim=4 * width,
                     num_layers=LAYERS)  # fmt: skip
    models = {}
    for number, role in enumerate(embedded.stages.modules().keys() & {"etm", "sdd"}):
        models[role] = WanTransformer(config, conditioned=role == "sdd")
        fill(models[role], RandomSource(models[role], "random", number), torch.float32, torch.device("cpu"))
        models[role].fuse()
    parts: Any = embedded.stages
    stages = make_stages(models, parts.vae, parts.text_encoder, torch.device("cpu"))
    side = SIDE * embedded.spatial
    return replace(embedded, stages=stages, config=config, height=side, width=side, adapters=None, plan=None)


def pass_speeds(width: int, rounds: int) -> dict[str, Any]:
    """{variant: its time in ms, ratio to fp32 in the same runtime, error against fp32} of the SDD's pass.

    Inputs are those of a stream: the pass that begins its third chunk.
    """
    base = pipeline_of(width)
    calibration = calibrate(base, [PROMPT], chunks=3)
    pipelines = {"fp32": base} | {name: quantize(base, recipe, calibration) for name, recipe in RECIPES.items()}
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        inputs: dict[str, Tensor] = {}
        for name, pipeline in pipelines.items():
            graph = next(graph for graph in stage_graphs(pipeline) if graph.name == "sdd")
            inputs = inputs or _streamed(base, graph)
            calls[f"torch {name}"] = partial(_in_torch, graph, inputs)
            calls[f"onnx {name}"] = partial(_opened(graph, Path(folder) / f"{name}.onnx"), inputs)
        flows = {name: call()["flow"] for name, call in calls.items()}  # also warms up
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _, name, spent in interleaved({n: partial(_timed, call) for n, call in calls.items()}, rounds):
            times[name].append(spent)
    rows = {}
    for name in calls:
        plain = f"{name.split()[0]} fp32"
        error = float((flows[name] - flows["torch fp32"]).norm() / flows["torch fp32"].norm())
        ratio = paired_ratio(times[name], times[plain])
        rows[name] = {"ms": quartiles([1e3 * t for t in times[name]]), "ratio": ratio, "error": error}
    _, ph, pw = base.config.patch_size
    tokens = base.height // base.spatial // ph * (base.width // base.spatial // pw)
    return {"width": base.config.dim, "layers": base.config.num_layers, "tokens": tokens, "rows": rows}


def _streamed(pipeline: Pipeline, graph: Graph) -> dict[str, Tensor]:
    """What the graph gets for the first step of a stream's third chunk."""
    found: list[tuple[Any, Any, Any]] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(pipeline.stages, name)

        def run(self, step: Any, cache: Any, text_kv: Any) -> Tensor:
            if step.kind.graph == "sdd":
                kept = cache.k.clone(), cache.v.clone()
                found.append((step, kept, text_kv["sdd"]))
            return pipeline.stages.run(step, cache, text_kv)

    with replace(pipeline, stages=Watched()).stream(PROMPT, seed=0) as stream:
        for _ in range(2):
            stream.next_latent()
        seen = len(found)
        stream.next_latent()
    step, caches, text = found[seen]
    rows = len(step.cos) // step.frames  # of a slot
    made = {"latent": step.latent, "t": step.t, "c_f": step.c_f, "rope_cos": step.cos, "rope_sin": step.sin,
            "start_row": torch.tensor([step.slot * rows]), "valid_rows": torch.tensor([step.valid * rows])}  # fmt: skip
    for layer in range(pipeline.config.num_layers):
        for side, sides, cache in zip("kv", text, caches, strict=True):
            made |= {f"text_{side}_{layer}": sides[layer], f"{side}_{layer}": cache[layer].flatten(1, 2).flatten(2)}
    return {name: made[name].contiguous() for name in graph.inputs}


def _in_torch(graph: Graph, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(graph.outputs, graph.module(*inputs.values()), strict=True))


def _opened(graph: Graph, file: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The graph as the onnx backend runs it, on one thread."""
    program, compiler = trace(graph), OnnxCompiler()
    weights = compiler.write(program, file)
    inputs, outputs = compiler.signature(program)
    spec = GraphSpec(file=file.name, inputs=inputs, outputs=outputs, weights={}, aliases={})
    return OnnxGraph("sdd", file, spec, weights, 1)


def _timed(call: Call) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
