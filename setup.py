"""Package metadata, and the build of the C++ core; versions known to work together are pinned in constraints.txt."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "engine" / "__init__.py").read_text()).group(1)


class FreshBuild(build_py):
    """Starts with an empty build directory: modules that are gone would stay in the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds CMakeLists.txt and installs module, library, plugins, headers and greedy-host into engine/."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_core(ext)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            failed = isinstance(error, subprocess.CalledProcessError)
            why = f"cmake ended with {error.returncode}, see above" if failed else str(error)
            raise CompileError(f"got no build of the C++ core ({why}); GREEDY_NATIVE=0 leaves it out") from error

    def build_core(self, ext: Extension) -> None:
        import pybind11  # of the build environment, see pyproject.toml

        package = (Path.cwd() / self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        options = [
            "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGREEDY_PYTHON=ON", "-DGREEDY_BUILD_TESTS=OFF",
            # Equal libraries wherever they are built: no path in them, and none whose length shows.
            "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON", "-DCMAKE_INSTALL_LIBDIR=lib", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DGREEDY_EDITABLE={'ON' if self.editable_mode else 'OFF'}",
        ]  # fmt: skip
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # --fresh: a kept build directory names the tools of an isolated environment that pip has deleted.
        configure = ["cmake", "--fresh", "--compile-no-warning-as-error", "-S", HERE, "-B", build]
        subprocess.check_call([*configure, *generator, *options])
        subprocess.check_call(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)])
        # An editable installation imports from the source tree.
        for prefix in {package, HERE / "engine"} if self.editable_mode else {package}:
            subprocess.check_call(["cmake", "--install", build, "--prefix", prefix])
        if self.editable_mode:
            lines = "".join(f"{folder}\n" for folder in torch_libraries())
            (HERE / "engine" / "lib" / "library_dirs.txt").write_text(lines)


def torch_libraries() -> list[Path]:
    """Where torch's libraries lie, or will: pip may build without torch in sight, or before it installs torch.

    The core reads this list in an editable installation, which does not lie beside torch.
    """
    packages = [Path(sysconfig.get_path(kind)) for kind in ("platlib", "purelib")]
    found = find_spec("torch")
    if found and found.origin:
        packages.insert(0, Path(found.origin).parents[1])
    return [folder / "torch" / "lib" for folder in dict.fromkeys(packages)]


def native_extensions() -> list[Extension]:
    """The C++ core, where Linux has a compiler and Python's headers; GREEDY_NATIVE=1 insists on it, 0 leaves it out."""
    wanted = os.environ.get("GREEDY_NATIVE", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"GREEDY_NATIVE: got {wanted!r}, expected 0, 1 or nothing")
    compilers = filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"])
    headers = Path(sysconfig.get_config_var("INCLUDEPY") or "") / "Python.h"  # of python3-dev
    there = sys.platform == "linux" and headers.is_file() and any(map(shutil.which, compilers))
    if wanted == "0" or (wanted == "auto" and not there):
        return []
    if not (HERE / "CMakeLists.txt").is_file():
        sys.exit(
            f"setup.py: got no {HERE / 'CMakeLists.txt'}, expected all of the sources; GREEDY_NATIVE=0 does without"
        )
    return [Extension("engine._C", sources=[])]


EXTENSIONS = native_extensions()
setup(
    name="greedy-stream",
    # pip hides what a build prints, but shows the version that it installed.
    version=VERSION if EXTENSIONS else f"{VERSION}+without.core",
    description="Streaming video diffusion: a prompt goes in, frames come out while they are made",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(
            include=[f"{n}{rest}" for n in ("engine", "export", "distill", "bench", "serve") for rest in ("", ".*")]
        ),
        "kernels",  # without __init__.py: engine/kernels_folder.py
    ],
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuild},
    entry_points={"console_scripts": ["greedy-stream = engine.cli:main"]},
    # No entry point: that would import engine, and so torch, before it starts the program.
    scripts=["csrc/host/greedy-host"],
    zip_safe=False,
    package_data={
        "engine": ["assets/**/*"],
        "distill": ["configs/*.toml", "raters/page/*"],
        "bench": ["report/published.toml"],
        "serve": ["page/*"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "safetensors>=0.8",
        "transformers>=5.16",
        "peft>=0.21",
        "pillow>=11.3",
        "pydantic>=2.7",
        "psutil>=6",
        "rich>=13",
        "av>=18",
        "ftfy>=6.3,<7",
    ],
    extras_require={
        "onnx": ["onnx>=1.19", "onnxruntime>=1.30", "onnxscript>=0.7"],
        "bench": ["matplotlib>=3.8"],
        "distill": ["accelerate>=1.8", "diffusers>=0.40", "tensorboard>=2.17.1"],
        # Optical flow. The wheel without windows: the one with them would replace the same files.
        "evaluate": ["opencv-python-headless>=4.13"],
        "gguf": ["gguf>=0.17"],
        "heic": ["pillow-heif>=1.7"],
        # Kernels: torch for CUDA brings Triton along; torch for processors does not, and its tests need it.
        "kernels": ["triton>=3.6; platform_system == 'Linux'"],
        # Another engine to race with, and an independent implementation of the recorded cases.
        "race": ["flashdreams>=0.1,<0.2"],
        "ray": ["ray[serve]>=2.50; python_version < '3.14'"],
        "serve": [
            "aioice>=0.13",
            "aiortc>=1.16",
            "fastapi>=0.133",
            "prometheus-client>=0.20",
            "python-multipart>=0.0.18",
            "starlette>=1.7",
            "uvicorn>=0.30",
            "websockets>=15",
        ],
        "tensorrt": ["tensorrt>=11,<12"],
        # Builds plans without a GPU. The C++ plugin is for 1.7 alone.
        "rtx": ["tensorrt-rtx-cu13>=1.7,<1.8; platform_system == 'Linux' and platform_machine == 'x86_64'"],
        "test": [
            "build>=1",
            "diffusers>=0.40",
            "gguf>=0.17",
            "hypothesis>=6",
            "httpx>=0.27",
            # GPL-3.0: it checks our own alpha in a test, and nothing else imports it.
            "krippendorff>=0.8.1",
            "mypy>=1.14",
            "openai>=2.3",
            "pillow-heif>=1.7",
            "playwright>=1.52",
            "protobuf>=5.26",
            "pybind11>=2.13",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.6.1",
            "ruff>=0.9",
            "sentencepiece>=0.2",
        ],
    },
)
