"""Graph -> ONNX (opset 24): native Attention, TensorScatter, products in 8 bits, large constants outside the file."""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.defs import OpSchema
from onnxscript import values

from export.eight_bits import E4M3_MAX, SMALLEST
from export.graphs import Graph
from kernels.int8_linear import INT8_MAX

OPSET = 24
INLINE_BYTES = 1024  # constants up to this size stay in the graph
DOMAIN = "greedy"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
Spelling = Callable[[NodeProto, ModelProto], list[NodeProto]]


@dataclass(frozen=True)
class OnnxGraph:
    """A model that only names its large constants, and their values."""

    model: ModelProto
    weights: dict[str, np.ndarray]


def _register() -> values.Opset:
    """Register schemas that keep our operators whole through the exporter. Native spellings replace them later."""
    optional = OpSchema.FormalParameterOption.Optional
    index = "tensor(int64)"

    def formal(name: str, kind: str = "T", **more: Any) -> OpSchema.FormalParameter:
        return OpSchema.FormalParameter(name, kind, **more)

    heads = [OpSchema.Attribute("heads", OpSchema.AttrType.INT, "number of heads")]

    def linear(weight: str) -> list[OpSchema.FormalParameter]:
        required = [formal("x"), formal("weight", weight), formal("weight_scale")]
        return required + [formal(name, param_option=optional) for name in ("input_scale", "bias")]

    for name, inputs, attributes in (
        ("kv_write", [formal("cache"), formal("update"), formal("index", index)], []),
        ("ring_attention", [formal("q"), formal("k"), formal("v"), formal("length", index)], heads),
        ("linear_fp8", linear("tensor(float8e4m3fn)"), []),
        ("linear_int8", linear("tensor(int8)"), []),
    ):
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(
                OpSchema(
                    name, DOMAIN, 1, inputs=inputs, outputs=[formal("out")],
                    type_constraints=[("T", _FLOATS, "")], attributes=attributes,
                )
            )  # fmt: skip
    return values.Opset(DOMAIN, 1)


def to_onnx(graph: Graph, spell: Callable[[ModelProto], None] | None = None) -> OnnxGraph:
    """Export, take large constants out, spell our operators natively (or as `spell` does), check."""
    return spelled(exported(graph), spell)


