"""Building the C++ core in tests."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Seconds after which a program hangs. Any other limit would fail on a busy machine.
HANG = 3600


def cmake(*arguments: str | Path) -> None:
    ran = subprocess.run(["cmake", *arguments], capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 0, f"cmake {' '.join(map(str, arguments))}\n{ran.stdout}\n{ran.stderr}"


def missing_tool() -> str | None:
    """Why the core cannot be built here, if so."""
    if shutil.which("cmake") is None:
        return "cmake is not installed"
    version = subprocess.run(["cmake", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    if tuple(map(int, version.split(".")[:2])) < (3, 25):
        return f"cmake {version} is older than 3.25"
    if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))):
        return "no C++ compiler is installed"
    if "CMAKE_GENERATOR" not in os.environ and shutil.which("make") is None:
        return "make is not installed"
    return None


def python_module() -> list[str]:
    """Options to build engine._C as well, where pybind11 is installed."""
    if find_spec("pybind11") is None:
        return []
    import pybind11

    return ["-DGREEDY_PYTHON=ON", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]


def build(folder: Path, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """The core with its tests and tools (or some targets), built; skips where there is nothing to build with."""
    if reason := missing_tool():
        pytest.skip(f"the C++ core is not built: {reason}")
    cmake("-S", ROOT, "-B", folder, "-DCMAKE_INSTALL_LIBDIR=lib", *options)  # lib: as setup.py has it
    cmake("--build", folder, "--parallel", "2", *(("--target", *targets) if targets else ()))
    return folder
