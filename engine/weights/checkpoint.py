"""Weights from disk: diffusers pipeline directories, Self-Forcing-family checkpoint files, PEFT adapters.

Files are memory-mapped and go tensor by tensor into modules built on the meta device, in their final dtype.
Every tensor is checked by name and shape before the first one is read.
"""

import gc
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config import TransformerConfig
from engine.model.transformer import WanTransformer

# Wan's own parameter names, used by every public Self-Forcing-family checkpoint -> diffusers' names.
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{theirs}.{a}": f"{ours}.{b}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
            ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
}  # fmt: skip
_TOP = {
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
}
_WRAPPERS = re.compile(r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.)")
_BUFFERS = re.compile(r"(^|\.)freqs$")  # position tables that some checkpoints carry


def diffusers_name(name: str) -> str:
    """Wan's parameter or module name in diffusers' spelling; other names come back as they are."""
    name = _WRAPPERS.sub("", name).lstrip(".")
    name = name.removeprefix("model.")
    block = re.match(r"blocks\.(\d+)\.(.+)$", name)
    table, prefix, rest = (_BLOCK, f"blocks.{block[1]}.", block[2]) if block else (_TOP, "", name)
    for theirs, ours in table.items():
        if rest == theirs or rest.startswith(theirs + "."):
            return prefix + ours + rest[len(theirs) :]
    return name


class TensorSource(Protocol):
    """Named tensors whose shapes are known before their data is read."""

    label: str
    files: list[Path]
    lora: Path | None  # a file whose LoRA weights belong on top

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self) -> Iterator[tuple[str, Tensor]]: ...
    def bytes_at(self, dtype: torch.dtype) -> int: ...


