"""8 bits for the linears of the transformer blocks: e4m3 or int8 weights and activations; all else stays as it is.

A quantised pipeline is an ordinary pipeline whose chosen linears are `LinearFP8` or `LinearInt8`. Their operators
compute in PyTorch what the exported graph computes, see export.onnx_graph. Embeddings, time and text embedders, W_c,
norms and proj_out lie outside the blocks and are never quantised. Nor are the linears for the text's keys and values,
because they run only once per prompt.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from engine.model.layers import Block
from engine.model.quantized import twin
from engine.model.transformer import WanTransformer
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline
from kernels.int8_linear import INT8_MAX, SMALLEST, int8_linear, quantize_int8

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
GRANULARITIES = ("tensor", "token")
STEADY = 1.5  # up to here an int8 linear's largest inputs of two steps may be apart for one scale to serve both
_ONCE = ("attn2.to_k", "attn2.to_v")  # run once per prompt


@dataclass(frozen=True)
class Recipe:
    """Which linears are quantised, and how.

    activations  tensor: one scale per linear, from a calibration; token: one scale per token, found at run time.
                 In int8 a linear that is not steady has one per token all the same, see Calibration.
    keep         linears that stay as they are: shell patterns of blocks.N.NAME, or of ROLE.blocks.N.NAME for one
                 transformer only, say "sdd.blocks.0.*" (a model's own patterns are fp8_keep in its engine.json)
    precision    fp8 or int8
    """

    activations: str = "tensor"
    keep: tuple[str, ...] = ()
    precision: str = "fp8"

    def __post_init__(self) -> None:
        for name, known in (("activations", GRANULARITIES), ("precision", tuple(LINEARS))):
            if (got := getattr(self, name)) not in known:
                raise ValueError(f"quantize: got {name} {got!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Calibration:
    """The largest input magnitude of every linear, as a model streamed (see export.calibrate).

    amax   by full name, or without ROLE for all roles alike
    steps  the same by the kind of pass, say {"sdd.blocks.0.ffn.net.2": {"sdd at 750": 3.1, "sdd_context": 2.8}};
           empty where they are not known
    """

    amax: Mapping[str, float]
    steps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """Name -> the largest amax of its steps over the smallest; 1 where a linear sees one step, or only zeros."""
        found = {}
        for name, steps in self.steps.items():
            low, high = min(steps.values()), max(steps.values())
            found[name] = high / low if low > 0 else 1.0 if high == 0 else float("inf")
        return found

    def of(self, name: str) -> float:
        """A linear's amax. ValueError where there is none."""
        value = _known(self.amax, name)
        if value is None:
            expected = "one (calibrate, or activations 'token')"
            raise ValueError(f"quantize: got no calibrated amax of {name}, expected {expected}")
        return value

    def summary(self) -> str:
        """One line about the ratios."""
        ratios = self.ratios()
        if not ratios:
            return "largest inputs by step: not known"
        worst = max(ratios, key=lambda name: ratios[name])
        unsteady = sum(ratio >= STEADY for ratio in ratios.values())
        return (
            f"largest inputs by step, largest over smallest: median {statistics.median(ratios.values()):.2f}, most "
            f"{ratios[worst]:.2f} ({worst}); {unsteady} of {len(ratios)} linears at {STEADY} or more"
        )


def _known(values: Mapping[str, float], name: str) -> float | None:
    """A linear's value: under its full name, or without ROLE for all roles alike."""
    return values.get(name, values.get(name.partition(".")[2]))


def scale_of(amax: Tensor, largest: float = E4M3_MAX) -> Tensor:
    """Largest magnitudes -> scales: q = x / scale fills the range of a format, -largest to largest."""
    return amax.clamp_min(SMALLEST) / largest


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


@torch.library.custom_op("greedy::linear_int8", mutates_args=())
def linear_int8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [M, K] times int8 weight [K, N] with weight_scale [N]; input_scale [], or None for one scale per row of x."""
    values, scale = quantize_int8(x, input_scale)
    return int8_linear(values, scale.contiguous(), weight.t(), weight_scale.float()[:, None], bias, x.dtype)


@linear_fp8.register_fake
@linear_int8.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


class EightBitLinear(nn.Module):
    """Replaces a Linear: its weight in 8 bits [in, out] with one scale per output channel; its bias stays as it is.

    A subclass is a format: its largest number, its rounding (x, scale -> values), and the operator of its graph.
    """

    largest: float
    rounded: Callable[[Tensor, Tensor], Tensor]
    operator: Callable[..., Tensor]

    def __init__(self, linear: nn.Linear, amax: float | None) -> None:
        """amax is the largest input magnitude that is represented; None takes the maximum of each token."""
        super().__init__()
        dtype, weight = linear.weight.dtype, linear.weight.detach()
        scale = scale_of(weight.abs().amax(1), self.largest).to(dtype)
        input_scale = None
        if amax is not None:
            input_scale = scale_of(torch.tensor(amax, device=weight.device), self.largest).to(dtype)
        self.register_buffer("weight", self.rounded(weight, scale[:, None]).t().contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        rows = x.flatten(0, -2)
        out = self.operator(rows, self.weight, self.weight_scale, self.input_scale, self.bias)
        return out.unflatten(0, x.shape[:-1])


class LinearFP8(EightBitLinear):
    largest = E4M3_MAX
    rounded = staticmethod(to_e4m3)
    operator = staticmethod(linear_fp8)


class LinearInt8(EightBitLinear):
    largest = INT8_MAX
    rounded = staticmethod(lambda x, scale: quantize_int8(x, scale)[0])
    operator = staticmethod(linear_int8)


LINEARS: dict[str, type[EightBitLinear]] = {"fp8": LinearFP8, "int8": LinearInt8}  # by precision


def quantizable(pipeline: Pipeline) -> list[str]:
    """Names ROLE.blocks.N.NAME of every linear that can be quantised."""
    models = _models(pipeline)
    return [
        f"{role}.{name}"
        for role, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and not name.endswith(_ONCE)
    ]


def quantize(pipeline: Pipeline, recipe: Recipe, calibration: Calibration | None = None) -> Pipeline:
    """The pipeline with quantised linears. It shares all other weights with `pipeline`.

    The calibration is needed where recipe.activations is "tensor". Raises ValueError where it lacks a linear, or where
    a pattern of recipe.keep matches nothing.
    """
    names = quantizable(pipeline)
    for pattern in recipe.keep:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(f"quantize: got keep {pattern!r}, which matches no linear, expected names like {names[0]}")
    chosen = [name for name in names if not any(_fits(name, pattern) for pattern in recipe.keep)]
    if not chosen:
        raise ValueError("quantize: got a keep list that leaves nothing to quantise, expected at least one linear")
    known = calibration or Calibration({})
    # e4m3 is as fine for small numbers as for large ones, so steps may differ there.
    ratios = known.ratios() if recipe.precision == "int8" else {}

    def make(name: str, linear: nn.Linear) -> nn.Module:
        per_token = recipe.activations == "token" or (_known(ratios, name) or 1.0) >= STEADY
        return LINEARS[recipe.precision](linear, None if per_token else known.of(name))

    return replace_linears(pipeline, chosen, make)


def quantized_as(pipeline: Pipeline) -> str | None:
    """fp8 or int8 where linears of the pipeline are, else None."""
    kinds = {type(module) for model in _models(pipeline).values() for module in model.modules()}
    return next((name for name, kind in LINEARS.items() if kind in kinds), None)


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
        setattr(owner, leaf, make(name, cast(nn.Linear, owner.get_submodule(leaf))))
    stages = pipeline.stages
    assert isinstance(stages, TorchStages)
    stages = TorchStages(models, stages.vae, stages.text_encoder)
    return dataclasses.replace(pipeline, stages=stages, adapters=None)  # the new linears keep no base to merge into


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition(".")[2], pattern)


def _models(pipeline: Pipeline) -> dict[str, WanTransformer]:
    if not isinstance(pipeline.stages, TorchStages):
        raise ValueError(f"quantize: got a pipeline of backend {pipeline.stages.name}, expected torch")
    return pipeline.stages.models
