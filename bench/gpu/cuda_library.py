"""The kernels in CUDA C++, built where there is nvcc and nobody brought them. Without them their tests are skipped."""

import os
import shutil
import subprocess

from bench.commands.kernels import said
from bench.gpu.lines import Lines
from bench.instruments.header import ROOT
from kernels.cuda_library import LIBRARY

SOURCE = ROOT / "csrc" / "cuda" / "fp8_linear.cu"
SECONDS = 50  # that nvcc may take


def build(lines: Lines) -> None:
    """One plain nvcc line: CMake may lack a generator, and its stricter flags may meet another host compiler."""
    nvcc = shutil.which("nvcc")
    if lines.smoke or LIBRARY.exists() or nvcc is None:
        why = "a smoke run" if lines.smoke else "already there" if LIBRARY.exists() else "no nvcc"
        lines.add("row", table="CUDA C++ kernels", built=why)
        return
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    part = LIBRARY.with_name("part.so")
    flags = ["-shared", "-Xcompiler", "-fPIC", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]
    try:
        words = [nvcc, *flags, "-o", str(part), str(SOURCE)]
        subprocess.run(words, capture_output=True, text=True, check=True, timeout=SECONDS)
        os.replace(part, LIBRARY)
        lines.add("row", table="CUDA C++ kernels", built="now")
    except subprocess.SubprocessError as error:
        told = getattr(error, "stderr", None) or said(error)
        lines.add("row", table="CUDA C++ kernels", built=f"failed: {str(told).splitlines()[0]}")
