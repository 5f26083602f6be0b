"""What a file tells of a tensor before its data is read, and which tensors the engine can use."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Stored(NamedTuple):
    """A tensor in a file.

    dtype    torch's, or the name of a block format of GGUF (Q8_0, Q4_K, ...)
    problem  what it is instead of a dense tensor of real numbers, in words; None if it is one
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    problem: str | None = None


def expect_dense(file: object, key: str, problem: str | None) -> None:
    """ValueError that names the file and the key, if there is a problem with a tensor."""
    if problem is not None:
        raise ValueError(f"{file}: {key}: got {problem}, expected a dense tensor of real numbers")


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
    return f"a tensor in {dtype}" if value.is_complex() else None
