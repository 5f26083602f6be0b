"""One command for a machine with a GPU: does it run, is it right, how many frames a second, where does the time go?

Every step runs in a process of its own under a limit and appends to one file of JSON lines, the most valuable first;
a step that fails or hangs costs no other. All of it ends within nine minutes. --smoke walks through the same steps on
a processor, with tiny shapes. None of them needs diffusers or a network.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.lines import Lines
from bench.gpu.steps import STEPS, Step
from bench.instruments.header import ROOT, machine
from bench.instruments.processes import with_group
from bench.instruments.spread import table
from bench.report.gpu import read_lines
from bench.report.saved import Stored, device_slug
from engine.options import option

GRACE = 5.0  # seconds between the request to stop and the end


@dataclass(frozen=True, kw_only=True)
class Options(Stored):
    smoke: bool = option(False, "the same steps, tiny, on a processor")
    steps: str = option(
        "",
        "some of " + ",".join(STEPS) + "; default: $STEPS, else all; as in STEPS=probe make gpu-check",
        metavar="A,B",
    )
    minutes: float = option(9.0, "when the last step is stopped")
    one: str = option("", "run this step in this process, as the command itself does for each", metavar="STEP")


def chosen(options: Options) -> dict[str, Step]:
    """The steps to run, in their order. ValueError for an unknown one."""
    names = (options.steps or os.environ.get("STEPS", "")).split(",")
    names = [name.strip() for name in names if name.strip()] or list(STEPS)
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise ValueError(f"--steps: got {', '.join(unknown)}, expected some of {', '.join(STEPS)}")
    return {name: step for name, step in STEPS.items() if name in names}


def result_file(options: Options) -> Path:
    """$OUT is the folder of a machine that only gives back that one."""
    device = torch.device("cpu" if options.smoke else "cuda")
    where = machine(device)
    folder = Path(os.environ.get("OUT") or (ROOT / "out" if options.smoke else options.results))
    stem, number = f"gpu-check-{device_slug(where)}-{where['date']}", 1
    while (file := folder / f"{stem}{f'-{number}' if number > 1 else ''}.jsonl").exists():  # keep an earlier run
        number += 1
    return file


def words_of(name: str, file: Path, smoke: bool) -> list[str]:
    """The command of one step."""
    return [sys.executable, "-m", "bench", "gpu-check", "--one", name, "--results", str(file), *["--smoke"] * smoke]


def run_step(name: str, limit: float, file: Path, smoke: bool) -> tuple[float, str]:
    """Run a step in its own process group; (seconds, how it ended). Beyond the limit all of the group is stopped."""
    begun = time.perf_counter()
    # The Makefile's one thread per process is for many small tests: here the processor draws and launches.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS" or smoke}
    process = subprocess.Popen(words_of(name, file, smoke), cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = str(process.wait(timeout=limit))
    except subprocess.TimeoutExpired:
        status = "over its limit"
        with_group(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            status = "over its limit, killed"
    finally:  # whatever is left of the group would hold the device
        with_group(process.pid, signal.SIGKILL)
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:  # inside a call of the driver: the next step may still run
            status = "could not be stopped"
    return time.perf_counter() - begun, status


def verdict(rows: list[dict[str, Any]]) -> tuple[str, bool]:
    """What an owner wants to know, in a few lines; and whether all of it is well."""
    ended = [row for row in rows if row["kind"] == "ended"]
    broken = [row for row in ended if row["status"] != "0"]
    checks = [row for row in rows if row["kind"] == "check"]
    red = [row for row in checks if not row["passed"]]
    said = [table([{"step": row["step"], "seconds": round(row["seconds"]), "ended": row["status"],
                    "checks": sum(c["step"] == row["step"] for c in checks),
                    "red": sum(c["step"] == row["step"] for c in red)} for row in ended])]  # fmt: skip
    speeds = [row for row in rows if row["kind"] == "speed"]
    if speeds:
        said.append(table([{"stream": row["variant"], "fps": row["fps"], "ms/chunk": row["ms_p50"],
                            "p99": row["ms_p99"], "first frame ms": row["first_frame_ms"], "peak MB": row["peak_mb"],
                            "right": "yes" if row["passed"] else "NO"} for row in speeds]))  # fmt: skip
    for row in rows:
        if row.get("table") == "parts of a chunk":
            parts = sorted(row["parts_ms"].items(), key=lambda part: -part[1])
            told = ", ".join(f"{name} {ms:.1f}" for name, ms in parts[:6])
            said.append(f"{row['variant']}: {told} ms; {row['mfu']:.0%} of the measured matrix rate")
    said += [f"RED {row['step']}: {row['name']}: {row['detail']}" for row in red]
    runs = "all of it runs" if not broken else f"{', '.join(row['step'] for row in broken)} did not end well"
    right = f"{len(checks) - len(red)} of {len(checks)} checks are right"
    said.append(f"{runs}; {right}")
    return "\n\n".join(said), not broken and not red and bool(checks)


def run(options: Options) -> int:
    if not options.smoke and not torch.cuda.is_available():
        raise ValueError("gpu-check: got no CUDA device, expected one (--smoke runs without one)")
    steps = chosen(options)
    if options.one:
        if options.one not in STEPS:
            raise ValueError(f"--one: got {options.one}, expected one of {', '.join(STEPS)}")
        lines = Lines(options.results, options.one, options.smoke)
        STEPS[options.one].run(lines)
        return 0
    if not options.minutes > 0:
        raise ValueError(f"--minutes: got {options.minutes}, expected more than 0")
    file = result_file(options)
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + 60 * options.minutes - 2 * GRACE  # what stopping the last step may take
    for name, step in steps.items():
        left = deadline - time.perf_counter()
        print(f"\n== {name}: {step.about}", flush=True)
        seconds, status = run_step(name, min(step.limit, left), file, options.smoke) if left > 5 else (0.0, "no time")
        Lines(file, name, options.smoke).add("ended", seconds=seconds, status=status)
    text, well = verdict(read_lines(file))
    print(f"\n{text}")
    print(f"{'smoke run on a processor: nothing was measured on a GPU; ' if options.smoke else ''}all lines in {file}")
    return 0 if well else 1
