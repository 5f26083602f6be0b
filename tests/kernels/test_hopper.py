"""Which devices and which Triton get the kernels that are written in Gluon."""

import subprocess
import sys

import pytest
import torch

from kernels import hopper, launch
from kernels.hopper import runs_on

OLD = """
import triton
triton.__version__ = "3.5.1"
import torch
from kernels.hopper import runs_on
from kernels.stream_k_attention import attend
print(runs_on(torch.device("meta")))
"""
NO_GLUON = """
import sys
sys.modules["triton.experimental.gluon"] = None
import torch
from kernels import hopper, hopper_attention, hopper_convolution
print(hopper.runs_on(torch.device("meta")))
"""
NO_TRITON = NO_GLUON.replace("triton.experimental.gluon", "triton")


def test_devices(monkeypatch):
    assert not runs_on(torch.device("cpu"))
    for target in (86, 89, 120):
        monkeypatch.setattr(launch, "compile_target", target)
        assert not runs_on(torch.device("meta"))
    monkeypatch.setattr(launch, "compile_target", 90)
    assert runs_on(torch.device("meta")) == hopper.HAVE_GLUON == launch.HAVE_TRITON


@pytest.mark.skipif(not launch.HAVE_TRITON, reason="no Triton")
@pytest.mark.parametrize("code", [OLD, NO_GLUON, NO_TRITON], ids=["older", "no Gluon", "no Triton"])
def test_without_gluon_other_kernels_run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
