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

from engine.config import TransformerConfig
from engine.model.transformer import WanTransformer
from engine.model.umt5 import UMT5Config, UMT5Encoder
from engine.model.vae import VAE, VAEConfig

SHARD_BYTES = 1 << 30
WORDS = ["<pad>", "</s>", "<unk>", "a", "of"]  # of the stand-in's tokenizer


def write_random_pipeline(
    folder: Path, config: TransformerConfig, vae: VAEConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> int:
    """Write transformer/ (sharded), vae/, text_encoder/, tokenizer/; returns the transformer's bytes on disk."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        transformer, autoencoder = WanTransformer(config), VAE(vae)
    settings = {"_class_name": "WanTransformer3DModel"} | asdict(config)
    written = _write(folder / "transformer", settings, transformer.state_dict(), dtype)
    _write(folder / "vae", {"_class_name": "AutoencoderKLWan"} | asdict(vae), autoencoder.state_dict(), dtype)
    encoder = small_encoder(config.text_dim)
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors["shared.weight"] = tensors.pop("encoder.embed_tokens.weight")
    settings = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5"} | asdict(encoder.config)
    _write(folder / "text_encoder", settings, tensors, dtype, "model")
    write_tokenizer(folder / "tokenizer")
    return written


def small_encoder(width: int) -> UMT5Encoder:
    """A small stand-in of Wan's text encoder, of the same width; on the meta device."""
    with torch.device("meta"):
        return UMT5Encoder(UMT5Config(len(WORDS), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=4))


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and its settings: a few whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(WORDS[:3])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "pad_token": "<pad>",
                "eos_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class RandomSource:
    """Random tensors with a module's names and shapes, drawn on `device`; the loader fills the module with them.

    attention_gain scales self-attention's queries. At 1 random weights attend to all rows almost alike, so a wrong key
    hardly shows; at 4 attention decides.
    """

    def __init__(
        self,
        module: nn.Module,
        label: str,
        seed: int = 0,
        device: torch.device | str = "cpu",
        attention_gain: float = 1,
    ) -> None:
        self.label, self._seed, self._device, self._gain = label, seed, device, attention_gain
        self.files: list[Path] = []
        self.lora: Path | None = None
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self) -> Iterator[tuple[str, Tensor]]:
        torch.manual_seed(self._seed)
        for name, shape in self._shapes.items():
            tensor = _random(name, torch.Size(shape), self._device)
            yield name, self._gain * tensor if name.endswith("attn1.norm_q.weight") else tensor


def _write(
    folder: Path, config: dict[str, Any], shapes: Mapping[str, Tensor], dtype: torch.dtype,
    stem: str = "diffusion_pytorch_model",
) -> int:  # fmt: skip
    """Write one component: its config.json, and its tensors shard by shard, so that memory holds one shard."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += shape.numel() * dtype.itemsize
    where: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _random(name, shapes[name].shape).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _random(name: str, shape: torch.Size, device: torch.device | str = "cpu") -> Tensor:
    """Gains near one, small biases, and other weights scaled so that activations keep their size."""
    values = torch.randn(shape, device=device)
    if len(shape) > 1 and "scale_shift_table" not in name and "gamma" not in name:
        return values / (shape[1:].numel() ** 0.5)
    gain = 1.0 if "norm" in name and name.endswith(("weight", "gamma")) else 0.0
    return gain + 0.02 * values
