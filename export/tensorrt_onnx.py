"""A graph in TensorRT's operators, TRT_KVCacheUpdate and TRT_Attention, or in our plugins, with ONNX bodies.

TensorRT's parser reads these names as plugins or as layers of its own. Any other runtime finds a function of the same
name in the file and runs that. So ONNX Runtime can check the graph's results without TensorRT.
"""

import math
from typing import Any

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.onnx_graph import DOMAIN, OPSET, qdq_linear, rewrite
from export.tensorrt_plugin_onnx import Casts, Fp8Caches, int32, plugin_attention, plugin_bodies

ATTENTIONS = ("native", "plugin", "plugin_fp8")
_SILENT = ("softcap", "qk_matmul_output_mode", "is_causal")  # attributes of Attention that have no effect at 0
TRT_DOMAIN = "trt"  # TensorRT reads the operator's name only
_WHOLE: dict[str, Any] = {"axis": -2, "mode": "linear", "update_form": "padded_bhnd"}
_FORMS: dict[str, Any] = {
    "causal_kind": "none", "kv_form": "padded_bhnd", "query_form": "padded_bhnd", "TRT_decomposable": 0,
}  # fmt: skip


def spell_for_tensorrt(model: ModelProto, attention: str = "native") -> None:
    """Replace our operators, and those operators that TensorRT reads differently from ONNX.

    attention is one of ATTENTIONS. `native` is TensorRT's own; `plugin` is our kernel on caches that TensorRT writes;
    `plugin_fp8` is our kernels on e4m3 caches, K [1, rows, dim] and V [1, heads, d, rows up to a multiple of 16].
    Other caches become [1, 1, rows, dim], because TRT_KVCacheUpdate needs four dimensions; their bytes are the same.
    Raises ValueError where activations are quantised per token.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"tensorrt: got attention {attention!r}, expected one of {', '.join(ATTENTIONS)}")
    writes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, "kv_write")]
    caches = {name for node in writes for name in (node.input[0], node.output[0])}
    casts: Casts = {}
    write, attend = _cache_update, _attention if attention == "native" else plugin_attention
    if attention == "plugin_fp8" and caches:
        fp8 = Fp8Caches(model)
        write, attend = fp8.write, fp8.attend
    elif caches:
        _four_dimensions(model, caches)
    rewrite(
        model,
        {
            "kv_write": lambda node, _: write(node, model, casts),
            "ring_attention": lambda node, _: attend(node, model, casts),
            "linear_fp8": _static_linear,
        },
    )
    for node in reversed(casts.values()):
        model.graph.node.insert(0, node)
    _single_precision(model)
    _default_attention(model)
    used = {(node.domain, node.op_type) for node in model.graph.node}
    model.functions.extend(body for body in _bodies() if (body.domain, body.name) in used)
    model.opset_import.extend(helper.make_opsetid(d, 1) for d in sorted({d for d, _ in used if d}))


def _cache_update(node: NodeProto, model: ModelProto, casts: Casts) -> list[NodeProto]:
    """Write update [1, n, dim] into cache [1, 1, rows, dim] from row index[0] on; the result has the same address."""
    cache, update, index = node.input
    out = node.output[0]
    _add(model, helper.make_tensor("trt_axis_1", TensorProto.INT64, [1], [1]))
    inputs = [cache, f"{out}_rows", int32(index, casts)]
    return [
        helper.make_node("Unsqueeze", [update, "trt_axis_1"], [f"{out}_rows"]),
        helper.make_node("TRT_KVCacheUpdate", inputs, [out], domain=TRT_DOMAIN, **_WHOLE),
    ]


def _attention(node: NodeProto, model: ModelProto, casts: Casts) -> list[NodeProto]:
    """q [1, n, dim] attends to the first length[0] rows of k, v [1, 1, rows, dim].

    TRT_Attention neither splits heads nor scales, so nodes around it do both.
    """
    q, k, v, length = node.input
    out, heads = node.output[0], helper.get_node_attr_value(node, "heads")
    _constants(model, q, heads)
    nodes = []
    for side, name in zip("qkv", (q, k, v), strict=True):
        nodes += [
            helper.make_node("Reshape", [name, "trt_split_heads"], [f"{out}_{side}_split"]),
            helper.make_node("Transpose", [f"{out}_{side}_split"], [f"{out}_{side}_heads"], perm=[0, 2, 1, 3]),
        ]
    inputs = [f"{out}_q_scaled", f"{out}_k_heads", f"{out}_v_heads", "", "", int32(length, casts)]
    return [
        *nodes,
        helper.make_node("Mul", [f"{out}_q_heads", "trt_softmax_scale"], [f"{out}_q_scaled"]),
        helper.make_node("TRT_Attention", inputs, [f"{out}_heads"], domain=TRT_DOMAIN, **_FORMS),
        helper.make_node("Transpose", [f"{out}_heads"], [f"{out}_split"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [f"{out}_split", "trt_merge_heads"], [out]),
    ]


def _constants(model: ModelProto, q: str, heads: int) -> None:
    """Add the constants of rewritten attentions once: all attentions of a transformer have the same heads."""
    kind = next(value.type.tensor_type for value in model.graph.value_info if value.name == q)
    dim = kind.shape.dim[-1].dim_value
    _add(model, helper.make_tensor("trt_split_heads", TensorProto.INT64, [4], [1, -1, heads, dim // heads]))
    _add(model, helper.make_tensor("trt_merge_heads", TensorProto.INT64, [3], [1, -1, dim]))
    _add(model, helper.make_tensor("trt_softmax_scale", kind.elem_type, [], [1 / math.sqrt(dim // heads)]))


def _add(model: ModelProto, constant: TensorProto) -> None:
    if all(tensor.name != constant.name for tensor in model.graph.initializer):
        model.graph.initializer.append(constant)


def _static_linear(node: NodeProto, model: ModelProto) -> list[NodeProto]:
    if len(node.input) < 4 or not node.input[3]:
        raise ValueError("tensorrt: got FP8 activations per token, expected per tensor: scales of Q/DQ are constants")
    return qdq_linear(node, model)


def _four_dimensions(model: ModelProto, caches: set[str]) -> None:
    """Declare the caches as [1, 1, rows, dim] instead of [1, rows, dim]; they are inputs and outputs of the network."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.name in caches:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind, [shape[0], 1, *shape[1:]]))


