"""Builds the C++ core in tests, and keeps the builds (see artefacts.py)."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from artefacts import CACHE, artefact, key_of, sources
from limits import HANG

ROOT = Path(__file__).parents[2]
# A release, but for the optimisation that takes a third of the time to compile; the wheel has it (make test-all). With
# little of it GCC 12 warns of operators that a test replaces.
QUICK = ("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG -Wno-mismatched-new-delete")


def cmake(*arguments: str | Path) -> None:
    ran = subprocess.run(["cmake", *arguments], capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 0, f"cmake {' '.join(map(str, arguments))}\n{ran.stdout}\n{ran.stderr}"


def missing_tool() -> str | None:
    """The reason why the core cannot be built here; None if it can."""
    if shutil.which("cmake") is None:
        return "cmake is not installed"
    cmake_version = _said_version("cmake").split()[2]
    if tuple(map(int, cmake_version.split(".")[:2])) < (3, 25):
        return f"cmake {cmake_version} is older than 3.25"
    if _compiler() is None:
        return "no C++ compiler is installed"
    if "CMAKE_GENERATOR" not in os.environ and shutil.which("make") is None:
        return "make is not installed"
    return None


def python_module() -> list[str]:
    """Options that also build engine._C; none without pybind11."""
    if find_spec("pybind11") is None:
        return []
    import pybind11

    return ["-DGREEDY_PYTHON=ON", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]


def load_core(built: Path) -> ModuleType:
    """The module engine._C of a build. Skips the test if there is none."""
    found = sorted(built.glob("_C*.so"))
    if not found:
        pytest.skip("engine._C is not built: pybind11 is not installed")
    spec = importlib.util.spec_from_file_location("engine._C", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def core_of(built: Path) -> Iterator[ModuleType]:
    """Within the block engine._C is that of a build, in place of one that may be installed."""
    module = load_core(built)
    with mock.patch.dict(sys.modules, {"engine._C": module}):
        yield module


def open_fake(core: ModuleType, built: Path, folder: Path, **options: Any) -> Any:
    """A bundle of formulas (fake_stages.py) as a pipeline of the C++ core."""
    from engine.bundles.native import NativePipeline

    plain, plugins = core.open_bundle, str(built / "fake_plugin")
    with mock.patch.object(core, "open_bundle", lambda path, **rest: plain(path, **{**rest, "plugin_dir": plugins})):
        return NativePipeline(folder, **options)


def build(kind: str, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """Build the core with its tests and tools, or only `targets`. Skips the test if a tool is missing.

    kind names this set of options. Callers must not change the folder: other processes and later runs share it.
    """
    if reason := missing_tool():
        pytest.skip(f"the C++ core is not built: {reason}")
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []

    def make(folder: Path) -> None:
        cmake("-S", ROOT, "-B", folder, "-DCMAKE_INSTALL_LIBDIR=lib", *launcher, *options)  # lib: as in setup.py
        parallel = str(min(os.cpu_count() or 1, 4))
        cmake("--build", folder, "--parallel", parallel, *(("--target", *targets) if targets else ()))

    return artefact(kind, _key(options, targets), make)


def _key(options: tuple[str, ...], targets: tuple[str, ...]) -> str:
    """Hash of sources, options, tools, and the directories whose absolute paths a build stores."""
    read = [ROOT / "CMakeLists.txt", ROOT / "engine" / "__init__.py"]
    read += sources("csrc")
    environment = [os.environ.get(name) for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_GENERATOR")]
    tools = [_said_version(tool) for tool in ("cmake", str(_compiler()))]
    module = version("pybind11") if find_spec("pybind11") else None
    rtx = version("tensorrt_rtx_cu13_libs") if find_spec("tensorrt_rtx_libs") else None
    return key_of(options, targets, environment, tools, sys.version, module, rtx, str(ROOT), str(CACHE), files=read)


def _said_version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout


def _compiler() -> str | None:
    return next(filter(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"])), None)
