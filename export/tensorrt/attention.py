"""Attention by TensorRT's own layers, on caches [1, heads, rows, d].

TensorRT's kernels read keys and values by heads. So the caches are network inputs of that shape, and the cache update
turns only a chunk's new rows. The ring's memory then holds the same numbers in another order, and only these graphs
read it.
"""

import math
from collections.abc import Callable
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from engine.bundles.tensorrt import UNREAD
from export.onnx_graph import DOMAIN

TRT_DOMAIN = "trt"  # TensorRT reads the operator's name only
FP8 = TensorProto.FLOAT8E4M3FN
Casts = dict[str, NodeProto]
UPDATE: dict[str, Any] = {"axis": -2, "mode": "linear", "update_form": "padded_bhnd"}
ATTENTION: dict[str, Any] = {
    "causal_kind": "none", "kv_form": "padded_bhnd", "query_form": "padded_bhnd", "TRT_decomposable": 1,
}  # fmt: skip
QUANTISED: dict[str, Any] = ATTENTION | {"normalization_quantize_to_type": FP8}
PLAIN = {"scale": AttributeProto.FLOAT, "q_num_heads": AttributeProto.INT, "kv_num_heads": AttributeProto.INT}
_SILENT = ("softcap", "qk_matmul_output_mode", "is_causal")  # attributes of Attention that have no effect at 0


def int32(name: str, casts: Casts) -> str:
    """The name of an int32 copy: positions are int64 in all bundles, int32 in TensorRT's layers and our kernels."""
    casts.setdefault(name, helper.make_node("Cast", [name], [f"{name}_int32"], to=TensorProto.INT32))
    return f"{name}_int32"


def add_constant(model: ModelProto, constant: TensorProto) -> str:
    """Add a constant to the graph, once; returns its name."""
    if all(tensor.name != constant.name for tensor in model.graph.initializer):
        model.graph.initializer.append(constant)
    return constant.name


def declare_caches(model: ModelProto, shape: Callable[[int, int], list[int]]) -> None:
    """Give caches [1, rows, dim] of the graph's signature another shape of as many elements; shape(rows, dim)."""
    writers = [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, "kv_write")]
    caches = {name for n in writers for name in (n.input[0], n.output[0])}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.name in caches:
            kind = value.type.tensor_type
            _, rows, dim = (d.dim_value for d in kind.shape.dim)
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind.elem_type, shape(rows, dim)))


def cache_update(cache: str, update: str, index: str, out: str) -> NodeProto:
    """Write update [1, a, n, b] into cache [1, a, rows, b] from row index[0] on; `out` has the cache's address."""
    return helper.make_node("TRT_KVCacheUpdate", [cache, update, index], [out], domain=TRT_DOMAIN, **UPDATE)


