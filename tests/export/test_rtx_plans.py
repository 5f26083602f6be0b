"""The real library of TensorRT for RTX (extra `rtx`) parses and builds without a GPU. Running a plan needs one.

It reads the same spelling as TensorRT 11, so it takes the place of a stand-in wherever parser and builder can tell.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from spelled import PROMPT
from test_tensorrt import ROOT, RTX_ONLY, attributes
from torch import Tensor, nn

import engine
import export.__main__
from engine.bundles import tensorrt as tensorrt_stages
from engine.bundles.manifest import read_manifest
from engine.bundles.stages import NotHere
from engine.loader import assemble, load_bundle
from engine.model.transformer import WanTransformer
from engine.presets import find_preset
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline
from export import compilers
from export.eight_bits import Calibration, Recipe, quantize
from export.graphs import Graph, _transformers, stage_graphs
from export.onnx_graph import OnnxGraph, to_onnx
from export.program import trace
from export.tensorrt import build as build_module
from export.tensorrt.build import ADA_ON, AMPERE, BuildOptions, build_plan
from export.tensorrt.spelling import spell_for_tensorrt
from export.write import write_bundle

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (extra rtx)")
ADA, BLACKWELL = (89,), (120,)


class Log(rtx.ILogger):
    """The process's one logger: the library keeps the first."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append((severity.name, message))


@pytest.fixture(scope="module", autouse=True)
def log() -> Iterator[Log]:
    """Takes what the product's own logger would print."""
    made = Log()
    patch = pytest.MonkeyPatch()
    for module in (tensorrt_stages, build_module):
        patch.setattr(module, "logger_of", lambda trt: made)
    yield made
    patch.undo()


@dataclass(frozen=True)
class Layer:
    """A layer of a plan, as the builder's log tells it: names and types of what it reads and writes."""

    name: str
    reads: dict[str, str]
    writes: dict[str, str]
    elements: int  # of its largest output

    @property
    def attention(self) -> bool:
        return "_mha_" in self.name


@dataclass(frozen=True)
class Built:
    plan: bytes | None
    layers: list[Layer]
    refusal: str


_TENSOR = re.compile(r"\{ Name: ([^,]+), Dimensions: \[([\d,]*)\].*?Datatype: (\w+)")


def _layer(line: str) -> Layer:
    name, (before, after) = line.split("Name: ")[1].split(",")[0], line.split("Outputs: ")
    written = _TENSOR.findall(after)
    sizes = [torch.Size(map(int, filter(None, dims.split(",")))).numel() for _, dims, _ in written]
    sides = ({name: kind for name, _, kind in _TENSOR.findall(side)} for side in (before, after))
    return Layer(name, *sides, max(sizes, default=0))


def parsed(model: ModelProto, weights: dict[str, Tensor], log: Log) -> tuple[Any, Any]:
    """(builder, network) of a graph that the parser reads."""
    builder = rtx.Builder(log)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, log)
    assert parser.load_model_proto(model.SerializeToString())
    assert all(parser.load_initializer(name, x.data_ptr(), x.nbytes) for name, x in weights.items())
    assert parser.parse_model_proto(), parser.get_error(0).desc()
    return builder, network


def build(model: ModelProto, weights: dict[str, Tensor], gpus: tuple[int, ...], log: Log) -> Built:
    """As build_plan, with the log that tells the layers."""
    builder, network = parsed(model, weights, log)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(gpus)
    for number, gpu in enumerate(gpus):
        config.set_compute_capability(getattr(rtx.ComputeCapability, f"SM{gpu}"), number)
    config.clear_flag(rtx.BuilderFlag.TF32)
    config.profiling_verbosity = rtx.ProfilingVerbosity.DETAILED
    log.lines.clear()
    plan = builder.build_serialized_network(network, config)
    lines = [line for _, text in log.lines for line in text.splitlines() if "LayerType: " in line]
    refusal = next((text for severity, text in log.lines if severity == "ERROR"), "")
    return Built(plan and bytes(plan), list(map(_layer, lines)), refusal)


def spelled(graph: Graph, **options: Any) -> tuple[OnnxGraph, dict[str, Tensor]]:
    """A graph for TensorRT, and its weights."""
    made = to_onnx(replace(graph, module=trace(graph).traced), partial(spell_for_tensorrt, **options))
    return made, {name: compilers._tensor(value) for name, value in made.weights.items()}


