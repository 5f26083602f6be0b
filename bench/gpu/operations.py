"""Every operation of kernels/: right first, in a step of its own; then its time beside the library's."""

import torch

from bench.commands import kernels
from bench.gpu.lines import Lines
from bench.instruments import ceilings

ROUNDS = 5


def _dtype(lines: Lines) -> torch.dtype:
    return torch.float32 if lines.smoke else torch.bfloat16


@torch.inference_mode()
def errors(lines: Lines) -> None:
    """No timing, and no compilation of torch's code: seconds."""
    for case in kernels.each_case(torch.device(lines.device), _dtype(lines), list(kernels.SHAPES)):
        name = f"{case.op} {case.shape}"
        if isinstance(case, kernels.Failed):
            lines.check(name, False, case.reason)
            continue
        case = kernels.without_compiled(case)
        row = kernels.checked(case)
        if "failed" in row:
            lines.check(name, False, row["failed"])
            continue
        limit = kernels.limit_of(case, row["errors"])
        lines.check(name, row["passed"], f"error {row['errors']['ours']:.1e}, limit {limit:.1e}")


@torch.inference_mode()
def times(lines: Lines) -> None:
    device, dtype = torch.device(lines.device), _dtype(lines)
    limits = ceilings.measure(device, dtype)
    lines.add("row", table="ceilings", **limits.as_dict())
    for case in kernels.each_case(device, dtype, list(kernels.SHAPES)):
        if not isinstance(case, kernels.Failed):
            row = kernels.timed(kernels.without_compiled(case), device, limits, 1 if lines.smoke else ROUNDS)
            lines.add("row", table="operations", **row)
