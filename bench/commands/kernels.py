"""Every operation of kernels/ against its float64 reference, then against the best library call, in turn."""

import json
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.instruments import ceilings, models
from bench.instruments.header import machine, print_header
from bench.instruments.spread import interleaved, paired_ratio, quartiles, table
from bench.operations import attention as attention_cases
from bench.operations import others as kernel_cases
from bench.operations.others import Call, Case
from bench.report import saved
from engine.options import option
from engine.runtime.device import DTYPES
from kernels import compile

# op -> its maker, and its shapes for each device.
SHAPES = {**attention_cases.SHAPES, **kernel_cases.SHAPES}


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, models.Machine):
    op: tuple[str, ...] = option((), "one of " + ", ".join(SHAPES) + "; may be repeated; default: all", metavar="OP")
    compile_only: bool = option(False, "compile every variant for --sm, run nothing")
    sm: int = option(90, "target of --compile-only: 90, or of a consumer GPU 86, 89, 120, where kernels have to fit")
    rounds: int = option(20, "in which every implementation has its turn")
    precision: str = option("auto", "auto: bf16 on a GPU, else fp32", choices=("auto", *DTYPES))


@dataclass(frozen=True)
class Failed:
    """A case that could not be made, and why."""

    op: str
    shape: str
    reason: str


def each_case(device: torch.device, dtype: torch.dtype, ops: list[str]) -> Iterator[Case | Failed]:
    """The cases of the chosen operations, one by one: only one holds memory at a time."""
    unknown = sorted(set(ops) - set(SHAPES))
    if unknown:
        raise ValueError(f"--op: got {', '.join(unknown)}, expected one of {', '.join(SHAPES)}")
    for op in ops:
        make, shapes = SHAPES[op]
        for shape in shapes[device.type]:
            try:
                yield make(device, dtype, *shape)
            except RuntimeError as error:  # of CUDA, of Triton: the next operation may run
                yield Failed(op, " x ".join(map(str, shape)), said(error))


def without_compiled(case: Case) -> Case:
    """The case without torch.compile's code, which takes seconds to make."""
    return replace(case, library={name: call for name, call in case.library.items() if name != "compiled"})


def said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def errors(case: Case) -> dict[str, float]:
    """rms error over the truth's rms: ours, and each library call's."""
    truth = case.value(case.reference()).double()
    size = truth.square().mean().sqrt()
    found = {"ours": case.value(case.ours()).double()}
    if truth.is_cuda:
        torch.cuda.synchronize()  # a failure of ours is said here, not by the next call
    for name, call in case.library.items():
        with suppress(RuntimeError):  # the library may not have it on this device
            found[name] = case.value(call()).double()
    return {name: float((value - truth).square().mean().sqrt() / size) for name, value in found.items()}


def limit_of(case: Case, error: dict[str, float]) -> float:
    """Twice the library's error in the same precision, and never more than the case's own limit."""
    library = [error[name] for name in case.library if name in error]
    return min(2 * max(library), case.most) if library else case.most


def _repeated(call: Call, device: torch.device, repeats: int) -> Call:
    """`repeats` calls as one. On a GPU they are one CUDA graph, so that launches are not timed."""
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


def checked(case: Case) -> dict[str, Any]:
    """A case's row: errors, and whether ours is within `limit_of`. Raises only where the device is lost."""
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "passed": False}
    try:
        error = errors(case)
    except torch.AcceleratorError:  # nothing runs in this process any more
        raise
    except Exception as failure:  # a kernel that does not compile or launch: its row says so, the others go on
        return row | {"failed": said(failure)}
    return row | {"errors": error, "passed": error["ours"] <= limit_of(case, error)}


def timed(case: Case, device: torch.device, limits: ceilings.Ceilings, rounds: int) -> dict[str, Any]:
    """The row with times where the operation is right. Raises only where the device is lost."""
    row = checked(case)
    try:
        return row | (_times(case, row["errors"], device, limits, rounds) if row["passed"] else {})
    except torch.AcceleratorError:
        raise
    except Exception as failure:
        return row | {"passed": False, "failed": said(failure)}


