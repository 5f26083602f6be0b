"""The aoti backend: the graphs of a bundle as shared objects of AOTInductor.

Such a bundle is code: opening it runs it. Open only bundles from a source whose programs you would run. This backend
always compares the hashes; they detect damage, but a malicious author can write matching ones.
"""

import json
import platform
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bundles.manifest import BackendSpec, GraphSpec, Manifest, TensorSpec
from engine.bundles.stages import GraphStages, NotHere, check_inputs

CPU_TARGET = "cpu-x86_64-avx2"  # instructions of x86-64-v3; AVX-512 machines run them too


def target_of(device: torch.device) -> str:
    """The target for which this machine compiles and runs graphs on `device`. NotHere if there is none."""
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm{major}{minor}"
    machine, level = platform.machine(), torch.backends.cpu.get_cpu_capability()
    if device.type != "cpu" or machine not in ("x86_64", "AMD64") or not level.startswith("AVX"):
        raise NotHere(f"aoti: got {device.type} on {machine} with {level}, expected a GPU that is there, "
                      "or x86_64 with AVX2")  # fmt: skip
    return CPU_TARGET


def signature(inputs: list[TensorSpec], outputs: list[TensorSpec], constants: Mapping[str, Tensor]) -> str:
    """A shared object's description of itself, as JSON: dtype and shape of every input and output, in order."""
    return json.dumps({
        "inputs": [[t.name, t.dtype, t.shape] for t in inputs],
        "outputs": [[t.name, t.dtype, t.shape] for t in outputs],
        "constants": [[name, *_kind(value)] for name, value in constants.items()],
    })  # fmt: skip


def _kind(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def open_object(file: Path, device: torch.device) -> Any:
    """torch's runner of one shared object. ValueError if it does not load."""
    try:
        if device.type == "cuda":
            return torch._C._aoti.AOTIModelContainerRunnerCuda(str(file), 1, str(device))
        return torch._C._aoti.AOTIModelContainerRunnerCpu(str(file), 1)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{file}: got a file that does not load, expected a graph of AOTInductor ({reason})") from None


class AotiGraph:
    """One shared object. It checks nothing itself, so every call compares shapes with the manifest."""

    def __init__(
        self, name: str, file: Path, spec: GraphSpec, weights: dict[str, Tensor], device: torch.device
    ) -> None:
        self.name, self.spec, self.device = name, spec, device
        self.runner = open_object(file, device)
        # With a wrong manifest the graph could read or write past a buffer.
        names: dict[str, str] = self.runner.get_constant_names_to_original_fqns()
        said = json.loads(self.runner.get_call_spec()[0])
        told = json.loads(signature(spec.inputs, spec.outputs, {names.get(n, n): w for n, w in weights.items()}))
        if not isinstance(said, dict) or said.keys() != told.keys():
            raise ValueError(f"{file}: got a graph without a signature, expected one of python -m export")
        used = set(names.values())  # the compiler drops unused weights
        said["constants"] = sorted(entry for entry in said["constants"] if entry[0] in used)
        told["constants"].sort()
        for what, expected in said.items():
            got = told[what]
            for mine, real in zip_longest(got, expected):
                if mine != real:
                    raise ValueError(f"{file}: {what}: got {mine} in the manifest, expected {real}")
        self._kept = {internal: value.to(device) for internal, value in weights.items()}  # the graph reads this memory
        if weights:
            self.runner.update_constant_buffer(self._kept, False, True, True)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph; it overwrites the inputs that the manifest lists under `mutates`."""
        check_inputs(self.name, self.spec.inputs, inputs, self.device)
        for name in self.spec.mutates:
            if not inputs[name].is_contiguous():
                raise ValueError(f"{self.name}: {name}: got strides {inputs[name].stride()}, expected contiguous ones")
        outputs = self.runner.run([inputs[spec.name].contiguous() for spec in self.spec.inputs])
        return {spec.name: tensor for spec, tensor in zip(self.spec.outputs, outputs, strict=True)}


class AotiStages(GraphStages):
    """Stages of a bundle's aoti backend."""

    name = "aoti"
    executable = True

    def __init__(
        self, folder: Path, manifest: Manifest, backend: BackendSpec, threads: int, device: torch.device,
        **options: Any,
    ) -> None:  # fmt: skip
        if backend.target != (here := target_of(device)):
            raise NotHere(f"aoti: got a bundle for {backend.target}, expected {here}, which this machine runs")
        made, has = (version.split("+")[0] for version in (backend.versions["torch"], torch.__version__))
        if made.split(".")[:2] != has.split(".")[:2]:
            raise NotHere(f"aoti: got graphs of torch {made}, expected {has}, which is installed (export again)")
        super().__init__(folder, manifest, backend, threads, device, **options)

    def open_graph(self, name: str, file: Path, spec: GraphSpec) -> AotiGraph:
        return AotiGraph(name, file, spec, self.weights.of(name, spec), self.device)
