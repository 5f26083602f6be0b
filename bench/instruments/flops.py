"""FLOPs and bytes of every pass and of the VAE, counted from shapes: the engine's own loop runs on meta tensors.

A multiplication and an addition are two FLOPs. Matrix products, attention products and convolutions are counted; norms,
activations, rotations and softmax are not (a few percent of the time, less of the arithmetic). Bytes are the least that
must move: weights once per call, cached keys and values that are read or written, inputs and outputs. Both come from
the same shapes here. torch.utils.flop_counter, which knows FLOPs only, checks the FLOPs in a test.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.instruments.meter import DENOISING, context_of, joined_of
from engine.config import Preset, TransformerConfig
from engine.generators import family_of
from engine.model.cache import RingCache
from engine.model.tiny_vae import TinyVAE, TinyVAEConfig
from engine.model.vae import VAE, VAEConfig
from engine.model.vae_layers import AttentionBlock, CausalConv3d, Past, Sum
from engine.runtime.passes import Capabilities, Pass, Stages
from engine.stream import Pipeline, PythonStream

META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes. `attention` is the share of `flops` in self-attention's two products."""

    flops: float = 0.0
    bytes: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.attention + other.attention)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times, self.attention * times)


def total(costs: dict[str, Cost]) -> Cost:
    return sum(costs.values(), Cost())


def weights_per_token(config: TransformerConfig, head: bool, c_f: bool, layers: int) -> int:
    """Weights that every token of a pass meets: patch embedding, the `layers` blocks that run, W_c, proj_out."""
    d, patch = config.dim, config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    linear = 6 * d * d + 2 * d * config.ffn_dim  # self q k v o, cross q o, feed-forward: weights per layer
    embed, out = patch * config.in_channels * d, patch * config.out_channels * d if head else 0
    return layers * linear + embed + out + (d * d if c_f else 0)


def time_weights(config: TransformerConfig) -> int:
    """Weights that every time embedding meets."""
    return config.freq_dim * config.dim + 7 * config.dim * config.dim


def transformer_cost(
    config: TransformerConfig, frames: int, tokens: int, keys: float, rows: int, itemsize: int, *,
    batch: int = 1, timesteps: int | None = None, head: bool = True, c_f: bool = False, cached: bool = True,
    layers: int | None = None,
) -> Cost:  # fmt: skip
    """One pass over `frames` frames of `tokens` tokens. Self-attention sees `keys` keys; the text has `rows` rows.

    timesteps  time embeddings that are computed (one per frame by default; a bidirectional model computes one)
    head       whether norm_out and proj_out run (a pass that only writes caches ends before them)
    c_f        whether the temporal feature is an input, which W_c projects
    cached     whether keys and values go through a cache: written once, read once per layer
    layers     blocks that run (all by default)
    """
    n, d, layers = frames * tokens, config.dim, config.num_layers if layers is None else layers
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    per_token, time = weights_per_token(config, head, c_f, layers), time_weights(config)
    attention = 4.0 * layers * n * keys * d
    when = frames if timesteps is None else timesteps
    flops = 2.0 * n * per_token + 2.0 * when * time + attention + 4.0 * layers * n * rows * d
    weights = per_token + time
    moved = 2 * layers * d * (keys * batch + n * batch if cached else 0) + 2 * layers * rows * d * batch
    latents = n * patch * (config.in_channels + (config.out_channels if head else 0)) + (0 if head else n * d)
    return Cost(flops * batch, itemsize * (weights + moved + latents * batch), attention * batch)


def text_cost(config: TransformerConfig, rows: int, models: int, itemsize: int, encoder: nn.Module | None) -> Cost:
    """A prompt: the encoder, then embeddings and cross-attention keys and values of `models` transformers."""
    d = config.dim
    weights = config.text_dim * d + d * d + 2 * config.num_layers * d * d
    cost = Cost(2.0 * rows * weights, weights * itemsize) * models
    if encoder is not None:
        linear = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, nn.Linear))
        shape = cast(Any, encoder).config
        products = 4.0 * shape.num_layers * rows * rows * shape.num_heads * shape.d_kv
        cost += Cost(2.0 * rows * linear + products, linear * itemsize, products)
    return cost


