"""Our TensorRT plugins as ONNX nodes, and ONNX functions that compute the same in every other runtime.

Nodes have the names, inputs and outputs of the plugins in export.tensorrt.plugins. Outputs after the first are memory
of the compiled kernel. The functions return zeros for them, and no node reads them.
"""

from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.onnx_graph import DOMAIN, OPSET
from export.tensorrt.attention import Casts, add_constant, cache_update, declare_caches, int32
from export.tensorrt.plugins import NAMESPACE

PLUGIN_DOMAIN = "greedy.plugin"  # TensorRT reads the operator's name and the attribute plugin_namespace
FP8 = TensorProto.FLOAT8E4M3FN
_PLUGIN: dict[str, Any] = {"plugin_namespace": NAMESPACE, "aot": 1}
_HIDDEN = ["descriptors", "profile"]
_ATTENTION_REST = ["lse", "partial", "stats", *_HIDDEN]
_SCALE = "fp8_head_scale"


class RowCaches:
    """Spellings on caches [1, 1, rows, dim], which TensorRT writes: TRT_KVCacheUpdate needs four dimensions."""

    def __init__(self, model: ModelProto) -> None:
        """Changes the shapes of the caches in the graph's signature."""
        self.model = model
        declare_caches(model, lambda rows, dim: [1, 1, rows, dim])

    def write(self, node: NodeProto, casts: Casts) -> list[NodeProto]:
        cache, update, index = node.input
        out = node.output[0]
        axis = add_constant(self.model, helper.make_tensor("trt_axis_1", TensorProto.INT64, [1], [1]))
        return [
            helper.make_node("Unsqueeze", [update, axis], [f"{out}_rows"]),
            cache_update(cache, f"{out}_rows", int32(index, casts), out),
        ]

    def attend(self, node: NodeProto, casts: Casts) -> list[NodeProto]:
        q, k, v, length = node.input
        return [_node("ring_attention", [q, k, v, int32(length, casts)], node, _ATTENTION_REST, _heads(node))]


