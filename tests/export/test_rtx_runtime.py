"""The tensorrt_rtx backend on a stand-in of its package: whole streams, outputs that nobody reads, kept kernels.

Running a real plan needs an RTX GPU; what parser and builder tell is in test_rtx_plans.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in_rtx
import stand_in_tensorrt
import torch
from spelled import PROMPT, by_heads, inputs_of, relative, stage

import engine
from engine.bundles import tensorrt as tensorrt_stages
from engine.bundles.manifest import GraphSpec
from engine.bundles.stages import NotHere
from engine.bundles.tensorrt import TensorrtGraph, require_tensorrt, serves
from engine.bundles.tensorrt_rtx import KernelCache, cache_folder
from engine.loader import load_bundle
from engine.stream import Pipeline
from export.compilers import TensorrtRtxCompiler
from export.program import trace
from export.tensorrt.build import BuildOptions
from export.write import write_bundle

real = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (extra rtx)")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The stand-in in place, and a folder for kernels that no program has used."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in_rtx.module(real))
    monkeypatch.setattr(stand_in_rtx, "compiled", [])
    monkeypatch.setattr(tensorrt_stages, "_stream", lambda device: 0)
    monkeypatch.setattr(tensorrt_stages, "_capture", lambda enqueue: enqueue)
    monkeypatch.setattr(tensorrt_stages, "target_of", lambda device: "cpu-standin")
    monkeypatch.setenv("GREEDY_CACHE", str(tmp_path / "cache"))
    tensorrt_stages.logger_of.cache_clear()
    yield tmp_path / "cache" / "tensorrt_rtx"
    tensorrt_stages.logger_of.cache_clear()


def rtx_bundle(pipeline: Pipeline, tokenizer: Path, folder: Path) -> Path:
    """A bundle whose plans are for "cpu-standin"."""
    plans = BuildOptions(gpu=(89,))
    lines = list(write_bundle(pipeline, folder, tokenizer, PROMPT, backends=("tensorrt_rtx",), plans=plans))
    assert "expected cpu-standin" in lines[-1]
    manifest = json.loads((folder / "manifest.json").read_text())
    ours = manifest["backends"].pop("tensorrt_rtx-cuda-sm89") | {"target": "cpu-other_standin"}
    manifest["backends"] = {"tensorrt_rtx-cpu-other_standin": ours}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.slow
def test_a_bundle_streams_as_torch_does(pipeline: Pipeline, model_dir: Path, cache: Path, tmp_path: Path) -> None:
    """The whole loop on plans, past the ETM's window; a second start compiles nothing."""
    bundle = rtx_bundle(pipeline, model_dir / "tokenizer", tmp_path / "bundle")
    for start in range(2):
        other = load_bundle(bundle)
        assert other.stages.name == "tensorrt_rtx"
        assert len(stand_in_rtx.compiled) == (7 if start == 0 else 0)  # text, two roles', three passes, the VAE's two
        stand_in_rtx.compiled.clear()
        with pipeline.stream(PROMPT, seed=3) as a, other.stream(PROMPT, seed=3) as b:
            apart = [np.abs(a.next_chunk().astype(int) - b.next_chunk()).max() for _ in range(12)]
        assert max(apart) <= 2
    assert list(cache.glob("*.kernels"))


def test_outputs_that_only_the_plan_has_share_memory(cache: Path, tmp_path: Path) -> None:
    graph = stage(engine.load(precision="fp16"), "etm")
    program, file = trace(graph), tmp_path / "etm.plan"
    TensorrtRtxCompiler(BuildOptions(), (89,)).write(program, file)
    spec = GraphSpec(
        file=file.name, inputs=program.inputs, outputs=program.outputs, aliases=graph.aliases, weights={}
    )  # fmt: skip
    trt = require_tensorrt("tensorrt_rtx")
    runtime, cpu = trt.Runtime(tensorrt_stages.logger_of(trt)), torch.device("cpu")
    kernels = KernelCache(trt, file.read_bytes())
    plan = TensorrtGraph("etm", file, spec, {}, runtime, cpu, trt, lambda made, _: kernels.new_context(made))
    unread = {name: address for name, address in plan.context._addresses.items() if name.startswith("unread_")}
    assert len(unread) == 4
    assert len(set(unread.values())) == 1
    assert plan._unread.numel() == 64 * 128 * 2  # bytes of the queries of a layer
    inputs = inputs_of(graph, 0, 1, 2)
    with torch.no_grad():
        expected = graph.module(*(value.clone() for value in inputs.values()))
    held = {n: by_heads(x, [1, 4, x.shape[1], 32]).reshape(x.shape) if n in graph.aliases.values() else x
            for n, x in inputs.items()}  # fmt: skip
    made = plan(held)
    assert made.keys() == {spec.name for spec in program.outputs}
    assert relative(made["hidden"], expected[0]) <= 2e-2  # four layers in float16, in another order of operations
    lying = spec.model_copy(update={"outputs": spec.outputs[:-1]})
    with pytest.raises(ValueError, match="v_3_out: got None in the manifest"):
        TensorrtGraph("etm", file, lying, {}, runtime, cpu, trt)