def wide(preset: str, fp8: bool = False) -> Pipeline:
    """Transformers whose shapes have kernels of their own: 2 layers of 2 heads of 64, 15 tokens a frame, in bf16."""
    chosen, models = find_preset(preset), {}
    config = replace(engine.load().config, num_layers=2, num_attention_heads=2, attention_head_dim=64, ffn_dim=256)
    for role in engine.generators.family_of(chosen).roles():
        models[role] = WanTransformer(config, engine.generators.family_of(chosen).conditioned(role)).bfloat16()
        for parameter in models[role].parameters():
            nn.init.normal_(parameter, std=0.05)
        models[role].eval().requires_grad_(False)
    made = assemble(TorchStages(models, None, None), config, chosen, torch.bfloat16, torch.device("cpu"),
                    height=48, width=80, tokenizer=engine.load().tokenizer)  # fmt: skip
    if not fp8:
        return made
    names = [f"{role}.{name}" for role, model in models.items() for name in linears(model)]
    return quantize(made, Recipe("tensor"), Calibration(dict.fromkeys(names, 4.0)))


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.fixture(scope="module")
def passes() -> Callable[..., dict[str, Graph]]:
    """(preset, fp8) -> its transformers' passes at `wide`."""

    @cache
    def make(preset: str = "greedy", fp8: bool = False) -> dict[str, Graph]:
        pipeline = wide(preset, fp8)
        stages = pipeline.stages
        assert isinstance(stages, TorchStages)
        return {graph.name: graph for graph in _transformers(pipeline, stages.models, False)}

    return make


PRESETS = ["greedy", "self-forcing", "self-forcing-framewise", "causvid", "causal-forcing", "diagonal", "longlive"]


@pytest.mark.parametrize(
    ("preset", "gpus"),
    [("greedy", ADA), *(pytest.param(*case, marks=pytest.mark.thorough)
                        for case in (("greedy", BLACKWELL), *((preset, ADA_ON) for preset in PRESETS)))],
)  # fmt: skip
def test_attention_reads_caches_where_they_lie(preset: str, gpus: tuple[int, ...], passes: Any, log: Log) -> None:
    """Each cache is read by the kernel that writes a chunk's rows into it, and by attention; nothing copies it."""
    for graph in passes(preset).values():
        model, weights = spelled(graph)
        built = build(model.model, weights, gpus, log)
        assert built.plan, (graph.name, built.refusal)
        for output, given in graph.aliases.items():
            readers = [layer for layer in built.layers if {output, given} & layer.reads.keys()]
            assert sorted(layer.attention for layer in readers) == [False, True], (graph.name, output, readers)
            writer = next(layer for layer in readers if not layer.attention)
            assert output in writer.writes
            assert not {name for name in writer.writes if name[:2] in ("k_", "v_")} - graph.aliases.keys()


@pytest.mark.thorough
def test_the_builder_is_what_grouping_and_the_unread_output_are_for(passes: Any, log: Log) -> None:
    """Without either, it copies each cache in front of attention. If this fails, the spelling can be simpler."""
    graph = passes()["etm"]

    def copies(**options: Any) -> int:
        model, weights = spelled(graph, **options)
        unread = [output for output in model.model.graph.output if output.name.startswith(tensorrt_stages.UNREAD)]
        for output in unread if options.get("grouped") is None else []:
            model.model.graph.output.remove(output)
        built = build(model.model, weights, ADA_ON, log)
        return sum(not x.attention and not graph.aliases.keys() & x.writes.keys() for x in built.layers
                   if graph.aliases.keys() & x.reads.keys())  # fmt: skip

    assert copies(grouped=False) == copies() == 4  # keys and values of two layers
    assert copies(grouped=True) == 0


@pytest.mark.thorough
def test_caches_are_updated_in_place(passes: Any, log: Log) -> None:
    """The network's own layers: the output that each has in common with an input is the one the manifest tells."""
    for options in ({}, {"grouped": False}, {"attention": "native_fp8"}):
        for graph in passes().values():
            model, weights = spelled(graph, **options)
            _, network = parsed(model.model, weights, log)
            layers = [network.get_layer(number) for number in range(network.num_layers)]
            updates = [layer for layer in layers if layer.type == rtx.LayerType.KV_CACHE_UPDATE]
            assert {x.get_output(0).name: x.get_input(0).name for x in updates} == graph.aliases


