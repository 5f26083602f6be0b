"""The C++ core: it builds, installs, and draws the noise that engine.sampling.noise draws.

`python tests/csrc/test_csrc.py` writes csrc/tests/noise_vectors.txt, the known draws that C++ is tested with.
"""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import fake_stages
import numpy as np
import pytest
from csrc_tools import HANG, build, cmake, missing_tool

from engine import __version__
from engine.config import Preset
from engine.sampling.noise import PhiloxNoise

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "csrc" / "include" / "greedy"
PUBLIC = ("greedy.h", "greedy.hpp", "plugin.h")
TESTS = ROOT / "csrc" / "tests"
VECTORS = TESTS / "noise_vectors.txt"
TOP = 2**64 - 1
# (seed, chunk, draw, count); the last one has an angle so small that the + 1 in its uniform number shows.
KNOWN = [(0, 0, 0, 16), (1, 0, 0, 1), (1, 0, 1, 2), (1, 1, 0, 3), (42, 7, 3, 33), (2**32, 2**32 + 1, 2**33, 5),
         (TOP, 0, 0, 7), (0, TOP, 0, 6), (0, 0, TOP, 4), (TOP, TOP, TOP, 29),
         (0x0123456789ABCDEF, 10**12, 3, 130), (0, 1042347588, 0, 4)]  # fmt: skip
CONSUMER = {
    "CMakeLists.txt": f"""
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
find_package(greedy {__version__} REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE greedy::core)
""",
    "main.cpp": """
#include <greedy/greedy.hpp>
#include <greedy/plugin.h>
#include <cstdio>
int main() {
    try {
        greedy::Bundle("/nowhere");
    } catch (const greedy::StatusError& error) {
        std::printf("%s %s %s", greedy_version(), greedy_status_name(error.status), error.what());
    }
}
""",
}

Draw = tuple[int, int, int, int]


class From(PhiloxNoise):
    """The engine's noise, its draws counted from `first`: so one draw far away costs one draw."""

    def __init__(self, seed: int, first: int) -> None:
        super().__init__(seed)
        self.first = first

    def _words(self, chunk: int, number: int, size: int) -> np.ndarray:
        return super()._words(chunk, self.first + number, size)


