"""INT8: graphs in ONNX Runtime against the operator and exact integers, scales by step, refusals, bundles."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from in_runtime import dims, random_inputs, relative, session
from onnx import helper
from safetensors.torch import load_file
from torch import Tensor, nn

import engine.run
from bench.commands.fp8 import _apart as clips_apart
from bench.operations import passes
from engine.bundles.manifest import read_manifest
from engine.loader import load
from engine.model.quantized import Int8Linear, quantized
from engine.stream import Pipeline
from export import calibrate
from export.__main__ import main as export_main
from export.calibrate import read_calibration, write_calibration
from export.eight_bits import STEADY, Calibration, LinearInt8, Recipe, linear_int8, quantizable, quantize, quantized_as
from export.graphs import Graph, stage_graphs
from export.onnx_graph import OnnxGraph, to_onnx

PROMPT = "a red circle moving right on a gray background"
TENSOR, TOKEN = Recipe("tensor", precision="int8"), Recipe("token", precision="int8")


class Linears(nn.Module):
    """Linears side by side: scales per token and per tensor, with bias and without, in odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = [LinearInt8(nn.Linear(37, 21, bias=bias), amax) for amax in (None, 2.0) for bias in (True, False)]
        self.linears = nn.ModuleList(made)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)


@pytest.fixture(scope="module")
def small() -> tuple[Graph, OnnxGraph]:
    graph = Graph("sdd", Linears(), {"x": torch.randn(1, 19, 37)}, [f"y{i}" for i in range(4)])
    return graph, to_onnx(graph)


def examples() -> list[Tensor]:
    """Common numbers, tokens of very different size, zeros, numbers beyond the static scale."""
    torch.manual_seed(1)
    x = torch.randn(1, 19, 37)
    zeros = x.clone()
    zeros[0, 3:9] = 0
    return [x, x * torch.logspace(-3, 3, 19)[:, None], zeros, 100 * x]


def test_linears_in_onnx_runtime(small: tuple[Graph, OnnxGraph], tmp_path: Path) -> None:
    """The operator, and beside it integers by numpy: only the scaling in float32 may differ."""
    graph, made = small
    opened = session(graph, made, tmp_path)
    for x in examples():
        got = opened({"x": x})
        with torch.no_grad():
            expected = graph.module(x)
        for name, linear, value in zip(graph.outputs, graph.module.linears, expected, strict=True):
            rows = x[0].numpy()
            largest = np.abs(rows).max(1, keepdims=True).clip(np.float32(1e-12))
            scale = largest / np.float32(127) if linear.input_scale is None else linear.input_scale.numpy()
            integers = np.rint(rows / scale).clip(-128, 127).astype(np.int64) @ linear.weight.numpy().astype(np.int64)
            exact = integers * scale.astype(np.float64) * linear.weight_scale.numpy().astype(np.float64)
            exact = torch.from_numpy(exact + (0 if linear.bias is None else linear.bias.numpy()))
            for found in (got[name][0], value[0]):
                torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_activations_are_closer_than_onnx_runtimes_own_quantisation(tmp_path: Path) -> None:
    """onnxruntime.quantization makes one scale per tensor; ours per token, on tokens of different size."""
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import QuantType, quantize_dynamic

    torch.manual_seed(2)
    linear, x = nn.Linear(64, 48, bias=False), torch.randn(40, 64) * torch.logspace(-1, 1, 40)[:, None]
    weight = onnx.numpy_helper.from_array(linear.weight.detach().t().contiguous().numpy(), "w")
    sides = [helper.make_tensor_value_info(n, 1, [40, size]) for n, size in (("x", 64), ("y", 48))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", sides[:1], sides[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "plain.onnx")
    quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8)
    theirs = InferenceSession(tmp_path / "int8.onnx").run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        truth, ours = linear(x), LinearInt8(linear, None)(x)
    errors = [((found - truth).norm(dim=1) / truth.norm(dim=1)).max() for found in (ours, torch.from_numpy(theirs))]
    assert errors[0] < 0.02 < 0.1 < errors[1]


def test_products_are_of_integers(small: tuple[Graph, OnnxGraph]) -> None:
    """Nothing of a linear is left that computes in floats; weights are int8 and stored once."""
    nodes = small[1].model.graph.node
    assert {node.domain for node in nodes} == {""}
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MatMulInteger") == kinds.count("QuantizeLinear") == 4
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(kinds)
    initializers = {tensor.name: tensor for tensor in small[1].model.graph.initializer}
    assert len(initializers) == len(small[1].model.graph.initializer)
    for node in nodes:
        if node.op_type == "MatMulInteger":
            assert initializers[node.input[1]].data_type == onnx.TensorProto.INT8
            assert onnx.numpy_helper.to_array(initializers[node.input[2]]) == 128