def vae_cost(config: VAEConfig | TinyVAEConfig, height: int, width: int, itemsize: int, steady: bool = True) -> Cost:
    """One latent [height, width] through the decoder. Hooks read the shapes while the module runs on meta tensors."""
    with META:
        vae = VAE(config) if isinstance(config, VAEConfig) else TinyVAE(config)
    counted: list[Cost] = []

    def convolution(module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> None:
        conv = cast(nn.Conv3d, module)
        taps = conv.weight[0, 0].numel()
        if isinstance(module, CausalConv3d) and cast(Past, inputs[1]).cache is None:
            taps //= conv.weight.shape[2]  # zeros stand before the first frame: only the last tap runs
        moved = inputs[0].numel() + result.numel() + conv.weight.numel()
        counted.append(Cost(2.0 * result.numel() * conv.weight.shape[1] * taps, moved * itemsize))

    def attention(module: nn.Module, inputs: tuple[Sum, Past], result: Sum) -> None:
        images, channels, high, wide = inputs[0].h.shape
        products = 4.0 * images * (high * wide) ** 2 * channels
        counted.append(Cost(products, 0.0, products))

    latent = torch.empty(1, config.z_dim, 1, height, width, device=META)
    with torch.inference_mode():
        cache = vae.first(latent)[1] if steady else None
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.register_forward_hook(convolution)
            elif isinstance(module, AttentionBlock):
                module.register_forward_hook(attention)
        if cache is None:
            vae.first(latent)
        else:
            vae.steady(latent, cache)
    return sum(counted, Cost())


class CountingStages:
    """A backend that computes nothing and records the cost of each call."""

    name = "counting"
    make_cache = RingCache

    def __init__(self, config: TransformerConfig, itemsize: int, join_context: bool) -> None:
        self.config, self.itemsize = config, itemsize
        self.capabilities = Capabilities(joins_context=join_context)
        self.calls: list[tuple[str, Cost]] = []

    def modules(self) -> dict[str, nn.Module]:
        return {}

    def named_weights(self) -> list[tuple[str, Tensor]]:
        return []

    def prepare_text(self, text_emb: Tensor) -> int:
        return text_emb.shape[1]

    def run(self, step: Pass, cache: RingCache, text_kv: int) -> Tensor:
        latent, kind, name = step.latent, step.kind, step.kind.graph
        c_f = step.c_f is not None
        cost = self._cost(step, cache, text_kv, not kind.hidden, c_f)
        if step.context is not None:  # one head, W_c on all tokens, and weights that move once
            name, context = joined_of(name), self._cost(step.context, cache, text_kv, False, c_f)
            again = weights_per_token(self.config, False, c_f, self.config.num_layers) + time_weights(self.config)
            cost += replace(context, bytes=context.bytes - self.itemsize * again)
        self.calls.append((name, cost))
        width = self.config.dim
        return latent.new_empty(latent.shape[0], len(step.cos), width) if kind.hidden else latent

    def _cost(self, step: Pass, cache: RingCache, rows: int, head: bool, c_f: bool) -> Cost:
        reuse, batch = step.reuse, step.latent.shape[0]
        outer = reuse.first + reuse.last if reuse is not None and step.short else None
        cost = transformer_cost(
            self.config, step.frames, cache.tokens, self._keys(step, cache), rows, self.itemsize,
            batch=batch, head=head, c_f=c_f, layers=outer,
        )  # fmt: skip
        residual = 0 if reuse is None else batch * len(step.cos) * self.config.dim  # written, or read
        return cost + Cost(bytes=self.itemsize * residual)

    def _keys(self, step: Pass, cache: RingCache) -> float:
        """Keys that a query sees: the mean over all heads of all layers."""
        slots = zip(cache.rings, (step.valid, step.local_valid), strict=False)
        seen = sum(int(valid) * sum(ring.heads) for ring, valid in slots if valid is not None)
        return seen * cache.tokens / (self.config.num_layers * self.config.num_attention_heads)


class EmptyNoise:
    """Draws without data."""

    def draw(self, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(count, *shape, device=META)


def steady_index(preset: Preset) -> int:
    """The first chunk at the steady cost: caches are full, step lists have reached their last entry."""
    return max(family_of(preset).steady(preset), len(preset.steps) - 1, 2) + 1


def stream_costs(pipeline: Pipeline, chunks: int, rows: int) -> list[dict[str, Cost]]:
    """The transformers' cost of each of the first `chunks` chunks by pass, the commit before the chunk included."""
    join_context = pipeline.stages.capabilities.joins_context
    stages = CountingStages(pipeline.config, pipeline.dtype.itemsize, join_context)
    counted = replace(pipeline, stages=cast(Stages, stages), device=META, tokenizer=None)
    text = torch.empty(1, rows, pipeline.config.text_dim, device=META)
    stream, found = PythonStream(counted, text, EmptyNoise(), None, None), []
    for index in range(chunks):
        stages.calls.clear()
        stream.next_latent()
        costs: dict[str, Cost] = defaultdict(Cost)
        for number, (name, cost) in enumerate(stages.calls):
            # A denoising pass that comes first is the cache pass for the chunk before.
            cache_pass = name in DENOISING and number == 0 and index > 0 and pipeline.preset.commit == "clean"
            costs[context_of(name) if cache_pass else name] += cost
        found.append(dict(costs))
    return found


def chunk_cost(
    pipeline: Pipeline, rows: int, vae: VAEConfig | TinyVAEConfig | None = None, index: int | None = None
) -> dict[str, Cost]:
    """Cost of chunk `index` (a steady one by default) by part: its passes, and with `vae` its decoding."""
    index = steady_index(pipeline.preset) if index is None else index
    costs = stream_costs(pipeline, index + 1, rows)[-1]
    if vae is not None:
        height, width = pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial
        size, frames = pipeline.dtype.itemsize, pipeline.preset.chunk_frames(index)
        steady = vae_cost(vae, height, width, size) * (frames - (index == 0))
        costs["vae"] = steady + (vae_cost(vae, height, width, size, steady=False) if index == 0 else Cost())
    return costs


def bidirectional_cost(pipeline: Pipeline, frames: int, rows: int, steps: int, guidance: bool = True) -> Cost:
    """A whole video of `frames` latent frames by the bidirectional model: in each step every frame sees all frames."""
    tokens = (pipeline.height // pipeline.spatial // pipeline.config.patch_size[1]) * (
        pipeline.width // pipeline.spatial // pipeline.config.patch_size[2]
    )
    one = transformer_cost(
        pipeline.config, frames, tokens, frames * tokens, rows, pipeline.dtype.itemsize, timesteps=1, cached=False
    )
    return one * (steps * (2 if guidance else 1))
