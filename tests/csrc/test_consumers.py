"""Projects that use the core: the program and the CMake file of docs/embedding.md give frames, however built."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from csrc_tools import cmake, missing_tool
from limits import HANG

from engine.bundles.manifest import read_manifest

ROOT = Path(__file__).parents[2]
FOUND = "find_package(greedy REQUIRED)"
# What may stand in place of it.
SUBDIRECTORY = f"add_subdirectory({ROOT} greedy)"
FETCHED = f"""
include(FetchContent)
FetchContent_Declare(greedy SOURCE_DIR {ROOT})
FetchContent_MakeAvailable(greedy)
"""
COMPARED = 33  # frames


@pytest.fixture(scope="module")
def documented() -> dict[str, str]:
    """The page's first C program and its CMake file."""
    page = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    blocks = dict(reversed(re.findall(r"^```(c|cmake)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)))
    assert FOUND in blocks["cmake"]
    return blocks


@pytest.fixture(scope="module")
def expected(pipeline) -> np.ndarray:
    """The same stream of torch's modules."""
    with pipeline.stream("a red circle moving right slowly on a gray background", seed=1, frames=COMPARED) as stream:
        return np.stack(list(stream))


def written(folder: Path, c: str, listing: str) -> Path:
    folder.mkdir()
    (folder / "main.c").write_text(c)
    (folder / "CMakeLists.txt").write_text(listing)
    return folder


def check_frames(program: Path, bundle: Path, expected: np.ndarray, tmp_path: Path) -> None:
    """Run the page's program where its bundle is; its library path is that of torch, and nothing names the plugin."""
    (tmp_path / "sprites.bundle").symlink_to(bundle)
    libraries = Path(torch.__file__).parent / "lib"
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "GREEDY_LIBRARY_DIR": str(libraries)}
    ran = subprocess.run([program], cwd=tmp_path, env=env, capture_output=True, timeout=HANG)
    assert (ran.returncode, ran.stderr) == (0, b"")
    manifest = read_manifest(bundle)
    frames = np.frombuffer(ran.stdout, np.uint8).reshape(-1, manifest.height, manifest.width, 3)
    assert len(frames) == 240
    assert np.abs(frames[:COMPARED].astype(int) - expected).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "shared"),
    [
        pytest.param(SUBDIRECTORY, "OFF", id="subdirectory", marks=pytest.mark.thorough),
        pytest.param(FETCHED, "ON", id="fetched", marks=pytest.mark.thorough),
    ],
)
def test_a_project_with_our_sources_streams(documented, aoti_bundle, expected, tmp_path, line, shared):
    if reason := missing_tool():
        pytest.skip(f"the C++ core is not built: {reason}")
    project = written(tmp_path / "project", documented["c"], documented["cmake"].replace(FOUND, line))
    cmake("-S", project, "-B", tmp_path / "build", f"-DBUILD_SHARED_LIBS={shared}")
    cmake("--build", tmp_path / "build", "--parallel", "2", "--target", "player")
    check_frames(tmp_path / "build" / "player", aoti_bundle, expected, tmp_path)


@pytest.mark.slow
def test_a_project_that_finds_the_installed_package_streams(documented, native_build, aoti_bundle, expected, tmp_path):
    """The package was built with a static core."""
    cmake("--install", native_build, "--prefix", tmp_path / "prefix")
    assert (tmp_path / "prefix" / "lib" / "libgreedy_core.a").is_file()
    project = written(tmp_path / "project", documented["c"], documented["cmake"])
    cmake("-S", project, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    cmake("--build", tmp_path / "build")
    check_frames(tmp_path / "build" / "player", aoti_bundle, expected, tmp_path)
