"""Package metadata; versions that are known to work together are pinned in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "engine" / "__init__.py").read_text()).group(1)

setup(
    name="greedy-stream",
    version=VERSION,
    description="Streaming video diffusion: a prompt goes in, frames come out while they are made",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[f"{name}{rest}" for name in ("engine", "kernels", "export", "distill", "bench") for rest in ("", ".*")]
    ),
    package_data={"engine": ["assets/**/*"], "distill": ["configs/*.toml"], "bench": ["published.toml"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "safetensors>=0.5",
        "transformers>=4.51",
        "peft>=0.17",
        "pillow>=10",
        "psutil>=5.9",
        "rich>=13",
        "av>=14",
    ],
    extras_require={
        "onnx": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5", "pydantic>=2.7"],
        "bench": ["matplotlib>=3.8"],
        "distill": ["diffusers>=0.35", "tensorboard>=2.17"],
        "test": ["diffusers>=0.35", "hypothesis>=6", "pytest>=8", "pytest-benchmark>=4", "ruff>=0.9", "mypy>=1.14"],
    },
)
