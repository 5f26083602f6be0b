"""A model's shape: from config files in diffusers' and Wan's own keys, and from the shapes of its tensors."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.config import TransformerConfig
from engine.model.text import MAX_ROWS
from engine.model.tiny_vae import TinyVAEConfig
from engine.model.umt5 import UMT5Config
from engine.model.vae import VAEConfig

Shapes = Mapping[str, tuple[int, ...]]

HEAD_DIM = 128  # of every Wan transformer; tensors do not tell it
DEPTHS = {1536: 30, 5120: 40}  # blocks of Wan2.1's transformers by width: a file that lacks the last ones looks whole
# Wan's own config.json -> diffusers'.
_WAN_KEYS = {
    "num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels", "text_dim": "text_dim",
    "freq_dim": "freq_dim", "ffn_dim": "ffn_dim", "num_layers": "num_layers", "eps": "eps",
    "cross_attn_norm": "cross_attn_norm", "patch_size": "patch_size",
}  # fmt: skip
_WAN_IGNORED = {"dim", "model_type", "text_len", "window_size", "qk_norm",
                "local_attn_size", "sink_size", "num_frame_per_block"}  # fmt: skip


def is_wan_config(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json has the keys of Wan's own code."""
    return "num_heads" in raw or raw.get("_class_name") in ("WanModel", "CausalWanModel")


