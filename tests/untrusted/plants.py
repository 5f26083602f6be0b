"""Code in every place of a model folder where a library might run it: it writes a marker if it does."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

MODULES = (
    "evil", "tokenization_evil", "modeling_evil", "configuration_evil", "processing_evil", "pipeline", "conftest",
    "sitecustomize", "usercustomize", "setup", "__init__", "torch", "transformers", "tokenizers", "safetensors",
    "gguf", "numpy", "peft", "diffusers", "ftfy", "sentencepiece", "av", "PIL", "json", "argparse", "distill", "serve",
)  # fmt: skip
AUTO_MAP = {
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"], "AutoConfig": "configuration_evil.Evil",
    "AutoModel": "modeling_evil.Evil", "AutoProcessor": "processing_evil.Evil",
}  # fmt: skip
TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% include 'evil.py' %}"


class Code:
    """A pickle that writes the marker when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"echo pickle >> {self.marker}",)


def module_text(marker):
    return f"with open({str(marker)!r}, 'a') as marker:\n    marker.write(__name__ + chr(10))\nclass Evil: pass\n"


def pickles(marker):
    """name: bytes, of every kind of file that holds a pickle."""
    code, zipped, legacy = Code(marker), io.BytesIO(), io.BytesIO()
    content = {"state_dict": {"blocks.0.self_attn.q.weight": torch.ones(2, 2), "a": code}, "optimizer": code}
    torch.save(content, zipped)
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    plain = pickle.dumps(content)
    return {
        "w.pt": zipped.getvalue(), "w.pth": legacy.getvalue(), "w.ckpt": plain, "pytorch_model.bin": zipped.getvalue(),
        "training_args.bin": plain, "tokenizer.pkl": plain, "vocab.pkl": plain, "w.safetensors": zipped.getvalue(),
        "object.npy": np_object(code), "adapter_model.bin": legacy.getvalue(),
    }  # fmt: skip


def np_object(code):
    buffer = io.BytesIO()
    np.save(buffer, np.array([code], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def merge_json(file, more):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | more))


def plant(folder, marker):
    """Modules beside every file of a folder, and their names in every configuration there that may have more keys."""
    for place in (folder, *(one for one in folder.rglob("*") if one.is_dir())):
        for name in MODULES:
            (place / f"{name}.py").write_text(module_text(marker))
        (place / "chat_template.jinja").write_text(TEMPLATE)
        (place / "libcustom_ops.so").write_bytes(b"\x7fELF no library")
    words = {"auto_map": AUTO_MAP, "tokenizer_class": "EvilTokenizer", "chat_template": TEMPLATE,
             "processor_class": "Evil", "custom_pipeline": "pipeline"}  # fmt: skip
    merge_json(folder / "tokenizer" / "tokenizer_config.json", words)
    for name in ("tokenizer", "text_encoder"):
        merge_json(folder / name / "config.json", {"auto_map": AUTO_MAP, "trust_remote_code": True})
    for name in ("processor_config.json", "preprocessor_config.json", "generation_config.json"):
        merge_json(folder / "tokenizer" / name, {"auto_map": AUTO_MAP})
    (folder / "scheduler").mkdir(exist_ok=True)
    merge_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": ["evil", "Evil"], "auto_map": AUTO_MAP})
    return folder


def planted_folders(model, root, marker):
    """name: folder. A model that loads with plants around it, and others that name the plants where they are read."""
    found = {"model": plant(shutil.copytree(model, root / "model"), marker)}
    stock = found["stock"] = shutil.copytree(found["model"], root / "stock")
    parts = {"transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"],
             "text_encoder": ["transformers", "UMT5EncoderModel"],
             "scheduler": ["diffusers", "UniPCMultistepScheduler"],
             "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}  # fmt: skip
    merge_json(stock / "model_index.json", {"_class_name": "WanPipeline", "custom_pipeline": "evil", **parts})
    index = {"_class_name": ["evil", "Evil"], "custom_pipeline": "evil", "transformer": ["evil", "Evil"]}
    found["index"] = shutil.copytree(found["model"], root / "index")
    merge_json(found["index"] / "model_index.json", index)
    found["component"] = shutil.copytree(found["model"], root / "component")
    merge_json(
        found["component"] / "model_index.json",
        {"_class_name": "WanPipeline", "text_encoder": ["evil", "Evil"], "tokenizer": ["tokenization_evil", "Evil"]},
    )
    found["spiece"] = shutil.copytree(found["model"], root / "spiece")
    (found["spiece"] / "tokenizer" / "tokenizer.json").unlink()
    (found["spiece"] / "tokenizer" / "spiece.model").write_bytes(b"no model")
    found["pickled"] = shutil.copytree(found["model"], root / "pickled")
    for part in ("transformer", "text_encoder", "vae"):
        for file in (found["pickled"] / part).glob("*.safetensors"):
            file.unlink()
        for name, data in pickles(marker).items():
            (found["pickled"] / part / name).write_bytes(data)
    for name, config in {
        "megatron": {"megatron_core": "evil", "megatron_config": {"a": 1}},
        "mapping": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
    }.items():
        folder = found[f"adapter {name}"] = root / f"adapter_{name}"
        folder.mkdir()
        config |= {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(found["model"]),
                   "revision": "main"}  # fmt: skip
        merge_json(folder / "adapter_config.json", config)
        (folder / "adapter_model.bin").write_bytes(pickles(marker)["adapter_model.bin"])
        plant_modules(folder, marker)
    module = "base_model.model.blocks.0.attn1.to_q"
    pair = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(pair, folder / "adapter_model.safetensors")  # this one loads: a mapping is no use here, and no module
    files = found["files"] = root / "files"
    files.mkdir()
    for name, data in pickles(marker).items():
        (files / name).write_bytes(data)
    plant_modules(files, marker)
    writer = gguf.GGUFWriter(files / "w.gguf", "evil")
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    writer.add_string("general.source.url", "http://192.0.2.1/")
    writer.add_tensor("blocks.0.self_attn.q.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def plant_modules(folder, marker):
    for name in MODULES:
        (folder / f"{name}.py").write_text(module_text(marker))
