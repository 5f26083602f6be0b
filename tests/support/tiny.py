"""Small random models, and diffusers' transformer as a reference for any mask, positions and timesteps."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from engine.config import Preset, TransformerConfig
from engine.generators import family_of
from engine.loader import assemble
from engine.model.transformer import WanTransformer
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline

CPU = torch.device("cpu")
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}
VAE = {
    "base_dim": 8,
    "z_dim": 8,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.1 * i - 0.4 for i in range(8)],
    "latents_std": [0.8 + 0.2 * i for i in range(8)],
    "scale_factor_spatial": 4,
}
HEIGHT, WIDTH = 16, 24  # pixels: latents of 4 x 6, 2 x 3 tokens per latent frame
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right", "on", "gray"]


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Set random weights that keep activations of order 1. No gate, norm or bias has a neutral value."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        if "norm" in name and name.endswith(("weight", "gamma")):
            value = 1 + 0.2 * noise
        elif name.endswith("scale_shift_table"):
            value = 0.5 * noise
        elif p.ndim > 1:
            value = noise / p[0].numel() ** 0.5
        else:
            value = 0.1 * noise
        p.data = value.to(p.dtype)
    return module.eval().requires_grad_(False)


def transformer(seed: int = 0, conditioned: bool = False, **changes: Any) -> WanTransformer:
    """Our transformer with random weights; with W_c if conditioned."""
    model = WanTransformer(TransformerConfig(**{**TRANSFORMER, **changes}), conditioned)
    randomize(model, seed)
    return model


def reference_of(model: WanTransformer) -> WanTransformer3DModel:
    """diffusers' transformer with the same weights, without W_c."""
    config = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__}
    reference = WanTransformer3DModel(**config)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("condition_proj")}
    reference.load_state_dict(state)
    return reference.eval().requires_grad_(False)


class _Masked(WanAttnProcessor):
    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


class _Positions(nn.Module):
    """diffusers' rotary tables for frames at `positions`."""

    def __init__(self, config: TransformerConfig, positions: list[int]) -> None:
        super().__init__()
        self.inner = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, max(1024, max(positions) + 1))
        self.patch, self.positions = config.patch_size, positions

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        long = latent.new_zeros(1, 1, max(self.positions) + 1, *latent.shape[3:])
        tokens = (latent.shape[3] // self.patch[1]) * (latent.shape[4] // self.patch[2])
        tables = []
        for table in self.inner(long):
            frames = table.unflatten(1, (-1, tokens))
            tables.append(frames[:, self.positions].flatten(1, 2))
        return tables[0], tables[1]


def frame_mask(sees: list[Any], tokens: int) -> Tensor:
    """sees [..., frames, frames] -> bool [..., frames * tokens, frames * tokens]."""
    return torch.tensor(sees).repeat_interleave(tokens, -2).repeat_interleave(tokens, -1)


@torch.no_grad()
def dense(
    model: WanTransformer, latent: Tensor, t: list[float], text: Tensor, positions: list[int],
    sees: list[Any] | None = None, condition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flow [B, C, F, h, w] and last hidden state [B, F * n, dim] of diffusers' transformer on all frames at once.

    latent [B, C, F, h, w]; t and positions, one per frame; sees[query frame][key frame] of all heads, or one such for
    every head of every layer, sees[layer][head]; condition [B, F * n, dim], the
    product of W_c.
    """
    reference = reference_of(model)
    tokens = latent.shape[3] // model.config.patch_size[1] * (latent.shape[4] // model.config.patch_size[2])
    reference.rope = _Positions(model.config, positions)
    hidden = []
    reference.blocks[-1].register_forward_hook(lambda module, given, out: hidden.append(out))
    if condition is not None:
        reference.patch_embedding.register_forward_hook(
            lambda module, given, out: out + condition.transpose(1, 2).unflatten(2, out.shape[2:])
        )
    if sees is not None:
        mask = frame_mask(sees, tokens)
        for layer, block in enumerate(reference.blocks):
            block.attn1.set_processor(_Masked(mask if mask.ndim == 2 else mask[layer][None]))
    timestep = torch.tensor(t).repeat_interleave(tokens)[None].expand(len(latent), -1)
    flow = reference(latent, timestep, text, return_dict=False)[0]
    return flow, hidden[0]


def text_of(batch: int = 1, seed: int = 0, rows: int = 16, real: int = 7, dim: int = 24) -> Tensor:
    """A text embedding [batch, rows, dim]; rows after `real` are zero, as for a short prompt."""
    text = torch.zeros(batch, rows, dim)
    text[:, :real] = torch.randn(batch, real, dim, generator=torch.Generator().manual_seed(seed))
    return text


def latents_of(batch: int, frames: int, seed: int = 0, height: int = 4, width: int = 6) -> Tensor:
    return torch.randn(batch, 8, frames, height, width, generator=torch.Generator().manual_seed(seed))


def models_of(preset: Preset, seed: int = 0) -> dict[str, WanTransformer]:
    """One transformer per role. Their weights differ, so that a test notices swapped roles."""
    family = family_of(preset)
    roles = family.roles()
    found = {role: transformer(seed + len(roles) - 1 + i, family.conditioned(role)) for i, role in enumerate(roles)}
    for model in found.values():
        model.order_heads(preset.local_heads)
    return found


def pipeline_of(preset: Preset, models: dict[str, WanTransformer] | None = None) -> Pipeline:
    """A pipeline without VAE and text encoder: it takes embeddings and returns latents."""
    models = models or models_of(preset)
    config = next(iter(models.values())).config
    return assemble(TorchStages(models, None, None), config, preset, torch.float32, CPU, height=32, width=48)


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def write_pipeline(folder: Path) -> Path:
    """Write a pipeline directory in diffusers' layout. All weights are random; it streams in milliseconds."""
    randomize(WanTransformer3DModel(**TRANSFORMER), 0).save_pretrained(folder / "transformer")
    randomize(AutoencoderKLWan(**VAE), 1).save_pretrained(folder / "vae")
    words = tokenizer()
    words.save_pretrained(folder / "tokenizer")
    config = UMT5Config(
        vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(2)
    encoder = UMT5EncoderModel(config).eval()
    encoder.save_pretrained(folder / "text_encoder")
    settings = {"height": HEIGHT, "width": WIDTH, "fps": 8, "preset": "greedy", "overrides": {}}
    (folder / "engine.json").write_text(json.dumps(settings))
    return folder
