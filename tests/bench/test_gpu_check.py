"""gpu-check on a processor: every step at tiny shapes, and a run whose steps fail, hang, or find something wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from limits import HANG

from bench.__main__ import main
from bench.gpu import check, kernel_tests
from bench.gpu.lines import Lines
from bench.gpu.steps import STEPS
from bench.gpu.streams import CAUSAL
from bench.report.gpu import read_lines

ROOT = Path(__file__).parents[2]
TABLES = {"probe": "library's FP8 product", "recorded": "recorded cases", "greedy": "parts of a chunk",
          "causal": "flow errors", "convolutions": "convolutions", "operations": "operations"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in STEPS if name not in ("kernel-tests", "recorded", "build")]
)  # tests of their own
def test_every_step_at_tiny_shapes(tmp_path, name):
    file = tmp_path / "lines.jsonl"
    STEPS[name].run(Lines(file, name, smoke=True))
    rows = read_lines(file)
    assert {row["step"] for row in rows} == {name}
    assert [row for row in rows if row["kind"] == "check" and not row["passed"]] == []
    if name in TABLES:
        assert any(row.get("table") == TABLES[name] for row in rows)
    speeds = {row["variant"] for row in rows if row["kind"] == "speed"}
    assert speeds == {"greedy": {"greedy bf16", "greedy fp8", "greedy fp8-attention"}, "eager": {"greedy eager"},
                      "causal": {f"{preset} bf16" for preset in CAUSAL}}.get(name, set())  # fmt: skip


@pytest.mark.thorough
def test_all_of_it_in_three_minutes(tmp_path):
    """The command as an owner runs it, without a GPU."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "bench", "gpu-check", "--smoke"]
    env = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG, check=False)
    seconds = time.perf_counter() - begun
    print(done.stdout, done.stderr, seconds)
    (file,) = tmp_path.glob("*.jsonl")
    rows = read_lines(file)
    assert [row["step"] for row in rows if row["kind"] == "ended"] == list(STEPS)
    assert done.returncode == 0
    assert "all of it runs" in done.stdout
    assert "nothing was measured on a GPU" in done.stdout


@pytest.fixture
def staged(monkeypatch, tmp_path):
    """Steps that are small scripts: {step: script}; returns (exit status, rows)."""

    def run(scripts, *options, limit=HANG):
        def words(name, file, smoke):
            line = json.dumps({"step": name, "kind": "check", "name": "a", "passed": True, "detail": "b"})
            script = f"import sys, time\nopen({str(file)!r}, 'a').write({line!r} + chr(10))\n" + scripts[name]
            return [sys.executable, "-c", script]

        steps = {name: check.Step(print, limit, "a step") for name in scripts}
        monkeypatch.setattr(check, "words_of", words)
        monkeypatch.setattr(check, "STEPS", steps)
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        status = main(["gpu-check", "--smoke", *options])
        newest = max((tmp_path / "out").glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        return status, read_lines(newest)

    return run


def ended(rows):
    return {row["step"]: row["status"] for row in rows if row["kind"] == "ended"}


def test_a_step_that_fails_costs_no_other(staged, capfd):
    status, rows = staged({"first": "sys.exit(3)", "second": "pass", "third": "raise MemoryError"})
    assert status == 1
    assert ended(rows) == {"first": "3", "second": "0", "third": "1"}
    assert sum(row["kind"] == "check" for row in rows) == 3  # what a step found before it failed is kept
    assert "first, third did not end well; 3 of 3 checks are right" in capfd.readouterr().out


@pytest.mark.slow
def test_a_step_that_hangs_is_stopped_with_its_children(staged, tmp_path):
    child = f"import time; time.sleep(20); open({str(tmp_path / 'alive')!r}, 'w')"
    script = f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    begun = time.perf_counter()
    status, rows = staged({"hangs": script, "next": "pass"}, limit=3)
    assert time.perf_counter() - begun < 15
    assert status == 1
    assert ended(rows) == {"hangs": "over its limit", "next": "0"}
    assert not (tmp_path / "alive").exists()


@pytest.mark.slow
def test_the_whole_ends_in_time(staged):
    scripts = {"slow": "time.sleep(60)", "late": "pass"}
    begun = time.perf_counter()
    status, rows = staged(scripts, "--minutes", "0.3")
    assert time.perf_counter() - begun < 20
    assert status == 1
    assert ended(rows) == {"slow": "over its limit", "late": "no time"}


def test_a_run_in_which_all_is_well(staged, capfd):
    status, _ = staged({"one": "pass", "two": "pass"})
    assert status == 0
    assert "all of it runs; 2 of 2 checks are right" in capfd.readouterr().out


def test_some_steps_by_option_or_environment(staged, monkeypatch):
    scripts = {"one": "pass", "two": "pass", "three": "pass"}
    assert list(ended(staged(scripts, "--steps", "three,one")[1])) == ["one", "three"]
    monkeypatch.setenv("STEPS", "two")
    assert list(ended(staged(scripts)[1])) == ["two"]


def test_an_earlier_run_is_kept(staged, tmp_path):
    for _ in range(2):
        staged({"one": "pass"})
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_red_check_and_no_check_are_not_well():
    end = {"step": "a", "kind": "ended", "seconds": 1.0, "status": "0"}
    red = {"step": "a", "kind": "check", "name": "flows", "passed": False, "detail": "error 1"}
    text, well = check.verdict([red, end])
    assert not well
    assert "RED a: flows: error 1" in text
    assert not check.verdict([end])[1]
    assert check.verdict([red | {"passed": True}, end])[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--smoke", "--steps", "probe,fly"], "--steps: got fly, expected some of probe"),
        (["--smoke", "--one", "fly"], "--one: got fly, expected one of probe"),
        (["--smoke", "--minutes", "0"], "--minutes: got 0.0, expected more than 0"),
    ],
)
def test_bad_options_give_one_line(words, said, capsys):
    assert main(["gpu-check", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there: gpu-check would run")
def test_without_a_gpu(capsys):
    assert main(["gpu-check"]) == 2
    assert "got no CUDA device" in capsys.readouterr().err


def test_kernel_tests_that_are_left_out_exist():
    assert all((kernel_tests.FOLDER / name).is_file() for name in kernel_tests.ELSEWHERE)
    assert Path(kernel_tests.command(True)[-1]).is_file()


@pytest.mark.slow
def test_steps_need_only_what_gpu_machines_have(tmp_path):
    """No network there: torch, Triton, numpy, pytest, safetensors, tokenizers, psutil, rich."""
    missing = ["accelerate", "av", "diffusers", "hypothesis", "matplotlib", "onnx", "onnxruntime", "peft"]
    missing += ["onnx_ir", "onnxscript", "pybind11", "pydantic", "tensorboard", "transformers"]
    file = tmp_path / "lines"
    code = f"""
import importlib.machinery, runpy, sys
real, missing = importlib.machinery.PathFinder.find_spec, {missing}
def find(name, path=None, target=None):
    return None if name.split(".")[0] in missing else real(name, path, target)
importlib.machinery.PathFinder.find_spec = find
sys.argv = ["bench", "gpu-check", "--smoke", "--one", "greedy", "--results", {str(file)!r}]
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    rows = read_lines(file)
    assert [row["kind"] for row in rows[:4]] == ["check", "row", "speed", "row"]
    assert all(row["passed"] for row in rows if row["kind"] in ("check", "speed"))
