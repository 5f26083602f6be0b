"""The kernels in CUDA C++: built by their CMake file, refusing what they cannot do, right where there is an H100."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from closeness import assert_as_good
from limits import HANG

from kernels import table
from kernels.cuda_library import LIBRARY, fp8_linear_cuda, library
from kernels.fp8_linear import fp8_linear, fp8_linear_reference
from kernels.quantize import quantize_per_channel, quantize_per_token

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.slow  # they build the library


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where CMake has built the library and its test."""
    if not (shutil.which("nvcc") and shutil.which("cmake")):
        pytest.skip("nvcc or cmake is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    command = ["cmake", "-S", str(SOURCES), "-B", str(folder), f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}"]
    subprocess.run(command, check=True, capture_output=True, timeout=HANG)
    subprocess.run(["cmake", "--build", str(folder)], check=True, capture_output=True, timeout=HANG)
    return folder


@pytest.fixture
def built(folder):
    return library(folder / "libgreedy_cuda.so")


def test_the_kernel_is_right_when_its_instructions_are_emulated(folder):
    """Indices, swizzles, edges and barriers, on a processor, beside float64."""
    done = subprocess.run([folder / "fp8_linear_emulated"], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 8


@pytest.mark.parametrize("rows_columns_depth", [(0, 16, 16), (1, 8, 16), (1, 24, 16), (1, 16, 0), (1, 16, 40)])
def test_shapes_that_the_kernel_does_not_do_are_refused(built, rows_columns_depth):
    memory = ctypes.create_string_buffer(4096)
    start = (ctypes.addressof(memory) + 15) // 16 * 16
    refused = -1
    call = built.greedy_cuda_fp8_linear
    assert call(start, start, start, start, None, start, *rows_columns_depth, None) == refused
    assert call(start, start, start, start, start + 4, start, 1, 16, 16, None) == refused
    assert call(None, start, start, start, None, start, 1, 16, 16, None) == refused
    assert b"16" in built.greedy_cuda_message(refused)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_loads_and_says_so(built):
    memory = ctypes.create_string_buffer(4096)
    start = (ctypes.addressof(memory) + 15) // 16 * 16
    status = built.greedy_cuda_fp8_linear(start, start, start, start, None, start, 1, 16, 16, None)
    assert built.greedy_cuda_message(status) == b"no CUDA driver that knows tensor maps"


def test_a_missing_library_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CUDA kernels: got no .*none.so, expected it built by"):
        library(tmp_path / "none.so")


def test_tensors_of_a_processor_are_refused():
    x, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    with pytest.raises(ValueError, match=r"fp8_linear_cuda: got cpu, .*expected a CUDA device"):
        fp8_linear_cuda(x, scale, x, scale, None, torch.bfloat16)


@pytest.mark.skipif(not hopper or not LIBRARY.exists(), reason=f"needs an sm_90 GPU and {LIBRARY.name}")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1560, 1536, 8960), (1560, 1536, 1536), (37, 48, 16), (129, 176, 4000)]
)
def test_on_a_gpu_against_float64(rows, columns, depth, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, depth, device="cuda"), torch.randn(columns, depth, device="cuda")
    operands = (*quantize_per_token(x.bfloat16()), *quantize_per_channel(weight.bfloat16()))
    add = torch.randn(columns, device="cuda").bfloat16() if bias else None
    with table.use("cuda"):
        found = fp8_linear(*operands, add)
    plain = fp8_linear_reference(*operands, add, torch.bfloat16)
    wide = [operand.double() for operand in operands]
    truth = (wide[0] * wide[1]) @ (wide[2] * wide[3]).T + (0 if add is None else add.double())
    assert_as_good(found, plain, truth, floor=2**-10)
    with table.use("cuda"):
        assert torch.equal(found, fp8_linear(*operands, add))
