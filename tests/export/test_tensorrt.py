"""TensorRT 11 without TensorRT 11: every name against the published API, every graph through its ONNX bodies, and the
runtime driven by a stand-in (support/stand_in_tensorrt.py). Parser and builder: tests/export/test_rtx_plans.py."""

import ast
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import stand_in_tensorrt
import torch
from torch import Tensor

import engine
import export.__main__
from engine.bundles import tensorrt as tensorrt_stages
from engine.bundles.manifest import ROW_INPUTS, VERSION, GraphSpec, read_manifest
from engine.bundles.onnx import _ort_value
from engine.bundles.stages import GraphStages, NotHere
from engine.bundles.tensorrt import TensorrtGraph, require_tensorrt
from engine.loader import load_bundle
from engine.stream import Pipeline
from export import compilers
from export.calibrate import calibrate
from export.fp8 import Recipe, quantize
from export.graphs import Graph, stage_graphs
from export.onnx_graph import OnnxGraph, to_onnx
from export.program import trace
from export.tensorrt.build import BuildOptions, build_plan
from export.tensorrt.plugins import register_plugins
from export.tensorrt.spelling import spell_for_tensorrt
from export.write import write_bundle

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
PROMPT = "a red circle moving right on a gray background"
NAMES = stand_in_tensorrt.NAMES
# Variables of these names hold objects of these published classes, in every file that talks to TensorRT.
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig", "parser": "OnnxParser",
    "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext", "refitter": "Refitter",
    "timings": "ITimingCache", "errors": "ParserError", "params": "KernelLaunchParams",
}  # fmt: skip
FILES = {"engine/bundles/tensorrt.py": 12, "export/tensorrt/build.py": 15, "export/tensorrt/plugins.py": 10}
# Of TensorRT for RTX alone: test_rtx_plans.py asks that package itself.
RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}


def attributes(tree: ast.AST) -> list[tuple[list[str], int]]:
    """Every dotted name, outermost first, with its line: trt.BuilderFlag.TF32 -> [trt, BuilderFlag, TF32]."""
    found = []
    for node in ast.walk(tree):
        parts: list[str] = []
        line = getattr(node, "lineno", 0)
        while isinstance(node, ast.Attribute | ast.Subscript):
            if isinstance(node, ast.Attribute):
                parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and parts:
            found.append(([node.id, *parts], line))
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_name_is_published(file: str) -> None:
    checked = 0
    for parts, line in attributes(ast.parse((ROOT / file).read_text())):
        parts = parts[1:] if parts[0] == "self" else parts
        if len(parts) > 1 and parts[1] in RTX_ONLY:
            continue
        if len(parts) > 1 and parts[0] == "trt" and not parts[1].startswith("__"):
            assert parts[1] in NAMES, (file, line, parts)
            assert len(parts) == 2 or parts[2] in NAMES[parts[1]]["members"], (file, line, parts)
            checked += 1
        elif len(parts) > 1 and parts[0] in CLASSES:
            assert parts[1] in NAMES[CLASSES[parts[0]]]["members"], (file, line, parts)
            checked += 1
        elif len(parts) > 1 and parts[0] == "trtp":
            assert parts[1] in stand_in_tensorrt.PLUGIN_NAMES, (file, line, parts)
            checked += 1
    assert checked >= FILES[file]
    assert tensorrt_stages._TYPES.keys() <= set(NAMES["DataType"]["members"])


def test_the_walk_finds_unpublished_names() -> None:
    tree = ast.parse("self.context.enqueue_v2(1); trt.BuilderFlag.FP16; errors[0].desc()")
    names = [parts for parts, _ in attributes(tree)]
    assert ["self", "context", "enqueue_v2"] in names
    assert "enqueue_v2" not in NAMES["IExecutionContext"]["members"]
    assert ["trt", "BuilderFlag", "FP16"] in names
    assert "FP16" not in NAMES["BuilderFlag"]["members"]
    assert ["errors", "desc"] in names


@pytest.fixture(scope="module")
def fp8(pipeline: Pipeline) -> Pipeline:
    return quantize(pipeline, Recipe("tensor"), calibrate(pipeline, [PROMPT], chunks=4))


