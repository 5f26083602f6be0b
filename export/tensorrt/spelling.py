"""A graph in TensorRT's operators, TRT_KVCacheUpdate and TRT_Attention, or in our plugins, with ONNX bodies.

TensorRT's parser reads these names as plugins or as layers of its own. Any other runtime finds a function of the same
name in the file and runs that. So ONNX Runtime can check the graph's results without TensorRT.
"""

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.onnx_graph import DOMAIN, Spelling, qdq_linear, rewrite
from export.tensorrt.attention import Casts, HeadCaches, decomposable_attention
from export.tensorrt.bodies import native_bodies
from export.tensorrt.build import ATTENTIONS
from export.tensorrt.plugin_nodes import Fp8Caches, RowCaches, plugin_bodies


def spell_for_tensorrt(model: ModelProto, attention: str = "native", grouped: bool = True) -> None:
    """Replace our operators, and those operators that TensorRT reads differently from ONNX.

    attention is one of ATTENTIONS. `native` is TensorRT's own on caches [1, heads, rows, d], `native_fp8` the same with
    e4m3 operands; `plugin` is our kernel on caches [1, 1, rows, dim] that TensorRT writes; `plugin_fp8` is our kernels
    on e4m3 caches, K [1, rows, dim] and V [1, heads, d, rows up to a multiple of 16]. grouped: as in HeadCaches.
    Raises ValueError where activations are quantised per token.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"tensorrt: got attention {attention!r}, expected one of {', '.join(ATTENTIONS)}")
    casts: Casts = {}
    spellings: dict[str, Spelling] = {"linear_fp8": _static_linear}
    if any((node.domain, node.op_type) == (DOMAIN, "kv_write") for node in model.graph.node):
        caches = _caches(model, attention, grouped)
        spellings |= {
            "kv_write": lambda node, _: caches.write(node, casts),
            "ring_attention": lambda node, _: caches.attend(node, casts),
        }
    rewrite(model, spellings)
    for node in reversed(casts.values()):
        model.graph.node.insert(0, node)
    _single_precision(model)
    decomposable_attention(model)
    used = {(node.domain, node.op_type) for node in model.graph.node}
    bodies = [*native_bodies(), *plugin_bodies()]
    model.functions.extend(body for body in bodies if (body.domain, body.name) in used)
    model.opset_import.extend(helper.make_opsetid(d, 1) for d in sorted({d for d, _ in used if d}))


def _caches(model: ModelProto, attention: str, grouped: bool) -> HeadCaches | RowCaches | Fp8Caches:
    if attention == "plugin":
        return RowCaches(model)
    if attention == "plugin_fp8":
        return Fp8Caches(model)
    return HeadCaches(model, grouped, fp8=attention == "native_fp8")


def _static_linear(node: NodeProto, model: ModelProto) -> list[NodeProto]:
    if len(node.input) < 4 or not node.input[3]:
        raise ValueError("tensorrt: got FP8 activations per token, expected per tensor: scales of Q/DQ are constants")
    return qdq_linear(node, model)


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
