"""A bundle whose decoder is a tiny VAE: its graphs, its streams and what its manifest says."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import bundles
import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file

import engine
from engine.bundles.manifest import read_manifest
from engine.bundles.native import NativePipeline
from engine.loader import load_bundle
from engine.model.tiny_vae import TinyVAE, TinyVAEConfig
from engine.stream import Pipeline
from export.__main__ import main
from export.graphs import stage_graphs
from export.onnx_graph import to_onnx
from export.program import trace
from export.tensorrt.spelling import spell_for_tensorrt

CONFIG = TinyVAEConfig(8, (12, 8, 6), (True, True), (True, True), blocks=2, encoder_width=None)


@pytest.fixture(scope="module")
def tiny(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(model_dir, folder)
    torch.manual_seed(4)
    vae = TinyVAE(CONFIG)
    for p in vae.parameters():
        p.data = torch.randn_like(p) / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * torch.randn_like(p)
    (folder / "tiny_vae").mkdir()
    save_file(vae.state_dict(), folder / "tiny_vae" / "model.safetensors")
    (folder / "tiny_vae" / "config.json").write_text(json.dumps(asdict(CONFIG)))
    return engine.load(folder, decoder="tiny")


@pytest.fixture(scope="module")
def bundle(tiny: Pipeline, model_dir: Path) -> Path:
    return bundles.bundle("tiny-decoder", tiny, model_dir / "tokenizer")


def test_the_manifest_tells(bundle: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(bundle)
    assert manifest.decoder == "tiny"
    steady = manifest.backends["onnx-cpu"].graphs["vae_steady"]
    assert [spec.name for spec in steady.inputs] == ["latent", *(f"cache_{i}" for i in range(4))]
    assert [spec.shape for spec in steady.inputs[1:]] == [[1, 12, 1, 4, 6]] * 2 + [[1, 8, 1, 8, 12]] * 2
    assert main(["inspect", str(bundle)]) == 0
    assert ", tiny VAE decodes" in capsys.readouterr().out


def test_streams_agree_with_torch(tiny: Pipeline, bundle: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, tiny.height, tiny.width, 3), dtype=np.uint8)
    other = load_bundle(bundle)
    for given in (None, clip):
        with (
            tiny.stream("a red circle", seed=3, clip=given) as a,
            other.stream("a red circle", seed=3, clip=given) as b,
        ):
            for _ in range(8):
                one, two = a.next_chunk().astype(int), b.next_chunk().astype(int)
                assert one.std() > 1
                assert np.abs(one - two).max() <= 2


def test_every_traced_graph_equals_its_module(tiny: Pipeline) -> None:
    """As AOTInductor and TensorRT get them."""
    graphs = {graph.name: graph for graph in stage_graphs(tiny)}
    for name in ("vae_first", "vae_steady"):
        graph = graphs[name]
        inputs = tuple(torch.randn_like(x) for x in graph.inputs.values())
        with torch.no_grad():
            expected = graph.module(*inputs)
            got = trace(graph).traced.module()(*inputs)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["vae_first", "vae_steady"])
def test_tensorrt_gets_plain_onnx(tiny: Pipeline, name: str) -> None:
    """Its spelling needs no operator of TensorRT's own, so ONNX Runtime runs it."""
    graph = next(graph for graph in stage_graphs(tiny) if graph.name == name)
    spelled = to_onnx(graph, spell_for_tensorrt)
    assert {node.domain for node in spelled.model.graph.node} == {""}
    options = ort.SessionOptions()
    kept = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for value in spelled.weights.values()]
    options.add_external_initializers(list(spelled.weights), kept)
    session = ort.InferenceSession(spelled.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {name: torch.randn_like(value) for name, value in graph.inputs.items()}
    with torch.no_grad():
        expected = graph.module(*inputs.values())
    got = session.run(graph.outputs, {name: value.numpy() for name, value in inputs.items()})
    for a, b in zip(got, expected, strict=True):
        assert np.abs(a - b.numpy()).max() <= 1e-5


@pytest.mark.thorough
def test_compiled_by_aotinductor(core: ModuleType, tiny: Pipeline, model_dir: Path) -> None:
    """Python's streams and the C++ core's, over the same graphs."""
    folder = bundles.bundle("tiny-decoder-aoti", tiny, model_dir / "tokenizer", ("aoti",))
    for other in (load_bundle(folder, "aoti"), NativePipeline(folder, "aoti")):
        with tiny.stream("a red circle", seed=3) as a, other.stream("a red circle", seed=3) as b:
            for _ in range(8):
                assert np.abs(a.next_chunk().astype(int) - b.next_chunk().astype(int)).max() <= 2
