"""The kernels in CUDA C++ (csrc/cuda), loaded from the library that their CMake build puts into build/cuda.

cmake -S csrc/cuda -B build/cuda && cmake --build build/cuda
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "build" / "cuda" / "libgreedy_cuda.so"
POINTER, INT = ctypes.c_void_p, ctypes.c_int


@cache
def library(path: Path = LIBRARY) -> ctypes.CDLL:
    """The library with its signatures. Raises FileNotFoundError if it was not built, OSError if it does not load."""
    if not path.exists():
        raise FileNotFoundError(f"CUDA kernels: got no {path}, expected it built by csrc/cuda/CMakeLists.txt")
    found = ctypes.CDLL(str(path))
    found.greedy_cuda_fp8_linear.argtypes = [POINTER] * 6 + [INT] * 3 + [POINTER]
    found.greedy_cuda_message.argtypes, found.greedy_cuda_message.restype = [INT], ctypes.c_char_p
    return found


def fp8_linear_cuda(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """kernels.fp8_linear in tiles of 128 x 160, for sm_90; sums in float32 every 128 products.

    Expects tensors that kernels.fp8_linear.fp8_linear has checked. Raises ValueError for unsupported cases.
    """
    if x.device.type != "cuda" or out_dtype != torch.bfloat16:
        raise ValueError(f"fp8_linear_cuda: got {x.device}, {out_dtype}, expected a CUDA device and {torch.bfloat16}")
    found = library()
    (rows, depth), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    tensors = (x, x_scale.contiguous(), weight, weight_scale.contiguous(), bias, out)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        status = found.greedy_cuda_fp8_linear(*pointers, rows, columns, depth, stream)
    if status:
        raise ValueError(f"fp8_linear_cuda: got {found.greedy_cuda_message(status).decode()}, expected a launch")
    return out
