"""Compiled graphs: torch's numbers from machine code, written in place, and nothing opened that is not what it says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import compile_once
from safetensors.torch import load_file
from test_export import edit, grey_levels_apart

import engine
import engine.run
from engine.bundles.aoti import CPU_TARGET, AotiGraph, target_of
from engine.bundles.manifest import GraphSpec, TensorSpec, read_manifest
from engine.bundles.onnx import OnnxGraph
from engine.bundles.stages import NotHere, Weights
from engine.generators.base import Geometry
from engine.generators.greedy import ETM
from engine.loader import load_bundle
from engine.runtime.passes import Pass
from engine.stream import Pipeline
from export.__main__ import main as export_main
from export.aoti import compile_program, constants_of, source_of
from export.compilers import compilers_of
from export.graphs import Graph, stage_graphs
from export.program import Program, trace
from export.write import verify_bundle, write_bundle

PROMPT = "a red circle moving right on a gray background"
KEY = f"aoti-{CPU_TARGET}"
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs a processor with AVX2"
    ),
]


@pytest.fixture(scope="module")
def loaded(aoti_bundle: Path) -> Pipeline:
    return load_bundle(aoti_bundle)


@pytest.fixture
def damaged(aoti_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(aoti_bundle, tmp_path / "bundle"))


def equal_to_module(graph: Graph, run) -> None:
    """Outputs, and inputs after the call, at most 1e-5 off those of the module (of values of order 1)."""
    mine = {name: value.clone() for name, value in graph.inputs.items()}
    theirs = {name: value.clone() for name, value in graph.inputs.items()}
    expected = graph.module(*theirs.values())
    got = run(mine)
    results = dict(zip(graph.outputs, expected, strict=True))
    assert all(tensor.is_contiguous() for tensor in got.values()), graph.name
    torch.testing.assert_close(got, results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_every_graph_equals_its_module(pipeline: Pipeline, loaded: Pipeline) -> None:
    torch.manual_seed(0)
    for graph in stage_graphs(pipeline, in_place=True):
        equal_to_module(graph, lambda inputs, name=graph.name: loaded.stages.run_graph(name, inputs))


def test_streams_agree_with_torch(pipeline: Pipeline, loaded: Pipeline) -> None:
    """21 chunks are 81 frames: past the ETM's window, its ring gone round several times."""
    assert grey_levels_apart(pipeline, loaded, 21) <= 2


def test_image_and_prompt_switch_agree_with_torch(pipeline: Pipeline, loaded: Pipeline) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, pipeline.height, pipeline.width, 3), dtype=np.uint8)
    assert grey_levels_apart(pipeline, loaded, 4, clip) <= 2
    latest = []
    for each in (pipeline, loaded):
        with each.stream(PROMPT, seed=1) as stream:
            stream.next_chunk(), stream.next_chunk()
            stream.set_prompt("a blue square moving left")
            latest.append(stream.next_chunk().astype(int))
    assert np.abs(latest[0] - latest[1]).max() <= 2


@pytest.fixture(scope="module")
def dit(causal: Pipeline) -> Graph:
    return next(graph for graph in stage_graphs(causal, in_place=True) if graph.name == "dit")


@pytest.mark.thorough
def test_causal_transformer(dit: Graph, tmp_path: Path) -> None:
    """A window of two chunks, the second slot written, both read; the rest of the cache is poison and stays so."""
    program, file = trace(dit), tmp_path / "dit.so"
    compile_once(program, file)
    weights = constants_of(program, CPU, file)
    spec = spec_of(program, weights)
    graph = AotiGraph("dit", file, spec, weights, CPU)
    inputs = dict(dit.inputs)
    rows, chunk = inputs["k_0"].shape[1], inputs["rope_cos"].shape[0]
    inputs |= {"start_row": torch.tensor([0]), "valid_rows": torch.tensor([chunk])}
    for name in dit.mutates:
        inputs[name] = inputs[name].clone()
        inputs[name][:, chunk:] = torch.nan
    assert rows == 2 * chunk
    flow = graph({name: value.clone() for name, value in inputs.items()})["flow"]
    assert flow.isfinite().all()
    second = Graph(dit.name, dit.module, {
        name: dit.inputs[name] if name in dit.mutates else value for name, value in inputs.items()
    } | {"start_row": torch.tensor([chunk]), "valid_rows": torch.tensor([rows])}, dit.outputs)  # fmt: skip
    equal_to_module(second, graph)


