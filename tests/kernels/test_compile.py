"""Compiled for sm_90 without a GPU: nothing spills, what was meant is in the machine code, and nothing recompiles.

In processes of their own: the interpreter that the other tests run in cannot compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

from bench.__main__ import main
from kernels import compile, table
from kernels.launch import HAVE_TRITON

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")]


def run(*command, status=0):
    """Output of a python command without the interpreter, which must end with `status`."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=HANG
    )
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout, done.stderr


def script(code):
    """The JSON that a script prints; it finds the stub driver in place."""
    out, _ = run("-c", "import json, torch\nfrom kernels import compile, table\ncompile.use_stub_driver()\n" + code)
    return json.loads(out.splitlines()[-1])


def test_every_kernel_compiles_for_sm_90():
    out, _ = run("-m", "bench", "kernels", "--compile-only", "--json")
    rows = json.loads(out.splitlines()[-1])["variants"]
    kernels = {
        name: op.implementations["triton"] for name, op in table.load_all().items() if "triton" in op.implementations
    }
    compiled = {row["name"].split()[0] for row in rows}
    assert compiled <= set(kernels)
    assert {kernels[name] for name in compiled} == set(kernels.values())  # two operations may share a kernel
    for row in rows:
        assert (row["spills"], row["stack_bytes"], row["problems"]) == (0, 0, [])
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 226 * 1024
    attention = {row["name"]: row["instructions"] for row in rows if "attend_kernel" in row["name"]}
    assert all(("QGMMA" if "fp8" in name else "HGMMA") in found for name, found in attention.items())
    assert all("UTMALDG" in found and "HMMA" not in found for found in attention.values())


@pytest.mark.thorough
@pytest.mark.parametrize("sm", [86, 89, 120])
def test_kernels_fit_consumer_gpus(sm):
    """They have 99 KB of shared memory instead of 227, and before sm_89 no FP8."""
    out, _ = run("-m", "bench", "kernels", "--compile-only", "--json", "--sm", str(sm))
    rows = json.loads(out.splitlines()[-1])["variants"]
    assert any("d=128" in row["name"] and "attend_kernel" in row["name"] for row in rows)
    assert all(row["shared_bytes"] <= 98 * 1024 and row["problems"] == [] for row in rows)
    assert all("fp8" not in row["name"] for row in rows) or sm >= 89


@pytest.mark.thorough
def test_what_does_not_fit_a_consumer_gpu_is_red():
    """Six blocks of keys and values under way need 160 KB."""
    code = """
from kernels import stream_k_attention
stream_k_attention.FEW_STAGES = 6
rows = compile.compile_variants(["ring_attention"])
print(json.dumps([row["problems"] for row in rows if "d=128" in row["name"]]))
"""
    code = "import json, torch\nfrom kernels import compile, table\ncompile.use_stub_driver(86)\n" + code
    out, _ = run("-c", code)
    assert any("shared_bytes" in problem for problems in json.loads(out.splitlines()[-1]) for problem in problems)


@pytest.mark.thorough
def test_a_variant_beyond_its_limits_is_red():
    rows = script("""
from dataclasses import replace
op = table.load_all()["ring_attention"]
for change in ({"needs": ("QGMMA",)}, {"registers": 40}, {}):
    variant = replace(next(iter(op.variants())), **change)
    table.OPS[str(change)] = replace(op, variants=lambda variant=variant: [variant])
print(json.dumps([compile.compile_variants([name])[0]["problems"] for name in list(table.OPS)[-3:]]))
""")
    missing, large, right = rows
    assert missing == ["got no QGMMA, expected some"]
    assert len(large) == 1
    assert "registers, expected at most 40" in large[0]
    assert right == []


def test_no_multiplication_is_fused_where_products_round():
    """A multiply-add in one instruction would not round the product, which the published formula does."""
    fused = script("""
from kernels.launch import compiling
found = {}
for name in ("gate_residual", "norm_modulate", "unipc_step"):
    for variant in table.load_all()[name].variants():
        with compiling() as made:
            variant.call()
        found[f"{name} {variant.name}"] = sum(kernel.asm["ptx"].count("fma.rn") for kernel in made)
print(json.dumps(found))
""")
    assert len(fused) == 8
    assert set(fused.values()) == {0}


def test_unknown_operations_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(compile, "use_stub_driver", lambda sm: None)  # it could not be taken out again
    assert main(["kernels", "--compile-only", "--op", "nothing"]) == 2
    err = capsys.readouterr().err
    assert "got nothing, expected some of" in err
    assert len(err.splitlines()) == 1


def test_no_ring_state_asks_for_another_compilation():
    """Token counts and valid rows that 16 divides, odd ones and 1; scalars and scales anywhere in a tensor."""
    first, later, launches = script("""
from kernels.launch import compilations, warm
from kernels.ring_attention import ring_attention
from kernels.ring_attention_fp8 import ring_attention_fp8
state, scales, E4M3 = torch.ones(16, dtype=torch.int32), torch.ones(100), torch.float8_e4m3fn
def call(n, rows, at):
    valid = state[at : at + 1]
    q, k = (torch.zeros(1, m, 12, 128, dtype=torch.bfloat16) for m in (n, rows))
    ring_attention(q, k, k, valid)
    ring_attention(q, k, k, max(rows // 2, 1))
    v_t = torch.zeros(1, 12, 128, -(-rows // 16) * 16).to(E4M3)
    a, b, c = scales[at : at + 36].split(12)
    ring_attention_fp8(q, k.to(E4M3), v_t, a, b, c, valid)
cases = [(1560, 6240, 0), (1, 1, 1), (37, 100, 2), (16, 16, 3), (1560, 4680, 5), (4680, 32760 // 8, 7)]
with table.use("triton"):
    first = warm(lambda: call(*cases[0]))
    later = sum(warm(lambda case=case: call(*case)) for case in cases[1:])
print(json.dumps([first, later, compilations()]))
""")
    assert (first, later, launches) == (5, 0, 5)  # rows on the device: bf16, FP8, their merge; a number: bf16, merge


def test_the_interpreter_cannot_compile(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--compile-only"]) == 2
    assert capsys.readouterr().err == "error: compile gate: got TRITON_INTERPRET=1, expected a process without it\n"
