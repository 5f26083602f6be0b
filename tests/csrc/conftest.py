"""The C++ core from Python, of this source tree."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def core(native_build: Path) -> Iterator[ModuleType]:
    """engine._C of this source tree, in place of one that may be installed."""
    found = sorted(native_build.glob("_C*.so"))
    if not found:
        pytest.skip("engine._C is not built: pybind11 is not installed")
    before = sys.modules.pop("engine._C", None)
    spec = importlib.util.spec_from_file_location("engine._C", found[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules["engine._C"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["engine._C"]
    if before is not None:
        sys.modules["engine._C"] = before
