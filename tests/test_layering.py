"""Who may import whom: packages, folders, files; nothing imports upward, and nothing in a circle."""

import ast
import gc
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package imports those in its row, and itself.
MAY = {
    "kernels": set(),
    "engine": {"kernels"},
    "export": {"engine", "kernels"},
    "distill": {"engine"},
    "bench": {"engine", "kernels", "distill", "export"},
    "serve": {"engine"},
}
# A folder, or a file beside the folders, imports from its own row only itself, and whatever stands in rows above.
LEVELS = {
    "engine": [
        "files", "options threads kernels_folder program", "config", "media model", "sampling runtime",
        "weights generators", "presets", "bundles", "memory", "shared", "control", "stream", "loader",
        "commands", "run", "cli",
    ],
    "distill": ["training", "models", "data", "scores", "stages", "experiments", "attention", "raters", "__main__"],
    "bench": [
        "instruments", "adapters", "operations", "serving", "chaos", "report", "commands soak", "gpu", "__main__",
    ],
    "serve": ["core", "options", "web", "build many", "__main__ ray_app"],
    "csrc": ["include", "base", "formats", "text", "runtime", "core", "api host plugins python", "tests"],
}  # fmt: skip
# Heavy or development-only packages; where one is needed in engine/, then only inside the function that needs it.
LAZY = {
    "diffusers",
    "peft",
    "transformers",
    "tokenizers",
    "onnxruntime",
    "onnx",
    "av",
    "imageio",
    "tensorrt",
    "pillow_heif",
}
MOST_FILES = 13
OURS = {*MAY, "csrc", "tests"}


@pytest.fixture(autouse=True, scope="module")
def no_collection():
    """Python 3.11's parser fails if a collection meanwhile runs what parses, too, such as the log of a traceback."""
    gc.disable()
    yield
    gc.enable()


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree, package=""):
    """Every module name that a tree imports, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module}" if node.level else node.module
            yield module
            # `from package.folder import file` imports that file.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def at_top(tree):
    """Without what is only imported when a function runs."""
    keep = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in keep:
        if isinstance(node, ast.ClassDef):
            node.body = [n for n in node.body if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return ast.Module(keep, [])


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def included(path):
    """Folders of csrc/ whose headers a source file includes."""
    for name in re.findall(r'^#include ["<]([\w./]+)[">]', path.read_text(encoding="utf-8"), re.MULTILINE):
        if (ROOT / "csrc" / name).is_file():
            yield name.split("/")[0]
        elif (ROOT / "csrc" / "include" / name).is_file():
            yield "include"


def levels_of(package):
    return {name: number for number, row in enumerate(LEVELS[package]) for name in row.split()}


def assert_downward(package, place, used, path):
    """Nothing from a higher row, and nothing beside it in the same row."""
    level = levels_of(package)
    for name in used - {place}:
        assert level[name] < level[place], f"{path} imports {package}/{name}"


@pytest.mark.parametrize("package", ["engine", "distill", "bench", "serve"])
def test_folders_import_only_those_below(package):
    level = levels_of(package)
    for path in files(package):
        place = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        found = {m.split(".")[1] for m in imported(tree_of(path)) if m.startswith(f"{package}.")}
        if place not in level:
            # The package itself, its shims, and folders that nothing imports (bench/micro).
            assert path.parent == ROOT / package or place == "micro", path
            continue
        assert_downward(package, place, found & set(level), path)


def test_folders_of_the_core_include_only_those_below():
    for path in sorted((ROOT / "csrc").rglob("*")):
        place = path.relative_to(ROOT / "csrc").parts[0]
        if path.suffix in (".h", ".hpp", ".cpp", ".c") and place in levels_of("csrc"):
            assert_downward("csrc", place, set(included(path)), path)


@pytest.mark.parametrize("package", MAY)
def test_no_imports_in_a_circle(package):
    modules = {module_of(path): path for path in files(package)}
    graph = {name: set(imported(tree_of(path), package)) & set(modules) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", MAY)
def test_packages_import_only_those_below(package):
    for path in files(package):
        used = {module.split(".")[0] for module in imported(tree_of(path), package)}
        assert used & OURS <= MAY[package] | {package}, path


@pytest.mark.parametrize("package", [*MAY, "csrc", "tests"])
def test_folders_stay_small(package):
    for folder in {path.parent for path in (ROOT / package).rglob("*.*") if "__pycache__" not in path.parts}:
        sources = [path for path in folder.iterdir() if path.suffix in (".py", ".cpp") and path.name != "__init__.py"]
        flat = {ROOT / "kernels", ROOT / "tests" / "kernels"}  # one operation a file
        assert folder in flat or len(sources) <= MOST_FILES, f"{folder}: {len(sources)} files"


def test_nothing_imports_the_tests():
    helpers = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    for path in [p for package in MAY for p in files(package)] + [ROOT / "setup.py"]:
        used = {module.split(".")[0] for module in imported(tree_of(path))}
        assert not used & ({"tests"} | helpers), path


def test_kernels_know_torch_and_triton():
    allowed = {"torch", "triton", "kernels"} | sys.stdlib_module_names
    for path in files("kernels"):
        assert {module.split(".")[0] for module in imported(tree_of(path), "kernels")} <= allowed, path


def test_heavy_packages_are_imported_where_they_are_needed():
    for path in files("engine"):
        used = {module.split(".")[0] for module in imported(at_top(tree_of(path)))}
        assert not used & LAZY, path


def test_diffusers_and_peft_are_for_weights_alone():
    for path in files("engine"):
        if path.parent.name != "weights":
            used = {module.split(".")[0] for module in imported(tree_of(path))}
            assert not used & {"diffusers", "peft"}, path


@pytest.mark.slow
def test_importing_the_engine_loads_none_of_them():
    code = "import sys, engine, engine.run; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"diffusers", "peft", "transformers", "distill", "bench", "export"}


@pytest.mark.slow
def test_a_stream_of_the_embedded_model_loads_none_of_them_either(tmp_path):
    """Each of these takes as long to import as everything else in a start."""
    heavy = {"diffusers", "peft", "transformers", "torch._dynamo", "sympy", "onnx", "onnxruntime"}
    code = f"import sys; from engine.run import main; main({['--prompt', 'a', '--frames', '1', '--out', 'null']}); "
    code += f"print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
