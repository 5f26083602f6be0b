"""The engine's passes, text encoder and VAE as functions of tensors: caches in, first and valid rows as tensors.

A `Graph` is a module with named example inputs. Everything it needs is an argument, so that any tracer can take it.
Caches are written in two ways. For ONNX, which cannot write an input, two custom operators of this file return updated
caches, and a compiler translates them. For AOTInductor, torch's own operators write the caches in place.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.bundles.manifest import ROW_INPUTS, VERSION
from engine.generators import family_of
from engine.generators.base import HeadGroup, Ring
from engine.model.layers import Attend
from engine.model.scaled_linear import expanded
from engine.model.text import ReadAgain, encode_text
from engine.model.transformer import WanTransformer
from engine.runtime.passes import PassKind
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline


@torch.library.custom_op("greedy::kv_write", mutates_args=())
def kv_write(cache: Tensor, update: Tensor, index: Tensor) -> Tensor:
    """cache [B, rows, dim] with update [B, n, dim] from row index[0] on."""
    out = cache.clone()
    out[:, int(index[0]) : int(index[0]) + update.shape[1]] = update
    return out


@torch.library.custom_op("greedy::ring_attention", mutates_args=())
def ring_attention(q: Tensor, k: Tensor, v: Tensor, length: Tensor, heads: int) -> Tensor:
    """q [B, n, dim] attends to the first length[0] rows of k, v [B, rows, dim]."""
    rows = int(length[0])
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k[:, :rows], v[:, :rows]))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()


@kv_write.register_fake
def _(cache: Tensor, update: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(cache)


@ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, length: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)


@dataclass(frozen=True)
class Graph:
    """One function: its module, its inputs in order with example values, the names of its outputs, what it writes."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    aliases: dict[str, str] = field(default_factory=dict)  # output -> input that it replaces
    mutates: list[str] = field(default_factory=list)  # inputs that it writes in place


class _Function(nn.Module):
    """A function of tensors, with the modules whose weights it uses. Its results are contiguous, as hosts expect."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(result.contiguous() for result in self.function(*inputs))


def stage_graphs(pipeline: Pipeline, in_place: bool = False) -> list[Graph]:
    """The graphs of a pipeline of the torch backend: batch 1, at the pipeline's size and preset.

    in_place: graphs write key/value caches in place instead of returning them.
    """
    stages, preset = pipeline.stages, pipeline.preset
    if not isinstance(stages, TorchStages) or stages.vae is None or stages.text_encoder is None:
        raise ValueError("export: got a pipeline without its torch modules, expected one from engine.load")
    if (preset.window - preset.attn_sink) % preset.chunk:
        raise ValueError(f"export: got window {preset.window} with attn_sink {preset.attn_sink}, "
                         f"expected the rest to be a multiple of chunk {preset.chunk}")  # fmt: skip
    if preset.first_chunk not in (0, preset.chunk) or preset.attn_sink % preset.chunk:
        raise ValueError("export: got a chunk 0 or attention sink of another size, expected whole chunks")
    if (heads := preset.local_heads) is not None and (heads.window % preset.chunk or heads.attn_sink % preset.chunk):
        raise ValueError(f"export: got local heads of window {heads.window} with attn_sink {heads.attn_sink}, "
                         f"expected multiples of chunk {preset.chunk}")  # fmt: skip
    rows = pipeline.tokenizer.rows if pipeline.tokenizer else 0
    return [
        _encode_text(_whole(stages.text_encoder, pipeline), rows),
        *(_prepare_text(name, model, rows) for name, model in stages.models.items()),
        *_transformers(pipeline, stages.models, in_place),
        *_vae(pipeline, stages),
    ]


def _whole(encoder: nn.Module, pipeline: Pipeline) -> nn.Module:
    """The text encoder with weights that a graph can hold: in memory, on the pipeline's device, not in 8 bits."""
    return expanded(encoder.kept() if isinstance(encoder, ReadAgain) else encoder).to(pipeline.device)