def _bytes_at(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize


class SafetensorsSource:
    """One or more safetensors files. `read` maps each file anew every 32 MB, so what was converted is unmapped."""

    _SPAN = 32 << 20
    lora: Path | None = None

    def __init__(self, files: list[Path], label: str) -> None:
        self.files, self.label = files, label
        self._where: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                        shape = tuple(opened.get_slice(key).get_shape())
                        name = diffusers_name(key)
                        if name in self._where:
                            raise ValueError(f"{label}: got {name} twice ({file.name}), expected every tensor once")
                        self._where[name] = file, key, shape
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: got an unreadable file, expected safetensors ({error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape) in self._where.items() if not _BUFFERS.search(name)}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            waiting = [(name, key) for name, (at, key, _) in self._where.items() if at == file]
            while waiting:
                read = 0
                with safe_open(file, framework="pt") as opened:
                    while waiting and read < self._SPAN:
                        name, key = waiting.pop(0)
                        tensor = opened.get_tensor(key)
                        read += tensor.nbytes
                        yield name, tensor
                        del tensor

    def bytes_at(self, dtype: torch.dtype) -> int:
        return _bytes_at(self.shapes(), dtype)


class PickleSource:
    """A `.pt` checkpoint of the Self-Forcing family, memory-mapped, opened with weights_only=True."""

    _STATES = ("generator_ema", "generator", "model", "state_dict")

    def __init__(self, file: Path, state: str | None = None) -> None:
        self.label, self.files = str(file), [file]
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: got an unreadable file, expected a torch checkpoint ({reason})") from None
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{file}: got {type(loaded).__name__}, expected a dictionary of tensors")
        names = [state] if state else [name for name in self._STATES if isinstance(loaded.get(name), Mapping)]
        if state and not isinstance(loaded.get(state), Mapping):
            raise ValueError(f"{file}: got keys {', '.join(map(str, loaded))}, expected {state!r} among them")
        chosen = loaded[names[0]] if names else loaded
        self.lora = file if state is None and isinstance(loaded.get("generator_lora"), Mapping) else None
        self._tensors = {diffusers_name(name): tensor for name, tensor in chosen.items() if isinstance(tensor, Tensor)}
        if not self._tensors:
            raise ValueError(f"{file}: got keys {', '.join(map(str, loaded))}, expected generator or generator_ema")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self._tensors.items() if not _BUFFERS.search(name)}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def bytes_at(self, dtype: torch.dtype) -> int:
        return _bytes_at(self.shapes(), dtype)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an error that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"got no file {path}, expected one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got no JSON, expected an object ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {type(value).__name__}, expected a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a component folder, sorted; where there is an index, exactly the files it names."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        files = sorted({folder / name for name in read_json(indexes[0]).get("weight_map", {}).values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"no {', '.join(missing)}" if missing else "no safetensors file"
        raise FileNotFoundError(f"{folder}: got {what}, expected the weights")
    return files


def open_source(path: Path, state: str | None = None) -> TensorSource:
    """A component folder, a .safetensors file or a .pt/.pth checkpoint."""
    if path.is_dir():
        return SafetensorsSource(weight_files(path), str(path))
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, expected an existing file")
    if path.suffix == ".safetensors":
        return SafetensorsSource([path], str(path))
    if path.suffix in (".pt", ".pth"):
        return PickleSource(path, state)
    raise ValueError(f"checkpoint: got {path.name}, expected .safetensors, .pt or .pth")


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_tensors(
    label: object, given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor], optional: tuple[str, ...] = ()
) -> None:
    """Raise one ValueError that names what is missing, extra or misshapen among the given shapes."""
    missing = [name for name in wanted if name not in given and name not in optional]
    extra = [name for name in given if name not in wanted]
    wrong = [
        f"{name} {list(given[name])} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name] != tuple(tensor.shape)
    ]
    parts = [f"{what} {_shorten(names)}" for what, names in
             (("missing", missing), ("extra", extra), ("misshapen", wrong)) if names]  # fmt: skip
    if parts:
        raise ValueError(f"{label}: got {len(given)} tensors with {'; '.join(parts)}, expected {len(wanted)}")


def fill(
    module: nn.Module, source: TensorSource, dtype: torch.dtype, device: torch.device,
    optional: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Give a module built on the meta device its weights, each straight into `dtype` on `device`.

    Tensors already in that dtype stay mapped to the file. `optional` ones may be missing: they become zero.
    """
    wanted = module.state_dict()
    check_tensors(source.label, source.shapes(), wanted, optional)
    for name, tensor in source.read():
        if name in wanted:
            module.load_state_dict({name: tensor.to(device=device, dtype=dtype)}, strict=False, assign=True)
        del tensor
    for name in set(optional) & set(wanted) - set(source.shapes()):
        zero = torch.zeros(wanted[name].shape, dtype=dtype, device=device)
        module.load_state_dict({name: zero}, strict=False, assign=True)
    module.eval().requires_grad_(False)
    gc.collect()


def load_transformer(
    config: TransformerConfig, source: TensorSource, dtype: torch.dtype, device: torch.device, conditioned: bool = False
) -> WanTransformer:
    """A transformer from any source; W_c (`conditioned`) is zero unless the source has it."""
    with torch.device("meta"):
        model = WanTransformer(config, conditioned)
    fill(model, source, dtype, device, optional=("condition_proj.weight",) if conditioned else ())
    return model


def base_hash(files: list[Path]) -> str:
    """sha256 over the contents of a base's weight files, in order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def merge_adapter(model: WanTransformer, folder: Path, base_files: list[Path]) -> None:
    """Merge a PEFT LoRA folder into `model`, in place; condition.safetensors beside it becomes W_c.

    base.json in the folder names the base that the adapter was trained on (`base_sha256`); another base is refused.
    """
    from peft import PeftModel, get_peft_model_state_dict

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"adapter: got {folder} without {name}, expected a PEFT folder")
    if (folder / "base.json").is_file():
        expected, got = read_json(folder / "base.json").get("base_sha256"), base_hash(base_files)
        if got != expected:
            raise ValueError(f"adapter {folder}: got a base with sha256 {got[:12]}, expected {str(expected)[:12]}")
    try:
        merged = PeftModel.from_pretrained(model, folder, is_trainable=False, low_cpu_mem_usage=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"adapter {folder}: got weights that do not fit, expected LoRA of this model ({reason})"
        ) from None
    # PEFT fills what is missing with its initial values and drops what it does not know.
    weights = folder / "adapter_model.safetensors"
    check_tensors(weights, SafetensorsSource([weights], str(weights)).shapes(), get_peft_model_state_dict(merged))
    merged.merge_and_unload(safe_merge=True)  # a new tensor: the base may be mapped to its file
    model.requires_grad_(False)
    condition = folder / "condition.safetensors"
    if condition.is_file():
        if model.condition_proj is None:
            raise ValueError(f"{condition}: got condition weights, expected none for this model")
        source = SafetensorsSource([condition], str(condition))
        weight = model.condition_proj.weight
        check_tensors(condition, source.shapes(), {"condition_proj.weight": weight})
        for name, tensor in source.read():
            model.load_state_dict({name: tensor.to(weight)}, strict=False)


def merge_lora_file(model: nn.Module, file: Path) -> None:
    """Merge the `generator_lora` of a LongLive checkpoint (PEFT keys in Wan's names; alpha equals the rank)."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    source = PickleSource(file, "generator_lora")
    tensors = {name.removeprefix("base_model.model.").replace(".default", ""): t for name, t in source.read()}
    tensors = {diffusers_name(name): tensor for name, tensor in tensors.items()}
    modules = sorted({name.split(".lora_")[0] for name in tensors})
    known = dict(model.named_modules())
    unknown = [name for name in modules if name not in known]
    if unknown or not modules:
        raise ValueError(
            f"{file}: got LoRA weights for {_shorten(unknown) or 'nothing'}, expected Linear layers of blocks"
        )
    rank = next(t.shape[0] for name, t in tensors.items() if "lora_A" in name)
    # A list is matched by suffix, and names of whole paths are suffixes of nothing else.
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), model)
    check_tensors(file, {name: tuple(t.shape) for name, t in tensors.items()}, get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, tensors)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.requires_grad_(False)