def stage(pipeline: Pipeline, name: str) -> Graph:
    return next(graph for graph in stage_graphs(pipeline) if graph.name == name)


Made = Callable[..., tuple[Graph, OnnxGraph]]


@pytest.fixture(scope="module")
def made(pipeline: Pipeline, fp8: Pipeline) -> Made:
    """(stage, precision, attention) -> the stage and its graph for TensorRT; each exported once."""

    @cache
    def make(name: str, precision: str, attention: str = "native") -> tuple[Graph, OnnxGraph]:
        graph = stage(fp8 if precision == "fp8" else pipeline, name)
        return graph, to_onnx(graph, partial(spell_for_tensorrt, attention=attention))

    return make


def inputs_of(graph: Graph, seed: int, slot: int = 0, valid: int = 1) -> dict[str, Tensor]:
    """Random ones; the chunk goes to `slot` of the ring, `valid` chunks are then valid."""
    torch.manual_seed(seed)
    made = {n: torch.randn_like(x) if x.is_floating_point() else x.clone() for n, x in graph.inputs.items()}
    rows = graph.inputs["rope_cos"].shape[0]
    if "t" in made:
        made["t"] = torch.tensor([937.5])
    return made | {"start_row": torch.tensor([slot * rows]), "valid_rows": torch.tensor([valid * rows])}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.flatten().double() - expected.flatten().double()).norm() / expected.double().norm())


def by_heads(cache: Tensor, shape: list[int]) -> Tensor:
    """A cache [1, rows, dim] as the graph has it, [1, heads, rows, d]; others reshaped."""
    if cache.ndim == 3 and len(shape) == 4 and shape[1] > 1:
        return cache.reshape(1, shape[2], shape[1], shape[3]).transpose(1, 2).contiguous()
    return cache.reshape(shape)


def stored(cache: Tensor, heads: int = 2) -> Tensor:
    """A cache [1, rows, dim] in the bytes that a plan keeps in that memory: by heads."""
    return cache.unflatten(2, (heads, -1)).transpose(1, 2).reshape(cache.shape)


def shown(cache: Tensor, heads: int = 2) -> Tensor:
    """The inverse of `stored`."""
    return by_rows(cache.reshape(1, heads, cache.shape[1], -1))


def by_rows(cache: Tensor) -> Tensor:
    """A cache [1, heads, rows, d] as the engine has it, [1, rows, dim]."""
    return cache.transpose(1, 2).flatten(2) if cache.ndim == 4 else cache


def run_onnx(made: OnnxGraph, inputs: dict[str, Tensor], outputs: list[str]) -> list[Tensor]:
    """In ONNX Runtime, which knows none of the TRT_ operators and takes their bodies. Caches [1, rows, dim]."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    kept = [_ort_value(ort, compilers._tensor(value)) for value in made.weights.values()]
    options.add_external_initializers(list(made.weights), kept)
    session = ort.InferenceSession(made.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    given = {name: by_heads(value, shapes[name]).numpy() for name, value in inputs.items()}
    made_of = dict(zip(outputs, session.run(outputs, given), strict=True))
    caches = {name for name in outputs if name[:2] in ("k_", "v_")}
    return [by_rows(torch.from_numpy(x)) if name in caches else torch.from_numpy(x) for name, x in made_of.items()]


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


@pytest.mark.parametrize("attention", ["native", "native_fp8"])
def test_grouped_queries_compute_the_same(attention: str) -> None:
    """In 16 bits each head's queries enter as several heads. e4m3 operands: within their rounding, of 2^-4."""
    half = engine.load(precision="fp16")
    graph = stage(half, "etm")
    spelled = to_onnx(graph, partial(spell_for_tensorrt, attention=attention))
    plain = to_onnx(graph, partial(spell_for_tensorrt, grouped=False))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in spelled.model.graph.output}
    unread = [name for name in shapes if name.startswith(tensorrt_stages.UNREAD)]
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


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """TensorRT and CUDA graphs replaced; counts what would be recorded and replayed."""
    counts = {"captured": 0, "replayed": 0}

    def capture(enqueue):
        """As a CUDA graph does: the addresses of this moment are replayed, whatever is bound later."""
        context, counts["captured"] = enqueue.__self__.context, counts["captured"] + 1
        recorded = dict(context._addresses)

        def replay() -> None:
            counts["replayed"] += 1
            bound, context._addresses = context._addresses, recorded
            enqueue()
            context._addresses = bound

        return replay

    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt.module())
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", stand_in_tensorrt.plugin_module())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(stand_in_tensorrt, "PLUGINS", {})
    register_plugins.cache_clear()
    monkeypatch.setattr(tensorrt_stages, "_stream", lambda device: 0)
    monkeypatch.setattr(tensorrt_stages, "_capture", capture)
    monkeypatch.setattr(tensorrt_stages, "target_of", lambda device: "cpu-standin")
    tensorrt_stages.logger_of.cache_clear()
    return counts


