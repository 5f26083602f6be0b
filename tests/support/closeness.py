"""Tolerance of a kernel's result against a float64 reference."""

import torch


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; NaN if either tensor has one."""
    return float((found.double() - truth.double()).abs().max())


def assert_as_good(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, floor: float = 1e-6) -> None:
    """Assert that the error of `found` is at most twice that of `plain`, plus `floor` times the largest true value.

    `truth` is float64, `plain` is PyTorch's result in the dtype of `found`. NaN in either fails.
    """
    assert found.shape == truth.shape, f"got {list(found.shape)}, expected {list(truth.shape)}"
    allowed = 2 * error(plain, truth) + floor * float(truth.double().abs().max())
    assert error(found, truth) <= allowed, f"got error {error(found, truth):.2e}, expected at most {allowed:.2e}"
