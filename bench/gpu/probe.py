"""First light: versions, one attention launch alone and in a graph, and which FP8 products the library has."""

from functools import partial

import torch

from bench.commands import kernels
from bench.gpu.lines import Lines
from bench.instruments.header import machine
from bench.operations import attention, others
from engine.model.cache import FP8
from kernels import fp8_linear
from kernels.quantize import quantize_per_channel, quantize_per_token


def probe(lines: Lines) -> None:
    device = torch.device(lines.device)
    lines.add("machine", **machine(device))
    lines.attempt("attention", partial(_attention, lines, device))
    for columns, depth in [(128, 256)] if lines.smoke else [(4608, 1536), (1536, 1536), (8960, 1536), (1536, 8960)]:
        shape = 60 if lines.smoke else 1560, columns, depth
        lines.attempt(f"FP8 product {shape}", partial(_product, lines, device, *shape))


def _attention(lines: Lines, device: torch.device) -> None:
    """The kernel launches, gives what its reference gives, and a graph of it gives the same again."""
    make, shapes = attention.SHAPES["ring_attention"]
    case = make(device, torch.float32 if lines.smoke else torch.bfloat16, *shapes[device.type][0])
    with torch.inference_mode():
        found = kernels.errors(case)
        allowed = kernels.limit_of(case, found)
        lines.check("attention", found["ours"] <= allowed, f"error {found['ours']:.1e}, limit {allowed:.1e}")
        if device.type == "cuda":
            expected, graph = case.ours().clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = case.ours()
            out.zero_()
            graph.replay()
            lines.check("attention in a graph", torch.equal(out, expected), "the same bits as a launch")


def _product(lines: Lines, device: torch.device, rows: int, columns: int, depth: int) -> None:
    """Row-wise FP8 products with bias: which forms the library has, and what the engine takes."""
    x, weight, bias = others._random(device, torch.bfloat16, (rows, depth), (columns, depth), (columns,))
    args = (*quantize_per_token(x), *quantize_per_channel(weight), bias, torch.bfloat16)
    truth = fp8_linear.fp8_linear_reference(*args)
    assert args[0].dtype == FP8
    for fast in (False, True):
        try:
            out = fp8_linear._scaled_mm(*args, fast=fast)
            found = f"error {_error(out, truth):.1e}"
        except (RuntimeError, ValueError) as refused:
            found = kernels.said(refused)
        lines.add("row", table="library's FP8 product", shape=f"{rows} x {columns} x {depth}", fast=fast, found=found)
    error = _error(fp8_linear.fp8_linear(*args), truth)
    lines.check(f"FP8 product {rows} x {columns} x {depth}", error <= 1e-2, f"error {error:.1e}, limit 1e-2")


def _error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.float() - truth.float()).square().mean().sqrt() / truth.float().square().mean().sqrt())
