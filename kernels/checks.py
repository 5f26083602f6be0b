"""Helpers that several operations share: checks, parts of error messages, block sizes per row."""

import torch
from torch import Tensor


def described(**tensors: Tensor | None) -> str:
    """name [shape] dtype of every tensor, for the `got` half of a message."""
    parts = []
    for name, tensor in tensors.items():
        if tensor is not None:
            parts.append(f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    return ", ".join(parts)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records these tensors: the kernels have no backward pass, the references do."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def autocasts(x: Tensor) -> bool:
    """Whether autocast chooses dtypes: the references then run as PyTorch's own operations do, dtypes unchecked."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def fits_per_frame(x: Tensor, *values: Tensor) -> bool:
    """Whether x is [B, F * n, dim], not empty, and all values are [B or 1, F, 1, dim] in its dtype, dim contiguous."""
    frames = values[0].shape[1] if values[0].ndim == 4 else 0
    if x.ndim != 3 or not x.numel() or not frames or x.shape[1] % frames:
        return False
    shapes = {(batch, frames, 1, x.shape[2]) for batch in (1, x.shape[0])}
    return all(v.shape in shapes and v.dtype == x.dtype and v.stride(-1) == 1 for v in values)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below size (at least 1)."""
    return 1 << max(size - 1, 0).bit_length()


def head_and_tail(size: int) -> tuple[int, int]:
    """Two powers of two that cover a row with little padding: 1536 -> 1024, 512; 8960 -> 8192, 1024; 128 -> 128, 0."""
    head = 1 << (size.bit_length() - 1)
    return head, power_of_two(size - head) if size > head else 0


def warps_for(block: int) -> int:
    """Warps for one program over `block` elements: 16 elements per thread, at most 256 threads."""
    return min(max(block // 512, 1), 8)