def draw(seed: int, chunk: int, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The words and the values of a draw."""
    noise = From(seed, number)
    return noise._words(chunk, 0, count + count % 2), noise.draw(chunk, 1, (count,))[0].numpy()


def write_vectors(path: Path, draws: Iterable[Draw]) -> None:
    lines = [
        "# Draws of engine.sampling.noise, from tests/csrc/test_csrc.py; csrc/tests/noise_test.cpp states the format."
    ]
    for numbers in draws:
        words, values = draw(*numbers)
        lines.append(" ".join(["draw", *map(str, numbers)]))
        lines.append(" ".join(["words", *(f"{word:016x}" for word in words)]))
        lines.append(" ".join(["values", *(f"{value:08x}" for value in values.view(np.uint32))]))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def shared_build() -> Path:
    """The core alone, as a shared library."""
    return build("shared", "-DBUILD_SHARED_LIBS=ON", "-DGREEDY_BUILD_TESTS=OFF",
                 "-DCMAKE_BUILD_TYPE=Debug", "-DGREEDY_BUILD_TOOLS=OFF")  # fmt: skip


def noise_test(build: Path, vectors: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([build / "noise_test", vectors], capture_output=True, text=True, timeout=HANG)


def test_known_draws_are_current():
    recorded = VECTORS.read_text().splitlines()[1:]
    assert [tuple(map(int, line.split()[1:])) for line in recorded[0::3]] == KNOWN
    for numbers, words_line, values_line in zip(KNOWN, recorded[1::3], recorded[2::3], strict=True):
        words, values = draw(*numbers)
        assert [int(word, 16) for word in words_line.split()[1:]] == words.tolist()
        bits = np.array([int(value, 16) for value in values_line.split()[1:]], dtype=np.uint32)
        np.testing.assert_array_max_ulp(values, bits.view(np.float32), maxulp=1)


def test_ctest_passes(native_build):
    ran = subprocess.run(["ctest", "--test-dir", native_build, "--output-on-failure", "--no-tests=error"],
                         capture_output=True, text=True, timeout=HANG)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_loop_in_the_header_is_the_one_that_is_run():
    header = (HEADERS / "greedy.h").read_text().split("Status:")[0].splitlines()
    loop = [line.removeprefix(" *     ") for line in header if line.startswith(" *     ")]
    program = [line.removeprefix("    ") for line in (TESTS / "header_loop.c").read_text().splitlines()]
    assert len(loop) > 10
    assert any(program[start : start + len(loop)] == loop for start in range(len(program)))


def test_headers_compile_alone(tmp_path):
    if reason := missing_tool():
        pytest.skip(f"the C++ core is not built: {reason}")
    for name, words in (("greedy/greedy.h", ["cc", "-std=c99"]), ("greedy/plugin.h", ["cc", "-std=c99"]),
                        ("greedy/greedy.hpp", ["c++"]), ("host/sinks.h", ["c++"]), ("host/part.h", ["c++"]),
                        ("core/noise.h", ["c++", "-std=c++17"])):  # fmt: skip
        source = tmp_path / f"{Path(name).name}.{'c' if words[0] == 'cc' else 'cpp'}"
        source.write_text(f"#include <{name}>\n")
        places = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", *places]
        ran = subprocess.run([*words, *flags, source], capture_output=True, text=True, timeout=HANG)
        assert ran.returncode == 0, ran.stderr


def checked_build(sanitizers: str, *targets: str) -> Path:
    """Some targets, checked by the compiler's sanitizers while they run."""
    return build(
        f"sanitized-{sanitizers.split(',')[0]}", f"-DGREEDY_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS=-O1", targets=(*targets, "greedy_fake"),
    )  # fmt: skip


def passes(*words: str | Path, **environment: str) -> None:
    ran = subprocess.run(words, capture_output=True, text=True, timeout=HANG, env=os.environ | environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    print(ran.stdout)


@pytest.fixture(scope="module")
def memory_checked() -> Path:
    return checked_build("address,undefined", "fuzz", "session_test", "state_test")


# Kinds of csrc/tests/fuzz.cpp: calls of the C interface, tokenizers, prompts, manifests, safetensors and charsmaps.
@pytest.mark.parametrize("kinds", ["a", "t", "p", "m", "sc"])
@pytest.mark.thorough
def test_damaged_input_under_sanitizers(memory_checked, tmp_path, kinds):
    """Half a minute each. The input that fails is left in `tmp_path`."""
    passes(memory_checked / "fuzz", TESTS / "corpus", "30", "1", kinds, tmp_path / "input")


@pytest.mark.parametrize("preset", [Preset("greedy", shift=2.0), Preset("causal", chunk=3, window=6, shift=3.0)],
                         ids=lambda preset: preset.family)  # fmt: skip
@pytest.mark.thorough
def test_calls_over_other_bundles_under_sanitizers(memory_checked, tmp_path, preset):
    bundle = fake_stages.write_fake_bundle(tmp_path / "bundle", preset)
    passes(
        memory_checked / "fuzz", TESTS / "corpus", "30", "2", "a", tmp_path / "input", GREEDY_FAKE_BUNDLE=str(bundle)
    )


@pytest.mark.parametrize("name", ["session_test", "state_test"])
@pytest.mark.thorough
def test_sessions_under_sanitizers(memory_checked, name):
    divisor = ["20"] if name == "session_test" else []
    passes(memory_checked / name, TESTS / "fake.bundle", memory_checked / "fake_plugin", *divisor)


@pytest.mark.thorough
def test_threads_under_a_sanitizer():
    folder = checked_build("thread", "session_test")
    passes(folder / "session_test", TESTS / "fake.bundle", folder / "fake_plugin", "20")


def test_same_noise_as_python(native_build, tmp_path):
    choose = random.Random(0)
    draws = [(*(choose.getrandbits(choose.choice([3, 20, 33, 64])) for _ in range(3)), choose.randrange(1, 400))
             for _ in range(200)]  # fmt: skip
    draws += [(3, 2, 1, 100_001), (TOP, TOP, TOP, 1001)]
    write_vectors(tmp_path / "vectors.txt", draws)
    ran = noise_test(native_build, tmp_path / "vectors.txt")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    print(ran.stdout)
    assert ran.stdout.startswith(f"{len(draws)} draws, {sum(count for *_, count in draws)} values, ")


@pytest.mark.parametrize("damage", ["word", "value", "order", "short", "empty"])
def test_a_wrong_vector_is_noticed(native_build, tmp_path, damage):
    path = tmp_path / "vectors.txt"
    write_vectors(path, [(1, 2, 3, 5)])
    comment, numbers, words, values = path.read_text().splitlines()
    flip = {"0": "1"}  # the last digit of a word; the fourth last of a value is 4096 ulp or more
    if damage == "word":
        words = words[:-1] + flip.get(words[-1], "0")
    elif damage == "value":
        values = values[:-4] + flip.get(values[-4], "0") + values[-3:]
    elif damage == "order":
        numbers = "draw 1 3 2 5"
    elif damage == "short":
        values = values[:-9]
    lines = [comment] if damage == "empty" else [comment, numbers, words, values]
    path.write_text("\n".join(lines) + "\n")
    ran = noise_test(native_build, path)
    assert ran.returncode == (2 if damage in ("short", "empty") else 1), ran.stdout + ran.stderr


@pytest.mark.parametrize("kind", ["native_build", pytest.param("shared_build", marks=pytest.mark.thorough)])
@pytest.mark.slow
def test_installed_package_is_usable(request, tmp_path, kind):
    cmake("--install", request.getfixturevalue(kind), "--prefix", tmp_path / "prefix")
    for name, text in CONSUMER.items():
        (tmp_path / name).write_text(text)
    cmake("-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    cmake("--build", tmp_path / "build")
    ran = subprocess.run([tmp_path / "build" / "consumer"], capture_output=True, text=True, timeout=HANG)
    said = f"{__version__} GREEDY_NOT_FOUND bundle: got /nowhere without manifest.json, expected a bundle"
    assert (ran.returncode, ran.stdout) == (0, said)
    assert {path.name for path in (tmp_path / "prefix" / "include" / "greedy").iterdir()} == set(PUBLIC)


@pytest.mark.thorough
def test_the_library_exports_the_c_interface_alone(shared_build):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    words = ["nm", "--dynamic", "--defined-only", "--format=posix", shared_build / "libgreedy_core.so"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=HANG, check=True)
    declared = re.findall(r"^GREEDY_API .*?(greedy_\w+)\(", (HEADERS / "greedy.h").read_text(), re.MULTILINE)
    assert len(declared) > 15
    assert sorted(line.split()[0] for line in ran.stdout.splitlines()) == sorted(declared)


if __name__ == "__main__":
    write_vectors(VECTORS, KNOWN)
