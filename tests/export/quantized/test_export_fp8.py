"""FP8: the operator against _scaled_mm and float64, graphs in ONNX Runtime against the operator, calibration."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from in_runtime import dims, random_inputs, relative, session
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import engine.run
from bench.commands.fp8 import pass_errors, sensitivity
from engine.stream import Pipeline
from export import calibrate
from export.__main__ import main as export_main
from export.calibrate import read_calibration, write_calibration
from export.eight_bits import Calibration, LinearFP8, Recipe, linear_fp8, quantizable, quantize, quantized_as
from export.graphs import Graph, stage_graphs
from export.onnx_graph import OnnxGraph, to_onnx
from kernels.quantize import quantize_per_channel

PROMPT = "a red circle moving right on a gray background"
Graphs = dict[tuple[str, str], tuple[Graph, OnnxGraph]]
TENSOR, TOKEN = Recipe("tensor"), Recipe("token")


@pytest.fixture(scope="module")
def amax(pipeline: Pipeline) -> Calibration:
    return calibrate.calibrate(pipeline, [PROMPT], seeds=(0, 1), chunks=6)


@pytest.fixture(scope="module")
def graphs(pipeline: Pipeline, amax: Calibration) -> Graphs:
    """(granularity, stage) -> the stage and its graph, for both models."""
    made = {}
    for recipe in (TENSOR, TOKEN):
        for graph in stage_graphs(quantize(pipeline, recipe, amax)):
            if graph.name in ("etm", "sdd"):
                made[recipe.activations, graph.name] = graph, to_onnx(graph)
    return made


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_operator_is_scaled_mm(granularity: str) -> None:
    """torch's own FP8 product, row-wise scales, rounds its result to bfloat16 and nothing else."""
    torch.manual_seed(0)
    x, linear = torch.randn(48, 64) * torch.rand(48, 1), nn.Linear(64, 32)
    module = LinearFP8(linear, float(x.abs().max()) if granularity == "tensor" else None)
    scale = x.abs().amax(-1, keepdim=True) / 448 if granularity == "token" else module.input_scale.expand(48, 1)
    rows = (x / scale).to(torch.float8_e4m3fn)
    expected = torch._scaled_mm(
        rows, module.weight.t().contiguous().t(), scale.contiguous(), module.weight_scale[None].contiguous(),
        out_dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.no_grad():
        assert relative(module(x) - linear.bias, expected) < 2**-8


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operator_is_the_product_of_what_is_stored(granularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(96, 40).to(dtype)
    x = (torch.randn(3, 5, 96) * 3).to(dtype)
    module = LinearFP8(linear, 5.0 if granularity == "tensor" else None)  # 5: some inputs are clamped
    scale = module.input_scale if granularity == "tensor" else x.abs().amax(-1, keepdim=True) / 448
    stored = (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    weight = module.weight.double() * module.weight_scale.double()
    expected = stored @ weight + linear.bias.double()
    assert module(x).dtype == dtype
    assert relative(module(x), expected) <= 4 * torch.finfo(dtype).eps


def test_weights_are_rounded_as_the_kernels_round() -> None:
    linear = nn.Linear(32, 16)
    with torch.no_grad():
        linear.weight[3] = 0
    module = LinearFP8(linear, None)
    rows, scale = quantize_per_channel(linear.weight.detach())
    assert torch.equal(module.weight.t().float(), rows.float())
    torch.testing.assert_close(module.weight_scale, scale[:, 0], rtol=1e-6, atol=0)
    error = (module.weight.t().float() * scale - linear.weight).abs()
    assert (error <= linear.weight.abs() * 2**-4 + scale * 2**-10).all()  # half a unit, normal or subnormal


def test_shapes_and_dtypes_are_known_without_running() -> None:
    module = LinearFP8(nn.Linear(32, 16), None)
    given = (torch.randn(4, 32), module.weight, module.weight_scale, None, module.bias)
    torch.library.opcheck(linear_fp8, given, test_utils="test_faketensor")


def test_quantising_leaves_the_pipeline_alone(pipeline: Pipeline) -> None:
    twin = quantize(pipeline, TOKEN)
    assert quantized_as(twin) == "fp8"
    assert quantized_as(pipeline) is None
    ours, theirs = (dict(p.stages.models["sdd"].named_parameters()) for p in (pipeline, twin))
    assert "blocks.0.ffn.net.2.weight" in ours.keys() - theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
    kept = quantize(pipeline, Recipe("token", tuple(quantizable(pipeline)[1:])))
    with pipeline.stream(PROMPT) as a, kept.stream(PROMPT) as b:
        assert np.abs(a.next_chunk().astype(int) - b.next_chunk()).mean() < 3


def test_only_linears_of_the_blocks_are_candidates(pipeline: Pipeline) -> None:
    names = quantizable(pipeline)
    assert len(names) == 2 * 2 * 8  # roles, blocks, q k v out of one attention, q out of the other, two of the ffn
    assert all(".blocks." in name and "norm" not in name for name in names)
    assert not any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in names)


@pytest.mark.parametrize(("pattern", "left"), [("blocks.1.*", 16), ("sdd.blocks.1.*", 24), ("*.ffn.net.2", 28)])
def test_patterns_hold_for_every_role_or_one(pipeline: Pipeline, pattern: str, left: int) -> None:
    models = quantize(pipeline, Recipe("token", (pattern,))).stages.models
    assert sum(isinstance(m, LinearFP8) for model in models.values() for m in model.modules()) == left


def test_recipes_that_make_no_sense(pipeline: Pipeline, amax: Calibration) -> None:
    for match, call in {
        "got activations 'row'": lambda: Recipe("row"),
        "matches no linear": lambda: quantize(pipeline, Recipe("token", ("sdd.blocks.7.*",))),
        "leaves nothing": lambda: quantize(pipeline, Recipe("token", ("*",))),
        "no calibrated amax of etm.blocks.0.attn1.to_q": lambda: quantize(pipeline, TENSOR, Calibration({})),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    without_role = {name.partition(".")[2]: value for name, value in amax.amax.items()}
    assert quantized_as(quantize(pipeline, TENSOR, Calibration(without_role))) == "fp8"


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_graph_is_native_qdq(granularity: str, graphs: Graphs, pipeline: Pipeline) -> None:
    """e4m3 without zero points; both factors of each product are dequantised right before it."""
    model = graphs[granularity, "sdd"][1].model
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    dequantised = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    consumers = [n for n in model.graph.node if any(name in dequantised for name in n.input)]
    assert {node.domain for node in model.graph.node} == {""}
    assert len(consumers) == sum(name.startswith("sdd.") for name in quantizable(pipeline))
    for node in consumers:
        assert node.op_type == "MatMul"
        x, weight = (dequantised[name] for name in node.input)
        assert kinds[weight.input[0]] == TensorProto.FLOAT8E4M3FN
        assert (len(x.input), len(weight.input)) == (2, 2)
        assert helper.get_node_attr_value(weight, "axis") == 1
        assert (x.input[1] in kinds) == (granularity == "tensor")
    quantised = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantised) == len(consumers)
    assert {helper.get_node_attr_value(n, "output_dtype") for n in quantised} == {TensorProto.FLOAT8E4M3FN}


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_every_product_in_onnx_runtime(granularity: str, graphs: Graphs, tmp_path: Path) -> None:
    """Each linear on the very inputs it has inside the graph: nothing can hide in what comes after it."""
    graph, made = graphs[granularity, "sdd"]
    made_by = {name: node for node in made.model.graph.node for name in node.output}
    modules = [m for m in graph.module.modules() if isinstance(m, LinearFP8)]
    products = [n for n in made.model.graph.node if n.op_type == "QuantizeLinear"]
    rows = graph.inputs["rope_cos"].shape[0]
    extra = {}
    for node in products:
        out = node.output[0].removesuffix("_q")
        weight = made_by[f"{out}_w"].input[0]
        inside, outside = made.weights[weight].shape if weight in made.weights else dims(made.model, weight)
        extra |= {node.input[0]: torch.empty(rows, inside), out: torch.empty(rows, outside)}
    opened = session(graph, made, tmp_path, extra)
    got = opened(random_inputs(graph, 0))
    checked = 0
    for node in products:
        out = node.output[0].removesuffix("_q")
        x, result = got[node.input[0]], got[out]
        errors = [
            relative(module(x), result) for module in modules if module.weight.shape == (x.shape[1], result.shape[1])
        ]
        assert min(errors) <= 1e-6
        checked += 1
    assert checked == len(modules)


@pytest.mark.parametrize("name", ["etm", "sdd"])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_stages_in_onnx_runtime(name: str, granularity: str, graphs: Graphs, tmp_path: Path) -> None:
    """Two layers: a difference of 1e-7 seldom meets a rounding edge. Where one does, all that follows moves with it."""
    graph, made = graphs[granularity, name]
    opened = session(graph, made, tmp_path)
    for seed in range(6):
        inputs = random_inputs(graph, seed)
        with torch.no_grad():
            expected = dict(zip(graph.outputs, graph.module(*inputs.values()), strict=True))
        got = opened(inputs)
        assert max(relative(got[output], expected[output]) for output in expected) <= 1e-5


def test_calibration_sees_the_largest_input(pipeline: Pipeline, amax: Calibration) -> None:
    """Beside plain hooks on the same streams: q, k and v get one input, so each has one maximum."""
    seen: dict[str, float] = {}

    def watch(name: str):
        def hook(module: nn.Module, given: tuple[Tensor], _: object) -> None:
            seen[name] = max(seen.get(name, 0.0), float(given[0].abs().max()))

        return hook

    handles = [
        module.register_forward_hook(watch(f"{role}.{name}"))
        for role, model in pipeline.stages.models.items()
        for name, module in model.named_modules()
        if name.endswith(("to_out.0", "ffn.net.2"))
    ]
    for seed in (0, 1):
        with pipeline.stream(PROMPT, seed=seed) as stream:
            for _ in range(6):
                stream.next_latent()
    for handle in handles:
        handle.remove()
    found = amax.amax
    assert seen.keys() < found.keys() == set(quantizable(pipeline))
    assert all(found[name] == pytest.approx(value, rel=1e-5) for name, value in seen.items())
    for name in found:
        if name.endswith("attn1.to_q"):
            assert found[name] == found[name.replace("to_q", "to_k")] == found[name.replace("to_q", "to_v")]


def test_percentiles_leave_outliers_out(pipeline: Pipeline, amax: Calibration) -> None:
    clipped = calibrate.calibrate(pipeline, [PROMPT], seeds=(0, 1), chunks=6, percentile=99.0)
    assert all(clipped.amax[name] < value for name, value in amax.amax.items())
    for bad in ({"percentile": 0.0}, {"percentile": 101.0}, {"chunks": 1}, {"seeds": ()}):
        with pytest.raises(ValueError, match="calibrate: got"):
            calibrate.calibrate(pipeline, [PROMPT], **bad)


def test_calibrations_on_disk(amax: Calibration, tmp_path: Path) -> None:
    write_calibration(amax, tmp_path / "amax.json")
    assert read_calibration(tmp_path / "amax.json") == amax
    assert [file.name for file in tmp_path.iterdir()] == ["amax.json"]


def test_modelopt_state_dicts(pipeline: Pipeline, amax: Calibration, tmp_path: Path) -> None:
    """Names are one transformer's, so they hold for every role; weight quantizers and other tensors are not read."""
    names = {name.partition(".")[2]: value for name, value in amax.amax.items()}
    state = {f"{name}.input_quantizer._amax": torch.tensor(value) for name, value in names.items()}
    state |= {f"{name}.weight_quantizer._amax": torch.ones(4) for name in names} | {"proj_out.bias": torch.ones(2)}
    save_file(state, tmp_path / "amax.safetensors")
    torch.save(state, tmp_path / "amax.pt")
    for file in ("amax.safetensors", "amax.pt"):
        found = read_calibration(tmp_path / file)
        assert (found.amax, found.steps) == (pytest.approx(names), {})
        assert quantized_as(quantize(pipeline, TENSOR, found))


class _Unwanted:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_calibrations_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = {
        "a.json": b"{",
        "b.json": b'{"amax": {}}',
        "c.json": json.dumps({"format": "greedy-amax", "amax": {"x": -1.0}}).encode(),
        "c2.json": json.dumps({"format": "greedy-amax", "amax": {"x": 1.0}, "steps": {"y": {"sdd": 1.0}}}).encode(),
        "c3.json": json.dumps({"format": "greedy-amax", "amax": {"x": 1.0}, "steps": {"x": {"sdd": "1"}}}).encode(),
        "c4.json": json.dumps({"format": "greedy-amax", "amax": {"x": 1.0}, "steps": {"x": {}}}).encode(),
        "d.json": json.dumps({"format": "greedy-amax", "amax": {"x": None}}).encode(),
        "e.pt": b"no archive",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"x": _Unwanted()}, tmp_path / "f.pt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "g.pt")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=r"got .* expected"):
            read_calibration(file)
    with pytest.raises(FileNotFoundError):
        read_calibration(tmp_path / "missing.json")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_calibrate_cli(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "amax.json"
    prompts.write_text(f"{PROMPT}\n\na blue square moving left\n")
    given = ["--model", str(model_dir), "--prompts", str(prompts), "--chunks", "2", "--seeds", "1", "--out", str(out)]
    assert calibrate.main(given) == 0
    assert len(read_calibration(out).amax) == len(read_calibration(out).steps) == 32
    assert "largest inputs by step" in capsys.readouterr().err
    prompts.write_text("\n")
    assert calibrate.main(given) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_pass_errors_are_measured_on_one_stream(pipeline: Pipeline, amax: Calibration) -> None:
    same = quantize(pipeline, Recipe("token", tuple(quantizable(pipeline)[1:])))  # one linear of the ETM
    others = {"one": same, "all": quantize(pipeline, TOKEN)}
    errors = pass_errors(pipeline, others, [PROMPT], 4)
    assert errors["one"]["sdd"] == 0
    assert 0 < errors["one"]["etm"] < errors["all"]["etm"] < 0.2
    assert 0 < errors["all"]["sdd"] < 0.2


def test_sensitivity_names_blocks_and_kinds(pipeline: Pipeline, amax: Calibration) -> None:
    found = sensitivity(pipeline, amax, [PROMPT], 2)
    assert {name for name in found if name.startswith("sdd.blocks")} == {"sdd.blocks.0", "sdd.blocks.1"}
    assert found["sdd.*.ffn.net.2"]["sdd"] > 0 == found["sdd.*.ffn.net.2"]["etm"]


@pytest.mark.thorough
def test_fp8_bundles(model_dir: Path, amax: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: exported, verified, streamed. Both transformers are one here, stored once."""
    write_calibration(amax, tmp_path / "amax.json")
    out = tmp_path / "bundle"
    given = ["--model", str(model_dir), "--precision", "fp8", "--prompt", PROMPT, "--out", str(out)]
    assert export_main([*given, "--calibration", str(tmp_path / "missing.json")]) == 2
    assert export_main([*given, "--calibration", str(tmp_path / "amax.json")]) == 0
    assert export_main(["verify", str(out)]) == 0
    assert "on average 0 grey levels off" in capsys.readouterr().out
    kinds = [tensor.dtype for tensor in load_file(out / "weights.safetensors").values()]
    assert kinds.count(torch.float8_e4m3fn) == 2 * 2  # the feed-forwards; others are under 1 kB and in the graphs
    arguments = ["--prompt", PROMPT, "--frames", "5", "--out", "null", "--json"]
    assert engine.run.main(["--bundle", str(out), *arguments]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["backend"], report["frames"]) == ("onnx", 5)
