"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A file of engine/ imports only what stands before it.
ORDER = [
    *(
        "config",
        "transfer",
        "noise",
        "schedule",
        "rope",
        "cache",
        "layers",
        "transformer",
        "fused",
        "generators",
        "text",
        "vae",
    ),
    *(
        "checkpoint",
        "bundle",
        "stages",
        "cuda_graphs",
        "graph_stages",
        "onnx_stages",
        "aoti_stages",
        "tensorrt_stages",
        "stream",
        "native",
        "loader",
        "media",
        "sinks",
        "run",
    ),
]
OURS = ["engine", "kernels", "export", "distill", "bench", "csrc", "tests"]
MAY = {
    "engine": {"engine", "kernels"},
    "kernels": {"kernels"},
    "export": {"export", "engine", "kernels"},
    "distill": {"distill", "engine"},
    "bench": {"bench", "engine", "kernels", "distill", "export"},
}
# Heavy or development-only packages; where one is needed in engine/, then only inside the function that needs it.
LAZY = {"diffusers", "peft", "transformers", "tokenizers", "onnxruntime", "onnx", "av", "imageio", "tensorrt"}


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree, package=""):
    """Every module name that a tree imports, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{package}.{node.module}" if node.level else node.module


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def at_top(tree):
    """Without what is only imported when a function runs."""
    keep = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in keep:
        if isinstance(node, ast.ClassDef):
            node.body = [n for n in node.body if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return ast.Module(keep, [])


def test_every_file_of_the_engine_has_its_place():
    assert {path.stem for path in (ROOT / "engine").glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_engine_files_import_only_what_stands_before_them(name):
    found = set(imported(tree_of(ROOT / "engine" / f"{name}.py"), "engine"))
    used = {module.split(".")[1] for module in found if module.startswith("engine.")}
    assert used <= set(ORDER[: ORDER.index(name)])
    assert "engine" not in found


@pytest.mark.parametrize("package", MAY)
def test_packages_import_only_those_below(package):
    for path in files(package):
        used = {module.split(".")[0] for module in imported(tree_of(path), package)}
        assert used & set(OURS) <= MAY[package], path


def test_nothing_imports_the_tests():
    for path in [p for package in MAY for p in files(package)] + [ROOT / "setup.py"]:
        used = {module.split(".")[0] for module in imported(tree_of(path))}
        assert not used & {"tests", "tiny", "conftest"}, path


def test_only_bench_is_free_of_users():
    for package in set(MAY) - {"bench"}:
        for path in files(package):
            assert "bench" not in {module.split(".")[0] for module in imported(tree_of(path), package)}, path


def test_kernels_know_torch_and_triton():
    allowed = {"torch", "triton", "kernels"} | sys.stdlib_module_names
    for path in files("kernels"):
        assert {module.split(".")[0] for module in imported(tree_of(path), "kernels")} <= allowed, path


def test_heavy_packages_are_imported_where_they_are_needed():
    for path in (ROOT / "engine").glob("*.py"):
        used = {module.split(".")[0] for module in imported(at_top(tree_of(path)))}
        assert not used & LAZY, path


@pytest.mark.parametrize("name", [n for n in ORDER if n != "checkpoint"])
def test_diffusers_and_peft_are_for_checkpoints_alone(name):
    used = {module.split(".")[0] for module in imported(tree_of(ROOT / "engine" / f"{name}.py"))}
    assert not used & {"diffusers", "peft"}


def test_importing_the_engine_loads_none_of_them():
    code = "import sys, engine, engine.run; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"diffusers", "peft", "transformers", "distill", "bench", "export"}
