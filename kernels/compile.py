"""The compile gate: compiles every variant of every operation without a GPU, for sm_90 or a consumer GPU.

A stub replaces the driver, so that launches go through Triton's real specialisation of their arguments (meta tensors
have shapes, dtypes and alignment). Use a separate process: the stub cannot be removed again.
"""

import ctypes
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kernels import launch, table

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
SPARE_KB = 1  # of shared memory that the system keeps for itself on sm_90
TARGETS = (90, 86, 89, 120)
FP8_SINCE = 89
INSTRUCTIONS = ("HGMMA", "QGMMA", "HMMA", "QMMA", "UTMALDG", "UTMASTG", "LDGSTS", "USETMAXREG", "LDSM", "STSM")


class _StubDriver:
    """The part of a driver that Triton needs to compile."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", launch.compile_target, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def use_stub_driver(target: int = 90) -> None:
    """From now on this process only compiles, for one of TARGETS. Raises ValueError if Triton cannot compile here."""
    if target not in TARGETS:
        raise ValueError(f"compile gate: got sm_{target}, expected one of {', '.join(f'sm_{t}' for t in TARGETS)}")
    if not launch.HAVE_TRITON:
        raise ValueError("compile gate: got no Triton, expected it installed")
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        raise ValueError("compile gate: got TRITON_INTERPRET=1, expected a process without it")
    launch.compile_target = target
    driver.set_active(_StubDriver())


def resources(cubin: bytes) -> dict[str, Any]:
    """What machine code uses: {registers, stack_bytes, spills, instructions}; spills are local loads and stores."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        code = _output(str(tools / "nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump: got {usage[-200:]!r}, expected registers and stack")
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "instructions": {name: count for name, count in counts.items() if count},
    }


def compile_variants(ops: list[str] | None = None) -> list[dict[str, Any]]:
    """Compile; one row per kernel: name, registers, shared_bytes, spills, ..., problems (empty if there are none).

    A variant of several kernels (attention and its merge) has several rows; a needed instruction may be in any of
    them. Call use_stub_driver first.
    """
    known = table.load_all()
    unknown = sorted(set(ops or ()) - set(known))
    if unknown:
        raise ValueError(f"compile gate: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    chosen = [op for op in ops or known if launch.compile_target >= FP8_SINCE or not takes_fp8(op)]
    return [row for op in chosen for variant in known[op].variants() for row in _rows(f"{op} {variant.name}", variant)]


def takes_fp8(op: str) -> bool:
    """Whether an operation reads or writes e4m3, which GPUs before sm_89 have not."""
    return "fp8" in op or "quantize" in op


def compile_cuda() -> list[dict[str, Any]]:
    """The same for the kernels in CUDA C++, built with the flags of their CMake file; empty without nvcc or sources."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or not CUDA_SOURCES.exists():
        return []
    start = time.perf_counter()
    variant = table.Variant("128x160", lambda: None, ("QGMMA", "UTMALDG", "USETMAXREG"))
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3", "-Xptxas=-warn-spills,-warn-lmem-usage"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, built = Path(folder) / "kernel.cubin", Path(folder) / "kernel.so"
        source = str(CUDA_SOURCES / "fp8_linear.cu")
        _output(nvcc, *flags, "-cubin", "-o", str(cubin), source)
        _output(nvcc, *flags, "-shared", "-Xcompiler=-fPIC", "-o", str(built), source)
        row: dict[str, Any] = {
            "name": "fp8_linear cuda 128x160: fp8_linear",
            "shared_bytes": ctypes.CDLL(str(built)).greedy_cuda_fp8_linear_shared_bytes(),
            **resources(cubin.read_bytes()),
        }
    row["problems"] = _problems(row, variant) + _missing([row], variant)
    return [row | {"seconds": round(time.perf_counter() - start, 2)}]


def _rows(name: str, variant: table.Variant) -> list[dict[str, Any]]:
    start = time.perf_counter()
    with table.use("triton"), launch.compiling() as compiled:
        variant.call()
    if not compiled:
        raise ValueError(f"{name}: got no kernel launch, expected one")
    rows = []
    for kernel in compiled:
        row = {"name": f"{name}: {kernel.metadata.name}", "shared_bytes": kernel.metadata.shared}
        row |= {"warps": kernel.metadata.num_warps} | resources(kernel.asm["cubin"])
        row["problems"] = _problems(row, variant)
        rows.append(row)
    rows[0]["problems"] += _missing(rows, variant)
    rows[0]["seconds"] = round(time.perf_counter() - start, 2)
    return rows


def _problems(row: dict[str, Any], variant: table.Variant) -> list[str]:
    shared = (launch.SHARED_KB[launch.compile_target] - SPARE_KB) * 1024
    limits = {"registers": variant.registers, "shared_bytes": shared, "spills": 0, "stack_bytes": 0}
    if launch.compile_target != 90:  # tuned for sm_90; elsewhere a kernel has to fit and to run
        limits = {"shared_bytes": shared}
    return [f"got {row[key]} {key}, expected at most {most}" for key, most in limits.items() if row[key] > most]


def _missing(rows: list[dict[str, Any]], variant: table.Variant) -> list[str]:
    if launch.compile_target != 90:  # other GPUs have other matrix instructions
        return []
    have = {instruction for row in rows for instruction in row["instructions"]}
    return [f"got no {need}, expected some" for need in variant.needs if need not in have]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{Path(command[0]).name}: got status {done.returncode}, expected 0: {done.stderr[-200:]}")
    return done.stdout