@pytest.mark.parametrize(
    ("backend", "precision"), [("onnx", "fp16"), pytest.param("aoti", "bf16", marks=pytest.mark.thorough)]
)
def test_lower_precision(model_dir: Path, pipeline: Pipeline, tmp_path: Path, backend: str, precision: str) -> None:
    """As close to float32 as torch in the same precision is, times two: both round, each in its own places."""
    (compiler,), low = compilers_of(backend, CPU), engine.load(model_dir, precision=precision)
    torch.manual_seed(0)
    graph = next(graph for graph in stage_graphs(low, compiler.in_place) if graph.name == "sdd")
    exact = next(graph for graph in stage_graphs(pipeline) if graph.name == "sdd")
    program, file = trace(graph), tmp_path / "graph"
    if backend == "aoti":
        compile_once(program, file)
        weights = compiler.adopt(program, file)
    else:
        weights = compiler.write(program, file)
    spec = spec_of(program, weights)
    parts = "sdd", file, spec, weights
    opened = OnnxGraph(*parts, threads=1) if backend == "onnx" else AotiGraph(*parts, CPU)

    def copies(dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """Positions and timesteps stay as they are."""
        return {
            name: x.to(dtype or x.dtype, copy=True) if x.ndim > 2 else x.clone() for name, x in graph.inputs.items()
        }

    expected = exact.module(*copies(torch.float32).values())[0]
    own = (graph.module(*copies(None).values())[0].float() - expected).square().mean().sqrt()
    error = (opened(copies(None))["flow"].float() - expected).square().mean().sqrt()
    assert 0 < error <= 2 * own


def test_no_bfloat16_in_onnx_runtime(tmp_path: Path) -> None:
    latent = TensorSpec(name="latent", shape=[1], dtype="bfloat16")
    spec = GraphSpec(file="a", inputs=[latent], outputs=[], weights={}, aliases={})
    with pytest.raises(NotHere, match="bfloat16"):
        OnnxGraph("sdd", tmp_path / "a", spec, {}, 1)


def spec_of(program: Program, weights: dict[str, torch.Tensor]) -> GraphSpec:
    return GraphSpec(
        file="graph.so", inputs=program.inputs, outputs=program.outputs, weights={name: name for name in weights},
        aliases={}, mutates=program.graph.mutates,
    )  # fmt: skip


def test_a_step_writes_only_its_rows(loaded: Pipeline) -> None:
    geometry = Geometry.of(loaded.config, 1, 4, 6)
    with torch.inference_mode():
        state = loaded.generator.open(geometry, loaded.stages.prepare_text(loaded.encode_prompt(PROMPT)))
        where, before = state.sdd.k.data_ptr(), state.sdd.k.clone()
        loaded.generator.denoise(torch.randn(1, 8, 1, 4, 6), 500.0, state)
    changed = (state.sdd.k != before).flatten(3).any(-1)  # [layers, B, slots]
    assert state.sdd.k.data_ptr() == where
    assert changed[:, :, 0].all()
    assert not changed[:, :, 1:].any()


@pytest.mark.parametrize("backend", ["onnx", "aoti"])
@pytest.mark.parametrize(("slot", "valid"), [(4, 4), (-1, 4), (0, 5), (0, 0)])
def test_slots_outside_the_cache(aoti_bundle: Path, backend: str, slot: int, valid: int) -> None:
    """A compiled graph would end the process over them."""
    loaded = load_bundle(aoti_bundle, backend)
    geometry = Geometry.of(loaded.config, 1, 4, 6)
    state = loaded.generator.open(geometry, loaded.stages.prepare_text(loaded.encode_prompt(PROMPT)))
    cos, sin = state.rope.at(0, 1)
    with pytest.raises(ValueError, match=r"etm: got slot .* expected"):
        loaded.stages.run(Pass(ETM, torch.randn(1, 8, 1, 4, 6), cos, sin, slot, valid), state.etm, state.text_kv)


def test_weights_are_shared(aoti_bundle: Path) -> None:
    """The transformers' weights lie outside, once, for graphs of both backends; those of the VAE inside."""
    manifest = read_manifest(aoti_bundle)
    compiled, onnx = manifest.backends[KEY].graphs, manifest.backends["onnx-cpu"].graphs
    assert list(manifest.backends) == [KEY, "onnx-cpu"]
    assert not any(compiled[name].weights for name in compiled if name.startswith("vae_"))
    assert set(compiled["sdd_context"].weights.values()) <= set(compiled["sdd"].weights.values())
    assert set(compiled["sdd"].weights.values()) & set(onnx["sdd"].weights.values())
    contents = [(t.dtype, t.shape, t.numpy().tobytes()) for t in load_file(aoti_bundle / manifest.weights).values()]
    assert len(contents) == len(set(contents))
    # Two roles of one shape are one program.
    assert compiled["prepare_text_etm"].source == compiled["prepare_text_sdd"].source


def test_wrong_inputs_are_refused(pipeline: Pipeline, loaded: Pipeline) -> None:
    """The graph itself would take them, and read past their end."""
    graph = next(graph for graph in stage_graphs(pipeline, in_place=True) if graph.name == "sdd")
    good, latent, cache = graph.inputs, graph.inputs["latent"], graph.inputs["k_0"]
    rows = cache.repeat(1, 1, 2)[:, :, : cache.shape[2]]
    for change, match in (
        ({"latent": latent[:, :, :, :2]}, r"latent: got cpu float32 \[1, 8, 1, 2, 6\], expected"),
        ({"latent": latent.double()}, "float64"),
        ({"latent": latent.to("meta")}, "meta"),
        ({"extra": latent}, "extra"),
        ({"k_0": rows}, "k_0: got strides"),
    ):
        with pytest.raises(ValueError, match=match):
            loaded.stages.run_graph("sdd", good | change)
    # A view of the right shape is no mistake where nothing is written.
    moved = latent.movedim(1, -1).contiguous().movedim(-1, 1)
    inputs = {name: value.clone() for name, value in good.items()}
    expected = loaded.stages.run_graph("sdd", inputs | {"latent": latent})["flow"]
    assert torch.equal(loaded.stages.run_graph("sdd", inputs | {"latent": moved})["flow"], expected)


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.999])
def test_a_changed_object_is_not_opened(damaged: Path, position: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("engine.bundles.aoti.open_object", opened)
    path = damaged / "graphs" / KEY / "encode_text.so"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"encode_text.so: got sha256"):
        load_bundle(damaged)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda g: g["vae_first"]["outputs"][0].update(shape=[1, 3, 1, 1, 1]), r"outputs\.frames: got"),
        (lambda g: g["etm"]["inputs"].reverse(), "inputs: got"),
        (lambda g: g["etm"]["inputs"][0].update(name="latents"), "inputs: got"),
        (lambda g: g["etm"]["inputs"][0].update(dtype="float16"), r"inputs\.latent: got"),
        (lambda g: g["etm"]["weights"].popitem(), "constants: got"),
        (lambda g: g["etm"]["weights"].clear(), "constants: got"),
        (lambda g: g["etm"]["weights"].update(more=next(iter(g["etm"]["weights"].values()))), "constants: got"),
        (lambda g: g["vae_first"]["weights"].update(more=g["etm"]["weights"].popitem()[1]), "constants: got"),
        (lambda g: g["etm"]["weights"].update(dict.fromkeys(g["etm"]["weights"], "nothing")), "no weight 'nothing'"),
        (
            lambda g: g["etm"]["weights"].update(
                dict.fromkeys(g["etm"]["weights"], next(iter(g["etm"]["weights"].values())))
            ),
            "constants: got",
        ),
    ],
)
def test_a_manifest_that_lies(damaged: Path, change, match: str) -> None:
    """Anything the object's own signature contradicts would be a read or a write past a buffer."""
    edit(damaged, lambda m: change(m["backends"][KEY]["graphs"]))
    with pytest.raises(ValueError, match=match):
        load_bundle(damaged, "aoti")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b.update(target="cpu-aarch64-neon"), "expected cpu-x86_64-avx2"),
        (lambda b: b["versions"].update(torch="2.4.1+cpu"), "graphs of torch 2.4.1"),
    ],
)
def test_another_machine(damaged: Path, change, match: str) -> None:
    def rename(manifest: dict) -> None:
        backend = manifest["backends"].pop(KEY)
        change(backend)
        manifest["backends"][f"aoti-{backend['target']}"] = backend

    edit(damaged, rename)
    with pytest.raises(NotHere, match=match):
        load_bundle(damaged, "aoti")