class HeadCaches:
    """Spellings of kv_write and ring_attention on caches [1, heads, rows, d]; n is the number of queries.

    grouped   queries [1, heads, n, d] enter attention as [1, heads * g, n / g, d], which are the same bytes: g heads
              share a head's keys. TensorRT's kernel for shared keys reads a cache where it lies, while the kernel for
              as many heads as keys gets a copy. g is the smallest divisor of n; a prime n stays whole, and
              so do queries in float32.
    fp8       attention on e4m3 operands of scale 1 per head, as the engine's own FP8 attention
    """

    def __init__(self, model: ModelProto, grouped: bool, fp8: bool) -> None:
        """Changes the shapes of the caches in the graph's signature."""
        self.model, self.fp8, self.attentions = model, fp8, 0
        reader = next(n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, "ring_attention"))
        kind = next(v.type.tensor_type for v in model.graph.value_info if v.name == reader.input[0])
        self.dtype, first = kind.elem_type, int(helper.get_node_attr_value(reader, "heads"))
        _, self.n, dim = (d.dim_value for d in kind.shape.dim)
        self.d = dim // first
        shapes = {v.name: v.type.tensor_type.shape.dim for v in (*model.graph.input, *model.graph.value_info)}
        self.widths = {name: shape[-1].dim_value for name, shape in shapes.items() if shape}
        self.groups = _smallest_divisor(self.n) if grouped and self.dtype != TensorProto.FLOAT else 1
        declare_caches(model, lambda rows, dim: [1, dim // self.d, rows, self.d])

    def write(self, node: NodeProto, casts: Casts) -> list[NodeProto]:
        """Write update [1, n, dim] into cache [1, heads, rows, d] from row index[0] on."""
        cache, update, index = node.input
        out, split = node.output[0], self._shape("split", [1, self.n, self.widths[update] // self.d, self.d])
        return [
            helper.make_node("Reshape", [update, split], [f"{out}_split"]),
            helper.make_node("Transpose", [f"{out}_split"], [f"{out}_rows"], perm=[0, 2, 1, 3]),
            cache_update(cache, f"{out}_rows", int32(index, casts), out),
        ]

    def attend(self, node: NodeProto, casts: Casts) -> list[NodeProto]:
        """q [1, n, dim] attends to the first length[0] rows of k, v [1, heads, rows, d] -> [1, n, dim].

        TRT_Attention does not scale, so a node in front of it does.
        """
        q, k, v, length = node.input
        out, g, each = node.output[0], self.groups, self.n // self.groups
        heads = int(helper.get_node_attr_value(node, "heads"))
        by_tokens = self._shape("by_tokens", [1, g, each, heads, self.d])
        by_heads = self._shape("by_heads", [1, heads, g, each, self.d])
        queries = self._shape("queries", [1, heads * g, each, self.d])
        merged = self._shape("merged", [1, self.n, heads * self.d])
        scale = helper.make_tensor("trt_softmax_scale", self.dtype, [], [1 / math.sqrt(self.d)])
        grouped = self._read_twice(f"{out}_grouped", [1, heads * g, each, self.d])
        return [
            helper.make_node("Reshape", [q, by_tokens], [f"{out}_q_tokens"]),
            helper.make_node("Transpose", [f"{out}_q_tokens"], [f"{out}_q_heads"], perm=[0, 3, 1, 2, 4]),
            helper.make_node("Reshape", [f"{out}_q_heads", queries], [grouped]),
            helper.make_node("Mul", [grouped, add_constant(self.model, scale)], [f"{out}_q"]),
            *self._attention(f"{out}_q", k, v, int32(length, casts), f"{out}_groups"),
            helper.make_node("Reshape", [f"{out}_groups", by_heads], [f"{out}_heads"]),
            helper.make_node("Transpose", [f"{out}_heads"], [f"{out}_tokens"], perm=[0, 2, 3, 1, 4]),
            helper.make_node("Reshape", [f"{out}_tokens", merged], [out]),
        ]

    def _read_twice(self, name: str, shape: list[int]) -> str:
        """The name of grouped queries. In 16 bits they are an output of the network too, which no program reads.

        Without this second reader the builder merges the queries' Reshape into attention, and then expands every cache
        to heads * g heads in front of it. The output costs one write of the queries.
        """
        if self.groups == 1 or self.fp8:
            return name
        name, self.attentions = f"{UNREAD}{self.attentions}", self.attentions + 1
        self.model.graph.output.append(helper.make_tensor_value_info(name, self.dtype, shape))
        return name

    def _attention(self, q: str, k: str, v: str, lengths: str, out: str) -> list[NodeProto]:
        if not self.fp8:
            inputs = [q, k, v, "", "", lengths]
            return [helper.make_node("TRT_Attention", inputs, [out], domain=TRT_DOMAIN, **ATTENTION)]
        share = add_constant(self.model, helper.make_tensor("trt_fp8_share", self.dtype, [], [1 / 448]))
        scales = {"q": 1 / math.sqrt(self.d), "k": 1.0, "v": 1.0}  # q comes scaled by the softmax's factor
        nodes = []
        for side, x in zip("qkv", (q, k, v), strict=True):
            name = f"{out}_{side}"
            scale = helper.make_tensor(f"trt_fp8_scale_{scales[side]}", TensorProto.FLOAT, [], [scales[side]])
            add_constant(self.model, scale)
            nodes += [  # from float32: with 16-bit scales the builder moves a whole cache once more
                helper.make_node("Cast", [x], [f"{name}_wide"], to=TensorProto.FLOAT),
                helper.make_node("QuantizeLinear", [f"{name}_wide", scale.name], [f"{name}_e4m3"], output_dtype=FP8),
                helper.make_node("DequantizeLinear", [f"{name}_e4m3", scale.name], [f"{name}_near"]),
                helper.make_node("Cast", [f"{name}_near"], [f"{name}_value"], to=self.dtype),
            ]
        inputs = [*(f"{out}_{side}_value" for side in "qkv"), "", share, "", lengths]
        return [*nodes, helper.make_node("TRT_QuantizedAttention", inputs, [out], domain=TRT_DOMAIN, **QUANTISED)]

    def _shape(self, what: str, shape: list[int]) -> str:
        name = f"trt_{what}_{'x'.join(map(str, shape))}"  # groups of heads differ in their number
        return add_constant(self.model, helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape))


def _smallest_divisor(n: int) -> int:
    """The smallest divisor of n but 1; 1 for a prime, whose groups would have one query each."""
    return next((g for g in range(2, math.isqrt(n) + 1) if n % g == 0), 1)


def decomposable_attention(model: ModelProto) -> None:
    """Spell ONNX's own attention (text, VAE) as trt::Attention with TRT_decomposable, so that TensorRT may split it.

    TensorRT has no kernel of its own for float32, nor for one head of 384, and without the attribute no plan. ONNX
    allows no such attribute on its own operator, so the node moves to another domain, with a body. Attributes without
    effect are removed: TensorRT's parser refuses some even at their defaults.
    """
    for node in model.graph.node:
        if (node.domain, node.op_type) != ("", "Attention"):
            continue
        told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        kept = [a for a in node.attribute if not (a.name in _SILENT and told[a.name] == 0)]
        if odd := sorted({a.name for a in kept} - PLAIN.keys()):
            raise ValueError(f"tensorrt: got Attention with {odd[0]}, expected one of {', '.join(PLAIN)}")
        if len(node.input) > 4 or len(node.output) > 1:
            raise ValueError("tensorrt: got Attention with a cache of its own, expected Q, K, V and a mask")
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("TRT_decomposable", 1)])
        node.domain = TRT_DOMAIN
