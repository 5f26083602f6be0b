"""What the C++ core and Python refuse alike: prompts, tokens outside the table, JSON that would take much memory."""

import json
import re
import shutil
import warnings
from pathlib import Path
from types import ModuleType

import fake_stages
import numpy as np
import pytest
import torch
from csrc_tools import ROOT, open_fake
from safetensors.torch import save_file

from engine import files
from engine.bundles.hashes import file_hash
from engine.bundles.manifest import GraphSpec, read_manifest
from engine.bundles.registry import Backend
from engine.bundles.stages import GraphStages, StageGraph
from engine.files import MOST_MARKS, MOST_MARKS_IN_LISTS, MOST_TEXT, read_json
from engine.loader import load_bundle
from engine.model.text import MOST_CHARACTERS, MOST_GARBLED, PromptWarning, Tokenizer, check_prompt

TOKENIZER = fake_stages.RECORDED / "tokenizer"


def opened(core: ModuleType, native_build: Path, folder: Path, plugins: str = "fake_plugin"):
    return core.open_bundle(str(folder), plugin_dir=str(native_build / plugins))


def test_both_sides_have_the_same_limits():
    said = "".join((ROOT / "csrc" / name).read_text() for name in ("formats/json.h", "text/cleaning.h"))
    found = dict(re.findall(r"constexpr std::size_t (k\w+) = (?:std::size_t\{1\} << )?([\d']+);", said))
    numbers = {name: int(value.replace("'", "")) for name, value in found.items()}
    assert (numbers["kMostCharacters"], numbers["kMostGarbled"]) == (MOST_CHARACTERS, MOST_GARBLED)
    limits = [1 << numbers[name] for name in ("kMostBytes", "kMostMarks", "kMostInLists")]
    assert limits == [MOST_TEXT, MOST_MARKS, MOST_MARKS_IN_LISTS]


@pytest.mark.parametrize(
    "prompt", ["red\0blue", "\0", "circle\0", "a" * (MOST_CHARACTERS + 1), "红" * (MOST_CHARACTERS + 1), "&" * 40_000],
    ids=lambda prompt: ascii(prompt[:10]),
)  # fmt: skip
def test_a_prompt_is_refused_whole(core, native_build, prompt):
    session = opened(core, native_build, fake_stages.RECORDED).open(1)
    session.set_prompt([("teal", 1.0)], True, 0)
    with pytest.raises(ValueError, match=r"^prompt: got ") as native:
        session.set_prompt([(prompt, 1.0)], True, 0)
    with pytest.raises(ValueError, match=r"^prompt: got ") as python:
        check_prompt(prompt)
    assert str(native.value) == str(python.value)
    other = opened(core, native_build, fake_stages.RECORDED).open(1)
    other.set_prompt([("teal", 1.0)], True, 0)
    assert np.array_equal(session.next_chunk()[0], other.next_chunk()[0])


@pytest.mark.parametrize("why", ["a warning that is an error", "a tokenizer that is gone"])
def test_a_prompt_without_its_warning_is_not_set(core, native_build, tmp_path, why):
    folder = Path(shutil.copytree(fake_stages.RECORDED, tmp_path / "bundle"))
    stream = open_fake(core, native_build, folder).stream("teal", seed=1)
    if why == "a tokenizer that is gone":
        shutil.rmtree(folder / "tokenizer")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        with pytest.raises((PromptWarning, ValueError)):
            stream.set_prompt("a red circle " * 40)
    with open_fake(core, native_build, fake_stages.RECORDED).stream("teal", seed=1) as other:
        assert np.array_equal(stream.next_chunk(), other.next_chunk())
    assert stream.set_prompt("a blue square") == 1


def test_graphs_for_any_processor_are_no_machine_code(core, native_build):
    """The recorded bundle's target is cpu, which says nothing of instructions; the real plugin refuses it."""
    with pytest.raises(ImportError, match="got graphs for cpu, expected ones that this machine runs"):
        opened(core, native_build, fake_stages.RECORDED, ".")


class NoGraphs(GraphStages):
    """Stages of a bundle whose graphs return nothing."""

    def open_graph(self, name: str, file: Path, spec: GraphSpec) -> StageGraph:
        return lambda inputs: {"text_emb": None}


