"""Bundles: the same numbers as torch from ONNX Runtime, and a damaged bundle is refused with one clear line."""

import copy
import json
import shutil
from pathlib import Path

import bundles
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file
from tokenizers import Tokenizer as Core

import engine
import engine.run
from bench.instruments.random_weights import write_random_pipeline
from engine.bundles.hashes import check_hashes, file_hash
from engine.bundles.manifest import read_manifest
from engine.config import TransformerConfig
from engine.generators.base import Geometry
from engine.loader import load_bundle
from engine.model.vae import VAEConfig
from engine.stream import Pipeline
from export.__main__ import main as export_main
from export.graphs import stage_graphs
from export.write import golden_frames, verify_bundle, write_bundle

PROMPT = "a red circle moving right on a gray background"


@pytest.fixture(scope="module")
def bundle(pipeline: Pipeline, model_dir: Path) -> Path:
    """The greedy pipeline as a bundle; tests that damage it copy it first."""
    return bundles.bundle("greedy-bundle", pipeline, model_dir / "tokenizer")


@pytest.fixture(scope="module")
def causal_bundle(causal: Pipeline, model_dir: Path) -> Path:
    return bundles.bundle("causal-bundle", causal, model_dir / "tokenizer")


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def grey_levels_apart(one: Pipeline, other: Pipeline, chunks: int, clip: np.ndarray | None = None) -> int:
    with one.stream(PROMPT, seed=3, clip=clip) as a, other.stream(PROMPT, seed=3, clip=clip) as b:
        pairs = [(a.next_chunk().astype(int), b.next_chunk().astype(int)) for _ in range(chunks)]
    return max(int(np.abs(x - y).max()) for x, y in pairs)


def test_streams_agree_with_torch(pipeline: Pipeline, bundle: Path) -> None:
    """21 chunks are 81 frames: past the ETM's window, its ring gone round several times."""
    assert grey_levels_apart(pipeline, load_bundle(bundle), 21) <= 2


def test_causal_streams_agree_with_torch(causal: Pipeline, causal_bundle: Path) -> None:
    assert grey_levels_apart(causal, load_bundle(causal_bundle), 6) <= 2


def test_image_and_prompt_switch_agree_with_torch(pipeline: Pipeline, bundle: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, pipeline.height, pipeline.width, 3), dtype=np.uint8)
    other = load_bundle(bundle)
    assert grey_levels_apart(pipeline, other, 4, clip) <= 2
    latest = []
    for each in (pipeline, other):
        with each.stream(PROMPT, seed=1) as stream:
            stream.next_chunk(), stream.next_chunk()
            stream.set_prompt("a blue square moving left")
            latest.append(stream.next_chunk().astype(int))
    assert np.abs(latest[0] - latest[1]).max() <= 2


def test_every_graph_equals_its_module(pipeline: Pipeline, bundle: Path) -> None:
    stages = load_bundle(bundle).stages
    torch.manual_seed(0)
    for graph in stage_graphs(pipeline):
        expected = graph.module(*graph.inputs.values())
        got = stages.run_graph(graph.name, {name: value.clone() for name, value in graph.inputs.items()})
        for name, tensor in zip(graph.outputs, expected, strict=True):
            assert (got[name] - tensor).abs().max() <= 1e-5, (graph.name, name)


def test_a_step_copies_no_cache(bundle: Path) -> None:
    """The ring is written where it lies: only the rows of the new chunk change."""
    loaded = load_bundle(bundle)
    geometry = Geometry.of(loaded.config, 1, 4, 6)
    with torch.inference_mode():
        state = loaded.generator.open(geometry, loaded.stages.prepare_text(loaded.encode_prompt(PROMPT)))
        where, before = state.sdd.k.data_ptr(), state.sdd.k.clone()
        loaded.generator.denoise(torch.randn(1, 8, 1, 4, 6), 500.0, state)
    changed = (state.sdd.k != before).flatten(3).any(-1)  # [layers, B, slots]
    assert state.sdd.k.data_ptr() == where
    assert changed[:, :, 0].all()
    assert not changed[:, :, 1:].any()


