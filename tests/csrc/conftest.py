"""The C++ core from Python, of this source tree."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from csrc_tools import core_of


@pytest.fixture(scope="module")
def core(native_build: Path) -> Iterator[ModuleType]:
    """engine._C of this source tree, in place of one that may be installed."""
    with core_of(native_build) as module:
        yield module
