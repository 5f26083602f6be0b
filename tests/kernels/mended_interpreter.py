"""Fixes Triton's interpreter for bfloat16 and FP8.

Stock 3.6 to 3.9 multiply raw bits in bf16 `tl.dot`, sum and compare raw bits, and truncate instead of round. In FP8
they lose carries, subnormals and saturation. Here conversions, arithmetic, products and reductions of narrow floats use
float32 and torch's conversions. Conversion to FP8 saturates, as on a GPU.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

# Triton's type -> torch's type, and the numpy type in which the interpreter stores its bits.
TYPES = {
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8),
    tl.float16: (torch.float16, np.float16),
    tl.float32: (torch.float32, np.float32),
    tl.float64: (torch.float64, np.float64),
}
NARROW = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
BITS = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16), 4: (np.float32, torch.float32),
        8: (np.float64, torch.float64)}  # fmt: skip


def convert(bits, source, target, rounding=None):
    """Convert bits of type `source` to bits of type `target`: nearest even, FP8 saturates, NaN stays NaN."""
    flat = np.ascontiguousarray(bits)
    values = torch.from_numpy(flat.view(BITS[flat.itemsize][0])).view(TYPES[source][0])
    values = values.to(torch.float64 if source == tl.float64 else torch.float32)
    if target in LARGEST:
        values = torch.where(values.isnan(), values, values.clamp(-LARGEST[target], LARGEST[target]))
    values = values.to(TYPES[target][0]).contiguous()
    return values.view(BITS[values.element_size()][1]).numpy().view(TYPES[target][1]).reshape(np.shape(bits))


def widened(handle):
    """A handle's values in a type that numpy supports."""
    kind = handle.dtype.scalar
    return convert(handle.data, kind, tl.float32) if kind in NARROW else handle.data


def narrowed(values, kind):
    return TensorHandle(convert(np.asarray(values, np.float32), tl.float32, kind), kind)


def cast_impl(self, src, dst):
    source, target = src.dtype.scalar, dst.scalar
    if source in TYPES and target in TYPES and source != target:
        return TensorHandle(convert(src.data, source, target), target)
    if target in NARROW and source not in TYPES:
        return narrowed(src.data, target)
    return TensorHandle(widened(src).astype(interpreter._get_np_dtype(dst)), target)


def create_dot(self, a, b, d, *_):
    x, y = (values.astype(np.float32) if values.dtype == np.float16 else values for values in map(widened, (a, b)))
    return TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def mend():
    """Replace the wrong functions. Call it once per process, before any kernel runs."""
    binary, unary, reduce = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, ReduceOps.apply

    def binary_op(self, left, right, op):
        kind = left.dtype.scalar
        if kind not in NARROW:
            return binary(self, left, right, op)
        out = op(widened(left), widened(right))
        return TensorHandle(out, kind) if out.dtype == np.bool_ else narrowed(out, kind)

    def unary_op(self, value, op):
        kind = value.dtype.scalar
        return narrowed(op(widened(value)), kind) if kind in NARROW else unary(self, value, op)

    def apply(self, value):
        if isinstance(value, tuple) or value.dtype.scalar not in NARROW:
            return reduce(self, value)
        kind = value.dtype.scalar
        out = reduce(self, self.to_tensor(convert(value.handle.data, kind, tl.float32), tl.float32))
        return self.to_tensor(narrowed(out.handle.data, kind).data, kind)

    interpreter._convert_float = convert
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, ReduceOps.apply = binary_op, unary_op, apply
