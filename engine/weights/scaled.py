"""8-bit weights with scales: which tensors of a file are scales, and what the weights are worth.

| spelling | weight | scale | also there |
|---|---|---|---|
| ComfyUI, old | X.weight e4m3 / e5m2 | X.scale_weight, one number | scaled_fp8 (a marker), X.scale_input |
| ComfyUI, new | X.weight e4m3 / e5m2 / int8 | X.weight_scale, one number | X.comfy_quant, or in the header |
| LightX2V | X.weight e4m3 / int8 | X.weight_scale, one number per row [out, 1] | |

Every one means weight * scale. Formats of four bits and scales by blocks are refused by name.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.files import parse_json
from engine.weights.formats.tensors import Stored

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_READ = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # formats of ComfyUI's descriptions
MOST_DESCRIPTION = 4096  # bytes
_HARMLESS = ("full_precision_matrix_mult",)  # how ComfyUI multiplies
_SCALES = (".scale_weight", ".weight_scale")
_OF_ACTIVATIONS = (".scale_input", ".input_scale")  # the engine scales activations by their own values
_MARKERS = ("scaled_fp8", "spiece_model")
_REFUSED = (
    (r"\.weight_scale_inv$", "scales by blocks (weight_scale_inv)"),
    (r"\.(weight_scale_2|weight_global_scale)$", "NVFP4"),
    (r"\.(absmax|quant_map|quant_state\..*)$", "bitsandbytes"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\._(data|scale)$", "quanto"),
    (r"\.(wscales|smooth_factor|proj_down)$", "SVDQuant"),
)


@dataclass(frozen=True)
class Expansion:
    """How a source's stored tensors become weights: `scales` maps a weight to its scale; `dropped` are no weights."""

    scales: dict[str, str]
    dropped: frozenset[str]


def scales_of_plain(tensors: Mapping[str, Stored]) -> list[str]:
    """Names of the scales beside weights that are stored in a floating-point dtype of more than 8 bits.

    Only of those that have a scale's shape: they are read to learn whether they are 1.
    """
    scales = [(name, weight) for name in tensors if (weight := _scaled(name)) is not None]
    return [name for name, weight in scales if weight in tensors and _is_plain(tensors[weight])
            and _is_scale(tensors[name].shape, tensors[weight].shape)]  # fmt: skip


def expansion(
    label: object, tensors: Mapping[str, Stored], descriptions: Iterable[tuple[str, str]],
    ones: Collection[str] = (),
) -> Expansion:  # fmt: skip
    """Sort a part's tensors (names without prefix) into weights, scales and others.

    descriptions: (layer, format) of each layer that the file describes as quantised; ones: the scales of plain weights
    that are 1. ValueError for a format that is not read, for a scale without its weight or of another shape, for
    another scale of a plain weight, and for a weight that lacks the scale it should have.
    """
    if words := refused_format(tensors):
        raise ValueError(f"{label}: got {words}, expected bf16, fp16, fp32, GGUF or fp8 with scales")
    scales, dropped = {}, set()
    for name, stored in tensors.items():
        if name in ones:
            dropped.add(name)
        elif (weight := _scaled(name)) is not None:
            _check_scale(label, name, stored, weight, tensors.get(weight))
            scales[weight] = name
        elif name.endswith((*_OF_ACTIVATIONS, ".comfy_quant")) or name in _MARKERS:
            dropped.add(name)
    for layer, format in descriptions:
        if format not in _READ:
            raise ValueError(f"{label}: got {layer} in {format}, expected one of {', '.join(_READ)}")
        if f"{layer}.weight" not in scales and not any(layer + suffix in ones for suffix in _SCALES):
            raise ValueError(f"{label}: got no scale of {layer}.weight, expected one: it is described as {format}")
    kinds = {_kind(weight) for weight in scales}
    for name, stored in tensors.items():
        if name in dropped or name in scales or name in scales.values():
            continue
        marked = "scaled_fp8" in tensors and len(stored.shape) > 1 and not re.search(r"embed|shared", name)
        if stored.dtype in FP8 and (marked or _kind(name) in kinds):
            raise ValueError(f"{label}: got no scale of {name}, expected one as the file has for other weights")
        if isinstance(stored.dtype, torch.dtype) and not stored.dtype.is_floating_point and not name.endswith("freqs"):
            if torch.Size(stored.shape).numel() == 1:  # a count of steps
                dropped.add(name)
                continue
            kind = str(stored.dtype).removeprefix("torch.")
            raise ValueError(f"{label}: got {name} in {kind} without a scale, expected floating-point numbers")
    return Expansion(scales, frozenset(dropped | set(scales.values())))


