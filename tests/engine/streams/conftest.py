"""The same tests for every kind of stream: torch's modules, a bundle's graphs in Python, and the C++ core."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_stages
import pytest
from csrc_tools import core_of, open_fake

from engine.config import Preset
from engine.loader import load_bundle
from engine.stream import Pipeline


@pytest.fixture(scope="session")
def core(native_build: Path) -> Iterator[ModuleType]:
    """engine._C of this source tree."""
    with core_of(native_build) as module:
        yield module


@pytest.fixture(scope="session")
def formulas(core: ModuleType, native_build: Path) -> Any:
    """The C++ core on graphs that are formulas."""
    return open_fake(core, native_build, fake_stages.RECORDED)


@pytest.fixture(scope="session")
def bundled(pipeline: Pipeline, model_dir: Path) -> Any:
    """The tiny greedy pipeline as a bundle, in ONNX Runtime."""
    from bundles import bundle

    return load_bundle(bundle("greedy-bundle", pipeline, model_dir / "tokenizer"))


@pytest.fixture(scope="session", params=["torch", "bundle", "native"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def any_pipeline(kind: str, request: pytest.FixtureRequest) -> Any:
    """A pipeline of each kind in turn: frames differ from kind to kind, and so do sizes."""
    if kind == "torch":
        return fake_stages.fake_pipeline(Preset("greedy", shift=2.0, solver="euler", max_position=4))
    return request.getfixturevalue({"bundle": "bundled", "native": "formulas"}[kind])
