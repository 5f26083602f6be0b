"""The tensorrt_rtx plugin and the real TensorRT for RTX, without a GPU.

Our declaration of its binary interface is compared with NVIDIA's Python package. The plugin is opened and given a plan.
"""

import ctypes
import json
import platform
import subprocess
from ctypes import c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import fake_stages
import numpy as np
import pytest
import torch
from csrc_tools import HANG
from vtables import Asking, Recorded, address_of, function_at

from engine.config import Preset

PRESET = Preset("greedy", shift=2.0)
OTHER, BLOB, ARRAY = Recorded(), b"of a plan", np.ones(3, np.float32)  # arguments


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")


@pytest.fixture(scope="module")
def ours(native_build: Path) -> ctypes.CDLL:
    """The calls of our declaration, by name."""
    return ctypes.CDLL(str(native_build / "librtx_calls.so"))


@pytest.fixture(scope="module")
def plugin(rtx: Any, native_build: Path) -> Path:
    found = native_build / "libgreedy_tensorrt_rtx.so"
    if not found.exists():
        pytest.skip("the plugin tensorrt_rtx is not built: it needs a CUDA toolkit")
    return found


def calls(rtx: Any) -> dict[str, tuple[str, Any, tuple[Any, ...], tuple[Any, ...]]]:
    """Our function -> (kinds of its arguments, NVIDIA's function, arguments of that, arguments of ours)."""
    engine, refitter = rtx.ICudaEngine, rtx.Refitter
    data = (c_char_p(BLOB), c_size_t(len(BLOB)))
    return {
        "num_io_tensors": ("", engine.num_io_tensors.fget, (), ()),
        "get_tensor_name": ("i", engine.get_tensor_name, (3,), (c_int32(3),)),
        "get_tensor_mode": ("s", engine.get_tensor_mode, ("x",), (b"x",)),
        "get_tensor_dtype": ("s", engine.get_tensor_dtype, ("x",), (b"x",)),
        "get_aliased_input_tensor": ("s", engine.get_aliased_input_tensor, ("x",), (b"x",)),
        "create_execution_context": ("i", engine.create_execution_context, (), ()),
        "create_configured_context": (
            "n", lambda e: engine.create_execution_context(e, runtime_config=OTHER), (), (c_void_p(OTHER.address),)),
        "create_runtime_config": ("", engine.create_runtime_config, (), ()),
        "create_runtime_cache": ("", rtx.IRuntimeConfig.create_runtime_cache, (), ()),
        "set_runtime_cache": ("n", rtx.IRuntimeConfig.set_runtime_cache, (OTHER,), (c_void_p(OTHER.address),)),
        "serialize": ("", rtx.IRuntimeCache.serialize, (), ()),
        "deserialize": ("-n", rtx.IRuntimeCache.deserialize, (BLOB,), data),
        "memory_size": ("", rtx.IHostMemory.nbytes.fget, (), ()),
        "set_tensor_address": ("sn", rtx.IExecutionContext.set_tensor_address, ("x", 4096), (b"x", c_void_p(4096))),
        "execute_async_v3": ("n", rtx.IExecutionContext.execute_async_v3, (8192,), (c_void_p(8192),)),
        "get_missing_weights": ("in", refitter.get_missing_weights, (), ()),
        "set_named_weights": ("s----inn", refitter.set_named_weights, ("x", rtx.Weights(ARRAY)),
                              (b"x", c_int32(int(rtx.DataType.FLOAT)), c_void_p(ARRAY.ctypes.data), c_int64(3))),
        "refit_cuda_engine": ("", refitter.refit_cuda_engine, (), ()),
        "deserialize_cuda_engine": ("-n", rtx.Runtime.deserialize_cuda_engine, (BLOB,), data),
    }  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="arguments are read where x86-64 passes them")
def test_calls_take_the_slots_and_arguments_of_nvidias_package(rtx, ours):
    for name, (kinds, theirs, given, mine) in calls(rtx).items():
        called, expected = Recorded(kinds=kinds), Recorded(kinds=kinds)
        getattr(ours, name)(c_void_p(called.address), *mine)
        theirs(expected, *given)
        assert called.calls == expected.calls[:1], name
        assert called.calls, name


