"""One command for a machine with a GPU: right first, then how fast; --smoke tries the same way through on a processor.

Recorded cases are replayed on the device, then full-size random weights stream at 832x480 in bf16 under the greedy and
the self-forcing presets. Nothing on this path needs diffusers.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import results

CASES = Path(__file__).parent.parent / "tests" / "data" / "causal"
PRESETS = ("greedy", "self-forcing-framewise", "self-forcing")


def plan(smoke: bool, save: list[str]) -> list[list[str]]:
    """The bench commands, in order."""
    device = ["--device", "cpu" if smoke else "cuda"]
    shape = ["--random", "tiny", "--frames", "20", "--rounds", "1"] if smoke else ["--random", "wan2.1-1.3b"]
    streams = [["stream", "--preset", name, *shape, *device, *save] for name in PRESETS]
    return [["parity", "--cases", str(CASES), *device], *streams]


def run(args: argparse.Namespace) -> int:
    if not args.smoke and not torch.cuda.is_available():
        raise ValueError("gpu-check: got no CUDA device, expected one (--smoke tries the way through without)")
    save = [] if args.smoke else ["--save", "--results", str(args.results)]
    start = time.perf_counter()
    for command in plan(args.smoke, save):
        print(f"\n== bench {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "bench", *command], check=False)
        if done.returncode:
            print(f"error: bench {command[0]} ended with status {done.returncode}", file=sys.stderr)
            return done.returncode
    where = "smoke run on a processor: nothing was measured on a GPU" if args.smoke else f"saved to {args.results}"
    print(f"gpu-check took {time.perf_counter() - start:.0f} s, {where}")
    return 0


def add_parser(commands: Any) -> None:
    command = commands.add_parser("gpu-check", help="parity on a GPU, then full-size streams; results are saved")
    command.add_argument("--smoke", action="store_true", help="the same commands, tiny, on a processor")
    command.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="default: bench/results")
    command.set_defaults(run=run)