CHANGES = {
    "one more than the table": lambda t: t["model"]["vocab"].update(teal=29),
    "far outside": lambda t: t["model"]["vocab"].update(teal=2_000_000),
    "an added token": lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 2_000_000, "content": "<x>"}),
    "the template's": lambda t: t["post_processor"]["special_tokens"]["</s>"].update(ids=[2_000_000]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tokenizers_with_a_token_outside(tmp_path, change):
    folder = Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))
    assert Tokenizer(folder).tokens == 29
    content = json.loads((folder / "tokenizer.json").read_text())
    CHANGES[change](content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    # The tokenizers library gives an added token the next number, whatever the file says.
    few = change in ("one more than the table", "an added token")
    assert Tokenizer(folder).tokens == (30 if few else 2_000_001)


@pytest.mark.parametrize("change", CHANGES)
def test_bundles_with_a_token_outside_are_refused(core, native_build, tmp_path, monkeypatch, change):
    folder = Path(shutil.copytree(fake_stages.RECORDED, tmp_path / "bundle"))
    tokenizer, manifest = folder / "tokenizer" / "tokenizer.json", json.loads((folder / "manifest.json").read_text())
    save_file({"encoder.shared.weight": torch.zeros(29, 1)}, folder / "weights.safetensors")
    manifest["backends"]["aoti-cpu"]["graphs"]["encode_text"]["weights"] = {"table": "encoder.shared.weight"}

    def write() -> None:
        for name in ("weights.safetensors", "tokenizer/tokenizer.json"):
            size = (folder / name).stat().st_size
            manifest["files"][name] = {"bytes": size, "sha256": file_hash(folder / name)}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    write()
    opened(core, native_build, folder)
    monkeypatch.setattr(Backend, "load", lambda _: NoGraphs)
    stages = load_bundle(folder).stages
    right = torch.tensor([[28, 0]])
    assert stages.encode_text(right, right) is None
    for wrong in (29, 2_000_000, -1, 2**62, -(2**63)):
        with pytest.raises(ValueError, match=rf"^encode_text: got tokens .*{wrong}.*, expected 0 to 28$"):
            stages.encode_text(torch.tensor([[3, wrong]]), right)
    content = json.loads(tokenizer.read_text())
    CHANGES[change](content)
    tokenizer.write_text(json.dumps(content))
    write()
    for opens in (lambda: opened(core, native_build, folder), lambda: load_bundle(folder)):
        with pytest.raises(ValueError, match=r"got token \d+, expected 0 to 28, the rows of the text encoder's table"):
            opens()


MANY = {
    "numbers": (b"[" + b"0," * MOST_MARKS_IN_LISTS + b"0]", "commas and brackets"),
    "lists": (b"[" + b"[]," * MOST_MARKS_IN_LISTS + b"0]", "commas and brackets"),
    "objects": (b"[" + b"{}," * MOST_MARKS_IN_LISTS + b"0]", "commas and brackets"),
    "brackets": (b"[" * (MOST_MARKS_IN_LISTS + 1), "commas and brackets"),
    "bytes": (b" " * (MOST_TEXT + 1), "bytes"),
}


@pytest.mark.parametrize("kind", MANY)
def test_json_is_counted_before_it_is_read(tmp_path, monkeypatch, kind):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was read")

    content, said = MANY[kind]
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(content)
    (tmp_path / "manifest.json").write_bytes(content)
    monkeypatch.setattr(files.json, "loads", never)
    for reads in (lambda: read_json(tmp_path / "manifest.json"), lambda: read_manifest(tmp_path)):
        with pytest.raises(ValueError, match=rf"^{tmp_path}.*got .*{said}.*, expected at most \d+$"):
            reads()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"got .*{said}.*, expected .*at most"):
        Tokenizer(tmp_path / "tokenizer")


def test_json_of_the_largest_size_is_read(tmp_path):
    file = tmp_path / "large.json"
    file.write_bytes(b'{"a": [' + b"0," * (MOST_MARKS_IN_LISTS - 3) + b"0]}")
    assert len(read_json(file)["a"]) == MOST_MARKS_IN_LISTS - 2