def test_shapes_and_dtypes_are_known_without_running() -> None:
    for amax in (None, 3.0):
        module = LinearInt8(nn.Linear(32, 16), amax)
        given = (torch.randn(4, 32), module.weight, module.weight_scale, module.input_scale, module.bias)
        torch.library.opcheck(linear_int8, given, test_utils="test_faketensor")


def test_graphs_and_engine_compute_the_same_bits(pipeline: Pipeline) -> None:
    """`--precision int8` in torch, and what an export with scales per token holds."""
    keep = ("*.attn2.to_out.0",)
    exported = quantize(pipeline, Recipe("token", keep, "int8"))
    models = {}
    for role, model in pipeline.stages.models.items():
        model.fuse()
        models[role] = quantized(model, "int8", keep, role)
    assert any(isinstance(part, Int8Linear) for part in models["sdd"].modules())
    stages = type(pipeline.stages)(models, pipeline.stages.vae, pipeline.stages.text_encoder)
    ours = replace(pipeline, stages=stages)
    with ours.stream(PROMPT) as a, exported.stream(PROMPT) as b, pipeline.stream(PROMPT) as c:
        for _ in range(3):
            x, y, z = (stream.next_latent() for stream in (a, b, c))
            assert torch.equal(x, y)
            assert 0 < relative(x, z) < 0.1


STEPS = {"sdd at 1000": 2.0, "sdd at 500": 2.0 * STEADY, "sdd_context": 2.5}


def test_a_linear_that_is_not_steady_finds_its_scale_at_run_time(pipeline: Pipeline) -> None:
    """One scale would waste a third of the range, and more, at its smallest step. In e4m3 it wastes nothing."""
    names = quantizable(pipeline)
    steps = {name: {"sdd at 1000": 2.0, "sdd_context": 2.9} for name in names} | {names[3]: STEPS}
    calibration = Calibration(dict.fromkeys(names, 3.0), steps)
    for precision, expected in (("int8", [names[3]]), ("fp8", [])):
        models = quantize(pipeline, Recipe("tensor", precision=precision), calibration).stages.models
        found = [name for name in names if models[name[:3]].get_submodule(name[4:]).input_scale is None]
        assert found == expected


def test_ratios_and_their_summary() -> None:
    found = Calibration(
        {"a": 3.0, "b": 2.0, "c": 0.0, "d": 1.0},
        {"a": STEPS, "b": {"etm": 2.0}, "c": {"x": 0.0}, "d": {"x": 0.0, "y": 1}},
    )
    assert found.ratios() == {"a": STEADY, "b": 1, "c": 1, "d": float("inf")}
    assert "median 1.25, most inf (d); 2 of 4 linears at 1.5 or more" in found.summary()
    assert "not known" in Calibration({"a": 1.0}).summary()


