"""8 bits for the blocks' large products: one scale per output channel of a weight and per token of an activation."""

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from kernels.fp8_linear import fp8_linear
from kernels.int8_linear import int8_linear, quantize_int8
from kernels.quantize import quantize_per_channel, quantize_per_token

M = TypeVar("M", bound=nn.Module)
Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]


class QuantizedLinear(nn.Module):
    """Replaces a Linear: y = x W^T + b with weight in 8 bits [N, K], scale float32 [N, 1] and the original bias [N].

    A subclass is a format:
    stored    weight [N, K] -> values in 8 bits [N, K] and scales [N, 1]
    rounded   activation x [B, n, K] -> values in 8 bits [B * n, K] and scales [B * n, 1]
    multiply  the product of both, see kernels/
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    stored: Quantizer
    rounded: Quantizer
    multiply: Callable[..., Tensor]

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype  # of the result
        values, scale = self.stored(weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, K] -> [B, n, N]"""
        return self.product(*self.rounded(x), len(x))

    def write(self, leaf: str, value: Tensor, rows: slice = slice(None)) -> None:
        """Overwrite rows of the weight [N, K], which is quantised again, or of the bias [N], in the same storage."""
        if leaf == "weight":
            values, scale = self.stored(value)
            self.weight[rows].copy_(values)
            self.scale[rows].copy_(scale)
        elif self.bias is not None:
            self.bias[rows].copy_(value)

    def product(self, values: Tensor, scales: Tensor, batch: int) -> Tensor:
        """Multiply a quantised activation: values [B * n, K] and scales [B * n, 1] -> [B, n, N]."""
        out = self.multiply(values, scales, self.weight, self.scale, self.bias, self.dtype)
        return out.unflatten(0, (batch, -1))


class Fp8Linear(QuantizedLinear):
    """e4m3. Kernels before the product quantise its activation, see `linear_of`."""

    stored = staticmethod(quantize_per_channel)
    rounded = staticmethod(quantize_per_token)
    multiply = staticmethod(fp8_linear)


class Int8Linear(QuantizedLinear):
    """int8, symmetric; the integer product is exact."""

    stored = rounded = staticmethod(quantize_int8)
    multiply = staticmethod(int8_linear)


FORMATS: dict[str, type[QuantizedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear}  # by precision


def linear_of(linear: nn.Module, plain: Callable[..., Tensor], quantize: Callable[..., Any], *args: Any) -> Tensor:
    """linear(plain(*args)). For an FP8 linear, `quantize` replaces `plain`: it also quantises its result."""
    if isinstance(linear, Fp8Linear):
        values, scales = quantize(*args)
        return linear.product(values, scales, len(args[0]))  # the first argument is the activation [B, n, ...]
    return linear(plain(*args))


def same(x: Tensor) -> Tensor:
    """Identity, for `linear_of` when the product takes the activation directly."""
    return x


def quantized(model: M, precision: str, keep: Sequence[str], role: str) -> M:
    """A twin of a WanTransformer with products in fp8 or int8. It shares all other weights and keeps no copy of these.

    Products whose name matches a pattern of `keep`, with role (`sdd.blocks.3.ffn.net.2`) or without, stay unchanged.
    q, k and v of self-attention are one product. Products that are quantised already stay.
    """
    model, make = twin(model), FORMATS[precision]
    for number, block in enumerate(cast(Any, model).blocks):
        joint, *others = products(number)
        if wanted(joint, keep, role) and block.attn1.joint is None:
            block.attn1.join(make(*block.attn1.joined_weights()))
        for (name,) in others:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            linear: Any = getattr(owner, leaf)
            if wanted([name], keep, role) and not isinstance(linear, QuantizedLinear):
                setattr(owner, leaf, make(linear.weight, linear.bias))
            del linear  # it would keep one weight in full while the next is quantised
    return model


def products(number: int) -> list[list[str]]:
    """Names of a block's large products; the first three are one."""
    names = ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
    return [[f"blocks.{number}.attn1.to_{part}" for part in "qkv"], *([f"blocks.{number}.{name}"] for name in names)]


def wanted(names: Sequence[str], keep: Sequence[str], role: str) -> bool:
    """Whether a product is quantised: no pattern of `keep` matches its names."""
    return not any(fnmatchcase(n, p) or fnmatchcase(f"{role}.{n}", p) for n in names for p in keep)


def twin(module: M) -> M:
    """A copy of the module tree that shares the original's parameters and buffers."""
    made = copy.copy(module)
    made._modules = {name: child and twin(child) for name, child in module._modules.items()}
    made._buffers, made._parameters = dict(module._buffers), dict(module._parameters)
    return made