@pytest.mark.parametrize("gpus", [ADA, pytest.param(BLACKWELL, marks=pytest.mark.thorough), ADA_ON])
def test_fp8_products_and_attention(gpus: tuple[int, ...], passes: Any, log: Log) -> None:
    """Every large product of a block reads e4m3; native_fp8 reads each cache once, rounds it, and attends on e4m3."""
    graph = passes("greedy", True)["sdd"]
    for attention in ("native", "native_fp8"):
        model, weights = spelled(graph, attention=attention)
        linears = sum(node.op_type == "MatMul" and node.input[1].endswith("_w") for node in model.model.graph.node)
        assert linears == 2 * 8  # qkv in one, or q, k and v; out; q and out of the text's attention; two of the FFN
        built = build(model.model, weights, gpus, log)
        assert built.plan, built.refusal
        fp8 = [x for x in built.layers if "FP8" in x.reads.values()]
        attends = [x for x in fp8 if x.attention]
        assert len(attends) == (2 if attention == "native_fp8" else 0)
        assert len([x for x in built.layers if x.attention]) == 4
        assert linears - 4 <= len(fp8) - len(attends) <= linears  # q, k and v of a layer may be one product
        if attention == "native_fp8":
            for output in graph.aliases:
                others = [x for x in built.layers if output in x.reads and output not in x.writes]
                assert [set(x.writes.values()) for x in others] == [{"FP8"}]


def test_without_the_attribute_float32_has_no_plan(pipeline: Pipeline, log: Log) -> None:
    graph = next(g for g in stage_graphs(engine.load()) if g.name == "vae_first")
    model, weights = spelled(graph)
    for node in model.model.graph.node:
        kept = [a for a in node.attribute if a.name != "TRT_decomposable"]
        del node.attribute[:]
        node.attribute.extend(kept)
    built = build(model.model, weights, ADA, log)
    assert built.plan is None
    assert "not supported by a dedicated kernel" in built.refusal


def one_node(name: str, **attributes: Any) -> bytes:
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[2])
    node = helper.make_node(name, ["x"], ["y"], **attributes)
    graph = helper.make_graph([node], "g", [value("x")], [value("y")])
    domains = [helper.make_opsetid("", 24), helper.make_opsetid("nobody", 1)]
    return helper.make_model(graph, opset_imports=domains).SerializeToString()


def test_refusals_in_the_parsers_own_words() -> None:
    for_ada = partial(build_plan, options=BuildOptions(), package="tensorrt_rtx", gpus=ADA)
    assert for_ada(one_node("Relu"), {})[:4] == b"vtrt"
    with pytest.raises(ValueError, match=r"parser refuses, expected one it reads \(Unheard: .*"):
        for_ada(one_node("Unheard", domain="nobody"), {})
    with pytest.raises(ValueError, match="expected it contiguous on cpu"):
        for_ada(one_node("Relu"), {"w": torch.ones(2, 3).t()})


def test_timing_caches_and_levels(tmp_path: Path) -> None:
    for level in (0, 5):
        options = BuildOptions(level=level, timing_cache=tmp_path / "timings")
        assert build_plan(one_node("Relu"), {}, options, "tensorrt_rtx", ADA)[:4] == b"vtrt"
        assert (tmp_path / "timings").stat().st_size > 0
    for content in (b"a diary", b"\0" * 200):
        (tmp_path / "diary").write_bytes(content)
        with pytest.raises(ValueError, match=r"diary: got no timing cache of this TensorRT and GPU, expected one"):
            build_plan(one_node("Relu"), {}, BuildOptions(timing_cache=tmp_path / "diary"), "tensorrt_rtx", ADA)
        assert (tmp_path / "diary").read_bytes() == content
    with pytest.raises(ValueError, match="got level 6"):
        BuildOptions(level=6)


@pytest.mark.parametrize(
    "file", ["engine/bundles/tensorrt_rtx.py", "engine/bundles/tensorrt.py", "export/tensorrt/build.py"]
)
def test_every_name_is_the_packages(file: str) -> None:
    """Names that this package shares with TensorRT 11 are asked here too."""
    classes = {
        "builder": rtx.Builder, "network": rtx.INetworkDefinition, "parser": rtx.OnnxParser, "runtime": rtx.Runtime,
        "engine": rtx.ICudaEngine, "context": rtx.IExecutionContext, "refitter": rtx.Refitter,
        "timings": rtx.ITimingCache, "cache": rtx.IRuntimeCache, "errors": rtx.ParserError,
        "config": rtx.IRuntimeConfig if file.endswith("_rtx.py") else rtx.IBuilderConfig,
    }  # fmt: skip
    only_11 = {"PREFER_AOT_PYTHON_PLUGINS"}
    checked = 0
    for parts, line in attributes(ast.parse((ROOT / file).read_text())):
        parts = parts[1:] if parts[0] == "self" else parts
        owner = rtx if parts[0] == "trt" else classes.get(parts[0])
        for name in parts[1:] if owner is rtx else parts[1:2]:
            if owner is None or name in only_11 or name.startswith("__"):
                break
            assert hasattr(owner, name), (file, line, parts)
            owner, checked = getattr(owner, name) if owner is rtx else None, checked + 1
            if not isinstance(owner, type):
                break
    assert checked >= 5
    assert all(hasattr(rtx, name) or hasattr(rtx.IBuilderConfig, name) for name in RTX_ONLY)


