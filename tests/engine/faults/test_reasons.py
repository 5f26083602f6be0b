"""What an error of the system, of torch or of memory says; clocks that jump; locales around the C++ core."""

import ast
import errno
import json
import os
import shutil
import subprocess
import sys

import fake_stages
import numpy as np
import pytest
from harness import PROMPT, ROOT, SOON, environment, words_of

import engine.run
from engine.commands.stderr import is_bad_input, line_of
from engine.media.base import need


@pytest.mark.parametrize(
    ("error", "said", "bad_input"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "system: got No space left on device, expected it", False),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.mp4"), "a.mp4: got Disk quota exceeded, expected it", False),
        (PermissionError(errno.EACCES, "Permission denied", "/proc/1/x"), "/proc/1/x: got Permission denied", True),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x\ny"), "x\\ny: got File name too long", True),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "d"), "d: got Is a directory", True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 1536 bytes. Error code 12"), "memory: got no room for 1536 bytes", False),
        (MemoryError(), "memory: got none left, expected more", False),
        (MemoryError("Unable to allocate 4.5 MiB for an array"), "Unable to allocate 4.5 MiB", False),
        (OSError("Cannot allocate memory (os error 12)"), "memory: got none left, expected more", False),
        (ValueError("\nsteps: got 3, expected 4\nmore"), "steps: got 3, expected 4", True),
        (RuntimeError(), "RuntimeError", False),
    ],
    ids=repr,
)  # fmt: skip
def test_errors_in_our_words(error, said, bad_input):
    error.add_note("kept 3 frames in a.mp4")
    line = line_of(error)
    assert line.startswith(said)
    assert line.endswith("; kept 3 frames in a.mp4")
    assert line.isprintable()
    assert is_bad_input(error) == bad_input


LONG = {"--tokenizer", "--model", "--vae", "--checkpoint", "--text-encoder", "--adapter", "--preset", "--bundle",
        "--image", "--video", "--out"}  # fmt: skip


@pytest.mark.parametrize("option", sorted(LONG))
def test_names_that_the_system_refuses(capfd, tmp_path, monkeypatch, option):
    """One line without a raw Errno, and 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    for name in ("x" * 300, "x/" * 3000, "circle", "circle/inside"):
        target = [] if option == "--out" else ["--out", "null"]
        ending = ".y4m" if option == "--out" else ""
        code = engine.run.main(["--prompt", "a", "--frames", "1", *target, option, name + ending])
        err = capfd.readouterr().err
        if option == "--out" and code == 0:  # circle.y4m is a name like others
            (tmp_path / "circle.y4m").unlink()
            continue
        assert code == 2, err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Errno" not in err


def test_a_package_that_does_not_load_is_not_missing(monkeypatch, tmp_path):
    (tmp_path / "av.py").write_text("raise ImportError('libx: failed to map segment from shared object')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "av" or name.startswith("av.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"^mp4 output: got libx: failed to map segment.*, expected the package av"):
        need("av", "mp4")


# Times of the day that clients see and restarts keep: of jobs, of the server's start, of a result.
OF_THE_DAY = {"serve/core/jobs.py", "serve/many/jobs.py", "serve/web/server.py", "bench/instruments/header.py"}
WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}


def test_intervals_are_measured_by_clocks_that_do_not_jump():
    found = set()
    for package in ("engine", "export", "distill", "serve", "bench", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    if (node.value.id, node.attr) in WALL:
                        found.add(str(path.relative_to(ROOT)))
                elif isinstance(node, ast.ImportFrom) and node.module == "time":
                    assert not {alias.name for alias in node.names} & {"time", "time_ns"}, path
    assert found == OF_THE_DAY
    sources = [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".hpp", ".c", ".cu", ".cuh")
    ]
    assert len(sources) > 50
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("system_clock", "CLOCK_REALTIME", "gettimeofday")), path


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(monkeypatch, capfd, tmp_path):
    jumps = np.random.default_rng(0)
    sums = []
    for _ in range(2):
        assert engine.run.main(["--prompt", PROMPT, "--frames", "9", "--out", "checksum", "--json"]) == 0
        report = json.loads(capfd.readouterr().out.splitlines()[-1])
        sums.append(report["sha256"])
        assert report["seconds"] > 0
        assert report["ttff_ms"] > 0
        assert report["fps"] > 0
        monkeypatch.setattr("time.time", lambda: float(jumps.uniform(0, 4e9)))
        monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    assert sums[0] == sums[1]


COMMA = """
import ctypes, hashlib, importlib.util, json, locale, sys

