"""FP8 for the linears of the transformer blocks: e4m3 weights and activations; everything else stays as it is.

A quantised pipeline is an ordinary pipeline whose chosen linears are `LinearFP8`. Their operator computes in PyTorch
what the exported graph computes: export.onnx_graph spells it as QuantizeLinear and DequantizeLinear. Embeddings, time
and text embedders, W_c, norms and proj_out lie outside the blocks and are never quantised. Nor are the linears for the
text's keys and values, because they run only once per prompt.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from engine.model.layers import Block
from engine.model.quantized import twin
from engine.model.transformer import WanTransformer
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
SMALLEST = 1e-12  # least max|x| of a row, so that the scale of zeros is not zero
GRANULARITIES = ("tensor", "token")
_ONCE = ("attn2.to_k", "attn2.to_v")  # run once per prompt


@dataclass(frozen=True)
class Recipe:
    """Which linears are quantised, and how.

    activations  tensor: one scale per linear, from a calibration; token: one scale per token, found at run time
    keep         linears that stay as they are: shell patterns of blocks.N.NAME, or of ROLE.blocks.N.NAME for one
                 transformer only, say "sdd.blocks.0.*" (a model's own patterns are fp8_keep in its engine.json)
    """

    activations: str = "tensor"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activations not in GRANULARITIES:
            raise ValueError(f"fp8: got activations {self.activations!r}, expected one of {', '.join(GRANULARITIES)}")


def scale_of(amax: Tensor) -> Tensor:
    """Largest magnitudes -> scales: q = x / scale fills e4m3's range."""
    return amax.clamp_min(SMALLEST) / E4M3_MAX


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, clamped and rounded to nearest even; without the clamp the conversion gives NaN for large values."""
    return (x.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


@torch.library.custom_op("greedy::linear_fp8", mutates_args=())
def linear_fp8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [M, K] times e4m3 weight [K, N] with weight_scale [N]; input_scale [], or None for one scale per row of x."""
    scale = scale_of(x.abs().amax(-1, keepdim=True)) if input_scale is None else input_scale
    out = (to_e4m3(x, scale).to(x.dtype) * scale) @ (weight.to(x.dtype) * weight_scale)
    return out if bias is None else out + bias


@linear_fp8.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


class LinearFP8(nn.Module):
    """Replaces a Linear: its weight as e4m3 [in, out] with one scale per output channel; its bias stays as it is."""

    def __init__(self, linear: nn.Linear, amax: float | None) -> None:
        """amax is the largest input magnitude that is represented; None takes the maximum of each token."""
        super().__init__()
        dtype, weight = linear.weight.dtype, linear.weight.detach()
        scale = scale_of(weight.abs().amax(1)).to(dtype)
        input_scale = None if amax is None else scale_of(torch.tensor(amax, device=weight.device)).to(dtype)
        self.register_buffer("weight", to_e4m3(weight, scale[:, None]).t().contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.flatten(0, -2)
        return linear_fp8(rows, self.weight, self.weight_scale, self.input_scale, self.bias).unflatten(0, x.shape[:-1])


def quantizable(pipeline: Pipeline) -> list[str]:
    """Names ROLE.blocks.N.NAME of every linear that can be FP8."""
    models = _models(pipeline)
    return [
        f"{role}.{name}"
        for role, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and not name.endswith(_ONCE)
    ]


def quantize(pipeline: Pipeline, recipe: Recipe, amax: Mapping[str, float] | None = None) -> Pipeline:
    """The pipeline with FP8 linears. It shares all other weights with `pipeline`.

    amax holds each linear's largest input magnitude (see export.calibrate), under its full name, or without ROLE for
    all roles alike. It is needed where recipe.activations is "tensor". Raises ValueError where one is missing, or
    where a pattern of recipe.keep matches nothing.
    """
    names = quantizable(pipeline)
    for pattern in recipe.keep:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(f"fp8: got keep {pattern!r}, which matches no linear, expected names like {names[0]}")
    chosen = [name for name in names if not any(_fits(name, pattern) for pattern in recipe.keep)]
    if not chosen:
        raise ValueError("fp8: got a keep list that leaves nothing to quantise, expected at least one linear")

    def make(name: str, linear: nn.Linear) -> nn.Module:
        if recipe.activations == "token":
            return LinearFP8(linear, None)
        known = amax or {}
        value = known.get(name, known.get(name.partition(".")[2]))
        if value is None:
            raise ValueError(f"fp8: got no calibrated amax of {name}, expected one (calibrate, or activations 'token')")
        return LinearFP8(linear, value)

    return replace_linears(pipeline, chosen, make)


def is_quantized(pipeline: Pipeline) -> bool:
    """Whether any linear of the pipeline is FP8."""
    return any(isinstance(module, LinearFP8) for model in _models(pipeline).values() for module in model.modules())


def replace_linears(pipeline: Pipeline, names: Iterable[str], make: Callable[[str, nn.Linear], nn.Module]) -> Pipeline:
    """A pipeline on twins of the transformers, in which each named linear is what `make` returns for it."""
    models = {role: twin(model) for role, model in _models(pipeline).items()}
    for model in models.values():
        for block in model.blocks:
            cast(Block, block).attn1.separate()  # each of q, k and v may be replaced alone
    for name in names:
        role, _, path = name.partition(".")
        parent, _, leaf = path.rpartition(".")
        owner = models[role].get_submodule(parent)
        setattr(owner, leaf, make(name, owner.get_submodule(leaf)))  # type: ignore[arg-type]
    stages = pipeline.stages
    assert isinstance(stages, TorchStages)
    stages = TorchStages(models, stages.vae, stages.text_encoder)
    return dataclasses.replace(pipeline, stages=stages, adapters=None)  # the new linears keep no base to merge into


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition(".")[2], pattern)


def _models(pipeline: Pipeline) -> dict[str, WanTransformer]:
    if not isinstance(pipeline.stages, TorchStages):
        raise ValueError(f"fp8: got a pipeline of backend {pipeline.stages.name}, expected torch")
    return pipeline.stages.models
