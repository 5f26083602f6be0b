"""The memory plan of a bundle, counted from its manifest before anything is loaded.

Caches are exact. What a compiled graph allocates inside is estimated as what PyTorch's modules need for the same pass.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from engine.bundles.manifest import DTYPE_BYTES, BackendSpec, GraphSpec, Manifest, TensorSpec
from engine.generators import family_of
from engine.model.activations import transformer_activations
from engine.runtime.device import free_memory
from engine.runtime.memory_plan import (
    CLIP,
    CPU_SHARE,
    CUDA_SHARE,
    DECODING,
    PASS,
    PREPARING,
    STREAMING,
    MemoryPlan,
    Need,
)
from engine.weights.containers import SafetensorsFile

IMAGES = 8  # estimate: images of the widest layer that live at once in a VAE's graph
ARENAS = 2  # estimate: ONNX Runtime's memory grows in powers of two, and every session keeps its own


def plan_bundle(
    folder: Path, manifest: Manifest, backend: BackendSpec, device: torch.device, packs: bool = False
) -> MemoryPlan:
    """The plan of one backend's graphs. packs: the runtime copies weights into a layout of its own, graph by graph."""
    devices = dict.fromkeys((str(device), "cpu"))
    needs = (*_weights(folder, manifest, backend, device, packs), *_streaming(manifest, backend, device, packs))
    return MemoryPlan(
        tuple(need for need in needs if need.bytes + need.mapped > 0),
        {name: free_memory(torch.device(name)) for name in devices},
    )


def _weights(
    folder: Path, manifest: Manifest, backend: BackendSpec, device: torch.device, packs: bool
) -> Iterator[Need]:
    place, on_cpu = str(device), device.type == "cpu"
    stored = SafetensorsFile(folder / manifest.weights).tensors
    sizes = {name: math.prod(one.shape) * one.dtype.itemsize for name, one in stored.items()
             if isinstance(one.dtype, torch.dtype)}  # fmt: skip
    yield Need("weights", "cpu", 0, manifest.files[manifest.weights].bytes)
    used = {key for graph in backend.graphs.values() for key in graph.weights.values()}
    if not on_cpu:
        yield Need("weights on the device", place, sum(sizes.get(key, 0) for key in used))
    if packs:
        matrices = [key for graph in backend.graphs.values() for key in graph.weights.values()
                    if key in stored and len(stored[key].shape) > 1]  # fmt: skip
        yield Need("packed weights", place, sum(sizes[key] for key in matrices if key in sizes))
    files = sum(manifest.files[graph.file].bytes for graph in backend.graphs.values())
    yield Need("graphs", place, 0 if on_cpu else files, files if on_cpu else 0)
    yield Need("libraries (estimate)", "cpu", CPU_SHARE)
    if not on_cpu:
        yield Need("libraries (estimate)", place, CUDA_SHARE)


def _streaming(manifest: Manifest, backend: BackendSpec, device: torch.device, packs: bool) -> Iterator[Need]:
    place, graphs, config = str(device), backend.graphs, manifest.transformer_value()
    family, preset = family_of(manifest.preset_value()), manifest.preset_value()
    caches = {kind.role: _sum(_caches(graphs[kind.graph])) for kind in family.passes}  # by role: passes share them
    text = {role: _sum(graphs[f"prepare_text_{role}"].outputs) for role in family.roles()}
    yield Need("K/V caches", place, sum(caches.values()), during=STREAMING)
    yield Need("text K/V", place, sum(text.values()), during=STREAMING)
    yield Need("a new prompt's K/V", place, sum(text.values()), during=(PREPARING,))
    shapes = manifest.shapes()
    first = graphs[family.passes[0].graph]
    dtype = getattr(torch, next(spec.dtype for spec in first.inputs if spec.name == "latent"))
    rows = max(ring.slots for ring in family.rings(preset).values()) * shapes.tokens
    work = transformer_activations(config, preset.chunk * shapes.tokens, rows, dtype, fused=False)
    # Sessions of ONNX Runtime keep what they have allocated.
    held, passes = (STREAMING, ARENAS * len(family.passes)) if packs else ((PASS,), 1)
    yield Need("activations of a pass (estimate)", place, passes * work, during=held)
    decoding, encoding = _sum(graphs["vae_steady"].outputs[1:]), _sum(graphs["vae_encode_steady"].outputs[1:])
    yield Need("VAE caches", place, 2 * decoding, during=STREAMING)  # the old ones and the new ones
    held, times = (STREAMING, 2 * ARENAS) if packs else ((DECODING,), 1)
    yield Need("activations of decoding (estimate)", place, times * _images(graphs["vae_steady"], manifest),
               during=held)  # fmt: skip
    yield Need("activations of a clip (estimate)", place,
               2 * encoding + times * _images(graphs["vae_encode_steady"], manifest), during=(CLIP,))  # fmt: skip


def _caches(graph: GraphSpec) -> Iterator[TensorSpec]:
    written = {*graph.aliases.values(), *graph.mutates}
    return (spec for spec in graph.inputs if spec.name in written)


def _images(graph: GraphSpec, manifest: Manifest) -> int:
    """What lives in a call of the VAE: images of its widest layer. The caches tell how wide that is."""
    areas = [math.prod((*spec.shape[:2], *spec.shape[3:])) for spec in graph.inputs if len(spec.shape) == 5]
    return IMAGES * max(areas) * manifest.temporal * DTYPE_BYTES[graph.inputs[0].dtype]


def _sum(specs: Iterable[TensorSpec]) -> int:
    return sum(math.prod(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in specs)
