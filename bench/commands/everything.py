"""All measurements of one model on this machine, each in a process of its own, and the page about them."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.instruments.models import SHAPES
from bench.report import page
from bench.report.saved import Stored
from engine.options import option


@dataclass(frozen=True, kw_only=True)
class Options(Stored):
    model: Path | None = option(None, "pipeline directory; default: the embedded model", metavar="DIR")
    bundle: Path | None = option(None, "a bundle of the model: its graphs race too", metavar="DIR")
    random: str | None = option(None, "random weights of this shape", choices=SHAPES)
    height: int | None = option(None, "pixels")
    width: int | None = option(None, "pixels")
    threads: int | None = option(None, "CPU threads")
    device: str | None = option(None, "auto, cpu, cuda, cuda:1, ...", metavar="DEVICE")
    quick: bool = option(False, "seconds instead of minutes: does it all run?")
    save: bool = option(False, "write results and docs/performance.md")
    out: Path = option(page.PAGE, "the page", metavar="FILE")


# (command, its arguments, its arguments with --quick; none leave the command out)
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


def run(options: Options) -> int:
    names = ("model", "random", "height", "width", "threads", "device")
    model = {f"--{name}": str(getattr(options, name)) for name in names if getattr(options, name) is not None}
    where = ["--save", "--results", str(options.results)] if options.save else []
    busy = psutil.cpu_percent(0.5)
    if busy > 20:
        print(
            f"note: other work keeps this machine {busy:.0f}% busy: times will be off, ratios less so", file=sys.stderr
        )
    start = time.perf_counter()
    plan = list(PLAN)
    if options.bundle:
        graphs = ["--bundle", str(options.bundle)]
        plan.insert(1, ("stream", graphs, [*graphs, "--frames", "20", "--rounds", "1"]))
        race = ["--with-bundle", str(options.bundle)]
        plan = [(c, [*full, *race], [*quick, *race]) if c == "compare" else (c, full, quick) for c, full, quick in plan]
    for command, full, quick in plan:
        own = quick if options.quick else full
        if options.quick and not quick:
            continue
        # Operations have shapes of their own, and a bundle is its own model.
        fixed = command == "kernels" or "--bundle" in own
        shared = [a for name, value in model.items() if not fixed or name in ("--threads", "--device")
                  for a in (name, value)]  # fmt: skip
        print(f"\n== bench {command} {' '.join(own)}", flush=True)
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "bench", command, *own, *shared, *where], check=False)
        if done.returncode:
            print(f"error: bench {command} ended with status {done.returncode}", file=sys.stderr)
            return done.returncode
        print(f"== {time.perf_counter() - begun:.0f} s", flush=True)
    if options.save:
        print(f"wrote {page.generate(options.results, options.out).name}")
    print(f"all of it took {time.perf_counter() - start:.0f} s")
    return 0
