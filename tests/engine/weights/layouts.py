"""Tiny random models in the names and layouts of public files, whose names are written down here a second time."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from tiny import randomize, tokenizer
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

State = dict[str, Tensor]

# A head is 128 wide in every public Wan transformer; everything else is small.
TRANSFORMER = {
    "patch_size": (1, 2, 2), "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 24, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2,
}  # fmt: skip
TEXT = {
    "vocab_size": 32, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VAE_BASE = 4
HEIGHT, WIDTH = 32, 48  # pixels: latents of 4 x 6


def _linear(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def wan_transformer_names(layers: int = 2) -> dict[str, str]:
    """Wan's name -> diffusers' name of every tensor of a text-to-video transformer."""
    pairs = {
        "patch_embedding": "patch_embedding", "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    }  # fmt: skip
    for i in range(layers):
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                pairs[f"blocks.{i}.{theirs}.{a}"] = f"blocks.{i}.{ours}.{b}"
        pairs[f"blocks.{i}.norm3"] = f"blocks.{i}.norm2"
        pairs[f"blocks.{i}.ffn.0"] = f"blocks.{i}.ffn.net.0.proj"
        pairs[f"blocks.{i}.ffn.2"] = f"blocks.{i}.ffn.net.2"
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}
    names["head.modulation"] = "scale_shift_table"
    for i in range(layers):
        names[f"blocks.{i}.modulation"] = f"blocks.{i}.scale_shift_table"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for norm in ("norm_q", "norm_k"):
                names[f"blocks.{i}.{theirs}.{norm}.weight"] = f"blocks.{i}.{ours}.{norm}.weight"
    return names


def wan_vae_names() -> list[str]:
    """The 194 names of Wan2.1_VAE.pth."""
    residual = ["residual.0.gamma", *_linear("residual.2"), "residual.3.gamma", *_linear("residual.6")]
    short, flat, timed = _linear("shortcut"), _linear("resample.1"), _linear("resample.1", "time_conv")
    names = _linear("conv1", "conv2")
    for side in ("encoder", "decoder"):
        names += [*_linear(f"{side}.conv1", f"{side}.head.2"), f"{side}.head.0.gamma"]
        names += [f"{side}.middle.{i}.{name}" for i in (0, 2) for name in residual]
        names += [f"{side}.middle.1.{name}" for name in ("norm.gamma", *_linear("to_qkv", "proj"))]
    resampled = {2: flat, 5: timed, 8: timed}
    for i in range(11):
        inner = resampled.get(i) or residual + (short if i in (3, 6) else [])
        names += [f"encoder.downsamples.{i}.{name}" for name in inner]
    resampled = {3: timed, 7: timed, 11: flat}
    for i in range(15):
        inner = resampled.get(i) or residual + (short if i == 4 else [])
        names += [f"decoder.upsamples.{i}.{name}" for name in inner]
    return names


def wan_text_names(layers: int = 2) -> dict[str, str]:
    """Wan's name -> transformers' name of every tensor of models_t5_umt5-xxl-enc-bf16.pth."""
    names = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    for i in range(layers):
        here, there = f"blocks.{i}.", f"encoder.block.{i}."
        for x in "qkvo":
            names[f"{here}attn.{x}.weight"] = f"{there}layer.0.SelfAttention.{x}.weight"
        names[f"{here}pos_embedding.embedding.weight"] = f"{there}layer.0.SelfAttention.relative_attention_bias.weight"
        names[f"{here}norm1.weight"] = f"{there}layer.0.layer_norm.weight"
        names[f"{here}norm2.weight"] = f"{there}layer.1.layer_norm.weight"
        names[f"{here}ffn.gate.0.weight"] = f"{there}layer.1.DenseReluDense.wi_0.weight"
        names[f"{here}ffn.fc1.weight"] = f"{there}layer.1.DenseReluDense.wi_1.weight"
        names[f"{here}ffn.fc2.weight"] = f"{there}layer.1.DenseReluDense.wo.weight"
    return names


def llama_text_names(layers: int = 2) -> dict[str, str]:
    """llama.cpp's name -> transformers' name of every tensor of a UMT5 encoder's GGUF."""
    names = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
    for i in range(layers):
        here, there = f"enc.blk.{i}.", f"encoder.block.{i}."
        for x in "qkvo":
            names[f"{here}attn_{x}.weight"] = f"{there}layer.0.SelfAttention.{x}.weight"
        for a, b in (
            ("attn_rel_b", "layer.0.SelfAttention.relative_attention_bias"), ("attn_norm", "layer.0.layer_norm"),
            ("ffn_norm", "layer.1.layer_norm"), ("ffn_gate", "layer.1.DenseReluDense.wi_0"),
            ("ffn_up", "layer.1.DenseReluDense.wi_1"), ("ffn_down", "layer.1.DenseReluDense.wo"),
        ):  # fmt: skip
            names[f"{here}{a}.weight"] = f"{there}{b}.weight"
    return names


class Published:
    """One tiny model, as diffusers' and transformers' modules."""

    def __init__(self, seed: int = 0, **changes: int) -> None:
        self.transformer = randomize(WanTransformer3DModel(**{**TRANSFORMER, **changes}), seed)
        self.vae = randomize(AutoencoderKLWan(base_dim=VAE_BASE), seed + 1)
        self.text = randomize(UMT5EncoderModel(UMT5Config(**TEXT)), seed + 2)

    def state(self, part: str) -> State:
        """The part's tensors under diffusers' or transformers' names, contiguous and apart from each other."""
        tensors = getattr(self, part).state_dict()
        tensors.pop("encoder.embed_tokens.weight", None)  # the same tensor as `shared`
        return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}

    def wan(self, part: str) -> State:
        """The part's tensors under Wan's own names."""
        if part == "vae":
            from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

            names = convert_wan_vae_to_diffusers({name: name for name in wan_vae_names()})
            names = {theirs: ours for ours, theirs in names.items()}
        else:
            names = wan_transformer_names() if part == "transformer" else wan_text_names()
        state = self.state(part)
        assert sorted(names.values()) == sorted(state), "the lists of names and the modules differ"
        return {theirs: state[ours] for theirs, ours in names.items()}

    def write_diffusers(self, folder: Path) -> Path:
        """A pipeline directory in diffusers' layout."""
        self.transformer.save_pretrained(folder / "transformer")
        self.vae.save_pretrained(folder / "vae")
        self.text.save_pretrained(folder / "text_encoder")
        tokenizer().save_pretrained(folder / "tokenizer")
        index = {
            "_class_name": "WanPipeline", "_diffusers_version": "0.35.0", "boundary_ratio": None,
            "expand_timesteps": False, "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None],
            "vae": ["diffusers", "AutoencoderKLWan"],
        }  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    def write_wan(self, folder: Path) -> Path:
        """Wan's own folder, as Wan2.1-T2V-1.3B is published."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.wan_config()))
        save_file(self.wan("transformer"), folder / "diffusion_pytorch_model.safetensors")
        torch.save(self.wan("vae"), folder / "Wan2.1_VAE.pth")
        torch.save(self.wan("text"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
        tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
        (folder / "README.md").write_text("# Wan")
        return folder

    def wan_config(self) -> dict[str, object]:
        config = self.transformer.config
        return {
            "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": config.num_attention_heads * 128,
            "eps": 1e-06, "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "in_dim": config.in_channels,
            "model_type": "t2v", "num_heads": config.num_attention_heads, "num_layers": config.num_layers,
            "out_dim": config.out_channels, "text_len": tokenizer().model_max_length, "text_dim": config.text_dim,
        }  # fmt: skip
