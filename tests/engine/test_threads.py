"""How many threads compute, how idle ones wait, and who decides it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import threads
from engine.config import TransformerConfig

ROOT = Path(__file__).parents[2]
SPRITES = TransformerConfig(num_attention_heads=4, attention_head_dim=32, ffn_dim=512, num_layers=4)
WAN = TransformerConfig()


def work(config, tokens):
    return threads.work_of(tokens, config.dim, config.ffn_dim)


@pytest.mark.parametrize(
    ("config", "tokens", "cores", "expected"),
    [
        (SPRITES, 16, 1, 1),
        (SPRITES, 16, 2, 1),
        (SPRITES, 16, 64, 1),  # 32 x 32 pixels: more threads would only wait
        (SPRITES, 16 * 64, 64, 8),  # the same weights at 256 x 256
        (WAN, 1560, 1, 1),
        (WAN, 1560, 2, 2),
        (WAN, 1560, 64, 64),  # 480 x 832
        (WAN, 3 * 1560, 192, 192),
        (WAN, 24, 64, 39),  # 64 x 96
    ],
)
def test_threads_by_the_models_work_and_the_cores(config, tokens, cores, expected):
    assert threads.count(work(config, tokens), cores) == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1),  # a thread that is throttled would hold up the others
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "300000 100000"}, 3),
        ("0::/only/the/host/sees/it\n", {"cpu.max": "800000 100000"}, 8),
        ("3:cpu,cpuacct:/a\n2:memory:/a\n", {"cpu,cpuacct/a": (600000, 100000)}, 6),
        ("3:cpu,cpuacct:/a\n", {"cpu,cpuacct/a": (-1, 100000)}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)
def test_the_containers_quota(own, files, expected, tmp_path):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        file = root / name
        if isinstance(text, tuple):
            file.mkdir(parents=True)
            (file / "cpu.cfs_quota_us").write_text(f"{text[0]}\n")
            (file / "cpu.cfs_period_us").write_text(f"{text[1]}\n")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert threads._quota(root, tmp_path / "own") == expected


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(threads, "_quota", lambda *_: None)
    assert threads.cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert threads.cores() == 64
    monkeypatch.setattr(threads, "_quota", lambda *_: 3)
    assert threads.cores() == 3


@pytest.fixture
def process(monkeypatch):
    """A process with 64 cores whose torch the engine imported; returns how to change it."""
    number = [64]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: number.__setitem__(0, n))
    monkeypatch.setattr(threads, "cores", lambda: 64)
    monkeypatch.setattr(threads, "_default", 64)
    monkeypatch.setattr(threads, "_settled", None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


SMALL, LARGE = work(SPRITES, 16), work(WAN, 1560)


def test_a_model_gets_what_its_work_feeds_and_several_share_torchs_number(process):
    assert (threads.settle(None, SMALL), torch.get_num_threads()) == (1, 1)
    assert (threads.settle(None, LARGE), torch.get_num_threads()) == (64, 64)
    assert (threads.settle(None, SMALL), torch.get_num_threads()) == (1, 64)


def test_a_quota_counts(process):
    process.setattr(threads, "cores", lambda: 2)
    assert (threads.settle(None, LARGE), torch.get_num_threads()) == (2, 2)


@pytest.mark.parametrize("chosen", [2, 64])
def test_the_users_choice_stays(process, chosen):
    assert (threads.settle(chosen, SMALL), torch.get_num_threads()) == (chosen, chosen)
    threads.settle(None, SMALL)
    assert torch.get_num_threads() == chosen
    with pytest.raises(ValueError, match="threads: got 0, expected at least 1"):
        threads.settle(0, SMALL)


def test_what_the_user_told_torch_stays(process):
    torch.set_num_threads(7)
    assert (threads.settle(None, LARGE), torch.get_num_threads()) == (7, 7)
    assert (threads.settle(None, SMALL), torch.get_num_threads()) == (1, 7)


def test_the_environment_stays(process):
    process.setenv("OMP_NUM_THREADS", "64")
    assert (threads.settle(None, SMALL), torch.get_num_threads()) == (64, 64)


def test_where_torch_was_there_first_its_number_stays(process):
    process.setattr(threads, "_default", None)
    assert (threads.settle(None, SMALL), torch.get_num_threads()) == (1, 64)
    assert (threads.settle(8, SMALL), torch.get_num_threads()) == (8, 8)


@pytest.mark.parametrize("package", ["bench", "distill", "export"])
def test_every_command_line_imports_the_engine_before_torch(package):
    _, first, *_ = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(first, ast.Import)
    assert [alias.name for alias in first.names] == ["engine"]


STREAM = """
import json, os, sys
{first}
import engine
import torch
before = torch.get_num_threads()
with engine.load().stream("a red circle", frames=1) as stream:
    shape = next(stream).shape
policy = os.environ.get("OMP_WAIT_POLICY")
print(json.dumps([shape, policy, before, torch.get_num_threads()]))
"""


def fresh(first="", **environment):
    """What a new process prints, and what its OpenMP library read when it was loaded."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    env = {**kept, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE", **environment}
    code = STREAM.format(first=first)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    read = {line.split("=")[0].split()[-1]: line.split("'")[1] for line in done.stderr.splitlines() if " = '" in line}
    return json.loads(done.stdout.splitlines()[-1]), read


def spins(read):
    """How often an idle thread looks before it sleeps; libgomp shows PASSIVE as its policy where none is set, too."""
    if "GOMP_SPINCOUNT" not in read:
        pytest.skip(f"got an OpenMP library that shows {sorted(read)}, expected libgomp")
    return int(read["GOMP_SPINCOUNT"])


@pytest.mark.slow
def test_the_engine_lets_idle_threads_sleep_before_torch_is_loaded():
    (shape, policy, _, after), read = fresh()
    assert (shape, policy, after) == ([32, 32, 3], "passive", 1)
    assert spins(read) == 0


@pytest.mark.slow
def test_the_users_environment_wins():
    (_, policy, before, after), read = fresh(OMP_WAIT_POLICY="active", OMP_NUM_THREADS="2")
    assert (policy, before, after) == ("active", 2, 2)
    assert spins(read) > 0


@pytest.mark.slow
def test_a_program_that_imported_torch_first_keeps_its_settings():
    (shape, policy, before, after), read = fresh("import torch")
    assert (shape, policy, before) == ([32, 32, 3], None, after)
    assert spins(read) > 0


def test_onnx_sessions_never_spin(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from engine.bundles.manifest import GraphSpec, TensorSpec
    from engine.bundles.onnx import OnnxGraph

    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [2])], [value("y", 1, [2])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    x, y = (TensorSpec(name=name, dtype="float32", shape=[2]) for name in "xy")
    spec = GraphSpec(file="g.onnx", inputs=[x], outputs=[y], weights={}, aliases={})
    opened = OnnxGraph("g", tmp_path / "g.onnx", spec, {}, threads=3)
    options = opened.session.get_session_options()
    assert options.intra_op_num_threads == 3
    for pool in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{pool}.allow_spinning") == "0"
    assert opened({"x": torch.tensor([-1.0, 2.0])})["y"].tolist() == [0.0, 2.0]
