"""The graphs that a bundle must have, and what each of them takes and gives. The same as csrc/core/contract.cpp.

A graph checks nothing itself. So whatever stands in a manifest is compared with what the loop will feed, for every
backend, before anything is opened.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from engine.config import Preset, TransformerConfig
from engine.generators import family_of
from engine.options import FieldError
from engine.runtime.passes import PassKind

# Of each precision; fp8 and int8 have any around them.
FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FP8 = "float8_e4m3fn"


class Tensor(Protocol):
    """A TensorSpec of the manifest."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def dtype(self) -> str: ...


class Graph(Protocol):
    """A GraphSpec of the manifest."""

    @property
    def inputs(self) -> Iterable[Tensor]: ...
    @property
    def outputs(self) -> Iterable[Tensor]: ...
    @property
    def aliases(self) -> Mapping[str, str]: ...
    @property
    def mutates(self) -> Iterable[str]: ...


@dataclass(frozen=True)
class Shapes:
    """All that decides the shapes of a bundle's graphs."""

    preset: Preset
    config: TransformerConfig
    height: int  # pixels
    width: int
    spatial: int
    temporal: int
    text_rows: int
    precision: str
    row_inputs: tuple[str, str]

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of a latent."""
        return self.height // self.spatial, self.width // self.spatial

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.latent[0] // self.config.patch_size[1] * (self.latent[1] // self.config.patch_size[2])


Kinds = dict[str, tuple[str, list[int]]]  # name -> dtype and shape


@dataclass(frozen=True)
class _Expected:
    inputs: Kinds
    outputs: Kinds
    caches: tuple[str, ...] = field(default=())  # inputs that the graph writes
    ordered: bool = False  # a VAE's caches are known by their place


def check_sizes(shapes: Shapes) -> None:
    """FieldError unless the picture is whole patches and the preset whole chunks, for which alone graphs are made."""
    for name, pixels, patch in zip(("height", "width"), (shapes.height, shapes.width), shapes.config.patch_size[1:],
                                   strict=True):  # fmt: skip
        unit = shapes.spatial * patch
        if pixels % unit:
            _refuse(name, str(pixels), f"a multiple of {unit}")
    if shapes.config.in_channels != shapes.config.out_channels:
        _refuse("transformer.out_channels", str(shapes.config.out_channels), "as many as in_channels")
    preset = shapes.preset
    if preset.first_chunk not in (0, preset.chunk):
        _refuse("preset.first_chunk", str(preset.first_chunk), "0 or chunk")
    for name in ("window", "attn_sink"):
        if (frames := getattr(preset, name)) % preset.chunk:
            _refuse(f"preset.{name}", str(frames), "whole chunks")
    if (heads := preset.heads) is not None:
        try:
            heads.fit(shapes.config)
        except FieldError as error:
            _refuse(f"preset.{error.field}", error.got, error.expected)
        for name in ("window", "attn_sink"):
            if (frames := getattr(heads, name)) % preset.chunk:
                _refuse(f"preset.heads.{name}", str(frames), "whole chunks")


def check_graphs(shapes: Shapes, graphs: Mapping[str, Graph], where: str) -> None:
    """FieldError unless one backend's graphs are those that the loop runs. `where` names its field."""
    family = family_of(shapes.preset)
    roles = [f"prepare_text_{role}" for role in family.roles()]
    vae = ["vae_first", "vae_steady", "vae_encode_first", "vae_encode_steady"]
    kinds = {kind.graph: kind for kind in family.passes}
    _same_names(where, "graph", graphs, ["encode_text", *roles, *vae, *kinds])
    first = _named(graphs[family.passes[0].graph].inputs).get("latent")
    dtype = FLOATS.get(shapes.precision) or (first.dtype if first is not None else "")
    if dtype not in FLOATS.values():
        _refuse(f"{where}.{family.passes[0].graph}.inputs.latent", dtype or "none", "floats")
    rows, config, heads = shapes.text_rows, shapes.config, shapes.config.num_attention_heads
    text = (dtype, [1, rows, config.text_dim])
    both = (dtype, [config.num_layers, 1, rows, heads, config.attention_head_dim])
    ids = ("int64", [1, rows])
    _check(f"{where}.encode_text", graphs["encode_text"], _Expected({"ids": ids, "mask": ids}, {"text_emb": text}))
    for name in roles:
        _check(f"{where}.{name}", graphs[name], _Expected({"text_emb": text}, {"text_k": both, "text_v": both}))
    for name, kind in kinds.items():
        _check(f"{where}.{name}", graphs[name], _pass(shapes, kind, dtype, graphs[name]))
    _check_vae(shapes, graphs, where, dtype)