def test_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.bundles.aoti.platform.machine", lambda: "aarch64")
    with pytest.raises(NotHere, match="aarch64"):
        target_of(CPU)


def test_not_a_shared_object(tmp_path: Path) -> None:
    (tmp_path / "graph.so").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"graph.so: got a file that does not load, expected"):
        AotiGraph("etm", tmp_path / "graph.so", GraphSpec(file="a", inputs=[], outputs=[], weights={}, aliases={}), {},
                  CPU)  # fmt: skip


def test_a_shared_object_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our signature there is nothing to compare the manifest with."""

    class Foreign:
        def get_constant_names_to_original_fqns(self) -> dict[str, str]:
            return {}

        def get_call_spec(self) -> list[str]:
            return ["[1, {}]", ""]

    monkeypatch.setattr("engine.bundles.aoti.open_object", lambda *_: Foreign())
    with pytest.raises(ValueError, match="got a graph without a signature, expected"):
        AotiGraph("etm", tmp_path, GraphSpec(file="a", inputs=[], outputs=[], weights={}, aliases={}), {}, CPU)


def test_unchanged_graphs_are_reused(
    pipeline: Pipeline, aoti_bundle: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled again, and the bundle is the same."""

    def compiled(*_: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr("export.compilers.compile_program", compiled)
    lines = list(write_bundle(pipeline, tmp_path / "again", model_dir / "tokenizer", PROMPT, backends=["aoti"],
                              reuse=aoti_bundle))  # fmt: skip
    assert sum("reused" in line for line in lines) == 10
    old, new = (read_manifest(folder).backends[KEY].graphs for folder in (aoti_bundle, tmp_path / "again"))
    assert {name: graph.source for name, graph in old.items()} == {name: graph.source for name, graph in new.items()}
    for one, folder in ((old, aoti_bundle), (new, tmp_path / "again")):
        manifest = read_manifest(folder)
        assert {manifest.files[graph.file].sha256 for graph in one.values()} == {
            read_manifest(aoti_bundle).files[graph.file].sha256 for graph in old.values()
        }


def test_what_decides_a_graph(pipeline: Pipeline) -> None:
    """Other weights are the same transformer, another shape is not; a frozen VAE holds its weights."""
    graphs = {graph.name: graph for graph in stage_graphs(pipeline, in_place=True)}
    for name, held in (("sdd", False), ("vae_first", True)):
        program = trace(graphs[name])
        before, value = source_of(program, CPU), next(iter(program.constants.values()))
        kept = value.clone()
        value.mul_(1.5)
        assert (source_of(program, CPU) != before) is held
        value.copy_(kept)
        assert source_of(program, CPU) == before
    context = graphs["sdd_context"]
    assert source_of(trace(context), CPU) != source_of(trace(graphs["sdd"]), CPU)


def test_operators_of_ours_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    """They would be calls of Python."""
    graph = next(graph for graph in stage_graphs(pipeline) if graph.name == "etm")
    with pytest.raises(ValueError, match=r"aoti: etm: got operator greedy\.\w+"):
        compile_program(trace(graph), CPU, tmp_path / "etm.so")


def test_verify_and_run(aoti_bundle: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(verify_bundle(aoti_bundle)) == {KEY, "onnx-cpu"}
    assert export_main(["verify", str(aoti_bundle), "--backend", "aoti"]) == 0
    out = capsys.readouterr().out
    assert KEY in out
    assert "onnx" not in out
    arguments = ["--bundle", str(aoti_bundle), "--prompt", PROMPT, "--frames", "5", "--out", "checksum", "--json"]
    for more, name in (([], "aoti"), (["--backend", "aoti"], "aoti"), (["--backend", "onnx"], "onnx")):
        assert engine.run.main([*arguments, *more]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["backend"] == name
    edit(damaged, lambda m: m["backends"][KEY]["graphs"]["etm"]["inputs"].reverse())
    assert engine.run.main([*arguments, "--bundle", str(damaged)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_golden_frames_of_each_backend(aoti_bundle: Path) -> None:
    frames = load_file(aoti_bundle / "golden.safetensors")
    assert set(frames) == {"frames", f"frames.{KEY}", "frames.onnx-cpu"}
    assert all(t.shape == frames["frames"].shape and t.dtype == torch.uint8 for t in frames.values())


def test_weights_are_mapped_not_copied(aoti_bundle: Path) -> None:
    manifest = read_manifest(aoti_bundle)
    weights = Weights(aoti_bundle / manifest.weights)
    one, other = (weights.of(name, manifest.backends[KEY].graphs[name]) for name in ("sdd", "sdd_context"))
    pointers = {tensor.data_ptr() for tensor in one.values()}
    assert {tensor.data_ptr() for tensor in other.values()} <= pointers
