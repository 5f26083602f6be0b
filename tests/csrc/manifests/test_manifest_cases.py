"""One table of damaged manifests for both readers, engine/bundles/manifest.py and the C++ core.

tests/data/manifest_cases.json has a row per case:

    of     the family of a good bundle
    at     the place in its manifest
    value  JSON text to put there, or null to remove what stands there; it need not be JSON, so that it can be NaN
    named  what both messages hold; null: both readers take it
"""

import json
import os
import random
import shutil
import time
from pathlib import Path
from types import ModuleType

import fake_stages
import pytest

from engine.bundles.manifest import Manifest, read_manifest
from engine.config import Preset

CASES = json.loads((Path(__file__).parents[2] / "data" / "manifest_cases.json").read_text())
PRESETS = {
    "greedy": Preset("greedy", solver="euler", shift=2.0, max_position=4),
    "causal": Preset("causal", chunk=3, window=6, shift=2.0),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {name: fake_stages.write_fake_bundle(folder / name, preset) for name, preset in PRESETS.items()}


def python_says(folder: Path) -> str:
    """The refusal; empty if the manifest is read."""
    try:
        read_manifest(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def core_says(core: ModuleType, folder: Path) -> str:
    """The same of the C++ core, which goes on to look for its plugin."""
    try:
        core.open_bundle(str(folder), plugin_dir=str(folder / "none"))
    except ImportError as error:
        return "" if "got no plugin" in str(error) else f"no plugin was looked for: {error}"
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    raise AssertionError("a bundle without a plugin was opened")


def changed(content: dict, case: dict) -> str:
    """The manifest's text with a case's change."""
    *way, last = case["at"]
    node = content
    for key in way:
        node = node[key]
    if case["value"] is None:
        del node[last]
        return json.dumps(content)
    node[last] = "@here@"
    return json.dumps(content).replace('"@here@"', case["value"])


def test_the_table_is_large():
    assert len(CASES) > 300
    assert sum(case["named"] is None for case in CASES) >= 20


def test_good_manifests_are_read_by_both(core, bundles):
    for folder in bundles.values():
        assert (python_says(folder), core_says(core, folder)) == ("", "")


def test_a_graph_of_many_tensors_is_read_soon(bundles):
    """csrc/tests/core_test.cpp asks the core. Each name was compared with all others: 20 s."""
    content = json.loads((bundles["greedy"] / "manifest.json").read_text())
    [(_, backend)] = content["backends"].items()
    graph, names = backend["graphs"]["etm"], range(4096)
    for side in ("inputs", "outputs"):
        graph[side] = [{"name": f"{side}{i}", "shape": [1], "dtype": "int64"} for i in names]
    graph |= {"aliases": {f"outputs{i}": f"inputs{i}" for i in names[1:]}, "mutates": ["inputs0"] * 200_000}
    backend |= {"backend": "tensorrt", "target": "cuda-sm90"}
    content["backends"] = {"tensorrt-cuda-sm90": backend}
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"etm\.inputs: got no latent, expected it"):
        Manifest.model_validate(content)
    assert time.process_time() - begun < 5


FLOAT32 = {"t", "rope_cos", "rope_sin"}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("family", PRESETS)
def test_lower_precisions(core, bundles, family, precision):
    """All but times, positions and what the encoder gives is in the stream's dtype."""
    path, dtype = bundles[family] / "manifest.json", "float16" if precision == "fp16" else "bfloat16"
    text = path.read_text()
    content = json.loads(text)
    [graphs] = [backend["graphs"] for backend in content["backends"].values()]
    encoded = [graphs[name]["outputs"][0] for name in ("vae_encode_first", "vae_encode_steady")]
    for tensor in (tensor for graph in graphs.values() for tensor in graph["inputs"] + graph["outputs"]):
        if tensor["dtype"] == "float32" and tensor["name"] not in FLOAT32:
            tensor["dtype"] = dtype
    for tensor in encoded:
        tensor["dtype"] = "float32"
    content["precision"] = precision
    try:
        path.write_text(json.dumps(content))
        assert (python_says(path.parent), core_says(core, path.parent)) == ("", "")
        encoded[1]["dtype"] = dtype
        path.write_text(json.dumps(content))
        for said in (python_says(path.parent), core_says(core, path.parent)):
            assert f"vae_encode_steady.outputs.latent: got {dtype}" in said
            assert "expected float32" in said
    finally:
        path.write_text(text)


@pytest.mark.parametrize("family", PRESETS)
def test_both_readers_say_the_same(core, bundles, family):
    folder = bundles[family]
    path = folder / "manifest.json"
    text = path.read_text()
    wrong = []
    try:
        for case in CASES:
            if case["of"] == family:
                path.write_text(changed(json.loads(text), case))
                for reader, said in (("Python", python_says(folder)), ("C++", core_says(core, folder))):
                    fits = said == "" if case["named"] is None else case["named"] in said and "expected" in said
                    if not fits or "\n" in said:
                        wrong.append(f"{case} {reader}: {said or 'taken'}")
    finally:
        path.write_text(text)
    assert not wrong, f"{len(wrong)} of the cases:\n" + "\n".join(wrong)


VALUES = [
    "null", "true", "false", "0", "1", "-1", "2", "3", "8", "16", "1.0", "1e3", "0.5", "1e300", "-0", "-0.0", "65536",
    "65537", "1048576", "1048577", "4294967296", "9223372036854775807", "18446744073709551615", "18446744073709551616",
    '""', '"x"', '"a/b"', '".."', '"cpu"', '"float32"', '"\\u0000"', '"\\u00e9"', '"\\ud83d\\ude00"', "[]", "[1]",
    "[[]]", "[null]", "{}", '{"x": 1}', "NaN", "1, 2", "[" * 64 + "]" * 64,
]  # fmt: skip


def places(node, at=()):
    """Every place in a JSON tree."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [at, *(place for key, child in children for place in places(child, (*at, key)))]


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("family", PRESETS)
def test_both_readers_take_the_same(core, bundles, family, count):
    """Any place of a good manifest replaced by anything, or removed: both take it, or both refuse it."""
    choose, folder = random.Random(count), bundles[family]
    path = folder / "manifest.json"
    text = path.read_text()
    everywhere = places(json.loads(text))[1:]
    taken = 0
    try:
        for _ in range(count):
            case = {"at": list(choose.choice(everywhere)), "value": choose.choice([*VALUES, None])}
            path.write_text(changed(json.loads(text), case))
            python, cpp = python_says(folder), core_says(core, folder)
            assert bool(python) is bool(cpp), f"{case}: Python: {python or 'taken'}; C++: {cpp or 'taken'}"
            taken += not python
    finally:
        path.write_text(text)
    assert taken > 0


TEXTS = {
    "empty": b"", "space": b" \n", "a byte order mark": b"\xef\xbb\xbf{}", "UTF-16": "{}".encode("utf-16"),
    "no UTF-8": b'{"format": "\xff"}', "a surrogate in UTF-8": b'{"format": "\xed\xa0\x80"}', "cut": b'{"format": ',
    "a list": b"[]", "a number": b"1", "a text": b'"greedy-bundle"', "null": b"null", "two values": b"{} {}",
    "a comma too many": b'{"a": 1,}', "a comment": b"{} // bundle", "a zero byte": b"{}\0", "NaN": b"NaN",
    "65 levels": b"[" * 66 + b"]" * 66, "many levels": b"[" * 100_000, "many tables": b'{"a":' * 100_000,
    "many digits": b'{"height": ' + b"9" * 10_000 + b"}", "a raw line break": b'{"a\n": 1}',
    "too large": b" " * ((1 << 26) + 1),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_no_manifest(core, bundles, tmp_path, case):
    (tmp_path / "manifest.json").write_bytes(TEXTS[case])
    for said in (python_says(tmp_path), core_says(core, tmp_path)):
        assert said.startswith(f"{tmp_path / 'manifest.json'}")
        assert "got " in said
        assert "expected " in said
        assert "\n" not in said
        assert len(said) < 500


def as_a_folder(path):
    path.mkdir()


def as_a_loop(path):
    path.symlink_to(path.name)


def as_nothing(path):
    path.symlink_to("nothing")


def as_a_device(path):
    path.symlink_to("/dev/zero")


def as_a_link_outside(path):
    """To the file itself, which the test has put beside the bundle."""
    path.symlink_to(next(parent / "whole" for parent in path.parents if (parent / "whole").exists()))


INSTEAD = {"a folder": as_a_folder, "a FIFO": os.mkfifo, "a link to itself": as_a_loop, "a link to nothing": as_nothing,
           "a link outside": as_a_link_outside, "a device": as_a_device, "missing": lambda path: None,
           "an empty file": lambda path: path.touch()}  # fmt: skip


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "golden.safetensors",
                                  "tokenizer/tokenizer.json", "graphs/aoti-cpu/etm.so", "tokenizer"])  # fmt: skip
@pytest.mark.parametrize("kind", INSTEAD)
def test_something_else_in_the_place_of_a_file(core, bundles, tmp_path, name, kind):
    """Each is refused by both readers, and none of them waits for a writer."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["greedy"], folder)
    path = folder / name
    path.rename(tmp_path / "whole")
    INSTEAD[kind](path)
    for said in (python_says(folder), core_says(core, folder)):
        assert name in said
        assert "got " in said
        assert "expected " in said
        assert "\n" not in said


def test_what_lies_beside_the_tokenizer(core, bundles, tmp_path):
    folder = Path(shutil.copytree(bundles["greedy"], tmp_path / "bundle"))
    (folder / "tokenizer" / "special_tokens_map.json").write_text("{}")
    for said in (python_says(folder), core_says(core, folder)):
        assert "special_tokens_map.json: got a file that the manifest does not list, expected none" in said
