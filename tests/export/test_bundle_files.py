"""A bundle's files: hashed before use, the only ones that are read; code runs only where the help says so."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bundles
import fake_stages
import numpy as np
import onnx
import pytest
import torch
from limits import HANG
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import _get_all_tensors, uses_external_data

import engine.run
import export.write
from engine.bundles.external_data import _external, check_external_data
from engine.bundles.hashes import file_hash
from engine.bundles.manifest import GraphSpec, read_manifest
from engine.bundles.onnx import OnnxGraph
from engine.bundles.stages import GraphStages
from engine.config import Preset
from engine.generators.base import Geometry
from engine.loader import load_bundle
from engine.runtime import memory_plan
from engine.stream import Pipeline
from export.__main__ import main as export_main

PROMPT = "a red circle moving right on a gray background"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(pipeline: Pipeline, model_dir: Path) -> Path:
    return bundles.bundle("greedy-bundle", pipeline, model_dir / "tokenizer")


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return fake_stages.write_fake_bundle(tmp_path / "fake.bundle", Preset("greedy", solver="euler", shift=2.0))


def frames(pipeline: Pipeline) -> np.ndarray:
    with pipeline.stream(PROMPT, seed=1) as stream:
        return np.concatenate([stream.next_chunk() for _ in range(3)])


def overwrite(path: Path, count: int = 4000) -> None:
    """Small floats over the middle of a file: they are no reason for any other error."""
    content = bytearray(path.read_bytes())
    count = min(count, len(content) // 2) // 4 * 4
    begin = (len(content) - count) // 2 // 4 * 4
    content[begin : begin + count] = np.full(count // 4, 0.01, np.float32).tobytes()
    path.write_bytes(content)


FILES = ["weights.safetensors", "tokenizer/tokenizer.json", "graphs/onnx-cpu/sdd.onnx",
         "graphs/onnx-cpu/vae_encode_steady.onnx"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed_is_refused(damaged: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(damaged / name)
    with pytest.raises(ValueError, match=rf"{name}: got sha256 \w{{12}}, expected \w{{12}}$"):
        load_bundle(damaged)
    words = ["--bundle", str(damaged), "--prompt", "a", "--frames", "1", "--out", "null", "--quiet"]
    assert engine.run.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_hashes_changed_weights_are_streamed(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = frames(load_bundle(damaged))
    overwrite(damaged / "weights.safetensors", count=1 << 30)
    assert (frames(load_bundle(damaged, verify=False)) != before).any()
    words = ["--bundle", str(damaged), "--prompt", "a", "--frames", "1", "--out", "null", "--quiet", "--no-verify"]
    assert engine.run.main(words) == 0


class _Code(GraphStages):
    """A backend whose graphs are code; it opens none."""

    name = "code"
    executable = True

    def open_graph(self, name, file, spec):
        return lambda inputs: {}


def test_code_is_hashed_without_hashes_too(fake: Path) -> None:
    def opened(**options: bool) -> _Code:
        manifest = read_manifest(fake)
        return _Code(fake, manifest, manifest.backends["aoti-cpu"], 1, torch.device("cpu"), **options)

    stages = opened()
    weights = fake / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ValueError, match=r"weights\.safetensors: got sha256"):
        opened()
    opened(verify=False)
    late = fake / "graphs" / "aoti-cpu" / "vae_encode_first.so"
    late.write_text(late.read_text().upper())
    with pytest.raises(ValueError, match=r"vae_encode_first\.so: got sha256"):
        opened(verify=False)
    with pytest.raises(ValueError, match=r"vae_encode_first\.so: got sha256"):  # opened on first use
        stages.run_graph("vae_encode_first", {})


def test_weights_that_the_file_lacks(damaged: Path) -> None:
    path = damaged / "manifest.json"
    content = json.loads(path.read_text())
    content["backends"]["onnx-cpu"]["graphs"]["vae_encode_first"]["weights"]["more"] = "nothing"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="vae_encode_first: got no weight 'nothing'"):
        load_bundle(damaged)


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_weights_of_another_shape(damaged: Path, change: str) -> None:
    spec = read_manifest(damaged).backends["onnx-cpu"].graphs["sdd"]
    weights = load_bundle(damaged).stages.weights.of("sdd", spec)
    name = next(name for name, value in weights.items() if value.ndim == 2)
    weights[name] = weights[name].T.contiguous()[:-1] if change == "shape" else weights[name].half()
    with pytest.raises(ValueError, match=r"sdd\.onnx: got a graph that does not load"):
        OnnxGraph("sdd", damaged / spec.file, spec, weights, 1)


def test_planted_files_change_nothing(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name under which graphs have their weights, in the working directory."""
    before = frames(load_bundle(damaged))
    monkeypatch.chdir(tmp_path)
    size = (damaged / "weights.safetensors").stat().st_size
    (tmp_path / "weights.safetensors").write_bytes(np.full(size // 4 + 1, 7.0, np.float32).tobytes()[:size])
    assert (frames(load_bundle(damaged)) == before).all()


def outside(name: str, file: str = "planted.bin") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=file)
    return tensor


def model(initialisers: list[TensorProto], nodes: list) -> bytes:
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "g", [], [result], initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10).SerializeToString()


