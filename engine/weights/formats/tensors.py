"""What a file tells of a tensor before its data is read, which tensors the engine can use, and how many it may name."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Far above what public models need, and low enough that a file which only claims much costs seconds at most.
MOST_TENSORS = 20_000  # a training checkpoint of Wan2.1-14B with its optimizers has some 10,000
MOST_NAME = 500  # characters
MOST_DIMENSIONS = 8
_REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
# Weights of 8 bits have scales; counts of steps and descriptions are whole numbers.
_WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32,
          torch.uint64}  # fmt: skip


class Stored(NamedTuple):
    """A tensor in a file.

    dtype    torch's, or the name of a block format of GGUF (Q8_0, Q4_K, ...)
    problem  what it is instead of a dense tensor of real numbers, in words; None if it is one
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    problem: str | None = None


def check_names(file: object, names: Collection[str]) -> None:
    """ValueError for more names than any model has, and for one that is too long or cannot be printed."""
    if len(names) > MOST_TENSORS:
        raise ValueError(f"{file}: got {len(names)} tensors, expected at most {MOST_TENSORS}")
    for name in names:
        if len(name) > MOST_NAME or not name.isprintable():
            raise ValueError(f"{file}: got the name {name[:40]!a} of {len(name)} characters for a tensor, "
                             f"expected at most {MOST_NAME} that can be printed")  # fmt: skip


def expect_dense(file: object, key: str, problem: str | None) -> None:
    """ValueError that names the file and the key, if there is a problem with a tensor."""
    if problem is not None:
        raise ValueError(f"{file}: {key}: got {problem}, expected a dense tensor of real numbers")


def expect_floating(file: object, key: str, stored: Stored) -> None:
    """ValueError unless a tensor has floating-point numbers that need no scale."""
    expect_dense(file, key, stored.problem)
    if not isinstance(stored.dtype, torch.dtype) or not stored.dtype.is_floating_point:
        dtype = str(stored.dtype).removeprefix("torch.")
        raise ValueError(f"{file}: {key}: got {dtype}, expected floating-point numbers")


def dense_problem(value: Any) -> str | None:
    """What a value of a torch checkpoint is instead of a dense tensor of real numbers; None if it is one."""
    if not isinstance(value, Tensor):
        return "None" if value is None else getattr(value, "words", f"a value of type {type(value).__name__}")
    if value.is_nested:
        return "a nested tensor"
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"a tensor of class {type(value).__name__}"
    if value.layout is not torch.strided:
        return f"a sparse tensor ({str(value.layout).removeprefix('torch.')})"
    if value.is_meta:
        return "a tensor without data (on the device meta)"
    dtype = str(value.dtype).removeprefix("torch.")
    if value.is_quantized or dtype.startswith(("bits", "quint", "qint")):
        return f"a quantised tensor ({dtype})"
    if value.dtype not in _REAL | _WHOLE:
        return f"a tensor in {dtype}"
    if value.ndim > MOST_DIMENSIONS:
        return f"a tensor of {value.ndim} dimensions"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor {list(value.shape)} that repeats {value.untyped_storage().nbytes()} bytes"
    return None