def test_graphs_are_native_onnx(bundle: Path) -> None:
    """No operator of our own is left: any runtime with opset 24 can take them."""
    for file in bundle.glob("graphs/*/*.onnx"):
        model = onnx.load(file, load_external_data=False)
        assert {node.domain for node in model.graph.node} <= {""}
        assert [opset.version for opset in model.opset_import] == [24]
        assert str(Path.cwd()).encode() not in file.read_bytes()


def test_weights_are_stored_once(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    graphs = manifest.backends["onnx-cpu"].graphs
    shared = set(graphs["sdd"].weights.values()) & set(graphs["sdd_context"].weights.values())
    assert len(shared) > len(graphs["sdd_context"].weights) * 0.9
    arrays = [(a.shape, a.tobytes()) for a in load_file(bundle / "weights.safetensors").values()]
    assert len(arrays) == len(set(arrays))


def test_cli_inspect_verify_and_run(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main(["inspect", str(bundle)]) == 0
    assert "vae_steady" in capsys.readouterr().out
    assert export_main(["verify", str(bundle)]) == 0
    assert "0 grey levels off" in capsys.readouterr().out
    arguments = ["--prompt", PROMPT, "--frames", "9", "--out", "checksum", "--json"]
    assert engine.run.main(["--bundle", str(bundle), *arguments]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["backend"], report["frames"]) == ("onnx", 9)
    assert engine.run.main(["--bundle", str(bundle), "--window", "2", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_existing_directories_are_left_alone(pipeline: Pipeline, bundle: Path, model_dir: Path) -> None:
    with pytest.raises(ValueError, match="exists"):
        next(write_bundle(pipeline, bundle, model_dir / "tokenizer", PROMPT))
    assert verify_bundle(bundle) == {"onnx-cpu": 0}


def test_a_failed_export_leaves_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(write_bundle(pipeline, tmp_path / "bundle", tmp_path / "no tokenizer", PROMPT))
    assert list(tmp_path.iterdir()) == []


def edit(folder: Path, change) -> None:
    """Apply `change` to the parsed manifest."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def refused(folder: Path, match: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        check_hashes(folder, read_manifest(folder))
    assert "got" in str(caught.value)
    assert "expected" in str(caught.value)


def test_golden_frames_are_replayed_with_the_cleaning_of_their_time(damaged: Path) -> None:
    """Bundles without prompt_cleaning resolved HTML entities alone: there full-width letters were unknown words."""
    assert read_manifest(damaged).prompt_cleaning == "ftfy"
    prompt = "a ｒｅｄ circle"
    pipeline = load_bundle(damaged)
    encoded = Core.from_file(str(damaged / "tokenizer" / "tokenizer.json")).encode(prompt)
    room = (0, 16 - len(encoded.ids))
    ids, mask = (torch.nn.functional.pad(torch.tensor([part]), room) for part in (encoded.ids, encoded.attention_mask))
    with torch.inference_mode():
        old = pipeline.stages.encode_text(ids, mask)
    assert (old - pipeline.encode_prompt(prompt)).abs().max() > 0.01
    golden = {"frames": torch.from_numpy(golden_frames(pipeline, old, 5))}
    save_file(golden, damaged / "golden.safetensors")
    size, digest = (damaged / "golden.safetensors").stat().st_size, file_hash(damaged / "golden.safetensors")

    def change(manifest: dict) -> None:
        manifest["golden"] |= {"prompt": prompt, "seed": 5}
        manifest["files"]["golden.safetensors"] = {"bytes": size, "sha256": digest}
        del manifest["prompt_cleaning"]

    edit(damaged, change)
    assert read_manifest(damaged).prompt_cleaning == "html"
    assert verify_bundle(damaged) == {"onnx-cpu": 0}
    edit(damaged, lambda manifest: manifest.update(prompt_cleaning="ftfy"))
    assert verify_bundle(damaged)["onnx-cpu"] > 0


def test_truncated_file(damaged: Path) -> None:
    path = damaged / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(damaged, "bytes")


def test_flipped_byte(damaged: Path) -> None:
    path = damaged / "graphs" / "onnx-cpu" / "sdd.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(damaged, "sha256")


def test_missing_graph(damaged: Path) -> None:
    (damaged / "graphs" / "onnx-cpu" / "etm.onnx").unlink()
    refused(damaged, "etm.onnx")


def test_a_graph_that_the_manifest_lacks(damaged: Path) -> None:
    edit(damaged, lambda m: m["backends"]["onnx-cpu"]["graphs"].pop("sdd"))
    with pytest.raises(ValueError, match="graphs: got no sdd, expected it"):
        load_bundle(damaged)


def test_wrong_version(damaged: Path) -> None:
    edit(damaged, lambda m: m.update(version=3))
    refused(damaged, "version: got 3, expected one of 1, 2")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "graphs/../../outside", "./a", "a\\b"])
def test_paths_that_leave(damaged: Path, name: str) -> None:
    edit(damaged, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    refused(damaged, "inside the bundle")


def test_a_tokenizer_that_leaves(damaged: Path) -> None:
    edit(damaged, lambda m: m.update(tokenizer="../tokenizer"))
    refused(damaged, "inside the bundle")


def as_compiled(manifest: dict) -> dict:
    """The manifest with a second backend of the same files, whose graphs write in place."""
    backend = copy.deepcopy(manifest["backends"]["onnx-cpu"])
    backend |= {"backend": "aoti", "target": "cpu-x86_64-avx2", "versions": {"torch": "2.13.0"}}
    for graph in backend["graphs"].values():
        graph |= {"mutates": list(graph["aliases"].values()), "aliases": {}, "source": "0" * 64}
    manifest["backends"]["aoti-cpu-x86_64-avx2"] = backend
    return manifest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b["graphs"]["etm"]["mutates"].append("nothing"), "mutates"),
        (lambda b: b["graphs"]["etm"]["aliases"].update(hidden="k_0"), "alias"),
        (lambda b: b["graphs"]["etm"]["inputs"].append(b["graphs"]["etm"]["inputs"][0]), "share a name"),
        (lambda b: b["graphs"]["etm"].update(source="0"), "source"),
        (lambda b: b["graphs"]["etm"].update(file="../etm.so"), "inside the bundle"),
        (lambda b: b["graphs"]["etm"]["inputs"][0].update(dtype="float64"), "dtype"),
        (lambda b: b["graphs"]["etm"]["inputs"][0]["shape"].append(-1), "shape"),
        (lambda b: b["versions"].clear(), "version of torch"),
        (lambda b: b.update(target="cpu/../x"), "target"),
        (lambda b: b.update(target="cpu-avx512"), "expected 'aoti-cpu-avx512'"),
        (lambda b: b.update(backend="torch"), "backend"),
        (lambda b: b.update(backend="onnx", target="cpu-x86_64-avx2"), "expected"),
    ],
)
def test_backends_that_contradict_themselves(damaged: Path, change, match: str) -> None:
    edit(damaged, lambda m: change(as_compiled(m)["backends"]["aoti-cpu-x86_64-avx2"]))
    refused(damaged, match)


@pytest.mark.parametrize(("output", "given"), [("hidden", "k_0"), ("k_0_out", "nothing"), ("nothing", "k_0")])
def test_aliases_of_something_else(damaged: Path, output: str, given: str) -> None:
    """Written over an input of another shape, an output would run past its end."""
    edit(damaged, lambda m: m["backends"]["onnx-cpu"]["graphs"]["etm"]["aliases"].update({output: given}))
    refused(damaged, "alias")


def test_symbolic_link(damaged: Path, tmp_path: Path) -> None:
    path = damaged / "weights.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(damaged, "no plain file")


def test_symbolic_folder(damaged: Path, tmp_path: Path) -> None:
    path = damaged / "graphs"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(damaged, "no plain file")


def test_absurd_sizes(damaged: Path) -> None:
    edit(damaged, lambda m: m.update(height=1 << 40))
    refused(damaged, "height")


def test_unknown_key(damaged: Path) -> None:
    edit(damaged, lambda m: m.update(extra=1))
    refused(damaged, "extra")


def test_other_preset_field(damaged: Path) -> None:
    edit(damaged, lambda m: m["preset"].update(windows=3))
    refused(damaged, "windows")


def test_shapes_that_the_graph_does_not_have(damaged: Path) -> None:
    """A shape that lies would let the runtime write past a buffer."""

    def shrink(manifest: dict) -> None:
        output = manifest["backends"]["onnx-cpu"]["graphs"]["vae_first"]["outputs"][0]
        output["shape"] = [1, 3, 1, 1, 1]

    edit(damaged, shrink)
    with pytest.raises(ValueError, match="frames"):
        load_bundle(damaged)


def test_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_runtime_is_the_one_the_manifest_names(bundle: Path) -> None:
    assert read_manifest(bundle).backends["onnx-cpu"].versions["onnxruntime"] == onnxruntime.__version__


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
_ANYTHING = st.recursive(
    _SCALARS,
    lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(st.text(max_size=8), deeper, max_size=3),
)


def _paths(node: object, at: tuple = ()) -> list[tuple]:
    """Every place in a JSON tree."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [at, *(path for key, child in children for path in _paths(child, (*at, key)))]


@pytest.fixture(scope="module")
def target(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[tuple]]:
    """A bundle to damage, its manifest with two backends, and every place in that."""
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("fuzz") / "bundle"))
    tree = as_compiled(json.loads((bundle / "manifest.json").read_text()))
    return folder, json.dumps(tree).encode(), _paths({"root": tree})[1:]


@pytest.mark.parametrize("examples", [300, pytest.param(2000, marks=pytest.mark.thorough)])
def test_random_manifests_never_crash(target: tuple[Path, bytes, list[tuple]], examples: int) -> None:
    """One place of a good manifest replaced by anything, or one byte of its text: read, or refused with one line."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        damage_and_read(target, data)

    check()


def damage_and_read(target: tuple[Path, bytes, list[tuple]], data: st.DataObject) -> None:
    folder, text, places = target
    if data.draw(st.booleans()):
        content = bytearray(text)
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        damaged = bytes(content)
    else:
        tree = {"root": json.loads(text)}
        *way, last = data.draw(st.sampled_from(places))
        node = tree
        for key in way:
            node = node[key]
        node[last] = data.draw(_ANYTHING)
        damaged = json.dumps(tree["root"]).encode()
    (folder / "manifest.json").write_bytes(damaged)
    message = ""
    try:
        read_manifest(folder)
    except (ValueError, FileNotFoundError) as error:  # anything else fails the test
        message = str(error)
    assert not message or "got" in message


@pytest.mark.thorough
def test_full_width(tmp_path: Path) -> None:
    """Wan2.1-1.3B's widths, one layer: exported, streamed, and the same frames."""
    vae = VAEConfig(base_dim=8, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
    write_random_pipeline(tmp_path / "model", TransformerConfig(num_layers=1), vae)
    full = engine.load(
        tmp_path / "model",
        preset="self-forcing-framewise",
        overrides={"window": 2},
        height=32,
        width=32,
        precision="fp32",
    )
    list(write_bundle(full, tmp_path / "bundle", tmp_path / "model" / "tokenizer", "a"))
    assert grey_levels_apart(full, load_bundle(tmp_path / "bundle"), 3) <= 2
