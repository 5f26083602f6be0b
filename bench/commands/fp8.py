"""The loss of quality by FP8 and INT8: each pass against fp32, and the clips that come out; the speed of a pass.

python -m bench fp8 [--prompts 32] [--sensitivity]     FP8: errors and scores
python -m bench fp8 --int8                             INT8 beside it
python -m bench fp8 --speed 0 --speed 768              a pass, of the embedded model and of others

Each pass runs in fp32 and in FP8 on the inputs of one fp32 stream, so errors do not accumulate over passes. An error is
relative to the fp32 output. Scores are the exact evaluator's, on the embedded model; all rows have the same prompts and
seeds.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.instruments.header import machine
from bench.instruments.random_weights import RandomSource
from bench.operations.passes import pass_speeds
from bench.report import saved
from distill.scores.pixels import from_uint8
from distill.scores.tasks import find_task
from engine.config import Precision, TransformerConfig
from engine.loader import FP8_KEEP, load
from engine.model.cache import FP8, CachedAttention, RingCache
from engine.model.quantized import quantized
from engine.model.rope import rope_tables
from engine.model.transformer import WanTransformer
from engine.options import option
from engine.runtime.passes import Pass
from engine.stream import Pipeline
from engine.weights.checkpoint import fill
from export.calibrate import calibrate
from export.eight_bits import GRANULARITIES, Calibration, Recipe, quantizable, quantize

SCORES = ("semantic", "quality", "total", "object_class", "direction", "speed")
CALIBRATION = {"prompts": 12, "seed": 7, "chunks": 9}


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported):
    prompts: int = option(32, "held-out clips")
    frames: int = option(33, "frames per clip")
    seed: int = option(20, "of the first clip")
    sensitivity: bool = option(False, "also one block, and one kind of linear, at a time")
    blocks: int = option(0, "instead: N random full-width blocks, a product at a time", metavar="N")
    int8: bool = option(False, "INT8 in the place of FP8's graphs")
    speed: tuple[int, ...] = option(
        (), "instead: time of a pass, of the embedded model for 0, else of a random one of that width", metavar="WIDTH"
    )
    rounds: int = option(15, "passes of each variant, for --speed")


class _Beside:
    """A backend that returns the reference's results and records the errors of other backends on the same inputs."""

    name = "torch"

    def __init__(self, reference: Pipeline, others: dict[str, Pipeline]) -> None:
        self.stages, self.others = reference.stages, others
        self.squares: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stages, name)  # text and VAE are not compared

    def run(self, step: Pass, cache: RingCache, text_kv: Any) -> Tensor:
        made = {}
        for key, other in self.others.items():
            if step.kind.graph == "sdd_context":  # its result is not used
                continue
            dtype, twin = other.dtype, copy.copy(cache)
            twin.k, twin.v = ([part.to(dtype, copy=True) for part in side] for side in (cache.k, cache.v))
            text = {role: tuple(x.to(dtype) for x in pair) for role, pair in text_kv.items()}
            c_f = None if step.c_f is None else step.c_f.to(dtype)
            made[key] = other.stages.run(replace(step, latent=step.latent.to(dtype), c_f=c_f), twin, text).float()
        expected = self.stages.run(step, cache, text_kv)
        size = float(expected.square().sum())
        for key, got in made.items():
            off = float((got - expected).square().sum())
            self.squares.setdefault((key, step.kind.graph), []).append((off, size))
        return expected

    def errors(self, key: str) -> dict[str, float]:
        """{pass: |other - fp32| / |fp32|} over all calls."""
        sums = {name: np.sum(pairs, axis=0) for (other, name), pairs in self.squares.items() if other == key}
        return {name: float(np.sqrt(off / size)) for name, (off, size) in sums.items()}


def pass_errors(
    reference: Pipeline, others: dict[str, Pipeline], prompts: Iterable[str], chunks: int
) -> dict[str, dict[str, float]]:
    """{variant: {pass: relative error}} on the inputs that streams of the reference produce."""
    beside = _Beside(reference, others)
    watched = replace(reference, stages=beside)
    for seed, prompt in enumerate(prompts):
        with watched.stream(prompt, seed=seed) as stream:
            for _ in range(chunks):
                stream.next_latent()
    return {key: beside.errors(key) for key in others}


