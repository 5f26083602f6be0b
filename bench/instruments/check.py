"""Checks that run before a measurement. Where one is red, the measurement gives no numbers."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from bench.instruments import recordings
from bench.instruments.header import ROOT, precision_of
from bench.instruments.meter import Meter, MeteredPipeline
from bench.instruments.models import torch_parts
from engine.bundles.registry import BACKENDS
from engine.config import Preset
from engine.generators.base import Geometry
from engine.model.layers import dense_attention
from engine.model.rope import rope_tables
from engine.stream import Pipeline

CASES = ROOT / "tests" / "data" / "causal"
WIDE_CASES = ROOT / "tests" / "data" / "causal_128"  # head dim 128, as Wan2.1-1.3B has
# Largest rms error of a flow over its rms, against the dense pass in the same dtype: order of summation only.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

FP8_TOLERANCE = 0.25  # e4m3 holds 4 bits of a number; 30 random blocks add up its errors

GREY_LEVELS = 2  # of 255; allowed to another runtime


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def run(pipeline: Pipeline, prompt: str, seed: int = 0, replayed: bool = False) -> list[Check]:
    """Run the checks that fit this pipeline: a recorded case, metered against plain, then streaming against dense.

    Compiled graphs have no dense pass: they must give their bundle's golden frames again. The recorded case does not
    depend on the pipeline: it is skipped where it was already `replayed` in this process.
    """
    checks = [recorded(CASES)] if CASES.is_dir() and not replayed else []
    checks.append(metered_equals_plain(pipeline, prompt, seed))
    if pipeline.stages.name == "torch":
        checks.append(streaming_equals_dense(pipeline))
    elif pipeline.stages.name in BACKENDS:
        checks.append(golden(pipeline, cast(Any, pipeline.stages).folder))
    return checks


def refused(checks: list[Check]) -> bool:
    """Whether a check is red. Names it on stderr; the caller then prints no numbers and exits with 1."""
    red = [c for c in checks if not c.passed]
    for c in red:
        print(f"error: {c.name}: {c.detail}; so there are no numbers", file=sys.stderr)
    return bool(red)


def settled(checks: list[Check], quiet: bool) -> bool:
    """Print each check, to stderr if quiet; whether all are well (`refused`)."""
    for c in checks:
        print(f"{'ok' if c.passed else 'RED':16} {c.name}: {c.detail}", file=sys.stderr if quiet else sys.stdout)
    return not refused(checks)


def recorded(folder: Path) -> Check:
    """Replay the longest recorded float32 case of public streaming code through the engine."""
    recording = recordings.read_recording(folder)
    exact = [case for case in recording.cases if case.dtype == torch.float32]
    case = max(exact, key=lambda case: (case.tensors["output"].numel(), case.name))
    error = recordings.replay(case, recording, torch.device("cpu")) - case.tensors["output"].float()
    largest, limit = float(error.abs().max()), recordings.TOLERANCE[torch.float32][0]
    return Check(f"recorded case {case.name}", largest <= limit, f"largest error {largest:.1e}, limit {limit:.0e}")


def metered_equals_plain(pipeline: Pipeline, prompt: str, seed: int, chunks: int = 3) -> Check:
    """The metered stream gives bit for bit the frames that a user gets."""
    metered = MeteredPipeline.of(pipeline, Meter(pipeline.device))
    with pipeline.stream(prompt, seed=seed) as plain, metered.stream(prompt, seed=seed) as timed:
        pairs = [(plain.next_chunk(), timed.next_chunk()) for _ in range(chunks)]
    worst = max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)
    # On a GPU libraries may choose another algorithm from one call to the next, so a small difference is allowed.
    limit = 0 if pipeline.device.type == "cpu" else GREY_LEVELS
    alive = len({a[-1].tobytes() for a, _ in pairs}) == chunks  # two pictures that stand still would be equal too
    detail = f"{chunks} chunks, at most {worst} grey levels off, {'all' if alive else 'NOT all'} different"
    return Check("metered frames are the plain ones", worst <= limit and alive, detail)


def golden(pipeline: Pipeline, folder: Path) -> Check:
    """The pipeline gives a bundle's recorded frames, at most GREY_LEVELS off."""
    from engine.bundles.manifest import read_manifest  # extra packages that only bundles need

    run = read_manifest(folder).golden
    expected = load_file(folder / run.file)["frames"]
    with pipeline.stream(run.prompt, seed=run.seed, frames=len(expected)) as stream:
        got = np.stack(list(stream))
    same = got.shape == expected.shape
    worst = int(np.abs(got.astype(int) - expected.astype(int)).max()) if same else 255
    return Check("golden frames", worst <= GREY_LEVELS, f"{len(expected)} frames, at most {worst} grey levels off")


