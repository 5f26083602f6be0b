"""One command for a machine with a GPU: right first, then how fast; --smoke tries the same way through on a processor.

Where there is nvcc the CUDA C++ kernels are built; the kernels' tests run natively, twice; recorded cases are replayed;
every kernel is timed beside its floor and the best library; then full-size random weights stream at 832x480: plain
PyTorch, torch.compile, fused kernels, CUDA graphs, FP8 and the self-forcing preset in turn, and 200 chunks in bf16 and
in FP8. Nothing on this path needs diffusers.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.instruments.header import ROOT
from bench.report import saved as results

CASES = ROOT / "tests" / "data" / "causal"
KERNEL_TESTS = ROOT / "tests" / "kernels"


def plan(smoke: bool, save: list[str]) -> list[list[str]]:
    """What runs, in order, each as `python -m ...`."""
    device = ["--device", "cpu" if smoke else "cuda"]
    # In the interpreter all of them take a minute: `make test` runs them there.
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
    """The kernels in CUDA C++, where there is a compiler; without one their tests skip and say so."""
    source, target = ROOT / "csrc" / "cuda", ROOT / "build" / "cuda"
    nvcc, cmake = shutil.which("nvcc"), shutil.which("cmake")
    if nvcc is None:
        return []
    if cmake is not None:
        return [[cmake, "-S", str(source), "-B", str(target)], [cmake, "--build", str(target)]]
    target.mkdir(parents=True, exist_ok=True)
    flags = ["-shared", "-Xcompiler", "-fPIC", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]
    return [[nvcc, *flags, "-o", str(target / "libgreedy_cuda.so"), str(source / "fp8_linear.cu")]]


def run(args: argparse.Namespace) -> int:
    if not args.smoke and not torch.cuda.is_available():
        raise ValueError("gpu-check: got no CUDA device, expected one (--smoke tries the way through without)")
    save = [] if args.smoke else ["--save", "--results", str(args.results)]
    start = time.perf_counter()
    failed = []
    modules = [[sys.executable, "-m", *command] for command in plan(args.smoke, save)]
    for command in (build() if not args.smoke else []) + modules:
        print(f"\n== {' '.join(command)}", flush=True)
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=False)
        print(f"   {time.perf_counter() - begun:.0f} s, status {done.returncode}", flush=True)
        if done.returncode:  # the rest runs all the same: a machine like this one is seldom at hand
            failed.append(" ".join(command[2:]))
    where = "smoke run on a processor: nothing was measured on a GPU" if args.smoke else f"saved to {args.results}"
    print(f"gpu-check took {time.perf_counter() - start:.0f} s, {where}")
    for name in failed:
        print(f"error: {name} failed", file=sys.stderr)
    return 1 if failed else 0


def add_parser(commands: Any) -> None:
    command = commands.add_parser("gpu-check", help="everything that only a GPU can show; results are saved")
    command.add_argument("--smoke", action="store_true", help="the same commands, tiny, on a processor")
    command.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="default: bench/results")
    command.set_defaults(run=run)