def test_gpus_by_generation() -> None:
    assert BuildOptions().generations(fp8=False) == [(89, 120, 121), (80, 86)]
    assert BuildOptions().generations(fp8=True) == [(89, 120, 121)]
    assert BuildOptions(gpu=(120, 86)).generations(fp8=False) == [(120,), (86,)]
    known = {int(name[2:]) for name in rtx.ComputeCapability.__members__ if name[2:].isdigit()}
    assert {*AMPERE, *ADA_ON} <= known
    assert 90 not in known
    for gpus, said in [((90,), "got 90 which"), ((89, 89), "got 89 twice"), ((0,), "got 0 which")]:
        with pytest.raises(ValueError, match=said):
            BuildOptions(gpu=gpus)
    with pytest.raises(ValueError, match="got 86 with FP8, expected one of 89, 120, 121"):
        BuildOptions(gpu=(89, 86)).generations(fp8=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--gpu", "90"],
            "--gpu: got 90 which TensorRT for RTX does not know, expected each once of 80, 86, 89, 120, 121",
        ),
        (["--gpu", "89", "--backend", "onnx"], "--gpu: got 89 for onnx, expected --backend tensorrt_rtx with it"),
        (["--attention", "native_fp8", "--backend", "tensorrt_rtx"], "got native_fp8 with --precision fp32"),
        (["--attention", "plugin", "--backend", "tensorrt_rtx"], "got attention plugin, expected native or native_fp8"),
        (["--strip", "--backend", "tensorrt_rtx"], "got --strip without a GPU, expected one"),
        (["--gpu", "eight", "--backend", "tensorrt_rtx"], "eight"),
    ],
)
def test_bad_requests_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = export.__main__.main([*words, "--out", str(tmp_path / "b")])
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_the_embedded_model_for_all_gpus_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """float32, for which TensorRT has no attention kernel of its own."""
    folder, whole = tmp_path / "bundle", engine.load()
    assert whole.tokenizer is not None
    backends = ("tensorrt_rtx", "onnx")
    lines = list(write_bundle(whole, folder, whole.tokenizer.path, PROMPT, backends=backends))
    keys = ["tensorrt_rtx-cuda-sm89_sm120_sm121", "tensorrt_rtx-cuda-sm80_sm86"]
    manifest = read_manifest(folder)
    assert list(manifest.backends) == [*keys, "onnx-cpu"]
    assert manifest.backends[keys[0]].versions["tensorrt_rtx"] == rtx.__version__
    for key in keys:
        for name, spec in manifest.backends[key].graphs.items():
            assert (folder / spec.file).read_bytes()[:4] == b"vtrt", name
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: which of the plans run depends on it")
    assert sum("not replayed: tensorrt_rtx: got no GPU, expected one that" in line for line in lines) == 2
    chosen = load_bundle(folder)
    assert chosen.stages.name == "onnx"  # the first that runs here
    assert [note for note in chosen.notes if " does not open here: tensorrt_rtx: got no GPU" in note]
    with pytest.raises(NotHere, match=r"^tensorrt_rtx: got no GPU, expected one that its plans are for$"):
        load_bundle(folder, "tensorrt_rtx")
    assert export.__main__.main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("golden frames not replayed: tensorrt_rtx: got no GPU") == 2
    assert "onnx-cpu: hashes good, golden frames at most" in said
    assert export.__main__.main(["verify", str(folder), "--backend", "tensorrt_rtx"]) == 2
    assert export.__main__.main(["inspect", str(folder)]) == 0
    assert f"{keys[1]}: tensorrt_rtx {rtx.__version__}, torch" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_embedded_model_in_fp8(tmp_path: Path) -> None:
    words = ["--precision", "fp8", "--attention", "native_fp8", "--gpu", "89", "--out", str(tmp_path / "bundle")]
    words += ["--backend", "tensorrt_rtx"]
    assert export.__main__.main(words) == 0
    assert list(read_manifest(tmp_path / "bundle").backends) == ["tensorrt_rtx-cuda-sm89"]