@torch.inference_mode()
def streaming_equals_dense(pipeline: Pipeline) -> Check:
    """Compare a denoising call on caches of two chunks with one masked pass over all frames, without a cache."""
    preset, config = pipeline.preset, pipeline.config
    geometry = Geometry.of(config, 1, pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial)
    if preset.family not in DENSE:
        raise ValueError(f"check: got family {preset.family!r}, expected one with a dense pass: {', '.join(DENSE)}")
    dense, past = DENSE[preset.family](preset)
    random = torch.Generator().manual_seed(0)
    shape = (1, geometry.channels, preset.chunk, geometry.height, geometry.width)
    chunks = [torch.randn(shape, generator=random).to(pipeline.device, pipeline.dtype) for _ in range(past + 1)]
    text = torch.randn(1, 8, config.text_dim, generator=random).to(pipeline.device, pipeline.dtype)
    text_kv, t = pipeline.stages.prepare_text(text), 750.0
    state = pipeline.generator.open(geometry, text_kv)
    for chunk in chunks[:-1]:
        pipeline.generator.commit(chunk, state, supplied=True)
    flow = pipeline.generator.denoise(chunks[-1], t, state)
    expected = dense(pipeline, chunks, t, text_kv)
    error = float((flow - expected).float().square().mean().sqrt() / expected.float().square().mean().sqrt())
    limit = FP8_TOLERANCE if "fp8" in precision_of(pipeline) else TOLERANCE[pipeline.dtype]
    return Check("streaming equals a dense masked pass", error <= limit, f"rms error {error:.1e}, limit {limit:.0e}")


def _mask(sees: list[list[bool]], tokens: int, device: torch.device) -> Tensor:
    """sees[query chunk][key chunk] -> bool [tokens of all chunks] squared."""
    return torch.tensor(sees, device=device).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def _pass(
    pipeline: Pipeline, role: str, chunks: list[Tensor], positions: list[int], ts: list[float],
    sees: list[list[bool]], text_kv: Any, c_f: Tensor | None = None, hidden: bool = False,
) -> Tensor:  # fmt: skip
    """One pass over all chunks, each at its position and timestep; returns the newest one's flow or hidden state."""
    model, frames = torch_parts(pipeline).models[role], chunks[0].shape[2]
    latent = torch.cat(chunks, dim=2)
    _, ph, pw = pipeline.config.patch_size
    high, wide = latent.shape[3] // ph, latent.shape[4] // pw
    where = [p + i for p in positions for i in range(frames)]
    cos, sin = (table.to(latent.device) for table in rope_tables(where, high, wide, pipeline.config.attention_head_dim))
    t = torch.tensor([t for t in ts for _ in range(frames)], dtype=torch.float32, device=latent.device)[None]
    tokens = frames * high * wide
    if c_f is not None:  # zero for the chunks before the newest: context passes have no c_f
        c_f = torch.cat([c_f.new_zeros(1, (len(chunks) - 1) * tokens, c_f.shape[2]), c_f], 1)
    attend = dense_attention(_mask(sees, tokens, latent.device))
    if hidden:
        return model.encode(latent, t, text_kv[role], cos, sin, attend)[0][:, -tokens:]
    return model(latent, t, text_kv[role], cos, sin, attend, c_f)[:, :, -frames:]


def _dense_causal(pipeline: Pipeline, chunks: list[Tensor], t: float, text_kv: Any) -> Tensor:
    count, preset = len(chunks), pipeline.preset
    sees = [[key <= query for key in range(count)] for query in range(count)]
    positions = [i * preset.chunk for i in range(count)]
    return _pass(pipeline, "dit", chunks, positions, [preset.context_timestep] * (count - 1) + [t], sees, text_kv)


def _dense_greedy(pipeline: Pipeline, chunks: list[Tensor], t: float, text_kv: Any) -> Tensor:
    preset, past = pipeline.preset, chunks[:-1]
    positions = [i * preset.chunk for i in range(len(chunks))]
    reach = preset.window // preset.chunk
    window = [[0 <= query - key < reach for key in range(len(past))] for query in range(len(past))]
    c_f = _pass(pipeline, "etm", past, positions[:-1], [0.0] * len(past), window, text_kv, hidden=True)
    current = min(positions[-1], preset.max_position)
    clamped = [*(min(p, preset.max_position - preset.chunk) for p in positions[:-1]), current]
    sees = [[key <= query for key in range(len(chunks))] for query in range(len(chunks))]
    return _pass(pipeline, "sdd", chunks, clamped, [0.0] * len(past) + [t], sees, text_kv, c_f=c_f)


def _shortest(preset: Preset) -> int:
    """Latent frames that every head keeps."""
    return preset.local_heads.window if preset.local_heads else preset.window


# Family -> its dense pass, and how many finished chunks that pass can stand for.
DENSE: dict[str, Callable[[Preset], tuple[Callable[..., Tensor], int]]] = {
    "greedy": lambda preset: (_dense_greedy, 2),
    "causal": lambda preset: (_dense_causal, min(2, _shortest(preset) // preset.chunk - 1)),
}