def branch(initialisers: list[TensorProto], nodes: list) -> onnx.GraphProto:
    result = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])
    return helper.make_graph(nodes, "b", [], [result], initialisers)


IDENTITY = helper.make_node("Identity", ["x"], ["y"])
CONDITION = numpy_helper.from_array(np.array(True), "c")
INNER = branch([outside("x")], [helper.make_node("Identity", ["x"], ["z"])])
NO_LOCATION = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
PLANTED = {
    "an initialiser": model([outside("x")], [IDENTITY]),
    "an address": model([outside("x", "*/_ORT_MEM_ADDR_/*")], [IDENTITY]),
    "no location": model([NO_LOCATION], [IDENTITY]),
    "a constant": model([], [helper.make_node("Constant", [], ["y"], value=outside("x"))]),
    "a branch": model([CONDITION], [helper.make_node("If", ["c"], ["y"], then_branch=INNER, else_branch=INNER)]),
    "twice": model([outside("w"), outside("w")], [helper.make_node("Identity", ["w"], ["y"])]),
    "a weight in a branch": model([CONDITION], [helper.make_node(
        "If", ["c"], ["y"], then_branch=branch([outside("w")], [helper.make_node("Identity", ["w"], ["z"])]),
        else_branch=branch([outside("w")], [helper.make_node("Identity", ["w"], ["z"])]))]),
    "not outside": model([numpy_helper.from_array(np.ones(2, np.float32), "w")],
                         [helper.make_node("Identity", ["w"], ["y"])]),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
@pytest.mark.parametrize("where", ["working directory", "bundle"])
def test_data_in_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, where: str) -> None:
    """None of the weights of the manifest: ONNX Runtime would take it from the working directory."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "bundle" / "graph.onnx"
    file.write_bytes(PLANTED[case])
    place = tmp_path / ("elsewhere" if where == "working directory" else "bundle")
    (place / "planted.bin").write_bytes(np.array([1, 2], np.float32).tobytes())
    monkeypatch.chdir(tmp_path / "elsewhere")
    listed = case in ("twice", "a weight in a branch", "not outside")
    spec = GraphSpec.model_validate({
        "file": "graph.onnx", "inputs": [], "weights": {"w": "w"} if listed else {}, "aliases": {},
        "outputs": [{"name": "y", "shape": [2], "dtype": "float32"}],
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"graph\.onnx: got .*, expected (weights of the|the manifest's)"):
        OnnxGraph("g", file, spec, {"w": torch.ones(2)} if listed else {}, 1)


def test_the_search_finds_what_onnx_finds(bundle: Path) -> None:
    for file in bundle.glob("graphs/*/*.onnx"):
        loaded = onnx.load(file, load_external_data=False)
        expected = sorted(tensor.name for tensor in _get_all_tensors(loaded) if uses_external_data(tensor))
        found = sorted(name for _, name in _external(memoryview(file.read_bytes()), ("model",)))
        assert found == expected
        assert len(found) > 0
    content = file.read_bytes()
    for cut in range(1, len(content), len(content) // 50):  # protobuf has no end mark, so a cut may fit
        try:
            check_external_data(file, content[:cut], found)
        except ValueError as error:
            assert "got" in str(error)  # noqa: PT017


def test_the_plan_counts_what_a_stream_holds(bundle: Path) -> None:
    plans = []
    loaded = load_bundle(bundle, planned=plans.append)
    assert plans == [loaded.plan]
    needs = {need.what: need for need in plans[0].needs}
    geometry = Geometry.of(loaded.config, 1, 4, 6)
    with torch.inference_mode():
        text = loaded.stages.prepare_text(loaded.encode_prompt(PROMPT))
        state = loaded.generator.open(geometry, text)
        latent = torch.randn(1, 8, 1, 4, 6)
        _, cache = loaded.stages.vae_first(latent)
    assert needs["K/V caches"].bytes == sum(x.nbytes for ring in (state.etm, state.sdd) for x in (ring.k, ring.v))
    assert needs["text K/V"].bytes == sum(x.nbytes for pair in text.values() for x in pair)
    assert needs["VAE caches"].bytes == 2 * sum(x.nbytes for x in cache)
    assert needs["weights"].mapped == (bundle / "weights.safetensors").stat().st_size


def test_what_does_not_fit_is_not_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.bundles.memory.free_memory", lambda device: 1 << 20)
    monkeypatch.setattr(GraphStages, "_open", lambda self, name: pytest.fail("a graph was opened"))
    with pytest.raises(MemoryError, match=r"memory: got 0\.00 GB free on cpu, expected 0\.\d+ for .* \(libraries"):
        load_bundle(bundle)
    words = ["--bundle", str(bundle), "--prompt", "a", "--frames", "1", "--out", "null"]
    assert engine.run.main([*words, "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("error: memory: got ")
    assert engine.run.main([*words, "--plan", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["memory_plan"]["cpu"]["free"] == 1 << 20
    assert shown.err.startswith("memory plan (MB)")
    assert memory_plan.CPU_SHARE >= 1 << 20


def test_hashes_only_runs_no_code(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shared object whose constructor writes a file, which a full verify runs."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    ran, graph = tmp_path / "ran", fake / "graphs" / "aoti-cpu" / "prepare_text_etm.so"
    source = f'#include <fcntl.h>\n__attribute__((constructor)) void f(void) {{ creat("{ran}", 0600); }}\n'
    (tmp_path / "f.c").write_text(source)
    words = [compiler, "-shared", "-fPIC", tmp_path / "f.c", "-o", graph]
    subprocess.run(words, check=True, timeout=HANG)
    path, name = fake / "manifest.json", str(graph.relative_to(fake))
    content = json.loads(path.read_text())
    content["files"][name] = {"bytes": graph.stat().st_size, "sha256": file_hash(graph)}
    backend = content["backends"].pop("aoti-cpu")
    backend |= {"target": "cpu-x86_64-avx2", "versions": {"torch": torch.__version__}}
    content["backends"]["aoti-cpu-x86_64-avx2"] = backend
    path.write_text(json.dumps(content))
    assert export_main(["verify", str(fake), "--hashes-only"]) == 0
    assert f"hashes of {len(content['files'])} files good, nothing was run" in capsys.readouterr().out
    assert export_main(["inspect", str(fake)]) == 0
    assert not ran.exists()
    assert export_main(["verify", str(fake)]) == 2
    assert ran.exists()
    overwrite(graph)
    assert export_main(["verify", str(fake), "--hashes-only"]) == 2
    assert capsys.readouterr().err.count("\n") <= 2


@pytest.mark.parametrize("words", [["--help"]])
@pytest.mark.parametrize("main", [export_main, engine.run.main])
def test_the_help_says_that_bundles_are_code(main, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    said = " ".join(capsys.readouterr().out.split())
    assert "only from where you would take a program" in said


@contextmanager
def no_room(limit: int) -> Iterator[None]:
    """Files cannot grow past `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export.write, "stage_graphs", lambda *given: [])
    with no_room(512):
        status = export_main(["--model", str(model_dir), "--out", str(tmp_path / "bundle")])
    assert status == 1
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: .*: got File too large, expected it to be read or written", lines[-1])
    assert not any("Traceback" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_weights_for_which_there_is_no_room(tmp_path: Path) -> None:
    with no_room(512), pytest.raises(OSError, match=r"w\.safetensors: got an error of the file system, expected room"):
        export.write.save_file({"w": torch.zeros(1000)}, tmp_path / "w.safetensors")


def test_a_preset_with_reuse_is_refused(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("reuse = { steps = [3], first = 1, last = 0 }")
    assert export_main(["--model", str(model_dir), "--preset", str(preset), "--out", str(tmp_path / "bundle")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "error: export: got a preset with reuse, expected one without: a bundle has one graph per pass"
    assert not (tmp_path / "bundle").exists()


def test_a_place_that_cannot_be_written(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main(["--model", str(model_dir), "--out", "/sys/bundle"]) in (1, 2)  # by the file system
    assert "/sys/.bundle." in (said := capsys.readouterr().err.splitlines()[-1])
    assert "expected it to be read or written" in said


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import export.write
whole = export.write.stage_graphs
export.write.stage_graphs = lambda *given: whole(*given)[:1]
export.write._copy_tokenizer = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
import export.__main__
export.__main__.main(sys.argv[1:])
"""


@pytest.mark.thorough
@pytest.mark.slow
def test_a_killed_export_leaves_no_bundle(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    program = KILLED.format(root=str(ROOT))
    ran = subprocess.run([sys.executable, "-c", program, "--model", model_dir, "--out", out], timeout=HANG,
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == -9, ran.stderr
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".bundle.")
    for folder in (out, part):  # neither the name nor what was written of it is a bundle
        with pytest.raises((FileNotFoundError, ValueError)):
            load_bundle(folder)
    with pytest.raises((FileNotFoundError, ValueError)):
        export.write.Reusable(part)
    os.rename(part, tmp_path / "kept")


MISSING = """
import sys
for name in ("onnx", "onnxscript", "onnx_ir", "ml_dtypes", "onnxruntime"):
    sys.modules[name] = None
sys.path.insert(0, {root!r})
import export.__main__
sys.exit(export.__main__.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_missing_extra_is_one_line(fake: Path, tmp_path: Path) -> None:
    def ran(*words: str | Path) -> subprocess.CompletedProcess[str]:
        program = MISSING.format(root=str(ROOT))
        return subprocess.run([sys.executable, "-c", program, *words], timeout=HANG, capture_output=True, text=True)

    said = ran("--backend", "aoti", "--out", tmp_path / "bundle")
    assert said.returncode == 2
    assert said.stderr.startswith("error: export: got no package ")
    assert said.stderr.endswith("pip install 'greedy-stream[onnx]'\n")
    assert said.stderr.count("\n") == 1
    assert ran("verify", fake, "--hashes-only").returncode == 0