def _encode_text(encoder: nn.Module, rows: int) -> Graph:
    ids, mask = torch.ones(1, rows, dtype=torch.int64), torch.ones(1, rows, dtype=torch.int64)
    module = _Function(lambda ids, mask: (encode_text(encoder, ids, mask),), encoder=encoder)
    return Graph("encode_text", module, {"ids": ids, "mask": mask}, ["text_emb"])


def _prepare_text(role: str, model: WanTransformer, rows: int) -> Graph:
    text = torch.randn(1, rows, model.config.text_dim, dtype=model.proj_out.weight.dtype)
    module = _Function(lambda text: model.prepare_text(text), model=model)
    return Graph(f"prepare_text_{role}", module, {"text_emb": text}, ["text_k", "text_v"])


def _transformers(pipeline: Pipeline, models: dict[str, WanTransformer], in_place: bool) -> list[Graph]:
    family = family_of(pipeline.preset)
    rings = family.rings(pipeline.preset)
    return [_transformer(kind, pipeline, models[kind.role], rings[kind.role], in_place) for kind in family.passes]


def _transformer(kind: PassKind, pipeline: Pipeline, model: WanTransformer, ring: Ring, in_place: bool) -> Graph:
    """A pass over one chunk."""
    config, dtype, layers = model.config, model.proj_out.weight.dtype, model.config.num_layers
    high, wide = pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial
    tokens = high // config.patch_size[1] * (wide // config.patch_size[2])
    n, groups = tokens * pipeline.preset.chunk, ring.groups(config)
    latent = torch.randn(1, config.in_channels, pipeline.preset.chunk, high, wide, dtype=dtype)
    angles = torch.randn(n, config.attention_head_dim // 2)
    inputs = {"latent": latent}
    inputs |= {"t": torch.tensor([500.0])} if kind.timed else {}
    inputs |= {"c_f": torch.randn(1, n, config.dim, dtype=dtype)} if kind.conditioned else {}
    inputs |= {"rope_cos": angles.cos(), "rope_sin": angles.sin()}
    for group in groups:
        inputs |= {name: torch.tensor([row]) for name, row in zip(_rows_of(group), (0, n), strict=True)}
    heads = (config.num_attention_heads, config.attention_head_dim)
    text_rows = pipeline.tokenizer.rows if pipeline.tokenizer else 0
    text = {f"text_{s}_{i}": torch.randn(1, text_rows, *heads, dtype=dtype) for s in "kv" for i in range(layers)}
    caches = {
        f"{group.prefix}{side}_{layer}": torch.randn(1, group.slots * tokens, count * heads[1], dtype=dtype)
        for group in groups for side in "kv" for layer, count in enumerate(group.heads) if count
    }  # fmt: skip
    front = len(inputs)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, tensors[:front], strict=True))
        past = dict(zip(caches, tensors[front + 2 * layers :], strict=True))
        attend = (_in_place_attention if in_place else _functional_attention)(groups, past, named)
        t = named["t"] if kind.timed else torch.zeros_like(named["latent"][:, 0, 0, 0, 0], dtype=torch.float32)
        text_kv = tensors[front : front + layers], tensors[front + layers : front + 2 * layers]
        if kind.hidden:
            out, _ = model.encode(named["latent"], t, text_kv, named["rope_cos"], named["rope_sin"], attend)
        else:
            out = model(named["latent"], t, text_kv, named["rope_cos"], named["rope_sin"], attend, named.get("c_f"))
        return (out,) if in_place else (out, *past.values())

    aliases = {} if in_place else {f"{key}_out": key for key in caches}
    mutates = list(caches) if in_place else []
    first = "hidden" if kind.hidden else "flow"
    return Graph(kind.graph, _Function(run, model=model), inputs | text | caches, [first, *aliases], aliases, mutates)


def _rows_of(group: HeadGroup) -> tuple[str, str]:
    """The inputs of a group: the first row to write, and the number of rows to attend to."""
    start_row, valid_rows = ROW_INPUTS[VERSION]
    return group.prefix + start_row, group.prefix + valid_rows


