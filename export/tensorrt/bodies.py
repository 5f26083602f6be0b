"""TensorRT's own layers as functions of ONNX operators, for other runtimes."""

from collections.abc import Iterable

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from export.onnx_graph import OPSET
from export.tensorrt.attention import ATTENTION, FP8, PLAIN, QUANTISED, TRT_DOMAIN, UPDATE


def native_bodies() -> list[FunctionProto]:
    """One function for each layer that export.tensorrt.attention writes."""
    n = helper.make_node
    update = [
        n("Cast", ["write_indices"], ["rows"], to=TensorProto.INT64),
        n("TensorScatter", ["past_cache", "update", "rows"], ["Y"], axis=-2, mode="linear"),
    ]
    attention = [
        n("Cast", ["kv_lengths"], ["valid"], to=TensorProto.INT64),
        n("Attention", ["Q", "K", "V", "", "", "", "valid"], ["Y"], scale=1.0),
    ]
    plain = [n("Attention", ["Q", "K", "V", "attn_mask"], ["Y"])]
    plain[0].attribute.extend(AttributeProto(name=a, ref_attr_name=a, type=kind) for a, kind in PLAIN.items())
    operands, lengths = ["Q", "K", "V", "attn_mask"], ["query_lengths", "kv_lengths"]
    return [
        _function("TRT_KVCacheUpdate", ["past_cache", "update", "write_indices"], update, UPDATE),
        _function("TRT_Attention", [*operands, *lengths], attention, ATTENTION),
        _function("TRT_QuantizedAttention", [*operands, "share_scale", *lengths], _quantised(), QUANTISED),
        _function("Attention", operands, plain, [*PLAIN, "TRT_decomposable"]),
    ]


def _quantised() -> list[NodeProto]:
    """softmax(Q K^T) over the valid rows, rounded to e4m3 at share_scale, times V.

    Q [1, heads * g, n, d], K and V [1, heads, rows, d]: each head of K and V serves g heads of Q.
    """
    n = helper.make_node
    return [
        n("Constant", [], ["one"], value_ints=[1]),
        n("Constant", [], ["rest"], value_ints=[-1]),
        n("Shape", ["K"], ["heads"], start=1, end=2),
        n("Shape", ["K"], ["d"], start=3, end=4),
        n("Concat", ["one", "heads", "rest", "d"], ["by_keys"], axis=0),  # [1, heads, g * n, d], the same bytes
        n("Reshape", ["Q", "by_keys"], ["queries"]),
        n("Transpose", ["K"], ["keys"], perm=[0, 1, 3, 2]),
        n("MatMul", ["queries", "keys"], ["scores"]),
        n("Constant", [], ["zero"], value_int=0),
        n("Constant", [], ["step"], value_int=1),
        n("Shape", ["K"], ["rows"], start=2, end=3),
        n("Squeeze", ["rows"], ["end"]),
        n("Range", ["zero", "end", "step"], ["row"]),
        n("Cast", ["kv_lengths"], ["valid"], to=TensorProto.INT64),
        n("Less", ["row", "valid"], ["seen"]),
        n("Constant", [], ["never"], value_float=float("-inf")),
        n("CastLike", ["never", "scores"], ["hidden"]),
        n("Where", ["seen", "scores", "hidden"], ["masked"]),
        n("Softmax", ["masked"], ["shares"], axis=-1),
        n("QuantizeLinear", ["shares", "share_scale"], ["rounded"], output_dtype=FP8),
        n("DequantizeLinear", ["rounded", "share_scale"], ["near"]),
        n("MatMul", ["near", "V"], ["sum"]),
        n("Shape", ["Q"], ["by_queries"]),
        n("Reshape", ["sum", "by_queries"], ["Y"]),
    ]


def _function(name: str, inputs: list[str], nodes: list[NodeProto], attributes: Iterable[str]) -> FunctionProto:
    return helper.make_function(
        TRT_DOMAIN, name, inputs, ["Y"], nodes, [helper.make_opsetid("", OPSET)], attributes=list(attributes)
    )
