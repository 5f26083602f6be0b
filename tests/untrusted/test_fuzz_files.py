"""Damaged files of every format give a result or the product's own refusal, in under 2 s and 200 MB each.

python tests/untrusted/test_fuzz_files.py KIND SECONDS [SEED]      # KIND: a key of KINDS
"""

import io
import json
import struct
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from random import Random

sys.path.append(str(Path(__file__).parent.parent / "support"))

import gguf
import numpy as np
import pytest
import torch
from fuzzing import fuzz
from mutations import json_bytes, mutated_bytes, mutated_json
from safetensors.torch import save

from engine.commands.inspect import inspect
from engine.config import TransformerConfig
from engine.model.text import Tokenizer
from engine.model.transformer import WanTransformer
from engine.weights.adapters import describe
from engine.weights.lora.keys import wan_name

CONFIG = TransformerConfig(num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=8, text_dim=24,
                           freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True)  # fmt: skip
PREFIXES = ["", "transformer.", "diffusion_model.", "lora_unet_", "base_model.model."]


def lora(choose=None):
    """A LoRA of two layers, in one of the spellings."""
    prefix = choose.choice(PREFIXES) if choose else ""
    a, b = choose.choice([("lora_A", "lora_B"), ("lora_down", "lora_up")]) if choose else ("lora_A", "lora_B")
    tensors = {}
    for module in ("blocks.0.self_attn.q", "blocks.1.cross_attn.o"):
        name = module.replace(".", "_") if prefix.endswith("unet_") else module
        tensors[f"{prefix}{name}.{a}.weight"] = torch.ones(4, 32)
        tensors[f"{prefix}{name}.{b}.weight"] = torch.ones(32, 4)
    tensors[f"{prefix}{name}.alpha"] = torch.tensor(2.0)
    return tensors


@cache
def weights():
    """A transformer in Wan's names, of which one layer is scaled as ComfyUI writes it."""
    found = {}
    for key, tensor in WanTransformer(CONFIG).state_dict().items():
        module, _, leaf = key.rpartition(".")
        name = f"{wan_name(module)}.{leaf}" if leaf in ("weight", "bias") else wan_name(key)
        found[name] = torch.full_like(tensor, 0.5)
    scaled = "blocks.0.self_attn.q.weight"
    found[scaled] = found[scaled].to(torch.float8_e4m3fn)
    found["blocks.0.self_attn.q.weight_scale"] = torch.tensor(2.0)
    described = json_bytes({"format": "float8_e4m3fn"})
    found["blocks.0.self_attn.q.comfy_quant"] = torch.tensor(list(described), dtype=torch.uint8)
    return found