def _single_precision(model: ModelProto) -> None:
    """float64 -> float32, because TensorRT has no float64. Only the angles of the time embedding are float64."""
    wide, single = TensorProto.DOUBLE, TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == wide:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == wide:
                attribute.i = single
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == wide:
            value.type.tensor_type.elem_type = single


def _default_attention(model: ModelProto) -> None:
    """Remove attributes that have no effect: TensorRT's parser refuses some even at their defaults."""
    for node in model.graph.node:
        if node.op_type == "Attention":
            told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            kept = [a for a in node.attribute if not (a.name in _SILENT and told[a.name] == 0)]
            del node.attribute[:]
            node.attribute.extend(kept)


def _bodies() -> list[FunctionProto]:
    return [_cache_update_body(), _attention_body(), *plugin_bodies()]


def _cache_update_body() -> FunctionProto:
    nodes = [
        helper.make_node("Cast", ["write_indices"], ["rows"], to=TensorProto.INT64),
        helper.make_node("TensorScatter", ["past_cache", "update", "rows"], ["Y"], axis=-2, mode="linear"),
    ]
    inputs, names = ["past_cache", "update", "write_indices"], list(_WHOLE)
    return helper.make_function(
        TRT_DOMAIN, "TRT_KVCacheUpdate", inputs, ["Y"], nodes, [helper.make_opsetid("", OPSET)], attributes=names
    )


def _attention_body() -> FunctionProto:
    nodes = [
        helper.make_node("Cast", ["kv_lengths"], ["valid"], to=TensorProto.INT64),
        helper.make_node("Attention", ["Q", "K", "V", "", "", "", "valid"], ["Y"], scale=1.0),
    ]
    inputs, names = ["Q", "K", "V", "attn_mask", "query_lengths", "kv_lengths"], list(_FORMS)
    return helper.make_function(
        TRT_DOMAIN, "TRT_Attention", inputs, ["Y"], nodes, [helper.make_opsetid("", OPSET)], attributes=names
    )