def transformer_config(raw: Mapping[str, Any], label: object) -> TransformerConfig:
    """From the contents of a config.json in diffusers' or Wan's own keys. ValueError for another kind of model."""
    if not is_wan_config(raw):
        expect_class(raw, ("WanTransformer3DModel",), label)
        return TransformerConfig.from_dict(dict(raw))
    kind = raw.get("model_type", "t2v")
    if kind != "t2v":
        raise ValueError(f"{label}: got model_type {kind!r}, expected 't2v'")
    if raw.get("qk_norm", True) is not True:
        raise ValueError(f"{label}: got qk_norm {raw['qk_norm']!r}, expected true")
    values = {key: value for key, value in raw.items() if not key.startswith("_")}
    if unknown := sorted(set(values) - set(_WAN_KEYS) - _WAN_IGNORED):
        raise ValueError(f"{label}: got unknown key {', '.join(unknown)}, expected those of a Wan text-to-video model")
    if missing := [key for key in ("dim", "num_heads") if not isinstance(values.get(key), int)]:
        raise ValueError(f"{label}: got no {missing[0]}, expected a whole number")
    dim, heads = values["dim"], values["num_heads"]
    if heads < 1 or dim % heads:
        raise ValueError(f"{label}: got dim {dim} with {heads} heads, expected a multiple of them")
    named = {ours: values[theirs] for theirs, ours in _WAN_KEYS.items() if theirs in values}
    return TransformerConfig.from_dict({**named, "attention_head_dim": dim // heads})


def text_rows_of(raw: Mapping[str, Any], label: object) -> int | None:
    """Rows of a prompt that a transformer was trained with, if its config.json tells. ValueError for no such number."""
    rows = raw.get("text_len")
    if rows is not None and (type(rows) is not int or not 1 <= rows <= MAX_ROWS):
        raise ValueError(f"{label}: got text_len {rows!r}, expected a whole number from 1 to {MAX_ROWS}")
    return rows


def expect_class(raw: Mapping[str, Any], classes: tuple[str, ...], label: object) -> None:
    """ValueError if a config names another class."""
    name = raw.get("_class_name", classes[0])
    if name not in classes:
        raise ValueError(f"{label}: got _class_name {name!r}, expected {' or '.join(map(repr, classes))}")


def transformer_of(shapes: Shapes, hint: TransformerConfig | None, label: object) -> TransformerConfig:
    """The shape of a whole transformer: `hint` where its width is the tensors', else what the tensors tell.

    ValueError for a transformer that lacks the tensors which tell its shape, and one whose heads or depth are unknown.
    """
    patch = _shape(shapes, "patch_embedding.weight", 5, label)
    dim, volume = patch[0], patch[2] * patch[3] * patch[4]
    if hint is not None and hint.dim == dim:
        return hint
    layers = _count(shapes, r"blocks\.(\d+)\.")
    if dim % HEAD_DIM:
        raise ValueError(f"{label}: got a transformer of width {dim}, expected a multiple of {HEAD_DIM}, "
                         "or a config.json that tells its heads")  # fmt: skip
    if layers != DEPTHS.get(dim, layers):
        raise ValueError(f"{label}: got {layers} blocks of width {dim}, expected {DEPTHS[dim]}")
    return TransformerConfig(
        num_attention_heads=dim // HEAD_DIM, attention_head_dim=HEAD_DIM,
        in_channels=patch[1], patch_size=(patch[2], patch[3], patch[4]),
        out_channels=_shape(shapes, "proj_out.weight", 2, label)[0] // volume,
        text_dim=_shape(shapes, "condition_embedder.text_embedder.linear_1.weight", 2, label)[1],
        freq_dim=_shape(shapes, "condition_embedder.time_embedder.linear_1.weight", 2, label)[1],
        ffn_dim=_shape(shapes, "blocks.0.ffn.net.0.proj.weight", 2, label)[0], num_layers=layers,
        cross_attn_norm="blocks.0.norm2.weight" in shapes,
    )  # fmt: skip


def vae_of(shapes: Shapes, label: object) -> VAEConfig:
    """The shape of a VAE by its tensors; Wan2.1's in what they do not tell. ValueError for another kind of VAE."""
    base = _shape(shapes, "encoder.conv_in.weight", 5, label)[0]
    conv = _shape(shapes, "decoder.conv_in.weight", 5, label)
    standard = VAEConfig()
    if conv[1] != standard.z_dim:
        raise ValueError(f"{label}: got a VAE of {conv[1]} latent channels, expected {standard.z_dim} (Wan2.1's)")
    decoder = conv[0] // standard.dim_mult[-1]
    return replace(standard, base_dim=base, decoder_base_dim=None if decoder == base else decoder)


def tiny_vae_of(shapes: Shapes, label: object, vae: VAEConfig | None = None) -> TinyVAEConfig:
    """The shape of a tiny VAE's decoder by its tensors. ValueError for another layout than TAEHV's.

    Older files double the frames in more stages than the VAE whose latents they decode (default: Wan2.1's). Their
    first stages then make one image each, as in the public loaders; `last_rows` tells which weights are kept.
    """
    vae = vae or VAEConfig()
    first = _shape(shapes, "decoder.1.weight", 4, label)
    widths, times, number, blocks = [first[0]], [], 3, set()
    while f"decoder.{number}.conv.0.weight" in shapes:
        start = number
        while f"decoder.{number}.conv.0.weight" in shapes:
            number += 1
        blocks.add(number - start)
        grown = _shape(shapes, f"decoder.{number + 1}.conv.weight", 4, label)  # behind the upsampling, without weights
        widths.append(_shape(shapes, f"decoder.{number + 2}.weight", 4, label)[0])
        times.append(grown[0] == 2 * grown[1])
        number += 3
    pixels = _shape(shapes, f"decoder.{number + 1}.weight", 4, label)[0]
    patch = math.isqrt(pixels // 3)
    if len(blocks) != 1 or pixels != 3 * patch**2:
        got = f"{sorted(blocks) or 'no'} blocks a stage and {pixels} channels of pixels"
        raise ValueError(f"{label}: got a tiny VAE of {got}, expected TAEHV's layout")
    while first[1] == vae.z_dim and 2 ** sum(times) > vae.scale_factor_temporal:
        times[times.index(True)] = False
    every = (True,) * len(times)  # the tensors do not tell it
    return TinyVAEConfig(first[1], tuple(widths), every, tuple(times), blocks.pop(), patch=patch, encoder_width=None)


def last_rows(shapes: Shapes, config: TinyVAEConfig) -> dict[str, int]:
    """The weights that double frames where the shape does not, and how many of their rows, the last ones, it needs."""
    found, number = {}, 3
    for width, doubles in zip(config.widths, config.upsample_time, strict=False):
        number += config.blocks
        name = f"decoder.{number + 1}.conv.weight"
        if not doubles and shapes.get(name, ())[:1] == (2 * width,):
            found[name] = width
        number += 3
    return found


def umt5_of(shapes: Shapes, label: object) -> UMT5Config:
    """The shape of a UMT5 encoder by its tensors; UMT5-xxl's in what they do not tell."""
    vocab, width = _shape(shapes, "embed_tokens.weight", 2, label)
    attention = "block.0.layer.0.SelfAttention."
    buckets, heads = _shape(shapes, f"{attention}relative_attention_bias.weight", 2, label)
    inner = _shape(shapes, f"{attention}q.weight", 2, label)[0]
    if inner % heads:
        raise ValueError(f"{label}: got {inner} rows of q for {heads} heads, expected a multiple of them")
    return UMT5Config(
        vocab_size=vocab, d_model=width, d_kv=inner // heads, num_heads=heads,
        d_ff=_shape(shapes, "block.0.layer.1.DenseReluDense.wi_0.weight", 2, label)[0],
        num_layers=_count(shapes, r"block\.(\d+)\."), relative_attention_num_buckets=buckets,
    )  # fmt: skip


def _shape(shapes: Shapes, name: str, dimensions: int, label: object) -> tuple[int, ...]:
    found = shapes.get(name)
    if found is None:
        raise ValueError(f"{label}: got {len(shapes)} tensors without {name}, expected it")
    if len(found) != dimensions:
        raise ValueError(f"{label}: got {name} {list(found)}, expected {dimensions} dimensions")
    return found


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest block number, so that a missing block is missed by name later."""
    return 1 + max(int(match[1]) for name in shapes if (match := re.match(pattern, name)))
