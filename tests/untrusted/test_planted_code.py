"""Code in every place of a model folder where a library might run it: it never runs, and nothing is asked."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG
from PIL import EpsImagePlugin
from plants import pickles, planted_folders

from engine.media.pictures import kind_of, read_image

ROOT = Path(__file__).parents[2]
DOORS = Path(__file__).parent / "through_all_doors.py"
ANSWERS = b"yes\n" * 20  # to a question that nothing may ask
# Resuming a training of one's own and scoring a teacher are no part of the product's loaders: any error will do there.
LOOSE = ("state ", "student ", "teacher ", "base ", "videos ", "pretrained ", "scales ", "jobs ")


def child(arguments, cwd):
    """Run Python with answers on its standard input. Returns (what it printed, what it left of the answers)."""
    reads, writes = os.pipe()
    os.write(writes, ANSWERS)
    os.close(writes)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "0"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdin=reads,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    left = b""
    while part := os.read(reads, 1000):
        left += part
    os.close(reads)
    return done, left


@pytest.fixture(scope="module")
def places(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    return root / "marker", planted_folders(model_dir, root, root / "marker")


@pytest.mark.slow
def test_no_planted_code_runs_and_nothing_is_asked(places):
    marker, folders = places
    # -P keeps the current folder, which is the model's, from the places of modules, as the installed commands do.
    named = json.dumps({name: str(folder) for name, folder in folders.items()})
    done, left = child(["-P", str(DOORS), str(marker), named], folders["model"])
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    said = dict(lines)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not marker.exists(), marker.read_text()
    assert left == ANSWERS
    assert said["load model"] == "ok"
    assert said["run model"] == "rc 0"
    assert said["load stock"] == said["adapter adapter mapping"] == "ok"
    assert "custom code" in said["videos stock"]
    assert said["run adapter adapter mapping"] == "rc 0"
    assert "_class_name" in said["load index"]
    assert "megatron_core 'evil'" in said["adapter adapter megatron"]
    assert "evil" in said["videos index"]
    assert said["serve"] == "rc 2"
    wrong = {name: text for name, text in said.items() if "UNEXPECTED" in text and not name.startswith(LOOSE)}
    assert not wrong


def test_the_plants_run_where_something_lets_them(tmp_path):
    """Each kind of plant writes the marker where it is opened by what the product does not use."""
    marker = tmp_path / "marker"
    for name, data in pickles(marker).items():
        if data[:2] == b"\x80\x04" and name != "object.npy":
            pickle.loads(data)
            assert marker.read_text() == "pickle\n"
            marker.unlink()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_module_runs_by_transformers_question_and_by_python_m(places):
    """What the product keeps out, and what docs/security.md does not promise."""
    marker, folders = places
    folder = str(folders["spiece"] / "tokenizer")
    asks = f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({folder!r})"
    _, left = child(["-P", "-c", asks], folders["files"])
    assert marker.exists() or left != ANSWERS
    marker.unlink(missing_ok=True)
    child(["-m", "engine.run", "--help"], folders["files"])
    assert marker.exists()
    marker.unlink()
    child(["-P", "-m", "engine.run", "--help"], folders["files"])
    assert not marker.exists()


def test_pictures_run_no_program(tmp_path, monkeypatch):
    """PIL hands PostScript to Ghostscript, where that is installed."""
    ghostscript, marker = tmp_path / "gs", tmp_path / "marker"
    ghostscript.write_text(f"#!/bin/sh\necho ran >> {marker}\necho 10.0\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    drawn = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
    binary = struct.pack("<I6I", 0xC6D3D0C5, 32, len(drawn), 0, 0, 0, 0) + bytes(4) + drawn  # with a preview's header
    for name, content in {"a.eps": drawn, "b.png": drawn, "c.jpg": binary}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="it is no picture"):
            read_image(tmp_path / name, 8, 8)
        assert not marker.exists(), marker.read_text()
        assert kind_of(tmp_path / name) == ""
