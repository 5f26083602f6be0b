"""Which backend of a bundle opens, in Python and in the C++ core, and what is said about those that do not."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import fake_stages
import pytest
from csrc_tools import open_fake

from engine.bundles.native import NativePipeline
from engine.bundles.registry import BACKENDS, Backend
from engine.loader import load_bundle
from engine.run import main

FIRST = "tensorrt-cuda-sm90"
NOT_HERE = f"{FIRST} does not open here: "


class Formulas(fake_stages.FakeStages):
    token_rows = plan = None


class Opens(Backend):
    """A backend whose graphs are formulas."""

    def load(self):
        return lambda *arguments, **options: Formulas()


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A bundle whose first backend opens nowhere here, and whose second one is formulas."""
    monkeypatch.setitem(BACKENDS, "aoti", Opens(**asdict(BACKENDS["aoti"])))
    folder = Path(shutil.copytree(fake_stages.RECORDED, tmp_path / "two.bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    second = manifest["backends"]["aoti-cpu"]
    first = second | {"backend": "tensorrt", "target": "cuda-sm90", "versions": {"tensorrt": "11.0"}}
    manifest["backends"] = {FIRST: first, "aoti-cpu": second}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_next_backend_opens(two):
    pipeline = load_bundle(two)
    assert pipeline.stages.name == "fake"
    (note,) = pipeline.notes
    assert note.startswith(NOT_HERE + "tensorrt")
    assert "\n" not in note
    pipeline.stream("teal").next_chunk()


def test_the_core_tries_in_the_same_order(two, core, native_build):
    pipeline = open_fake(core, native_build, two)
    assert pipeline.stages.name == "native-aoti"
    assert pipeline.notes == ()  # a plugin that was never installed is no news


@pytest.mark.parametrize("backend", ["tensorrt", FIRST])
def test_a_backend_that_was_asked_for_must_open(two, backend):
    with pytest.raises((ValueError, ImportError), match=r"^tensorrt"):
        load_bundle(two, backend)


def test_the_core_is_a_backend(two, core, monkeypatch):
    opened = []
    monkeypatch.setattr(NativePipeline, "__init__", lambda self, folder, **options: opened.append((folder, options)))
    monkeypatch.setattr("engine.loader.threads_of_bundle", lambda *arguments: 1)
    monkeypatch.setattr(NativePipeline, "device", None, raising=False)
    assert isinstance(load_bundle(two, "native", threads=1), NativePipeline)
    assert opened == [(two, {"verify": True, "threads": 1})]


def test_an_unknown_backend(two):
    with pytest.raises(ValueError, match=f"^bundle: got backend 'cuda', expected one of {FIRST}, aoti-cpu, native$"):
        load_bundle(two, "cuda")


def test_the_command_says_it(two, capsys):
    words = ["--bundle", str(two), "--prompt", "teal", "--frames", "3", "--out", "null"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    (said,) = [line for line in printed.err.splitlines() if "open" in line]
    assert said.startswith(f"note: {NOT_HERE}")
    report = json.loads(printed.out.splitlines()[-1])
    assert report["backend"] == "fake"
    assert report["notes"] == [said.removeprefix("note: ")]
    assert main([*words, "--backend", "tensorrt"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: tensorrt")