def refused_format(names: Iterable[str]) -> str | None:
    """The format of quantised weights that the engine does not read, by their names."""
    names = list(names)
    for pattern, words in _REFUSED:
        if name := next((name for name in names if re.search(pattern, name)), None):
            return f"weights of {words}, as {name}"
    return None


def layers_of_metadata(label: object, metadata: Mapping[str, str]) -> dict[str, str]:
    """layer -> format of a safetensors header's _quantization_metadata. ValueError if it is damaged."""
    if (text := metadata.get("_quantization_metadata")) is None:
        return {}
    try:
        return {str(layer): _described(about) for layer, about in parse_json(text, str(label))["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{label}: got _quantization_metadata {text[:60]!r}, "
                         "expected JSON with layers and their format") from None  # fmt: skip


def format_of(label: object, name: str, described: Tensor) -> str:
    """The format in a X.comfy_quant tensor: JSON as uint8. ValueError if it is damaged."""
    try:
        if described.dtype != torch.uint8 or described.numel() > MOST_DESCRIPTION:
            raise ValueError
        return _described(parse_json(bytes(described.flatten().tolist()), str(label)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{label}: got {name} that cannot be read, expected JSON with a format") from None


def _described(about: Any) -> str:
    """A description's format, with what else changes the numbers, such as `convrot`."""
    more = [name for name, value in about.items() if name not in ("format", *_HARMLESS) and value]
    return " with ".join([str(about["format"]), *more])


def check_scale_values(label: object, name: str, scale: Tensor) -> None:
    """ValueError unless every scale is a positive, finite number."""
    values = scale.float()
    if not (values.isfinite() & (values > 0)).all():
        raise ValueError(f"{label}: got {name} with {values.min().item():g} to {values.max().item():g}, "
                         "expected positive, finite scales")  # fmt: skip


def _check_scale(label: object, name: str, scale: Stored, weight: str, stored: Stored | None) -> None:
    if stored is None:
        raise ValueError(f"{label}: got {name} without {weight}, expected both")
    if stored.dtype not in (*FP8, torch.int8):
        # Programs differ: some round such a weight to 8 bits and multiply, some take it as it is.
        raise ValueError(f"{label}: got {name} other than 1 beside {weight} in {stored.dtype}, "
                         "expected a weight in 8 bits")  # fmt: skip
    if scale.dtype in FP8 or not isinstance(scale.dtype, torch.dtype) or not scale.dtype.is_floating_point:
        raise ValueError(f"{label}: got {name} in {scale.dtype}, expected a scale in float32 or bf16")
    if not _is_scale(scale.shape, stored.shape):
        rows = stored.shape[0] if stored.shape else 1
        raise ValueError(f"{label}: got {name} {list(scale.shape)}, expected one number or [{rows}, 1]")


def _is_scale(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale has one number, or one per row."""
    rows = weight[0] if weight else 1
    return scale in ((), (1,), (1, 1), (rows,), (rows, 1)) and rows > 0


def _scaled(name: str) -> str | None:
    """The weight that a scale belongs to; None for a name that is no scale's."""
    suffix = next((suffix for suffix in _SCALES if name.endswith(suffix)), None)
    return None if suffix is None else name.removesuffix(suffix) + ".weight"


def _is_plain(stored: Stored) -> bool:
    return isinstance(stored.dtype, torch.dtype) and stored.dtype.is_floating_point and stored.dtype not in FP8


def _kind(name: str) -> str:
    """A name without its block's number."""
    return re.sub(r"\d+", "#", name, count=1)
