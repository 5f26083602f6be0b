"""Every graph in TensorRT's spelling computes what its stage does, by the ONNX bodies of its operators."""

from functools import partial

import numpy as np
import onnx
import pytest
import torch
from spelled import Made, inputs_of, relative, run_onnx, stage

import engine
from engine.bundles.tensorrt import UNREAD
from engine.stream import Pipeline
from export.eight_bits import Recipe, quantize
from export.onnx_graph import OnnxGraph, to_onnx
from export.tensorrt.spelling import spell_for_tensorrt


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("name", ["etm", "sdd"])
def test_bodies_compute_the_stage(name: str, precision: str, made: Made) -> None:
    """The ring in several states. sdd has the time embedding, whose angles are float32 here: hence 1e-5."""
    graph, spelled = made(name, precision)
    for seed, (slot, valid) in enumerate([(0, 1), (1, 2), (2, 3), (0, 3)]):
        inputs = inputs_of(graph, seed, slot, valid)
        with torch.no_grad():
            expected = graph.module(*inputs.values())
        got = run_onnx(spelled, inputs, graph.outputs)
        assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) <= 1e-5


@pytest.mark.parametrize("attention", ["native", pytest.param("native_fp8", marks=pytest.mark.thorough)])
def test_grouped_queries_compute_the_same(attention: str) -> None:
    """In 16 bits each head's queries enter as several heads. e4m3 operands: within their rounding, of 2^-4."""
    half = engine.load(precision="fp16")
    graph = stage(half, "etm")
    spelled = to_onnx(graph, partial(spell_for_tensorrt, attention=attention))
    plain = to_onnx(graph, partial(spell_for_tensorrt, grouped=False))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in spelled.model.graph.output}
    unread = [name for name in shapes if name.startswith(UNREAD)]
    assert unread == ([f"unread_{i}" for i in range(4)] if attention == "native" else [])
    assert all(shapes[name] == [1, 8, 32, 32] for name in unread)  # 4 heads and 64 tokens
    inputs = inputs_of(graph, 0, 1, 2)
    expected = run_onnx(plain, inputs, graph.outputs)
    got = run_onnx(spelled, inputs, graph.outputs)
    assert relative(got[0], expected[0]) <= (2e-3 if attention == "native" else 0.3)
    assert relative(got[1], expected[1]) <= 1e-3  # keys of the first layer: before any attention


def test_attention_on_e4m3_operands() -> None:
    """The body of TRT_QuantizedAttention, alone, against float64 math with the same roundings and with none."""
    from ml_dtypes import float8_e4m3fn

    rng = np.random.default_rng(0)
    heads, n, rows, d, valid = 2, 6, 20, 16, 13
    q, k, v = (rng.standard_normal((1, rows if x else n, heads * d)).astype(np.float32) for x in (0, 1, 1))

    def near(x: np.ndarray, scale: float) -> np.ndarray:
        return (x / np.float32(scale)).astype(float8_e4m3fn).astype(np.float64) * scale

    def by_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[1], heads, d).transpose(1, 0, 2).astype(np.float64)

    def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, rounded: bool) -> np.ndarray:
        scores = q @ k[:, :valid].transpose(0, 2, 1) / d**0.5
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        made = (near(shares, 1 / 448) if rounded else shares) @ v[:, :valid]
        return made.transpose(1, 0, 2).reshape(1, n, heads * d)

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("kv_write", [side, f"{side}_new", "start"], [f"{side}_out"], domain="greedy")
            for side in "kv"
        ]
        + [onnx.helper.make_node("ring_attention", ["q", "k_out", "v_out", "valid"], ["y"], domain="greedy", heads=2)],
        "one",
        [value(name, 1, [1, size, heads * d]) for name, size in
         (("q", n), ("k", rows), ("v", rows), ("k_new", n), ("v_new", n))]
        + [value(name, 7, [1]) for name in ("start", "valid")],
        [value("y", 1, [1, n, heads * d]), *(value(f"{side}_out", 1, [1, rows, heads * d]) for side in "kv")],
        value_info=[value("q", 1, [1, n, heads * d])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, ir_version=11, opset_imports=[onnx.helper.make_opsetid("", 24)])
    spell_for_tensorrt(model, "native_fp8")
    held = {"q": q, "k": k, "v": v, "k_new": k[:, :n], "v_new": v[:, :n]}
    inputs = {name: torch.from_numpy(x.copy()) for name, x in held.items()}
    inputs |= {"start": torch.tensor([0]), "valid": torch.tensor([valid])}
    got = run_onnx(OnnxGraph(model, {}), inputs, ["y", "k_out"])
    exact = attention(by_head(q), by_head(k), by_head(v), rounded=False)
    rounded = attention(*(by_head(near(x, 1.0)) for x in (q, k, v)), rounded=True)
    assert relative(got[0], torch.from_numpy(rounded)) <= 1e-5
    assert 1e-3 < relative(got[0], torch.from_numpy(exact)) <= 2**-4
    assert torch.equal(got[1], inputs["k"])  # the chunk wrote what was there


@pytest.mark.slow
def test_causal_graph_in_chunks_of_three(causal: Pipeline) -> None:
    graph = stage(causal, "dit")
    inputs = inputs_of(graph, 0, 1, 2)
    with torch.no_grad():
        expected = graph.module(*inputs.values())
    got = run_onnx(to_onnx(graph, spell_for_tensorrt), inputs, graph.outputs)
    assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) <= 1e-5


def test_graphs_ask_for_what_tensorrt_has(made: Made) -> None:
    """Caches are inputs and outputs of TRT_KVCacheUpdate themselves, four dimensions; nothing is float64."""
    for precision in ("fp32", "fp8"):
        model = made("sdd", precision)[1].model
        graph = model.graph
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
        updates = [node for node in graph.node if node.op_type == "TRT_KVCacheUpdate"]
        attentions = [node for node in graph.node if node.op_type == "TRT_Attention"]
        assert len(updates) == 2 * len(attentions) == 4
        for node in updates:
            assert shapes[node.input[0]] == shapes[node.output[0]] == [1, 2, 18, 16]
            assert list(node.input[1:]) == [f"{node.output[0]}_rows", "start_row_int32"]
        kinds = [t.data_type for t in graph.initializer] + [v.type.tensor_type.elem_type for v in graph.value_info]
        assert onnx.TensorProto.DOUBLE not in kinds
        assert {f.name for f in model.functions} == {"TRT_KVCacheUpdate", "TRT_Attention", "Attention"}
        assert {node.domain for node in graph.node} == {"", "trt"}
        plain = [node for node in graph.node if node.op_type == "Attention"]
        assert plain
        assert {a.name for node in plain for a in node.attribute} <= {"scale", "TRT_decomposable"}


@pytest.mark.slow
def test_scales_must_be_constants(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="per token, expected per tensor"):
        to_onnx(stage(quantize(pipeline, Recipe("token")), "etm"), spell_for_tensorrt)
