"""Merges LoRA weights into transformers: PEFT folders and LongLive's LoRA checkpoints.

W + scale * B A is added here, because importing PEFT takes as long as the rest of a start. PEFT itself merges what is
more than that, as DoRA or ranks by layer.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.files import read_json
from engine.model.transformer import WanTransformer
from engine.weights.checkpoint import check_tensors, shorten
from engine.weights.containers import Container, open_container
from engine.weights.names import diffusers_name

# What adapter_config.json may hold for _merge to do. Entries that are not listed must be unset (null, false, empty).
_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
_READ = {"r", "lora_alpha", "use_rslora", "target_modules"}
_WITHOUT_EFFECT = {  # on a merge
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
}  # fmt: skip


def base_hash(files: list[Path]) -> str:
    """sha256 over the contents of a base's weight files, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def merge_adapter(model: WanTransformer, folder: Path, base_files: list[Path]) -> None:
    """Merge a PEFT LoRA folder into `model`, in place; its condition.safetensors becomes W_c.

    base.json in the folder names the base of the adapter's training (`base_sha256`). Raises FileNotFoundError for a
    missing file, ValueError for another base or weights that do not fit.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"adapter: got {folder} without {name}, expected a PEFT folder")
    if (folder / "base.json").is_file():
        expected, got = read_json(folder / "base.json").get("base_sha256"), base_hash(base_files)
        if got != expected:
            raise ValueError(f"adapter {folder}: got a base with sha256 {got[:12]}, expected {str(expected)[:12]}")
    config, file = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    source = open_container(file)
    if targets := _plain_targets(model, config):
        prefix, rank = "base_model.model.", config["r"]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        check_tensors(file, _shapes(source), _wanted(targets, rank, prefix))
        tensors = {name.removeprefix(prefix): tensor for name, tensor in source.read(source.tensors)}
        _merge(file, targets, tensors, scale)
    else:
        _merge_with_peft(model, folder, source)
    model.requires_grad_(False)
    condition = folder / "condition.safetensors"
    if condition.is_file():
        if model.condition_proj is None:
            raise ValueError(f"{condition}: got condition weights, expected none for this model")
        source = open_container(condition)
        weight = model.condition_proj.weight
        check_tensors(condition, _shapes(source), {"condition_proj.weight": weight})
        for name, tensor in source.read(source.tensors):
            model.load_state_dict({name: tensor.to(weight)}, strict=False)


def merge_lora_file(model: nn.Module, file: Path) -> None:
    """Merge the `generator_lora` of a LongLive checkpoint (PEFT keys in Wan's names; alpha equals the rank).

    Raises ValueError for weights that do not fit.
    """
    source, state = open_container(file), "generator_lora."
    keys = [key for key in source.tensors if key.startswith(state)]
    tensors = {key.removeprefix(state).removeprefix("base_model.model.").replace(".default", ""): tensor
               for key, tensor in source.read(keys)}  # fmt: skip
    tensors = {diffusers_name(name): tensor for name, tensor in tensors.items()}
    names = sorted({name.split(".lora_")[0] for name in tensors})
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    unknown = [name for name in names if name not in linears]
    if unknown or not names:
        raise ValueError(
            f"{file}: got LoRA weights for {shorten(unknown) or 'nothing'}, expected Linear layers of blocks"
        )
    targets = {name: linears[name] for name in names}
    rank = next(t.shape[0] for name, t in tensors.items() if "lora_A" in name)
    check_tensors(file, {name: tuple(t.shape) for name, t in tensors.items()}, _wanted(targets, rank))
    _merge(file, targets, tensors, 1.0)
    model.requires_grad_(False)


def _shapes(source: Container) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in source.tensors.items()}


def _plain_targets(model: nn.Module, config: Mapping[str, Any]) -> dict[str, nn.Linear]:
    """The Linears that a PEFT configuration names; none if it asks for more than W + scale * B A."""
    suffixes, numbers = config.get("target_modules"), (config.get("r"), config.get("lora_alpha"))
    others = config.keys() - _PLAIN.keys() - _READ - _WITHOUT_EFFECT
    plain = all(config.get(key, values[0]) in values for key, values in _PLAIN.items())
    if not plain or any(config[key] for key in others) or not isinstance(suffixes, list):
        return {}
    if not all(isinstance(number, int | float) and number > 0 for number in numbers):
        return {}
    # PEFT's rule: a list names modules by whole dotted suffixes.
    found = {name: layer for name, layer in model.named_modules()
             if any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)}  # fmt: skip
    linears = {name: layer for name, layer in found.items() if type(layer) is nn.Linear}
    return linears if len(linears) == len(found) else {}


def _wanted(targets: Mapping[str, nn.Linear], rank: int, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of an adapter of this rank, without data."""
    wanted = {}
    for name, layer in targets.items():
        wanted[f"{prefix}{name}.lora_A.weight"] = torch.empty(rank, layer.in_features, device="meta")
        wanted[f"{prefix}{name}.lora_B.weight"] = torch.empty(layer.out_features, rank, device="meta")
    return wanted


def _merge(file: Path, targets: Mapping[str, nn.Linear], tensors: Mapping[str, Tensor], scale: float) -> None:
    """W [out, in] of each target becomes W + scale * B A, with PEFT's bits: A, B in W's dtype, the product in float32.

    W becomes a new tensor, because the old one may be mapped to its file.
    """
    for name, layer in targets.items():
        weight = layer.weight.detach()
        a, b = (tensors[f"{name}.lora_{x}.weight"].to(weight).float() for x in "AB")
        merged = weight + (b @ a * scale).to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"{file}: got weights of {name} that are not finite, expected numbers")
        layer.weight = nn.Parameter(merged, requires_grad=False)


def _merge_with_peft(model: WanTransformer, folder: Path, source: Container) -> None:
    from peft import PeftModel, get_peft_model_state_dict  # takes seconds to import, so import it only here

    try:
        merged = PeftModel.from_pretrained(model, folder, is_trainable=False, low_cpu_mem_usage=True)
        # PEFT initialises missing weights and drops unknown ones without an error, so check the names here.
        check_tensors(source.file, _shapes(source), get_peft_model_state_dict(merged))
        merged.merge_and_unload(safe_merge=True)  # creates a new tensor: the base may be mapped to its file
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"adapter {folder}: got weights that do not fit, expected LoRA of this model ({reason})"
        ) from None