def header_of(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def of_safetensors(tensors, choose):
    metadata = {
        "_quantization_metadata": json.dumps({"layers": {"blocks.0.self_attn.q": {"format": "float8_e4m3fn"}}}),
        "lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8}),
    }  # fmt: skip
    kept = {key: value for key, value in metadata.items() if choose and choose.random() < 0.3}
    data = save(tensors, kept or None)
    if choose is None:
        return data
    if choose.random() < 0.3:
        return mutated_bytes(data, choose, choose.choice([16, 2000, 1 << 30]))
    header, rest = header_of(data)
    inner = header.get("__metadata__", {})
    for key in list(inner):
        inner[key] = json_bytes(mutated_json(json.loads(inner[key]), choose)).decode()
    text = json_bytes(mutated_json(header, choose))
    return struct.pack("<Q", len(text) + choose.choice([0, 0, 0, 1, -1])) + text + rest


def of_torch(tensors, choose):
    content = {"state_dict": tensors, "step": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    buffer = io.BytesIO()
    legacy = choose is not None and choose.random() < 0.25
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    data = buffer.getvalue()
    if choose is None:
        return data
    if legacy or choose.random() < 0.4:
        return mutated_bytes(data, choose, choose.choice([4000, 1 << 30]))
    found, out = zipfile.ZipFile(buffer), io.BytesIO()
    with zipfile.ZipFile(out, "w", choose.choice([0, 0, 0, 8])) as archive:
        for name in found.namelist():
            entry = found.read(name)
            archive.writestr(name, mutated_bytes(entry, choose) if name.endswith("data.pkl") else entry)
    return out.getvalue()


@cache
def of_gguf():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "w.gguf"
        writer = gguf.GGUFWriter(file, "wan")
        writer.add_array("comfy.gguf.orig_shape.blocks.0.self_attn.q.weight", [32, 32])
        writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
        writer.add_array("tokenizer.ggml.scores", [0.5] * 20)
        writer.add_string("general.description", "a test")
        for name in ("blocks.0.self_attn.q.weight", "blocks.0.self_attn.k.weight"):
            packed = gguf.quantize(np.ones((32, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blocks.0.self_attn.q.bias", np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


def one_file(make, adapter):
    """A maker and a reader of single files."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def write(choose):
        file = folder / "w.bin"
        file.write_bytes(make(choose))
        return file

    def read(file):
        inspect(file)
        if adapter:
            describe(file, CONFIG)

    return write, read


PEFT = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["self_attn.q", "cross_attn.o"], "bias": "none",
    "rank_pattern": {"blocks.0.self_attn.q": 4}, "alpha_pattern": {"q": 2}, "use_rslora": False, "use_dora": False,
    "init_lora_weights": True, "megatron_core": "megatron.core", "auto_mapping": None, "lora_bias": False,
    "base_model_name_or_path": "x/y", "layers_to_transform": None, "modules_to_save": None, "exclude_modules": None,
}  # fmt: skip


def peft_folder():
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    patterns = ["(a+)+$", ".*q|.*o", "(.*)*", "(?=a)", "blocks.\\d+.*", "((((a*)*)*)*)*x", "[a-z]{1,99}", "("]

    def make(choose):
        config, damaged = dict(PEFT), False
        if choose:
            for key in ("target_modules", "exclude_modules"):
                if choose.random() < 0.2:
                    config[key] = choose.choice(patterns)
            if choose.random() < 0.2:
                config["rank_pattern"] = {choose.choice(patterns): choose.choice([4, 3, 0, 10**500, 1.5])}
            config = mutated_json(config, choose)
            damaged = choose.random() < 0.2
        text = json_bytes(config)
        (folder / "adapter_config.json").write_bytes(mutated_bytes(text, choose) if damaged else text)
        tensors = {f"base_model.model.{name}": tensor for name, tensor in lora().items() if "alpha" not in name}
        data = save(tensors) if choose is None or choose.random() < 0.7 else of_safetensors(tensors, choose)
        (folder / "adapter_model.safetensors").write_bytes(data)
        return folder

    def read(folder):
        inspect(folder)
        describe(folder, CONFIG)

    return make, read


def tokenizers():
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    good = Path(__file__).parent.parent.parent / "engine" / "assets" / "sprites" / "tokenizer"
    words, settings = (json.loads((good / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    regex = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "EAAAAAAAAAAAAAAAAAAAAAAAAABhYmM="}
    words["normalizer"] = {"type": "Sequence", "normalizers": [regex, {"type": "Lowercase"}]}

    def make(choose):
        changed = words if choose is None else mutated_json(words, choose)
        if choose and choose.random() < 0.2 and isinstance(changed, dict):
            changed["normalizer"] = mutated_json(charsmap, choose)
        text = json_bytes(changed)
        (folder / "tokenizer.json").write_bytes(
            mutated_bytes(text, choose) if choose and choose.random() < 0.2 else text
        )
        (folder / "tokenizer_config.json").write_bytes(
            json_bytes(mutated_json(settings, choose) if choose else settings)
        )
        return folder

    def read(folder):
        tokenizer = Tokenizer(folder)
        for prompt in ("a red circle  moving", "é" * 40, "a" * 30 + "!"):
            tokenizer.cut(prompt)
            tokenizer.ids(prompt)

    return make, read


KINDS = {
    "adapter folder": peft_folder, "tokenizer": tokenizers,
    "adapter safetensors": lambda: one_file(lambda choose: of_safetensors(lora(choose), choose), True),
    "adapter torch": lambda: one_file(lambda choose: of_torch(lora(choose), choose), True),
    "comfy safetensors": lambda: one_file(lambda choose: of_safetensors(weights(), choose), False),
    "torch": lambda: one_file(lambda choose: of_torch(weights(), choose), False),
    "GGUF": lambda: one_file(lambda choose: mutated_bytes(of_gguf(), choose, choose.choice([64, 900]))
                             if choose else of_gguf(), False),
}  # fmt: skip


SECONDS = 30  # of each kind; as a program a file takes another number


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_soon_and_in_one_line(kind):
    make, reader = KINDS[kind]()
    refused, read = fuzz(make, reader, SECONDS)
    assert refused
    assert read or kind == "torch"


# Cases that failed once, by the number of their seed.
FOUND = [("adapter safetensors", "0-0"), ("adapter torch", "2711-14194")]


@pytest.mark.parametrize(("kind", "seed"), FOUND)
@pytest.mark.filterwarnings("ignore")
def test_what_fuzzing_found(kind, seed):
    from fuzzing import checked

    make, reader = KINDS[kind]()
    checked(reader, make(Random(seed)))


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    maker, reads = KINDS[sys.argv[1]]()
    fuzz(maker, reads, float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