def test_kept_kernels(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trt = sys.modules["tensorrt_rtx"]

    class Engine:
        def create_runtime_config(self) -> Any:
            return trt.IRuntimeConfig()

        def create_execution_context(self, config: Any) -> Any:
            stand_in_rtx.compiled.extend(["it"] if config._cache._hold("it") else [])
            return object()

    def start(plan: bytes = b"a plan" * 500_000) -> KernelCache:
        kernels = KernelCache(trt, plan)
        assert kernels.new_context(Engine())
        kernels.save()
        return kernels

    first = start()
    assert first.file is not None
    assert first.file.parent == cache
    assert stand_in_rtx.compiled == ["it"]
    assert first.file.read_bytes() == b"kernels it"
    assert start().file == first.file
    assert stand_in_rtx.compiled == ["it"]
    assert start(b"another").file != first.file
    assert stand_in_rtx.compiled == ["it", "it"]
    assert capsys.readouterr().err == ""
    for damage in (b"", b"of another GPU"):
        first.file.write_bytes(damage)
        start()
        assert first.file.read_bytes() == b"kernels it"
        assert "compiled again" in capsys.readouterr().err
    assert first.file.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700
    (cache.parent / "elsewhere").write_bytes(b"kernels it")
    first.file.unlink()
    first.file.symlink_to(cache.parent / "elsewhere")
    start()
    assert "compiled again" in capsys.readouterr().err
    assert not first.file.is_symlink()
    assert (cache.parent / "elsewhere").read_bytes() == b"kernels it"
    # The name that the C++ plugin gives the same plan: csrc/tests/tensorrt/kernel_cache_test.cpp.
    same = KernelCache(trt, b"in x 0 6\nout y 0 6\n").file
    assert same == cache / "36c0dd977f12a14b2c1861e5c4e6aa5e-19.kernels"
    blocked = cache.parent / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("GREEDY_CACHE", str(blocked))
    kernels = start()
    assert "expected a place to keep compiled kernels" in capsys.readouterr().err
    kernels.save()
    assert capsys.readouterr().err == ""  # said once
    monkeypatch.setenv("GREEDY_CACHE", "")
    assert start().file is None
    assert capsys.readouterr().err == ""


def test_where_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GREEDY_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() is None
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/greedy-stream")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by its specification
    assert cache_folder() == Path("/home/me/.cache/greedy-stream")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_folder() == Path("/var/cache/me/greedy-stream")
    monkeypatch.setenv("GREEDY_CACHE", "/ours")
    assert cache_folder() == Path("/ours")


@pytest.mark.parametrize(
    ("target", "here", "runs"),
    [
        ("cuda-sm89", "cuda-sm89", True), ("cuda-sm80_sm86_sm89_sm120_sm121", "cuda-sm121", True),
        ("cuda-sm80_sm86", "cuda-sm8", False), ("cuda-sm120_sm121", "cuda-sm12", False),
        ("cuda-sm89", "cpu-sm89", False), ("cuda", "cuda-sm89", False), ("cpu-x86_64-avx2", "cuda-sm89", False),
    ],
)  # fmt: skip
def test_targets_of_several_gpus(target: str, here: str, runs: bool) -> None:
    assert serves(target, here) == runs


def test_another_version_is_refused(
    pipeline: Pipeline, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "__version__", "2.0.0.1")
    with pytest.raises(NotHere, match=r"tensorrt_rtx: got version 2\.0\.0\.1, expected 1"):
        tensorrt_stages.require_tensorrt("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(NotHere, match="tensorrt_rtx: got no package tensorrt_rtx, expected version 1"):
        tensorrt_stages.require_tensorrt("tensorrt_rtx")
    assert stand_in_tensorrt.PLUGINS == {}
