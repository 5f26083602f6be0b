"""Every operation of kernels/ against its float64 reference, then against the best library call, in turn."""

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.instruments import ceilings
from bench.instruments.header import machine, print_header
from bench.instruments.spread import interleaved, paired_ratio, quartiles, table
from bench.operations import attention as attention_cases
from bench.operations import others as kernel_cases
from bench.operations.others import Call, Case
from bench.report import saved as results
from engine.runtime.device import DTYPES
from kernels import compile

# op -> its maker, and the shapes for a device.
SHAPES = {**attention_cases.SHAPES, **kernel_cases.SHAPES}


def cases(device: torch.device, dtype: torch.dtype, ops: list[str]) -> list[Case]:
    """The cases of the chosen operations."""
    unknown = sorted(set(ops) - set(SHAPES))
    if unknown:
        raise ValueError(f"--op: got {', '.join(unknown)}, expected one of {', '.join(SHAPES)}")
    return [SHAPES[op][0](device, dtype, *shape) for op in ops for shape in SHAPES[op][1][device.type]]


def errors(case: Case) -> dict[str, float]:
    """rms error over rms of the truth, ours and the library's."""
    truth = case.value(case.reference()).double()
    size = truth.square().mean().sqrt()
    calls = {"ours": case.ours, **case.library}
    found = {name: case.value(call()).double() for name, call in calls.items()}
    return {name: float((value - truth).square().mean().sqrt() / size) for name, value in found.items()}


def _repeated(call: Call, device: torch.device, repeats: int) -> Call:
    """`repeats` calls as one; on a GPU a CUDA graph of them, or launching would be what is timed."""
    if device.type != "cuda":
        return lambda: [call() for _ in range(repeats)]
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def _seconds(call: Call, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else None
    if wait:
        wait()
    start = time.perf_counter()
    call()
    if wait:
        wait()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype, ops: list[str], rounds: int) -> dict[str, Any]:
    """Errors first: ours may have twice the library's in the same precision, else there are no numbers for it."""
    found = cases(device, dtype, ops)
    limits = ceilings.measure(device, dtype)
    rows, timings = [], {}
    for case in found:
        error = errors(case)
        allowed = 2 * max(error[name] for name in case.library)
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "errors": error, "passed": error["ours"] <= allowed}
        if row["passed"]:
            calls: dict[str, Call] = {"ours": case.ours, **case.library}
            repeats = max(1, int(0.005 / min(_seconds(case.ours, device) for _ in range(3))))
            ms: dict[str, list[float]] = {name: [] for name in calls}
            runs = {n: partial(_seconds, _repeated(call, device, repeats), device) for n, call in calls.items()}
            for _, name, seconds in interleaved(runs, rounds):
                ms[name].append(1e3 * seconds / repeats)
            best = min(case.library, key=lambda name: quartiles(ms[name])["median"])
            cost = replace(case.cost, flops=case.cost.flops / case.speedup)
            took = quartiles(ms["ours"])["median"] / 1e3
            row |= {
                "ms": {name: quartiles(samples) for name, samples in ms.items()},
                "best_library": best,
                "time_ratio": paired_ratio(ms["ours"], ms[best]),
                "gflops": case.cost.flops / took / 1e9,
                "mfu": limits.mfu(cost, took),
                "mbu": limits.mbu(cost, took),
                "floor_ms": 1e3 * limits.floor(cost),
            }
            timings[f"{case.op} {case.shape}"] = row["ms"]["ours"]
        rows.append(row)
    return {"ceilings": limits.as_dict(), "cases": rows, "timings": timings}


def _compile_only(args: argparse.Namespace) -> int:
    """Compile every variant for sm_90, no GPU needed; 1 where one spills, is too large or lacks an instruction."""
    compile.use_stub_driver()
    rows = compile.compile_variants(args.op)
    if not args.op or "fp8_linear" in args.op:
        rows += compile.compile_cuda()
    if not args.json:
        print(table([
            {"kernel": row["name"], "registers": row["registers"], "shared": row["shared_bytes"],
             "spills": row["spills"], "found": " ".join(row["instructions"])}
            for row in rows
        ]))  # fmt: skip
    red = [f"error: {row['name']}: {problem}" for row in rows for problem in row["problems"]]
    print("\n".join(red), end="\n" if red else "", file=sys.stderr)
    print(json.dumps({"variants": rows}))
    return 1 if red else 0


def run(args: argparse.Namespace) -> int:
    if args.compile_only:
        return _compile_only(args)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if args.threads < 1 or args.rounds < 1:
        raise ValueError(f"got {args.threads} threads and {args.rounds} rounds, expected at least 1 of both")
    torch.set_num_threads(args.threads)
    kind = args.precision if args.precision != "auto" else "fp32" if device.type == "cpu" else "bf16"
    where = machine(device)
    result = {
        "machine": where,
        "precision": kind,
        **measure(device, DTYPES[kind], args.op or list(SHAPES), args.rounds),
    }
    result |= {"device": where["device"], "commit": where["commit"]}
    if not args.json:
        print_header(where)
        print("\n" + table([
            {"op": row["op"], "shape": row["shape"], "error": row["errors"]["ours"], "ms": row["ms"]["ours"]["median"],
             row["best_library"]: row["ms"][row["best_library"]]["median"], "ratio": row["time_ratio"]["median"],
             "GFLOP/s": row["gflops"], "mfu": row["mfu"], "mbu": row["mbu"]}
            for row in result["cases"] if row["passed"]
        ], 3))  # fmt: skip
    red = [row for row in result["cases"] if not row["passed"]]
    for row in red:
        print(f"error: {row['op']} {row['shape']}: got error {row['errors']['ours']:.1e}, "
              f"expected at most twice the library's", file=sys.stderr)  # fmt: skip
    if red:
        return 1
    results.emit(args, "kernels", result)
    return 0


def add_parser(commands: Any) -> None:
    command = commands.add_parser("kernels", help="each operation against its reference and the best library call")
    command.add_argument("--op", action="append", help="one of " + ", ".join(SHAPES) + "; default: all")
    command.add_argument("--compile-only", action="store_true", help="compile every variant for sm_90, run nothing")
    command.add_argument("--rounds", type=int, default=20)
    command.add_argument("--device", default="auto")
    command.add_argument("--precision", choices=("auto", *DTYPES), default="auto")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    results.add_arguments(command)
    command.set_defaults(run=run)
