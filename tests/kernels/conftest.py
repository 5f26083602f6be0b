"""Kernels run natively where there is a GPU, else in Triton's interpreter; memory that nobody wrote is NaN.

TRITON_INTERPRET is read when Triton is imported, so tests/conftest.py sets it; here it is mended for narrow floats.
"""

import pytest
import torch

from kernels import table

if not torch.cuda.is_available():
    from mended_interpreter import mend

    mend()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels of these tests run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _triton_on_any_device():
    with table.use("triton"):
        yield


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch):
    """torch.empty, empty_like and new_empty hand out NaN: what a kernel forgets to write, or reads early, shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