def built(spelled: OnnxGraph, options: BuildOptions) -> tuple[bytes, dict[str, Tensor]]:
    weights = {name: compilers._tensor(value) for name, value in spelled.weights.items()}
    return build_plan(spelled.model.SerializeToString(), weights, options), weights


def opened(
    graph: Graph, spelled: OnnxGraph, file: Path, strip: bool = False, attention: str = "native"
) -> TensorrtGraph:
    """Built, written, loaded again: as a bundle would."""
    plan, weights = built(spelled, BuildOptions(attention, strip=strip))
    file.write_bytes(plan)
    program = trace(graph)
    spec = GraphSpec(
        file=file.name, inputs=program.inputs, outputs=program.outputs, aliases=graph.aliases, weights={}
    )  # fmt: skip
    return TensorrtGraph(graph.name, file, spec, weights if strip else {}, runtime(), CPU, require_tensorrt())


def runtime() -> Any:
    trt = require_tensorrt()
    return trt.Runtime(tensorrt_stages.logger_of(trt))


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_plans_run_where_the_caches_lie(precision: str, made: Made, stand_in: dict[str, int], tmp_path: Path) -> None:
    """Two streams take turns on one plan: recordings are made once for each, caches change in place."""
    graph, spelled = made("sdd", precision)
    plan = opened(graph, spelled, tmp_path / "sdd.plan")
    caches = [{n: x for n, x in inputs_of(graph, 5 + i).items() if n in graph.aliases.values()} for i in (0, 1)]
    text = {n: x for n, x in inputs_of(graph, 7).items() if n.startswith("text_")}
    flows = []
    for step in range(6):
        inputs = inputs_of(graph, step, step % 3, min(step + 1, 3)) | text | caches[step % 2]
        before = {n: shown(x) if n in graph.aliases.values() else x.clone() for n, x in inputs.items()}
        with torch.no_grad():
            expected = dict(zip(graph.outputs, graph.module(*before.values()), strict=True))
        got = plan(inputs)
        flows.append((got["flow"], expected["flow"]))
        for output, given in graph.aliases.items():
            assert got[output].data_ptr() == inputs[given].data_ptr()
            assert relative(shown(inputs[given]), expected[output]) <= 1e-5
    assert all(relative(*pair) <= 1e-5 for pair in flows)  # results outlive the next calls
    assert stand_in == {"captured": 2, "replayed": 4}


def test_stripped_plans_are_completed(made: Made, stand_in: dict[str, int], tmp_path: Path) -> None:
    graph, spelled = made("etm", "fp32")
    whole = opened(graph, spelled, tmp_path / "whole.plan")
    plan = opened(graph, spelled, tmp_path / "bare.plan", strip=True)
    assert (tmp_path / "bare.plan").stat().st_size < (tmp_path / "whole.plan").stat().st_size - 10_000
    inputs = inputs_of(graph, 0)
    again = {name: value.clone() for name, value in inputs.items()}
    assert torch.equal(plan(inputs)["hidden"], whole(again)["hidden"])


def test_graphs_without_caches_get_new_tensors(made: Made, stand_in: dict[str, int], tmp_path: Path) -> None:
    graph, spelled = made("prepare_text_etm", "fp32")
    plan = opened(graph, spelled, tmp_path / "text.plan")
    first, second = plan(graph.inputs), plan(graph.inputs)
    assert first["text_k"].data_ptr() != second["text_k"].data_ptr()
    with torch.no_grad():
        expected = dict(zip(graph.outputs, graph.module(*graph.inputs.values()), strict=True))
    assert all(relative(second[name], value) <= 1e-5 for name, value in expected.items())
    assert stand_in["captured"] == 0


