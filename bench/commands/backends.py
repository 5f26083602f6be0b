"""The gain of each step of the fast path, on the same weights in one run: plain PyTorch, torch.compile, fused kernels,
CUDA graphs, FP8; and the frame-wise self-forcing preset on the fastest of them in bf16.
"""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bench.commands import stream
from bench.instruments import check, models
from bench.instruments.flops import steady_index
from bench.instruments.header import machine, print_header, stream_header
from bench.instruments.spread import interleaved, paired_ratio, quartiles, table
from bench.report import saved
from engine.loader import FP8_KEEP, make_stages
from engine.model.cache import FP8
from engine.model.layers import Attend, Block
from engine.model.quantized import quantized
from engine.model.transformer import TextKV, WanTransformer
from engine.options import option
from engine.presets import find_preset
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline, PythonStream
from kernels.launch import compilations

SELF_FORCING = "self-forcing-framewise"
EMBEDDING_ROWS = 512  # as Wan's prompts have; the time to the first frame starts from such an embedding


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, models.Source):
    rounds: int = option(10, "rounds of the race")
    burst: int = option(4, "chunks that a variant streams in a round")
    chunks: int = option(200, "chunks of the long runs")
    report: tuple[str, ...] = option(
        (), "long runs; may be repeated; default: graphs and fp8, without a GPU kernels", metavar="VARIANT"
    )


