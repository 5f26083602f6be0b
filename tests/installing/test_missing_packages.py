"""A program that needs a package of an extra says so in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

ROOT = Path(__file__).parents[2]
# sitecustomize.py of the child: the package is not there.
HIDE = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def said(tmp_path: Path, hidden: list[str], *words: str) -> tuple[int, str]:
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(names=hidden))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ran = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANG
    )
    return ran.returncode, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("accelerate", "distill", ["distill", "teacher", "--help"]),
        ("diffusers", "distill", ["distill", "latents", "--help"]),
    ],
)
def test_the_extra_is_named(tmp_path, package, extra, words):
    line = f"error: got no package {package}, expected pip install 'greedy-stream[{extra}]'\n"
    assert said(tmp_path, [package], *words) == (2, line)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["export", "--help"], ["engine.cli", "export", "--help"]])
def test_help_needs_no_extra(tmp_path, words):
    assert said(tmp_path, ["onnx"], *words) == (0, "")


def test_a_package_of_no_extra_is_named_itself(tmp_path):
    code, told = said(tmp_path, ["psutil"], "engine.run", "--help")
    assert (code, told) == (2, "error: got no package psutil, expected pip install psutil\n")


def test_a_module_of_ours_that_is_missing_is_a_fault_of_ours(tmp_path):
    code, told = said(tmp_path, ["engine.loader"], "engine.run", "--help")
    assert code == 1
    assert "Traceback" in told
