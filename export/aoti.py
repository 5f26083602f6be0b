"""Program -> a shared object of AOTInductor, loadable through its C ABI by a host without Python.

Weights stay outside: the host binds them, and all graphs share them. Only the VAE's weights on a CPU lie inside, where
the compiler may fold and re-order them. Frozen graphs with weights outside crash at run time, so there is no such
option.
"""

import hashlib
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx_aot
from torch._ops import OpOverload
from torch.fx.graph import CodeGen

from engine.bundles.aoti import open_object, signature, target_of
from export.program import Program

# x86-64-v3 on every compiling machine, so that the bundle also runs on other processors. No debug information, which
# would hold paths. The wrapper only calls kernels: optimising it takes a third of the time and gains nothing.
OPTIONS = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_frame_pointer": False,
    "aot_inductor.enable_line_tables": False,
    "cpp.dynamic_threads": True,
    "cpp.march": "x86-64-v3",
    "cpp.simdlen": 256,
}


def source_of(program: Program, device: torch.device) -> str:
    """sha256 of the compiler's input: program, shapes, options, versions; of values only where they are frozen."""
    settings = [torch.__version__, target_of(device), _options(program, device)]
    settings += [spec.model_dump() for spec in (*program.inputs, *program.outputs)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(program.text.encode())
    if _frozen(program, device):
        for value in program.constants.values():
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def compile_program(program: Program, device: torch.device, file: Path) -> None:
    """Write the shared object, in ten seconds to minutes. Raises ValueError where it would need Python to run."""
    for node in program.traced.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims", "higher_order"):
            raise ValueError(f"aoti: {program.graph.name}: got operator {node.target}, expected torch's own only")
    module = program.traced.module(check_guards=False)
    for name, value in program.traced.constants.items():  # constants that are plain attributes would lose their names
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf not in owner._buffers:
            delattr(owner, leaf)
            owner.register_buffer(leaf, value)
    module.graph._codegen = CodeGen()  # inputs and outputs are flat, not trees
    module.recompile()
    outside = {} if _frozen(program, device) else program.constants
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = _options(program, device) | {
            "aot_inductor.output_path": f"{folder}/graph.so",
            "aot_inductor.serialized_in_spec": signature(program.inputs, program.outputs, outside),
        }
        made = compile_fx_aot(module, list(program.graph.inputs.values()), config_patches=options)
        assert isinstance(made, str)
        shutil.copyfile(made, file)


def constants_of(program: Program, device: torch.device, file: Path) -> dict[str, Tensor]:
    """{name in the shared object: value} of the constants that stay outside."""
    if _frozen(program, device):
        return {}
    names: dict[str, str] = open_object(file, device).get_constant_names_to_original_fqns()
    return {internal: program.constants[name] for internal, name in names.items()}


def _frozen(program: Program, device: torch.device) -> bool:
    return program.graph.name.startswith("vae_") and device.type == "cpu"


def _options(program: Program, device: torch.device) -> dict[str, Any]:
    frozen = _frozen(program, device)
    return OPTIONS | {"aot_inductor.package_constants_in_so": frozen, "freezing": frozen}
