"""The kernels' own tests on the device, without those that a processor runs as well."""

import importlib.util
import re
import subprocess
import sys

from bench.gpu.lines import Lines
from bench.instruments.header import ROOT

LIMIT = 100.0  # seconds
FOLDER = ROOT / "tests" / "kernels"
# Compilers and counts need no GPU; test_cuda_library emulates instructions in its slowest test.
ELSEWHERE = ("test_compile.py", "test_engine_launches.py", "test_specialisation.py", "test_plugin_kernels.py")


def command(smoke: bool) -> list[str]:
    if smoke:  # `make test` runs all of them in the interpreter
        return [sys.executable, "-m", "pytest", "-x", str(FOLDER / "test_gate_residual.py")]
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    without = [f"--ignore={FOLDER / name}" for name in ELSEWHERE]
    return [sys.executable, "-m", "pytest", "-vv", *spread, *without, "-k", "not emulated", str(FOLDER)]


def kernel_tests(lines: Lines) -> None:
    """What pytest says goes to a file, so that a run over its limit tells how far it came."""
    log = lines.file.with_name("kernel-tests.log")
    with log.open("w") as out:
        try:
            done = subprocess.run(command(lines.smoke), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False,
                                  timeout=LIMIT - 10)  # fmt: skip
            status, ended = done.returncode, ""
        except subprocess.TimeoutExpired:
            status, ended = -1, f"not done after {LIMIT - 10} s; "
    said = log.read_text()
    print(said[-4000:], flush=True)
    summary = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing")
    red = re.findall(r"^(?:FAILED|ERROR|\[gw\d+\].* FAILED) (\S+)", said, re.MULTILINE)
    lines.check("tests/kernels", status == 0, ended + "; ".join([summary.strip(" ="), *red[:20]]))
