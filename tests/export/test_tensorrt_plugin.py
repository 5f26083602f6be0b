"""The TensorRT plugins without TensorRT: PTX for Hopper, ONNX bodies beside the kernels' references. Not executed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from export.tensorrt.plugin_nodes import plugin_bodies
from kernels.ring_attention_fp8 import ring_attention_fp8_reference

ROOT = Path(__file__).parents[2]
KERNELS = """
import json, re, sys
sys.path.insert(0, "tests/support")
import stand_in_tensorrt as s
sys.modules["tensorrt"], sys.modules["tensorrt.plugin"] = s.module(), s.plugin_module()
from export.tensorrt.plugins import register_plugins
from kernels.compile import resources
from triton import knobs
register_plugins(90)
def d(*shape): return s.TensorDesc(shape, None)
q, update, one, heads = d(1, 1560, 1536), d(1, 1560, 1536), d(1), d(12)
k, v, k8, v8 = d(1, 1, 6240, 1536), d(1, 1, 6240, 1536), d(1, 6240, 1536), d(1, 12, 128, 6240)
given = {
    "ring_attention": (q, k, v, one, 12), "ring_attention_fp8": (q, k8, v8, one, heads, heads, heads, 12),
    "write_keys_fp8": (k8, update, heads, one), "write_values_fp8": (v8, update, heads, one),
}
from triton.backends.nvidia.compiler import get_ptxas
import subprocess, tempfile
for name, arguments in given.items():
    plugin = s.PLUGINS["greedy::" + name]
    kernel, ptx, params, extra = plugin["implement"](*arguments, None, None)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file, tempfile.NamedTemporaryFile(suffix=".cubin") as out:
        file.write(ptx); file.flush()
        subprocess.run([get_ptxas(90).path, "--gpu-name=sm_90a", file.name, "-o", out.name], check=True)
        used = resources(open(out.name, "rb").read())
    entry = ptx[ptx.index(".entry " + kernel):]
    about = {key: getattr(params, key) for key in ("grid_x", "grid_y", "block_x", "shared_mem")}
    head = entry[:entry.index(")")]
    version, target = (re.search(r"\\.%s (\\S+)" % word, ptx)[1] for word in ("version", "target"))
    print(json.dumps(used | about | {
        "name": name, "version": version, "target": target,
        "parameters": head.count(".param .u64"), "others": head.count(".param .u32"),
        "paths": "/kernels/" in ptx or "/export/" in ptx, "extra": len(extra),
        "sides": plugin["inputs"] + plugin["outputs"],
    }))
"""


@pytest.mark.slow
def test_plugin_kernels_compile_for_hopper() -> None:
    """Full size, in a process without the interpreter: parameters are inputs and outputs and nothing else."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == 4
    for row in rows.values():
        assert (row["version"], row["target"]) == ("8.6", "sm_90a"), row
        assert row["parameters"] == row["sides"], row  # Triton's two are the last outputs
        assert (row["others"], row["extra"], row["paths"]) == (0, 0, False), row
        assert (row["spills"], row["stack_bytes"]) == (0, 0), row
        assert row["shared_mem"] <= 48 * 1024, row
    assert rows["ring_attention"]["instructions"]["HGMMA"] > 0
    assert rows["ring_attention_fp8"]["instructions"]["QGMMA"] > 0
    assert (rows["ring_attention"]["grid_x"], rows["ring_attention"]["block_x"]) == (25 * 12, 128)


def test_fp8_bodies_are_what_the_kernels_compute() -> None:
    """A ring of 5 slots in the three plugins' nodes, over 7 chunks, against the FP8 kernels' own references."""
    heads, dim, tokens, slots = 2, 16, 6, 5
    rows, pitch = slots * tokens, 32
    scales = {
        name: torch.tensor(value) for name, value in (("qs", [0.02, 0.03]), ("ks", [0.01, 0.02]), ("vs", [0.015, 0.01]))
    }
    more = {"domain": "greedy.plugin", "plugin_namespace": "greedy", "aot": 1}
    nodes = [
        helper.make_node("write_keys_fp8", ["k", "ku", "ks", "at"], ["k_out", "a", "b"], **more),
        helper.make_node("write_values_fp8", ["v", "vu", "vs", "at"], ["v_out", "c", "d"], **more),
        helper.make_node(
            "ring_attention_fp8", ["q", "k_out", "v_out", "valid_rows", "qs", "ks", "vs"],
            ["out", *"efghi"], heads=heads, **more,
        ),
    ]  # fmt: skip
    info = helper.make_tensor_value_info
    kinds = {"k": [1, rows, heads * dim], "v": [1, heads, dim, pitch]}
    small = [info(n, TensorProto.FLOAT, [1, tokens, heads * dim]) for n in ("q", "ku", "vu")]
    graph = helper.make_graph(
        nodes, "g",
        [*(info(n, TensorProto.FLOAT8E4M3FN, s) for n, s in kinds.items()), *small,
         *(info(n, TensorProto.INT32, [1]) for n in ("at", "valid_rows"))],
        [info("out", TensorProto.FLOAT, [1, tokens, heads * dim]),
         *(info(f"{n}_out", TensorProto.FLOAT8E4M3FN, s) for n, s in kinds.items())],
        [helper.make_tensor(n, TensorProto.FLOAT, [heads], x.tolist()) for n, x in scales.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("greedy.plugin", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=plugin_bodies(), ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def bytes_of(x: Tensor) -> Any:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(torch.uint8).numpy(), TensorProto.FLOAT8E4M3FN)

    caches = {name: torch.zeros(shape).to(torch.float8_e4m3fn) for name, shape in kinds.items()}
    mine = {name: cache.clone() for name, cache in caches.items()}
    torch.manual_seed(0)
    for chunk in range(7):
        q, k, v = (torch.randn(1, tokens, heads * dim) * 2 for _ in range(3))
        start_row, valid_rows = chunk % slots * tokens, min(chunk + 1, slots) * tokens
        binding, out = session.io_binding(), torch.empty(1, tokens, heads * dim)
        for name, value in (("q", q), ("ku", k), ("vu", v)):
            binding.bind_cpu_input(name, value.numpy())
        for name, value in (("at", start_row), ("valid_rows", valid_rows)):
            binding.bind_cpu_input(name, np.array([value], np.int32))
        made = {name: torch.empty_like(cache) for name, cache in caches.items()}
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, bytes_of(cache))
            binding.bind_ortvalue_output(f"{name}_out", bytes_of(made[name]))
        binding.bind_output("out", "cpu", 0, np.float32, tuple(out.shape), out.data_ptr())
        session.run_with_iobinding(binding)
        caches = made

        parts = {name: x.unflatten(-1, (heads, dim)) for name, x in (("q", q), ("k", k), ("v", v))}
        q8, k8, v8 = (
            (parts[n] / scales[f"{n}s"][:, None]).clamp(-448, 448).to(torch.float8_e4m3fn) for n in ("q", "k", "v")
        )
        mine["k"].view(torch.uint8)[:, start_row : start_row + tokens] = k8.flatten(2).view(torch.uint8)
        mine["v"].view(torch.uint8)[..., start_row : start_row + tokens] = v8.view(torch.uint8).permute(0, 2, 3, 1)
        for name in caches:
            assert torch.equal(caches[name].view(torch.uint8), mine[name].view(torch.uint8)), (chunk, name)
        expected = ring_attention_fp8_reference(
            q8, mine["k"].unflatten(-1, (heads, dim)), mine["v"], *scales.values(), valid_rows
        )
        assert float((out - expected.flatten(2)).norm() / expected.norm()) <= 1e-5
