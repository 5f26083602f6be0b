"""A pipeline directory in Wan2.1's diffusers layout with random weights, for measurements and tests at full size.

The text encoder is a small one of Wan's width (4096). The transformer sees only its output, and the 5.7 billion
parameters of the real one are not measured here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.utils import logging

from engine.config import TransformerConfig
from engine.model.transformer import WanTransformer
from engine.model.vae import VAE, VAEConfig

SHARD_BYTES = 1 << 30


def write_random_pipeline(
    folder: Path, config: TransformerConfig, vae: VAEConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> int:
    """Write transformer/ (sharded), vae/, text_encoder/, tokenizer/; returns the transformer's bytes on disk."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        transformer, autoencoder = WanTransformer(config), VAE(vae)
    written = _write(folder / "transformer", "WanTransformer3DModel", asdict(config), transformer.state_dict(), dtype)
    _write(folder / "vae", "AutoencoderKLWan", asdict(vae), autoencoder.state_dict(), dtype)
    write_text_encoder(folder, config.text_dim, dtype)
    return written


def write_text_encoder(folder: Path, width: int, dtype: torch.dtype) -> None:
    """tokenizer/ and text_encoder/: a small stand-in of Wan's, of the same width."""
    logging.disable_progress_bar()
    words = ["<pad>", "</s>", "<unk>", "a", "of"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder / "tokenizer")
    encoder = UMT5Config(
        vocab_size=len(words), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    text_encoder = UMT5EncoderModel(encoder)
    nn.Module.to(text_encoder, dtype)
    text_encoder.save_pretrained(folder / "text_encoder")


class RandomSource:
    """Random tensors with a module's names and shapes; the loader fills the module with them."""

    def __init__(self, module: nn.Module, label: str, seed: int = 0) -> None:
        self.label, self._seed = label, seed
        self.files: list[Path] = []
        self.lora: Path | None = None
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self) -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(self._seed)
        for name, shape in self._shapes.items():
            yield name, _random(name, torch.Size(shape))

    def bytes_at(self, dtype: torch.dtype) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes.values()) * dtype.itemsize


def _write(folder: Path, kind: str, config: dict[str, Any], shapes: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Write one component: its config.json, and its tensors shard by shard, so that memory holds one shard."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": kind} | config, indent=2))
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += shape.numel() * dtype.itemsize
    stem = "diffusion_pytorch_model"
    where: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _random(name, shapes[name].shape).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _random(name: str, shape: torch.Size) -> Tensor:
    """Gains near one, small biases, and other weights scaled so that activations keep their size."""
    if len(shape) > 1 and "scale_shift_table" not in name and "gamma" not in name:
        return torch.randn(shape) / (shape[1:].numel() ** 0.5)
    gain = 1.0 if "norm" in name and name.endswith(("weight", "gamma")) else 0.0
    return gain + 0.02 * torch.randn(shape)
