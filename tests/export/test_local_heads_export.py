"""Local heads in bundles: the stream of the torch backend from ONNX Runtime, in traced and in TensorRT's graphs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import bundles
import numpy as np
import pytest
import torch
from spelled import inputs_of, run_onnx, stage

import engine
from engine.bundles.manifest import read_manifest
from engine.config import LocalHeads
from engine.loader import load_bundle
from engine.stream import Pipeline
from export.graphs import stage_graphs
from export.onnx_graph import to_onnx
from export.program import trace
from export.tensorrt.build import BuildOptions
from export.tensorrt.spelling import spell_for_tensorrt
from export.write import write_bundle

PROMPTS = "a red circle moving right", "a blue square on gray"
# The first layer has only local heads, the second one of two.
HEADS = {"window": 6, "attn_sink": 3, "layers": [[0, 1], [0]]}
ROWS = 18  # of a chunk of 3 latent frames


@pytest.fixture(scope="module")
def local(model_dir: Path) -> Pipeline:
    overrides = {"window": 9, "attn_sink": 3, "heads": HEADS}
    return engine.load(model_dir, preset="self-forcing", overrides=overrides)


@pytest.fixture(scope="module")
def bundle(local: Pipeline, model_dir: Path) -> Path:
    return bundles.bundle("heads-bundle", local, model_dir / "tokenizer")


def frames(pipeline: Pipeline) -> np.ndarray:
    with pipeline.stream(PROMPTS[0], seed=3) as stream:
        first = [stream.next_chunk() for _ in range(6)]
        stream.set_prompt(PROMPTS[1])
        return np.concatenate([*first, *(stream.next_chunk() for _ in range(3))]).astype(int)


def test_a_bundle_streams_what_torch_does(local: Pipeline, bundle: Path) -> None:
    expected = frames(local)
    assert np.abs(frames(load_bundle(bundle)) - expected).max() <= 1
    manifest = read_manifest(bundle)
    assert manifest.preset_value().heads == LocalHeads(6, 3, ((0, 1), (0,)))
    spec = next(iter(manifest.backends.values())).graphs["dit"]
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs if "k_" in tensor.name and "text" not in tensor.name}
    assert shapes == {"k_1": [1, 54, 16], "local_k_0": [1, 36, 32], "local_k_1": [1, 36, 16]}


def test_a_bundle_without_local_heads_says_nothing_of_them(causal: Pipeline, model_dir: Path) -> None:
    """The C++ core and older versions refuse what they do not know."""
    folder = bundles.bundle("causal-bundle", causal, model_dir / "tokenizer")
    assert "heads" not in read_manifest(folder).preset


def _set(field: str, value: object) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        manifest["preset"]["heads"][field] = value

    return change


def _all_wide(manifest: dict) -> None:
    del manifest["preset"]["heads"]


def _a_file(manifest: dict) -> None:
    manifest["preset"]["heads"] = "/etc/hostname"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("window", 3), "preset.heads.attn_sink: got 3, expected 0 to window - 1"),
        (_set("window", 5), "preset.heads.window: got 5, expected at least its attn_sink"),
        (_set("window", "6"), "preset.heads.window: got '6', expected a valid integer"),
        (_set("window", 7), "preset.heads.window: got 7, expected whole chunks"),
        (_set("attn_sink", 1), "preset.heads.attn_sink: got 1, expected whole chunks"),
        (_set("layers", [[0, 1], [0], []]), "preset.heads.layers: got a table of 3 layers, expected one of 2 layers"),
        (_set("layers", [[0, 1], [2]]), "preset.heads.layers: got head 2, expected one of 2 layers of 2 heads"),
        (_set("layers", [[0, 1], [0, 1]]), "preset.heads.layers: got local heads alone"),
        (_set("layers", [[0], [0]]), "graphs.dit.inputs: got no k_0, expected it"),
        (_all_wide, "graphs.dit.inputs: got no k_0, expected it"),
        (_a_file, "preset.heads: got '/etc/hostname', expected a table"),
    ],
)  # fmt: skip
def test_a_manifest_is_compared_with_its_graphs(
    bundle: Path, tmp_path: Path, change: Callable[[dict], None], said: str
) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json") as caught:
        read_manifest(folder)
    assert said in str(caught.value)


def test_a_traced_graph_writes_both_caches_in_place(local: Pipeline) -> None:
    """What AOTInductor compiles, against the graph of ONNX: flows, and every cache."""
    plain, traced = (next(g for g in stage_graphs(local, in_place) if g.name == "dit") for in_place in (False, True))
    inputs = inputs_of(plain, 5, 1, 2) | {
        "local_start_row": torch.tensor([ROWS]),
        "local_valid_rows": torch.tensor([2 * ROWS]),
    }
    with torch.no_grad():
        expected = dict(zip(plain.outputs, plain.module(*inputs.values()), strict=True))
        found = trace(traced).traced.module()(*inputs.values())[0]
    assert torch.allclose(found, expected["flow"], atol=1e-5)
    for output, name in plain.aliases.items():
        assert torch.allclose(inputs[name], expected[output], atol=1e-5)


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_tensorrts_graphs(local: Pipeline, attention: str) -> None:
    graph = stage(local, "dit")
    inputs = inputs_of(graph, 5, 1, 2) | {
        "local_start_row": torch.tensor([0]),
        "local_valid_rows": torch.tensor([ROWS]),
    }
    with torch.no_grad():
        expected = graph.module(*inputs.values())
    made = to_onnx(graph, partial(spell_for_tensorrt, attention=attention))
    for got, wanted in zip(run_onnx(made, inputs, graph.outputs), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)


def test_fp8_attention_is_refused(local: Pipeline, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export: got attention plugin_fp8 for a preset with local heads"):
        list(
            write_bundle(
                local, tmp_path / "b", model_dir / "tokenizer", PROMPTS[0], plans=BuildOptions(attention="plugin_fp8")
            )
        )


def test_windows_of_local_heads_are_whole_chunks(local: Pipeline) -> None:
    odd = replace(local, preset=replace(local.preset, heads=LocalHeads(7, 3, ((0, 1), (0,)))))
    with pytest.raises(ValueError, match="export: got local heads of window 7 with attn_sink 3, expected multiples"):
        stage_graphs(odd)
