"""All measurements of one model on this machine, each in a process of its own, and the page about them."""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from bench.instruments.models import SHAPES
from bench.report import page as report
from bench.report import saved as results

# (command, its arguments, its arguments where only the way through is tried)
PLAN: list[tuple[str, list[str], list[str]]] = [
    ("stream", ["--preset", "greedy"], ["--preset", "greedy", "--frames", "20", "--rounds", "1"]),
    (
        "stream",
        ["--preset", "self-forcing-framewise"],
        ["--preset", "self-forcing-framewise", "--frames", "20", "--rounds", "1"],
    ),
    ("stream", ["--preset", "self-forcing"], []),
    ("compare", [], ["--frames", "17", "--rounds", "1", "--teacher-steps", "2", "--pairs", "3"]),
    ("scaling", ["--sweep", "all"], ["--chunks", "40", "--sweep", "window,steps,resolution", "--rounds", "2"]),
    ("load", [], ["--seconds", "0.5", "--max-streams", "2"]),
    ("kernels", [], ["--rounds", "3"]),
]


def run(args: argparse.Namespace) -> int:
    names = ("model", "random", "height", "width", "threads", "device")
    model = {f"--{name}": str(getattr(args, name)) for name in names if getattr(args, name) is not None}
    where = ["--save", "--results", str(args.results)] if args.save else []
    busy = psutil.cpu_percent(0.5)
    if busy > 20:
        print(
            f"note: other work keeps this machine {busy:.0f}% busy: times will be off, ratios less so", file=sys.stderr
        )
    start = time.perf_counter()
    plan = list(PLAN)
    if args.bundle:
        graphs = ["--bundle", str(args.bundle)]
        plan.insert(1, ("stream", graphs, [*graphs, "--frames", "20", "--rounds", "1"]))
        race = ["--with-bundle", str(args.bundle)]
        plan = [(c, [*full, *race], [*quick, *race]) if c == "compare" else (c, full, quick) for c, full, quick in plan]
    for command, full, quick in plan:
        given = quick if args.quick else full
        if args.quick and not quick:
            continue
        # Operations have shapes of their own, and a bundle is its own model.
        fixed = command == "kernels" or "--bundle" in given
        own = [a for option, value in model.items() if not fixed or option in ("--threads", "--device")
               for a in (option, value)]  # fmt: skip
        print(f"\n== bench {command} {' '.join(given)}", flush=True)
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "bench", command, *given, *own, *where], check=False)
        if done.returncode:
            print(f"error: bench {command} ended with status {done.returncode}", file=sys.stderr)
            return done.returncode
        print(f"== {time.perf_counter() - begun:.0f} s", flush=True)
    if args.save:
        print(f"wrote {report.generate(args.results, args.out).name}")
    print(f"all of it took {time.perf_counter() - start:.0f} s")
    return 0


def add_parser(commands: Any) -> None:
    command = commands.add_parser("all", help="stream, compare, scaling, load, kernels; with --save also the page")
    command.add_argument("--model", type=Path, metavar="DIR", help="pipeline directory (default: the embedded model)")
    command.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle of the model: its graphs race too")
    command.add_argument("--random", choices=tuple(SHAPES))
    command.add_argument("--height", type=int)
    command.add_argument("--width", type=int)
    command.add_argument("--threads", type=int, help="CPU threads")
    command.add_argument("--device")
    command.add_argument("--quick", action="store_true", help="seconds instead of minutes: does it all run?")
    command.add_argument("--save", action="store_true", help="write results and docs/performance.md")
    command.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR", help="default: bench/results")
    command.add_argument("--out", type=Path, default=report.PAGE, metavar="FILE", help="default: docs/performance.md")
    command.set_defaults(run=run)