def _times(
    case: Case, known: Collection[str], device: torch.device, limits: ceilings.Ceilings, rounds: int
) -> dict[str, Any]:  # fmt: skip
    """Times of ours and of the `known` library calls."""
    library = {name: call for name, call in case.library.items() if name in known}
    calls: dict[str, Call] = {"ours": case.ours, **library}
    repeats = max(1, int(0.005 / min(_seconds(case.ours, device) for _ in range(3))))
    ms: dict[str, list[float]] = {name: [] for name in calls}
    runs = {n: partial(_seconds, _repeated(call, device, repeats), device) for n, call in calls.items()}
    for _, name, seconds in interleaved(runs, rounds):
        ms[name].append(1e3 * seconds / repeats)
    best = min(library, key=lambda name: quartiles(ms[name])["median"])
    cost = replace(case.cost, flops=case.cost.flops / case.speedup)
    took = quartiles(ms["ours"])["median"] / 1e3
    return {
        "ms": {name: quartiles(samples) for name, samples in ms.items()},
        "best_library": best,
        "time_ratio": paired_ratio(ms["ours"], ms[best]),
        "gflops": case.cost.flops / took / 1e9,
        "mfu": limits.mfu(cost, took),
        "mbu": limits.mbu(cost, took),
        "floor_ms": 1e3 * limits.floor(cost),
    }


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype, ops: list[str], rounds: int) -> dict[str, Any]:
    """Errors first. An operation with more than twice the library's error in the same precision gets no numbers."""
    limits = ceilings.measure(device, dtype)
    rows: list[dict[str, Any]] = []
    for case in each_case(device, dtype, ops):
        if isinstance(case, Failed):
            rows.append({"op": case.op, "shape": case.shape, "passed": False, "failed": case.reason})
        else:
            rows.append(timed(case, device, limits, rounds))
    timings = {f"{row['op']} {row['shape']}": row["ms"]["ours"] for row in rows if row["passed"]}
    return {"ceilings": limits.as_dict(), "cases": rows, "timings": timings}


def _compile_only(options: Options) -> int:
    """Compile every variant; no GPU. Returns 1 where one is too large or, for sm_90, spills or lacks an instruction."""
    compile.use_stub_driver(options.sm)
    rows = compile.compile_variants(list(options.op))
    if options.sm == 90 and (not options.op or "fp8_linear" in options.op):
        rows += compile.compile_cuda()
    if not options.json:
        print(table([
            {"kernel": row["name"], "registers": row["registers"], "shared": row["shared_bytes"],
             "spills": row["spills"], "found": " ".join(row["instructions"])}
            for row in rows
        ]))  # fmt: skip
    red = [f"error: {row['name']}: {problem}" for row in rows for problem in row["problems"]]
    print("\n".join(red), end="\n" if red else "", file=sys.stderr)
    print(json.dumps({"variants": rows}))
    return 1 if red else 0


def run(options: Options) -> int:
    if options.compile_only:
        return _compile_only(options)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if options.rounds < 1:
        raise ValueError(f"--rounds: got {options.rounds}, expected at least 1")
    options.set_threads()
    kind = options.precision if options.precision != "auto" else "fp32" if device.type == "cpu" else "bf16"
    where = machine(device)
    result: dict[str, Any] = {"machine": where, "precision": kind}
    result |= measure(device, DTYPES[kind], list(options.op or SHAPES), options.rounds)
    result |= {"device": where["device"], "commit": where["commit"]}
    if not options.json:
        print_header(where)
        print("\n" + table([
            {"op": row["op"], "shape": row["shape"], "error": row["errors"]["ours"], "ms": row["ms"]["ours"]["median"],
             row["best_library"]: row["ms"][row["best_library"]]["median"], "ratio": row["time_ratio"]["median"],
             "GFLOP/s": row["gflops"], "mfu": row["mfu"], "mbu": row["mbu"]}
            for row in result["cases"] if row["passed"]
        ], 3))  # fmt: skip
    red = [row for row in result["cases"] if not row["passed"]]
    for row in red:
        got = row["failed"] if "failed" in row else f"error {row['errors']['ours']:.1e}"
        print(f"error: {row['op']} {row['shape']}: got {got}, expected at most twice the library's error",
              file=sys.stderr)  # fmt: skip
    saved.emit(options, "kernels", result)  # a red row has no numbers; the others are worth keeping
    return 1 if red else 0