def exported(graph: Graph) -> OnnxGraph:
    """A graph in ONNX, with large constants taken out and our operators still whole."""
    ops = _register()

    def write(cache: Any, update: Any, index: Any) -> Any:
        return ops.kv_write(cache, update, index)

    def attend(q: Any, k: Any, v: Any, length: Any, heads: int) -> Any:
        return ops.ring_attention(q, k, v, length, heads=heads)

    def linear_fp8(x: Any, weight: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
        return ops.linear_fp8(x, weight, weight_scale, input_scale, bias)

    def linear_int8(x: Any, weight: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
        return ops.linear_int8(x, weight, weight_scale, input_scale, bias)

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter warns of every optional library that is missing
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.module, tuple(graph.inputs.values()), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(graph.inputs), output_names=graph.outputs, external_data=False,
                custom_translation_table={
                    torch.ops.greedy.kv_write.default: write,
                    torch.ops.greedy.ring_attention.default: attend,
                    torch.ops.greedy.linear_fp8.default: linear_fp8,
                    torch.ops.greedy.linear_int8.default: linear_int8,
                },
            )  # fmt: skip
    finally:
        logging.disable(before)
    assert program is not None
    weights = _take_out(program.model)  # before anything is serialised, because protobuf holds at most 2 GB
    return OnnxGraph(ir.to_proto(program.model), weights)


def spelled(graph: OnnxGraph, spell: Callable[[ModelProto], None] | None = None) -> OnnxGraph:
    """A copy of an exported graph with our operators spelled natively, or as `spell` does; checked."""
    model = ModelProto()
    model.CopyFrom(graph.model)
    (spell or spell_natively)(model)
    _strip(model)
    onnx.checker.check_model(_with_weights_as_inputs(model), full_check=True)
    return OnnxGraph(model, graph.weights)


def spell_natively(model: ModelProto) -> None:
    """kv_write -> TensorScatter, ring_attention -> Attention with its number of valid keys; linears in 8 bits."""
    linears = {"linear_fp8": qdq_linear, "linear_int8": _integer_linear}
    rewrite(model, {"kv_write": _tensor_scatter, "ring_attention": _attention, **linears})


def rewrite(model: ModelProto, spellings: Mapping[str, Spelling]) -> None:
    """Replace every node of our domain by the nodes of its spelling."""
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes += spellings[node.op_type](node, model) if node.domain == DOMAIN else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _tensor_scatter(node: NodeProto, model: ModelProto) -> list[NodeProto]:
    return [helper.make_node("TensorScatter", node.input, node.output, axis=-2, mode="linear")]


def _attention(node: NodeProto, model: ModelProto) -> list[NodeProto]:
    heads = helper.get_node_attr_value(node, "heads")
    q, k, v, length = node.input
    inputs = [q, k, v, "", "", "", length]
    return [helper.make_node("Attention", inputs, node.output, q_num_heads=heads, kv_num_heads=heads)]


def qdq_linear(node: NodeProto, model: ModelProto) -> list[NodeProto]:
    """linear_fp8 as QuantizeLinear -> DequantizeLinear -> MatMul, both factors dequantised right before the product.

    The zero point is absent, which means 0. Weight [in, out] has one scale per column. x [rows, in] has one scale, or
    one per row that the graph computes.
    """
    x, weight, weight_scale, scale, bias = [*node.input, "", ""][:5]
    out = node.output[0]
    nodes: list[NodeProto] = []
    axis: dict[str, Any] = {}
    if not scale:
        scale, axis = f"{out}_scale", {"axis": 0}
        nodes = _row_scale(x, scale, model, _dtype_of(model, weight_scale), E4M3_MAX)
    nodes += [
        helper.make_node("QuantizeLinear", [x, scale], [f"{out}_q"], output_dtype=TensorProto.FLOAT8E4M3FN, **axis),
        helper.make_node("DequantizeLinear", [f"{out}_q", scale], [f"{out}_x"], **axis),
        helper.make_node("DequantizeLinear", [weight, weight_scale], [f"{out}_w"], axis=1),
        helper.make_node("MatMul", [f"{out}_x", f"{out}_w"], [f"{out}_product" if bias else out]),
    ]
    return nodes + ([helper.make_node("Add", [f"{out}_product", bias], [out])] if bias else [])


def _integer_linear(node: NodeProto, model: ModelProto) -> list[NodeProto]:
    """linear_int8 as QuantizeLinear -> MatMulInteger -> Cast -> Mul by both scales.

    Activations are uint8 with the zero point 128: the same products, for which ONNX Runtime has fast kernels. From
    DequantizeLinear -> MatMul -> Add it makes a product of floats (1.31), so nothing is dequantised here.
    """
    x, weight, weight_scale, scale, bias = [*node.input, "", ""][:5]
    out, dtype = node.output[0], _dtype_of(model, weight_scale)
    middle, integers = f"{out}_middle", [f"{out}_q", weight, "int8_middle"]
    _add_constants(model, [helper.make_tensor("int8_middle", TensorProto.UINT8, [], [128])])
    if scale:  # one, a constant: both scales become one factor
        nodes = [
            helper.make_node("QuantizeLinear", [x, scale, "int8_middle"], [f"{out}_q"]),
            helper.make_node("Mul", [weight_scale, scale], [f"{out}_factor"]),
        ]
        factors = [f"{out}_factor"]
    else:  # one per row
        scale = f"{out}_scale"
        nodes = [
            *_row_scale(x, scale, model, dtype, INT8_MAX),
            helper.make_node("Shape", [scale], [f"{middle}_shape"]),
            helper.make_node(
                "ConstantOfShape",
                [f"{middle}_shape"],
                [middle],
                value=helper.make_tensor("value", TensorProto.UINT8, [1], [128]),
            ),
            helper.make_node("QuantizeLinear", [x, scale, middle], [f"{out}_q"], axis=0),
            helper.make_node("Unsqueeze", [scale, "row_axis"], [f"{out}_column"]),
        ]
        factors = [f"{out}_column", weight_scale]
    nodes += [
        helper.make_node("MatMulInteger", integers, [f"{out}_integers"]),
        helper.make_node("Cast", [f"{out}_integers"], [f"{out}_times_0"], to=dtype),
    ]
    for number, factor in enumerate(factors, start=1):
        last = number == len(factors) and not bias
        nodes.append(
            helper.make_node("Mul", [f"{out}_times_{number - 1}", factor], [out if last else f"{out}_times_{number}"])
        )
    return nodes + ([helper.make_node("Add", [f"{out}_times_{len(factors)}", bias], [out])] if bias else [])


def _row_scale(x: str, scale: str, model: ModelProto, dtype: int, largest: float) -> list[NodeProto]:
    """max(|x| over a row, SMALLEST) / largest."""
    constants = {"row_smallest": SMALLEST, "row_largest": largest}
    tensors = [helper.make_tensor(name, dtype, [], [value]) for name, value in constants.items()]
    _add_constants(model, [*tensors, helper.make_tensor("row_axis", TensorProto.INT64, [1], [-1])])
    return [
        helper.make_node("Abs", [x], [f"{scale}_abs"]),
        helper.make_node("ReduceMax", [f"{scale}_abs", "row_axis"], [f"{scale}_amax"], keepdims=0),
        helper.make_node("Max", [f"{scale}_amax", "row_smallest"], [f"{scale}_floor"]),
        helper.make_node("Div", [f"{scale}_floor", "row_largest"], [scale]),
    ]


def _add_constants(model: ModelProto, tensors: list[TensorProto]) -> None:
    """Each once, by its name."""
    present = {tensor.name for tensor in model.graph.initializer}
    model.graph.initializer.extend(tensor for tensor in tensors if tensor.name not in present)


def _dtype_of(model: ModelProto, constant: str) -> int:
    return next(tensor.data_type for tensor in model.graph.initializer if tensor.name == constant)


def _strip(model: ModelProto) -> None:
    """Remove stack traces and module paths, which would show folders of the exporting machine."""
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
    """The same graph with weights as inputs, because the checker would look for outside weights on disk."""
    copy = ModelProto()
    copy.CopyFrom(model)
    outside = [t for t in copy.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        copy.graph.initializer.remove(tensor)
    return copy