def clips(pipeline: Pipeline, prompts: list[str], seed: int, frames: int) -> list[Tensor]:
    """One clip per prompt, float [3, frames, H, W]; clip i has seed `seed + i`."""
    videos = []
    for i, prompt in enumerate(prompts):
        with pipeline.stream(prompt, seed=seed + i, frames=frames) as stream:
            videos.append(from_uint8(np.stack(list(stream))))
    return videos


def sensitivity(reference: Pipeline, amax: Calibration, prompts: list[str], chunks: int) -> dict[str, dict[str, float]]:
    """{ROLE.blocks.N: errors} with that block alone in FP8, {ROLE.*.NAME: errors} with that linear of every block."""
    names = quantizable(reference)
    parts = [name.split(".", 3) for name in names]  # role, blocks, N, linear
    groups = {f"{role}.blocks.{n}" for role, _, n, _ in parts} | {f"{role}.*.{leaf}" for role, _, _, leaf in parts}
    others = {}
    for group in sorted(groups):
        role, middle, leaf = group.split(".", 2)
        inside = [
            name for name, (r, _, n, last) in zip(names, parts, strict=True)
            if r == role and (last == leaf if middle == "*" else n == leaf)
        ]  # fmt: skip
        kept = tuple(name for name in names if name not in inside)
        others[group] = quantize(reference, Recipe("tensor", kept), amax)
    return pass_errors(reference, others, prompts, chunks)


PRODUCTS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")


@torch.inference_mode()
def block_errors(seeds: int, side: int = 16) -> dict[str, dict[str, float]]:
    """Error of a random block of Wan2.1-1.3B's width with one product in FP8, with all, with FP8 attention too.

    The error is that of the block's output minus its input, against the same block in float32: rms error over rms. The
    row bf16 is the yardstick. side x side tokens attend to as many in the cache; inputs and weights are normal.
    """
    config = TransformerConfig(num_layers=1)
    keeps = {"bf16": ["*"], "fp8 all": [], "fp8 as by default": list(FP8_KEEP)}
    keeps |= {f"fp8 {name}": [f"*.{other}" for other in PRODUCTS if other != name] for name in PRODUCTS}
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = WanTransformer(config)
        fill(model, RandomSource(model, "random block", seed), torch.float32, torch.device("cpu"))
        model.fuse()
        inputs = [torch.randn(1, side**2, config.dim) for _ in range(2)]
        text, t = model.prepare_text(torch.randn(1, 512, config.text_dim)), torch.tensor([500.0])
        truth = _added(model, inputs, text, t, torch.float32)
        narrow = model.to(torch.bfloat16)
        narrow.fuse()
        for name, keep in (keeps | {"fp8 all, attention": []}).items():
            kv = FP8 if "attention" in name else torch.bfloat16
            got = _added(quantized(narrow, "fp8", keep, "sdd"), inputs, text, t, kv)
            error = float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt())
            found.setdefault(name, []).append(error)
    return {name: {"mean": float(np.mean(e)), "most": max(e)} for name, e in found.items()}


def _added(model: WanTransformer, inputs: list[Tensor], text: Any, t: Tensor, kv: torch.dtype) -> Tensor:
    """The block's output minus its input for the second input; the first one's keys and values are cached. float32."""
    config = model.config
    dtype, tokens = model.proj_out.weight.dtype, inputs[0].shape[1]
    side = int(tokens**0.5)
    cache = RingCache(1, 1, 2, tokens, config.num_attention_heads, config.attention_head_dim, dtype=kv)
    _, modulation = model.condition_embedder.time(t[:, None])
    for slot, x in enumerate(inputs):
        cos, sin = rope_tables([slot], side, side, config.attention_head_dim)
        k, v = (part[0].to(dtype) for part in text)
        x = x.to(dtype)
        out = model.blocks[0](x, modulation, k, v, cos, sin, CachedAttention(cache, slot, slot + 1), 0).total()
    return out.float() - x.float()


