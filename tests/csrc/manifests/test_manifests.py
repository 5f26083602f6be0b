"""The two readers of a manifest, engine/bundles/manifest.py and the C++ core, take and refuse the same backends."""

import json
import subprocess
from pathlib import Path
from typing import Any

import fake_stages
import pytest
from csrc_tools import HANG

from engine.bundles.manifest import read_manifest
from engine.bundles.registry import BACKENDS
from engine.config import Preset

RTX = "cuda-sm80_sm86_sm89_sm120_sm121"
GOOD_TARGETS = [
    "cpu", "cuda", "cuda-sm90", "cuda-sm89", RTX, "cuda-sm89_sm120_sm121", "cpu-x86_64-avx2", "cpu-a-b-c",
    "cuda-_", "cuda-" + "x" * 40, "cuda-" + "-".join(["y" * 40] * 3),
]  # fmt: skip
BAD_TARGETS = [
    "", "gpu", "rocm-sm90", "Cuda-sm90", "cuda-SM90", "cuda-", "cuda--sm90", "cuda-sm90-", "-cuda", "cuda_sm90",
    "cudasm90", "cpux", "cpu-a-b-c-d", "cuda-" + "x" * 41, "cuda-sm89,sm90", "cuda-sm89+sm90", "cuda-sm89 sm90",
    " cuda", "cuda ", "cuda-sm89\n", "\ncuda", "cuda\0", "cuda-sm89\0", "cuda-\u0661", "cuda-\u00e9", "cuda-sm89/..",
]  # fmt: skip
BAD_BACKENDS = ["tensorrt-rtx", "tensorrt_rt", "tensorrt_rtx ", "Tensorrt_rtx", "TENSORRT", "rtx", "torch", "native"]


@pytest.fixture
def taken(native_build: Path, tmp_path: Path):
    """Whether both readers take a manifest with one backend; they must agree."""
    bundle = fake_stages.write_fake_bundle(tmp_path / "fake.bundle", Preset("greedy", shift=2.0))
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    usual = manifest["backends"]["aoti-cpu"]
    caches = {name: graph["mutates"] for name, graph in usual["graphs"].items()}

    def asked(backend: Any, target: Any, *, key: str | None = None, versions: Any = None, writes: str = "") -> bool:
        key = f"{backend}-{target}" if key is None else key
        versions = {"torch": "2.13.0", "tensorrt_rtx": "1.7.1.116"} if versions is None else versions
        entry = {**usual, "backend": backend, "target": target, "versions": versions, "graphs": {}}
        allowed = BACKENDS[backend].writes if backend in BACKENDS else "mutates"
        for name, graph in usual["graphs"].items():
            entry["graphs"][name] = graph = {**graph, "mutates": caches[name]}
            if (writes or allowed) == "aliases":
                replaced = [{**t, "name": f"{t['name']}_out"} for t in graph["inputs"] if t["name"] in caches[name]]
                graph |= {"mutates": [], "outputs": [*graph["outputs"], *replaced]}
                graph["aliases"] = {f"{cache}_out": cache for cache in caches[name]}
        path.write_text(json.dumps({**manifest, "backends": {key: entry}}))
        try:
            read_manifest(bundle)
            python = True
        except ValueError:
            python = False
        plugins = tmp_path / "none"  # so that a bundle that is read ends at its backend
        host = [native_build / "greedy-host", bundle, "--prompt", "a", "--quiet", "--plugin-dir", plugins]
        ran = subprocess.run(host, capture_output=True, text=True, timeout=HANG)
        assert ran.returncode == 2
        assert ran.stderr.count("\n") == 1
        refused = ran.stderr.startswith(f"error: {path}.backends.")
        assert refused or ran.stderr.startswith(f"error: {backend}: got no plugin"), ran.stderr
        assert python is not refused, f"{backend!r} {target!r}: Python {python}, C++ {not refused}: {ran.stderr}"
        return python

    return asked


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets(taken, backend):
    for target in GOOD_TARGETS:
        assert taken(backend, target), target
    for target in BAD_TARGETS:
        assert not taken(backend, target), target


def test_names_of_backends(taken):
    assert {name for name in (*BACKENDS, *BAD_BACKENDS) if taken(name, "cuda-sm89")} == set(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entry_is_named_for_backend_and_target(taken, backend):
    assert taken(backend, RTX, key=f"{backend}-{RTX}")
    for key in (backend, RTX, f"{backend}-cuda-sm80", f"{backend}_{RTX}", f"{RTX}-{backend}", "x"):
        assert not taken(backend, RTX, key=key), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions(taken, backend):
    needed = BACKENDS[backend].made_with
    assert taken(backend, "cpu", versions={}) is not bool(needed)
    assert taken(backend, "cpu", versions={"other": "1"}) is not bool(needed)
    for package in needed:
        assert taken(backend, "cpu", versions={package: "1"})
    for wrong in ({"torch": "", "tensorrt_rtx": ""}, {"torch": 2, "tensorrt_rtx": 1}):
        assert not taken(backend, "cpu", versions=wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_how_caches_are_written(taken, backend):
    allowed = BACKENDS[backend].writes
    for writes in ("aliases", "mutates"):
        assert taken(backend, "cpu", writes=writes) is (allowed in (writes, "either")), writes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk", 2**31),
        ("window", 2**31),
        ("attn_sink", 2**31),
        ("shift", 1e9),
        ("max_position", 2**62),
        ("stop_after", 2**62),
        ("shift", 1e-9),
    ],
)
def test_absurd_presets(native_build, tmp_path, name, value):
    """One line of each reader, before anything is sized by the number."""
    bundle = fake_stages.write_fake_bundle(tmp_path / "fake.bundle", Preset("causal", chunk=3, window=6, shift=2.0))
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["preset"][name] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"manifest.json.preset.{name}: got "):
        read_manifest(bundle).preset_value()
    host = [native_build / "greedy-host", bundle, "--prompt", "a", "--quiet", "--plugin-dir", tmp_path / "none"]
    ran = subprocess.run(host, capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {path}.preset.{name}: got "), ran.stderr
    assert ran.stderr.count("\n") == 1
