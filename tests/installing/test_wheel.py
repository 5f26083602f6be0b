"""The distributions hold what they should, and the wheel streams in a clean environment, far from these sources."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pytest
from declared import ROOT, pins
from limits import HANG

import engine
from engine.bundles.manifest import read_manifest

PROMPT = "a red circle moving right slowly on a gray background"
HERE = ("--no-isolation", "--skip-dependency-check")  # with what is installed, which is quick
PACKAGES = ("engine", "export", "distill", "bench", "serve", "kernels")
NATIVE = {
    f"engine/_C{sysconfig.get_config_var('EXT_SUFFIX')}", "engine/bin/greedy-host",
    *(f"engine/include/greedy/{name}" for name in ("greedy.h", "greedy.hpp", "plugin.h")),
    "engine/lib/libgreedy_core.so", "engine/lib/libgreedy_aoti.so",
    *(f"engine/lib/cmake/greedy/{name}.cmake" for name in
      ("greedyConfig", "greedyConfigVersion", "greedyTargets", "greedyTargets-release", "plugins")),
}  # fmt: skip

Ran = subprocess.CompletedProcess[str]

pytestmark = pytest.mark.slow


def run(*words: str | Path, env: dict[str, str] | None = None, cwd: Path = Path("/")) -> Ran:
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=HANG)


def succeed(*words: str | Path, env: dict[str, str] | None = None, cwd: Path = Path("/")) -> str:
    ran = run(*words, env=env, cwd=cwd)
    assert ran.returncode == 0, f"{' '.join(map(str, words))}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout


def build(tree: Path, into: Path, *options: str, **environment: str) -> Ran:
    words = [sys.executable, "-m", "build", *options, "--outdir", into, tree]
    return run(*words, env={**os.environ, **environment}, cwd=into.parent)


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The files of the repository."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git repository: what belongs to a distribution is not known")
    return set(succeed("git", "ls-files", cwd=ROOT).splitlines())


@pytest.fixture(scope="module")
def tree(tracked, tmp_path_factory) -> Path:
    """A copy of the sources in which everything that git ignores lies about, too."""
    if not any(found.name == "build" for found in distributions()):
        pytest.skip("the package `build` is not installed")
    tree = tmp_path_factory.mktemp("sources")
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for file in ignored():
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).write_text("left over")
    return tree


def ignored() -> Iterator[Path]:
    """A file for each line of .gitignore, at the top and deep in folders that are packed."""
    for line in (ROOT / ".gitignore").read_text().splitlines():
        if line and not line.startswith("#"):
            anchored = "/" in line.rstrip("/")
            name = line.replace("*", "x") + ("left.py" if line.endswith("/") else "")
            for folder in ("",) if anchored else ("", "engine", "csrc/cuda", "serve/page", "tests/data"):
                yield Path(folder) / name
    yield Path(f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/engine/removed.py")
    yield Path("build/lib/engine/removed.py")


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory) -> Path:
    """The wheel that is built from a source distribution in an isolated environment."""
    folder = tmp_path_factory.mktemp("built") / "dist"
    ran = build(tree, folder)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The programs' folder of an environment that has torch, the wheel and what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=True)
    python, pinned = folder / "bin" / "python", ROOT / "constraints.txt"
    pip = [python, "-I", "-m", "pip", "install", "--quiet", "--no-compile", "-c", pinned]
    succeed(*pip, f"torch=={pins()['torch']}")
    succeed(*pip, built)
    return folder / "bin"


def checksum(said: str) -> str:
    return json.loads(said.splitlines()[-1])["sha256"]


def members(wheel: Path) -> set[str]:
    """The files of a wheel without those that describe it."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def of_packages(tracked: set[str]) -> set[str]:
    return {name for name in tracked if name.split("/")[0] in PACKAGES and not name.startswith("bench/results/")}


def test_the_source_distribution_is_the_repository(tree, tracked, tmp_path):
    ran = build(tree, tmp_path / "dist", "--sdist", *HERE)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    (sources,) = (tmp_path / "dist").iterdir()
    with tarfile.open(sources) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    described = {name for name in names if re.fullmatch(r"PKG-INFO|setup\.cfg|greedy_stream\.egg-info/.*", name)}
    assert names - described == tracked


@pytest.mark.thorough
def test_the_wheel_has_packages_and_core(built, tracked):
    found = {name for name in members(built) if "libgreedy_tensorrt" not in name}  # built where CUDA is
    host = f"greedy_stream-{engine.__version__}.data/scripts/greedy-host"
    assert found == of_packages(tracked) | NATIVE | {host}


