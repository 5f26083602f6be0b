"""TensorRT 11 without TensorRT 11: every name against the published API, and the runtime driven by a stand-in
(support/stand_in_tensorrt.py). Parser and builder: test_rtx_plans.py; what graphs compute: test_tensorrt_spelling.py.
"""

import ast
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import stand_in_tensorrt
import torch
from spelled import PROMPT, Made, inputs_of, relative, shown, stage
from torch import Tensor

import export.__main__
from engine.bundles import tensorrt as tensorrt_stages
from engine.bundles.manifest import ROW_INPUTS, VERSION, GraphSpec, read_manifest
from engine.bundles.stages import GraphStages, NotHere
from engine.bundles.tensorrt import TensorrtGraph, require_tensorrt
from engine.loader import load_bundle
from engine.stream import Pipeline
from export import compilers
from export.graphs import Graph
from export.onnx_graph import OnnxGraph
from export.program import trace
from export.tensorrt.build import BuildOptions, build_plan
from export.tensorrt.plugins import register_plugins
from export.write import write_bundle

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
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
@pytest.mark.thorough
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