@pytest.mark.slow
def test_a_bundle_streams_as_torch_does(
    pipeline: Pipeline, model_dir: Path, stand_in: dict[str, int], tmp_path: Path
) -> None:
    """The whole loop on plans: 12 chunks are past the ETM's window, its ring gone round."""
    lines = list(write_bundle(pipeline, tmp_path / "bundle", model_dir / "tokenizer", PROMPT, backends=("tensorrt",)))
    assert any("at most 0" in line or "at most 1" in line for line in lines)
    manifest = read_manifest(tmp_path / "bundle")
    assert list(manifest.backends) == ["tensorrt-cpu-standin"]
    other = load_bundle(tmp_path / "bundle")
    assert other.stages.name == "tensorrt"
    with pipeline.stream(PROMPT, seed=3) as a, other.stream(PROMPT, seed=3) as b:
        apart = [np.abs(a.next_chunk().astype(int) - b.next_chunk()).max() for _ in range(12)]
    assert max(apart) <= 2
    assert stand_in["captured"] == 2 * 3  # etm, sdd_context, sdd, for the golden frames and for this stream
    plan = tmp_path / "bundle" / "graphs" / "tensorrt-cpu-standin" / "etm.plan"
    content = bytearray(plan.read_bytes())
    content[-1] ^= 1
    plan.write_bytes(content)
    with pytest.raises(ValueError, match="sha256"):  # a plan is code
        load_bundle(tmp_path / "bundle")


def test_what_plans_must_agree_on(made: Made, stand_in: dict[str, int], tmp_path: Path) -> None:
    graph, spelled = made("etm", "fp32")
    file = tmp_path / "etm.plan"
    plan = opened(graph, spelled, file)

    def load(spec: GraphSpec, weights: dict[str, Tensor]) -> TensorrtGraph:
        return TensorrtGraph("etm", file, spec, weights, runtime(), CPU, require_tensorrt())

    shorter = [i.model_copy(update={"shape": [1, 2]}) if i.name == "k_0" else i for i in plan.spec.inputs]
    with pytest.raises(ValueError, match=r"k_0: got .* in the manifest"):
        load(plan.spec.model_copy(update={"inputs": shorter}), {})
    with pytest.raises(ValueError, match="k_0_out: got 'k_1' at its address"):
        load(plan.spec.model_copy(update={"aliases": plan.spec.aliases | {"k_0_out": "k_1"}}), {})
    inputs = inputs_of(graph, 0)
    with pytest.raises(ValueError, match="expected contiguous"):
        plan(inputs | {"k_0": inputs["k_0"].transpose(1, 2).contiguous().transpose(1, 2)})
    opened(graph, spelled, file, strip=True)
    with pytest.raises(ValueError, match="got no weight"):
        load(plan.spec, {"other": torch.ones(1)})
    file.write_bytes(b"made by another version")
    with pytest.raises(NotHere, match="got a plan that does not load"):
        load(plan.spec, {})


def test_other_versions_are_not_tried(stand_in: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.9.0")
    with pytest.raises(NotHere, match=r"got version 10\.9\.0, expected 11"):
        require_tensorrt()


def test_without_tensorrt_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "tensorrt" in sys.modules:
        pytest.skip("tensorrt is installed here")
    assert export.__main__.main(["--backend", "tensorrt", "--out", str(tmp_path / "b")]) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1] == "error: tensorrt: got no package tensorrt, expected version 11"
    assert list(tmp_path.iterdir()) == []


def test_attention_as_a_plugin(made: Made, stand_in: dict[str, int], tmp_path: Path) -> None:
    """Our kernel's node on caches that TensorRT writes; its body is what the stage computes."""
    graph, spelled = made("sdd", "fp32", "plugin")
    with pytest.raises(ValueError, match="parser refuses"):  # not registered
        built(spelled, BuildOptions())
    plan = opened(graph, spelled, tmp_path / "sdd.plan", attention="plugin")
    inputs = inputs_of(graph, 0, 1, 2)
    with torch.no_grad():
        expected = dict(zip(graph.outputs, graph.module(*(x.clone() for x in inputs.values())), strict=True))
    got = plan(inputs)
    assert all(relative(got[name], value) <= 1e-5 for name, value in expected.items())


