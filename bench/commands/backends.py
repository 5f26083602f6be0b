"""What each step of the fast path gives, on the same weights in one run: plain PyTorch, torch.compile, fused kernels,
CUDA graphs, FP8; and the frame-wise self-forcing preset on the fastest of them in bf16.
"""

import argparse
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
from bench.report import saved as results
from engine.loader import FP8_KEEP, make_stages
from engine.model.cache import FP8
from engine.model.layers import Attend, Block
from engine.model.transformer import TextKV, WanTransformer
from engine.presets import find_preset
from engine.runtime.cuda_graphs import GraphedStages
from engine.runtime.fused import FusedTransformer
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline, Stream
from kernels.launch import compilations

SELF_FORCING = "self-forcing-framewise"
EMBEDDING_ROWS = 512  # of the prompt that time to first frame starts from, as Wan's


class _Compiled:
    """A WanTransformer whose block is one torch.compile'd function: what a user gets without kernels of ours.

    Attention over the cache stays outside, as a graph break; every layer runs the same compiled code.
    """

    def __init__(self, model: WanTransformer) -> None:
        self.model, self.config, self.proj_out = model, model.config, model.proj_out
        self.prepare_text = model.prepare_text
        self._block = torch.compile(Block.forward)
        self._layer, self._attend = 0, cast(Attend, None)
        self._outside = torch.compiler.disable(self._self_attention)

    def _self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(self._layer, q, k, v)

    def encode(
        self, latent: Tensor, t: Tensor, text_kv: TextKV, cos: Tensor, sin: Tensor, attend: Attend,
        c_f: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        hidden, embedding, modulation = self.model.embed(latent, t, c_f)
        self._attend = attend
        for layer, block in enumerate(self.model.blocks):
            self._layer, text = layer, (text_kv[0][layer], text_kv[1][layer])
            hidden = self._block(cast(Block, block), hidden, modulation, *text, cos, sin, self._outside)
        return hidden, embedding

    def __call__(
        self, latent: Tensor, t: Tensor, text_kv: TextKV, cos: Tensor, sin: Tensor, attend: Attend,
        c_f: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        hidden, embedding = self.encode(latent, t, text_kv, cos, sin, attend, c_f)
        return self.model.head(hidden, embedding, latent)


def variants(pipeline: Pipeline) -> dict[str, Pipeline]:
    """Pipelines on one eager pipeline's weights, slowest first."""
    eager, gpu = models.torch_parts(pipeline), pipeline.device.type == "cuda"
    vae = copy.deepcopy(eager.vae)  # the eager ones keep theirs as it is
    if vae is not None:
        vae.fuse()

    def graphed(stages: TorchStages) -> Any:
        return GraphedStages(stages) if gpu else stages

    def fast(fp8: bool) -> TorchStages:
        fused = {role: FusedTransformer(model, fp8, FP8_KEEP, role) for role, model in eager.models.items()}
        return TorchStages(eager.models, vae, eager.text_encoder, fused)

    compiled = cast(dict[str, WanTransformer], {role: _Compiled(model) for role, model in eager.models.items()})
    bf16, fp8 = fast(False), fast(True)
    found = {
        "eager": pipeline,
        "compile": replace(pipeline, stages=TorchStages(compiled, eager.vae, eager.text_encoder)),
        "kernels": replace(pipeline, stages=bf16),
    }
    if gpu:
        found["graphs"] = replace(pipeline, stages=graphed(bf16))
    found["fp8"] = replace(pipeline, stages=graphed(fp8))
    found["fp8-attention"] = replace(pipeline, stages=graphed(fp8), kv_dtype=FP8)
    return found


def self_forcing(pipeline: Pipeline) -> Pipeline:
    """The frame-wise causal preset on the weights of a greedy pipeline; on a GPU with kernels and graphs."""
    eager = models.torch_parts(pipeline)
    stages = make_stages({"dit": eager.models["sdd"]}, copy.deepcopy(eager.vae), eager.text_encoder, pipeline.device)
    return replace(pipeline, stages=stages, preset=find_preset(SELF_FORCING), preset_name=SELF_FORCING)


@torch.inference_mode()
def flow_errors(found: dict[str, Pipeline], seed: int) -> dict[str, float]:
    """rms error of the second chunk's latent against the eager one's, over its rms: same noise, same prompt."""
    latents = {}
    for name, pipeline in found.items():
        with pipeline.stream(_embedding(pipeline), seed=seed) as made:
            latents[name] = [made.next_latent() for _ in range(2)][-1].float()
    truth = latents["eager"]
    size = float(truth.square().mean().sqrt())
    return {name: float((x - truth).square().mean().sqrt()) / size for name, x in latents.items()}


def first_frame_ms(pipeline: Pipeline, repeats: int = 5) -> float:
    """From a prompt's embedding to the first frame on the host, warm: the median of some streams."""
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
    """An open stream whose chunks are timed in turn with the others'."""

    stream: Stream
    pipeline: Pipeline

    def seconds(self, chunks: int) -> float:
        """A chunk's share of a run of some: within a run a stream looks ahead as it does for a user."""
        _finish(self.pipeline)
        start = time.perf_counter()
        for _ in range(chunks):
            self.stream.next_chunk()
        _finish(self.pipeline)
        return (time.perf_counter() - start) / chunks


def _made(found: dict[str, Pipeline]) -> dict[str, int]:
    """Kernels compiled by now, and graphs captured."""
    graphs = {name: getattr(p.stages, "captured", 0) for name, p in found.items()}
    return {"kernels": compilations(), **graphs}


def race(found: dict[str, Pipeline], prompt: str, seed: int, rounds: int, burst: int) -> dict[str, Any]:
    """Milliseconds a steady chunk of every variant, in turn, and the ratio to eager."""
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


def reports(found: dict[str, Pipeline], source: models.Source, args: argparse.Namespace) -> dict[str, Any]:
    """The whole report of `bench stream` for the long runs: stages, percentiles, memory, MFU."""
    made = {}
    for name in args.report or (["graphs", "fp8"] if "graphs" in found else ["kernels"]):
        if name not in found:
            raise ValueError(f"--report: got {name}, expected one of {', '.join(found)}")
        frames = args.chunks * found[name].preset.chunk * found[name].temporal
        make = partial(found.__getitem__, name)
        report, checks = stream.measure(make, source.label, args.prompt, args.seed, frames, 1, "null")
        if check.refused(checks):
            raise RuntimeError(f"{name}: got a red check, expected none")
        made[name] = report
        print(f"{name}: {args.chunks} chunks, {report['fps_steady']:.1f} fps", file=sys.stderr)
    return made


def measure(source: models.Source, args: argparse.Namespace) -> tuple[dict[str, Any], list[check.Check]]:
    """Checks and errors first, then everything in turn, then the long runs."""
    base = source.pipeline("greedy")
    report: dict[str, Any] = {"machine": machine(base.device), "stream": stream_header(base, source.label)}
    found = variants(base)
    racing = found | {SELF_FORCING: self_forcing(base)}
    checks = [c for i, (name, p) in enumerate(racing.items()) if name != "compile"
              for c in check.run(p, args.prompt, args.seed, i > 0)]  # fmt: skip
    errors = flow_errors(found, args.seed)
    for name, error in errors.items():
        limit = check.FP8_TOLERANCE if "fp8" in name else check.TOLERANCE[base.dtype]
        checks.append(check.Check(f"latent of {name}", error <= limit, f"rms error {error:.1e}, limit {limit:.0e}"))
    report["checks"] = [asdict(c) for c in checks]
    if not all(c.passed for c in checks):
        return report, checks
    rows = race(racing, args.prompt, args.seed, args.rounds, args.burst)
    for name, row in rows.items():
        row |= {"error": errors.get(name), "ttff_from_embedding_ms": first_frame_ms(racing[name])}
    report |= {
        "variants": rows,
        "reports": reports(found, source, args),
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


def run(args: argparse.Namespace) -> int:
    source = models.source_of(args)
    if source.bundle or args.rounds < 1 or args.burst < 1 or args.chunks < 8:
        raise ValueError(f"got {'a bundle' if source.bundle else f'{args.rounds} rounds of {args.burst}'} and "
                         f"{args.chunks} chunks, expected a model, at least 1 round of 1 and 8 chunks")  # fmt: skip
    source = replace(source, eager=True, precision="bf16")
    report, checks = measure(source, args)
    if not args.json:
        print_header(report["machine"], report["stream"])
    if check.refused(checks):
        return 1
    if not args.json:
        print_report(report)
    results.emit(args, "backends", report)
    return 0


def add_parser(commands: Any) -> None:
    command = commands.add_parser(
        "backends", help="what kernels, CUDA graphs and FP8 give, on the same weights in bf16"
    )
    models.add_arguments(command)
    command.add_argument("--rounds", type=int, default=10, help="rounds of the race")
    command.add_argument("--burst", type=int, default=4, help="chunks a variant streams in a round")
    command.add_argument("--chunks", type=int, default=200, help="chunks of the long runs")
    command.add_argument(
        "--report", action="append", metavar="VARIANT", help="long runs; default: graphs and fp8, without a GPU kernels"
    )
    results.add_arguments(command)
    command.set_defaults(run=run)