def _pass(shapes: Shapes, kind: PassKind, dtype: str, graph: Graph) -> _Expected:
    """The tensors of a transformer's pass over one chunk."""
    config, chunk = shapes.config, shapes.preset.chunk
    n, pairs = chunk * shapes.tokens, config.attention_head_dim // 2
    latent = (dtype, [1, config.in_channels, chunk, *shapes.latent])
    hidden = (dtype, [1, n, config.dim])
    inputs: Kinds = {"latent": latent}
    inputs |= {"t": ("float32", [1])} if kind.timed else {}
    inputs |= {"c_f": hidden} if kind.conditioned else {}
    inputs |= {name: ("float32", [n, pairs]) for name in ("rope_cos", "rope_sin")}
    groups = family_of(shapes.preset).rings(shapes.preset)[kind.role].groups(config)
    inputs |= {group.prefix + name: ("int64", [1]) for group in groups for name in shapes.row_inputs}
    text = (dtype, [1, shapes.text_rows, config.num_attention_heads, config.attention_head_dim])
    keys = _named(graph.inputs).get("k_0")
    fp8 = len(groups) == 1 and keys is not None and keys.dtype == FP8
    inputs |= {f"text_{side}_{layer}": text for side in "kv" for layer in range(config.num_layers)}
    caches: Kinds = {}
    for group in groups:
        rows = group.slots * shapes.tokens
        for side in "kv":
            for layer, count in enumerate(group.heads):
                plain = [1, rows, count * config.attention_head_dim]
                across = [1, count, config.attention_head_dim, (rows + 15) // 16 * 16]  # V in FP8
                if count:
                    shape = across if fp8 and side == "v" else plain
                    caches[f"{group.prefix}{side}_{layer}"] = FP8 if fp8 else dtype, shape
    result: Kinds = {"hidden": hidden} if kind.hidden else {"flow": latent}
    replaced = {output: caches[name] for output, name in graph.aliases.items() if name in caches}
    return _Expected(inputs | caches, result | replaced, tuple(caches))


def _check_vae(shapes: Shapes, graphs: Mapping[str, Graph], where: str, dtype: str) -> None:
    channels, (high, wide) = shapes.config.in_channels, shapes.latent
    shape = [1, channels, 1, high, wide]
    for first, steady, what, result in (("vae_first", "vae_steady", "latent", "frames"),
                                        ("vae_encode_first", "vae_encode_steady", "frames", "latent")):  # fmt: skip
        latent = (dtype if what == "latent" else "float32", shape)  # encoders give float32, whatever their weights are
        # The caches have the shapes that the first call gives.
        given = [(tensor.dtype, tensor.shape) for tensor in graphs[first].outputs][1:]
        made: Kinds = {f"cache_{i}_out": kind for i, kind in enumerate(given)}
        past: Kinds = {f"cache_{i}": kind for i, kind in enumerate(given)}
        for name, frames, caches in ((first, 1, {}), (steady, shapes.temporal, past)):
            sides = {"latent": latent, "frames": (dtype, [1, 3, frames, shapes.height, shapes.width])}
            expected = _Expected({what: sides[what]} | caches, {result: sides[result]} | made, ordered=True)
            _check(f"{where}.{name}", graphs[name], expected)


def _check(where: str, graph: Graph, expected: _Expected) -> None:
    for side, found, wanted in (
        ("inputs", graph.inputs, expected.inputs),
        ("outputs", graph.outputs, expected.outputs),
    ):
        named = _named(found)
        _same_names(f"{where}.{side}", "tensor", named, wanted)
        for name, (dtype, shape) in wanted.items():
            if (named[name].dtype, named[name].shape) != (dtype, shape):
                _refuse(f"{where}.{side}.{name}", f"{named[name].dtype} {named[name].shape}", f"{dtype} {shape}")
        count = len(wanted) if expected.ordered else int(side == "outputs")  # the result comes first
        for got, name in list(zip(named, wanted, strict=True))[:count]:
            if got != name:
                _refuse(f"{where}.{side}", f"{got} in the place of {name}", "the order of python -m export")
    written = {*graph.aliases.values(), *graph.mutates}
    if odd := sorted(written ^ set(expected.caches)):
        what = "an input that no cache is" if odd[0] in written else "a cache that is not written"
        field = "aliases" if graph.aliases else "mutates"
        _refuse(f"{where}.{field}", f"{odd[0]}, {what}", "every cache of a pass, and no other input")


def _same_names(where: str, what: str, found: Mapping[str, object], wanted: Iterable[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        _refuse(where, f"no {missing[0]}", "it")
    known = set(wanted)
    if unknown := [name for name in found if name not in known]:
        _refuse(where, f"unknown {what} {unknown[0]}", "only known ones")


def _named(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in tensors}


def _refuse(where: str, got: str, expected: str) -> NoReturn:
    raise FieldError(f"{where}: got {got}, expected {expected}", where, got, expected)