module, bundle, plugins, name = sys.argv[1:]
if name != "C":
    locale.setlocale(locale.LC_ALL, name)
    printed = ctypes.create_string_buffer(16)
    ctypes.CDLL(None).snprintf(printed, 16, b"%.1f", ctypes.c_double(1.5))
    assert printed.value == b"1,5", printed.value
spec = importlib.util.spec_from_file_location("engine._C", module)
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
found = []
manifest = json.load(open(f"{bundle}/manifest.json"))
for change in (
    {"fps": 8.5}, {"fps": 1000.5}, {"fps": -0.25}, {"preset": {"shift": -1.5}}, {"preset": {"steps": [[0.5]]}},
    {"height": 7.5},
):
    changed = json.loads(json.dumps(manifest))
    for key, value in change.items():
        changed[key] = {**changed[key], **value} if isinstance(value, dict) else value
    json.dump(changed, open(f"{bundle}/manifest.json", "w"))
    try:
        opened = core.open_bundle(bundle, plugin_dir=plugins)
        found.append([opened.info.fps if hasattr(opened, "info") else 0])
    except Exception as error:
        found.append(str(error))
json.dump(manifest, open(f"{bundle}/manifest.json", "w"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def comma(tmp_path_factory):
    """The name of a locale whose numbers have a comma, and the environment that finds it."""
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    folder = tmp_path_factory.mktemp("locales")
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.UTF-8"], capture_output=True)
    if not (folder / "de_DE.UTF-8" / "LC_NUMERIC").exists():
        pytest.skip(f"localedef made no de_DE: {made.stderr.decode()}")
    return "de_DE.UTF-8", environment(LOCPATH=str(folder))


@pytest.mark.slow
def test_a_host_with_a_decimal_comma(native_build, tmp_path, comma):
    """The core reads manifests and words errors alike in every locale that a program around it sets."""
    name, env = comma
    module = next(iter(native_build.glob("_C*.so")), None)
    if module is None:
        pytest.skip("engine._C is not built: pybind11 is not installed")
    bundle = tmp_path / "bundle"
    shutil.copytree(fake_stages.RECORDED, bundle)
    said = []
    for one in ("C", name):
        words = [sys.executable, "-c", COMMA, module, bundle, native_build / "fake_plugin", one]
        ran = subprocess.run(words, env=env, capture_output=True, text=True, timeout=SOON)
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout)
    assert said[0] == said[1]
    assert "1000.5" in said[0]
    assert "-1.5" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"LC_ALL": "xx_YY.none"}, {"LC_ALL": "de_DE.UTF-8"}])
def test_programs_in_odd_locales(native_build, tmp_path, comma, variables):
    words = words_of("host", native_build, "--prompt-at", "0.625s", "teal", "--out", "checksum", "--seconds", "1.5")
    sums = []
    for env in (os.environ | {"LC_ALL": "C.UTF-8"}, comma[1] | variables | {"TZ": ":/nowhere"}):
        ran = subprocess.run([*words, "--json"], env=env, capture_output=True, text=True, timeout=SOON)
        assert ran.returncode == 0, ran.stderr
        sums.append(ran.stdout)
        report = json.loads(ran.stderr.splitlines()[-1])
        assert report["frames"] == 12
    assert sums[0] == sums[1]
