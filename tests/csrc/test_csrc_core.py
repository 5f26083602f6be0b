"""The C++ core's numbers and tokens are Python's: schedules, solvers, blends, positions bit for bit, tokens one by one.

`python tests/csrc/test_csrc_core.py` writes csrc/tests/core_vectors.jsonl, the vectors for where there is no Python.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from csrc_tools import HANG

from engine.config import Preset
from engine.model.rope import rope_tables
from engine.presets import PRESETS
from engine.runtime.blending import Course, Prompt, mean_of
from engine.sampling.schedule import Schedule
from engine.sampling.solvers import make_solver

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "csrc" / "tests" / "core_vectors.jsonl"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bits(values) -> list[int]:
    return torch.as_tensor(values).float().contiguous().view(torch.int32).numpy().view(np.uint32).flatten().tolist()


def double_bits(value: float) -> int:
    return int(np.float64(value).view(np.uint64))


def as_json(preset: Preset) -> dict:
    return preset.table()


def schedule_case(preset: Preset) -> dict:
    schedule = Schedule(preset)
    steps = [[[double_bits(t), double_bits(schedule.sigma(t))] for t, _ in schedule.steps(i)] for i in range(6)]
    return {"kind": "schedule", "preset": as_json(preset), "sigmas": bits(schedule.sigmas),
            "timesteps": bits(schedule.timesteps), "steps": steps}  # fmt: skip


def solver_case(preset: Preset, dtype: str, seed: int, count: int = 24) -> dict:
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(preset)
    solver = make_solver(preset.solver, schedule)

    def draw() -> torch.Tensor:
        return torch.randn(1, 1, 1, 1, count, generator=generator).to(DTYPES[dtype])

    x = draw()
    case = {"kind": "solver", "preset": as_json(preset), "dtype": dtype, "x": bits(x), "flows": [], "fresh": [],
            "results": []}  # fmt: skip
    for t, t_next in schedule.steps(0):
        flow, fresh = draw(), draw()
        x = solver.step(x, flow, t, t_next, fresh)
        for name, value in (("flows", flow), ("fresh", fresh), ("results", x)):
            case[name].append(bits(value))
    return case


def rope_case(position: int, frames: int, high: int, wide: int, head_dim: int) -> dict:
    cos, sin = rope_tables(range(position, position + frames), high, wide, head_dim)
    return {"kind": "rope", "position": position, "frames": frames, "high": high, "wide": wide, "head_dim": head_dim,
            "cos": bits(cos), "sin": bits(sin)}  # fmt: skip


def blend_case(dtype: str, seed: int, count: int = 24) -> dict:
    """Three embeddings, their mean, and blends from the first to the second."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(1, 1, count, generator=generator).to(DTYPES[dtype]) for _ in range(3)]
    weights, steps = [0.1 + seed, 2.7, 1e-3], 3 + seed
    to = Prompt(1, parts[1], transition=steps)
    blends = [bits(Course(to, parts[0], step).text_emb) for step in range(1, steps)]
    return {"kind": "blend", "dtype": dtype, "parts": [bits(part) for part in parts], "steps": steps, "blends": blends,
            "weights": [double_bits(weight) for weight in weights], "mean": bits(mean_of(parts, weights))}  # fmt: skip


def cases(seeds: int) -> Iterator[dict]:
    presets = [*PRESETS.values(), Preset("greedy", shift=2.0, stop_after=2), Preset("greedy", shift=3.7)]
    for preset in presets if seeds > 1 else presets[:4]:
        yield schedule_case(preset)
    few, many = ((1000.0, 750.0, 500.0, 250.0),), (tuple(float(step) for step in range(1000, 0, -90)),)
    for solver in ("renoise", "euler", "unipc"):
        for dtype in DTYPES:
            for seed in range(seeds):
                steps = many if seed % 2 else few
                yield solver_case(Preset("greedy", solver=solver, steps=steps, shift=2.0 + seed), dtype, seed)
    for dtype in DTYPES:
        yield from (blend_case(dtype, seed) for seed in range(seeds))
    for position in (0, 1, 20, 12345) if seeds == 1 else (0, 1, 7, 20, 21, 100, 999, 12345, 1_000_003, 87_654_321):
        yield rope_case(position, 3 if position % 2 else 1, 2, 3, 32 if position % 3 else 128)
    if seeds > 1:
        yield rope_case(5, 1, 30, 52, 128)


def write_vectors(path: Path, seeds: int) -> None:
    path.write_text("".join(json.dumps(case, separators=(",", ":")) + "\n" for case in cases(seeds)))


def core_test(build: Path, vectors: Path) -> subprocess.CompletedProcess[str]:
    manifest = ROOT / "csrc" / "tests" / "fake.bundle" / "manifest.json"
    return subprocess.run([build / "core_test", vectors, manifest], capture_output=True, text=True, timeout=HANG)


def test_recorded_vectors_are_current():
    assert [json.loads(line) for line in VECTORS.read_text().splitlines()] == json.loads(json.dumps(list(cases(1))))


def test_schedules_solvers_and_positions_have_pythons_bits(native_build, tmp_path):
    write_vectors(tmp_path / "vectors.jsonl", seeds=8)
    ran = core_test(native_build, tmp_path / "vectors.jsonl")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("kind", ["schedule", "solver", "rope", "blend"])
def test_a_wrong_bit_is_noticed(native_build, tmp_path, kind):
    written = list(cases(1))
    case = next(c for c in written if c["kind"] == kind)
    where = {"schedule": "sigmas", "rope": "sin", "blend": "mean"}.get(kind)
    where = case[where] if where else case["results"][-1]
    where[-1] ^= 1
    (tmp_path / "vectors.jsonl").write_text("".join(json.dumps(c) + "\n" for c in written))
    ran = core_test(native_build, tmp_path / "vectors.jsonl")
    assert ran.returncode == 1, ran.stdout + ran.stderr


if __name__ == "__main__":
    write_vectors(VECTORS, seeds=1)