def test_calibration_keeps_steps_apart(pipeline: Pipeline, tmp_path: Path) -> None:
    """The largest inputs of every step are those that a hook sees."""
    seen: dict[str, dict[str, float]] = {}
    model = pipeline.stages.models["sdd"]
    steps = pipeline.preset.steps[-1]
    linear = model.get_submodule("blocks.0.ffn.net.2")
    before, calls = linear.forward, []

    def hook(module: nn.Module, given: tuple[Tensor]) -> None:
        calls.append(float(given[0].abs().max()))

    handle = linear.register_forward_pre_hook(hook)
    try:
        found = calibrate.calibrate(pipeline, [PROMPT], chunks=3)
    finally:
        handle.remove()
    assert linear.forward == before
    name = "sdd.blocks.0.ffn.net.2"
    kinds = found.steps[name].keys()
    assert len(kinds) == len(steps) + 1
    assert "sdd_context" in kinds
    assert set(found.steps["etm.blocks.0.ffn.net.2"]) == {"etm"}
    # every chunk: its steps in order, then its context pass
    a_chunk = [kind for kind in kinds if kind != "sdd_context"] + ["sdd_context"]
    for kind, value in zip(a_chunk * (len(calls) // len(a_chunk) + 1), calls, strict=False):
        seen[kind] = {"amax": max(value, seen.get(kind, {"amax": 0.0})["amax"])}
    assert {kind: entry["amax"] for kind, entry in seen.items()} == pytest.approx(dict(found.steps[name]), rel=1e-5)
    assert found.amax[name] == max(found.steps[name].values())
    write_calibration(found, tmp_path / "amax.json")
    assert read_calibration(tmp_path / "amax.json") == found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [TENSOR, TOKEN], ids=lambda recipe: recipe.activations)
def test_a_pass_in_onnx_runtime(pipeline: Pipeline, recipe: Recipe, tmp_path: Path) -> None:
    """Two layers: a difference of 1e-7 seldom meets a rounding edge."""
    calibration = calibrate.calibrate(pipeline, [PROMPT], chunks=4) if recipe is TENSOR else None
    int8 = quantize(pipeline, recipe, calibration)
    graph = next(graph for graph in stage_graphs(int8) if graph.name == "sdd")
    made = to_onnx(graph)
    integer = [node for node in made.model.graph.node if node.op_type == "MatMulInteger"]
    assert len(integer) == sum(name.startswith("sdd.") for name in quantizable(pipeline))
    assert all(len(dims(made.model, node.input[1])) == 2 for node in integer)
    opened, errors = session(graph, made, tmp_path), []
    for seed in range(4):
        inputs = random_inputs(graph, seed)
        with torch.no_grad():
            expected = dict(zip(graph.outputs, graph.module(*inputs.values()), strict=True))
        got = opened(inputs)
        errors.append(max(relative(got[output], expected[output]) for output in expected))
    assert sorted(errors)[1] <= 1e-5
    assert max(errors) < 3e-2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--backend", "aoti"], "--precision: got int8 for aoti, expected --backend onnx alone"),
        (["--backend", "onnx", "--backend", "tensorrt"], "--precision: got int8 for tensorrt, expected"),
        (["--backend", "tensorrt_rtx"], "--precision: got int8 for tensorrt_rtx, expected"),
        (["--attention", "plugin_fp8"], "--attention: got plugin_fp8 with --precision int8, expected fp8"),
        (["--activations", "token", "--calibration", "a.json"], "--calibration: got a.json and --activations token"),
        (["--calibration", "missing.json"], "calibration: got no file missing.json"),
    ],
)
def test_refusals(
    given: list[str], said: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert export_main(["--model", str(model_dir), "--precision", "int8", "--out", str(out), *given]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_quantised_pipeline_is_refused_by_other_backends(pipeline: Pipeline, tmp_path: Path) -> None:
    from export.write import write_bundle

    int8 = quantize(pipeline, TOKEN)
    assert quantized_as(int8) == "int8"
    with pytest.raises(ValueError, match="export: got int8 for aoti, expected it for onnx alone"):
        next(write_bundle(int8, tmp_path / "b", tmp_path, PROMPT, backends=("onnx", "aoti")))
    with pytest.raises(ValueError, match="got precision 'int4', expected one of fp8, int8"):
        Recipe(precision="int4")


@pytest.mark.thorough
@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_int8_bundles(model_dir: Path, activations: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: exported, verified, streamed."""
    out = tmp_path / "bundle"
    given = ["--model", str(model_dir), "--precision", "int8", "--activations", activations, "--prompt", PROMPT]
    assert export_main([*given, "--out", str(out)]) == 0
    err = capsys.readouterr().err
    assert ("largest inputs by step" in err) == (activations == "tensor")
    assert export_main(["verify", str(out)]) == 0
    assert "on average 0 grey levels off" in capsys.readouterr().out
    assert export_main(["inspect", str(out)]) == 0
    assert "int8, preset greedy" in capsys.readouterr().out
    assert read_manifest(out).precision == "int8"
    assert torch.int8 in {tensor.dtype for tensor in load_file(out / "weights.safetensors").values()}
    arguments = ["--prompt", PROMPT, "--frames", "5", "--out", "null", "--json"]
    assert engine.run.main(["--bundle", str(out), *arguments]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["backend"], report["frames"]) == ("onnx", 5)
    assert engine.run.main(["--model", str(model_dir), "--precision", "int8", *arguments]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["backend"], report["precision"]) == ("torch", "int8")
    assert load(model_dir, device="cpu", precision="int8").dtype == torch.float32


@pytest.mark.thorough
def test_passes_that_are_timed_are_right(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream's inputs torch and ONNX Runtime agree in every precision, before any speed is told."""
    monkeypatch.setattr(passes, "pipeline_of", lambda width: pipeline)
    found = passes.pass_speeds(0, 2)
    rows = found["rows"]
    assert rows.keys() == {f"{runtime} {name}" for runtime in ("torch", "onnx") for name in ("fp32", *passes.RECIPES)}
    assert rows["onnx fp32"]["error"] < 1e-5
    for name in passes.RECIPES:
        assert rows[f"torch {name}"]["error"] == pytest.approx(rows[f"onnx {name}"]["error"], rel=0.5)
    errors = [rows[f"onnx {name}"]["error"] for name in ("int8 token", "int8 tensor", "fp8 tensor")]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.1


def test_clips_are_compared_in_grey_levels() -> None:
    a, b = torch.zeros(3, 2, 4, 4), torch.full((3, 2, 4, 4), 2 / 127.5)
    assert clips_apart([a], [a]) == {"grey_levels": 0}
    found = clips_apart([a, b], [a, a])
    assert found["grey_levels"] == pytest.approx(1)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / 2))
    for width in (100, 63):
        with pytest.raises(ValueError, match=f"fp8: got width {width}, expected a multiple of 64"):
            passes.pipeline_of(width)