class Fp8Caches:
    """Spellings for e4m3 caches: K [1, rows, dim], V [1, heads, d, pitch]; scale 1 per head, as in the torch backend.

    Normed keys and values fit the range of e4m3 without another scale.
    """

    def __init__(self, model: ModelProto) -> None:
        """Changes dtype and shape of the caches in the graph's signature."""
        readers = [n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, "ring_attention")]
        writers = {n.output[0]: n for n in model.graph.node if (n.domain, n.op_type) == (DOMAIN, "kv_write")}
        self.values = {node.input[2] for node in readers}
        heads = _heads(readers[0])
        of_values = {name for v in self.values for name in (v, writers[v].input[0])}
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            if value.name in {name for out, node in writers.items() for name in (out, node.input[0])}:
                _, rows, dim = (d.dim_value for d in value.type.tensor_type.shape.dim)
                transposed = [1, heads, dim // heads, (rows + 15) // 16 * 16]
                shape = transposed if value.name in of_values else [1, rows, dim]
                value.CopyFrom(helper.make_tensor_value_info(value.name, FP8, shape))
        model.graph.initializer.append(numpy_helper.from_array(np.ones(heads, np.float32), _SCALE))

    def write(self, node: NodeProto, casts: Casts) -> list[NodeProto]:
        cache, update, index = node.input
        kind = "write_values_fp8" if node.output[0] in self.values else "write_keys_fp8"
        return [_node(kind, [cache, update, _SCALE, int32(index, casts)], node, _HIDDEN)]

    def attend(self, node: NodeProto, casts: Casts) -> list[NodeProto]:
        q, k, v, length = node.input
        inputs = [q, k, v, int32(length, casts), _SCALE, _SCALE, _SCALE]
        return [_node("ring_attention_fp8", inputs, node, _ATTENTION_REST, _heads(node))]


def _heads(node: NodeProto) -> int:
    return helper.get_node_attr_value(node, "heads")


def _node(name: str, inputs: list[str], node: NodeProto, rest: list[str], heads: int | None = None) -> NodeProto:
    out = node.output[0]
    attributes = _PLUGIN | ({} if heads is None else {"heads": heads})
    return helper.make_node(name, inputs, [out, *(f"{out}_{r}" for r in rest)], domain=PLUGIN_DOMAIN, **attributes)


def plugin_bodies() -> list[FunctionProto]:
    """The four functions."""
    n = helper.make_node
    dense = [
        n("Constant", [], ["axis"], value_ints=[1]),
        n("Squeeze", ["k", "axis"], ["keys"]),
        n("Squeeze", ["v", "axis"], ["values"]),
        n("Cast", ["valid_rows"], ["rows"], to=TensorProto.INT64),
        n("Attention", ["q", "keys", "values", "", "", "", "rows"], ["out"]),
    ]
    for name in ("q_num_heads", "kv_num_heads"):
        dense[-1].attribute.append(AttributeProto(name=name, ref_attr_name="heads", type=AttributeProto.INT))
    fp8 = [
        *_split("q", "q_scale", "q"),
        n("DequantizeLinear", ["q_e4m3", "q_scale"], ["q_near"], axis=2),
        n("Transpose", ["q_near"], ["q_heads"], perm=[0, 2, 1, 3]),
        n("Cast", ["k"], ["k_wide"], to=TensorProto.FLOAT),
        n("Reshape", ["k_wide", "q_split"], ["k_split"]),
        n("Constant", [], ["last"], value_ints=[-1]),
        n("Unsqueeze", ["k_scale", "last"], ["k_column"]),
        n("Mul", ["k_split", "k_column"], ["k_near"]),
        n("Transpose", ["k_near"], ["k_heads"], perm=[0, 2, 1, 3]),
        n("Cast", ["v"], ["v_wide"], to=TensorProto.FLOAT),
        n("Constant", [], ["last_two"], value_ints=[-2, -1]),
        n("Unsqueeze", ["v_scale", "last_two"], ["v_block"]),
        n("Mul", ["v_wide", "v_block"], ["v_near"]),
        n("Transpose", ["v_near"], ["v_padded"], perm=[0, 1, 3, 2]),
        n("Constant", [], ["begin"], value_ints=[0]),
        n("Shape", ["k"], ["k_rows"], start=1, end=2),
        n("Constant", [], ["row_axis"], value_ints=[2]),
        n("Slice", ["v_padded", "begin", "k_rows", "row_axis"], ["v_heads"]),
        n("Cast", ["valid_rows"], ["rows"], to=TensorProto.INT64),
        n("Attention", ["q_heads", "k_heads", "v_heads", "", "", "", "rows"], ["out_heads"]),
        n("Transpose", ["out_heads"], ["out_split"], perm=[0, 2, 1, 3]),
        n("Shape", ["q"], ["q_shape"]),
        n("Reshape", ["out_split", "q_shape"], ["out_wide"]),
        n("CastLike", ["out_wide", "q"], ["out"]),
    ]
    keys = [
        *_split("update", "scale", "u"),
        n("Cast", ["u_e4m3"], ["u_split_wide"], to=TensorProto.FLOAT),
        n("Shape", ["update"], ["u_shape"]),
        n("Reshape", ["u_split_wide", "u_shape"], ["u_wide"]),
        *_scattered("cache", "u_wide", "written"),
        n("Cast", ["written"], ["out"], to=FP8),
    ]
    values = [
        *_split("update", "scale", "u"),
        n("Cast", ["u_e4m3"], ["u_wide"], to=TensorProto.FLOAT),
        n("Transpose", ["u_wide"], ["u_heads"], perm=[0, 2, 1, 3]),
        *_scattered("cache", "u_heads", "written", transposed=True),
        n("Cast", ["written"], ["out"], to=FP8),
    ]
    scales = ["q_scale", "k_scale", "v_scale"]
    write = ["cache", "update", "scale", "start_row"]
    return [
        _function("ring_attention", ["q", "k", "v", "valid_rows"], _ATTENTION_REST, dense, ["heads"]),
        _function("ring_attention_fp8", ["q", "k", "v", "valid_rows", *scales], _ATTENTION_REST, fp8, ["heads"]),
        _function("write_keys_fp8", write, _HIDDEN, keys),
        _function("write_values_fp8", write, _HIDDEN, values),
    ]


def _split(x: str, scale: str, as_: str) -> list[NodeProto]:
    """x [1, n, dim] -> {as_}_e4m3 [1, n, heads, d], divided by scale [heads]; {as_}_split is that shape, n as -1."""
    n = helper.make_node
    return [
        n("Constant", [], [f"{as_}_one"], value_ints=[1, -1]),
        n("Shape", [scale], [f"{as_}_count"]),
        n("Shape", [x], [f"{as_}_dim"], start=2, end=3),
        n("Div", [f"{as_}_dim", f"{as_}_count"], [f"{as_}_each"]),
        n("Concat", [f"{as_}_one", f"{as_}_count", f"{as_}_each"], [f"{as_}_split"], axis=0),
        n("Reshape", [x, f"{as_}_split"], [f"{as_}_parts"]),
        n("Cast", [f"{as_}_parts"], [f"{as_}_parts_wide"], to=TensorProto.FLOAT),
        n("QuantizeLinear", [f"{as_}_parts_wide", scale], [f"{as_}_e4m3"], axis=2, output_dtype=FP8),
    ]


def _scattered(cache: str, update: str, out: str, transposed: bool = False) -> list[NodeProto]:
    """Rows of `update` into `cache` from `start_row` on, in float32; transposed: rows are the last axis."""
    n, turned = helper.make_node, [0, 1, 3, 2]
    rows, made = ("cache_rows", "made_rows") if transposed else ("cache_wide", out)
    return [
        n("Cast", [cache], ["cache_wide"], to=TensorProto.FLOAT),
        *([n("Transpose", ["cache_wide"], [rows], perm=turned)] if transposed else []),
        n("Cast", ["start_row"], ["first"], to=TensorProto.INT64),
        n("TensorScatter", [rows, update, "first"], [made], axis=-2, mode="linear"),
        *([n("Transpose", [made], [out], perm=turned)] if transposed else []),
    ]


def _function(
    name: str, inputs: list[str], rest: list[str], nodes: list[NodeProto], attributes: list[str] | None = None
) -> FunctionProto:
    zeros = [helper.make_node("Constant", [], [r], value_floats=[0.0]) for r in rest]
    return helper.make_function(
        PLUGIN_DOMAIN, name, inputs, ["out", *rest], [*nodes, *zeros], [helper.make_opsetid("", OPSET)],
        attributes=[*_PLUGIN, *(attributes or [])],
    )  # fmt: skip
