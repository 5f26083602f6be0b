"""Merges LoRA weights into transformers with PEFT: PEFT folders and LongLive's LoRA checkpoints."""

import hashlib
from pathlib import Path

from torch import nn

from engine.model.transformer import WanTransformer
from engine.weights.checkpoint import check_tensors, shorten
from engine.weights.names import diffusers_name
from engine.weights.sources import PickleSource, SafetensorsSource, read_json


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
    # PEFT initialises missing weights and drops unknown ones without an error, so check the names here.
    weights = folder / "adapter_model.safetensors"
    check_tensors(weights, SafetensorsSource([weights], str(weights)).shapes(), get_peft_model_state_dict(merged))
    merged.merge_and_unload(safe_merge=True)  # creates a new tensor: the base may be mapped to its file
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
    """Merge the `generator_lora` of a LongLive checkpoint (PEFT keys in Wan's names; alpha equals the rank).

    Raises ValueError for weights that do not fit.
    """
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
            f"{file}: got LoRA weights for {shorten(unknown) or 'nothing'}, expected Linear layers of blocks"
        )
    rank = next(t.shape[0] for name, t in tensors.items() if "lora_A" in name)
    # PEFT matches a list by suffix. These names are whole paths, so each one matches a single module.
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), model)
    check_tensors(file, {name: tuple(t.shape) for name, t in tensors.items()}, get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, tensors)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.requires_grad_(False)
