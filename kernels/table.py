"""Operation -> implementation: `reference` (PyTorch), `triton` or `cuda` (C++), chosen by the tensors' device.

A GPU uses Triton where it is installed, a processor uses the reference. GREEDY_KERNELS=reference switches every kernel
off. GREEDY_KERNELS=cuda prefers the C++ kernels on a GPU, for operations that have one. GREEDY_KERNELS=triton asks
for Triton on any device. `use` sets the same choice for a `with` block.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.launch import HAVE_TRITON

SETTINGS = ("auto", "reference", "triton", "cuda")


@dataclass(frozen=True)
class Variant:
    """One set of full-size shapes for which the compile gate compiles an operation."""

    name: str
    call: Callable[[], Any]  # the implementation on meta tensors: compiled, never run
    needs: tuple[str, ...] = ()  # instructions that the machine code must contain, such as HGMMA, UTMALDG, USETMAXREG
    registers: int = 255  # allowed per thread


@dataclass(frozen=True)
class Op:
    """An operation's implementations, reference first, and the variants that the compile gate compiles."""

    implementations: dict[str, Callable[..., Any]]
    variants: Callable[[], Iterable[Variant]]


OPS: dict[str, Op] = {}
_setting: ContextVar[str | None] = ContextVar("kernels", default=None)  # set inside `use`, per thread


def register(
    name: str, *, variants: Callable[[], Iterable[Variant]] = tuple, **implementations: Callable[..., Any]
) -> None:
    """Enter an operation; implementations by the names of SETTINGS, `reference` first."""
    if "reference" not in implementations or not set(implementations) <= set(SETTINGS):
        raise ValueError(f"{name}: got implementations {list(implementations)}, expected reference and {SETTINGS[2:]}")
    OPS[name] = Op(implementations, variants)


def implementation(name: str, device: torch.device, *, fits: bool = True) -> Callable[..., Any]:
    """The function that runs operation `name` on `device`; fits=False: only the reference supports the case."""
    found = OPS[name].implementations
    wanted = _setting.get() or _from_environment()
    if wanted == "auto" or (wanted == "cuda" and (device.type != "cuda" or "cuda" not in found)):
        wanted = "triton" if device.type == "cuda" and HAVE_TRITON else "reference"
    return found[wanted if fits and wanted in found else "reference"]


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether a kernel, not the reference, runs operation `name` on `device`."""
    return implementation(name, device) is not OPS[name].implementations["reference"]


@contextmanager
def use(setting: str) -> Iterator[None]:
    """Inside, choose as GREEDY_KERNELS=setting would, for this thread."""
    token = _setting.set(_checked(setting))
    try:
        yield
    finally:
        _setting.reset(token)


def load_all() -> dict[str, Op]:
    """Import every file of kernels/, so that OPS is complete."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"kernels.{module.name}")
    return OPS


@cache
def _from_environment() -> str:
    return _checked(os.environ.get("GREEDY_KERNELS", "auto"))


def _checked(setting: str) -> str:
    if setting not in SETTINGS:
        raise ValueError(f"GREEDY_KERNELS: got {setting!r}, expected one of {', '.join(SETTINGS)}")
    return setting