def test_answers_come_back_as_nvidias_package_gives_them(rtx, ours):
    text = ctypes.create_string_buffer(b"k_0")
    ours.get_aliased_input_tensor.restype, ours.memory_size.restype = c_char_p, c_size_t
    for function, theirs, value in [
        (ours.num_io_tensors, rtx.ICudaEngine.num_io_tensors.fget, 21),
        (ours.memory_size, rtx.IHostMemory.nbytes.fget, 1 << 40),
    ]:
        answers = Recorded(value)
        assert function(c_void_p(answers.address)) == theirs(answers) == value
    answers = Recorded(ctypes.addressof(text))
    assert ours.get_aliased_input_tensor(c_void_p(answers.address), b"x") == b"k_0"
    assert rtx.ICudaEngine.get_aliased_input_tensor(answers, "x") == "k_0"
    for sizes in [(), (7,), (1, 2, 6240, 128), (1, 2, 3, 4, 5, 6, 7, 1 << 40)]:
        answers, got = Recorded(sizes=sizes), (c_int64 * 9)()
        ours.get_tensor_shape(c_void_p(answers.address), b"x", got)
        assert tuple(got[1 : got[0] + 1]) == tuple(rtx.ICudaEngine.get_tensor_shape(answers, "x")) == sizes
    called, expected = (Recorded(sizes=(1,), kinds="s") for _ in range(2))
    ours.get_tensor_shape(c_void_p(called.address), b"x", got)
    rtx.ICudaEngine.get_tensor_shape(expected, "x")
    assert called.calls == expected.calls


def test_the_address_of_memory_is_in_the_slot_before_its_size(rtx, ours):
    """Python reads an object's content through another protocol, so only the size can be compared."""
    ours.memory_data.restype = c_void_p
    noted = Recorded(4096)
    assert ours.memory_data(c_void_p(noted.address)) == 4096
    rtx.IHostMemory.nbytes.fget(noted)
    assert noted.calls[0][0] == noted.calls[1][0] - 1


def test_the_logger_is_the_one_that_nvidias_package_makes(rtx, ours):
    class Info(ctypes.Structure):
        _fields_ = [("kind", c_char_p), ("major", c_int32), ("minor", c_int32)]

    asking = Asking()
    with pytest.raises(TypeError):
        rtx.Runtime(asking)
    held = rtx.Logger(rtx.Logger.ERROR)
    theirs = address_of(held, asking.asked)
    ours.logger.restype = c_void_p
    mine = ours.logger()
    assert function_at(mine, 0, c_int32)(mine) == function_at(theirs, 0, c_int32)(theirs)  # the language
    infos = [function_at(address, 1, Info)(address) for address in (mine, theirs)]
    assert len({(info.kind, info.major, info.minor) for info in infos}) == 1