def run(options: Options) -> int:
    if options.speed:
        return _run_speed(options)
    if options.blocks:
        return _run_blocks(options)
    if options.prompts < 1 or options.frames < 2:
        raise ValueError(f"fp8: got {options.prompts} prompts and {options.frames} frames, expected at least 1 and 2")
    task = find_task("scenes")
    torch.set_num_threads(1)
    reference = load(device="cpu", precision="fp32")
    seen = [spec.caption for spec in task.draw(CALIBRATION["prompts"], CALIBRATION["seed"])]
    amax = calibrate(reference, seen, chunks=CALIBRATION["chunks"])
    # "engine fp8" is what --precision fp8 streams on; the others are what an export holds.
    kinds: dict[str, Precision] = {"bf16": "bf16", "engine fp8": "fp8"}
    if options.int8:
        kinds["engine int8"] = "int8"
    others = {name: load(device="cpu", precision=kind) for name, kind in kinds.items()}
    for granularity in GRANULARITIES:
        if options.int8:
            recipe = Recipe(granularity, FP8_KEEP, "int8")
            others[f"int8 {granularity}"] = quantize(reference, recipe, amax)
            continue
        others[f"fp8 {granularity}"] = quantize(reference, Recipe(granularity), amax)
        last = f"blocks.{reference.config.num_layers - 1}.*"
        others[f"fp8 {granularity}, {last} kept"] = quantize(reference, Recipe(granularity, (last,)), amax)
    specs = task.draw(options.prompts, options.seed, hidden=True)
    prompts = [spec.caption for spec in specs]
    errors = pass_errors(reference, others, prompts[:8], CALIBRATION["chunks"])
    rows: dict[str, Any] = {}
    plain: list[Tensor] = []
    for name, pipeline in {"fp32": reference, **others}.items():
        made = clips(pipeline, prompts, options.seed, options.frames)
        plain = plain or made
        rows[name] = {"errors": errors.get(name, {}), "scores": task.score(made, specs), **_apart(made, plain)}
        if not options.json:
            print(_row(name, rows[name]), flush=True)
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "prompts": options.prompts,
        "frames": options.frames,
    }
    result |= {"seed": options.seed, "calibration": CALIBRATION, "rows": rows}
    if options.sensitivity:
        result["sensitivity"] = sensitivity(reference, amax, prompts[:4], CALIBRATION["chunks"])
        if not options.json:
            for group, found in result["sensitivity"].items():
                print(f"{group:28} " + "  ".join(f"{name} {error:.2e}" for name, error in found.items() if error))
    result |= {"steps": amax.summary(), "ratios": amax.ratios()}
    saved.emit(options, "fp8", result, "int8" if options.int8 else "")
    return 0


def _apart(made: list[Tensor], plain: list[Tensor]) -> dict[str, float]:
    """Grey levels on average, and PSNR in dB, of clips in [-1, 1] against those of fp32."""
    off = [(a - b) * 127.5 for a, b in zip(made, plain, strict=True)]
    levels = float(np.mean([float(x.abs().mean()) for x in off]))
    square = float(np.mean([float(x.square().mean()) for x in off]))
    return {"grey_levels": levels, "psnr": 10 * float(np.log10(255**2 / square))} if square else {"grey_levels": 0.0}


def _run_speed(options: Options) -> int:
    torch.set_num_threads(1)
    passes = [pass_speeds(width, options.rounds) for width in options.speed]
    if not options.json:
        for found in passes:
            print(f"width {found['width']}, {found['layers']} layers, {found['tokens']} tokens")
            for name, row in found["rows"].items():
                ratio = f"{row['ratio']['median']:.2f} [{row['ratio']['low']:.2f}, {row['ratio']['high']:.2f}]"
                print(f"  {name:20} {row['ms']['median']:9.2f} ms  of fp32 {ratio}  error {row['error']:.2e}")
    result = {"machine": machine(torch.device("cpu")), "passes": passes}
    saved.emit(options, "fp8", result, "speed")
    return 0


def _run_blocks(options: Options) -> int:
    rows = block_errors(options.blocks)
    if not options.json:
        for name, error in rows.items():
            print(f"{name:24} {error['mean']:.2e}  at most {error['most']:.2e}")
    result = {"machine": machine(torch.device("cpu")), "blocks": options.blocks, "rows": rows}
    saved.emit(options, "fp8", result, "blocks")
    return 0


def _row(name: str, row: dict[str, Any]) -> str:
    errors = "  ".join(f"{name} {error:.2e}" for name, error in row["errors"].items())
    scores = "  ".join(f"{key} {row['scores'][key]['mean']:.3f} ± {row['scores'][key]['se']:.3f}" for key in SCORES)
    apart = f"{row['grey_levels']:.2f} levels, {row.get('psnr', float('inf')):.1f} dB"
    return f"{name:30} {errors:30}  {apart}  {scores}"
