"""Program -> a shared object of AOTInductor, loadable through its C ABI by a host without Python.

Weights stay outside (the host binds them, shared by all graphs), but those of the VAE on a CPU: there the compiler may
fold and re-order them. Both at once, freezing with weights outside, crashes when run, so there is no such option.
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

# x86-64-v3 whatever the machine that compiles has, so that the bundle runs on more than its twin; no debug information,
# which would hold paths. The wrapper only calls kernels: optimising it costs a third of the time and gains nothing.
OPTIONS = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_frame_pointer": False,
    "aot_inductor.enable_line_tables": False,
    "cpp.dynamic_threads": True,
    "cpp.march": "x86-64-v3",
    "cpp.simdlen": 256,
}


def source_of(program: Program, device: torch.device) -> str:
    """sha256 of what the compiler sees: program, shapes, options, versions; values only where they are frozen."""
    told = [torch.__version__, target_of(device), _options(program, device)]
    told += [spec.model_dump() for spec in (*program.inputs, *program.outputs)]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    digest.update(program.text.encode())
    if _frozen(program, device):
        for value in program.constants.values():
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def compile_program(program: Program, device: torch.device, file: Path) -> None:
    """Write the shared object. Ten seconds to minutes. ValueError where it would need Python to run."""
    for node in program.traced.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims", "higher_order"):
            raise ValueError(f"aoti: {program.graph.name}: got operator {node.target}, expected torch's own only")
    module = program.traced.module(check_guards=False)
    for name, value in program.traced.constants.items():  # plain attributes would lose their names
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf not in owner._buffers:
            delattr(owner, leaf)
            owner.register_buffer(leaf, value)
    module.graph._codegen = CodeGen()  # flat inputs and outputs, no trees of them
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
    """The shared object's own names for the constants that it leaves outside -> their values."""
    if _frozen(program, device):
        return {}
    names: dict[str, str] = open_object(file, device).get_constant_names_to_original_fqns()
    return {internal: program.constants[name] for internal, name in names.items()}


def _frozen(program: Program, device: torch.device) -> bool:
    return program.graph.name.startswith("vae_") and device.type == "cpu"


def _options(program: Program, device: torch.device) -> dict[str, Any]:
    frozen = _frozen(program, device)
    return OPTIONS | {"aot_inductor.package_constants_in_so": frozen, "freezing": frozen}