class Mixed(GraphStages):
    """Transformers on plans, text and VAE in torch."""

    name = "tensorrt"

    def __init__(self, plans: dict[str, TensorrtGraph], rest: Any, layers: int) -> None:
        self._graphs, self.device, self.layers = plans, torch.device("cpu"), layers
        self.manifest: Any = SimpleNamespace(row_inputs=ROW_INPUTS[VERSION])
        self.backend = SimpleNamespace(graphs={name: plan.spec for name, plan in plans.items()})
        self.encode_text, self.prepare_text = rest.encode_text, rest.prepare_text
        self.vae_first, self.vae_steady, self.named_weights = rest.vae_first, rest.vae_steady, rest.named_weights

    def open_graph(self, name: str, file: Path, spec: GraphSpec) -> TensorrtGraph:
        raise AssertionError


@pytest.mark.slow
def test_fp8_caches_in_the_loop(fp8: Pipeline, stand_in: dict[str, int], tmp_path: Path) -> None:
    """RingCache in e4m3, V transposed, written by the plugins' nodes: 12 chunks, the rings gone round."""
    options, plans = BuildOptions("plugin_fp8"), {}
    compiler = compilers.TensorrtCompiler(options)
    for name in ("etm", "sdd_context", "sdd"):
        program, file = trace(stage(fp8, name)), tmp_path / f"{name}.plan"
        weights = compiler.write(program, file)
        inputs, outputs = compiler.signature(program)
        spec = GraphSpec(
            file=file.name, inputs=inputs, outputs=outputs, aliases=program.graph.aliases, weights={}
        )  # fmt: skip
        plans[name] = TensorrtGraph(name, file, spec, weights, runtime(), CPU, require_tensorrt())
    other = replace(fp8, stages=Mixed(plans, fp8.stages, 2), kv_dtype=torch.float8_e4m3fn)
    with fp8.stream(PROMPT, seed=3) as a, other.stream(PROMPT, seed=3) as b:
        apart = [np.abs(a.next_chunk().astype(int) - b.next_chunk()).mean() for _ in range(12)]
        assert b.state.etm.k.dtype == torch.float8_e4m3fn
        assert b.state.etm.k.float().abs().sum() > 0
    assert 0 < max(apart) < 3
    assert stand_in["captured"] == 3


def test_plugins_and_nodes_agree(made: Made, stand_in: dict[str, int]) -> None:
    """As many inputs and outputs; the written cache is the given one; sizes of what comes out."""
    register_plugins(90)
    nodes = {}
    for attention in ("plugin", "plugin_fp8"):
        model = made("sdd", "fp32", attention)[1].model
        nodes |= {f"greedy::{n.op_type}": n for n in model.graph.node if n.domain == "greedy.plugin"}
        if attention == "plugin_fp8":
            kinds = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.output)}
            assert kinds["k_0"].elem_type == kinds["v_0_out"].elem_type == onnx.TensorProto.FLOAT8E4M3FN
            assert [d.dim_value for d in kinds["v_0"].shape.dim] == [1, 2, 16, 32]  # 18 rows, up to 16's multiple
    assert nodes.keys() == stand_in_tensorrt.PLUGINS.keys()
    for name, plugin in stand_in_tensorrt.PLUGINS.items():
        assert (len(nodes[name].input), len(nodes[name].output)) == (plugin["inputs"], plugin["outputs"]), name
    desc = stand_in_tensorrt.TensorDesc
    cache = desc((1, 18, 32), "e4m3")
    written, *hidden = stand_in_tensorrt.PLUGINS["greedy::write_keys_fp8"]["describe"](cache, None, None, None)
    assert written.alias is cache
    assert len(hidden) == 2
    q = desc((1, 1560, 1536), "bf16")
    made = stand_in_tensorrt.PLUGINS["greedy::ring_attention"]["describe"](q, None, None, None, 12)
    assert [[x.constant_value() for x in d.shape_expr] for d in made] == [
        [1, 1560, 1536], [1, 12, 1560], [16], [16], [25 * 12 * 96], [16],
    ]  # fmt: skip
