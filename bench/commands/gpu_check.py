"""One command for a machine with a GPU: checks first, then speed. --smoke runs the same commands on a processor, tiny.

Where there is nvcc the CUDA C++ kernels are built. The kernels' tests run natively, twice; recorded cases are replayed;
every kernel is timed beside its floor and the best library. Then full-size random weights stream at 832x480: plain
PyTorch, torch.compile, fused kernels, CUDA graphs, FP8 and the self-forcing preset in turn, and 200 chunks in bf16 and
in FP8. None of these commands needs diffusers.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from bench.instruments.header import ROOT
from bench.report.saved import Stored
from engine.options import option

CASES = ROOT / "tests" / "data" / "causal"
KERNEL_TESTS = ROOT / "tests" / "kernels"


@dataclass(frozen=True, kw_only=True)
class Options(Stored):
    smoke: bool = option(False, "the same commands, tiny, on a processor")


def plan(smoke: bool, save: list[str]) -> list[list[str]]:
    """The commands in order, each for `python -m`."""
    device = ["--device", "cpu" if smoke else "cuda"]
    # On a processor one file is enough: `make test` runs all of them in the interpreter.
    tests = ["pytest", str(KERNEL_TESTS / "test_gate_residual.py" if smoke else KERNEL_TESTS)]
    tiny = ["--random", "tiny", "--rounds", "1", "--burst", "1", "--chunks", "8"]
    return [
        tests,
        tests,
        ["bench", "parity", "--cases", str(CASES), *device],
        ["bench", "kernels", *device, *(["--rounds", "2"] if smoke else []), *save],
        ["bench", "backends", *(tiny if smoke else ["--random", "wan2.1-1.3b"]), *device, *save],
    ]


def build() -> list[list[str]]:
    """Commands that build the kernels in CUDA C++. Without nvcc there are none, and the kernels' tests are skipped."""
    source, target = ROOT / "csrc" / "cuda", ROOT / "build" / "cuda"
    nvcc, cmake = shutil.which("nvcc"), shutil.which("cmake")
    if nvcc is None:
        return []
    if cmake is not None:
        return [[cmake, "-S", str(source), "-B", str(target)], [cmake, "--build", str(target)]]
    target.mkdir(parents=True, exist_ok=True)
    flags = ["-shared", "-Xcompiler", "-fPIC", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]
    return [[nvcc, *flags, "-o", str(target / "libgreedy_cuda.so"), str(source / "fp8_linear.cu")]]


def run(options: Options) -> int:
    if not options.smoke and not torch.cuda.is_available():
        raise ValueError("gpu-check: got no CUDA device, expected one (--smoke runs without one)")
    save = [] if options.smoke else ["--save", "--results", str(options.results)]
    start = time.perf_counter()
    failed = []
    modules = [[sys.executable, "-m", *command] for command in plan(options.smoke, save)]
    for command in (build() if not options.smoke else []) + modules:
        print(f"\n== {' '.join(command)}", flush=True)
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=False)
        print(f"   {time.perf_counter() - begun:.0f} s, status {done.returncode}", flush=True)
        if done.returncode:  # the other commands still run, because a GPU machine is seldom at hand
            failed.append(" ".join(command[2:]))
    where = (
        "smoke run on a processor: nothing was measured on a GPU" if options.smoke else f"saved to {options.results}"
    )
    print(f"gpu-check took {time.perf_counter() - start:.0f} s, {where}")
    for name in failed:
        print(f"error: {name} failed", file=sys.stderr)
    return 1 if failed else 0
