"""The shapes that the bench times - full size on a GPU - are right, and the same bit for bit from run to run."""

import pytest
import torch
from closeness import assert_as_good

from bench.operations.others import SHAPES


@pytest.mark.slow
@pytest.mark.parametrize("op", SHAPES)
def test_right_and_repeatable(device, op):
    make, shapes = SHAPES[op]
    for shape in shapes[device.type]:
        case = make(device, torch.bfloat16, *shape)
        with torch.inference_mode():
            found = case.value(case.ours()).double()
            assert torch.equal(case.value(case.ours()).double(), found)
            plain = case.value(next(iter(case.library.values()))())
            assert_as_good(found, plain, case.value(case.reference()), floor=1e-6)