class _Compiled:
    """A WanTransformer whose block is one function under torch.compile: the speed that a user gets without our kernels.

    Attention over the cache stays outside, as a graph break; every layer runs the same compiled code.
    """

    def __init__(self, model: WanTransformer) -> None:
        self.model, self.config, self.proj_out = model, model.config, model.proj_out
        self.prepare_text = model.prepare_text
        self._block = torch.compile(_block)
        self._layer, self._attend = 0, cast(Attend, None)
        self._outside = torch.compiler.disable(self._self_attention)

    def _self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(self._layer, q, k, v)

    def encode(
        self, latent: Tensor, t: Tensor, text_kv: TextKV, cos: Tensor, sin: Tensor, attend: Attend,
        c_f: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        hidden, embedding, modulation = self.model.embed(latent, t, c_f)
        self._attend = attend
        for layer, block in enumerate(self.model.blocks):
            self._layer, text = layer, (text_kv[0][layer], text_kv[1][layer])
            hidden = self._block(cast(Block, block), hidden, modulation, *text, cos, sin, self._outside, 0)
        return hidden, embedding

    def __call__(
        self, latent: Tensor, t: Tensor, text_kv: TextKV, cos: Tensor, sin: Tensor, attend: Attend,
        c_f: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        hidden, embedding = self.encode(latent, t, text_kv, cos, sin, attend, c_f)
        return self.model.head(hidden, embedding, latent)


def _block(block: Block, *args: Any) -> Tensor:
    """The block's result as a tensor, for the compiler."""
    return block(*args).total()


def variants(pipeline: Pipeline) -> dict[str, Pipeline]:
    """Pipelines that share one eager pipeline's weights, slowest first."""
    eager, gpu = models.torch_parts(pipeline), pipeline.device.type == "cuda"
    vae = copy.deepcopy(eager.vae)  # fuse() changes a VAE, and the eager pipelines keep theirs
    if vae is not None and gpu:
        vae.fuse()

    def graphed(stages: TorchStages) -> Any:
        return GraphedStages(stages) if gpu else stages

    def fast(fp8: bool) -> TorchStages:
        models = eager.models
        if fp8:
            models = {role: quantized(model, "fp8", FP8_KEEP, role) for role, model in models.items()}
        return TorchStages(models, vae, eager.text_encoder, join_context=gpu)

    compiled = cast(dict[str, WanTransformer], {role: _Compiled(model) for role, model in eager.models.items()})
    bf16, fp8 = fast(False), fast(True)
    found = {
        "eager": pipeline,
        "compile": replace(pipeline, stages=TorchStages(compiled, eager.vae, eager.text_encoder, eager=True)),
        "kernels": replace(pipeline, stages=bf16),
    }
    if gpu:
        found["graphs"] = replace(pipeline, stages=graphed(bf16))
    found["fp8"] = replace(pipeline, stages=graphed(fp8))
    found["fp8-attention"] = replace(pipeline, stages=graphed(fp8), kv_dtype=FP8)
    return found


def self_forcing(pipeline: Pipeline) -> Pipeline:
    """The frame-wise causal preset on a greedy pipeline's weights; on a GPU with kernels and CUDA graphs."""
    eager = models.torch_parts(pipeline)
    stages = make_stages({"dit": eager.models["sdd"]}, copy.deepcopy(eager.vae), eager.text_encoder, pipeline.device)
    return replace(pipeline, stages=stages, preset=find_preset(SELF_FORCING), preset_name=SELF_FORCING)


@torch.inference_mode()
def flow_errors(found: dict[str, Pipeline], seed: int) -> dict[str, float]:
    """rms error of the second chunk's latent against the eager latent, over its rms; same noise, same prompt."""
    latents = {}
    for name, pipeline in found.items():
        with pipeline.stream(_embedding(pipeline), seed=seed) as made:
            latents[name] = [made.next_latent() for _ in range(2)][-1].float()
    truth = latents["eager"]
    size = float(truth.square().mean().sqrt())
    return {name: float((x - truth).square().mean().sqrt()) / size for name, x in latents.items()}


def first_frame_ms(pipeline: Pipeline, repeats: int = 5) -> float:
    """Milliseconds from a prompt's embedding to the first frame on the host, warm: the median of `repeats` streams."""
    samples = []
    for seed in range(repeats):
        embedding = _embedding(pipeline)
        _finish(pipeline)
        start = time.perf_counter()
        with pipeline.stream(embedding, seed=seed) as made:
            made.next_chunk()
            samples.append(1e3 * (time.perf_counter() - start))
    return quartiles(samples)["median"]


def _embedding(pipeline: Pipeline) -> Tensor:
    made = torch.Generator().manual_seed(1)
    embedding = torch.randn(1, EMBEDDING_ROWS, pipeline.config.text_dim, generator=made)
    return embedding.to(pipeline.device, pipeline.dtype)


def _finish(pipeline: Pipeline) -> None:
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)


@dataclass
class _Lane:
    """An open stream of the race."""

    stream: PythonStream
    pipeline: Pipeline

    def seconds(self, chunks: int) -> float:
        """Seconds per chunk over `chunks` chunks in a row, in which the stream looks ahead as it does for a user."""
        _finish(self.pipeline)
        start = time.perf_counter()
        for _ in range(chunks):
            self.stream.next_chunk()
        _finish(self.pipeline)
        return (time.perf_counter() - start) / chunks


def _made(found: dict[str, Pipeline]) -> dict[str, int]:
    """How many kernels were compiled and how many graphs captured so far."""
    graphed = {name: p.stages for name, p in found.items() if isinstance(p.stages, GraphedStages)}
    graphs = {name: graphed[name].captured if name in graphed else 0 for name in found}
    return {"kernels": compilations(), **graphs}


def race(found: dict[str, Pipeline], prompt: str, seed: int, rounds: int, burst: int) -> dict[str, Any]:
    """Milliseconds per steady chunk of every variant, measured in turn, and their ratio to eager."""
    lanes = {name: _Lane(pipeline.stream(prompt, seed=seed), pipeline) for name, pipeline in found.items()}
    for name, lane in lanes.items():
        lane.seconds(max(steady_index(found[name].preset), 4))
    calls: dict[str, Callable[[], float]] = {name: partial(lane.seconds, burst) for name, lane in lanes.items()}
    before = _made(found)
    ms: dict[str, list[float]] = {name: [] for name in lanes}
    for _, name, seconds in interleaved(calls, rounds):
        ms[name].append(1e3 * seconds)
    for lane in lanes.values():
        lane.stream.close()
    if before != _made(found):
        raise RuntimeError(f"race: got kernels compiled or graphs captured in mid-stream ({before} -> {_made(found)}), "
                           "expected none once warm")  # fmt: skip
    frames = {name: p.preset.chunk * p.temporal for name, p in found.items()}
    return {
        name: {
            "ms_per_chunk": quartiles(samples),
            "fps": 1e3 * frames[name] / quartiles(samples)["median"],
            "ratio": paired_ratio(samples, ms["eager"]),
        }
        for name, samples in ms.items()
    }


def reports(found: dict[str, Pipeline], options: Options) -> dict[str, Any]:
    """The whole report of `bench stream` for the long runs: parts, percentiles, memory, MFU."""
    made = {}
    for name in options.report or (["graphs", "fp8"] if "graphs" in found else ["kernels"]):
        if name not in found:
            raise ValueError(f"--report: got {name}, expected one of {', '.join(found)}")
        frames = options.chunks * found[name].preset.chunk * found[name].temporal
        make = partial(found.__getitem__, name)
        report, checks = stream.measure(make, options.label, options.prompt, options.seed, frames, 1, "null")
        if check.refused(checks):
            raise RuntimeError(f"{name}: got a red check, expected none")
        made[name] = report
        print(f"{name}: {options.chunks} chunks, {report['fps_steady']:.1f} fps", file=sys.stderr)
    return made


def measure(options: Options) -> tuple[dict[str, Any], list[check.Check]]:
    """Checks and errors first, then the race of all variants, then the long runs."""
    base = options.pipeline("greedy")
    report: dict[str, Any] = {"machine": machine(base.device), "stream": stream_header(base, options.label)}
    found = variants(base)
    racing = found | {SELF_FORCING: self_forcing(base)}
    checks = [c for i, (name, p) in enumerate(racing.items()) if name != "compile"
              for c in check.run(p, options.prompt, options.seed, i > 0)]  # fmt: skip
    errors = flow_errors(found, options.seed)
    for name, error in errors.items():
        limit = check.FP8_TOLERANCE if "fp8" in name else check.TOLERANCE[base.dtype]
        checks.append(check.Check(f"latent of {name}", error <= limit, f"rms error {error:.1e}, limit {limit:.0e}"))
    report["checks"] = [asdict(c) for c in checks]
    if not all(c.passed for c in checks):
        return report, checks
    rows = race(racing, options.prompt, options.seed, options.rounds, options.burst)
    for name, row in rows.items():
        row |= {"error": errors.get(name), "ttff_from_embedding_ms": first_frame_ms(racing[name])}
    report |= {
        "variants": rows,
        "reports": reports(found, options),
        "timings": {name: row["ms_per_chunk"] for name, row in rows.items()},
        "commit": report["machine"]["commit"],
        "device": report["machine"]["device"],
    }
    return report, checks


def print_report(r: dict[str, Any]) -> None:
    print("\n" + table([
        {"variant": name, "ms/chunk": v["ms_per_chunk"]["median"], "fps": v["fps"], "of eager": v["ratio"]["median"],
         "first frame ms": v["ttff_from_embedding_ms"], "error": v["error"]}
        for name, v in r["variants"].items()
    ]))  # fmt: skip
    print("\nchunks with VAE, median; ratio and error to eager; first frame from a prompt's embedding, warm")
    for name, report in r["reports"].items():
        print(f"\n== {name}, {report['chunks']} chunks")
        stream.print_report(report)


def run(options: Options) -> int:
    options.prepare()
    if options.bundle or options.rounds < 1 or options.burst < 1 or options.chunks < 8:
        got = "a bundle" if options.bundle else f"{options.rounds} rounds of {options.burst}"
        raise ValueError(f"got {got} and {options.chunks} chunks, expected a model, at least 1 round of 1 and 8 chunks")
    report, checks = measure(replace(options, eager=True, precision="bf16"))
    if not options.json:
        print_header(report["machine"], report["stream"])
    if check.refused(checks):
        return 1
    if not options.json:
        print_report(report)
    saved.emit(options, "backends", report)
    return 0
