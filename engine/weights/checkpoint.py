"""Loads weights into modules, from diffusers pipeline directories and Self-Forcing-family checkpoint files.

Files are memory-mapped. `fill` copies tensor by tensor into modules built on the meta device, in their final dtype.
It checks every name and shape before it reads the first tensor.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import TransformerConfig
from engine.files import read_json
from engine.model.scaled_linear import EIGHT_BITS, ScaledEmbedding, ScaledLinear, expand
from engine.model.transformer import WanTransformer
from engine.model.umt5 import UMT5Config, UMT5Encoder
from engine.weights.sources import ALIGNMENT, FileSource, TensorSource, open_source


def shorten(names: list[str]) -> str:
    """The first names of a list, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_tensors(
    label: object, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor], optional: tuple[str, ...] = ()
) -> None:
    """Raise one ValueError that names the missing, extra and misshapen tensors."""
    missing = [name for name in wanted if name not in found and name not in optional]
    extra = [name for name in found if name not in wanted]
    wrong = [
        f"{name} {list(found[name])} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    parts = [f"{what} {shorten(names)}" for what, names in
             (("missing", missing), ("extra", extra), ("misshapen", wrong)) if names]  # fmt: skip
    if parts:
        raise ValueError(f"{label}: got {len(found)} tensors with {'; '.join(parts)}, expected {len(wanted)}")


def fill(
    module: nn.Module, source: TensorSource, dtype: torch.dtype, device: torch.device,
    optional: tuple[str, ...] = (), leave: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Load the weights of a module built on the meta device, each directly as `dtype` on `device`.

    Tensors already in that dtype stay mapped to the file, where they begin at a multiple of 64 bytes. Elsewhere
    libraries for processors sum in another order, and equal weights should give equal videos from every file.
    `optional` ones may be missing: they become zero. Names that begin as one of `leave` are not for this module.
    Raises ValueError where names or shapes differ.
    """
    wanted = module.state_dict()
    shapes = {name: shape for name, shape in source.shapes().items() if not name.startswith(leave)}
    check_tensors(source.label, shapes, wanted, optional)
    for name, tensor in source.read():
        if name in wanted:
            _assign(module, name, placed(tensor, dtype, device))
        del tensor
    for name in set(optional) & set(wanted) - set(source.shapes()):
        _assign(module, name, torch.zeros(wanted[name].shape, dtype=dtype, device=device))
    module.eval().requires_grad_(False)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace one parameter. load_state_dict would walk the whole module for each tensor."""
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def load_transformer(
    config: TransformerConfig, source: TensorSource, dtype: torch.dtype, device: torch.device, conditioned: bool = False
) -> WanTransformer:
    """Load a transformer from any source; W_c (`conditioned`) is zero if the source lacks it."""
    with torch.device("meta"):
        model = WanTransformer(config, conditioned)
    fill(model, source, dtype, device, optional=("condition_proj.weight",) if conditioned else ())
    return model


def placed(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor as `dtype` on `device`, aligned; the same one where it is that already."""
    tensor = tensor.to(device=device, dtype=dtype)
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def fill_text(
    module: nn.Module, source: FileSource, dtype: torch.dtype, device: torch.device, prefix: str = ""
) -> None:
    """As `fill`, for a text encoder or the part of one whose names begin with `prefix`; 8-bit weights stay in 8 bits.

    In float16 each `wo` stays float32, as transformers keeps it.
    """
    wanted = module.state_dict()
    shapes = {n.removeprefix(prefix): shape for n, shape in source.shapes().items() if n.startswith(prefix)}
    check_tensors(source.label, shapes, wanted)
    for name, tensor, scale in source.read_stored(prefix):
        name = name.removeprefix(prefix)
        wide = dtype == torch.float16 and name.endswith(".wo.weight")
        path, _, leaf = name.rpartition(".")
        kind = _SCALED.get(type(module.get_submodule(path))) if leaf == "weight" else None
        if tensor.dtype in EIGHT_BITS and kind is not None and "relative_attention_bias" not in name:
            scale = None if scale is None else scale.to(device)
            owner, _, leaf = path.rpartition(".")
            small = kind(tensor.to(device), scale, torch.float32 if wide else dtype)
            setattr(module.get_submodule(owner), leaf, small)
        else:
            tensor = tensor if scale is None else expand(tensor, scale)
            _assign(module, name, placed(tensor, torch.float32 if wide else dtype, device))
        del tensor
    module.eval().requires_grad_(False)


_SCALED: dict[type[nn.Module], type[ScaledLinear | ScaledEmbedding]] = {
    nn.Linear: ScaledLinear, nn.Embedding: ScaledEmbedding,
}  # fmt: skip


def load_text_encoder(source: FileSource, config: UMT5Config, dtype: torch.dtype, device: torch.device) -> UMT5Encoder:
    """Load a UMT5 encoder; 8-bit weights stay in 8 bits. Raises ValueError for tensors that do not fit."""
    with torch.device("meta"):
        model = UMT5Encoder(config)
    fill_text(model, source, dtype, device)
    return model


def open_text_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> UMT5Encoder:
    """Load the UMT5 encoder of a component folder. FileNotFoundError, or ValueError for another model."""
    config = UMT5Config.from_dict(read_json(folder / "config.json"))
    return load_text_encoder(open_source(folder, part="text_encoder"), config, dtype, device)
