"""x + gate * y with one gate per frame: the residual connection of a modulated block, in one pass instead of two.

`Residual` is that sum before it is computed: the norm that reads it next (kernels/norm_modulate.py) adds it up on the
way, which saves a launch and a pass.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import autocasts, described, fits_per_frame, needs_gradient, power_of_two, warps_for
from kernels.launch import launch, tl, triton
from kernels.table import Variant, implementation, register


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y [B, F * n, dim], gate [B, F, 1, dim] -> [B, F * n, dim]; the product is rounded, as published."""
    return x + (y.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)


@triton.jit(do_not_specialize=["tokens", "frames"])
def _gate_residual(
    X, Y, GATE, OUT, tokens, frames, gate_b, gate_f, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per token: x, y [B * frames * tokens, DIM]."""
    row = tl.program_id(0).to(tl.int64)
    frame = row // tokens
    b, f = frame // frames, frame % frames
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    y = tl.load(Y + row * DIM + at, mask=inside, other=0.0)
    gate = tl.load(GATE + b * gate_b + f * gate_f + at, mask=inside, other=0.0)
    x = tl.load(X + row * DIM + at, mask=inside, other=0.0)
    gated = (y.to(tl.float32) * gate.to(tl.float32)).to(y.dtype).to(tl.float32)
    tl.store(OUT + row * DIM + at, (x.to(tl.float32) + gated).to(x.dtype), mask=inside)


def gate_residual_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Like gate_residual_reference, rounding included."""
    (batch, length, dim), frames = x.shape, gate.shape[1]
    gate, block = gate.expand(batch, -1, -1, -1), power_of_two(dim)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _gate_residual, (batch * length,), x.contiguous(), y.contiguous(), gate, out, length // frames, frames,
        *gate.stride()[:2], dim, block, num_warps=warps_for(block),
        enable_fp_fusion=False,  # a fused multiply-add in bf16 would not round the product
    )  # fmt: skip
    return out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate.

    x, y [B, F * n, dim], gate [B, F, 1, dim] (one per frame; only the last stride is fixed) -> [B, F * n, dim].
    Raises ValueError where shapes or dtypes do not fit.
    """
    if autocasts(x):
        return gate_residual_reference(x, y, gate)
    if x.shape != y.shape or x.dtype != y.dtype or not fits_per_frame(x, gate):
        raise ValueError(f"gate_residual: got {described(x=x, y=y, gate=gate)}, expected x, y [B, F * n, dim] "
                         "and gate [B, F, 1, dim], one dtype, dim contiguous")  # fmt: skip
    return implementation("gate_residual", x.device, fits=not needs_gradient(x, y, gate))(x, y, gate)


class Residual:
    """x + y * gate, or x + y: added up by the norm that reads it first, or when `total` is called.

    x, y [B, F * n, dim], gate [B, F, 1, dim] or None.
    """

    def __init__(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> None:
        self.x, self.y, self.gate = x, y, gate
        self._total: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def added(self) -> bool:
        """Whether the sum is there already."""
        return self._total is not None

    def total(self) -> Tensor:
        """The sum, [B, F * n, dim]."""
        if self._total is None:
            self._total = self.x + self.y if self.gate is None else gate_residual(self.x, self.y, self.gate)
        return self._total

    def accept(self, total: Tensor) -> None:
        """Take the sum from the kernel that has computed it."""
        self._total = total


def _variants() -> Iterator[Variant]:
    x = torch.empty(1, 1560, 1536, dtype=torch.bfloat16, device="meta")
    gate = torch.empty(1, 1, 6, 1, 1536, dtype=torch.bfloat16, device="meta")[:, :, 2]
    yield Variant("1536", partial(gate_residual_triton, x, x, gate))


register("gate_residual", reference=gate_residual_reference, triton=gate_residual_triton, variants=_variants)