def test_constants_are_nvidias(rtx, ours):
    names = {
        "DataType": ["FLOAT", "HALF", "INT32", "FP8", "BF16", "INT64"],
        "TensorIOMode": ["NONE", "INPUT", "OUTPUT"],
        "ExecutionContextAllocationStrategy": ["STATIC"],
        "Logger": ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"],
    }
    for kind, values in names.items():
        for value in values:
            expected = int(getattr(getattr(rtx, kind), value))
            assert ours.constant(f"{kind}.{value}".encode()) == expected, (kind, value)
    major, minor = map(int, rtx.__version__.split(".")[:2])
    assert divmod(ours.version() // 100, 100) == (major, minor)


def test_the_plugin_is_linked_with_the_library_and_exports_one_function(plugin):
    def symbols(*options: str) -> list[str]:
        ran = subprocess.run(["nm", "-D", *options, plugin], capture_output=True, text=True, check=True)
        return [line.split()[-1].split("@")[0] for line in ran.stdout.splitlines()]

    plain = [
        name for name in symbols("--defined-only") if not name.startswith("_Z")
    ]  # and templates of the C++ library
    assert plain == ["greedy_plugin_get"]
    wanted = [name for name in symbols("--undefined-only") if name.endswith("_INTERNAL") or "InferLib" in name]
    assert sorted(wanted) == ["createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL", "getInferLibVersion"]
    assert not [name for name in symbols("--undefined-only") if name.startswith("cuda")]
    loaded = ctypes.CDLL(str(plugin))
    assert loaded.getInferLibVersion() // 100 == 107


def built_plan(rtx: Any, gpu: Any) -> bytes:
    """A plan of one layer, y = relu(x), for one GPU."""
    builder = rtx.Builder(rtx.Logger(rtx.Logger.ERROR))
    network, config = builder.create_network(0), builder.create_builder_config()
    x = network.add_input("x", rtx.DataType.FLOAT, (2, 3))
    y = network.add_activation(x, rtx.ActivationType.RELU).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config.num_compute_capabilities = 1
    config.set_compute_capability(gpu, 0)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may load the plan")
def test_a_real_plan_is_read_as_far_as_the_missing_driver(rtx, native_build, tmp_path):
    plan = tmp_path / "relu.plan"
    plan.write_bytes(built_plan(rtx, rtx.ComputeCapability.SM89))
    ran = subprocess.run([native_build / "rtx_library_test", plan], capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def rtx_bundle(folder: Path, target: str, *, also_aoti: bool = False) -> Path:
    """A bundle of formulas whose first backend is tensorrt_rtx."""
    bundle = fake_stages.write_fake_bundle(folder / "rtx.bundle", PRESET)
    manifest = json.loads((bundle / "manifest.json").read_text())
    aoti = manifest["backends"]["aoti-cpu"]
    mine = {
        **aoti,
        "backend": "tensorrt_rtx",
        "target": target,
        "versions": {"tensorrt_rtx": "1.7.1.116", "torch": "2"},
    }
    manifest["backends"] = {f"tensorrt_rtx-{target}": mine, **({"aoti-cpu": aoti} if also_aoti else {})}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def host(native_build: Path, bundle: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    given = [native_build / "greedy-host", bundle, "--prompt", "a", "--frames", "1", "--out", "null", *words]
    return subprocess.run(given, capture_output=True, text=True, timeout=HANG)


TARGETS = ["cuda-sm89", "cuda-sm80_sm86_sm89_sm120_sm121"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("words", [[], ["--backend", "tensorrt_rtx"]])
def test_without_a_gpu_the_host_says_so_in_one_line(plugin, native_build, tmp_path, target, words):
    ran = host(native_build, rtx_bundle(tmp_path, target), "--quiet", *words)
    driver = "CUDA driver version is insufficient for CUDA runtime version"
    assert ran.stderr == f"error: tensorrt_rtx: got no GPU ({driver}), expected one\n"
    assert ran.returncode == 2


@pytest.mark.parametrize("target", TARGETS)
def test_without_the_plugin_the_host_says_so_in_one_line(native_build, tmp_path, target):
    ran = host(native_build, rtx_bundle(tmp_path, target), "--quiet", "--plugin-dir", tmp_path)
    missing = tmp_path / "libgreedy_tensorrt_rtx.so"
    assert ran.stderr == f"error: tensorrt_rtx: got no plugin {missing}, expected it\n"
    assert ran.returncode == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("there", [True, False])
def test_the_next_backend_opens_where_there_is_no_gpu(request, native_build, tmp_path, there):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "libgreedy_aoti.so").symlink_to(native_build / "fake_plugin" / "libgreedy_aoti.so")
    if there:
        (plugins / "libgreedy_tensorrt_rtx.so").symlink_to(request.getfixturevalue("plugin"))
    bundle = rtx_bundle(tmp_path, "cuda-sm89", also_aoti=True)
    ran = host(native_build, bundle, "--plugin-dir", plugins)
    assert ran.returncode == 0, ran.stderr
    # A plugin that was never installed is no news.
    assert ("tensorrt_rtx-cuda-sm89 does not open here: tensorrt_rtx: got no " in ran.stderr) == there
    assert "with aoti for cpu" in ran.stderr
    ran = host(native_build, bundle, "--plugin-dir", plugins, "--backend", "tensorrt_rtx", "--quiet")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
