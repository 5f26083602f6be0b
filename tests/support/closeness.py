"""How near a kernel's result must come to the truth."""

import torch


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; NaN where either has one."""
    return float((found.double() - truth.double()).abs().max())


def assert_as_good(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, floor: float = 1e-6) -> None:
    """`found` may differ from the float64 `truth` by twice as much as PyTorch's own result in the same dtype, plus
    `floor` of the largest true value. NaN in either fails.
    """
    assert found.shape == truth.shape, f"got {list(found.shape)}, expected {list(truth.shape)}"
    allowed = 2 * error(plain, truth) + floor * float(truth.double().abs().max())
    assert error(found, truth) <= allowed, f"got error {error(found, truth):.2e}, expected at most {allowed:.2e}"