@pytest.mark.thorough
def test_it_streams_with_torch(installed, tmp_path):
    """As a program and as a module: the frames of this source tree."""
    words = ["--prompt", PROMPT, "--frames", "49", "--seed", "1", "--out", "checksum", "--json"]
    env = {"OMP_NUM_THREADS": "1"}
    program = checksum(succeed(installed / "greedy-stream", "run", *words, env=env, cwd=tmp_path))
    module = checksum(succeed(installed / "python", "-m", "engine.run", *words, env=env, cwd=tmp_path))
    with engine.load().stream(PROMPT, seed=1, frames=49) as stream:
        frames = np.stack(list(stream))
    assert program == module == hashlib.sha256(frames.tobytes()).hexdigest()


@pytest.mark.thorough
def test_it_streams_with_the_core(installed, aoti_bundle, pipeline, tmp_path):
    """`--backend native`, and greedy-host in an environment without variables: the same frames."""
    words = ["--prompt", PROMPT, "--frames", "33", "--seed", "1", "--out"]
    native = [installed / "greedy-stream", "run", "--bundle", aoti_bundle, "--backend", "native"]
    succeed(*native, *words, "python.rgb", env={"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    ran = run(installed / "greedy-host", aoti_bundle, *words, "host.rgb", env={}, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    made = (tmp_path / "host.rgb").read_bytes()
    assert made == (tmp_path / "python.rgb").read_bytes()
    manifest = read_manifest(aoti_bundle)
    with pipeline.stream(PROMPT, seed=1, frames=33) as stream:
        expected = np.stack(list(stream)).astype(int)
    frames = np.frombuffer(made, np.uint8).reshape(33, manifest.height, manifest.width, 3)
    assert np.abs(frames - expected).max() <= 2


@pytest.mark.thorough
def test_programs_help_and_say_which_extra_they_lack(installed, tmp_path):
    env = {"PATH": os.environ["PATH"]}
    commands = succeed(installed / "greedy-stream", "--help", env=env, cwd=tmp_path)
    assert commands == succeed(installed / "python", "-m", "engine.cli", "--help", env=env, cwd=tmp_path)
    assert "usage" in succeed(installed / "greedy-host", "--help", env={}, cwd=tmp_path)
    for words in (["-m", "serve", "--help"], ["-m", "engine.cli", "serve", "--help"]):
        ran = run(installed / "python", *words, env=env, cwd=tmp_path)
        assert (ran.returncode, ran.stdout) == (2, "")
        expected = r"error: .* got no package \w+, expected pip install 'greedy-stream\[serve\]'\n"
        assert re.fullmatch(expected, ran.stderr)


def test_a_wheel_without_the_core_says_so(tree, tracked, tmp_path):
    """In its name, which pip shows when it installs it, and when the core is asked for."""
    ran = build(tree, tmp_path / "dist", "--wheel", *HERE, GREEDY_NATIVE="0")
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"greedy_stream-{engine.__version__}+without.core-py3-none-any.whl"
    scripts = {name for name in members(wheel) if ".data/scripts/" in name}
    assert members(wheel) - scripts == of_packages(tracked)
    place = tmp_path / "place"
    said = succeed(sys.executable, "-m", "pip", "install", "--no-deps", "--target", place, wheel)
    assert f"greedy-stream-{engine.__version__}+without.core" in said
    ran = run(place / "bin" / "greedy-host", env={"PYTHONPATH": str(place)}, cwd=tmp_path)
    assert ran.returncode == 2
    assert re.fullmatch(r"error: got no \S+/greedy-host, expected .*\n", ran.stderr)


@pytest.mark.parametrize("broken", ["compiler", "sources"])
def test_a_core_that_cannot_be_built_ends_the_build(tree, tmp_path, broken):
    if broken == "sources":
        tree = shutil.copytree(tree, tmp_path / "tree")
        (tree / "CMakeLists.txt").unlink()
    native = {"compiler": {"CXX": "false"}, "sources": {"GREEDY_NATIVE": "1"}}[broken]
    ran = build(tree, tmp_path / "dist", "--wheel", *HERE, **native)
    assert ran.returncode != 0
    assert "GREEDY_NATIVE=0" in ran.stdout + ran.stderr
    assert not list(tmp_path.glob("dist/*.whl"))