def _functional_attention(groups: list[HeadGroup], past: dict[str, Tensor], named: dict[str, Tensor]) -> Attend:
    """Attention on caches [B, rows, dim], by name in `past`, which puts the updated ones in their place."""

    def attend(group: HeadGroup, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index, length = (named[name] for name in _rows_of(group))
        keys, values = f"{group.prefix}k_{layer}", f"{group.prefix}v_{layer}"
        for name, new in ((keys, k), (values, v)):
            past[name] = kv_write(past[name], new.flatten(2), index)
        out = ring_attention(q.flatten(2), past[keys], past[values], length, group.heads[layer])
        return out.unflatten(-1, (group.heads[layer], -1))

    return _by_group(groups, attend)


def _in_place_attention(groups: list[HeadGroup], past: dict[str, Tensor], named: dict[str, Tensor]) -> Attend:
    """The same, but caches are written in place. Rows behind the valid ones are not read."""
    lengths = {}
    for group in groups:
        rows = cast(int, named[_rows_of(group)[1]].item())  # stays symbolic for a tracer; int() would need its value
        held = next(cache.shape[1] for name, cache in past.items() if name.startswith(f"{group.prefix}k_"))
        torch._check(rows > 0)
        torch._check(rows <= held)
        lengths[group.prefix] = rows

    def attend(group: HeadGroup, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, found = lengths[group.prefix], []
        at = named[_rows_of(group)[0]] + torch.arange(k.shape[1], device=k.device)
        for side, new in (("k", k), ("v", v)):
            cache = past[f"{group.prefix}{side}_{layer}"]
            cache.index_copy_(1, at, new.flatten(2))
            found.append(cache[:, :rows].unflatten(-1, (group.heads[layer], -1)))
        q, keys, values = (x.transpose(1, 2) for x in (q, *found))
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)

    return _by_group(groups, attend)


def _by_group(groups: list[HeadGroup], attend: Callable[[HeadGroup, int, Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """Attention of all heads, group by group."""

    def attend_all(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = [group for group in groups if group.heads[layer]]
        if len(own) == 1:
            return attend(own[0], layer, q, k, v)
        counts = [group.heads[layer] for group in own]
        parts = zip(own, *(x.split(counts, 2) for x in (q, k, v)), strict=True)
        return torch.cat([attend(group, layer, *part) for group, *part in parts], dim=2)

    return attend_all


def _vae(pipeline: Pipeline, stages: TorchStages) -> list[Graph]:
    vae = stages.vae
    assert vae is not None
    dtype = next(vae.parameters()).dtype
    high, wide = pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial
    latent = torch.randn(1, vae.config.z_dim, 1, high, wide, dtype=dtype)
    frames = torch.rand(1, 3, pipeline.temporal, pipeline.height, pipeline.width, dtype=dtype) * 2 - 1
    with torch.no_grad():
        decoding, encoding = vae.first(latent)[1], vae.encode_step(frames[:, :, :1], None)[1]

    def graph(name: str, what: str, result: str, x: Tensor, cache: tuple[Tensor, ...], steady: bool) -> Graph:
        caches = {f"cache_{i}": c.contiguous() for i, c in enumerate(cache)} if steady else {}
        aliases = {f"cache_{i}_out": f"cache_{i}" for i in range(len(cache))}

        def run(x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
            if what == "frames":
                out, following = vae.encode_step(x, past if steady else None)
            else:
                out, following = vae.steady(x, past) if steady else vae.first(x)
            return out, *following

        # Not updated in place: a decode that fails must leave the stream's cache as it was.
        return Graph(name, _Function(run, vae=vae), {what: x} | caches, [result, *aliases])

    return [
        graph("vae_first", "latent", "frames", latent, decoding, False),
        graph("vae_steady", "latent", "frames", latent, decoding, True),
        graph("vae_encode_first", "frames", "latent", frames[:, :, :1], encoding, False),
        graph("vae_encode_steady", "frames", "latent", frames, encoding, True),
    ]
