"""Replay recorded cases of public streaming code through the engine; exit status 1 where an error is too large."""

import json
from dataclasses import dataclass
from pathlib import Path

from bench.instruments import recordings
from bench.instruments.ways import WAYS
from bench.report.saved import Printed
from engine.options import option


@dataclass(frozen=True, kw_only=True)
class Options(Printed):
    cases: Path = option(help="directory with cases.json and its tensors", metavar="DIR")
    device: str = option("cpu", "cpu, cuda, cuda:1, ...", metavar="DEVICE")
    through: str = option(
        "plain",
        "plain PyTorch, the fused path, or CUDA graphs over it (a stand-in captures on a processor)",
        choices=WAYS,
    )


def run(options: Options) -> int:
    results = recordings.run(options.cases, options.device, options.through)
    summary = recordings.report(results) | {"through": options.through}
    if options.json:
        print(json.dumps(summary))
    else:
        print(f"{'case':32} {'dtype':10} {'max error':>10} {'rms error':>10}")
        for r in results:
            verdict = "" if r.passed else "  FAILED"
            print(f"{r.name:32} {r.dtype:10} {r.max_abs_error:10.2e} {r.rms_error:10.2e}{verdict}")
        print(f"{sum(r.passed for r in results)} of {len(results)} within tolerance, through {options.through}")
    return 0 if results and summary["passed"] else 1
