"""The kernels' own tests on the device, without those that a processor runs as well."""

import importlib.util
import re
import subprocess
import sys

from bench.gpu.lines import Lines
from bench.instruments.header import ROOT

FOLDER = ROOT / "tests" / "kernels"
# Compilers and counts need no GPU; test_cuda_library emulates instructions in its slowest test.
ELSEWHERE = ("test_compile.py", "test_engine_launches.py", "test_specialisation.py", "test_plugin_kernels.py")


def command(smoke: bool) -> list[str]:
    if smoke:  # `make test` runs all of them in the interpreter
        return [sys.executable, "-m", "pytest", "-x", str(FOLDER / "test_gate_residual.py")]
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    without = [f"--ignore={FOLDER / name}" for name in ELSEWHERE]
    return [sys.executable, "-m", "pytest", *spread, *without, "-k", "not emulated", str(FOLDER)]


def kernel_tests(lines: Lines) -> None:
    done = subprocess.run(command(lines.smoke), cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], done.stderr[-1000:], flush=True)
    summary = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "nothing")
    red = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    lines.check("tests/kernels", done.returncode == 0, "; ".join([summary.strip(" ="), *red[:20]]))
