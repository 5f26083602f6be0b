"""What several test files share: a pipeline directory of tiny random models.

Kernel tests run on GPU machines that have torch, Triton and pytest alone: the rest is imported where it is used.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

# Many small operations: more threads only wait for each other. Before torch is imported, and for child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from selection import FIRST, SLOW

# Without a GPU kernels run in Triton's interpreter, which must be known before Triton is imported (by diffusers, too).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Programs under test inherit what is ignored, as under nohup or in the background of a script, and would never end.
for ignored, default in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(ignored) == signal.SIG_IGN:
        with suppress(ValueError):  # only the main thread may
            signal.signal(ignored, default)

if TYPE_CHECKING:
    from engine.stream import Pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline directory, 24 x 16 pixels at 8 frames a second, preset greedy. Not to be changed."""
    from tiny import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pipeline(model_dir: Path) -> "Pipeline":
    """The same, loaded: greedy."""
    import engine

    return engine.load(model_dir)


@pytest.fixture(scope="session")
def causal(model_dir: Path) -> "Pipeline":
    """The same, loaded: self-forcing in chunks of 3, window 6."""
    import engine

    return engine.load(model_dir, preset="self-forcing", overrides={"window": 6})


@pytest.fixture(scope="session")
def aoti_bundle(pipeline: "Pipeline", model_dir: Path) -> Path:
    """The greedy pipeline as a bundle of two backends, aoti first; compiling takes minutes. Not to be changed."""
    from bundles import aoti_bundle

    return aoti_bundle(pipeline, model_dir / "tokenizer")


@pytest.fixture(scope="session")
def native_build() -> Path:
    """The C++ core with its tests and tools, built. Skips where there is nothing to build with. Not to be changed."""
    from csrc_tools import QUICK, build, python_module

    return build("native", *QUICK, *python_module())
