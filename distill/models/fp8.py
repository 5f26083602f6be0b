"""A student that computes its large products in FP8 while it trains, as the engine will when it streams.

Each product is the engine's own: LoRA merged into the weight in bf16, e4m3 with one scale per output channel, e4m3
activations with one scale per token. The gradient goes straight through the rounding: it is that of the product of the
rounded numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distill.models.student import Adapted
from engine.model.quantized import Fp8Linear, products, wanted
from engine.weights.lora.form import Change
from engine.weights.lora.merge import merged

ADAPTER = "default"  # PEFT's name of a student's only adapter
HALF = torch.bfloat16  # in which the engine's FP8 computes everything else
_rounds = ContextVar("rounds", default=True)


def compute_in_fp8(student: Adapted, keep: Sequence[str]) -> None:
    """From now on the student's products are those of its FP8 stream. `keep` names products that stay as they are."""
    for role, model in student.stages.models.items():
        for number in range(len(model.blocks)):
            for names in products(number):
                if wanted(names, keep, role):
                    for layer in map(model.get_submodule, names):
                        layer.forward = partial(_product, layer)


@contextmanager
def unrounded() -> Iterator[None]:
    """Within the block students compute as if they had no FP8: a target that is no stream's needs no rounding."""
    before = _rounds.set(False)
    try:
        yield
    finally:
        _rounds.reset(before)


def _product(layer: Any, x: Tensor) -> Tensor:
    """PEFT's Linear with a LoRA on x [B, n, K] -> [B, n, N]."""
    if not _rounds.get():
        return type(layer).forward(layer, x)
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    with _gathered(layer.base_layer) as base:
        return _Product.apply(x, down, up, base.weight, base.bias, layer.scaling[ADAPTER])


@contextmanager
def _gathered(layer: nn.Linear) -> Iterator[nn.Linear]:
    """The layer with its whole weight, which the processes may share."""
    if not isinstance(layer, FSDPModule):
        yield layer
        return
    layer.unshard()
    try:
        yield layer
    finally:
        layer.reshard()


class _Product(torch.autograd.Function):
    """x (W + scale B A)^T + b, by the engine's FP8 product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Tensor, bias: Tensor, scale: float) -> Tensor:
        down, up = down.to(HALF), up.to(HALF)
        with torch.autocast(x.device.type, enabled=False):
            weight = merged(base.to(HALF), [(Change(down, up, scale), 1.0)])
            linear = Fp8Linear(weight, bias.to(HALF))
            values, scales = linear.rounded(x.to(HALF))
            out = linear.product(values, scales, len(x))
        ctx.save_for_backward(values, scales, linear.weight, linear.scale, down, up)
        ctx.factor = scale
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, weight, weight_scale, down, up = ctx.saved_tensors
        (grad,) = grads
        rows, near = grad.flatten(0, 1), grad.dtype
        d_x = d_down = d_up = None
        if ctx.needs_input_grad[0]:
            d_x = (rows @ (weight.float() * weight_scale).to(near)).view(*grad.shape[:2], -1)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x = (values.float() * scales).to(near)
            d_down = ctx.factor * ((rows @ up.to(near)).T @ x).float()
            d_up = ctx.factor * (rows.T @ (x @ down.to(near).T)).float()
        return d_x, d_down, d_up, None, None, None
