"""Graph -> ONNX (opset 24): native Attention and TensorScatter, large constants outside the file."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.defs import OpSchema
from onnxscript import values

from export.graphs import Graph

OPSET = 24
INLINE_BYTES = 1024  # smaller constants stay in the graph
_DOMAIN = "greedy"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


@dataclass(frozen=True)
class OnnxGraph:
    """A model whose large constants are only named, and their values."""

    model: ModelProto
    weights: dict[str, np.ndarray]


def _register() -> values.Opset:
    """Schemas that keep our two operators whole through the exporter; their native spelling comes afterwards."""

    def formal(name: str, kind: str = "T") -> OpSchema.FormalParameter:
        return OpSchema.FormalParameter(name, kind)

    index = "tensor(int64)"
    heads = [OpSchema.Attribute("heads", OpSchema.AttrType.INT, "number of heads")]
    for name, inputs, attributes in (
        ("kv_write", [formal("cache"), formal("update"), formal("index", index)], []),
        ("ring_attention", [formal("q"), formal("k"), formal("v"), formal("length", index)], heads),
    ):
        if not onnx.defs.has(name, _DOMAIN):
            onnx.defs.register_schema(
                OpSchema(
                    name, _DOMAIN, 1, inputs=inputs, outputs=[formal("out")],
                    type_constraints=[("T", _FLOATS, "")], attributes=attributes,
                )
            )  # fmt: skip
    return values.Opset(_DOMAIN, 1)


def to_onnx(graph: Graph) -> OnnxGraph:
    """Export, spell natively, take large constants out, check."""
    ops = _register()

    def write(cache: Any, update: Any, index: Any) -> Any:
        return ops.kv_write(cache, update, index)

    def attend(q: Any, k: Any, v: Any, length: Any, heads: int) -> Any:
        return ops.ring_attention(q, k, v, length, heads=heads)

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter lists every optional library that is not there
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.module, tuple(graph.inputs.values()), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(graph.inputs), output_names=graph.outputs, external_data=False,
                custom_translation_table={
                    torch.ops.greedy.kv_write.default: write,
                    torch.ops.greedy.ring_attention.default: attend,
                },
            )  # fmt: skip
    finally:
        logging.disable(before)
    assert program is not None
    weights = _take_out(program.model)  # before anything is serialised: protobuf ends at 2 GB
    model = ir.to_proto(program.model)
    _spell_natively(model)
    _strip(model)
    onnx.checker.check_model(_with_weights_as_inputs(model), full_check=True)
    return OnnxGraph(model, weights)


def _spell_natively(model: ModelProto) -> None:
    """kv_write -> TensorScatter, ring_attention -> Attention with its number of valid keys, both of opset 24."""
    for node in model.graph.node:
        if node.domain != _DOMAIN:
            continue
        if node.op_type == "kv_write":
            attributes: dict[str, Any] = {"axis": -2, "mode": "linear"}
            _rename(node, "TensorScatter", list(node.input), attributes)
        else:
            heads = helper.get_node_attr_value(node, "heads")
            q, k, v, length = node.input
            _rename(node, "Attention", [q, k, v, "", "", "", length], {"q_num_heads": heads, "kv_num_heads": heads})
    kept = [opset for opset in model.opset_import if opset.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _rename(node: NodeProto, op_type: str, inputs: list[str], attributes: dict[str, Any]) -> None:
    node.domain, node.op_type = "", op_type
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())


def _strip(model: ModelProto) -> None:
    """Stack traces and module paths of the machine that exported are nobody's business."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.metadata_props[:], model.graph.metadata_props[:]


def _take_out(model: ir.Model) -> dict[str, np.ndarray]:
    """Replace large constants by their name, shape and dtype; return their values."""
    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE_BYTES:
            continue
        weights[name] = tensor.numpy()
        value.const_value = ir.ExternalTensor(
            "weights.safetensors", None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return weights


def _with_weights_as_inputs(model: ModelProto) -> ModelProto:
    """The same graph for the checker, which would look for the weights on disk."""
    copy = ModelProto()
    copy.CopyFrom(model)
    outside = [t for t in copy.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        copy.graph.initializer.remove(tensor)
    return copy
