"""Which implementation runs where, and by which setting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import table
from kernels.launch import HAVE_TRITON

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRITON = "triton" if HAVE_TRITON else "reference"


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [
        ("auto", CPU, "reference"),
        ("auto", GPU, TRITON),
        ("reference", GPU, "reference"),
        ("triton", CPU, "triton"),
        ("cuda", GPU, "cuda"),
        ("cuda", CPU, "reference"),
    ],
)
def test_the_device_and_the_setting_choose(setting, device, expected):
    table.load_all()
    with table.use(setting):
        assert table.implementation("fp8_linear", device) is table.OPS["fp8_linear"].implementations[expected]
        other = table.OPS["gate_residual"].implementations
        assert table.implementation("gate_residual", device) is other[TRITON if expected == "cuda" else expected]
        assert table.implementation("gate_residual", device, fits=False) is other["reference"]


def test_every_operation_has_its_reference_first():
    for name, op in table.load_all().items():
        assert next(iter(op.implementations)) == "reference", name


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"got 'fast', expected one of auto, reference"), table.use("fast"):
        pass
    with pytest.raises(ValueError, match=r"op: got implementations \['fast'\], expected reference"):
        table.register("op", fast=len)


@pytest.mark.slow
def test_the_environment_chooses():
    code = """
import sys, torch, kernels.gate_residual
from kernels import table
sys.stdout.write(table.implementation("gate_residual", torch.device("cuda")).__name__)
"""

    def run(setting):
        env = {**os.environ, "GREEDY_KERNELS": setting}
        root = Path(__file__).parents[2]
        return subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)

    assert run("reference").stdout == "gate_residual_reference"
    assert run("fast").stderr.endswith("got 'fast', expected one of auto, reference, triton, cuda\n")
