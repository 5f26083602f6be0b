"""python -m bench COMMAND: check against recorded cases, measure, compare, report.

The last line of a measurement's stdout is its result as JSON. Exit status: 0, 1 where a check or a comparison is red,
2 for bad input.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from bench.commands import backends, compare, everything, fp8, gpu_check, kernels, runtimes, scaling, stream
from bench.commands import concurrent as load
from bench.commands.fullsize import make, measure_load
from bench.instruments import parity
from bench.report import diff
from bench.report import page as report
from engine.runtime.device import DTYPES


def _parity(args: argparse.Namespace) -> int:
    results = parity.run(args.cases, args.device)
    if not args.json:
        print(f"{'case':32} {'dtype':10} {'max error':>10} {'rms error':>10}")
        for r in results:
            verdict = "" if r.passed else "  FAILED"
            print(f"{r.name:32} {r.dtype:10} {r.max_abs_error:10.2e} {r.rms_error:10.2e}{verdict}")
    summary = parity.report(results)
    print(json.dumps(summary) if args.json else f"{sum(r.passed for r in results)} of {len(results)} within tolerance")
    return 0 if results and summary["passed"] else 1


def _fullsize(args: argparse.Namespace) -> int:
    if not args.dir.exists():
        print(f"writing random weights to {args.dir}", file=sys.stderr)
        make(args.dir, args.layers, args.stored)
        # Loading is measured in a process that has not just held the weights.
        return subprocess.run([sys.executable, "-m", "bench", *sys.argv[1:]], check=False).returncode
    result = measure_load(args.dir, args.precision, args.preset, (args.height, args.width), args.chunks)
    if args.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def _print_table(result: dict[str, Any]) -> None:
    for key, value in result.items():
        print(f"{key:20} {value:.4g}" if isinstance(value, float) else f"{key:20} {value}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and message."""
        self.exit(2, f"error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "parity", help="replay recorded cases of public streaming code; exit 1 beyond tolerance"
    )
    command.add_argument(
        "--cases", type=Path, required=True, metavar="DIR", help="directory with cases.json and its tensors"
    )
    command.add_argument("--device", default="cpu")
    command.add_argument("--json", action="store_true", help="print the result as one JSON line")
    command.set_defaults(run=_parity)

    command = commands.add_parser("fullsize", help="Wan2.1-1.3B's shape with random weights: load, stream, memory")
    command.add_argument("--dir", type=Path, required=True, help="where the weights are; written if it does not exist")
    command.add_argument("--layers", type=int, default=30)
    command.add_argument("--stored", choices=tuple(DTYPES), default="bf16", help="precision on disk")
    command.add_argument("--precision", choices=tuple(DTYPES), default="bf16", help="precision in memory")
    command.add_argument("--preset", default="self-forcing-framewise")
    command.add_argument("--height", type=int, default=96)
    command.add_argument("--width", type=int, default=160)
    command.add_argument("--chunks", type=int, default=2)
    command.add_argument("--json", action="store_true", help="print the result as one JSON line")
    command.set_defaults(run=_fullsize)
    measures = stream, backends, runtimes, compare, scaling, load, kernels, fp8
    for module in (*measures, diff, report, everything, gpu_check):
        module.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
